"""Every attention of the folder keeps the contract, and every check of the contract can fail."""

import inspect
import os
import re
import shutil
import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import models.attention
from lra import registry
from lra.options import UsageError
from models import base
from models.attention import performer, softmax
from models.attention.softmax import naive_softmax
from models.base import AttentionBase
from tests.models.cases import PADDED, SETTINGS, Case, assert_same, inputs, run
from tests.models.contract import CHECKS, checks_of, failures, main, variants

NAMES = registry.attention_names()
TOGETHER = [  # options that change each other, need each other, or see less than the short rows of the contract
    Case("performer", {"align": "balance", "learn_mean": True, "target_norm": 1.0, "redraw_every": 2}),
    Case("darkformer", {"align": "balance", "init": "whitening", "proposal": "variance_optimal", "rank": 3}),
    Case("darkformer", {"align": "centre", "init": "aligned", "target_norm": 1.0, "learn_mean": True}),
    Case("darkformer", {"init": "whitening", "share_heads": True, "rank": 4}),
    Case("optimal", {"align": "balance", "pool": 3, "redraw_every": 1}),
    Case("performer", {"window": 2, "sinks": 1}),
    Case("lfk", {"window": 2}),
    Case("darkformer", {"window": 2, "sinks": 1, "align": "balance", "init": "aligned", "target_norm": 1.0}),
    Case("optimal", {"window": 2, "align": "centre"}),
    Case("local", {"window": 1}),
    Case("local", {"window": 2, "sinks": 3}),
    Case("local", {"window": 3, "sinks": 2, "shape": "blocks"}),
    Case("reformer", {"num_keys": 8, "rounds": 2, "buckets": 2}),
]
TOGETHER += [case._replace(causal=True) for case in TOGETHER]
CASES = {name: [*variants(name), *(case for case in TOGETHER if case.name == name)] for name in NAMES}
TESTS = [
    (check, name)
    for name, cases in CASES.items()
    for check in CHECKS
    if any(CHECKS[check] in checks_of(case) for case in cases)
]


def needs_compiler(check):
    if check == "compiled_equals_eager" and not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("torch.compile needs a C++ compiler: install g++ or set CXX")


@pytest.mark.parametrize(("check", "name"), TESTS)
def test_contract(check, name):
    """A check of an attention with each of its options, causal and not."""
    needs_compiler(check)
    for case in (case for case in CASES[name] if CHECKS[check] in checks_of(case)):
        try:
            CHECKS[check](case)
        except Exception as error:
            error.add_note(f"it is {case} that fails")
            raise


@pytest.mark.parametrize("name", NAMES)
def test_the_file_exports_config_attention_and_reference(name):
    module = registry.attention_module(name)
    assert issubclass(module.Attention, AttentionBase) and module.Attention.Config is module.Config
    reference = inspect.signature(getattr(module, f"naive_{name}"))
    assert list(reference.parameters)[:5] == ["attention", "q", "k", "v", "mask_BN"]
    assert reference.parameters["scale"].kind is inspect.Parameter.KEYWORD_ONLY


# Impostors: one defect each. `fails` is the check that has to find it.


def impostor(*fails, base=softmax.Attention, **traits):
    """Decorator: a subclass of `base` that attends as the function says and claims the given traits."""

    def plant(attend):
        members = {"__module__": __name__, "__doc__": base.__doc__, "attend": attend, "fails": fails}
        return type(attend.__name__, (base,), members | {"causal": False} | traits)

    return plant


def exact(attention, q, k, v, mask, scale, causal=False):
    return softmax.Attention.attend(attention, q, k, v, mask, scale, causal)


@impostor("gradients_reach_every_input_and_parameter", "exact_equals_scaled_dot_product_attention")
def Identity(self, q, k, v, mask, scale, causal):
    return v


@impostor("gradients_reach_every_input_and_parameter", "exact_equals_scaled_dot_product_attention")
def MeanOfValues(self, q, k, v, mask, scale, causal):
    return exact(self, 0 * q, k, v, mask, scale)


@impostor("exact_equals_scaled_dot_product_attention", "equals_the_naive_reference")
def WrongTemperature(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, 2 * scale)


naive_wrongtemperature = naive_softmax


@impostor("exact_equals_scaled_dot_product_attention")
def IgnoresScale(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, self.head_dim**-0.5)


@impostor("error_to_softmax_falls_as_one_over_root_features", base=performer.Attention)
def RandomAtAnotherTemperature(self, q, k, v, mask, scale, causal):
    return performer.Attention.attend(self, q, k, v, mask, 1.25 * scale, causal)


@impostor("garbage_at_masked_tokens_changes_nothing", "appending_padding_changes_nothing")
def LeaksPadding(self, q, k, v, mask, scale, causal):
    return exact(self, q - 0.1 * q.mean(2, keepdim=True), k, v, mask, scale)


@impostor("appending_padding_changes_nothing")
def DividesByLength(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale / q.shape[2])


