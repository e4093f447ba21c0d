"""The one attention of the family: every backend against the definition, with gradients through both outputs."""

import functools
import re
import types

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from models.features import flash as module
from models.features.flash import KERNELS, NEVER, backend, flash, plain, why_plain, wide

B, H, Q, K, D = 2, 3, 7, 11, 5
CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def leaves(dtype=torch.float64, *, causal=False, strength=1.0, width=D, seed=0):
    """q (the same in every row), k, v and biases; row 0 has one key alone, row 1 none in head 2."""
    source = torch.Generator().manual_seed(seed)
    n = Q if causal else K
    q, k, v, bias = (
        torch.randn(shape, generator=source, dtype=torch.float64)
        for shape in ((1, H, Q, width), (B, H, n, width), (B, H, n, width), (B, H, n))
    )
    bias = 3 * bias
    bias[0, :, 1:], bias[1, 2] = NEVER, NEVER
    tensors = [(strength * q).to(dtype), (strength * k).to(dtype), v.to(dtype), bias.to(wide(dtype))]
    return [x.requires_grad_() for x in tensors]


def results(run, xs, causal):
    """out, lse and the gradients of a functional of both, which leaves out the head without keys."""
    q, *rest = xs
    out, lse = run(q.expand(B, -1, -1, -1), *rest, causal)
    source = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=source, dtype=torch.float64).to(x.dtype) for x in (out, lse)]
    for w in weights:
        w[1, 2] = 0
    loss = sum((w * x).sum() for w, x in zip(weights, (out, lse), strict=True))
    return [out, lse, *torch.autograd.grad(loss, xs)]


def assert_close(got, wanted, tolerance):
    for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
        assert x.isfinite().all(), f"tensor {i} is not finite"
        error = (x.double() - y.double()).abs().max() / y.double().abs().clamp(max=1e6).max().clamp(min=1)
        assert error < tolerance, f"tensor {i} is off by {error:.1e}"


def called(q, k, v, bias, causal):
    return flash(q, k, v, bias, causal=causal)


