"""Figures from the records and from results/bench/: learning curves, accuracies, the bubble chart, lengths, errors.

Each function draws one figure of results/figures/ and returns it, or None when there is nothing to draw.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lra.figures.style import GREY, HANDLE, color, dashes, drawing, marker, plain_ticks, save, subplots
from lra.options import PRESETS, UsageError
from lra.records import measured
from lra.records.cells import Cell, Column, Table, build
from lra.records.measured import BASELINE, Curves
from lra.records.record import report_skipped
from lra.records.stats import Estimate, average, mean_sd
from lra.records.table import row_name
from lra.variance.report import features_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 16  # rows of one figure; more cannot be told apart
LONGEST = 28  # characters of a name in a figure


def plot(args: Namespace) -> int:
    """`plot`: every figure there is something for, below the results folder. Exit code 1 as for `table`."""
    skipped: list[str] = []
    for path in draw(args.results, build(args.results, report=skipped.append)):
        print(path)
    for line in skipped:
        report_skipped(line)
    return 1 if skipped else 0


def draw(results: Path, tables: Sequence[Table]) -> list[Path]:
    """Write all figures to results/figures/; returns the paths of the SVG files."""
    folder, written = Path(results) / "figures", []
    with drawing():
        for name, make in _figures(results, tables):
            if figure := make():
                written.append(save(figure, folder / name)[0])
            else:
                print(f"no {name}: nothing to draw it from")
    return written


def _figures(results: Path, tables: Sequence[Table]) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    """Names of the figures and how each is made."""
    lengths = measured.attention(results)
    for table in (t for t in tables if t.preset in PRESETS):  # a name of a record becomes no name of a file
        yield f"{table.preset}-bubble", lambda table=table: bubble(table)
        yield f"{table.preset}-accuracy", lambda table=table: accuracy(table)
        yield f"{table.preset}-curves", lambda table=table: curves(table)
    yield "lengths", lambda: scaling(lengths)
    yield "variance-features", lambda: errors(Path(results) / "bench" / "variance.json")


def default_rows(table: Table) -> list[tuple]:
    """Rows of methods at their defaults, as many as one figure can show."""
    return [row for row in table.rows if not row[2]][:MOST]


def _short(name: str) -> str:
    """A name, cut to what fits into a figure."""
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _more(table: Table) -> str:
    """Says that a figure leaves methods out."""
    rows = sum(not row[2] for row in table.rows)
    return f" (first {MOST} of {rows} methods)" if rows > MOST else ""


def panels(table: Table, height: float) -> tuple[Figure, list[tuple[Column, Axes]]]:
    """A figure with one panel per column of the table, at most three beside each other."""
    across = min(3, len(table.columns))
    down = math.ceil(len(table.columns) / across)
    figure, axes = subplots(down, across, width=0.8 + 3.1 * across, height=height * down, squeeze=False)
    for spare in axes.flat[len(table.columns) :]:
        spare.remove()
    for column, place in zip(table.columns, axes.flat, strict=False):
        task, *rest = column.parts
        place.set_title("\n".join([task, *textwrap.wrap(", ".join(rest), 40)[:2]]), fontsize=8)
    return figure, list(zip(table.columns, axes.flat, strict=False))


def accuracy(table: Table) -> Figure | None:
    """Accuracy per task: a dot per seed, the mean with its 95% interval, floors as dashed lines."""
    rows = default_rows(table)[::-1]
    if not rows:
        return None
    figure, places = panels(table, 1.0 + 0.22 * len(rows))
    for column, axes in places:
        for y, row in enumerate(rows):
            cell = table.cells.get((row, column))
            if cell and cell.ok:
                _seeds(axes, y, row[1], cell)
        for floor in table.first(column).floors.values():
            axes.axvline(100 * floor, color=GREY, linestyle="--", linewidth=0.9)
        axes.set_yticks(range(len(rows)), [_short(row_name(row)) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="y", visible=False)
    label = "test accuracy, %: seeds, mean, 95% interval; dashed: floors of the data"
    figure.supxlabel(label + _more(table), fontsize=8)
    return figure


def _seeds(axes: Axes, y: float, method: str, cell: Cell) -> None:
    estimate = cell.estimate
    bounds = [[100 * (estimate.value - estimate.low)], [100 * (estimate.high - estimate.value)]]
    axes.errorbar(
        100 * estimate.value, y, xerr=bounds, fmt=marker(method), color=color(method), markersize=6, capsize=2
    )
    dots = [100 * a for a in cell.accuracies]
    axes.plot(dots, [y - 0.28] * len(dots), ".", color=color(method), markersize=4, alpha=0.8)


def curves(table: Table) -> Figure | None:
    """Validation accuracy against step: mean over seeds, with the band of their sample standard deviation."""
    rows = default_rows(table)
    if not any(e.curve for e in table.entries):
        return None
    figure, places = panels(table, 2.6)
    shown = {}
    for column, axes in places:
        for row in rows:
            cell = table.cells.get((row, column))
            if points := _mean_curve(cell):
                steps, means, sds = zip(*points, strict=True)
                low, high = ([m + sign * s for m, s in zip(means, sds, strict=True)] for sign in (-1, 1))
                axes.fill_between(steps, low, high, color=color(row[1]), alpha=0.18, linewidth=0)
                (drawn,) = axes.plot(steps, means, marker=marker(row[1]), color=color(row[1]))
                shown.setdefault(_short(row_name(row)), drawn)
    figure.supxlabel("optimizer step" + _more(table), fontsize=8)
    figure.supylabel("validation accuracy, %: mean ± sd over seeds", fontsize=8)
    figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=min(6, len(shown)))
    return figure


def _mean_curve(cell: Cell | None) -> list[tuple[int, float, float]]:
    """(step, mean, sd) in percent at the steps that every seed has."""
    runs = [dict(e.curve) for e in cell.ok if e.curve] if cell else []
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    points = []
    for step in shared:
        mean, sd = mean_sd([100 * run[step] for run in runs])
        points.append((step, mean, sd or 0.0))
    return points


def bubble(table: Table) -> Figure | None:
    """Average accuracy against speed, the area of a bubble being the peak memory, both relative to softmax."""
    points = []
    for row in default_rows(table):
        cells = [table.cells.get((row, column)) for column in table.averaged or table.columns]
        if all(cell and cell.complete for cell in cells):
            speed, memory = map(_geometric, zip(*map(table.efficiency, cells), strict=True))
            if speed and memory:
                points.append((row, speed, memory, average([cell.estimate for cell in cells])))
    if not points:
        return None
    figure, axes = subplots(width=6.4, height=4.2)
    for row, speed, memory, mean in points:
        _bubble(axes, row, speed, memory, mean)
    axes.set_xscale("log")
    axes.margins(0.2)
    plain_ticks(axes)
    columns = len(table.averaged or table.columns)
    axes.set_xlabel("speed relative to softmax (bench tasks; geometric mean over tasks)")
    axes.set_ylabel(f"test accuracy, %, mean of {columns} task{'s' * (columns > 1)}, 95% interval")
    axes.set_title(f"{table.preset}: area = peak memory relative to softmax{_more(table)}", fontsize=9)
    return figure


def _geometric(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v]
    return statistics.geometric_mean(known) if len(known) == len(values) else None


def _bubble(axes: Axes, row: tuple, speed: float, memory: float, mean: Estimate) -> None:
    method, y = row[1], 100 * mean.value
    axes.plot([speed, speed], [100 * mean.low, 100 * mean.high], color=color(method), linewidth=1)
    axes.scatter([speed], [y], s=260 * memory, color=color(method), alpha=0.7, linewidths=0)
    axes.annotate(
        f"{_short(row_name(row))} {memory:.2f}",
        (speed, y),
        xytext=(10, 5),
        textcoords="offset points",
        fontsize=8,
    )


def scaling(lengths: Curves) -> Figure | None:
    """Time and peak memory of the attention alone against length; a ring where a method overtakes softmax."""
    if not lengths:
        return None
    figure, (times, memory) = subplots(1, 2, width=10, height=4.6)
    for name, curve in lengths.items():
        cross = measured.crossover(curve, lengths.get(BASELINE, [])) if name != BASELINE else None
        label = _short(name) + (f", from {cross:,.0f}" if cross else "")
        look = dict(color=color(name), marker=marker(name), linestyle=dashes(name), label=label)
        times.plot([p.x for p in curve], [p.y for p in curve], **look)
        peaks = [(p.x, p.peak_bytes / 1e6) for p in curve if p.peak_bytes]
        if peaks:
            memory.plot(*zip(*peaks, strict=True), **look)
        if cross and cross > curve[0].x:
            _ring(times, cross, lengths[BASELINE], color(name))
    times.set_ylabel("seconds, forward and backward")
    memory.set_ylabel("peak memory, MB")
    for axes in (times, memory):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens N (ring, from: not slower than softmax)" if axes is times else "tokens N")
        plain_ticks(axes)
    handles, names = times.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, handlelength=HANDLE)
    return figure


def _ring(axes: Axes, x: float, baseline: Sequence[measured.Point], shade: str) -> None:
    """Mark x on the baseline's curve, a straight line between points in log-log."""
    left = max((p for p in baseline if p.x <= x), key=lambda p: p.x)
    right = min((p for p in baseline if p.x >= x), key=lambda p: p.x)
    share = math.log(x / left.x) / math.log(right.x / left.x) if right.x > left.x else 0.0
    y = math.exp((1 - share) * math.log(left.y) + share * math.log(right.y))
    axes.plot(
        [x], [y], "o", markersize=11, markerfacecolor="none", markeredgecolor=shade, markeredgewidth=1.8
    )


def errors(path: Path) -> Figure | None:
    """Approximation error against the number of features, from the report of `variance`. Raises UsageError for a
    broken file."""
    if not path.exists():
        return None
    try:
        return features_figure(json.loads(path.read_text()))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is not usable: {type(error).__name__} {error}") from None
