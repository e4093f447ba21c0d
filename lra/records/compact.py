"""Compact tables: method x task, accuracy with its interval, for README; `compare`, yours beside the reference's.

`compare` takes runs of one cell (same task, data, recipe, attention and options) seed by seed. No torch.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mode
from typing import Any

from lra.options import UsageError
from lra.records.cells import Cell, Column, Row, Table, build, row_name
from lra.records.markup import MISSING, Block, Bold, Grid, Italic, Text, flat, markdown
from lra.records.record import PROTOCOL, read_record, report_all
from lra.records.significance import Comparison, Key, compare_all
from lra.records.stats import Uncertain, equivalence, margin, mean_sd

WIDTH = 110  # columns of a line of text
# How a cell is the same, over the seeds that both sides have. With one seed, the gap itself is held against the margin.
MEANINGS = {
    "=": "equal bit for bit",  # every seed has the same curve and the same predictions
    "≈": "within seed noise",  # accuracies equivalent within max(1 point, noise of the test set)
    "?": "not told apart",  # equivalence is neither shown nor excluded
    "≠": "different",  # or a seed failed on one side alone
    "–": "without a reference",  # no seed is on both sides
}
Accuracies = list[float | None]  # of seeds, as fractions; None: the run failed
EMPTY = "No results yet: no record was found; bash run_all.sh makes them."


def blocks(tables: Sequence[Table]) -> list[Block]:
    """For each preset a table of its default rows, and below it a paragraph that says what stands in it."""
    return [block for table in tables for block in _preset(table)] or [Text(EMPTY)]


def _preset(table: Table) -> list[Block]:
    compared, names = compare_all(table), column_names(table)
    rows = []
    for kind in ("majority", "shortcut"):
        floors = (table.floor(c, kind) for c in table.columns)
        rows.append((kind, *(interval(floor[1]) if floor else MISSING for floor in floors)))
    for row in table.rows:
        if not row[2]:
            cells = (_cell(table, row, c, compared.get((row, c, "softmax"))) for c in table.columns)
            rows.append((row_name(row), *cells))
    return [Grid(("method", *names.values()), tuple(rows)), Text(" ".join(_sentences(table, compared)))]


def column_names(table: Table) -> dict[Column, str]:
    """Task, substitute or not, execution; of two columns that would read the same, the hash of their data, too."""
    marks = {c: ["substitute"] * c.substitute + [*c.execution] for c in table.columns}
    names = {c: flat(c.task) + (f" ({', '.join(m)})" if m else "") for c, m in marks.items()}
    texts = list(names.values())
    return {c: n if texts.count(n) == 1 else f"{n} {c.data[:8]}" for c, n in names.items()}


def faced(text: str, compared: Comparison | None) -> str:
    """The text of a cell, bold or in italics where it is significantly above or below softmax."""
    return {"above": Bold, "below": Italic}.get(compared.face if compared else None, str)(text)


def interval(estimate: Uncertain) -> str:
    """Percent ± the longer half of the 95% interval."""
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    return f"{100 * estimate.value:.1f} ± {100 * half:.1f}"


def _seeds(table: Table) -> int:
    """The seeds of most cells."""
    return mode(sorted((cell.seeds for cell in table.cells.values()), reverse=True))


def _cell(table: Table, row: Row, column: Column, compared: Comparison | None) -> str:
    cell = table.cells.get((row, column))
    if cell is None:
        return MISSING
    if not cell.ok:
        return f"failed {len(cell.runs)}/{cell.seeds}"
    count = "" if cell.seeds == _seeds(table) else f" ({cell.seeds})"
    if not cell.complete:
        count = f" ({len(cell.ok)}/{cell.seeds})"
    return faced(f"{interval(cell.estimate)}{count}{cell.dagger}", compared)


def _sentences(table: Table, compared: dict[Key, Comparison]) -> list[str]:
    """What the table holds: unit, seeds, columns, floors, marks; a mark only if it occurs."""
    cells, seeds = table.cells.values(), _seeds(table)
    columns = "; ".join(f"{flat(c.task)}: {flat(', '.join(c.parts[1:]))}" for c in table.columns)
    sentences = [
        f"Test accuracy in percent ± half of its 95% interval, preset {flat(table.preset)}, "
        f"{seeds} seed{'s' if seeds > 1 else ''}. {columns}.",
        "majority and shortcut: floors, scored without solving the task. constant: every token averages all tokens.",
    ]
    if seeds == 1:
        sentences.append("Intervals of one seed hold the noise of the test set alone.")
    if any(name == "softmax" and c.face for (*_, name), c in compared.items()):
        sentences.append(
            "Bold: above softmax; italics: below it; significant at 5% by a paired test, Holm's rule over "
            f"{len(compared)} comparisons."
        )
    sentences += [
        f"{flat(c.task)}: examples share documents; intervals hold {c.effect:.2f} times the binomial variance."
        for c in table.columns
        if c.effect > 1
    ]
    if not all(cell.complete for cell in cells):
        sentences.append("(2/3): two of the cell's three seeds ended.")
    if any(cell.seeds != seeds for cell in cells):
        sentences.append("(1): a cell of one seed, and so on.")
    if any(e.open for e in table.entries):
        sentences.append(f"†: outside {PROTOCOL}.")
    if changed := sum(1 for row in table.rows if row[2]):
        sentences.append(f"Rows with changed options: {changed}, shown by table --format long.")
    return sentences


def compare(args: Namespace, left_out: Mapping[Path, str] | None = None) -> int:
    """`compare`: yours beside the reference, a table for each preset, and how many cells are the same.
    `left_out`: as in lra.records.cells.build. Exit code 1 if a file was left out."""
    skipped, marks = [], []

    def text(cell: Cell | None) -> str:
        if cell is None:
            return MISSING
        mark, ours, theirs = against(cell, args.results, args.reference)
        marks.append(mark)
        both = f"{mark} {_accuracy(theirs)} ({len(theirs)} seed{'s' if len(theirs) > 1 else ''})" if theirs else mark
        return f"{_accuracy(ours)} {both}"

    for table in build(args.results, args.preset, skipped.append, left_out):
        names = column_names(table)
        rows = [(row_name(r), *(text(table.cells.get((r, c))) for c in table.columns)) for r in table.rows]
        header = (f"{flat(table.preset)}: yours, reference (seeds of both)", *names.values())
        print(markdown([Grid(header, tuple(rows))]))
    said = [mark for mark in MEANINGS if mark in marks or mark in "=≈≠"]  # these even if there are none
    shares = [f"{marks.count(mark)} {MEANINGS[mark]} ({mark})" for mark in said]
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
        mark = "–"
    elif all(_equal(ours[place], theirs[place]) for place in theirs):
        mark = "="
    elif None in mine + other:
        mark = "≠"
    elif len(mine) > 1:
        within = margin(mean_sd(mine)[0], cell.runs[0].n_test)
        verdict, _ = equivalence(dict(zip(theirs, mine)), dict(zip(theirs, other)), within)
        mark = {"reproduced": "≈", "disputed": "≠", "inconclusive": "?"}[verdict]
    else:
        mark = "≈" if abs(mine[0] - other[0]) <= margin(mine[0], cell.runs[0].n_test) else "≠"
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


def _accuracy(accuracies: Accuracies) -> str:
    ended = [a for a in accuracies if a is not None]
    return f"{100 * mean_sd(ended)[0]:.1f}" if ended else "failed"
