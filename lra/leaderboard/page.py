"""The leaderboard page: records, figures and badges in one static file that needs no network. No torch."""

from __future__ import annotations

import base64
import hashlib
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lra.figures import plots
from lra.figures.style import INK, color
from lra.leaderboard.submit import Verdict, verified
from lra.options import UsageError
from lra.records import measured, published, table
from lra.records.cells import Cell, Column, Entry, Table
from lra.records.markup import flat, html_fragment
from lra.records.record import report_skipped
from lra.records.stats import mean_sd
from tasks.store.files import atomic_path

HERE = Path(__file__).parent
CAPTIONS = {
    "bubble": "Accuracy, speed and peak memory of every method that has run all tasks.",
    "accuracy": "Test accuracy by task: seeds, mean and 95% interval; floors dashed.",
    "curves": "Validation accuracy while training: mean and standard deviation over seeds.",
    "lengths": "Time and memory of the attention alone against length; from where a method is not slower than softmax.",
    "features": "Approximation error against the number of features.",
}
DOTS = 120  # width of the small chart in a row, in its own units


def build(args: Namespace) -> int:
    """`leaderboard build`: figures and page. Exit code 1 when a file was left out; the rest is shown."""
    skipped: list[str] = []
    tables = table.build(args.results, report=skipped.append)
    figures = plots.draw(args.results, tables)
    path = args.results / "index.html"
    shown = [line.replace(f"{args.results}/", "") for line in skipped]
    text = render(args.results, tables, figures, shown)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(path)
    for line in skipped:
        report_skipped(line)
    return 1 if skipped else 0


def serve(args: Namespace) -> None:
    """`leaderboard serve`: on the loopback interface, until Ctrl-C. Raises UsageError before `build`."""
    if not (args.results / "index.html").exists():
        raise UsageError(
            f"no page at {args.results / 'index.html'}: python -m lra leaderboard build makes it"
        )
    handler = partial(SimpleHTTPRequestHandler, directory=str(args.results))
    with ThreadingHTTPServer(("127.0.0.1", args.port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/index.html (Ctrl-C ends)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def render(results: Path, tables: Sequence[Table], figures: Sequence[Path], left_out: Sequence[str]) -> str:
    """The page as text: a pure function of the records, the figures and the verification file."""
    import jinja2
    from markupsafe import Markup

    places = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=places, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (HERE / "page.js").read_text(encoding="utf-8")
    verdicts = verified(results)
    rows = [row for t in tables for row in _rows(results, t, verdicts)]
    reproduced = {place: v.reproduction for place, v in verdicts.items() if v.reproduction}
    blocks = [*table.blocks(tables, reproduced), *measured.blocks(results), *published.blocks()]
    return environment.get_template("page.html.j2").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        rows=rows,
        filters={key: sorted({row[key] for row in rows}) for key in ("preset", "task", "protocol", "device")},
        figures=[_figure(path) for path in figures],
        tables=Markup(html_fragment(blocks)),
        left_out=left_out,
    )


def _rows(results: Path, t: Table, verdicts: dict[Path, Verdict]) -> Iterator[dict[str, Any]]:
    """One dictionary per cell of a table, for the template."""
    ranges = {column: _range(t, column) for column in t.columns}
    for key, column in sorted(t.cells, key=lambda k: (k[1].order, k[0])):
        cell = t.cells[key, column]
        speed, memory = t.efficiency(cell)
        yield {
            "name": table.row_name(key),
            "color": "currentColor" if color(key[1]) == INK else color(key[1]),
            "preset": flat(t.preset),
            "task": flat(column.task),
            "data": flat(", ".join(column.parts[1:])),
            "protocol": flat(" / ".join(sorted({_protocol(e) for e in cell.runs}))),
            "device": flat(" / ".join(sorted({e.device for e in cell.runs}))),
            "params": max(e.params_ratio for e in cell.runs),
            "speed": speed,
            "memory": memory,
            "badge": _badge(results, cell, verdicts),
            "runs": [_run(results, e) for e in cell.runs],
            **_score(cell, *ranges[column]),
        }


def _protocol(e: Entry) -> str:
    return "open" if e.open else e.protocol


def _score(cell: Cell, low: float, high: float) -> dict[str, Any]:
    """Accuracy in percent with its interval and seeds, and the small chart of a cell from `low` to `high`."""
    seeds = f"{len(cell.ok)} of {max(cell.seeds, len(cell.runs))}"
    failed = "; ".join(sorted({flat(e.status) for e in cell.runs if e.n_correct is None}))
    if not cell.ok:
        return {"accuracy": None, "seeds": seeds, "failed": failed}

    def place(value):
        return f"{4 + (DOTS - 8) * (value - low) / (high - low or 1):.1f}"

    estimate = cell.estimate
    _, sd = mean_sd(cell.accuracies)
    return {
        "accuracy": 100 * estimate.value,
        "sd": None if sd is None else 100 * sd,
        "interval": f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}",
        "seeds": seeds,
        "failed": failed,
        "line": (place(estimate.low), place(estimate.high)),
        "mean": place(estimate.value),
        "dots": [place(a) for a in cell.accuracies],
    }


def _range(t: Table, column: Column) -> tuple[float, float]:
    """The accuracies that the small charts of a column span."""
    found = [cell.estimate for (_, c), cell in t.cells.items() if c == column and cell.ok]
    return min((e.low for e in found), default=0.0), max((e.high for e in found), default=1.0)


def _run(results: Path, e: Entry) -> dict[str, str]:
    return {"command": flat(e.command), "path": e.path.relative_to(results).as_posix()}


def _badge(results: Path, cell: Cell, verdicts: dict[Path, Verdict]) -> dict[str, Any]:
    """The badge of the least verified run of a cell; its level is -1 when unverified, -2 when rejected."""

    def level(verdict):
        return -2 if verdict.rejected else max(verdict.levels, default=-1)

    least = min((verdicts[e.path.relative_to(results)] for e in cell.runs), key=level)
    why = "; ".join(str(part) for part in (least.reproduction, least.reason) if part)
    return {"level": level(least), "text": least.badge, "reason": flat(why)}


def _figure(path: Path) -> dict[str, Any]:
    """A figure as inline SVG: no header, names of its own, ink in the colour of the page's text."""
    from markupsafe import Markup

    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace('id="', f'id="{path.stem}-')
    text = text.replace("url(#", f"url(#{path.stem}-").replace('href="#', f'href="#{path.stem}-')
    preset, _, kind = path.stem.rpartition("-")
    return {"svg": Markup(text), "title": preset, "caption": CAPTIONS[kind]}
