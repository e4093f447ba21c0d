"""Examples that occur more than once, compared by content: ids and lengths, as the model sees them."""

import hashlib

import numpy as np

from tasks.base import SPLITS, Split


def disjoint(
    splits: dict[str, Split], towers: int
) -> tuple[dict[str, Split], dict[str, int], dict[str, int]]:
    """Drop from train what occurs in val or test, and from val what occurs in test. Test is never touched.

    Examples are compared by content, as the model sees them. Returns the splits, the numbers dropped, and
    how many examples of each remaining split repeat an earlier one of it, where any do; these stay.
    """
    seen: set[bytes] = set()
    kept, removed, repeated = {}, {}, {}
    for name in reversed(SPLITS):
        split = splits[name]
        hashes = [_content(split, i, towers) for i in range(len(split.labels))]
        fresh = [i for i, h in enumerate(hashes) if h not in seen]
        removed[name] = len(hashes) - len(fresh)
        if removed[name]:
            sequences = [split.sequence(towers * i + t) for i in fresh for t in range(towers)]
            split = Split.of(sequences, split.labels[fresh])
        kept[name] = split
        repeated[name] = len(fresh) - len({hashes[i] for i in fresh})
        seen.update(hashes)
    removed, repeated = ({s: counts[s] for s in SPLITS if counts[s]} for counts in (removed, repeated))
    return {s: kept[s] for s in SPLITS}, removed, repeated


def _content(split: Split, i: int, towers: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for t in range(towers):
        sequence = split.sequence(towers * i + t)
        digest.update(len(sequence).to_bytes(8, "little") + np.ascontiguousarray(sequence).tobytes())
    return digest.digest()
