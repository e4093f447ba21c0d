"""Numbers that no record holds: what `bench` measured, the source of every time in a table; what others published.

Measured: results/bench/. No torch.

attention.json: {"points": [{"name", "N", "seconds", "peak_bytes", "ratio"}]}: forward and backward of one attention;
ratio, if given, is softmax's time by its own, the median over interleaved rounds.
tasks-PRESET.json: {"points": [{"digest", "ratio"}]}: softmax's time of a training step by that of the runs whose
configuration has the digest, in interleaved rounds.
published.json: {"accuracy": [source, ...], "speed": source}: printed beside our tables, never used as our baseline. A
source has a title, a citation, a caveat, which says why no column of ours compares with it, and rows {name: numbers},
in the order of TASKS or of SPEEDS.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lra.options import UsageError
from lra.records.markup import MISSING, Block, Grid, Heading, Text
from lra.records.stats import mean_sd

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
TASKS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder")  # percent
SPEEDS = tuple(f"{length} {unit}" for unit in ("steps/s", "GB") for length in ("1K", "2K", "3K", "4K"))
BASELINE = "softmax"
SPEED = (
    "Forward and backward of the attention alone, allocator tuned for all, relative to softmax in the same interleaved "
    "benchmark (bench/attention.json): softmax's time divided by the method's (above 1 = faster) / peak memory "
    "divided by softmax's. N: tokens. Crossover: the length from which the method is never slower."
)


class Point(NamedTuple):
    """One measurement of a curve: y over x; `peak_bytes` and `ratio` where they were measured."""

    x: float
    y: float
    peak_bytes: float | None = None
    ratio: float | None = None

    def faster(self, base: "Point") -> float:
        """How many times as fast as softmax at the same length."""
        return base.y / self.y if self.ratio is None else self.ratio


Curves = dict[str, list[Point]]  # name -> points by x


def attention(results: Path) -> Curves:
    """Seconds of each attention over N; empty when nothing was measured. Raises UsageError for a broken file."""
    curves: Curves = defaultdict(list)
    path = Path(results) / "bench" / "attention.json"
    for name, values in _points(path, "name", ("N", "seconds"), ("peak_bytes", "ratio")):
        curves[name].append(Point(*values))
    return {name: sorted(curves[name]) for name in sorted(curves)}


def speeds(results: Path, preset: str) -> dict[str, float]:
    """How many times as fast as softmax's a training step is, by the digest of the runs it stands for (the folder of
    their records); empty when nothing was measured. Raises UsageError for a broken file."""
    path = Path(results) / "bench" / f"{tasks_report(preset)}.json"
    return {digest: ratio for digest, (ratio,) in _points(path, "digest", ("ratio",))}


def tasks_report(preset: str) -> str:
    """The name that `bench tasks` writes under."""
    return f"tasks-{preset}"


def _points(path: Path, name: str, numbers: tuple, optional: tuple = ()) -> Iterator[tuple[str, list]]:
    """(name, positive numbers, None for an optional one that is missing) of each point; none where there is no file."""
    if not path.exists():
        return
    try:
        for point in json.loads(path.read_text("utf-8"))["points"]:
            values = [float(point[key]) for key in numbers]
            values += [None if point.get(key) is None else float(point[key]) for key in optional]
            if not all(v is None or (math.isfinite(v) and v > 0) for v in values):
                raise ValueError(f"{point}")
            yield str(point[name]), values
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not usable: {type(error).__name__} {error}") from None


def crossover(curve: Sequence[Point], baseline: Sequence[Point]) -> float | None:
    """The x from which `curve` is never slower than `baseline`, between shared points by straight lines in log-log.
    The first shared x when it is never slower; None when it is slower at the last one."""
    base = {p.x: p for p in baseline}
    gaps = [(math.log(p.x), math.log(p.faster(base[p.x]))) for p in sorted(curve) if p.x in base]
    if not gaps or gaps[-1][1] < 0:
        return None
    last = max((i for i, (_, gap) in enumerate(gaps) if gap < 0), default=None)
    if last is None:
        return math.exp(gaps[0][0])
    (x0, g0), (x1, g1) = gaps[last], gaps[last + 1]
    return math.exp(x0 + (x1 - x0) * g0 / (g0 - g1))


def blocks(results: Path) -> list[Block]:
    """The table of ratios over lengths; nothing when nothing was measured."""
    curves = attention(results)
    if BASELINE not in curves:
        return []
    base = {p.x: p for p in curves[BASELINE]}
    rows = []
    for name, curve in curves.items():
        points = {p.x: p for p in curve}
        cross = crossover(curve, curves[BASELINE]) if name != BASELINE else None
        cells = (_ratios(points.get(n), base[n]) for n in base)
        rows.append((name, *cells, MISSING if cross is None else f"{cross:,.0f}"))
    header = ("attention", *(f"N {n:,.0f}" for n in base), "crossover")
    return [Heading("Time and memory against length"), Text(SPEED), Grid(header, tuple(rows))]


def _ratios(point: Point | None, base: Point) -> str:
    if point is None:
        return MISSING
    memory = f"{point.peak_bytes / base.peak_bytes:.2f}" if point.peak_bytes and base.peak_bytes else MISSING
    return f"{point.faster(base):.2f} / {memory}"


def published() -> list[Block]:
    """The block "Published, not rerun": one table per source, averages computed here."""
    intro = "Accuracy in percent, from the papers; other data, code and sizes: no row compares with one above."
    tables: list[Block] = [Heading("Published, not rerun"), Text(intro)]
    for source in PUBLISHED["accuracy"]:
        averaged = {name: (*row, mean_sd(row)[0]) for name, row in source["rows"].items()}
        tables += _source(source, averaged, (*TASKS, "average"))
    return tables + _source(PUBLISHED["speed"], PUBLISHED["speed"]["rows"], SPEEDS)


def _source(source: dict[str, Any], rows: dict[str, Sequence[float]], header: tuple[str, ...]) -> list[Block]:
    def cell(value, column):
        return f"{value:.1f}" if column.endswith("steps/s") else f"{value:.2f}"

    lines = tuple((name, *map(cell, row, header)) for name, row in rows.items())
    return [Text("{title} ({citation}). {caveat}".format(**source)), Grid(("published", *header), lines)]
