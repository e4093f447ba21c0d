"""Dropout, the linear layer and half squares: the definition, the gradient, and what is left alone."""

import pytest
import torch
from torch import nn

from models.layers import Dropout, Linear, half_square, product

SHAPE = (101, 103, 7)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_zero_with_probability_p_else_scaled_so_that_the_mean_stays(p, dtype):
    out = Dropout(p)(torch.ones(SHAPE, dtype=dtype))
    assert out.dtype == dtype and out.unique().tolist() == [0.0, pytest.approx(1 / (1 - p), rel=2**-8)]
    kept, n = (out > 0).double().mean().item(), out.numel()
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / n) ** 0.5 + 2**-16


def test_every_place_is_dropped_equally_and_independently_of_its_neighbours():
    # Four elements share one number of the generator.
    dropped = torch.stack([Dropout(0.3)(torch.ones(64)) == 0 for _ in range(4001)]).double()
    noise = (0.3 * 0.7 / len(dropped)) ** 0.5
    assert (dropped.mean(0) - 0.3).abs().max() < 5 * noise
    off = torch.corrcoef(dropped.T) - torch.eye(64)
    assert off.abs().max() < 5 / len(dropped) ** 0.5


def test_gradient_passes_where_values_did_and_nowhere_else():
    x = torch.randn(SHAPE, requires_grad=True)
    out = Dropout(0.25)(x)
    g = torch.randn(SHAPE)
    out.backward(g)
    torch.testing.assert_close(x.grad, torch.where(out == 0, 0.0, g / 0.75))
    torch.testing.assert_close(out, torch.where(out == 0, 0.0, x / 0.75))


def test_seed_decides_and_threads_do_not():
    drawn = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        drawn.append(Dropout(0.5)(torch.ones(SHAPE)))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("module", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_drawn_where_nothing_is_dropped(module):
    x, state = torch.randn(SHAPE), torch.get_rng_state()
    assert torch.equal(module(x), x) and torch.equal(torch.get_rng_state(), state)


def test_all_is_dropped_at_one_and_a_bad_probability_is_refused_as_in_torch():
    assert not Dropout(1.0)(torch.ones(SHAPE)).any()
    for made in (Dropout, nn.Dropout):
        with pytest.raises(ValueError, match="1.5"):
            made(1.5)


# Products


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_on_a_cpu_equal_float64_whatever_the_strides():
    x, w, bias = (normal(7, 5, seed=1).float(), normal(11, 5, seed=2).float(), normal(11, seed=3).float())
    gaps = torch.empty(11, 3, 5)[:, 1].copy_(w)
    wanted = x.double() @ w.double().T + bias.double()
    for weight in (w, w.T.contiguous().T, gaps):
        torch.testing.assert_close(product(x, weight, bias).double(), wanted, rtol=0, atol=1e-5)
    batch = product(x.expand(2, 7, 5), w.expand(2, 11, 5), bias.expand(2, 11))
    torch.testing.assert_close(batch.double(), wanted.expand(2, 7, 11), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 7, 5)])
def test_the_linear_layer_equals_that_of_pytorch_with_its_gradients(shape):
    torch.manual_seed(0)
    ours, theirs = Linear(5, 11), torch.nn.Linear(5, 11)
    theirs.load_state_dict(ours.state_dict())
    x, y = (normal(*shape).float().requires_grad_() for _ in range(2))
    out, wanted = ours(x), theirs(y)
    torch.testing.assert_close(out, wanted)
    weight = normal(*wanted.shape, seed=4).float()
    got = torch.autograd.grad((weight * out).sum(), [x, *ours.parameters()])
    for a, b in zip(got, torch.autograd.grad((weight * wanted).sum(), [y, *theirs.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_the_linear_layer_follows_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(5, 11)(torch.ones(7, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [7, 13109])  # from 2^16 numbers on they have a gradient of their own
def test_half_squares_and_their_gradients_are_right_at_zero_too(rows):
    x = normal(rows, 5).requires_grad_()
    with torch.no_grad():
        x[3] = 0
    g, w = normal(rows, seed=1), normal(5, 3, seed=2)
    same, out = half_square(x)
    torch.testing.assert_close(out, x.square().sum(-1) / 2)
    read = (same @ w).sum()
    torch.testing.assert_close(torch.autograd.grad((g * out).sum(), x, retain_graph=True)[0], g[:, None] * x)
    torch.testing.assert_close(
        torch.autograd.grad((g * out).sum() + read, x, retain_graph=True)[0], g[:, None] * x + w.sum(1)
    )
    torch.testing.assert_close(torch.autograd.grad(read, x)[0], w.sum(1).expand(rows, -1))
