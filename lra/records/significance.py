"""Which cells of a table differ from softmax: paired tests on stored predictions, corrected by Holm. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from lra.options import UsageError
from lra.records.cells import Cell, Column, Row, Table
from lra.records.record import read_labels, read_predictions, read_record
from lra.records.stats import ALPHA, holm, paired_test

FEWEST = 3  # seeds of either method, below which nothing is tested


@dataclass(frozen=True)
class Comparison:
    """A cell against softmax in its column: gap of mean accuracies (a fraction), p-value, p-value by Holm."""

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

    A cell is in no comparison if its predictions or its test labels are not kept.
    """
    tests, labels_of = {}, cache(read_labels)
    cells = [cell for cell in table.cells.values() if len(cell.ok) >= FEWEST]
    answers = {id(cell): _answers(cell, labels_of) for cell in cells}
    for (row, column), cell in table.cells.items():
        settings = tuple(part for part in row[2] if not part.startswith("attention."))
        softmax = table.cells.get(((1, "softmax", settings), column))
        mine, theirs = answers.get(id(cell)), answers.get(id(softmax))
        if row[1] != "softmax" and mine is not None and theirs is not None:
            tests[row, column] = paired_test(mine, theirs)
    adjusted = holm([p for _, p in tests.values()])
    return {
        key: Comparison(*test, by_holm) for (key, test), by_holm in zip(tests.items(), adjusted, strict=True)
    }


def footnote(compared: dict[tuple[Row, Column], Comparison]) -> list[str]:
    """What bold and italics mean in a table; nothing if nothing was tested."""
    if not compared:
        return []
    verdicts = [c.verdict for c in compared.values()]
    return [
        "Bold: above softmax; italics: below it; both significant at 5% by a paired test on the stored predictions "
        f"of at least {FEWEST} seeds of either (McNemar's, with the noise of training), corrected by Holm for the "
        f"{len(verdicts)} comparisons of this table: {verdicts.count('above')} above, "
        f"{verdicts.count('below')} below."
    ]


def _answers(cell: Cell, labels_of: Callable) -> np.ndarray | None:
    """(seeds, examples): which answers were right; None unless predictions and labels of all runs are kept."""
    answers = []
    for e in cell.ok:
        try:
            record = read_record(e.path)
            sha256 = record["data"]["splits"]["test"]["labels_sha256"]
            content = read_predictions(e.path, record), labels_of(e.results, sha256, e.n_test)
        except (UsageError, KeyError):
            return None
        predictions, labels = (np.frombuffer(part, np.uint8) for part in content)
        if len(predictions) != len(labels) or len(labels) < 2:
            return None
        answers.append(predictions == labels)
    return np.array(answers)
