"""The splits that a task has built: what they must hold, what occurs in two of them, and their facts."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from tasks.base import SPLITS, Meta, SourceError, Split

Splits = dict[str, Split]


def check(meta: Meta, name: str, split: Split, seq_len: int) -> None:
    """SourceError, which names task, split and value, unless the split keeps these rules.

    - It has at least one example, and `towers` sequences an example.
    - A sequence has 1 to `seq_len` tokens.
    - Token ids are 1 to vocab - 1 (0 is padding) and labels are 0 to classes - 1, stored as uint16 and uint8.
    """
    where, n, lengths = f"task {meta.name}, {name} split", len(split.labels), np.diff(split.offsets)
    if not n:
        raise SourceError(f"{where}: empty; ask for fewer examples of the other splits")
    if len(lengths) != meta.towers * n or split.offsets[0] or split.offsets[-1] != len(split.tokens):
        raise SourceError(f"{where}: {len(lengths)} sequences of {n} examples, expected {meta.towers} each")
    if lengths.min() < 1 or lengths.max() > seq_len:
        i = int(lengths.argmin() if lengths.min() < 1 else lengths.argmax())
        raise SourceError(f"{where}: sequence {i} has {lengths[i]} tokens, expected 1 to seq_len={seq_len}")
    for what, values, dtype, least, most, source in (
        ("token id", split.tokens, np.uint16, 1, meta.vocab - 1, "0 is padding, META.vocab"),
        ("label", split.labels, np.uint8, 0, meta.classes - 1, "META.classes"),
    ):
        for value in (values.min(), values.max()):
            if not least <= value <= most:
                raise SourceError(f"{where}: {what} {value} is outside {least} to {most} ({source})")
        if values.dtype != dtype:
            limit = f"whole numbers up to {np.iinfo(dtype).max:,} (give rare ones one shared {what})"
            raise SourceError(f"{where}: the {what}s are {values.dtype}, expected {np.dtype(dtype)}: {limit}")


def disjoint(splits: Splits, towers: int) -> tuple[Splits, dict[str, int], dict[str, int]]:
    """Drop from train what occurs in val or test, and from val what occurs in test. Test is never touched.

    Examples are compared by content, as the model sees them. Returns the splits, the numbers dropped, and
    how many examples of each remaining split repeat an earlier one of it, where any do; these stay.
    """
    known: set[bytes] = set()
    remaining, removed, repeated = {}, {}, {}
    for name in reversed(SPLITS):
        split = splits[name]
        contents = [_content(split, i, towers) for i in range(len(split.labels))]
        fresh = [i for i, content in enumerate(contents) if content not in known]
        removed[name] = len(contents) - len(fresh)
        if removed[name]:
            sequences = [split.sequence(towers * i + t) for i in fresh for t in range(towers)]
            split = Split.of(sequences, split.labels[fresh])
        remaining[name] = split
        repeated[name] = len(fresh) - len({contents[i] for i in fresh})
        known.update(contents)
    removed, repeated = ({s: counts[s] for s in SPLITS if counts[s]} for counts in (removed, repeated))
    return {s: remaining[s] for s in SPLITS}, removed, repeated


def _content(split: Split, i: int, towers: int) -> bytes:
    """A hash of the ids and lengths of one example."""
    digest = hashlib.blake2b(digest_size=16)
    for t in range(towers):
        sequence = split.sequence(towers * i + t)
        digest.update(len(sequence).to_bytes(8, "little") + np.ascontiguousarray(sequence).tobytes())
    return digest.digest()


def facts(split: Split) -> dict[str, Any]:
    """Number of examples, sha256 of all arrays and of the labels, mean and longest length in tokens."""
    whole, labels = hashlib.sha256(), np.ascontiguousarray(split.labels)
    for array in (split.tokens, split.offsets, labels):
        whole.update(np.ascontiguousarray(array))
    lengths = np.diff(split.offsets)
    return {
        "n": len(labels),
        "sha256": whole.hexdigest(),
        "labels_sha256": hashlib.sha256(labels).hexdigest(),
        "mean_length": round(float(lengths.mean()), 1),
        "max_length": int(lengths.max()),
    }
