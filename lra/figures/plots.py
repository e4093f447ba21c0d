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
from lra.records.columns import fields
from lra.records.markup import flat
from lra.records.measured import BASELINE, Curves
from lra.records.significance import compare_all
from lra.records.stats import ALPHA, Uncertain, average, holm, mean_sd, over_seeds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Row]


def draw(results: Path, tables: Sequence[Table], everything: bool = False) -> list[Path]:
    """Write all figures to results/figures/; returns the paths of the SVG files. With `everything` they show all
    methods, else style.SERIES of them."""
    figures, written, lengths = {}, [], measured.attention(results)
    for table in (t for t in tables if t.preset in PRESETS):  # a name of a record becomes no name of a file
        own = [groups] * any(e.groups[0] for e in table.entries) + [field] * bool(fields(table))
        for make in (bubble, accuracy, curves, *own):
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


def panels(shown: Sequence[Column], height: float, width: float = 3.1) -> tuple[Figure, list[tuple[Column, Axes]]]:
    """A figure with one panel per column of the table, at most three beside each other."""
    figure, places = style.grid(len(shown), width, height)
    for column, place in zip(shown, places, strict=True):
        task, *rest = map(flat, column.parts)
        place.set_title("\n".join([task, *textwrap.wrap(", ".join(rest), 34)[:3]]), fontsize=8)
    return figure, list(zip(shown, places))


def accuracy(table: Table, rows: Rows) -> Figure | None:
    """Accuracy per task, best first: a dot per seed, the mean with its 95% interval. A floor is a row of its own,
    and a dashed line through the others."""
    if not rows:
        return None
    figure, places = panels(table.columns, 1.3 + 0.2 * (len(rows) + 2))
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
    figure, places = panels(table.columns, 2.7)
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


def groups(table: Table, rows: Rows) -> Figure | None:
    """Accuracy on test examples that are alike, such as those of as many pairs: mean over seeds, 95% interval."""
    names = {e.column: e.groups[0] for e in table.entries if e.groups[0]}
    figure, places = panels([c for c in table.columns if c in names], 3.4, 4.6)
    told = []
    for column, axes in places:
        said = []
        for row in rows:
            cell = table.cells.get((row, column))
            runs = [e.groups[1] for e in cell.ok if e.groups[1]] if cell else []
            values = sorted(set.intersection(*map(set, runs))) if runs else []
            sizes = {value: runs[0][value][1] / column.effect for value in values}
            means = [over_seeds([run[v][0] / run[v][1] for run in runs], sizes[v]) for v in values]
            if means:
                _means(axes, values, means, short(row_name(row)), style.look(row[1]))
                if row[1] in ("softmax", "constant"):
                    said.append(f"{row[1]} {100 * means[0].value:.0f} to {100 * means[-1].value:.0f}%")
        style.log_axes(axes, 2, "linear", xlabel=short(names[column]), ylabel="test accuracy, %")
        label_ends(axes)
        every = [value for e in table.entries if e.column == column for value in e.groups[1]]
        span = f"{min(every)} to {max(every)} {short(names[column])}"
        told.append(f"{column.task}, {span}: {listed(said or ['no baseline'])}")
    style.message(figure, f"{table.preset}: {'; '.join(told)}")
    figure.supxlabel(f"mean over seeds, 95% interval{_more(table, rows)}", fontsize=8)
    return figure


def _means(axes: Axes, xs: Sequence[float], means: Sequence[Uncertain], label: str, look: dict) -> None:
    """A line through means, with their intervals, in percent."""
    ys = [100 * mean.value for mean in means]
    ends = [[100 * (m.value - m.low) for m in means], [100 * (m.high - m.value) for m in means]]
    axes.errorbar(xs, ys, yerr=ends, fmt="none", ecolor=look["color"], elinewidth=0.8, capsize=2, alpha=0.6)
    axes.plot(xs, ys, label=label, **look)


def field(table: Table, rows: Rows) -> Figure | None:
    """Accuracy by receptive field: local with windows of several sizes, beside softmax and constant."""
    found = fields(table)
    figure, places = panels([c for c in table.columns if c in found], 2.9, 3.6)
    said = []
    for column, axes in places:
        cells = found[column]
        _means(axes, list(cells), [cell.estimate for cell in cells.values()], "local", style.look("local"))
        for name in ("softmax", "constant"):
            if (cell := table.cell(name, column)) and cell.ok:
                band = {"color": color(name), "alpha": 0.15, "linewidth": 0}
                axes.axhspan(100 * cell.estimate.low, 100 * cell.estimate.high, **band)
                ys = [100 * cell.estimate.value] * 2
                axes.plot([min(cells), max(cells)], ys, label=name, color=color(name), linestyle="--")
                if name == "softmax":
                    near = [n for n, c in cells.items() if c.estimate.value > cell.estimate.value - 0.01]
                    said.append(f"{column.task} {f'{near[0]:,}' if near else 'none'} of {column.seq_len:,}")
        style.log_axes(axes, 2, "linear", xlabel="receptive field, tokens", ylabel="test accuracy, %")
        label_ends(axes)
    told = listed(said or ["no softmax"])
    style.message(figure, f"{table.preset}: fewest tokens with which local is within a point of softmax: {told}")
    figure.supxlabel("mean over seeds, 95% interval (bands: of softmax and constant)", fontsize=8)
    return figure


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
