"""What a table may say of its cells: one paired test on stored predictions, corrected by Holm. No torch.

Every cell is compared with softmax and with constant of the same settings in its column, on the same examples. All
comparisons of a table are one family for Holm. The verdict of a comparison:

above, below   significant at 5% after Holm
ties           equivalent: the 90% interval of the gap lies within +-margin, lra.records.stats.margin
untold         not told apart: neither of these was shown

With one seed each the test is McNemar's, exact; where examples share documents it is Student's t. It speaks of two
runs, not of two methods: it knows no noise of training, so it shows no tie, and no cell is bold for it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from lra.options import UsageError
from lra.records.cells import Cell, Column, Row, Table
from lra.records.record import read_labels, read_predictions, read_record
from lra.records.stats import ALPHA, Uncertain, holm, margin, mcnemar, paired

FEWEST = 3  # seeds of either method, below which no cell is bold or in italics
BASELINES = {"constant": 0, "softmax": 1}  # and their places in the order of rows
Key = tuple[Row, Column, str]  # row, column, the baseline that it is compared with


@dataclass(frozen=True)
class Comparison:
    """A cell against a baseline: gap of mean accuracies (a fraction), p-value by Holm.
    seeds: those of the method that has fewer. margin: the largest gap that counts as none."""

    gap: Uncertain
    adjusted: float
    seeds: int
    margin: float

    @property
    def verdict(self) -> str:
        """above, below, ties or untold."""
        if self.adjusted < ALPHA:
            return "above" if self.gap.value > 0 else "below"
        return "ties" if self.seeds > 1 and self.gap.within(self.margin) else "untold"

    @property
    def face(self) -> str | None:
        """The verdict if it may be printed in a cell: above or below, FEWEST seeds of either."""
        return self.verdict if self.seeds >= FEWEST and self.verdict in ("above", "below") else None


@lru_cache(maxsize=8)  # tables and figures of one command ask for the same
def compare_all(table: Table) -> dict[Key, Comparison]:
    """Every comparison of a table whose predictions and test labels are kept.
    Both methods have several seeds, or both have one: a single seed beside several shows none of its noise."""
    tests, labels_of = {}, cache(read_labels)
    answers = {id(cell): _answers(cell, labels_of) for cell in table.cells.values() if cell.ok}
    for (row, column), cell in table.cells.items():
        settings = tuple(part for part in row[2] if not part.startswith("attention."))
        for baseline in ("softmax", "constant"):
            other = table.cells.get(((BASELINES[baseline], baseline, settings), column))
            mine, theirs = answers.get(id(cell)), answers.get(id(other))
            if row[1] in (baseline, "softmax") or mine is None or theirs is None:
                continue  # softmax against constant is constant against softmax
            if (len(mine) == 1) == (len(theirs) == 1):
                tests[row, column, baseline] = (mine, theirs)
    gaps = {key: paired(*sides, key[1].effect) for key, sides in tests.items()}
    p_values = [
        mcnemar((a & ~b).sum(), (b & ~a).sum()) if len(a) == key[1].effect == 1 else gaps[key].p_value
        for key, (a, b) in tests.items()
    ]
    found = {}
    for (key, (a, b)), adjusted in zip(tests.items(), holm(p_values), strict=True):
        within = margin(float(b.mean()), b.shape[1] / key[1].effect)
        found[key] = Comparison(gaps[key], adjusted, min(len(a), len(b)), within)
    return found


def footnote(compared: dict[Key, Comparison]) -> list[str]:
    """What a table claims and by which test; nothing if nothing was tested."""
    if not compared:
        return []
    counts = []
    for baseline in ("softmax", "constant"):
        verdicts = [c.verdict for (*_, name), c in compared.items() if name == baseline]
        above, below = verdicts.count("above"), verdicts.count("below")
        counts.append(f"{len(verdicts)} with {baseline} ({above} above, {below} below)")
    bold = f"Bold: above softmax; italics: below it, with at least {FEWEST} seeds of either. "
    marked = any(name == "softmax" and c.face for (*_, name), c in compared.items())
    return [
        f"{bold if marked else ''}What is said to differ is significant at 5% by one paired test on "
        "the stored predictions. Of several seeds it is Student's t with the noise of the test set and of both "
        "methods' training; of one seed each it is McNemar's exact test, which knows no noise of training. Holm's rule "
        f"corrects for all {len(compared)} comparisons of this table: {' and '.join(counts)}. Ties: equivalent within "
        "the given margin by two one-sided tests at 5%. Not told apart: neither a difference nor a tie was shown. "
        "Intervals of gaps are not corrected."
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
