"""A task made for tests: is symbol 1 more frequent than symbol 2? Train sequences are the shortest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tasks.base import Built, Data, Meta, Optim, Recipe, Split, Stack
from tasks.store.files import sha256_file
from tasks.store.sources import check_source, find_one

NAMES = dict.fromkeys(("embedded", "local"), "tiny")
META = Meta(name="tiny", version=1, classes=2, vocab=5, description="the more frequent symbol", datasets=NAMES)

SIZES = {"train": 61, "val": 13, "test": 23}
LONGEST = {"train": 13, "val": 37, "test": 37}

RECIPES = {
    preset: Recipe(
        data=Data(seq_len=41, **SIZES),
        encoder=Stack(width=12, ffn=14),
        train=Optim(steps=steps, batch=8, lr=1e-2, warmup=3, eval_every=4),
        budget=5,
    )
    for preset, steps in (("smoke", 12), ("small", 20), ("paper", 40))
}


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch: Path) -> Built:
    """Random sequences of the recipe's seed; a local source is a folder with seed.txt."""
    check_source(source, data_dir, ("embedded", "local"))
    seed, files = recipe.data.seed, {}
    if source == "local":
        path = find_one(data_dir, ["seed.txt"], "the seed")
        seed, files = int(path.read_text()), {path.name: sha256_file(path)}
    rng = np.random.default_rng(seed)
    splits = {}
    for name, longest in LONGEST.items():
        lengths = rng.integers(5, longest + 1, getattr(recipe.data, name))
        lengths[-1] = longest
        sequences = [rng.integers(1, META.vocab, length) for length in lengths]
        splits[name] = Split.of(sequences, [int((s == 1).sum() > (s == 2).sum()) for s in sequences])
    return Built(splits=splits, dataset="tiny", source=source, revision="1", licence="none", files=files)


def longer(data: Data, test: Split, factor: int) -> Split:
    """As many random sequences as in test, the longest of `factor` times seq_len tokens."""
    rng = np.random.default_rng(data.seed + factor)
    lengths = rng.integers(data.seq_len + 1, factor * data.seq_len + 1, len(test.labels))
    lengths[-1] = factor * data.seq_len
    sequences = [rng.integers(1, META.vocab, length) for length in lengths]
    return Split.of(sequences, [int((s == 1).sum() > (s == 2).sum()) for s in sequences])


def groups(split: Split) -> tuple[str, np.ndarray]:
    """Tens of tokens."""
    return "tens", np.diff(split.offsets) // 10
