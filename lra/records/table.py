"""Tables as Markdown, LaTeX, HTML and CSV: a pure function of the records, so the same bytes again. No torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from lra.leaderboard.submit import reproductions
from lra.options import UsageError
from lra.records import markup, measured, published
from lra.records.cells import Cell, Column, Entry, Table, build
from lra.records.compare import Comparison, against_softmax, footnote
from lra.records.markup import Block, Bold, Bullets, Grid, Heading, Italic, Text, flat
from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL, report_skipped
from lra.records.stats import Estimate, average, difference, mean_sd, wilson
from tasks.store.files import atomic_path

__all__ = ["DOCUMENTS", "blocks", "build", "refresh_block", "render", "row_name", "to_csv", "write"]

HEADINGS = {
    "smoke": "smoke runs: they show that everything runs, not accuracy",
    "small": "small: reduced lengths",
    "paper": "paper: the lengths of Long Range Arena",
    "paper-large": "paper-large: the lengths and the encoders of Long Range Arena",
    "path-x": "path-x: Pathfinder of 128 x 128 pixels",
}
MISSING = "–"
LEGEND = (
    "Test accuracy in percent: mean ± sample standard deviation over seeds (number of seeds) [95% interval]. "
    "The interval holds the noise of the test set (Wilson) and, with several seeds, that of training. "
    f"{MISSING}: not run. 2/3 seeds: one is missing. †: outside {PROTOCOL} (protocol open, or more than "
    f"{MAX_PARAMETER_RATIO:.2f} times softmax's parameters). majority and shortcut are floors computed from "
    "the data; constant is a trained one: every token averages all tokens."
)
COSTS = (
    "Relative to softmax: parameters / speed / peak memory. Speed is softmax's step time divided by the "
    "method's (above 1 = faster), from interleaved steps of bench tasks (results/bench/tasks-{preset}.md), never "
    "from the clock of a run, because other jobs may share the machine. Memory is compared only with softmax at the "
    "same settings, hardware, threads and precision."
)
CSV_HEADER = (
    "task,dataset,substitute,preset,attention,overrides,seed,n_correct,n_test,accuracy,wilson_low,"
    "wilson_high,n_params_ratio,speed_ratio,peak_bytes,status,command"
).split(",")
DOCUMENTS = {"md": markup.markdown, "tex": markup.latex, "html": markup.html_document}


def render(
    results: Path,
    form: str,
    presets: Sequence[str] | None = None,
    report: Callable[[str], None] = report_skipped,
) -> str:
    """The records under a results folder as text; `form` is md, tex, html or csv. Reports and raises as `build`."""
    tables = build(results, presets, report)
    if form == "csv":
        return to_csv(tables)
    return DOCUMENTS[form]([*blocks(tables), *measured.blocks(results), *published.blocks()])


def write(path: Path, text: str) -> None:
    """Write to a file, atomically. A Markdown file keeps what stands around its results markers.

    A new Markdown file gets the markers; one that exists without them is left alone, with a UsageError.
    """
    path = Path(path)
    if path.suffix == ".md":
        markers = "<!-- results:begin -->\n<!-- results:end -->\n"
        try:
            text = refresh_block(path.read_text() if path.exists() else markers, "results", text)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def blocks(tables: Sequence[Table]) -> list[Block]:
    """All tables of the records, for lra.records.markup."""
    if not tables:
        return [Text("No results yet: no record was found; bash run_all.sh makes them.")]
    return [Text(LEGEND), *(block for table in tables for block in _preset(table))]


def to_csv(tables: Sequence[Table]) -> str:
    """One line per record, raw counts first; accuracies are fractions with Wilson's 95% interval."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for table in tables:
        for e in sorted(table.entries, key=lambda e: (e.column.order, e.row, e.seed)):
            scores = ("", "", "")
            if e.n_correct is not None:
                interval = wilson(e.n_correct, e.n_test)
                scores = tuple(f"{x:.6f}" for x in (e.n_correct / e.n_test, *interval))
            c = e.column
            line = (c.task, c.dataset, str(c.substitute).lower(), e.preset, e.attention, e.overrides, e.seed)
            line += (e.n_correct, e.n_test, *scores, e.params_ratio, table.speeds.get(e.digest), e.peak_bytes)
            writer.writerow([_inert(x) for x in (*line, e.status, e.command)])
    return file.getvalue()


