"""The engine: both forms against the textbook, with gradients, in every way it can be called."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.features import causal as prefix
from models.features import engine, gemm
from models.features.engine import attend

B, H, N, D, M = 2, 3, 7, 5, 11
LONG = 301  # more than two chunks of the causal form
FORMS = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaves(n=N, dtype=torch.float64, *, strength=1.0, biased=True):
    """q, k, v, aq, ak and, when biased, key_bias and feature_bias."""
    shapes = [(B, H, n, D)] * 3 + [(H, M, D)] * 2 + [(B, H, n), (H, M)] * biased
    found = [normal(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    found[0], found[1] = strength * found[0], strength * found[1]
    return [x.to(dtype).requires_grad_() for x in found]


def textbook(q, k, v, aq, ak, key_bias=None, feature_bias=None, mask=None, *, causal=False):
    """phi(q) phi(k)^T, features written out, one division."""
    r = torch.einsum("hmd,bhnd->bhnm", aq, q)
    l = torch.einsum("hmd,bhnd->bhnm", ak, k)  # noqa: E741, as in the equations
    if key_bias is not None:
        l = l + key_bias[..., None] + feature_bias[:, None, :]  # noqa: E741
    kernel = r.exp() @ l.exp().mT
    if mask is not None:
        kernel = kernel * mask[:, None, None, :]
    kernel = kernel.tril() if causal else kernel
    total = kernel.sum(-1, keepdim=True)
    return kernel @ v / torch.where(total == 0, 1, total)


def masks(n):
    rows = torch.arange(n), torch.arange(B)[:, None]
    return {
        "no mask": None,
        "padded": rows[0] < n - rows[1] * (n // 2),
        "holes": (rows[0] + rows[1]) % 3 != 1,
        "padded on the left": rows[0] >= (1 + rows[1]) * (n // 3),
        "an empty row": (rows[0] >= 0) & (rows[1] > 0),
    }


def gradients(out, xs, mask):
    weight = normal(*out.shape, seed=9).to(out.dtype)
    if mask is not None:
        weight = weight * mask[:, None, :, None]
    return torch.autograd.grad((weight * out).sum(), xs)


def assert_equals_the_textbook(n, mask, causal, biased=True, dtype=torch.float64, tolerance=1e-11):
    xs = leaves(n, dtype, biased=biased)
    wide = [x.detach().double().requires_grad_() for x in xs]
    biases = xs[5:] or [None, None]
    got = attend(*xs[:5], *biases, mask, causal=causal)
    wanted = textbook(*wide, mask=mask, causal=causal)
    pairs = [(got, wanted), *zip(gradients(got, xs, mask), gradients(wanted, wide, mask), strict=True)]
    for i, (x, y) in enumerate(pairs):
        if mask is not None and i == 0:
            x, y = (z.masked_fill(~mask[:, None, :, None], 0) for z in (x, y))
        error = (x - y).abs().max() / y.abs().max().clamp(min=1)
        assert error < tolerance, f"tensor {i} is off by {error:.1e}"


@FORMS
@pytest.mark.parametrize("mask", masks(N))
@pytest.mark.parametrize("n", [1, N, LONG])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_textbook_form_with_its_gradients(n, mask, biased, causal):
    assert_equals_the_textbook(n, masks(n)[mask], causal, biased)


@FORMS
def test_fp32_is_as_close_as_fp32_can_be(causal):
    assert_equals_the_textbook(LONG, masks(LONG)["holes"], causal, dtype=torch.float32, tolerance=2e-5)


WAYS = {
    "heads singly": lambda q, aq, causal: [(b, h) for b in range(B) for h in range(H)],
    "row by row": lambda q, aq, causal: [(slice(b, b + 1), slice(None)) for b in range(B)],
    "all at once, as on a GPU": lambda q, aq, causal: [(slice(None), slice(None))],
}


@FORMS
@pytest.mark.parametrize("way", WAYS)
def test_heads_may_be_computed_singly_or_in_batches(way, causal, monkeypatch):
    monkeypatch.setattr(engine, "units", WAYS[way])
    for mask in masks(LONG).values():
        assert_equals_the_textbook(LONG, mask, causal)
    assert_equals_the_textbook(LONG, None, causal, dtype=torch.float32, tolerance=2e-5)


@FORMS
def test_every_head_of_every_row_is_computed_once(causal):
    for n, m in ((7, 11), (301, 5000)):
        q, aq = torch.zeros(37, H, n, D), torch.zeros(H, m, D)
        seen = torch.zeros(37, H)
        for unit in engine.units(q, aq, causal):
            seen[unit] += 1
        assert (seen == 1).all()


@FORMS
def test_the_size_of_a_chunk_changes_nothing(causal, monkeypatch):
    monkeypatch.setattr(prefix, "ROWS", 5)
    for module in (gemm, engine):
        monkeypatch.setattr(module, "CACHE", 5 * M)
    for mask in masks(LONG).values():
        assert_equals_the_textbook(LONG, mask, causal)


@FORMS
def test_a_constant_added_to_every_bias_changes_nothing(causal):
    xs = [x.detach() for x in leaves()]
    wanted = attend(*xs, causal=causal)
    shifted = attend(*xs[:5], xs[5] + 70, xs[6] - 900, causal=causal)
    torch.testing.assert_close(shifted, wanted, rtol=0, atol=1e-12)


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("strength", [1.0, 30.0])
def test_half_precision_is_within_two_percent_of_float64(dtype, strength, causal):
    """Of float64 on the same rounded inputs, relative in norm, gradients finite; logits up to some thousand."""
    q, k, v, aq, ak = leaves(LONG, strength=strength, biased=False)
    key_bias = (-k.detach().square().sum(-1) / 2).float()
    half = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    a = [x.detach().float().requires_grad_() for x in (aq, ak)]
    out = attend(*half, *a, key_bias, causal=causal)
    xs = [x.detach().double() for x in (*half, *a)]
    wanted = attend(*xs, key_bias.double(), causal=causal)
    assert out.dtype == dtype and (out - wanted).norm() / wanted.norm() < 0.02
    assert all(g.isfinite().all() for g in gradients(out, [*half, *a], None))
    low, high = v.detach().amin(2, keepdim=True), v.detach().amax(2, keepdim=True)
    assert (out >= low - 0.02).all() and (out <= high + 0.02).all()


@FORMS
def test_gradient_checkpointing_changes_nothing(causal):
    xs = leaves(LONG)
    call = functools.partial(attend, causal=causal)
    plain, again = call(*xs), checkpoint(call, *xs, use_reentrant=False)
    assert torch.equal(plain, again)
    pairs = zip(gradients(plain, xs, None), gradients(again, xs, None), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@FORMS
def test_a_second_derivative_is_refused_and_not_wrong(causal):
    xs = leaves()
    grads = torch.autograd.grad(attend(*xs, causal=causal).square().sum(), xs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()


@FORMS
def test_gradients_are_given_where_they_are_asked_for_only(causal):
    xs = [x.detach() for x in leaves()]
    xs[2].requires_grad_()
    out = attend(*xs, causal=causal)
    out.sum().backward()
    assert xs[2].grad is not None and all(x.grad is None for i, x in enumerate(xs) if i != 2)
    assert not attend(*(x.detach() for x in xs), causal=causal).requires_grad


# The causal form


@pytest.mark.parametrize("strength", [1.0, 30.0, 300.0])
def test_a_key_larger_than_all_before_it_by_any_amount_is_exact(strength):
    """The trap of a shared reference: exp(l - c) of a later key overflows, or the past underflows."""
    xs = [x.detach() for x in leaves(LONG, biased=False)]
    jumps = torch.zeros(B, H, LONG).double()
    jumps[:, :, 100], jumps[:, :, 140], jumps[:, :, 141:] = strength, 3 * strength, 2 * strength
    zero = torch.zeros(H, M).double()
    wanted = textbook(*xs, jumps, zero, causal=True)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        got = attend(*(x.to(dtype) for x in (*xs, jumps, zero)), causal=True)
        if strength < 300:  # beyond, the textbook form itself overflows
            torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance)
        torch.testing.assert_close(got[:, :, :100].double(), wanted[:, :, :100], rtol=0, atol=tolerance)
        assert got.isfinite().all()


def test_a_stabiliser_over_the_future_would_leak_and_ours_does_not():
    """performer-pytorch's causal mode changes earlier outputs when later tokens are enlarged."""
    q, k, v, aq, ak = (x.detach().float() for x in leaves(LONG, biased=False))
    key_bias = -k.square().sum(-1) / 2
    out = attend(q, k, v, aq, ak, key_bias, causal=True)
    for start in (1, 5, 130, 300):
        wild = [torch.cat([x[:, :, :start], 30 * x[:, :, start:]], 2) for x in (q, k, v)]
        changed = attend(*wild, aq, ak, -wild[1].square().sum(-1) / 2, causal=True)
        torch.testing.assert_close(changed[:, :, :start], out[:, :, :start], rtol=0, atol=1e-5)
        assert not torch.allclose(changed[:, :, start:], out[:, :, start:])
