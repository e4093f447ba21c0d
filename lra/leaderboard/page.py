"""What is shown of the records: tables as text, and the page, one static file that needs no network. No torch."""

import base64
import hashlib
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lra.figures import plots
from lra.figures.style import GREY, INK, color
from lra.leaderboard.consistency import Places, places
from lra.leaderboard.context import trees
from lra.leaderboard.levels import Verdict, judge, reproductions
from lra.options import UsageError
from lra.records import cells, compact, measured, table
from lra.records.cells import Cell, Table, row_name
from lra.records.markup import Bullets, flat, html_fragment, parsed
from lra.records.record import PROTOCOL, report_all
from lra.records.stats import mean_sd
from tasks.store.files import atomic_path

HERE = Path(__file__).parent
CAPTIONS = {
    "bubble": "Accuracy, speed and peak memory of the methods that have run all tasks.",
    "accuracy": "Test accuracy by task, best first: seeds, mean and 95% interval; floors dashed.",
    "groups": "Test accuracy by what makes an example hard, such as its number of pairs.",
    "field": "Test accuracy by how many tokens can reach an output (local), beside softmax and constant.",
    "curves": "Validation accuracy while training: mean over seeds.",
    "lengths": "Time and memory of the attention alone against length; from where a method is not slower than softmax.",
}
GEMMA = {  # what `gemma table` and `gemma plot` write below RESULTS/gemma
    "swap": "The attention of a pretrained Gemma exchanged, nothing trained.",
    "finetune": "Exchanged, then finetuned.",
    "stability": "Finetuned at several learning rates.",
    "anisotropy": "Spectra of real queries and keys.",
}
STRIP = 120  # width of the small chart in a row, in its own units
FILTERS = ("preset", "task", "protocol", "device")
FIRST = "small"  # the preset that is shown first


def build(args: Namespace) -> int:
    """`leaderboard build`: figures and page. Exit code 1 when a file was left out; the rest is shown."""
    skipped: list[str] = []
    verdicts, rejected = _judged(places(args), args.level)
    own, *others = trees(args.results)
    tables, *made = (cells.build(tree, report=skipped.append, left_out=rejected) for tree in (own, *others))
    theirs = dict(zip((tree.name for tree in others), made, strict=True))
    figures, path = plots.draw(own, tables), own / "index.html"
    text = render(own, tables, theirs, verdicts, figures, [line.replace(f"{own}/", "") for line in skipped])
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(path)
    return report_all(skipped)


def show_table(args: Namespace) -> int:
    """`table`: from the records alone. Exit code 1 if a file was left out; the rest is shown all the same."""
    skipped: list[str] = []
    verdicts, rejected = _judged(Places(args.results))
    text = table.render(args.results, args.format, args.preset, skipped.append, reproductions(verdicts), rejected)
    if args.write:
        table.write(args.write, text)
    else:
        print(text, end="")
    return report_all(skipped)


def plot(args: Namespace) -> int:
    """`plot`: every figure there is something for, below the results folder. Exit code 1 as for `table`."""
    skipped: list[str] = []
    _, rejected = _judged(Places(args.results))
    tables = cells.build(args.results, report=skipped.append, left_out=rejected)
    for path in plots.draw(args.results, tables, args.all):
        print(path)
    return report_all(skipped)


def compare(args: Namespace) -> int:
    """`compare`: the user's runs beside the reference's, without those that are rejected."""
    return compact.compare(args, _judged(Places(args.results))[1])


def _judged(places: Places, level: int = 1) -> tuple[dict[Path, Verdict], dict[Path, str]]:
    """Verdicts on all records, and those that no table, average or figure has, by path, with the reason."""
    verdicts = judge(places, level)
    return verdicts, {places.results / p: f"rejected: {v.reason}" for p, v in verdicts.items() if v.rejected}