@impostor("a_mask_of_ones_is_no_mask")
def NoticesTheMask(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale if mask is None else 2 * scale)


@impostor("batch_rows_are_independent")
def MixesRows(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v - 1e-3 * v.mean(0), mask, scale)


@impostor("an_empty_row_gives_zeros_and_finite_gradients")
def NoGuardForEmptyRows(self, q, k, v, mask, scale, causal):
    logits = scale * q @ k.transpose(-1, -2)
    return (logits if mask is None else logits.masked_fill(~mask[:, None, None], -torch.inf)).softmax(-1) @ v


@impostor("keeps_shape_dtype_and_device")
def WidensTheDtype(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale).float()


@impostor("is_finite_with_queries_and_keys_times_30", "is_finite_and_keeps_dtype_under_autocast")
def ExponentialOverflows(self, q, k, v, mask, scale, causal):
    weights = torch.exp(scale * q @ k.transpose(-1, -2))
    weights = weights if mask is None else weights * mask[:, None, None]
    return weights @ v / weights.sum(-1, keepdim=True)


@impostor("half_precision_stays_close_on_long_sums")
def SumsInHalf(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale) + 0 * v.sum(2, keepdim=True)


@impostor("leaves_its_inputs_alone_and_accepts_strided_ones")
def ScalesInPlace(self, q, k, v, mask, scale, causal):
    q.data.mul_(scale)
    return exact(self, q, k, v, mask, 1.0)


@impostor("evaluation_is_deterministic")
def RandomInEvaluation(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale * (1 + 1e-3 * torch.rand(())))


@impostor("training_is_seeded")
def DrawsFromNowhere(self, q, k, v, mask, scale, causal):
    noise = int.from_bytes(os.urandom(4), "little") / 2**32 if self.training else 0
    return exact(self, q, k, v, mask, scale * (1 + noise))


@impostor("random_draws_follow_seed_and_layer", random=True)
def ForgetsTheSeed(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale)


@impostor("refuses_causal_when_it_has_no_causal_form", "bad_input_raises_value_error", _check=lambda *_: None)
def ChecksNothing(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale)


@impostor("causal_outputs_depend_on_the_prefix_only", causal=True)
def LooksAhead(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale)


def growing_step(self, q, k, v, state=None, mask=None, *, scale=None):
    state = (
        [torch.cat([s, x[:, :, None]], 2) for s, x in zip(state, (k, v))] if state else [k[:, :, None], v[:, :, None]]
    )
    out = exact(self, q[:, :, None], *state, None, self.head_dim**-0.5)
    return out[:, :, 0], state


@impostor("steps_equal_the_causal_form", causal=True, recurrent=True, step=growing_step)
def KeepsEveryToken(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale, causal)


@impostor("linear_memory_at_2n_is_below_2_2_times_that_at_n")
def HoldsTheMatrix(self, q, k, v, mask, scale, causal):
    return NoGuardForEmptyRows.attend(self, q, k, v, mask, scale, causal)


@impostor("declared_cost_is_the_cost", flops=lambda self, B, H, N, D: 2 * B * H * N * N * D)
def CountsHalf(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale)


@impostor("compiled_equals_eager")
def OtherWhenCompiled(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale * (2 if torch.compiler.is_compiling() else 1))


@impostor("max_len_binds_fixed_length_methods_only", fixed_length=True, _check=lambda *_: None)
def AnyLengthAfterAll(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale)


@impostor("output_depends_on_v_alone", reads_qk=False)
def ReadsThemAnyway(self, q, k, v, mask, scale, causal):
    return exact(self, q, k, v, mask, scale)


class LosesItsState(softmax.Attention):
    """A temperature that the state dict does not hold (arXiv 1706.03762)."""

    fails = ("state_dict_round_trip_is_bitwise",)

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.register_buffer("temperature", torch.tensor(1.0 + self.seed), persistent=False)

    def attend(self, q, k, v, mask, scale, causal):
        return exact(self, q, k, v, mask, scale * self.temperature.item())


class UnusedParameter(softmax.Attention):
    """A parameter that nothing depends on (arXiv 1706.03762)."""

    fails = ("gradients_reach_every_input_and_parameter",)

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.idle = nn.Parameter(torch.ones(1))


@dataclass
class LooseConfig:
    """Neither frozen nor explained."""

    width: int = 1


class Undocumented(softmax.Attention):
    """From somewhere."""

    Config = LooseConfig
    causal = False
    fails = ("config_round_trips_through_json", "is_documented")


class CannotBeBuilt(softmax.Attention):
    """Wants an argument that nobody gives (arXiv 1706.03762)."""

    fails = ("can_be_built",)

    def __init__(self, config, *, width, **shape):
        super().__init__(config, **shape)


class Honest(softmax.Attention):
    """Anybody's own file: softmax under another name (arXiv 1706.03762)."""


naive_honest = naive_softmax

IMPOSTORS = [c for c in list(globals().values()) if isinstance(c, type) and hasattr(c, "fails")]


