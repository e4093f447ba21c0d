"""The attention contract as functions, for the attentions of the folder and for anybody's own.

    python -m tests.models.contract performer package.module:Class

runs every check that applies and exits 1 when one fails. A check takes a `Case` (an attention and its
options), a sized one also a `Setting` (sizes and mask). Each raises AssertionError when its claim is false.

The reference of an attention is `naive_<name>` in its file; outside the folder, `naive_<class name in lower
case>` in the module of the class. Without one, the check against it does not apply.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lra import registry
from lra.options import construct

PADDING = 4  # tokens that a check may append: max_len is N + PADDING
HALVES = (torch.bfloat16, torch.float16)


class Setting(NamedTuple):
    """Sizes (B, H, N, D), distinct primes so that a confused axis cannot fit, and whether rows are padded."""

    size: tuple[int, int, int, int]
    ragged: bool

    def __str__(self):
        return "x".join(map(str, self.size)) + ("-ragged" if self.ragged else "")

    def mask(self) -> torch.Tensor | None:
        """Row b has N - 1 - 3b real tokens, at least one; None without padding."""
        B, _, N, _ = self.size
        return (
            torch.stack([torch.arange(N) < max(1, N - 1 - 3 * b) for b in range(B)]) if self.ragged else None
        )


SETTINGS = [Setting(s, r) for s in ((2, 3, 7, 5), (1, 1, 1, 5), (2, 1, 13, 11)) for r in (False, True)]
PADDED = SETTINGS[1]


class Case(NamedTuple):
    """An attention by its registry name, with options; `causal`: asked for its causal form in every call."""

    name: str
    options: dict[str, Any] = {}
    causal: bool = False

    def __str__(self):
        options = "".join(f",{key}={value}" for key, value in self.options.items())
        return self.name + options + (",causal" if self.causal else "")

    @property
    def cls(self) -> type:
        return registry.attention_class(self.name)

    @property
    def reference(self) -> Callable[..., torch.Tensor] | None:
        outside = self.name.partition(":")[2].lower()
        naive = getattr(sys.modules[self.cls.__module__], f"naive_{outside or self.name}", None)
        return functools.partial(naive, causal=True) if naive and self.causal else naive

    def build(self, setting: Setting, dtype=torch.float64, *, trained=True, max_len=None, **options) -> Any:
        """In evaluation mode. `trained` moves every parameter away from its initial value: at G = I, say,
        a transposed G would go unnoticed. `seed` and `layer` are options here."""
        _, H, N, D = setting.size
        torch.manual_seed(0)
        max_len = max_len or N + PADDING
        attention = registry.build_attention(
            self.name, heads=H, head_dim=D, max_len=max_len, **(self.options | options)
        ).to(dtype)
        with torch.no_grad():
            for parameter in attention.parameters() if trained else ():
                rms = parameter.square().mean().sqrt()
                parameter += 0.3 * torch.where(rms > 0, rms, 1.0) * torch.randn_like(parameter)
            if trained:
                # On short vectors with a mean and unequal directions: what is calibrated is not the identity.
                q, k = (0.15 * (x + torch.linspace(-1, 2, D)).to(dtype) for x in torch.randn(2, 3, H, 19, D))
                attention.calibrate(q * torch.linspace(0.5, 1.5, D).to(dtype), k)
        if self.causal:
            attention.forward = functools.partial(attention.forward, causal=True)
        return attention.eval()


class Check(NamedTuple):
    """`run(case)`, or `run(case, setting)` when sized; `applies(case)`: is the claim made at all?"""

    name: str
    run: Callable[..., None]
    sized: bool
    applies: Callable[[Case], bool]


CHECKS: dict[str, Check] = {}


def check(*, sized: bool = False, applies: Callable[[Case], bool] = lambda case: True):
    """Register a function as one check of the contract, under its own name."""

    def register(run):
        CHECKS[run.__name__] = Check(run.__name__, run, sized, applies)
        return run

    return register


def variants(name: str) -> list[Case]:
    """The defaults, and each value of each choice or switch on its own where the constructor accepts it; then
    all of them once more in the causal form where there is one."""
    cls = registry.attention_class(name)
    config, cases = cls.Config, [Case(name)]
    types = get_type_hints(config)
    for field in dataclasses.fields(config):
        kind = types[field.name]
        for value in get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else ():
            case = Case(name, {field.name: value})
            with contextlib.suppress(ValueError):
                case.build(PADDED)
                cases += [case] if value != field.default else []
    return cases + [case._replace(causal=True) for case in cases if cls.causal]


def failures(case: Case, names: Iterable[str] = CHECKS) -> dict[str, str]:
    """The named checks, of those that apply, that fail, with their messages."""
    found = {}
    for one in (CHECKS[name] for name in names if CHECKS[name].applies(case)):
        for setting in SETTINGS if one.sized else [None]:
            try:
                one.run(case, setting) if one.sized else one.run(case)
            except Exception as error:  # whatever an unknown class raises is its failure
                found.setdefault(one.name, f"{setting or ''} {type(error).__name__}: {error}".strip())
    return found


# Inputs and comparisons


def inputs(
    setting: Setting, dtype=torch.float64, *, seed: int = 0, strength: float = 1.0
) -> list[torch.Tensor]:
    """q, k (times `strength`) and v, standard normal, as leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(setting.size, generator=generator, dtype=torch.float64) for _ in range(3))
    return [x.to(dtype).requires_grad_() for x in (strength * q, strength * k, v)]


