"""Blocks in which passages stand twice, for `gemma recall`: who finds the first occurrence knows the second.

A block of N tokens is BOS and N - 1 tokens: documents joined by empty lines, or random tokens. At each distance d one
passage of P tokens at place a is then written again over the tokens at a + d:

    tokens[a + d : a + d + P] = tokens[a : a + P]        the last P - SKIPPED of these count

The 2 P tokens of a distance belong to no other, so that one pass over a block measures all distances.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lra.gemma.data import Blocks, pack
from lra.gemma.weights import Base
from lra.options import UsageError

SKIPPED = 16  # first tokens of the second occurrence, at which it cannot be known yet that it is one


def layout(length: int, passage: int, distances: Sequence[int]) -> dict[int, int]:
    """Distance to the place of the first occurrence, longest distance first, each at the earliest place that is left.

    Raises UsageError for a passage or a distance that does not fit into `length` tokens.
    """
    if not SKIPPED < passage <= (length - 1) // 2:
        fit = f"it needs more than {SKIPPED} tokens, and room for two in a block of {length}"
        raise UsageError(f"--passage {passage}: {fit}: use another one or another --length")
    left, first = np.arange(length) > 0, {}
    for d in sorted(distances, reverse=True):
        if not passage <= d <= length - 1 - passage:
            fit = f"passages of {passage} in a block of {length} tokens have {passage} to {length - 1 - passage}"
            raise UsageError(f"--distances {d}: {fit}: use another one, --passage or --length")
        for a in range(1, length - d - passage + 1):
            twice = [*range(a, a + passage), *range(a + d, a + d + passage)]
            if left[twice].all():
                left[twice], first[d] = False, a
                break
        else:
            raise UsageError(f"--distances {d}: no place is left for it: ask for fewer, or for a shorter --passage")
    return first


def repeated(
    base: Base, texts: Sequence[str], kind: str, passage: int, distances: Sequence[int], *, length: int, blocks: int
) -> Blocks:
    """Blocks of kind `text`, or `random`: every token that occurs in them is equally likely, so none is special.

    A block is a cluster: no two share a document. Its parts are the distances. Raises UsageError where there is no room
    or too little text.
    """
    first = layout(length, passage, distances)
    plain = pack(texts, base.encode, base.bos, length=length, blocks=blocks, what="test", joint="\n\n")
    tokens, scored, parts = plain.tokens, np.zeros_like(plain.scored), {}
    if kind == "random":
        tokens[:, 1:] = np.random.default_rng(0).choice(np.unique(tokens[:, 1:]), tokens[:, 1:].shape)
    for d, a in first.items():
        tokens[:, a + d : a + d + passage] = tokens[:, a : a + passage]
        start, end = parts[str(d)] = a + d + SKIPPED - 1, a + d + passage - 1  # scored[i] is of token i + 1
        scored[:, start:end] = True
    about = {"kind": kind, "passage": passage, "skipped": SKIPPED, "first": {str(d): a for d, a in first.items()}}
    return Blocks(tokens, plain.document, scored, parts, about)
