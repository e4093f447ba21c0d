"""ListOps: the value (0-9) of a nested expression of MIN, MAX, MED and SM (sum modulo 10) over digits.

Nangia and Bowman 2018 (arXiv 1804.06028), in the long version of Long Range Arena (arXiv 2011.04006). A node
at depth < max_depth (the root has 1) is an operator with probability 1/4, with 2..max_args children, else a
uniform digit. A tree is kept if min_length < length < max_length; an operator counts 2, with its bracket.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack
from tasks.listops.expressions import CLOSE, MIN, NAMES, SYMBOLS, ZERO, evaluate, find, read_splits, write_tsv
from tasks.store.archives import LRA_RELEASE
from tasks.store.files import ENDINGS, sha256_file
from tasks.store.rng import below, kernel, stream, uniform

ARCHIVES = LRA_RELEASE
_OPERATOR = 0.25  # probability that a node above max_depth is an operator
_CHUNK = 4096  # attempts per unit of work
_GIVE_UP = 256  # chunks in a row that yield nothing new: a million attempts
_PUBLISHED = dict(max_depth=10, max_args=10, min_length=500, max_length=2000)
_SMOKE = _PUBLISHED | dict(min_length=8, max_length=65)
_SMALL = _PUBLISHED | dict(min_length=10, max_length=101)

META = Meta(
    name="listops",
    version=1,
    classes=10,
    vocab=len(SYMBOLS),
    generated=True,
    description="value of a nested expression of MIN, MAX, MED and SM over digits",
    datasets=dict.fromkeys(("generated", "local"), "ListOps"),
)

RECIPES = {
    "smoke": Recipe(
        data=Data(seq_len=64, train=2000, val=200, test=400, options=_SMOKE),
        train=Optim(steps=60, warmup=10, weight_decay=0.0, eval_every=30),
        budget=32,
    ),
    "small": Recipe(
        data=Data(seq_len=100, train=40_000, val=2000, test=4000, options=_SMALL),
        train=Optim(steps=4000, lr=2e-3, weight_decay=0.0, eval_every=1000),
        encoder=Stack(dropout=0.0),
    ),
    "paper": Recipe(
        data=Data(seq_len=2000, train=96_000, val=2000, test=2000, options=_PUBLISHED),
        train=Optim(steps=5000, lr=1e-4, warmup=1000, weight_decay=0.0, eval_every=500),
        budget=256,
    ),
}
# The encoder of the original paper (arXiv 2011.04006).
RECIPES["paper-large"] = replace(RECIPES["paper"], encoder=Stack(layers=6, width=512, heads=8, ffn=2048))


@kernel
def _draw(state, tokens, opened, missing, max_depth, max_args, max_length):
    """Draw one tree into `tokens`; its length, or 0 as soon as it is known to reach max_length.

    `opened` and `missing` are scratch: position and children still to come of each open operator.
    A loop, because numba 0.68 crashes on a recursive function that it loads from its cache.
    """
    used, depth, length = 0, 0, 1  # length of the tree if every node still to come is a leaf
    while True:
        if depth + 1 < max_depth and uniform(state) <= _OPERATOR:
            opened[depth], missing[depth] = used, 2 + below(state, max_args - 1)
            length += missing[depth] + 1
            if length >= max_length:
                return 0
            depth += 1
        else:
            tokens[used] = ZERO + below(state, 10)
            while depth > 0 and missing[depth - 1] == 1:  # close every operator that this node completes
                depth -= 1
                used += 1
                tokens[opened[depth]] = MIN + below(state, 4)  # drawn after its children, as published
                tokens[used] = CLOSE
            if depth == 0:
                return length
            missing[depth - 1] -= 1
        used += 1


@kernel
def _draw_chunk(seed, chunk, max_depth, max_args, min_length, max_length):
    """Accepted trees of one chunk of attempts, in attempt order: tokens end to end, lengths, labels."""
    tokens = np.empty(_CHUNK * max_length, np.uint16)  # pages never written cost no memory
    lengths, labels = np.empty(_CHUNK, np.int64), np.empty(_CHUNK, np.uint8)
    opened, missing = np.empty((2, max_length), np.int64)
    used = count = 0
    for attempt in range(chunk * _CHUNK, (chunk + 1) * _CHUNK):
        length = _draw(stream(seed, attempt), tokens[used:], opened, missing, max_depth, max_args, max_length)
        if length > min_length:
            lengths[count], labels[count] = length, evaluate(tokens[used : used + length])
            used += length
            count += 1
    return tokens[:used].copy(), lengths[:count], labels[:count]


def generate(count: int, *, seed: int, workers: int = 1, **limits: int) -> tuple[list, np.ndarray]:
    """`count` distinct expressions: a list of uint16 id arrays and the uint8 labels.

    `limits` are max_depth, max_args, min_length and max_length; those not given are the published ones. Attempt i
    is drawn from stream(seed, i). The first `count` accepted, distinct trees are returned in the order of attempts,
    so the result depends neither on `workers` (threads) nor on the platform, and a larger count extends a smaller
    one. SourceError if the limits are not the four whole numbers or do not allow that many trees.
    """
    limits = _PUBLISHED | limits
    if limits.keys() != _PUBLISHED.keys() or not all(isinstance(value, int) for value in limits.values()):
        raise SourceError(f"ListOps options {limits}: use whole numbers for {', '.join(_PUBLISHED)}")
    max_depth, max_args, min_length, max_length = limits.values()
    if max_depth < 2 or max_args < 2 or not 0 <= min_length <= max_length - 2:
        raise SourceError(f"ListOps with {limits}: use depth, args >= 2 and 0 <= min <= max - 2")
    from tqdm import tqdm

    trees, last_new = {}, 0  # digest of the content -> (tokens, label), in attempt order
    bar = tqdm(total=count, desc="listops", unit=" trees", delay=2, disable=None)  # None: not a terminal
    with bar, ThreadPoolExecutor(workers) as pool:
        for start in range(0, 1 << 50, workers):
            drawn = pool.map(lambda c: _draw_chunk(seed, c, *limits.values()), range(start, start + workers))
            for chunk, (tokens, lengths, values) in enumerate(drawn, start):
                for sequence, value in zip(np.split(tokens, np.cumsum(lengths)), values):
                    content = hashlib.blake2b(sequence, digest_size=16).digest()
                    if len(trees) < count and content not in trees:
                        trees[content] = sequence, value
                        last_new = chunk
                bar.update(len(trees) - bar.n)
                if len(trees) == count:
                    return [s for s, _ in trees.values()], np.array([v for _, v in trees.values()], np.uint8)
                if chunk - last_new >= _GIVE_UP:
                    raise SourceError(f"found {len(trees)} of {count} examples: widen {limits} or ask less")


def longer(data: Data, test: Split, factor: int) -> Split:
    """As many expressions as in `test`, each of factor / 2 to `factor` times seq_len tokens: all are longer than any
    in train."""
    limits = data.options | dict(min_length=factor * data.seq_len // 2, max_length=factor * data.seq_len + 1)
    return Split.of(*generate(len(test.labels), seed=data.seed + factor, workers=1, **limits))


def decode(tokens: np.ndarray) -> str:
    """The symbols separated by spaces, padding left out: `[MAX 3 [MIN 5 1 X X`."""
    return " ".join(SYMBOLS[token] for token in tokens if token)


def members(data: Data) -> tuple[str, ...]:
    """The raw files in an archive of the LRA release."""
    return tuple(name + end for name in NAMES.values() for end in ENDINGS)


def export(splits: dict[str, Split], folder: Path) -> list[Path]:
    """Write the published files of these splits, basic_{train,val,test}.tsv; returns their paths."""
    for name, file in NAMES.items():
        split = splits[name]
        write_tsv(Path(folder) / file, map(split.sequence, range(len(split.labels))), split.labels)
    return [Path(folder) / file for file in NAMES.values()]


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch=None) -> Built:
    """All three splits, drawn by `generate` or read from basic_{train,val,test}.tsv in `data_dir` (default: here).

    `source` "embedded" is local if `data_dir` holds any of the files, else generated. Floor "root operator": the most
    frequent train label among expressions with the same root.
    """
    if source not in ("embedded", "generated", "local"):
        raise SourceError(f"source {source!r}: ListOps is on no hub; use --source generated or local")
    paths = find(data_dir)
    local = source == "local" or (source == "embedded" and data_dir is not None and len(paths) > 0)
    data = recipe.data
    if local:
        splits = read_splits(data, paths, data_dir)
    else:
        longest = data.options.get("max_length")
        if isinstance(longest, int) and longest > data.seq_len + 1:
            raise SourceError(f"max_length {longest}: use seq_len + 1 = {data.seq_len + 1} or less")
        sizes = dict(test=data.test, val=data.val, train=data.train)  # a larger train leaves the others as they are
        if min(sizes.values()) < 1:
            raise SourceError(f"ListOps sizes {sizes}: generated splits need 1 or more examples each")
        tokens, labels = generate(sum(sizes.values()), seed=data.seed, workers=workers, **data.options)
        ends = np.cumsum([*sizes.values()])
        parts = {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends)}
        splits = {name: Split.of(tokens[part], labels[part]) for name, part in parts.items()}
    train, test = splits["train"], splits["test"]
    counts = np.zeros((META.vocab, META.classes), np.int64)  # of labels by root
    np.add.at(counts, (train.tokens[train.offsets[:-1]], train.labels), 1)
    right = counts.argmax(1)[test.tokens[test.offsets[:-1]]] == test.labels
    return Built(
        splits=splits,
        dataset="ListOps",
        source="local" if local else "generated",
        revision="local files" if local else f"generator {META.version}",
        licence="that of the local files" if local else "generated, no third-party data",
        files={path.name: sha256_file(path) for path in paths.values()} if local else {},
        floors={"root operator": float(np.mean(right))},
        report={"mean length": round(float(np.diff(train.offsets).mean()), 1)},
    )