def refresh_block(text: str, name: str, block: str) -> str:
    """`text` with what stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->` replaced by `block`.

    Raises UsageError unless each marker stands there once, in that order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UsageError(f"cannot place the block: the text must hold {begin} once and, after it, {end} once")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n{block.strip()}\n{end}{rest.partition(end)[2]}"


def _inert(value: object) -> object:
    """A CSV field that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def _preset(table: Table) -> list[Block]:
    headers = _headers(table)
    averages = ["average"] if table.averaged else []
    if substitutes := sum(c.substitute for c in table.averaged):
        averages = [f"average\nof 5 columns,\n{substitutes} with substitutes"]
    rows = [("majority", *_floor_row(table, _majority)), ("shortcut", *_floor_row(table, _shortcut))]
    compared = against_softmax(table)
    for row in table.rows:
        cells = [_cell(table.cells.get((row, c)), compared.get((row, c))) for c in table.columns]
        whole = [table.cells.get((row, c)) for c in table.averaged]
        estimates = [cell.estimate for cell in whole if cell and cell.complete]
        rows.append((row_name(row), *cells, *_average(table, estimates)))
    header = ("attention", *(headers[c] for c in table.columns))
    remarks = (*footnote(compared), *_remarks(table), *_reproduced(table))
    costs = tuple((row_name(r), *(_cost(table, r, c) for c in table.columns)) for r in table.rows)
    machines = "; ".join(sorted({flat(e.machine) for e in table.entries}))
    return [
        Heading(HEADINGS.get(table.preset) or table.preset),
        Grid((*header, *averages), tuple(rows)),
        *([Bullets(remarks)] if remarks else []),
        Text(COSTS.format(preset=flat(table.preset))),
        Grid(header, costs),
        Text(f"Runs were made on: {machines}."),
    ]


def _headers(table: Table) -> dict[Column, str]:
    """Names of the columns; where two would read the same, the hash of their data tells them apart."""
    names = {c: "\n".join(map(flat, c.parts)) for c in table.columns}
    shown = list(names.values())
    return {c: n if shown.count(n) == 1 else f"{n}\nv{c.version} {c.data[:8]}" for c, n in names.items()}


def row_name(row: tuple[int, str, tuple[str, ...]]) -> str:
    """A row as it is named everywhere: its attention, and what differs from the defaults."""
    _, attention, label = row
    return flat(attention) + (f" [{flat(', '.join(label))}]" if label else "")


def _percent(estimate: Estimate) -> str:
    return f"[{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _cell(cell: Cell | None, compared: Comparison | None = None) -> str:
    if cell is None:
        return MISSING
    seeds = max(cell.seeds, len(cell.runs))
    parts = []
    if cell.ok:
        mean, sd = mean_sd(cell.accuracies)
        spread = "" if sd is None else f" ± {100 * sd:.1f}"
        count = f"({len(cell.ok)})" if len(cell.ok) == seeds else f"({len(cell.ok)}/{seeds} seeds)"
        dagger = " †" if any(e.open for e in cell.ok) else ""
        parts.append(f"{100 * mean:.1f}{spread} {count}{dagger} {_percent(cell.estimate)}")
    failed = [e.status.removeprefix("failed: ") for e in cell.runs if e.n_correct is None]
    if failed:
        parts.append(f"failed {len(failed)}/{seeds}: {flat('; '.join(sorted(set(failed))))}")
    face = {"above": Bold, "below": Italic}.get(compared.verdict if compared else None, str)
    return face("\n".join(parts))


def _average(table: Table, estimates: list[Estimate]) -> list[str]:
    """The last cell of a row: none without an average column, missing unless all five are there."""
    if not table.averaged:
        return []
    if len(estimates) < len(table.averaged):
        return [MISSING]
    mean = average(estimates)
    return [f"{100 * mean.value:.1f} {_percent(mean)}"]


def _floor(entry: Entry, name: str) -> Estimate:
    value = entry.floors[name]
    return Estimate(value, *wilson(value * entry.n_test, entry.n_test))