def serve(args: Namespace) -> None:
    """`leaderboard serve`: on the loopback interface, until Ctrl-C. Raises UsageError before `build`."""
    if not (page := args.results / "index.html").exists():
        raise UsageError(f"no page at {page}: python -m lra leaderboard build makes it")
    handler = partial(SimpleHTTPRequestHandler, directory=str(args.results))
    with ThreadingHTTPServer(("127.0.0.1", args.port), handler) as server, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{server.server_port}/index.html (Ctrl-C ends)", flush=True)
        server.serve_forever()


def render(
    results: Path,
    tables: Sequence[Table],
    theirs: dict[str, list[Table]],
    verdicts: dict[Path, Verdict],
    figures: Sequence[Path],
    left_out: Sequence[str],
) -> str:
    """The page as text: a pure function of the owner's tables, those of others by their names, and the figures."""
    import jinja2

    form = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(HERE), **form)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    rows = [row for t in tables for row in _rows(results, t, verdicts)]
    others = [
        row | {"rank": None, "name": f"{row['name']}, by {by}"}
        for by, made in theirs.items()
        for t in made
        for row in _rows(results, t, verdicts)
        if row["badge"]
    ]
    rows += [row for row in others if row["badge"]["confirmed"]]
    blocks = {t.preset: table.blocks([t], reproductions(verdicts)) for t in tables}
    first = blocks.get(FIRST) or next(iter(blocks.values()), [])
    notes = [item for block in first if isinstance(block, Bullets) for item in block.items]
    every = list(dict.fromkeys(block for part in blocks.values() for block in part)) or table.blocks([])
    studies = [_picture(path) for path in sorted((results / "figures").glob("variance*.svg"))]
    return environment.get_template("page.html.j2").render(
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        rows=rows,
        others=[row for row in others if not row["badge"]["confirmed"]],
        first=FIRST,
        filters={name: sorted({row[name] for row in rows} - {""}) for name in FILTERS},
        warnings=[note for note in notes if not note.startswith("Bold: ")],  # that speaks of the table alone
        figures=[*map(_figure, figures), *studies],
        gemma=list(_gemma(results / "gemma")),
        tables=Markup(html_fragment([*every, *measured.blocks(results), *measured.published()])),
        left_out=left_out,
    )


def _rows(results: Path, t: Table, verdicts: dict[Path, Verdict]) -> Iterator[dict[str, Any]]:
    """One dictionary for each cell and each floor of a table: by task, the best first, the failed last."""
    for column in t.columns:
        rows = [_row(results, t, key, cell, verdicts) for (key, c), cell in t.cells.items() if c == column]
        floors = [_floor(name, value) for name, value in t.first(column).floors.items()]
        ends = [end for row in rows for end in row["bounds"]] + [row["accuracy"] for row in floors]
        low, high = min(ends, default=0.0), max(ends, default=100.0)

        def place(value, low=low, high=high):
            return f"{4 + (STRIP - 8) * (value - low) / (high - low or 1):.1f}"

        softmax = t.cell("softmax", column)
        axis = {
            "ends": (f"{low:.0f}", f"{high:.0f}"),
            "floors": [place(row["accuracy"]) for row in floors],
            "softmax": place(100 * softmax.estimate.value) if softmax and softmax.ok else None,
        }

        def best_first(row):
            return row["accuracy"] is None, -(row["accuracy"] or 0.0)

        rows.sort(key=lambda row: (*best_first(row), row["name"]))
        for rank, row in enumerate(rows, 1):
            row["rank"] = None if row["accuracy"] is None else rank
        for row in sorted([*rows, *floors], key=best_first):
            marks = {name: [place(value) for value in row[name]] for name in ("bounds", "dots")}
            mean = None if row["accuracy"] is None else place(row["accuracy"])
            yield row | {
                "preset": flat(t.preset),
                "task": flat(column.task),
                "data": flat(", ".join(column.parts[1:])),
                "strip": axis | marks | {"mean": mean},
            }