@pytest.mark.parametrize(
    ("impostor", "check"), [pytest.param(i, c, id=f"{i.__name__}-{c}") for i in IMPOSTORS for c in i.fails]
)
def test_an_impostor_fails_the_check_meant_for_it(impostor, check):
    case = Case(f"{__name__}:{impostor.__name__}", causal=impostor.causal)
    needs_compiler(check)
    error = failures(case, [check])[check].partition(":")[0]
    assert error.endswith("TypeError" if check == "can_be_built" else "AssertionError")


def test_an_option_that_is_swallowed_fails_its_check(monkeypatch):
    monkeypatch.setattr(registry, "construct", lambda cls, values, where: cls())
    name = "an_unknown_option_names_the_nearest"
    assert name in failures(Case("performer"), [name])


def test_every_check_has_an_impostor_that_fails_it():
    assert {c for i in IMPOSTORS for c in i.fails} == set(CHECKS) - {"an_unknown_option_names_the_nearest"}


def test_an_outside_class_passes_through_the_registry_and_the_contract():
    name = f"{__name__}:Honest"
    cases = [Case(name), Case(name, causal=True)]
    assert registry.attention_class(name) is Honest and variants(name) == cases
    assert CHECKS["equals_the_naive_reference"].applies(Case(name))
    assert [failures(case, set(CHECKS) - {"compiled_equals_eager"}) for case in cases] == [{}, {}]


def test_a_constant_in_float32_is_named_as_the_likely_cause():
    @impostor("equals_the_naive_reference")
    def Tenth(self, q, k, v, mask, scale, causal):
        return exact(self, q, k, v, mask, scale * float(torch.tensor(0.1)) * 10)

    case = Case("softmax")
    attention = Tenth(case.cls.Config(), heads=3, head_dim=5, max_len=9)
    with pytest.raises(AssertionError, match="float32"):
        assert_same(run(attention, *inputs(PADDED)), run(case.build(PADDED), *inputs(PADDED)), 1e-9)


def test_the_example_of_the_documentation_keeps_the_contract(tmp_path, monkeypatch):
    """models/base.py shows one attention: it, and a reference, as an outside module."""
    source = re.search(r"^    @dataclass.*?(?=^What must hold)", base.__doc__, re.M | re.S)[0]
    header = "from dataclasses import dataclass\nimport torch, torch.nn.functional as F\nfrom models.base import *\n"
    naive = """
def naive_attention(attention, q, k, v, mask_BN=None, *, scale=None):
    kernel = (attention.config.sharpness * F.cosine_similarity(q[..., :, None, :], k[..., None, :, :], -1)).exp()
    return naive_average(kernel, v, mask_BN, False)
"""
    (tmp_path / "angles.py").write_text(header + textwrap.dedent(source) + naive)
    monkeypatch.syspath_prepend(tmp_path)
    case = Case("angles:Attention")
    assert failures(case, set(CHECKS) - {"compiled_equals_eager"}) == {}


# The command


def test_the_command_runs_the_checks_of_the_tests(capsys, monkeypatch):
    asked = []
    for name, check in CHECKS.items():
        plain = check._replace(run=lambda case, setting=None, name=name: asked.append((name, case, setting)))
        monkeypatch.setitem(CHECKS, name, plain)
    assert main(["linformer"]) == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["holds"] * 4
    wanted = [f"{check.name}-{case}" for case in variants("linformer") for check in checks_of(case)]
    assert list(dict.fromkeys(f"{name}-{case}" for name, case, _ in asked)) == wanted
    assert {setting for _, case, setting in asked if not case.options} == {None, *SETTINGS}
    assert {check for check, attention in TESTS if attention == "linformer"} == {name for name, *_ in asked}


def test_the_command_names_what_fails_and_what_cannot_be_imported(capsys):
    assert main([f"{__name__}:CannotBeBuilt"]) == 1
    assert "can_be_built: TypeError" in capsys.readouterr().out
    assert main(["no.such.module:Attention"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.count("\n") == 1 and "no.such.module" in out.err


@pytest.mark.parametrize("text", ["def broken(:\n", "import no_such_package\n", "class Attention: pass\n"])
def test_a_broken_file_fails_its_own_test_alone(text, tmp_path, monkeypatch):
    (tmp_path / "unfinished.py").write_text(text)
    monkeypatch.setattr(models.attention, "__path__", [*models.attention.__path__, str(tmp_path)])
    (case,) = variants("unfinished")
    assert [check.name for check in checks_of(case)] == ["can_be_built"]
    assert set(failures(case)) == {"can_be_built"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("perfomer", "'performer'"),
        ("no.such.module:Attention", "no.such.module:Attention"),
        (f"{__name__}:Missing", "Missing"),
        ("torch.nn:Linear", "torch.nn has no class Linear(AttentionBase)"),
    ],
)
def test_a_wrong_attention_name_is_one_line_that_names_it(name, said):
    with pytest.raises(UsageError) as error:
        registry.attention_class(name)
    assert said in str(error.value) and "\n" not in str(error.value)