def appended(x: torch.Tensor, more: torch.Tensor, dim: int) -> torch.Tensor:
    """x then more, as a fresh leaf."""
    return torch.cat([x.detach(), more.detach()], dim).requires_grad_()


def real_tokens(out: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`out` with padded positions set to zero: what stands there is not part of the contract."""
    return out if mask is None else out.masked_fill(~mask[:, None, :, None], 0)


def outputs_and_gradients(out, mask, **leaves) -> dict[str, torch.Tensor]:
    """`out` and the gradients of a fixed random functional of its real tokens; 0 for an unused leaf."""
    out = real_tokens(out, mask)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    loss = (weight.to(out.dtype) * out).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return {"out": out.detach()} | {f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in pairs}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """Equal within `tolerance`, absolute and relative to the largest entry of each tensor."""
    for name, want in wanted.items():
        worst = (got[name] - want).abs().max() / want.abs().max().clamp(min=1)
        assert worst <= tolerance, f"{name} differs by {worst:.2e} > {tolerance:.0e}"


def assert_finite(tensors: dict[str, torch.Tensor], where: Any) -> None:
    for name, x in tensors.items():
        assert x.isfinite().all(), f"{name} is not finite: {where}"


def sdpa(q, k, v, mask, scale, causal=False):
    """Softmax attention by PyTorch, the target of `exact` and of `random` methods."""
    allowed = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    allowed = allowed if mask is None else allowed & mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


def run(attention, q, k, v, mask=None, **arguments) -> dict[str, torch.Tensor]:
    """Output and gradients of an attention, with respect to its inputs and its parameters."""
    out = attention(q, k, v, mask, **arguments)
    return outputs_and_gradients(out, mask, q=q, k=k, v=v, **dict(attention.named_parameters()))


# 1 Shapes, types, range


@check(sized=True)
def keeps_shape_dtype_and_device(case: Case, setting: Setting) -> None:
    for dtype in (torch.float64, torch.float32, *HALVES):
        q, k, v = inputs(setting, dtype)
        out = case.build(setting, dtype)(q, k, v, setting.mask())
        assert (out.shape, out.dtype, out.device) == (v.shape, v.dtype, v.device), f"{out.dtype} {out.shape}"


@check(sized=True)
def is_finite_with_queries_and_keys_times_30(case: Case, setting: Setting) -> None:
    for dtype in (torch.float32, *HALVES):
        for strength in (1.0, 30.0):
            q, k, v = inputs(setting, dtype, strength=strength)
            assert_finite(run(case.build(setting, dtype), q, k, v, setting.mask()), (dtype, strength))


@check(sized=True)
def is_finite_and_keeps_dtype_under_autocast(case: Case, setting: Setting) -> None:
    for half in HALVES:
        for dtype in (half, torch.float32):
            q, k, v = inputs(setting, dtype, strength=30.0)
            attention = case.build(setting, torch.float32)
            with torch.autocast("cpu", half):
                out = attention(q, k, v, setting.mask())
            assert out.dtype in (half, dtype), f"{dtype} became {out.dtype}"
            leaves = dict(attention.named_parameters())
            assert_finite(outputs_and_gradients(out, setting.mask(), q=q, k=k, v=v, **leaves), (half, dtype))


@check()
def half_precision_stays_close_on_long_sums(case: Case) -> None:
    setting = Setting((1, 1, 2048, 5), False)  # 2048 values around 100 sum to 204,800: beyond fp16
    for dtype in HALVES:
        q, k, v = (x.detach() for x in inputs(setting, dtype))
        attention = case.build(setting, torch.float32, trained=False, max_len=2048)
        for mask in (None, torch.arange(2048)[None] < 2000):
            wide = attention(q.float(), k.float(), v.float() + 100, mask)
            half = copy.deepcopy(attention).to(dtype)(q, k, v + 100, mask).float()
            assert_finite({"out": half}, dtype)
            error = (real_tokens(half - wide, mask)).abs().max() / wide.abs().max()
            assert error < 0.03, f"{dtype} is off by {error:.1%}"


@check(sized=True)
def leaves_its_inputs_alone_and_accepts_strided_ones(case: Case, setting: Setting) -> None:
    q, k, v = (x.detach() for x in inputs(setting))
    attention, copies = case.build(setting), [x.clone() for x in (q, k, v)]
    out = attention(q, k, v, setting.mask())
    assert all(torch.equal(x, c) for x, c in zip((q, k, v), copies, strict=True)), "an input was modified"
    strided = torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous().permute(2, 0, 3, 1, 4)
    assert_same({"out": attention(*strided, setting.mask())}, {"out": out}, 1e-12)


# 2-4 Rows and padding


@check(sized=True)
def batch_rows_are_independent(case: Case, setting: Setting) -> None:
    B, _, N, _ = setting.size
    mask, attention = setting.mask(), case.build(setting)
    alone = inputs(setting)
    both = [appended(a, 10 * o, 0) for a, o in zip(alone, inputs(setting, seed=1), strict=True)]
    mask_both = None if mask is None else torch.cat([mask, torch.ones(B, N, dtype=torch.bool)])
    out = attention(*both, mask_both)
    assert_same({"out": out[:B]}, {"out": attention(*alone, mask)}, 1e-12)
    grads = torch.autograd.grad(out[:B].sum(), both, allow_unused=True)
    assert all(g is None or (g[B:] == 0).all() for g in grads), "a gradient crosses from one row to another"


@check(sized=True)
def appending_padding_changes_nothing(case: Case, setting: Setting) -> None:
    B, _, N, _ = setting.size
    attention, short = case.build(setting), inputs(setting)
    long = [
        appended(x, 1e3 * y[:, :, :1].expand(-1, -1, PADDING, -1), 2)
        for x, y in zip(short, inputs(setting, seed=1), strict=True)
    ]
    mask = setting.mask()
    present = torch.ones(B, N, dtype=torch.bool) if mask is None else mask
    longer = F.pad(present, (0, PADDING), value=False)
    out = real_tokens(attention(*long, longer), longer)
    assert_same({"out": out[:, :, :N]}, {"out": real_tokens(attention(*short, mask), mask)}, 1e-10)
    grads = torch.autograd.grad(out.sum(), long, allow_unused=True)
    assert all(g is None or (real_tokens(g, ~longer) == 0).all() for g in grads), (
        "padding receives a gradient"
    )


@check(sized=True)
def garbage_at_masked_tokens_changes_nothing(case: Case, setting: Setting) -> None:
    B, _, N, _ = setting.size
    masks = [setting.mask()] if setting.ragged else []
    masks.append((torch.arange(N)[None] + torch.arange(B)[:, None]) % 3 != 1)  # holes, not only a tail
    attention = case.build(setting)
    for mask in masks:
        q, k, v = inputs(setting)
        zeros, garbage = (
            [
                real_tokens(x, mask) + real_tokens(value * y, ~mask)
                for x, y in zip((q, k, v), inputs(setting, seed=1), strict=True)
            ]
            for value in (0, 1e3)
        )
        wanted, got = attention(*zeros, mask), attention(*garbage, mask)
        assert_same({"out": real_tokens(got, mask)}, {"out": real_tokens(wanted, mask)}, 1e-10)


@check(sized=True)
def a_mask_of_ones_is_no_mask(case: Case, setting: Setting) -> None:
    B, _, N, _ = setting.size
    attention, (q, k, v) = case.build(setting), inputs(setting)
    everything = torch.ones(B, N, dtype=torch.bool)
    assert_same(run(attention, q, k, v, everything), run(attention, q, k, v), 1e-12)


@check(sized=True)
def an_empty_row_gives_zeros_and_finite_gradients(case: Case, setting: Setting) -> None:
    B, _, N, _ = setting.size
    mask = torch.ones(B, N, dtype=torch.bool) if setting.mask() is None else setting.mask()
    mask[0] = False
    for dtype in (torch.float64, torch.float32, *HALVES):
        attention, (q, k, v) = case.build(setting, dtype), inputs(setting, dtype, strength=30.0)
        out = attention(q, k, v, mask)
        assert (out[0] == 0).all(), "a row without real tokens is not zero"
        # The gradient of every output: a zero weight on the empty row would hide 0 * inf only by luck.
        leaves = dict(attention.named_parameters())
        got = outputs_and_gradients(out, None, q=q, k=k, v=v, **leaves)
        assert_finite(got, dtype)
        assert all((got[d][0] == 0).all() for d in ("dq", "dk", "dv")), "an empty row has a gradient"


# 5-6 Gradients, determinism


@check(sized=True)
def gradients_reach_every_input_and_parameter(case: Case, setting: Setting) -> None:
    if setting.size[2] == 1:
        return  # the only key has weight 1, whatever q and k are
    exempt = set() if case.cls.reads_qk else {"dq", "dk"}
    for name, grad in run(case.build(setting), *inputs(setting), setting.mask()).items():
        grads = grad.flatten(2).abs().amax(-1) if name in ("dq", "dk", "dv") else grad.abs().amax()
        assert name in exempt or (grads > 1e-12).all(), f"{name} is zero"


@check(sized=True)
def evaluation_is_deterministic(case: Case, setting: Setting) -> None:
    attention, (q, k, v) = case.build(setting), inputs(setting)
    state = copy.deepcopy(attention.state_dict())
    first = attention(q, k, v, setting.mask())
    torch.manual_seed(1)
    assert torch.equal(first, attention(q, k, v, setting.mask())), "two evaluations differ"
    after = attention.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in state), "evaluation changed the state"


@check(sized=True)
def training_is_seeded(case: Case, setting: Setting) -> None:
    q, k, v = inputs(setting)
    outs = []
    for _ in range(2):
        attention = case.build(setting).train()
        for step in range(3):
            attention.before_step(step)
            outs.append(attention(q, k, v, setting.mask()))
    assert all(torch.equal(a, b) for a, b in zip(outs[:3], outs[3:], strict=True)), "same seed, other outputs"


@check(applies=lambda case: case.cls.random)
def random_draws_follow_seed_and_layer(case: Case) -> None:
    outs = [
        case.build(PADDED, trained=False, seed=seed, layer=layer)(*inputs(PADDED), PADDED.mask())
        for seed, layer in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    for i, out in enumerate(outs):
        assert all(not torch.allclose(out, other) for other in outs[:i]), "two (seed, layer) draw the same"


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


@check(applies=lambda case: case.cls.random and "num_features" in get_type_hints(case.cls.Config))
def error_to_softmax_falls_as_one_over_root_features(case: Case) -> None:
    """At initialisation the kernel of a random-feature method is exp(scale q.k): at any other temperature
    the error would level off, and its slope against M leave -1/2."""
    q, k, v = (x.detach() for x in inputs(PADDED, strength=0.3))
    mask, counts, scales = PADDED.mask(), (32, 256, 2048), (None, 0.9)
    errors = torch.zeros(len(scales), len(counts), dtype=torch.float64)
    for column, features in enumerate(counts):
        for seed in range(32):
            attention = case.build(PADDED, trained=False, seed=seed, num_features=features)
            for row, scale in enumerate(scales):
                error = attention(q, k, v, mask, scale=scale).detach() - sdpa(
                    q, k, v, mask, scale, case.causal
                )
                errors[row, column] += real_tokens(error, mask).square().mean()
    for error in errors.sqrt() / 32**0.5:
        slope = (error[-1] / error[0]).log() / math.log(counts[-1] / counts[0])
        assert abs(slope + 0.5) < 0.1, f"error {error.tolist()} at M = {counts}: slope {slope:.2f}, not -1/2"


@check(applies=lambda case: not case.cls.causal)
def refuses_causal_when_it_has_no_causal_form(case: Case) -> None:
    _raises(ValueError, lambda: case.build(PADDED)(*inputs(PADDED), causal=True), "causal=True")


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
        assert all(g is None or (g[:, :, t:] == 0).all() for g in grads), (
            f"a gradient reaches beyond token {t}"
        )


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


@check(applies=lambda case: case.cls.linear)
def linear_memory_at_2n_is_below_2_2_times_that_at_n(case: Case) -> None:
    for masked in (False, True):
        peaks = []
        for N in (1024, 2048):
            setting = Setting((1, 1, N, 8), False)
            attention = case.build(setting, torch.float32, max_len=N)
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
    assert 0.9 * counted <= declared <= 1.1 * counted + 16 * B * H * N * D, (
        f"declared {declared}, counted {counted}"
    )
    sizes = [attention.state_bytes(n) for n in (N, 2 * N)]
    assert all(isinstance(s, int) and s > 0 for s in sizes), f"state_bytes = {sizes}"
    assert not case.cls.linear or sizes[1] < 2.2 * sizes[0], f"linear, but state_bytes {sizes}"


@check()
def compiled_equals_eager(case: Case) -> None:
    """Inductor: needs a C++ compiler, and seconds."""
    attention, (q, k, v), mask = (
        case.build(PADDED, torch.float32),
        inputs(PADDED, torch.float32),
        PADDED.mask(),
    )
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # PyTorch's own compiler uses torch.jit, and looks for gradients of intermediate results.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        compiled = torch.compile(attention)(q, k, v, mask)
        got = outputs_and_gradients(compiled, mask, q=q, k=k, v=v, **dict(attention.named_parameters()))
    assert_same(got, run(attention, q, k, v, mask), 1e-5)


# 13 Options, documentation, refusals


@check()
def config_round_trips_through_json(case: Case) -> None:
    config = construct(case.cls.Config, case.options, where="attention")
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert construct(case.cls.Config, values, where="attention") == config
    assert config.__dataclass_params__.frozen, "Config is not frozen"


@check()
def an_unknown_option_names_the_nearest(case: Case) -> None:
    known = [field.name for field in dataclasses.fields(case.cls.Config)]
    wrong = known[0][:-1] + "x" if known else "option"
    message = _raises(ValueError, lambda: case.build(PADDED, **{wrong: 1}), wrong)
    assert wrong in message and (known[0] if known else "none") in message, message


@check()
def is_documented(case: Case) -> None:
    for field in dataclasses.fields(case.cls.Config):
        assert field.metadata.get("help"), f"option {field.name} has no help"
        assert field.kw_only, f"option {field.name} can be given by position"
    source = r"arXiv [\w./-]*\d|doi\.org/|https?://"
    assert re.search(source, case.cls.__doc__ or ""), "the docstring cites no source"


@check()
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
        _raises(ValueError, lambda: attention(*arguments), what)  # noqa: B023, called at once


@check()
def max_len_binds_fixed_length_methods_only(case: Case) -> None:
    attention = case.build(PADDED, max_len=PADDED.size[2] - 1)
    if case.cls.fixed_length:
        _raises(ValueError, lambda: attention(*inputs(PADDED)), "a sequence beyond max_len")
    else:
        assert attention(*inputs(PADDED)).isfinite().all()


@check(applies=lambda case: not case.cls.reads_qk)
def output_depends_on_v_alone(case: Case) -> None:
    attention, (q, k, v) = case.build(PADDED), inputs(PADDED)
    assert torch.equal(attention(q, k, v), attention(v, v, v)), "reads_qk is False, yet q or k matter"


def _raises(kind: type[Exception], call: Callable[[], Any], what: str) -> str:
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what} was accepted without a {kind.__name__}")


def applicable(names: list[str]) -> Iterator[tuple[Case, Check, Setting | None]]:
    """Every test of the contract for the given attentions: sized checks for every variant and setting."""
    for name in names:
        for case in variants(name):
            for one in CHECKS.values():
                if one.applies(case) and (one.sized or not case.options):
                    yield from ((case, one, setting) for setting in (SETTINGS if one.sized else [None]))


if __name__ == "__main__":
    broken = False
    for argument in sys.argv[1:]:
        for found in ((case, failures(case)) for case in variants(argument)):
            broken |= bool(found[1])
            print(found[0], "holds" if not found[1] else "FAILS")
            print("".join(f"  {name}: {message}\n" for name, message in found[1].items()), end="")
    sys.exit(broken)
