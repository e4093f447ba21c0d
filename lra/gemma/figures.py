"""Figures of the Gemma track: a pure function of its records. No torch."""

from __future__ import annotations

import statistics
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lra.figures.style import HANDLE, color, drawing, marker, save, subplots
from lra.gemma.rows import baseline, features, grouped, order, row_of, setting_of, titled, without
from lra.gemma.stats import Record, accuracy, gap, spikes
from lra.gemma.table import by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def show(args: Namespace) -> None:
    """`gemma plot`: write DIR/gemma/figures/*.svg and *.png, and name them."""
    for path in draw(args.results):
        print(path)


def draw(results: Path) -> list[Path]:
    """One figure per kind of record that there is."""
    makers = {"swap": swap, "finetune": finetune, "stability": stability, "anisotropy": anisotropy}
    written = []
    for kind, records in by_kind(results).items():
        with drawing():
            figure = makers[kind](records)
        written += save(figure, results / "gemma" / "figures" / kind)
    return written


def _panels(
    records: Sequence[Record], name: Callable = row_of, height: float = 3.2
) -> tuple[Figure, list[tuple[Axes, dict]]]:
    """A panel for each setting, with its records by row; `name(record, those of the setting)` is a row's."""
    settings = grouped(records, setting_of)
    figure, grid = subplots(len(settings), 1, width=9.0, height=height * len(settings), squeeze=False)
    panels = []
    for (axes,), (setting, runs) in zip(grid, settings.items(), strict=True):
        axes.set_title(setting, fontsize=7)
        panels.append((axes, grouped(runs, lambda r, runs=runs: name(r, runs))))
    return figure, panels


def _legend(axes: Axes) -> None:
    """Beside the panel, where it hides nothing."""
    axes.legend(fontsize=7, handlelength=HANDLE, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _styles(labels: Sequence[tuple[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """How rows are drawn, in order: variants of one method share its colour and marker, and differ in their dashes and,
    where these begin again, in hollow markers."""
    dashes, seen = ("-", "--", ":", "-."), Counter()
    styles = {}
    for label in sorted(labels, key=order):
        again, which = divmod(seen[label[0]], len(dashes))
        seen[label[0]] += 1
        styles[label] = {
            "color": color(label[0]),
            "marker": marker(label[0]),
            "linestyle": dashes[which],
            "fillstyle": "none" if again else "full",
            "label": textwrap.fill(titled(label), 48, subsequent_indent="  "),
        }
    return styles


def finetune(records: Sequence[Record]) -> Figure:
    """Validation accuracy against training tokens, mean over seeds; a vertical bar spans the seeds."""
    figure, panels = _panels([r for r in records if r["result"]])
    for one, rows in panels:
        for label, style in _styles(list(rows)).items():
            per_step = rows[label][0]["training"]["recipe"]["batch"] * rows[label][0]["task"]["seq_len"]
            curves = [{c[0]: 100 * c[3] / c[4] for c in r["result"]["curve"]} for r in rows[label]]
            steps = sorted(set.intersection(*map(set, curves)))
            middle = [statistics.fmean(c[s] for c in curves) for s in steps]
            low, high = ([abs(m - f(c[s] for c in curves)) for m, s in zip(middle, steps, strict=True)]
                         for f in (min, max))  # fmt: skip
            one.errorbar([s * per_step for s in steps], middle, [low, high], **style)
        one.set(xlabel="training tokens", ylabel="validation accuracy, %")
        _legend(one)
    return figure


def swap(records: Sequence[Record]) -> Figure:
    """Gap to exact against M, with intervals; methods without features are horizontal lines."""
    figure, panels = _panels(records)
    for one, rows in panels:
        exact = baseline(rows, "softmax")
        lines: dict[tuple[str, str], list] = {}
        for label, found in rows.items():
            if exact and found != exact:
                lines.setdefault(without(label, "M="), []).append((features(found[0]), gap(exact, found)))
        for label, style in _styles(list(lines)).items():
            if lines[label][0][0] is None:
                one.axhline(100 * lines[label][0][1].value, **style | {"marker": ""})
                continue
            at, gaps = zip(*sorted(lines[label], key=lambda x: x[0]), strict=True)
            values = [100 * g.value for g in gaps]
            spans = [[100 * (g.value - g.low) for g in gaps], [100 * (g.high - g.value) for g in gaps]]
            one.errorbar(at, values, spans, capsize=2, **style)
        one.set_xscale("log", base=2)
        one.xaxis.set_major_formatter("{x:g}")
        one.set(xlabel="random features M", ylabel="gap to exact, points")
        _legend(one)
    return figure


def stability(records: Sequence[Record]) -> Figure:
    """Accuracy (lines) and loss spikes per 100 steps (bars' heights written out) at each learning rate."""
    figure, panels = _panels(records, lambda r, among: without(row_of(r, among), "lr"))
    for one, rows in panels:
        for label, style in _styles(list(rows)).items():
            found = rows[label]
            rates = grouped(found, lambda r: r["training"]["recipe"]["lr"])
            at = [x for x in rates if all(r["result"] for r in rates[x])]
            values = [100 * statistics.fmean(map(accuracy, rates[x])) for x in at]
            one.plot(at, values, **style)
            for x, value in zip(at, values, strict=True):
                losses = [r["training"]["losses"] for r in rates[x]]
                if count := 100 * sum(map(spikes, losses)) / max(1, sum(map(len, losses))):
                    one.annotate(f"{count:.1f}", (x, value), (0, 4), textcoords="offset points", fontsize=6)
            for x in set(rates) - set(at):
                one.plot([x], [0], color=style["color"], marker="x", linestyle="none")
        one.set_xscale("log")
        one.xaxis.set_major_formatter("{x:g}")
        one.set(
            xlabel="peak learning rate (number: spikes per 100 steps; x: diverged)", ylabel="test accuracy, %"
        )
        _legend(one)
    return figure


def anisotropy(records: Sequence[Record]) -> Figure:
    """Eigenvalues of each layer's first head, as they are and aligned, with the two limits of the theory."""
    figure, panels = _panels(records, height=4.0)
    for one, rows in panels:
        ((record,),) = rows.values()
        layers = record["result"]["layers"]
        for i, layer in enumerate(layers):
            shade = 0.3 + 0.7 * i / max(1, len(layers) - 1)
            for key, method in (("spectrum", "softmax"), ("aligned_spectrum", "darkformer")):
                values = layer[key][0]
                named = (
                    {"spectrum": "as they are", "aligned_spectrum": "aligned"}[key]
                    if i == len(layers) - 1
                    else None
                )
                one.plot(range(1, len(values) + 1), values, color=color(method), alpha=shade, label=named)
        for limit, dash, name in (
            (1 / 2, "--", "1/2: beyond, no optimal proposal"),
            (1 / 6, ":", "1/6: beyond, infinite variance"),
        ):
            one.axhline(limit, linestyle=dash, color=color("constant"), label=name)
        one.set_yscale("log")
        one.yaxis.set_major_formatter("{x:g}")
        one.set(xlabel="eigenvalue", ylabel="second moment of q~ and k~, first head")
        _legend(one)
    return figure
