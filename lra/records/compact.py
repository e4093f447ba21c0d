"""The one compact table: method x task, accuracy with its interval, narrow enough for README. No torch."""

from collections.abc import Sequence
from statistics import mode

from lra.records.cells import Column, Row, Table, row_name
from lra.records.markup import MISSING, Block, Bold, Grid, Italic, Text, flat
from lra.records.record import PROTOCOL
from lra.records.significance import Comparison, Key, clusters, compare_all
from lra.records.stats import Uncertain

WIDTH = 110  # columns of a line of text
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
        f"{flat(c.task)}: examples share documents, so its intervals are too narrow (variance × {factor:.2f})."
        for c in table.columns
        if (factor := clusters(c))
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
