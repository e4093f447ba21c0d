"""`compare`: a user's runs beside the reference's, cell by cell, and how far they are the same. No torch.

Two sets of runs of one cell (same task, data, recipe, attention and options) are

=  equal bit for bit: every seed that both ran has the same curve and the same predictions
≈  within seed noise: accuracies equivalent within max(1 point, noise of the test set)
?  not told apart: equivalence is neither shown nor excluded
≠  different
–  without a reference

Equivalence takes two seeds on both sides. With one, the gap itself is held against the margin.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lra.options import UsageError
from lra.records import compact
from lra.records.cells import Cell, build, row_name
from lra.records.markup import MISSING, Grid, flat, markdown
from lra.records.record import read_record, report_skipped
from lra.records.stats import Estimate, equivalence, margin, mean_sd

EQUAL, WITHIN, UNCLEAR, DIFFERENT, NONE = "=", "≈", "?", "≠", "–"
MEANINGS = {
    EQUAL: "equal bit for bit",
    WITHIN: "within seed noise",
    UNCLEAR: "not told apart",
    DIFFERENT: "different",
    NONE: "without a reference",
}
ALWAYS = (EQUAL, WITHIN, DIFFERENT)  # counted in the last line even if there are none


def compare(args: Namespace, left_out: Mapping[Path, str] | None = None) -> int:
    """`compare`: yours beside the reference, a table for each preset, and how many cells are the same.

    `left_out`: as in lra.records.cells.build. Exit code 1 if a file was left out.
    """
    skipped: list[str] = []
    marks: list[str] = []

    def text(cell: Cell | None) -> str:
        if cell is None:
            return MISSING
        mark, theirs = against(cell, args.results, args.reference)
        marks.append(mark)
        return f"{_percent(cell.accuracies)} {mark}" + (f" {_percent(theirs)}" if mark not in (EQUAL, NONE) else "")

    for table in build(args.results, args.preset, skipped.append, left_out):
        names = compact.column_names(table)
        rows = [(row_name(r), *(text(table.cells.get((r, c))) for c in table.columns)) for r in table.rows]
        header = (f"{flat(table.preset)}: yours, reference", *names.values())
        print(markdown([Grid(header, tuple(rows))]))
    shares = [f"{marks.count(m)} {words} ({m})" for m, words in MEANINGS.items() if m in marks or m in ALWAYS]
    print(f"{len(marks)} cells beside {args.reference}: {', '.join(shares)}")
    for line in skipped:
        report_skipped(line)
    return 1 if skipped else 0


def against(cell: Cell, results: Path, reference: Path) -> tuple[str, list[float]]:
    """How a cell compares with that of the reference: a mark of MEANINGS, and the reference's accuracies."""
    ours = {e.path.relative_to(results): read_record(e.path) for e in cell.runs}
    folders = {reference / place.parent for place in ours}
    theirs = {p.relative_to(reference): _read(p) for folder in folders for p in folder.glob("seed*.json")}
    theirs = {place: record for place, record in theirs.items() if record}
    accuracies = [_accuracies(records) for records in (ours, theirs)]
    shared = ours.keys() & theirs.keys()
    if not theirs:
        mark = NONE
    elif shared and all(_equal(ours[place], theirs[place]) for place in shared):
        mark = EQUAL
    elif not all(accuracies):
        mark = DIFFERENT  # every run of one side failed, not of the other
    else:
        mark = _mark(*accuracies, cell.runs[0].n_test)
    return mark, list(accuracies[1].values())


def equivalent(ours: Mapping[Any, float], theirs: Mapping[Any, float], n: int) -> tuple[str, Estimate, float]:
    """The equivalence test of two sets of runs of one cell, accuracies by seed on n test examples.

    Returns the verdict of lra.records.stats.equivalence, the gap theirs - ours, and the margin. Equal sets of seeds
    are compared in pairs.
    """
    within = margin(sum(ours.values()) / len(ours), n)
    paired = ours.keys() == theirs.keys()
    seeds = sorted(ours) if paired else sorted(theirs)
    verdict, gap = equivalence([theirs[seed] for seed in seeds], [ours[seed] for seed in sorted(ours)], within, paired)
    return verdict, gap, within


def _mark(ours: Mapping[Any, float], theirs: Mapping[Any, float], n: int) -> str:
    if min(len(ours), len(theirs)) > 1:
        verdict, _, _ = equivalent(ours, theirs, n)
        return {"reproduced": WITHIN, "disputed": DIFFERENT, "inconclusive": UNCLEAR}[verdict]
    mine, other = (mean_sd([*side.values()])[0] for side in (ours, theirs))
    return WITHIN if abs(mine - other) <= margin(mine, n) else DIFFERENT


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit: curve and predictions; of failed runs, the reason."""
    if not a["result"] or not b["result"]:
        return a["status"] == b["status"]
    return all(a["result"][key] == b["result"][key] for key in ("curve", "predictions_sha256"))


def _accuracies(records: Mapping[Path, dict[str, Any]]) -> dict[Path, float]:
    """Fractions of the runs that ended."""
    ended = {place: record["result"] for place, record in records.items() if record["result"]}
    return {place: result["n_correct"] / result["n_test"] for place, result in ended.items()}


def _read(path: Path) -> dict[str, Any] | None:
    """A record of the reference; None for a file that is none."""
    try:
        return read_record(path)
    except UsageError:
        return None


def _percent(accuracies: Sequence[float]) -> str:
    return f"{100 * mean_sd(accuracies)[0]:.1f}" if accuracies else "failed"
