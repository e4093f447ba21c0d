"""Dropout: the definition, its gradient, and what it leaves alone."""

import pytest
import torch
from torch import nn

from models.dropout import Dropout

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