def _row(results: Path, t: Table, key: tuple, cell: Cell, verdicts: dict[Path, Verdict]) -> dict[str, Any]:
    speed, memory = t.efficiency(cell)
    failed = "; ".join(sorted({flat(e.status) for e in cell.runs if e.n_correct is None}))
    score = {"accuracy": None, "bounds": (), "dots": [100 * a for a in cell.accuracies]}
    if cell.ok:  # percent
        value, low, high = (100 * x for x in (cell.estimate.value, cell.estimate.low, cell.estimate.high))
        _, sd = mean_sd(cell.accuracies)
        score |= {"accuracy": value, "bounds": [low, high], "interval": f"{low:.1f} to {high:.1f}"}
        score["sd"] = None if sd is None else 100 * sd
    return score | {
        "name": row_name(key),
        "color": "currentColor" if color(key[1]) == INK else color(key[1]),
        "protocol": flat(" / ".join(sorted({"open" if e.open else PROTOCOL for e in cell.runs}))),
        "device": flat(" / ".join(sorted({e.device for e in cell.runs}))),
        "params": max(e.params_ratio for e in cell.runs),
        "speed": speed,
        "memory": memory,
        "badge": _badge(results, cell, verdicts),
        "runs": [{"command": flat(e.command), "path": e.path.relative_to(results).as_posix()} for e in cell.runs],
        "seeds": f"{len(cell.ok)} of {cell.seeds}",
        "failed": failed,
    }


def _floor(name: str, value: float) -> dict[str, Any]:
    """The row of a floor: what needs no attention, computed from the data."""
    empty = dict.fromkeys(("rank", "sd", "params", "speed", "memory", "badge"))
    empty |= dict.fromkeys(("protocol", "device", "interval", "seeds", "failed"), "")
    empty |= dict.fromkeys(("bounds", "dots", "runs"), ())
    return empty | {"name": f"floor: {flat(name)}", "color": GREY, "accuracy": 100 * value}


def _badge(results: Path, cell: Cell, verdicts: dict[Path, Verdict]) -> dict[str, Any]:
    """The badge of the least verified run of a cell; its level is -1 when unverified."""
    runs = [verdicts[e.path.relative_to(results)] for e in cell.runs]
    least = min(runs, key=lambda verdict: verdict.level)
    why = "; ".join(str(part) for part in (least.reproduction, least.reason) if part)
    confirmed = all({2, 4} <= set(v.levels) for v in runs)
    return {"level": least.level, "text": least.badge, "reason": flat(why), "confirmed": confirmed}


def _figure(path: Path) -> dict[str, Any]:
    """A figure as inline SVG: no header, names of its own, ink in the colour of the page's text."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "currentColor").replace('id="', f'id="{path.stem}-')
    text = text.replace("url(#", f"url(#{path.stem}-").replace('href="#', f'href="#{path.stem}-')
    preset, _, kind = path.stem.rpartition("-")
    return {"svg": Markup(text), "caption": f"{preset}: {CAPTIONS[kind]}" if preset else CAPTIONS[kind]}


def _picture(path: Path, caption: str = "Random features, measured by `variance`.") -> dict[str, Any]:
    """A figure that was drawn before, as an image: whatever is in the file, an image runs and asks for nothing."""
    data = base64.b64encode(path.read_bytes()).decode()
    return {"data": f"data:image/svg+xml;base64,{data}", "name": path.stem, "caption": caption}


def _gemma(folder: Path) -> Iterator[dict[str, Any]]:
    """Figure and tables of each kind of measurement of the Gemma track, as its own commands wrote them."""
    for kind, caption in GEMMA.items():
        figure, text = folder / "figures" / f"{kind}.svg", folder / f"{kind}.md"
        if figure.is_file() or text.is_file():
            tables = html_fragment(parsed(text.read_text(encoding="utf-8"))) if text.is_file() else ""
            picture = _picture(figure, caption) if figure.is_file() else None
            yield {"kind": kind, "caption": caption, "figure": picture, "tables": Markup(tables)}
