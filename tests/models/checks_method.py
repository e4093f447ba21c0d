"""Checks of the contract: what a method computes, causal and step by step; state, cost, compiled form, options."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import warnings
from typing import get_type_hints

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lra.options import construct
from tests.models.cases import (
    PADDED,
    Case,
    Setting,
    appended,
    assert_same,
    check,
    combined,
    inputs,
    outputs_and_gradients,
    raises,
    real_tokens,
    run,
    sdpa,
)

# 7-9 What is computed


def has_reference(case: Case) -> bool:
    return case.reference is not None or ":" not in case.name


@check(sized=True, applies=has_reference)
def equals_the_naive_reference(case: Case, setting: Setting) -> None:
    assert case.reference is not None, f"models/attention/{case.name}.py exports no naive_{case.name}"
    attention, mask = case.build(setting), setting.mask()
    for scale in (None, 0.3):
        q, k, v = inputs(setting)
        naive = case.reference(attention, q, k, v, mask, scale=scale)
        wanted = outputs_and_gradients(naive, mask, q=q, k=k, v=v, **dict(attention.named_parameters()))
        assert_same(run(attention, q, k, v, mask, scale=scale), wanted, 1e-9)


@check(sized=True, applies=lambda case: case.cls.exact)
def exact_equals_scaled_dot_product_attention(case: Case, setting: Setting) -> None:
    attention, (q, k, v), mask = case.build(setting), inputs(setting), setting.mask()
    for scale in (None, 0.3):
        wanted = outputs_and_gradients(sdpa(q, k, v, mask, scale, case.causal), mask, q=q, k=k, v=v)
        assert_same(run(attention, q, k, v, mask, scale=scale), wanted, 1e-12)


def starts_as_softmax(case: Case) -> bool:
    """Whether features estimate exp(scale q.k) at initialisation; with rank < D they estimate another kernel."""
    features = case.cls.random and "num_features" in get_type_hints(case.cls.Config)
    return features and "rank" not in case.options and not case.causal and not combined(case)


@check(applies=starts_as_softmax)
def error_to_softmax_falls_as_one_over_root_features(case: Case) -> None:
    """At any other temperature than that of exp(scale q.k), the error would level off, and its slope against M
    leave -1/2."""
    q, k, v = (x.detach() for x in inputs(PADDED, strength=0.3))
    mask, counts, scales = PADDED.mask(), (16, 128, 1024), (None, 0.9)
    errors = torch.zeros(len(scales), len(counts), dtype=torch.float64)
    for column, features in enumerate(counts):
        for seed in range(32):
            attention = case.build(PADDED, trained=False, seed=seed, num_features=features)
            for row, scale in enumerate(scales):
                error = attention(q, k, v, mask, scale=scale).detach() - sdpa(q, k, v, mask, scale, case.causal)
                errors[row, column] += real_tokens(error, mask).square().mean()
    for error in errors.sqrt() / 32**0.5:
        slope = (error[-1] / error[0]).log() / math.log(counts[-1] / counts[0])
        assert abs(slope + 0.5) < 0.1, f"error {error.tolist()} at M = {counts}: slope {slope:.2f}, not -1/2"


@check(applies=lambda case: not case.cls.causal)
def refuses_causal_when_it_has_no_causal_form(case: Case) -> None:
    raises(ValueError, lambda: case.build(PADDED)(*inputs(PADDED), causal=True), "causal=True")


@check(sized=True, applies=lambda case: case.causal)
def causal_outputs_depend_on_the_prefix_only(case: Case, setting: Setting) -> None:
    N, mask, attention = setting.size[2], setting.mask(), case.build(setting, torch.float32)
    plain, wild = inputs(setting, torch.float32), inputs(setting, torch.float32, seed=1, strength=30.0)
    wanted = real_tokens(attention(*plain, mask), mask)
    for t in range(1, N):
        changed = [appended(x[:, :, :t], y[:, :, t:], 2) for x, y in zip(plain, wild, strict=True)]
        out = real_tokens(attention(*changed, mask), mask)[:, :, :t]
        assert_same({"out": out}, {"out": wanted[:, :, :t]}, 1e-6)
        grads = torch.autograd.grad(out.sum(), changed, allow_unused=True)
        assert all(g is None or (g[:, :, t:] == 0).all() for g in grads), f"a gradient reaches beyond token {t}"


@check(sized=True, applies=lambda case: case.causal and case.cls.recurrent)
def steps_equal_the_causal_form(case: Case, setting: Setting) -> None:
    """Token by token from a state of constant size, gradients through all of it included."""
    mask, attention = setting.mask(), case.build(setting)
    for strength in (1.0, 30.0):
        q, k, v = inputs(setting, strength=strength)
        state, outs, sizes = None, [], set()
        for i in range(setting.size[2]):
            real = None if mask is None else mask[:, i]
            out, state = attention.step(q[:, :, i], k[:, :, i], v[:, :, i], state, real)
            outs.append(out)
            sizes.add(sum(x.numel() for x in tree_leaves(state) if isinstance(x, torch.Tensor)))
        assert len(sizes) == 1, f"the state grows: {sorted(sizes)} numbers"
        leaves = dict(q=q, k=k, v=v, **dict(attention.named_parameters()))
        got = outputs_and_gradients(torch.stack(outs, 2), mask, **leaves)
        assert_same(got, run(attention, q, k, v, mask), 1e-9)
        first = max(1, setting.size[2] // 2)
        state = attention.state_after(*(x[:, :, :first] for x in (k, v)), None if mask is None else mask[:, :first])
        for i in range(first, setting.size[2]):
            real = None if mask is None else mask[:, i]
            out, state = attention.step(q[:, :, i], k[:, :, i], v[:, :, i], state, real)
            assert_same({f"{i} after {first} at once": out}, {f"{i} after {first} at once": outs[i]}, 1e-9)


# 10-12 State, cost, compilation


@check(sized=True)
def state_dict_round_trip_is_bitwise(case: Case, setting: Setting) -> None:
    trained, fresh = case.build(setting, torch.float32), case.build(setting, torch.float32, seed=1, layer=2)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    q, k, v = inputs(setting, torch.float32)
    assert torch.equal(trained(q, k, v, setting.mask()), fresh(q, k, v, setting.mask())), "state was lost"


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the tensors made inside the context and still alive, whatever the allocator does."""

    def __init__(self):
        super().__init__()
        self.peak, self._live = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                ref = StorageWeakRef(x.untyped_storage())
                self._live[ref.cdata] = (ref, x.untyped_storage().nbytes())
        self._live = {key: pair for key, pair in self._live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


@check(applies=lambda case: case.cls.linear_memory and (combined(case) or not case.options))
def linear_memory_at_2n_is_below_2_2_times_that_at_n(case: Case) -> None:
    for masked in (False, True):
        peaks = []
        for N in (1024, 2048):
            setting = Setting((1, 1, N, 8), False)
            wide = {"window": 64} if "window" in case.options else {}  # blocks of 2 tokens take a minute
            attention = case.build(setting, torch.float32, max_len=N, **wide)
            q, k, v = inputs(setting, torch.float32)
            mask = torch.arange(N)[None] < N - 5 if masked else None
            with LiveBytes() as live:
                attention(q, k, v, mask).sum().backward()
            peaks.append(live.peak)
        assert peaks[1] < 2.2 * peaks[0], f"peak bytes {peaks[0]} -> {peaks[1]}: x{peaks[1] / peaks[0]:.2f}"


@check(applies=lambda case: not case.causal)
def declared_cost_is_the_cost(case: Case) -> None:
    """`flops` against the matrix products that PyTorch counts, in float64: it does not count oneDNN's. What
    it leaves out is elementwise."""
    setting = Setting((1, 2, 512, 16), False)
    (B, H, N, D), attention = setting.size, case.build(setting, torch.float64)
    q, k, v = inputs(setting, torch.float64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attention(q, k, v)
    declared, counted = attention.flops(B, H, N, D), counter.get_total_flops()
    assert isinstance(declared, int) and declared > 0, f"flops = {declared!r}"
    assert 0.9 * counted <= declared <= 1.1 * counted + 16 * B * H * N * D, f"declared {declared}, counted {counted}"
    sizes = [attention.state_bytes(n) for n in (N, 2 * N)]
    assert all(isinstance(s, int) and s > 0 for s in sizes), f"state_bytes = {sizes}"
    assert not case.cls.linear_memory or sizes[1] < 2.2 * sizes[0], f"linear_memory, but state_bytes {sizes}"


GENERATED = ("softmax", "performer", "linear")  # PyTorch's fused operator, the family's own, a recurrence in chunks


@check(applies=lambda case: not case.options or (combined(case) and not case.causal))
def compiled_equals_eager(case: Case) -> None:
    """Inductor, as the trainer compiles, for GENERATED and whatever comes from outside: its C++ needs a compiler and
    up to a minute. For the others, and where options are combined, the graphs that Inductor would be given, forward
    and backward; the forward graph of a causal form."""
    attention, (q, k, v), mask = (case.build(PADDED, torch.float32), inputs(PADDED, torch.float32), PADDED.mask())
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # PyTorch's own compiler uses torch.jit, and looks for gradients of intermediate results.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        backend = "inductor" if case.name in GENERATED or ":" in case.name else "aot_eager_decomp_partition"
        backend = "eager" if case.causal else "aot_eager" if case.options else backend
        compiled = torch.compile(attention, backend=backend)(q, k, v, mask)
        got = outputs_and_gradients(compiled, mask, q=q, k=k, v=v, **dict(attention.named_parameters()))
    assert_same(got, run(attention, q, k, v, mask), 1e-5)


# 13 Options, documentation, refusals


@check(applies=lambda case: not case.causal)
def config_round_trips_through_json(case: Case) -> None:
    config = construct(case.cls.Config, case.options, where="attention")
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert construct(case.cls.Config, values, where="attention") == config
    assert config.__dataclass_params__.frozen, "Config is not frozen"


@check(applies=lambda case: not case.causal)
def an_unknown_option_names_the_nearest(case: Case) -> None:
    known = [field.name for field in dataclasses.fields(case.cls.Config)]
    wrong = known[0][:-1] + "x" if known else "option"
    message = raises(ValueError, lambda: case.build(PADDED, **{wrong: 1}), wrong)
    assert wrong in message and (known[0] if known else "none") in message, message


@check(applies=lambda case: not case.causal)
def is_documented(case: Case) -> None:
    for field in dataclasses.fields(case.cls.Config):
        assert field.metadata.get("help"), f"option {field.name} has no help"
        assert field.kw_only, f"option {field.name} can be given by position"
    source = r"arXiv [\w./-]*\d|doi\.org/|https?://"
    assert re.search(source, case.cls.__doc__ or ""), "the docstring cites no source"


@check(applies=lambda case: not case.causal)
def bad_input_raises_value_error(case: Case) -> None:
    B, H, N, _ = PADDED.size
    attention, (q, k, v), mask = case.build(PADDED), inputs(PADDED), PADDED.mask()
    bad = {
        "three axes": (q[0], k[0], v[0]),
        "heads": (q[:, :2], k[:, :2], v[:, :2]),
        "head width": (q[..., :4], k[..., :4], v[..., :4]),
        "token-major layout": tuple(x.transpose(1, 2) for x in (q, k, v)),
        "fewer keys than values": (q, k[:, :, :-1], v),
        "float mask": (q, k, v, mask.to(q.dtype)),
        "integer mask": (q, k, v, mask.long()),
        "mask of other length": (q, k, v, mask[:, :-1]),
        "mask per head": (q, k, v, mask[:, None].expand(B, H, N)),
        "mask of one row": (q, k, v, mask[:1]),
    }
    for what, arguments in bad.items():
        raises(ValueError, lambda: attention(*arguments), what)  # noqa: B023, called at once


@check(applies=lambda case: not case.causal)
def max_len_binds_fixed_length_methods_only(case: Case) -> None:
    attention = case.build(PADDED, max_len=PADDED.size[2] - 1)
    if case.cls.fixed_length:
        raises(ValueError, lambda: attention(*inputs(PADDED)), "a sequence beyond max_len")
    else:
        assert attention(*inputs(PADDED)).isfinite().all()


@check(applies=lambda case: not case.cls.reads_qk)
def output_depends_on_v_alone(case: Case) -> None:
    attention, (q, k, v) = case.build(PADDED), inputs(PADDED)
    assert torch.equal(attention(q, k, v), attention(v, v, v)), "reads_qk is False, yet q or k matter"