def _majority(floors: dict[str, float]) -> str | None:
    return "majority" if "majority" in floors else None


def _shortcut(floors: dict[str, float]) -> str | None:
    """The name of the best floor other than majority."""
    return max((n for n in sorted(floors) if n != "majority"), key=floors.__getitem__, default=None)


def _floor_row(table: Table, pick: Callable[[dict[str, float]], str | None]) -> list[str]:
    found = {}
    for column in table.columns:
        entry = table.first(column)
        if name := pick(entry.floors):
            found[column] = name, _floor(entry, name)

    def text(column):
        if column not in found:
            return MISSING
        name, floor = found[column]
        named = "" if name == "majority" else f" {flat(name)}"
        return f"{100 * floor.value:.1f}{named} {_percent(floor)}"

    return [*map(text, table.columns), *_average(table, [found[c][1] for c in table.averaged if c in found])]


def _remarks(table: Table) -> list[str]:
    remarks = []
    for column in table.columns:
        name = flat(", ".join(column.parts))
        softmax, constant = (table.cell(a, column) for a in ("softmax", "constant"))
        if softmax and softmax.ok:
            if constant and constant.ok:
                gap = difference(softmax.estimate, constant.estimate)
                if gap.low <= 0:
                    verb = "ties" if gap.high >= 0 else "beats"
                    above = _above(table, column, constant)
                    remarks.append(
                        f"{name}: constant {verb} softmax (softmax − constant: {100 * gap.value:.1f} points, "
                        f"{_percent(gap)}), so "
                        + (
                            f"softmax has not learned to use attention here (above constant: {above}), and a gap "
                            "to softmax in this column says nothing about approximation."
                            if above
                            else "this column does not measure attention at this size."
                        )
                    )
            floors = table.first(column).floors
            highest = max(sorted(floors), key=floors.__getitem__, default=None)
            if highest is not None and softmax.estimate.low <= floors[highest]:
                remarks.append(
                    f"{name}: softmax, {_percent(softmax.estimate)}, does not clear the highest floor, "
                    f"{flat(highest)} at {100 * floors[highest]:.1f}."
                )
        seeds = [{e.seed for e in cell.runs} for (_, c), cell in table.cells.items() if c == column]
        if not all(s <= max(seeds, key=len) for s in seeds):
            remarks.append(f"{name}: the rows were not run with the same seeds.")
    if len({c.task for c in table.columns}) < len(table.columns) and table.averaged:
        columns = "; ".join(flat(", ".join(c.parts)) for c in table.averaged)
        remarks.append(f"The average is over one column per task: {columns}.")
    if dirty := [e for e in table.entries if e.dirty]:
        where = ", ".join(sorted({flat(f"{e.column.task}/{e.attention}") for e in dirty}))
        share = f"{len(dirty)} of {len(table.entries)} runs"
        remarks.append(f"{share} were made with uncommitted changes in the code: {where}.")
    return remarks


def _reproduced(table: Table) -> list[str]:
    """One line for each cell that somebody else ran as well (V4)."""
    found = {}
    for results in sorted({e.results for e in table.entries}):
        counter = reproductions(results)
        for e in table.entries:
            if reproduction := counter.get(e.path.relative_to(results)):
                found[f"{flat(e.column.task)}, {row_name(e.row)}: {reproduction}."] = None
    return sorted(found)


def _above(table: Table, column: Column, constant: Cell) -> str:
    """The attentions whose interval of the difference to constant lies above zero."""
    names = []
    for (row, place), cell in table.cells.items():
        if place == column and cell.ok and difference(cell.estimate, constant.estimate).low > 0:
            names.append(row_name(row))
    return ", ".join(sorted(names))


def _cost(table: Table, row: tuple[int, str, tuple[str, ...]], column: Column) -> str:
    cell = table.cells.get((row, column))
    if cell is None:
        return MISSING
    ratio = max(e.params_ratio for e in cell.runs)
    medians = (MISSING if value is None else f"{value:.2f}" for value in table.efficiency(cell))
    return f"{ratio:.2f}{' †' if ratio > MAX_PARAMETER_RATIO else ''} / {' / '.join(medians)}"
