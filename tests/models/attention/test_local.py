"""The sliding window: which tokens it holds, and softmax as its limit."""

import pytest
import torch

from tests.models.cases import Case, Setting, assert_same, inputs, run

N = 13
SETTING = Setting((2, 3, N, 5), True)
SLOPES = torch.tensor([0.5, 0.25, 0.125]).double()
CAUSAL = pytest.mark.parametrize("causal", [False, True])


@CAUSAL
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [N - 1, N, 64])
def test_a_window_over_everything_is_softmax(window, alibi, causal):
    local, softmax = Case("local", {"window": window}, causal), Case("softmax", {}, causal)
    results = []
    for attention in (local.build(SETTING), softmax.build(SETTING)):
        if alibi:
            attention.add_alibi(SLOPES)
        results += [run(attention, *inputs(SETTING), mask) for mask in (None, SETTING.mask())]
    for got, wanted in zip(results[:2], results[2:], strict=True):
        assert_same(got, wanted, 1e-12)


def weights(attention, n=N, **arguments):
    """The weights (N, N) of the first head, read off with one-hot values."""
    q, k, _ = (x.detach() for x in inputs(Setting((1, 3, n, n), False)))
    return attention(q, k, torch.eye(n).double().expand(1, 3, n, n), **arguments)[0, 0]


@CAUSAL
@pytest.mark.parametrize("window", [1, 2, 3, 5, 11])
def test_every_token_sees_its_window_wherever_blocks_end(window, causal):
    """Blocks that do not overlap, as in LRA's local attention, cut the window at their edges."""
    attention = Case("local", {"window": window}).build(Setting((1, 3, N, N), False))
    ahead = torch.arange(N) - torch.arange(N)[:, None]
    inside = (ahead.abs() <= window) & ((ahead <= 0) | (not causal))
    seen = weights(attention, causal=causal)
    assert torch.equal(seen > 0, inside)
    torch.testing.assert_close(seen.sum(1), torch.ones(N).double())


@CAUSAL
@pytest.mark.parametrize("shape", ["sliding", "blocks"])
@pytest.mark.parametrize("sinks", [1, 2, 4])
def test_sinks_are_seen_by_all_and_once(sinks, shape, causal):
    options = {"window": 2, "sinks": sinks, "shape": shape}
    attention = Case("local", options).build(Setting((1, 3, N, N), False))
    place = torch.arange(N)
    ahead = (place - place[:, None]) if shape == "sliding" else 2 * (place // 2 - place[:, None] // 2)
    inside = (ahead.abs() <= 2) | (place < sinks)
    inside &= (place <= place[:, None]) | (not causal)
    seen = weights(attention, causal=causal)
    assert torch.equal(seen > 0, inside)
    q, k, _ = (x.detach() for x in inputs(Setting((1, 3, N, N), False)))
    logits = (N**-0.5 * q @ k.mT)[0, 0].masked_fill(~inside, float("-inf"))
    torch.testing.assert_close(seen, logits.softmax(-1))


@pytest.mark.parametrize("window", [2, 5])
def test_steps_with_alibi_equal_the_causal_form(window):
    attention, (q, k, v), state = Case("local", {"window": window}).build(SETTING), inputs(SETTING), None
    attention.add_alibi(SLOPES)
    wanted = attention(q, k, v, causal=True)
    for i in range(N):
        out, state = attention.step(q[:, :, i], k[:, :, i], v[:, :, i], state)
        torch.testing.assert_close(out, wanted[:, :, i])
    assert state.k_BHKD.shape == state.v_BHKD.shape == (2, 3, window, 5)


@CAUSAL
def test_alibi_lowers_logits_by_distance_within_the_window(causal):
    plain, biased = (Case("local", {"window": 3}).build(Setting((1, 3, N, N), False)) for _ in range(2))
    biased.add_alibi(SLOPES)
    before, after = (weights(attention, causal=causal) for attention in (plain, biased))
    ratio = (after / before).log()
    distance = (torch.arange(N) - torch.arange(N)[:, None]).abs()
    wanted = ratio.diagonal()[:, None] - SLOPES[0] * distance
    torch.testing.assert_close(ratio[before > 0], wanted[before > 0])


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1; got 0"):
        Case("local", {"window": 0}).build(SETTING)
