"""Recall: pairs of a key and its value among filler, and one of the keys at the end: what was its value?

Associative recall (Ba et al., arXiv 1610.06258; the tokens of Arora et al., arXiv 2312.04927, with one query), as
classification, with the noise of MAD's noisy recall (Poli et al., arXiv 2403.17844). It is not of Long Range Arena,
and no average takes it in.

P pairs, of different keys and of values drawn independently, and `filler` single tokens stand in random order, so that
no place has a meaning of its own; the query follows. A filler token is a blank or a value without a key, at even
chances. Validation and test have the numbers of pairs in `pairs`, in equal shares. Train has a single pair, too, and P
in proportion to 1 / P: one pair among lone values teaches to look at what stands ahead of a value; in all trials
without it softmax stayed at its floor. The average of all tokens knows how often each value is shown, and no more: the
floor "commonest value shown".
"""

from pathlib import Path

import numpy as np

from tasks.base import SPLITS, Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack
from tasks.store.sources import check_source

KEYS, VALUES = 128, 16  # the most of each
BLANK, VALUE, KEY = 1, 2, 2 + VALUES  # ids: the blank, the first value, the first key
_CHUNK = 4096  # examples drawn at a time

META = Meta(
    name="recall",
    version=1,
    classes=VALUES,
    vocab=KEY + KEYS,
    generated=True,
    description="the value that stood behind a key, among pairs of keys and values",
)

_SMALL = dict(pairs="2 4 8 16", keys=32, values=8, filler=4)
_PAPER = dict(pairs="2 4 8 16 32 64", keys=128, values=16, filler=895)
RECIPES = {
    "smoke": Recipe(
        data=Data(seq_len=37, train=2000, val=200, test=400, source="generated", options=_SMALL),
        encoder=Stack(positions="rotary"),
        train=Optim(steps=40, warmup=10, eval_every=20),
        budget=16,
    ),
    "small": Recipe(
        data=Data(seq_len=37, train=100_000, val=2000, test=4000, source="generated", options=_SMALL),
        encoder=Stack(dropout=0.0, positions="rotary"),
        train=Optim(steps=3000, batch=64, lr=2e-3, weight_decay=0.0, eval_every=500),
        budget=16,
    ),
    "paper": Recipe(
        data=Data(seq_len=1024, train=96_000, val=2000, test=4000, source="generated", options=_PAPER),
        encoder=Stack(positions="rotary"),
        train=Optim(steps=20_000, lr=1e-3, warmup=1000, weight_decay=0.0, eval_every=1000),
        budget=256,
    ),
}


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch=None) -> Built:
    """Three splits, drawn test first. The pairs and query of an example of test or val are in no other split.

    SourceError for options that are unknown, or that do not fit one another or seq_len.
    """
    check_source(source, data_dir, ("embedded", "generated"))
    counts, rng = _checked(recipe.data), np.random.default_rng(recipe.data.seed)
    held: set[bytes] = set()
    splits = {name: _split(rng, name, recipe.data, counts, held) for name in reversed(SPLITS)}
    return Built(
        splits=splits,
        dataset="Recall",
        source="generated",
        revision=f"generator {META.version}",
        licence="generated, no third-party data",
        floors={"commonest value shown": commonest(splits["test"])},
    )


def _checked(data: Data) -> np.ndarray:
    """The numbers of pairs, once they and all else fit."""
    options = dict(data.options)
    if options.keys() != _SMALL.keys():
        raise SourceError(f"recall options {', '.join(options)}: use {', '.join(_SMALL)}")
    words = str(options.pop("pairs")).split()
    if not words or not all(word.isdecimal() and int(word) > 1 for word in words):
        raise SourceError(f"recall: pairs {data.options['pairs']!r}: use whole numbers from 2 on, such as '2 4 8'")
    counts = np.array(sorted({int(word) for word in words}))
    for name, low, high in (("keys", 1, KEYS), ("values", 2, VALUES), ("filler", 0, data.seq_len)):
        if not isinstance(options[name], int) or not low <= options[name] <= high:
            raise SourceError(f"recall: {name} {options[name]!r}: use a whole number from {low} to {high}")
    most, keys, filler = counts[-1], options["keys"], options["filler"]
    if most > keys:
        raise SourceError(f"recall: {most} pairs have {most} different keys, and keys is {keys}: use fewer pairs")
    if (length := 2 * most + filler + 1) > data.seq_len:
        told = f"{most} pairs, {filler} tokens of filler and a query are {length} tokens"
        raise SourceError(f"recall: {told}, and seq_len is {data.seq_len}: use fewer pairs or less filler")
    if min(sizes := [getattr(data, name) for name in SPLITS]) < 1:
        raise SourceError(f"recall sizes {sizes}: generated splits need 1 or more examples each")
    return counts