@CAUSAL
@pytest.mark.parametrize("chunk", [1, 3 * H, 2**19])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_fused_kernel_equals_the_definition(dtype, chunk, causal, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    xs = leaves(dtype, causal=causal)
    exact = [x.detach().double().requires_grad_() for x in xs]
    assert_close(results(called, xs, causal), results(plain, exact, causal), TOLERANCE[dtype])


def efficient(q, k, v, bias, compute_lse, dropout, causal, *, scale):
    """Stands in for CUDA's operator: lse is filled up to a multiple of 32."""
    assert bias is None and compute_lse and not dropout and scale == 1.0
    assert all(x.shape[-1] % 8 == 0 for x in (q, k, v))
    out, lse = plain(q, k, v, torch.zeros_like(k[..., 0], dtype=wide(k.dtype)), causal)
    return out, torch.nn.functional.pad(lse, (0, -Q % 32), value=float("inf")), None, None


def efficient_backward(g, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal, *, scale):
    """Its backward, as its kernel computes it."""
    assert lse.shape[-1] % 32 == 0 and lse[..., Q:].isinf().all() and wanted == [True, True, True, False]
    logits = q.to(lse) @ k.to(lse).mT
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    p = (logits - lse[..., :Q, None]).exp()
    delta = (g.to(lse) * out.to(lse)).sum(-1, keepdim=True)
    S = p * (g.to(lse) @ v.to(lse).mT - delta)
    return *((x.to(q.dtype)) for x in (S @ k.to(lse), S.mT @ q.to(lse), p.mT @ g.to(lse))), None


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_path_of_a_gpu_is_right_up_to_its_kernel(dtype, causal, monkeypatch):
    """Widths, columns of biases, the filled-up lse: the operators alone are replaced."""
    names = "_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"
    stand_in = types.SimpleNamespace(**dict(zip(names, (efficient, efficient_backward), strict=True)))
    monkeypatch.setattr(module, "aten", stand_in)
    monkeypatch.setitem(KERNELS, "cpu", KERNELS["cuda"])
    monkeypatch.setattr(module, "_trial", lambda *_: "")
    xs = leaves(dtype, causal=causal)
    exact = [x.detach().double().requires_grad_() for x in xs]
    assert_close(results(module._Flash.apply, xs, causal), results(plain, exact, causal), TOLERANCE[dtype])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32_on_a_cpu(half):
    q, k, v, bias = (x.detach() for x in leaves(torch.float32, strength=30.0))
    halves = [x.to(half) for x in (q.expand(B, -1, -1, -1), k, v)]
    out, lse = flash(*halves, bias)
    assert out.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(out, flash(*(x.float() for x in halves), bias)[0])


def test_autocast_changes_nothing():
    q, *rest = (x.detach() for x in leaves(torch.float32))
    xs = q.expand(B, -1, -1, -1), *rest
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = flash(*xs)
    assert torch.equal(out, flash(*xs)[0]) and torch.equal(lse, flash(*xs)[1])


@CAUSAL
@pytest.mark.filterwarnings("ignore")  # of PyTorch's compiler
def test_compiled_it_is_one_node_with_the_same_gradients(causal):
    xs = leaves(torch.float32, causal=causal)
    torch._dynamo.reset()
    compiled = torch.compile(called, backend="aot_eager", fullgraph=True)
    got = results(compiled, xs, causal)
    assert_close(got, results(called, xs, causal), 1e-6)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(results(compiled, xs, causal), got, 1e-5)


def test_gradients_are_given_where_they_are_asked_for_only():
    q, *rest = (x.detach() for x in leaves())
    xs = [q.expand(B, -1, -1, -1), *rest]
    xs[2].requires_grad_()
    flash(*xs)[0].sum().backward()
    assert xs[2].grad is not None and all(x.grad is None for i, x in enumerate(xs) if i != 2)
    assert not flash(*(x.detach() for x in xs))[0].requires_grad


def test_gradient_checkpointing_changes_nothing():
    again = functools.partial(checkpoint, called, use_reentrant=False)
    pairs = zip(results(called, leaves(), False), results(again, leaves(), False), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


def test_a_second_derivative_is_refused_and_not_wrong():
    q, *rest = xs = leaves()
    out, _ = flash(q.expand(B, -1, -1, -1), *rest)
    grads = torch.autograd.grad(out.square().sum(), xs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_small_sizes_are_written_out_with_the_same_results(dtype, causal, monkeypatch):
    xs = leaves(dtype, causal=causal)
    fused = results(called, xs, causal)
    monkeypatch.setattr(module, "SMALL", B * H * Q * K)
    monkeypatch.setattr(module, "backward", None)
    assert_close(results(called, xs, causal), fused, TOLERANCE[dtype])


# Which backend


@pytest.fixture
def forget():
    """What was found out about the kernels of this machine is found out again."""
    module._trial.cache_clear()
    yield
    module._trial.cache_clear()


def test_a_cpu_has_a_fused_kernel_and_others_are_plain():
    assert {backend("cpu", dtype) for dtype in (torch.float32, torch.float64)} == {"fused"}
    assert backend("mps", torch.float32) == backend("meta", torch.float32) == "plain"
    with sdpa_kernel(SDPBackend.MATH):
        assert backend("cpu", torch.float32) == "plain"


CPU = KERNELS["cpu"]


@pytest.mark.parametrize(
    "kernels",
    [
        CPU._replace(forward=lambda *_: torch.ops.aten.no_such_operator()),
        CPU._replace(forward=lambda q, *rest: CPU.forward(q / 2, *rest)),
        CPU._replace(backward=lambda g, *rest: CPU.backward(2 * g, *rest)),
    ],
    ids=["absent", "another forward", "another backward"],
)
def test_a_kernel_that_is_absent_or_changed_is_not_used(kernels, forget, monkeypatch):
    monkeypatch.setitem(KERNELS, "cpu", kernels)
    assert backend("cpu", torch.float32) == "plain"
    assert re.search("raises AttributeError|other numbers", why_plain("cpu", torch.float32))
    xs = leaves(torch.float32)
    assert_close(results(called, xs, False), results(plain, xs, False), 1e-6)
