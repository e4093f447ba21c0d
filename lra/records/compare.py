"""Which cells of a table differ from softmax: paired tests on stored predictions, corrected for their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from lra.options import UsageError
from lra.records.cells import Cell, Column, Table
from lra.records.record import read_labels, read_predictions
from lra.records.stats import ALPHA, holm, paired_test

FEWEST = 3  # seeds of either method, below which nothing is said
Row = tuple[int, str, tuple[str, ...]]


@dataclass(frozen=True)
class Comparison:
    """A cell against softmax in its column: gap of mean accuracies (a fraction), p-value, and that by Holm."""

    gap: float
    p: float
    adjusted: float

    @property
    def verdict(self) -> str | None:
        """above or below softmax where significant, else None."""
        if self.adjusted >= ALPHA:
            return None
        return "above" if self.gap > 0 else "below"


def against_softmax(table: Table) -> dict[tuple[Row, Column], Comparison]:
    """Every cell with FEWEST seeds against the softmax row of the same settings, Holm over the whole table.

    A cell without stored predictions, or whose test labels are not kept, is in no comparison.
    """
    tests, answers = {}, {}
    labels_of = cache(read_labels)
    for (row, column), cell in table.cells.items():
        settings = tuple(part for part in row[2] if not part.startswith("attention."))
        softmax = table.cells.get(((1, "softmax", settings), column))
        if row[1] == "softmax" or softmax is None or min(len(cell.ok), len(softmax.ok)) < FEWEST:
            continue
        for each in (cell, softmax):
            if id(each) not in answers:
                answers[id(each)] = _answers(each, labels_of)
        mine, theirs = answers[id(cell)], answers[id(softmax)]
        if mine is not None and theirs is not None:
            tests[row, column] = paired_test(mine, theirs)
    adjusted = holm([p for _, p in tests.values()])
    return {
        key: Comparison(*test, by_holm) for (key, test), by_holm in zip(tests.items(), adjusted, strict=True)
    }


def footnote(compared: dict[tuple[Row, Column], Comparison]) -> list[str]:
    """What bold and italics mean in a table, where there were any tests."""
    if not compared:
        return []
    found = [c.verdict for c in compared.values()]
    return [
        "Bold: above softmax; italics: below it; both significant at 5% by a paired test on the stored predictions "
        f"of at least {FEWEST} seeds of either (McNemar's, with the noise of training), corrected by Holm for the "
        f"{len(found)} comparisons of this table: {found.count('above')} above, {found.count('below')} below."
    ]


def _answers(cell: Cell, labels_of: Callable) -> np.ndarray | None:
    """(seeds, examples): which answers were right; None unless predictions and labels of all runs are kept."""
    found = []
    for e in cell.ok:
        if e.predictions_sha256 is None or e.labels_sha256 is None:
            return None
        stub = {"result": {"n_test": e.n_test, "predictions_sha256": e.predictions_sha256}}
        try:
            both = read_predictions(e.path, stub), labels_of(e.results, e.labels_sha256, e.n_test)
        except UsageError:
            return None
        predictions, labels = (np.frombuffer(b, np.uint8) for b in both)
        if len(predictions) != len(labels) or len(labels) < 2:
            return None
        found.append(predictions == labels)
    return np.array(found)
