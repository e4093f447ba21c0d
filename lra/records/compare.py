"""`compare`: a user's runs beside the reference's, cell by cell, and how far they are the same. No torch.

Runs of one cell (same task, data, recipe, attention and options) are compared seed by seed. Over the seeds that both
sides have, the cell is

=  equal bit for bit: every seed has the same curve and the same predictions
≈  within seed noise: accuracies equivalent within max(1 point, noise of the test set)
?  not told apart: equivalence is neither shown nor excluded
≠  different, or a seed failed on one side alone
–  without a reference: no seed is on both sides

Equivalence takes two seeds. With one, the gap itself is held against the margin.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lra.options import UsageError
from lra.records import compact
from lra.records.cells import Cell, build, row_name
from lra.records.markup import MISSING, Grid, flat, markdown
from lra.records.record import read_record, report_all
from lra.records.stats import equivalence, margin, mean_sd

EQUAL, WITHIN, UNCLEAR, DIFFERENT, NONE = "=", "≈", "?", "≠", "–"
MEANINGS = {
    EQUAL: "equal bit for bit",
    WITHIN: "within seed noise",
    UNCLEAR: "not told apart",
    DIFFERENT: "different",
    NONE: "without a reference",
}
Accuracies = list[float | None]  # of seeds, as fractions; None: the run failed
ALWAYS = (EQUAL, WITHIN, DIFFERENT)  # counted in the last line even if there are none


def compare(args: Namespace, left_out: Mapping[Path, str] | None = None) -> int:
    """`compare`: yours beside the reference, a table for each preset, and how many cells are the same.
    `left_out`: as in lra.records.cells.build. Exit code 1 if a file was left out."""
    skipped: list[str] = []
    marks: list[str] = []

    def text(cell: Cell | None) -> str:
        if cell is None:
            return MISSING
        mark, ours, theirs = against(cell, args.results, args.reference)
        marks.append(mark)
        both = f"{mark} {_percent(theirs)} ({len(theirs)} seed{'s' if len(theirs) > 1 else ''})" if theirs else mark
        return f"{_percent(ours)} {both}"

    for table in build(args.results, args.preset, skipped.append, left_out):
        names = compact.column_names(table)
        rows = [(row_name(r), *(text(table.cells.get((r, c))) for c in table.columns)) for r in table.rows]
        header = (f"{flat(table.preset)}: yours, reference (seeds of both)", *names.values())
        print(markdown([Grid(header, tuple(rows))]))
    shares = [f"{marks.count(m)} {words} ({m})" for m, words in MEANINGS.items() if m in marks or m in ALWAYS]
    print(f"{len(marks)} cells beside {args.reference}: {', '.join(shares)}")
    return report_all(skipped)


def against(cell: Cell, results: Path, reference: Path) -> tuple[str, Accuracies, Accuracies]:
    """How a cell compares with that of the reference: a mark of MEANINGS, and the accuracies of the seeds of both.
    Without a seed of both: all accuracies of the cell, and none."""
    places = {e.path.relative_to(results): e for e in cell.runs}
    theirs = {place: record for place in places if (record := _read(reference / place))}
    ours = {place: read_record(places[place].path) for place in theirs or places}
    results_of = ([record["result"] for record in records.values()] for records in (ours, theirs))
    mine, other = ([r and r["n_correct"] / r["n_test"] for r in side] for side in results_of)
    if not theirs:
        mark = NONE
    elif all(_equal(ours[place], theirs[place]) for place in theirs):
        mark = EQUAL
    elif None in mine + other:
        mark = DIFFERENT
    elif len(mine) > 1:
        within = margin(mean_sd(mine)[0], cell.runs[0].n_test)
        verdict, _ = equivalence(dict(zip(theirs, mine)), dict(zip(theirs, other)), within)
        mark = {"reproduced": WITHIN, "disputed": DIFFERENT, "inconclusive": UNCLEAR}[verdict]
    else:
        mark = WITHIN if abs(mine[0] - other[0]) <= margin(mine[0], cell.runs[0].n_test) else DIFFERENT
    return mark, mine, other


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Bit for bit: curve and predictions; of failed runs, the reason."""
    if not a["result"] or not b["result"]:
        return a["status"] == b["status"]
    return all(a["result"][key] == b["result"][key] for key in ("curve", "predictions_sha256"))


def _read(path: Path) -> dict[str, Any] | None:
    """A record of the reference; None where there is none, and for a file that is none."""
    try:
        return read_record(path)
    except UsageError:
        return None


def _percent(accuracies: Accuracies) -> str:
    ended = [a for a in accuracies if a is not None]
    return f"{100 * mean_sd(ended)[0]:.1f}" if ended else "failed"
