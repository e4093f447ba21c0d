"""Batches: prepared arrays -> padded tensors, bucketed by length, a pure function of (seed, step)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from tasks.base import PAD, Batch, Split

# Share of the tokens that self-pretraining masks, by what a task reads (Amos et al., arXiv 2310.02980, appendix).
MASKED = {"symbols": 0.1, "bytes": 0.15, "pixels": 0.5}
UNASKED = -100  # the label that no loss counts
POOL = 32  # batches sorted by length together: enough to bucket well, few enough to stay random
ROUND = 32  # a batch's length is rounded up to a multiple of this, so that few shapes occur


class Batches:
    """Training batches of one split. `batch(step)` needs no history, so a resumed run sees the same data. Each epoch is
    a seeded permutation cut into pools of POOL batches; a pool is sorted by length, cut into batches and the batches
    shuffled. What does not fill the last batch of an epoch waits for another epoch."""

    def __init__(self, split: Split, towers: int, *, size: int, seed: int):
        self.split, self.towers, self.size, self.seed = split, towers, size, seed
        self.lengths = example_lengths(split, towers)
        self.per_epoch = len(self.lengths) // size
        if self.per_epoch == 0:
            raise ValueError(f"batch of {size} examples from a training split of {len(self.lengths)}")
        self.cap = int(self.lengths.max())
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def batch(self, step: int, share: float = 0) -> Batch:
        """The batch of optimizer step `step` = 0, 1, ...; with a `share` of its tokens `masked`, if not 0."""
        epoch, index = divmod(step, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        batch = collate(self.split, self.towers, self._epoch[1][index], self.cap)
        return masked(batch, share, np.random.default_rng([self.seed, step, 1])) if share else batch

    def widths(self) -> np.ndarray:
        """Tokens that each batch of the first epoch is padded to."""
        return np.array([padded(self.lengths[chosen].max(), self.cap) for chosen in self._order(0)])

    def _order(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        examples = rng.permutation(len(self.lengths))[: self.per_epoch * self.size]
        batches: list[np.ndarray] = []
        for start in range(0, len(examples), POOL * self.size):
            pool = examples[start : start + POOL * self.size]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self.size)
        return [batches[i] for i in rng.permutation(len(batches))]


def masked(batch: Batch, share: float, rng: np.random.Generator) -> Batch:
    """Masked reconstruction in the place of labels: of each sequence, `share` of the real tokens, one at least, take
    the id of padding, and are asked for. They stay real tokens."""
    tokens_BTN = batch.tokens_BTN.numpy().copy()
    real_BTN = tokens_BTN != PAD
    count_BT1 = np.maximum(1, np.rint(share * real_BTN.sum(-1, keepdims=True))).astype(np.int64)
    asked_BTK = np.where(real_BTN, rng.random(real_BTN.shape), 1).argsort(-1)[..., : count_BT1.max()]
    counts_BTK = np.arange(asked_BTK.shape[-1]) < count_BT1
    there_BTK = np.take_along_axis(tokens_BTN, asked_BTK, -1)
    np.put_along_axis(tokens_BTN, asked_BTK, np.where(counts_BTK, PAD, there_BTK), -1)
    labels = np.where(counts_BTK, there_BTK, UNASKED).reshape(len(tokens_BTN), -1)
    tokens, labels, asked = map(torch.from_numpy, (tokens_BTN, labels, asked_BTK))
    return Batch(tokens, batch.mask_BTN, labels, asked)


def evaluation_batches(split: Split, towers: int, *, size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every example exactly once, in order of length: (example numbers, batch)."""
    lengths = example_lengths(split, towers)
    order = np.argsort(lengths, kind="stable")
    for chosen in np.split(order, range(size, len(order), size)):
        yield chosen, collate(split, towers, chosen, int(lengths.max()))


def evaluation_widths(split: Split, towers: int, *, size: int) -> np.ndarray:
    """Tokens that each evaluation batch is padded to."""
    lengths = np.sort(example_lengths(split, towers))
    last = [*range(size - 1, len(lengths) - 1, size), len(lengths) - 1]
    return np.array([padded(longest, lengths[-1]) for longest in lengths[last]])


def example_lengths(split: Split, towers: int) -> np.ndarray:
    """Tokens of each example's longest sequence."""
    return np.diff(split.offsets).reshape(-1, towers).max(1)


def padded(longest: int, cap: int) -> int:
    """`longest` rounded up to ROUND where that stays within `cap`."""
    return max(longest, min(-(-longest // ROUND) * ROUND, cap))


def collate(split: Split, towers: int, examples: np.ndarray, cap: int) -> Batch:
    """The chosen examples, as long as the longest of their sequences is `padded` to."""
    rows = (towers * examples[:, None] + np.arange(towers)).ravel()
    lengths = split.offsets[rows + 1] - split.offsets[rows]
    width = padded(int(lengths.max()), cap)
    tokens = np.full((len(rows), width), PAD, np.int64)
    source = np.asarray(split.tokens)  # slices of a memory map are slow to make, those of its view are not
    for row, start, length in zip(tokens, split.offsets[rows].tolist(), lengths.tolist(), strict=True):
        row[:length] = source[start : start + length]
    shape = (len(examples), towers, width)
    mask = torch.from_numpy(np.arange(width) < lengths[:, None]).view(shape) if lengths.min() < width else None
    labels = torch.from_numpy(split.labels[examples].astype(np.int64))
    return Batch(torch.from_numpy(tokens).view(shape), mask, labels)
