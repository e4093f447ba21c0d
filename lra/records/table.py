"""The wide tables of the records, as Markdown, LaTeX and CSV: the same records give the same bytes. No torch."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lra.options import UsageError
from lra.records import columns, compact, markup, measured
from lra.records.cells import TASKS, Cell, Column, Names, Reasons, Row, Table, build, row_name
from lra.records.markup import MISSING, Block, Bullets, Grid, Heading, Text, flat, refresh_block
from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL, Report, report_skipped
from lra.records.significance import BASELINES, Comparison, Key, compare_all, footnote
from lra.records.stats import Uncertain, average, combine, difference, mean_sd, proportion
from tasks.store.files import atomic_path

HEADINGS = {
    "smoke": "smoke runs: they show that everything runs, not accuracy",
    "small": "small: reduced lengths",
    "paper": "paper: the lengths of Long Range Arena",
    "paper-large": "paper-large: the lengths and the encoders of Long Range Arena",
    "path-x": "path-x: Pathfinder of 128 x 128 pixels",
}
LEGEND = (
    "Test accuracy in percent: mean ± sample standard deviation over seeds (number of seeds) [95% interval]. "
    "The interval holds the noise of the test set (Wilson) and, with several seeds, that of training (Student's t); of "
    "one seed it holds the noise of the test set alone. "
    f"{MISSING}: not run. 2/3 seeds: one is missing. †: outside {PROTOCOL} (protocol open, or more than "
    f"{MAX_PARAMETER_RATIO:.2f} times softmax's parameters). majority and shortcut are floors computed from "
    "the data; constant is a trained one: every token averages all tokens."
)
COSTS = (
    "Relative to softmax: parameters / speed / peak memory. {speed} Memory is compared only with softmax at the "
    "same settings, hardware, threads and precision."
)
SPEED = (
    "Speed is softmax's step time divided by the method's (above 1 = faster), from interleaved steps of bench tasks "
    "(bench/tasks-{preset}.md), never from the clock of a run, because other jobs may share the machine."
)
NO_SPEED = "Speed was not measured: python -m lra bench tasks --preset {preset} measures it."
CSV_HEADER = (
    "task,dataset,substitute,preset,attention,overrides,seed,n_correct,n_test,accuracy,wilson_low,"
    "wilson_high,n_params_ratio,speed_ratio,peak_bytes,status,command"
).split(",")


def render(
    results: Path,
    form: str,
    presets: Names = None,
    report: Report = report_skipped,
    reproduced: Mapping[Path, object] | None = None,
    left_out: Reasons = None,
) -> str:
    """The records under a results folder as text; `form` is compact, long, tex or csv. Reports and raises as `build`.
    `reproduced`: what somebody else's runs say of a record, by the record's path relative to `results`."""
    tables = build(results, presets, report, left_out)
    if form == "csv":
        return to_csv(tables)
    if form == "compact":
        return markup.markdown(compact.blocks(tables), compact.WIDTH)
    document = markup.latex if form == "tex" else markup.markdown
    return document([*blocks(tables, reproduced), *measured.blocks(results), *measured.published()])


def write(path: Path, text: str) -> None:
    """Write to a file, atomically. A Markdown file keeps what stands around its results markers.
    A new Markdown file gets the markers; one that exists without them is left alone, with a UsageError."""
    if path.suffix == ".md":
        markers = "<!-- results:begin -->\n<!-- results:end -->\n"
        try:
            text = refresh_block(path.read_text("utf-8") if path.exists() else markers, "results", text)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def blocks(tables: Sequence[Table], reproduced: Mapping[Path, object] | None = None) -> list[Block]:
    """All tables of the records, for lra.records.markup; `reproduced` as in `render`."""
    if not tables:
        return [Text(compact.EMPTY)]
    return [Text(LEGEND), *(block for table in tables for block in _preset(table, reproduced or {}))]


def to_csv(tables: Sequence[Table]) -> str:
    """One line per record, raw counts first; accuracies are fractions with the 95% interval of the test set."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for table in tables:
        for e in sorted(table.entries, key=lambda e: (e.column.order, e.row, e.seed)):
            c, scores = e.column, ("", "", "")
            if e.n_correct is not None:
                s = proportion(e.n_correct / e.n_test, e.n)
                scores = (f"{x:.6f}" for x in (s.value, s.low, s.high))
            line = (c.task, c.dataset, str(c.substitute).lower(), e.preset, e.attention, e.overrides, e.seed)
            line += (e.n_correct, e.n_test, *scores, e.params_ratio, table.speeds.get(e.path.parent.name), e.peak_bytes)
            writer.writerow([_inert(x) for x in (*line, e.status, e.command)])
    return file.getvalue()


