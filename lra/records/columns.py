"""What a column measures, beside its accuracies: on longer data than in training, and by how far a model sees.

Longer data: `evaluate RECORD --lengths` writes RESULTS/longer/<as the record's path below records/>:
{"schema", "weights": the sha256 that the record gives its final weights, "fixed": why these take no longer sequence,
else "", "points": [{"seq_len", "n_correct", "n", "majority", "sha256"}], of a fixed length "seq_len" alone}. It is
extra evidence, and no field of a record. No torch.
"""

import json
from copy import copy
from pathlib import Path
from typing import Any

from lra.options import UsageError
from lra.records.cells import Cell, Column, Entry, Row, Table, row_name
from lra.records.markup import MISSING, flat
from lra.records.record import read_limited
from lra.records.stats import proportion
from tasks.store.files import atomic_path

SCHEMA = "lra-longer/1"
LONGER = (
    "Trained at N tokens and tested at more, on examples drawn anew (evaluate --lengths): mean ± standard deviation "
    "(seeds) [95% interval]. The first column of a task is the test of the records. fixed: learned positions, or a "
    "method of a fixed length, take no longer sequence. majority: the most frequent label of train."
)
FIELD = (
    "Accuracy by receptive field: the tokens that can reach an output of local (sliding windows, both sides), "
    "1 + 2 x layers x window, N at most. A column in which few tokens do as well as softmax does not need far ones; "
    "mean pooling and the head see all tokens in any case."
)
Rows = list[tuple[str, list[Cell | str | None]]]


def write_longer(results: Path, place: Path, facts: dict[str, Any]) -> Path:
    """Keep the counts of a record whose path below records/ is `place`; returns where."""
    path = Path(results) / "longer" / place
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return path


def read_longer(e: Entry) -> dict[int, tuple[int, int, float] | None]:
    """(n_correct, n, majority) of a run by tokens, None where its length is fixed; empty where nothing was kept, or of
    other weights. Raises UsageError for a file that makes no sense."""
    path = e.results / "longer" / e.path.relative_to(e.results / "records")
    if not path.exists():
        return {}
    try:
        facts, points = json.loads(read_limited(path)), {}
        if facts["schema"] != SCHEMA:
            raise ValueError(f"schema {facts['schema']!r}")
        for point in facts["points"]:
            right, n, majority = (0, 1, 0.0) if facts["fixed"] else (point[k] for k in ("n_correct", "n", "majority"))
            proportion(right / n, n), proportion(majority, n)
            if (length := int(point["seq_len"])) <= e.column.seq_len:
                raise ValueError(f"{length} tokens are not more than in training")
            points[length] = None if facts["fixed"] else (int(right), int(n), float(majority))
        return points if facts["weights"] == e.weights else {}
    except (ValueError, KeyError, TypeError, OSError, ZeroDivisionError) as error:
        raise UsageError(f"{path} is not usable ({type(error).__name__} {error}): make it again") from None


def longer(table: Table) -> tuple[list[str], Rows]:
    """Header and rows of length generalisation; no rows where nothing was kept."""
    kept = {e: points for e in table.entries if (points := read_longer(e))}
    floors: dict[tuple[Column, int], str] = {}
    for e, points in kept.items():
        trained = table.floor(e.column, "majority")
        floors[e.column, e.column.seq_len] = f"{100 * trained[1].value:.1f}" if trained else MISSING
        for length, point in points.items():
            floors.setdefault((e.column, length), MISSING)
            if point:
                floors[e.column, length] = f"{100 * point[2]:.1f}"
    places = sorted(floors, key=lambda place: (place[0].order, place[1]))
    rows: Rows = [("majority", [floors[place] for place in places])]
    for row in table.rows:
        if any(e.row == row for e in kept):
            rows.append((row_name(row), [_longer(table, kept, row, *place) for place in places]))
    return [f"{flat(c.task)}\n{length:,} tokens" for c, length in places], rows if kept else []


def _longer(table: Table, kept: dict[Entry, dict], row: Row, column: Column, length: int) -> Cell | str | None:
    """The runs of a row at a length: as a cell, or `fixed`."""
    if length == column.seq_len:
        return table.cells.get((row, column))
    points = {e: p[length] for e, p in kept.items() if (e.row, e.column) == (row, column) and length in p}
    runs = []
    for e, point in points.items():
        if point:
            runs.append(copy(e))
            runs[-1].n_correct, runs[-1].n_test, _ = point
            runs[-1].n = point[1] / column.effect
    return Cell(sorted(runs, key=lambda e: e.seed)) if runs else "fixed" if points else None


def fields(table: Table) -> dict[Column, dict[int, Cell]]:
    """Cells of `local` by receptive field in tokens, in columns that have several of them."""
    found: dict[Column, dict[int, Cell]] = {}
    for (row, column), cell in table.cells.items():
        if row[1] == "local" and cell.ok and all(part.startswith("attention.window=") for part in row[2]):
            options = {"attention.shape": "sliding", "attention.sinks": "0"} | cell.runs[0].config
            layers, window = (int(options.get(key, 0)) for key in ("encoder.layers", "attention.window"))
            if layers and (options["attention.shape"], options["attention.sinks"]) == ("sliding", "0"):
                found.setdefault(column, {})[min(1 + 2 * layers * window, column.seq_len)] = cell
    return {column: dict(sorted(cells.items())) for column, cells in found.items() if len(cells) > 1}


def receptive(table: Table) -> tuple[list[str], Rows]:
    """Header and rows of accuracy by receptive field; no rows where no column has several windows."""
    found = fields(table)
    columns = [c for c in table.columns if c in found]
    rows: Rows = [
        (f"local, {field:,} tokens", [found[c].get(field) for c in columns])
        for field in sorted({field for cells in found.values() for field in cells})
    ]
    ends = {name: (name, [table.cell(name, c) for c in columns]) for name in ("constant", "softmax")}
    return [flat(c.task) for c in columns], [ends["constant"], *rows, ends["softmax"]] if rows else []