def _split(rng: np.random.Generator, name: str, data: Data, counts: np.ndarray, held: set[bytes]) -> Split:
    """One split in random order, apart from what is in `held`; test and val are added there."""
    count, filler, values = getattr(data, name), data.options["filler"], data.options["values"]
    counts = np.union1d(counts, [1]) if name == "train" else counts
    share = 1 / counts if name == "train" else np.ones(len(counts))
    sequences, labels = [], []
    for P, n in zip(counts, rng.multinomial(count, share / share.sum())):
        for start in range(0, n, _CHUNK):
            m = min(_CHUNK, n - start)
            drawn = _pairs(rng, m, P, data.options, held, name)
            key, value = KEY + drawn[0], VALUE + drawn[1]
            tokens = _filler(rng, (m, 2 * P + filler + 1), values)
            # The items that are pairs, of P + filler; each pair ahead moves a token on by one.
            row, place = np.arange(m)[:, None], np.sort(rng.random((m, P + filler)).argsort(1)[:, :P], 1) + np.arange(P)
            tokens[row, place], tokens[row, place + 1] = key, value
            tokens[row, -1] = np.take_along_axis(key, drawn[2], 1)
            sequences += list(tokens)
            labels.append(np.take_along_axis(value, drawn[2], 1)[:, 0] - VALUE)
    order, labels = rng.permutation(count), np.concatenate(labels)
    return Split.of([sequences[i] for i in order], labels[order])


def _filler(rng: np.random.Generator, shape: int | tuple[int, ...], values: int) -> np.ndarray:
    """Blanks and values without a key, at even chances."""
    tokens = rng.choice([BLANK, VALUE], shape).astype(np.uint16)
    tokens[tokens == VALUE] += rng.integers(0, values, (tokens == VALUE).sum(), np.uint16)
    return tokens


def longer(data: Data, test: Split, factor: int) -> Split:
    """Each example of `test` with so much more filler at random places that it is `factor` times as long. Its pairs and
    query, which train does not have, stay; the same things stand farther back, among more."""
    rng, sequences = np.random.default_rng([data.seed, factor]), []
    for i in range(len(test.labels)):
        tokens = test.sequence(i)
        # Where a pair, a lone token or the query begins: nothing comes between a key and its value.
        begins = np.flatnonzero(np.append(True, tokens[:-1] < KEY))
        extra = (factor - 1) * len(tokens)
        old = np.sort(rng.choice(len(begins) - 1 + extra, len(begins) - 1, replace=False))
        places = np.repeat(begins, np.diff([-1, *old, len(begins) - 1 + extra]) - 1)
        sequences.append(np.insert(tokens, places, _filler(rng, extra, data.options["values"])))
    return Split.of(sequences, test.labels)


def groups(split: Split) -> tuple[str, np.ndarray]:
    """How many pairs each example has; the query is a key, too."""
    return "pairs", np.add.reduceat(split.tokens >= KEY, split.offsets[:-1], dtype=np.int64) - 1


def _pairs(rng: np.random.Generator, n: int, P: int, options: dict, held: set[bytes], name: str) -> list[np.ndarray]:
    """Keys (n, P), different in each row, values (n, P), and which of the pairs is asked for (n, 1)."""
    drawn = [np.empty((n, width), np.int64) for width in (P, P, 1)]
    missing = np.arange(n)
    for _ in range(100):
        keys = rng.random((len(missing), options["keys"])).argsort(1)[:, :P]
        values, asked = rng.integers(0, options["values"], keys.shape), rng.integers(0, P, (len(keys), 1))
        for part, new in zip(drawn, (keys, values, asked)):
            part[missing] = new
        contents = np.hstack([np.sort(VALUES * keys + values, 1), np.take_along_axis(keys, asked, 1)])
        again = []
        for row, content in zip(missing, map(bytes, contents.astype(np.uint16))):
            if content in held:
                again.append(row)
            elif name != "train":
                held.add(content)
        missing = np.array(again, np.int64)
        if not len(missing):
            return drawn
    raise SourceError(f"recall, {name}: {n} new examples of {P} pairs cannot be had: use more keys or values")


def commonest(split: Split) -> float:
    """Expected accuracy of naming the value that a sequence shows most often, one at random of those that tie."""
    right = 0.0
    for i, label in enumerate(split.labels):
        tokens = split.sequence(i)
        shown = np.bincount(tokens[(tokens >= VALUE) & (tokens < KEY)] - VALUE, minlength=VALUES)
        right += (shown[label] == shown.max()) / (shown == shown.max()).sum()
    return float(right / len(split.labels))


def decode(tokens: np.ndarray) -> str:
    """`_ v5 k7 v3 _ k7`: keys and values by number, a blank as `_`."""
    return " ".join("_" if t == BLANK else f"v{t - VALUE}" if t < KEY else f"k{t - KEY}" for t in tokens)