def _inert(value: object) -> object:
    """A CSV field that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def _preset(table: Table, reproduced: Mapping[Path, object]) -> list[Block]:
    headers = _headers(table)
    averages = ["average"] if table.averaged else []
    if substitutes := sum(c.substitute for c in table.averaged):
        averages = [f"average\nof 5 columns,\n{substitutes} with substitutes"]
    rows = [(kind, *_floor_row(table, kind)) for kind in ("majority", "shortcut")]
    compared = compare_all(table)
    for row in table.rows:
        cells = [_cell(table.cells.get((row, c)), compared.get((row, c, "softmax"))) for c in table.columns]
        estimates = [cell.estimate for cell in table.whole(row, table.averaged)]
        rows.append((row_name(row), *cells, *_average(table, estimates)))
    header = ("attention", *headers.values())
    again = [(e, reproduced.get(e.path.relative_to(e.results))) for e in table.entries]  # V4, a line for each cell
    lines = {f"{flat(e.column.task)}, {row_name(e.row)}: {reproduction}." for e, reproduction in again if reproduction}
    remarks = (*footnote(compared), *_remarks(table, compared), *sorted(lines))
    costs = tuple((row_name(r), *(_cost(table, r, c) for c in table.columns)) for r in table.rows)
    machines = "; ".join(sorted({flat(e.machine) for e in table.entries}))
    return [
        Heading(HEADINGS.get(table.preset) or table.preset),
        Grid((*header, *averages), tuple(rows)),
        *([Bullets(remarks)] if remarks else []),
        Text(COSTS.format(speed=(SPEED if table.speeds else NO_SPEED).format(preset=flat(table.preset)))),
        Grid(header, costs),
        Text(f"Runs were made on: {machines}."),
        *_beside(table),
    ]


def _beside(table: Table) -> Iterator[Block]:
    """Length generalisation and receptive fields, where they were measured."""
    for text, (header, rows) in ((columns.LONGER, columns.longer(table)), (columns.FIELD, columns.receptive(table))):
        if rows:
            cells = ((name, *(c if isinstance(c, str) else _cell(c, None) for c in row)) for name, row in rows)
            yield Text(text)
            yield Grid(("attention", *header), tuple(cells))


def _headers(table: Table) -> dict[Column, str]:
    """Names of the columns; where two would read the same, the hash of their data tells them apart."""
    names = {c: "\n".join(map(flat, c.parts)) for c in table.columns}
    names = {c: n if c.task in TASKS else f"{n}\noutside the LRA average" for c, n in names.items()}
    texts = list(names.values())
    return {c: n if texts.count(n) == 1 else f"{n}\nv{c.version} {c.data[:8]}" for c, n in names.items()}


def _percent(estimate: Uncertain) -> str:
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _cell(cell: Cell | None, compared: Comparison | None) -> str:
    if cell is None:
        return MISSING
    parts = []
    if cell.ok:
        mean, sd = mean_sd(cell.accuracies)
        spread = "" if sd is None else f" ± {100 * sd:.1f}"
        count = len(cell.ok) if cell.complete else f"{len(cell.ok)}/{cell.seeds} seeds"
        parts.append(f"{100 * mean:.1f}{spread} ({count}){cell.dagger} {_percent(cell.estimate)}")
    if failed := [e.status.removeprefix("failed: ") for e in cell.runs if e.n_correct is None]:
        parts.append(f"failed {len(failed)}/{cell.seeds}: {flat('; '.join(sorted(set(failed))))}")
    return compact.faced("\n".join(parts), compared)


def _average(table: Table, estimates: list[Uncertain]) -> list[str]:
    """The last cell of a row: none without an average column, missing unless all five are there."""
    if not table.averaged:
        return []
    if len(estimates) < len(table.averaged):
        return [MISSING]
    mean = average(estimates)
    return [f"{100 * mean.value:.1f} {_percent(mean)}"]


def _floor_row(table: Table, kind: str) -> list[str]:
    floors = {c: floor for c in table.columns if (floor := table.floor(c, kind))}
    cells = dict.fromkeys(table.columns, MISSING)
    for column, (name, floor) in floors.items():
        named = "" if name == "majority" else f" {flat(name)}"
        cells[column] = f"{100 * floor.value:.1f}{named} {_percent(floor)}"
    return [*cells.values(), *_average(table, [floors[c][1] for c in table.averaged if c in floors])]


def _remarks(table: Table, compared: dict[Key, Comparison]) -> list[str]:
    """What a reader must know of the columns, and of the code that made the runs."""
    remarks = [remark for column in table.columns for remark in _column_remarks(table, column, compared)]
    if len({c.task for c in table.columns}) < len(table.columns) and table.averaged:
        columns = "; ".join(flat(", ".join(c.parts)) for c in table.averaged)
        remarks.append(f"The average is over one column per task: {columns}.")
    if dirty := [e for e in table.entries if e.dirty]:
        where = ", ".join(sorted({flat(f"{e.column.task}/{e.attention}") for e in dirty}))
        share = f"{len(dirty)} of {len(table.entries)} runs"
        remarks.append(f"{share} were made with uncommitted changes in the code: {where}.")
    return remarks


def _column_remarks(table: Table, column: Column, compared: dict[Key, Comparison]) -> Iterator[str]:
    """Is attention measured here, is softmax above the floors, are the examples independent, the seeds the same?"""
    name = flat(", ".join(column.parts))
    softmax = table.cell("softmax", column)
    yield from (f"{name}: {text}" for text in _averaging(table, column, compared))
    if softmax and softmax.ok and (highest := table.floor(column, "highest")):
        floor, estimate = highest
        if softmax.estimate.low <= estimate.value:
            yield (
                f"{name}: softmax, {_percent(softmax.estimate)}, does not clear the highest floor, "
                f"{flat(floor)} at {100 * estimate.value:.1f} (a floor keeps no answers: no paired test)."
            )
    if column.effect > 1:
        yield (
            f"{name}: examples share documents (567 files in the 1,592 pairs of preset small, up to 30 uses of one), "
            f"and records do not say which. Intervals and p-values here hold {column.effect:.2f} times the "
            "binomial variance, the median over the 27 runs of preset small. Of one seed each the test is Student's t."
        )
    seeds = [{e.seed for e in cell.runs} for (_, c), cell in table.cells.items() if c == column]
    if not all(s <= max(seeds, key=len) for s in seeds):
        yield f"{name}: the rows were not run with the same seeds."


def _averaging(table: Table, column: Column, compared: dict[Key, Comparison]) -> Iterator[str]:
    """How constant compares with softmax, and what that says of a column; nothing where softmax is above."""
    softmax, constant = (table.cell(a, column) for a in ("softmax", "constant"))
    if not (softmax and softmax.ok and constant and constant.ok):
        return
    comparison = compared.get(((BASELINES["constant"], "constant", ()), column, "softmax"))
    gap = combine([(-1.0, comparison.gap)]) if comparison else difference(softmax.estimate, constant.estimate)
    said = f"softmax − constant: {100 * gap.value:z.1f} points, {_percent(gap)}"
    if comparison is None:
        yield (
            f"{said}; not tested, because a paired test takes the predictions of both and several seeds of both or "
            "one of each."
        )
        return
    if comparison.verdict == "below":
        return
    verbs = {"above": "is above softmax", "untold": "is not told apart from softmax"}
    verb = verbs.get(comparison.verdict, f"ties softmax within {100 * comparison.margin:.1f} points")
    shown = comparison.verdict != "untold"
    meaning = f"this column {'does not' if shown else 'is not shown to'} measure attention at this size."
    cells = {row: c for (row, place, baseline), c in compared.items() if (place, baseline) == (column, "constant")}
    if above := ", ".join(sorted(row_name(row) for row, c in cells.items() if c.verdict == "above")):
        meaning = (
            f"softmax {'has not learned' if shown else 'is not shown'} to use attention here (above constant: "
            f"{above}), and a gap to softmax in this column says nothing about approximation."
        )
    single = " One seed each: this compares two runs, not two methods." if comparison.seeds == 1 else ""
    yield f"constant {verb} ({said}, p {comparison.adjusted:.2g} by Holm), so {meaning}{single}"


def _cost(table: Table, row: Row, column: Column) -> str:
    cell = table.cells.get((row, column))
    if cell is None:
        return MISSING
    ratio = max(e.params_ratio for e in cell.runs)
    medians = (MISSING if value is None else f"{value:.2f}" for value in table.efficiency(cell))
    return f"{ratio:.2f}{' †' if ratio > MAX_PARAMETER_RATIO else ''} / {' / '.join(medians)}"
