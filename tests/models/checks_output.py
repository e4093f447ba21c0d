"""Checks of the contract: types and range, rows and padding, gradients and determinism."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from lra import registry
from tests.models.cases import (
    HALVES,
    PADDED,
    PADDING,
    Case,
    Setting,
    appended,
    assert_finite,
    assert_same,
    check,
    combined,
    inputs,
    outputs_and_gradients,
    real_tokens,
    run,
)

# 1 Construction, shapes, types, range


@check()
def can_be_built(case: Case) -> None:
    registry.attention_class(case.name)
    assert case.loads, f"{case.name} has no dataclass Config"
    case.build(PADDED)


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


@check(applies=lambda case: combined(case) or not case.options)
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
    assert all(g is None or (real_tokens(g, ~longer) == 0).all() for g in grads), "padding receives a gradient"


@check(sized=True)
def garbage_at_masked_tokens_changes_nothing(case: Case, setting: Setting) -> None:
    B, _, N, _ = setting.size
    masks = [setting.mask()] if setting.ragged else []
    masks.append((torch.arange(N)[None] + torch.arange(B)[:, None]) % 3 != 1)  # holes, not only a tail
    attention = case.build(setting)
    for mask in masks:
        q, k, v = inputs(setting)
        present = mask[:, None, :, None]
        wanted = run(attention, *inputs(setting), mask)
        for in_q, in_k_and_v in ((1e3, 1e3), (0.0, float("nan")), (0.0, float("inf"))):
            garbage = ((in_q, q), (in_k_and_v, k), (in_k_and_v, v))
            got = run(attention, *(x.detach().where(present, value).requires_grad_() for value, x in garbage), mask)
            assert_same(*({name: real_tokens(x, mask) if x.dim() == 4 else x for name, x in result.items()}
                          for result in (got, wanted)), 1e-10)  # fmt: skip


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
