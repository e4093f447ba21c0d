"""Figures of the records and of bench/attention.json: accuracies, learning curves, the bubble chart, lengths.

Each function draws one figure of RESULTS/figures/ and returns it, or None when there is nothing to draw. The title
of a figure is what it says, computed from what it shows.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lra.figures import style
from lra.figures.style import color, drawing, label_ends, listed, short
from lra.options import PRESETS
from lra.records import measured
from lra.records.cells import Cell, Column, Row, Table, row_name
from lra.records.markup import flat
from lra.records.measured import BASELINE, Curves
from lra.records.significance import compare_all
from lra.records.stats import ALPHA, average, holm, mean_sd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Row]


def draw(results: Path, tables: Sequence[Table], everything: bool = False) -> list[Path]:
    """Write all figures to results/figures/; returns the paths of the SVG files. With `everything` they show all
    methods, else style.SERIES of them."""
    figures, written, lengths = {}, [], measured.attention(results)
    for table in (t for t in tables if t.preset in PRESETS):  # a name of a record becomes no name of a file
        for make in (bubble, accuracy, curves):
            figures[f"{table.preset}-{make.__name__}"] = partial(make, table, shown_rows(table, everything))
    figures["lengths"] = partial(scaling, {name: lengths[name] for name in style.selection(list(lengths), everything)})
    with drawing():
        for name, make in figures.items():
            if figure := make():
                written.append(style.save(figure, Path(results) / "figures" / name)[0])
            else:
                print(f"no {name}: nothing to draw it from")
    return written


def shown_rows(table: Table, everything: bool = False) -> Rows:
    """Rows of methods at their defaults, as many as a figure shows."""
    rows = {row[1]: row for row in table.rows if not row[2]}
    return [rows[name] for name in style.selection(list(rows), everything)]


def _more(table: Table, rows: Rows) -> str:
    """Says that a figure leaves methods out."""
    every = sum(not row[2] for row in table.rows)
    return f" ({len(rows)} of {every} methods; all of them: plot --all)" if len(rows) < every else ""


def panels(table: Table, height: float) -> tuple[Figure, list[tuple[Column, Axes]]]:
    """A figure with one panel per column of the table, at most three beside each other."""
    figure, places = style.grid(len(table.columns), 3.1, height)
    for column, place in zip(table.columns, places, strict=True):
        task, *rest = map(flat, column.parts)
        place.set_title("\n".join([task, *textwrap.wrap(", ".join(rest), 34)[:3]]), fontsize=8)
    return figure, list(zip(table.columns, places))


def accuracy(table: Table, rows: Rows) -> Figure | None:
    """Accuracy per task, best first: a dot per seed, the mean with its 95% interval. A floor is a row of its own,
    and a dashed line through the others."""
    if not rows:
        return None
    figure, places = panels(table, 1.3 + 0.2 * (len(rows) + 2))
    for column, axes in places:
        cells = {row: table.cells.get((row, column)) for row in rows}
        heights = {row: cell.estimate.value for row, cell in cells.items() if cell and cell.ok}
        floors = table.first(column).floors
        names = []
        for y, key in enumerate(sorted([*heights, *floors], key=lambda k: (heights | floors)[k])):
            if key in heights:
                cell = cells[key]
                value, low, high = (100 * x for x in (cell.estimate.value, cell.estimate.low, cell.estimate.high))
                look = {"fmt": style.marker(key[1]), "color": color(key[1]), "markersize": 6, "capsize": 2}
                axes.errorbar(value, y, xerr=[[value - low], [high - value]], **look)
                dots = [100 * a for a in cell.accuracies]
                axes.plot(dots, [y - 0.28] * len(dots), ".", color=color(key[1]), markersize=4, alpha=0.8)
            else:
                axes.axvline(100 * floors[key], color=style.GREY, linestyle="--", linewidth=0.9)
                axes.plot([100 * floors[key]], [y], "|", color=style.GREY, markersize=8, markeredgewidth=2)
            names.append(short(row_name(key)) if key in heights else f"floor: {short(key)}")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(axis="y", visible=False)
    tells = {True: [], False: []}  # columns that tell softmax from constant, by the paired test of the tables
    for (row, column, baseline), comparison in compare_all(table).items():
        if row[1:] == ("constant", ()) and baseline == "softmax":
            tells[comparison.verdict == "below"].append(column.task)
    above, level = (listed(tells[key] or ["no task"]) for key in (True, False))
    averaging = f"softmax is significantly above averaging (constant) on {above}; not on {level}"
    style.message(figure, f"{table.preset}: {averaging}")
    label = "test accuracy, %: seeds, mean, 95% interval; each panel has a scale of its own"
    figure.supxlabel(label + _more(table, rows), fontsize=8)
    return figure


def curves(table: Table, rows: Rows) -> Figure | None:
    """Validation accuracy against step: mean over seeds; softmax and constant with the band of their sd."""
    if not any(e.curve for e in table.entries):
        return None
    figure, places = panels(table, 2.7)
    lines, gaps = {}, {}
    for column, axes in places:
        ends = []
        for row in rows:
            if points := _mean_curve(table.cells.get((row, column))):
                ends.append(points[-1][1])
                steps, means, sds = zip(*points, strict=True)
                if row[1] in ("softmax", "constant"):
                    low, high = ([m + sign * s for m, s in zip(means, sds)] for sign in (-1, 1))
                    axes.fill_between(steps, low, high, color=color(row[1]), alpha=0.18, linewidth=0)
                (lines[short(row_name(row))],) = axes.plot(steps, means, **style.look(row[1]))
        gap = max(ends, default=0.0) - min(ends, default=0.0)
        gaps[f"{gap:.0f} on {column.task}"] = gap
    ranked = listed(sorted(gaps, key=gaps.__getitem__, reverse=True))
    style.message(figure, f"{table.preset}: points between the best and the worst method at the end: {ranked}")
    figure.supxlabel("optimizer step" + _more(table, rows), fontsize=8)
    figure.supylabel("validation accuracy, %: mean over seeds (band: ± sd)", fontsize=8)
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=8)
    return figure


def _mean_curve(cell: Cell | None) -> list[tuple[int, float, float]]:
    """(step, mean, sd) in percent at the steps that every seed has."""
    runs = [dict(e.curve) for e in cell.ok if e.curve] if cell else []
    shared = sorted(set.intersection(*map(set, runs))) if runs else []
    points = [(step, *mean_sd([100 * run[step] for run in runs])) for step in shared]
    return [(step, mean, sd or 0.0) for step, mean, sd in points]


def bubble(table: Table, rows: Rows) -> Figure | None:
    """Average accuracy against speed, the area of a bubble being the peak memory, both relative to softmax."""
    columns = table.averaged or table.columns
    points = {}
    for row in rows:
        if cells := table.whole(row, columns):
            ratios = list(zip(*map(table.efficiency, cells), strict=True))
            if all(map(all, ratios)):  # measured in every column
                points[row[1]] = (*map(statistics.geometric_mean, ratios), average([cell.estimate for cell in cells]))
    if not points:
        return None
    figure, axes = style.subplots(width=7.2, height=4.6)
    for method, (speed, memory, mean) in points.items():
        look, height = {"color": color(method), "linewidth": 1}, [100 * mean.low, 100 * mean.high, 100 * mean.value]
        axes.plot([speed] * 3, height, label=f"{short(method)}, {memory:.2f}×", **look)  # its name leads to the mean
        axes.scatter([speed], height[-1:], s=260 * memory, color=color(method), alpha=0.7, linewidths=0)
    axes.margins(0.15, 0.1)
    speed = "speed relative to softmax (bench tasks; geometric mean over tasks)"
    height = f"test accuracy, %, mean of {len(columns)} task{'s' * (len(columns) > 1)}, 95% interval"
    style.log_axes(axes, y="linear", xlabel=speed, ylabel=height)
    axes.set_title(f"area, ×: peak memory relative to softmax{_more(table, rows)}", fontsize=8)
    style.message(figure, _tradeoff(table, columns, points))
    label_ends(axes)
    return figure


def _tradeoff(table: Table, columns: Sequence[Column], points: dict[str, tuple]) -> str:
    """Which methods are below softmax in the mean of the columns (paired, Holm over the methods), as a sentence."""
    gaps = defaultdict(list)
    for (row, column, name), comparison in compare_all(table).items():
        if name == "softmax" and not row[2] and row[1] in points and row[1] != "constant" and column in columns:
            gaps[row[1]].append(comparison.gap)
    means = {name: average(parts) for name, parts in gaps.items() if len(parts) == len(columns)}
    adjusted = holm([mean.p_value for mean in means.values()])
    below = {name for (name, mean), p in zip(means.items(), adjusted, strict=True) if p < ALPHA and mean.value < 0}
    speeds = {name: points[name][0] for name in means if name not in below}
    text = f"{table.preset}: averaged over tasks, {len(below)} of {len(means)} methods significantly below softmax"
    best = max(speeds, key=speeds.__getitem__, default=None)
    return text + (f"; the fastest of the others, {short(best)}, is {speeds[best]:.2f} times as fast" if best else "")


def scaling(lengths: Curves) -> Figure | None:
    """Time and peak memory of the attention alone against length; a ring where a method overtakes softmax."""
    if not lengths:
        return None
    figure, (times, memory) = style.subplots(1, 2, width=11, height=4.6)
    crossings: dict[str, float] = {}
    for name, curve in lengths.items():
        cross = measured.crossover(curve, lengths.get(BASELINE, [])) if name != BASELINE else None
        label = short(name) + (f", from {cross:,.0f}" if cross else "")
        times.plot(*zip(*((p.x, p.y) for p in curve)), label=label, **style.look(name))
        if peaks := [(p.x, p.peak_bytes / 1e6) for p in curve if p.peak_bytes]:
            memory.plot(*zip(*peaks), label=short(name), **style.look(name))
        if cross:
            crossings[name] = cross
            if cross > curve[0].x:  # a ring on the baseline's curve, a straight line between points in log-log
                xs, ys = (np.log([getattr(p, axis) for p in lengths[BASELINE]]) for axis in ("x", "y"))
                ring = {"markersize": 11, "fillstyle": "none", "markeredgecolor": color(name), "markeredgewidth": 1.8}
                times.plot([cross], [np.exp(np.interp(math.log(cross), xs, ys))], "o", **ring)
    ranked = sorted(crossings, key=crossings.__getitem__)
    ends = [f"{short(n)} from {crossings[n]:,.0f} tokens" for n in dict.fromkeys(ranked[:1] + ranked[-1:])]
    text = f"{len(crossings)} of {sum(name != BASELINE for name in lengths)} methods overtake softmax"
    style.message(figure, f"{text}: {', '.join(ends)}" if ends else text)
    tokens = "tokens N (ring, from: not slower than softmax)"
    style.log_axes(times, 2, xlabel=tokens, ylabel="seconds, forward and backward")
    style.log_axes(memory, 2, xlabel="tokens N", ylabel="peak memory, MB")
    for axes in (times, memory):
        label_ends(axes)
    return figure
