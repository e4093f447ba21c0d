"""Batches: a pure function of (seed, step), bucketed by length; evaluation reads every example once."""

import numpy as np
import pytest
import torch

from lra.training.batches import ROUND, Batches, collate, evaluation_batches, example_lengths
from tasks.base import PAD, Split

PRIMES = (211, 7)  # examples, batch


def ragged(n, towers=1, longest=257, seed=0, shortest=2):
    """A split of random lengths whose label is the example's number modulo 251."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, n * towers)
    return Split.of([rng.integers(1, 17, k) for k in lengths], np.arange(n) % 251)


def contents(split, towers, i):
    """The sequences of an example."""
    return [split.sequence(towers * i + t).tolist() for t in range(towers)]


def unpadded(batch):
    """The real tokens of each example of a batch."""
    return [[[t for t in row if t != PAD] for row in example] for example in batch.tokens_BTN.tolist()]


# Evaluation


@pytest.mark.parametrize("n, size", [PRIMES, (13, 64), (64, 64), (65, 64), (1, 3)])
@pytest.mark.parametrize("towers", [1, 2])
def test_rule_5_every_example_is_evaluated_once_none_dropped_none_twice(n, size, towers):
    split = ragged(n, towers)
    seen = []
    for chosen, batch in evaluation_batches(split, towers, size=size):
        assert len(chosen) == len(batch.labels_B) == len(batch.tokens_BTN) <= size
        assert batch.labels_B.tolist() == split.labels[chosen].tolist()
        assert unpadded(batch) == [contents(split, towers, i) for i in chosen]
        seen += chosen.tolist()
    assert sorted(seen) == list(range(n))


def test_evaluation_puts_predictions_back_in_the_order_of_the_split():
    from lra.training.evaluate import Where, evaluate

    split = ragged(*PRIMES[:1])
    split = Split(split.tokens, split.offsets, split.labels % 17)

    class Echo(torch.nn.Module):
        """Predicts the first token."""

        def forward(self, tokens_BTN, mask_BTN):
            return torch.nn.functional.one_hot(tokens_BTN[:, 0, 0], 17).float()

    model = Echo().train()
    counts = evaluate(model, split, 1, batch=PRIMES[1], where=Where(torch.device("cpu")))
    first = [int(split.sequence(i)[0]) for i in range(PRIMES[0])]
    assert counts.predictions.tolist() == first and counts.n == PRIMES[0]
    assert counts.n_correct == sum(p == label for p, label in zip(first, split.labels.tolist(), strict=True))
    assert model.training


# Training


def test_batches_are_a_pure_function_of_seed_and_step():
    split = ragged(*PRIMES[:1])
    forward, backward = (Batches(split, 1, size=PRIMES[1], seed=3) for _ in range(2))
    steps = range(2 * forward.per_epoch + 3)
    first = {s: forward.batch(s) for s in steps}
    for s in reversed(steps):
        again = backward.batch(s)
        assert torch.equal(first[s].tokens_BTN, again.tokens_BTN)
        assert torch.equal(first[s].labels_B, again.labels_B)


def test_another_seed_and_another_epoch_give_another_order():
    split = ragged(*PRIMES[:1])
    one, two = Batches(split, 1, size=7, seed=0), Batches(split, 1, size=7, seed=1)
    labels = [one.batch(0).labels_B.tolist(), two.batch(0).labels_B.tolist(), one.batch(30).labels_B.tolist()]
    assert len({tuple(x) for x in labels}) == 3


@pytest.mark.parametrize("towers", [1, 2])
def test_epoch_covers_each_example_at_most_once_and_leaves_out_less_than_a_batch(towers):
    n, size = PRIMES
    batches = Batches(ragged(n, towers), towers, size=size, seed=0)
    for epoch in range(3):
        seen = []
        for step in range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch):
            seen += batches.batch(step).labels_B.tolist()
        assert len(seen) == len(set(seen)) == n - n % size


def test_every_example_is_seen_within_a_few_epochs():
    n, size = PRIMES
    batches = Batches(ragged(n), 1, size=size, seed=0)
    seen = {label for step in range(4 * batches.per_epoch) for label in batches.batch(step).labels_B.tolist()}
    assert seen == set(range(n))


def test_batches_hold_the_tokens_and_label_of_their_examples():
    split = ragged(31, 2, longest=40)
    by_label = {int(label): contents(split, 2, i) for i, label in enumerate(split.labels)}
    batches = Batches(split, 2, size=5, seed=0)
    for step in range(batches.per_epoch):
        batch = batches.batch(step)
        assert batch.tokens_BTN.shape[:2] == (5, 2)
        assert unpadded(batch) == [by_label[label] for label in batch.labels_B.tolist()]


def test_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="batch of 32 examples from a training split of 31"):
        Batches(ragged(31), 1, size=32, seed=0)


# Padding


def test_bucketing_bounds_the_share_of_padding():
    split = ragged(20_011, longest=1000)
    batches = Batches(split, 1, size=32, seed=0)
    tokens, area = 0, 0
    for step in range(100):
        batch = batches.batch(step)
        area += batch.tokens_BTN.numel()
        tokens += int((batch.tokens_BTN != PAD).sum())
    assert 1 - tokens / area < 0.10  # 2.5% of length, and half of ROUND of 500; about 50% without bucketing


def test_nothing_is_padded_to_the_maximum():
    split = ragged(211, longest=1000)
    batches = Batches(split, 1, size=7, seed=0)
    widths = [batches.batch(s).tokens_BTN.shape[2] for s in range(batches.per_epoch)]
    assert min(widths) < 200 and all(w % ROUND == 0 or w == batches.cap for w in widths)
    for chosen, batch in evaluation_batches(split, 1, size=7):
        longest = int(example_lengths(split, 1)[chosen].max())
        assert longest <= batch.tokens_BTN.shape[2] < longest + ROUND


def test_order_of_batches_is_not_that_of_length():
    batches = Batches(ragged(20_011, longest=1000), 1, size=32, seed=0)
    widths = [batches.batch(s).tokens_BTN.shape[2] for s in range(200)]
    assert abs(np.corrcoef(widths, np.arange(200))[0, 1]) < 0.3


@pytest.mark.parametrize("towers", [1, 2])
def test_mask_is_true_at_real_tokens_and_absent_without_padding(towers):
    split = ragged(11, towers, longest=70)
    batch = collate(split, towers, np.arange(11), 70)
    assert batch.mask_BTN.dtype == torch.bool and torch.equal(batch.mask_BTN, batch.tokens_BTN != PAD)
    even = ragged(11, towers, longest=64, shortest=64)
    assert collate(even, towers, np.arange(11), 64).mask_BTN is None


def test_sequences_beyond_the_cap_are_never_cut():
    """The cap only limits rounding: a validation sequence may be longer than every training sequence."""
    split = ragged(5, longest=50, shortest=45)
    batch = collate(split, 1, np.arange(5), 13)
    assert unpadded(batch) == [contents(split, 1, i) for i in range(5)]


def test_example_is_as_long_as_its_longest_tower():
    split = Split.of([np.ones(k) for k in (3, 9, 8, 2)], [0, 1])
    assert example_lengths(split, 2).tolist() == [9, 8] and example_lengths(split, 1).tolist() == [3, 9, 8, 2]
