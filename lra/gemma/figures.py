"""Figures of the Gemma track: a pure function of its records. The title of a panel is what it says. No torch."""

from __future__ import annotations

import statistics
import textwrap
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lra.figures import style
from lra.figures.style import label_ends
from lra.gemma.rows import FLOORS, Rows, baseline, by_distance, by_setting, grouped, label_of, order, titled, without
from lra.gemma.stats import Record, above, accuracy, gap, recovered, spike_rate, validation
from lra.gemma.table import by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Panel = tuple[str, Sequence["Line2D"]]  # what it says, and the lines whose ends are named
NAME = 58  # characters of a name beside a panel
BASELINES = ("softmax", *FLOORS)


def show(args: Namespace) -> None:
    """`gemma plot`: write DIR/gemma/figures/*.svg and *.png, those of each kind of record, and name them."""
    for kind, records in by_kind(args.results).items():
        shown = [r for r in records if r["result"] or kind == "stability"]  # which marks runs that diverged
        for name in [name for name in PANELS if shown and name.partition("-")[0] == kind]:
            with style.drawing():
                figure = figure_of(name, shown)
            print(*style.save(figure, args.results / "gemma" / "figures" / name), sep="\n")


def features(runs: Sequence[Record]) -> int | None:
    """The number of random features M of a row; None for a method without any."""
    return runs[0]["model"]["attention_config"].get("num_features")


def figure_of(kind: str, records: Sequence[Record]) -> Figure:
    """A panel for each setting, with what it says as title, the setting, and a name at the end of each line."""
    settings = by_setting(records, "lr") if kind == "stability" else by_setting(records)
    heights = [{"anisotropy": 4.2, "recall": 1.4 + 0.22 * len(rows)}.get(kind, 3.4) for rows in settings.values()]
    size = {"width": 10.0, "height": sum(heights), "height_ratios": heights}
    figure, grid = style.subplots(len(settings), 1, squeeze=False, **size)
    for (axes,), (setting, rows) in zip(grid, settings.items(), strict=True):
        sizes = {features(runs) for runs in rows.values()} - {None}
        if len(sizes) == 1:  # then it is said once
            setting, rows = (f"{setting}, M = {min(sizes)}", {without(label, "M="): rows[label] for label in rows})
        says, lines = PANELS[kind](axes, rows)
        axes.set_title(f"{textwrap.fill(says, 100)}\n", fontsize=9, fontweight="bold")
        axes.annotate(setting, (0, 1), (0, 4), "axes fraction", textcoords="offset points", fontsize=7)
        label_ends(axes, lines, 7)
    return figure


def _bars(axes: Axes, at: Sequence[float], points: Sequence[Sequence[float]], look: dict[str, str]) -> Line2D:
    """A line through values with bars; a point is (value, low, high)."""
    spans = [[v - low for v, low, _ in points], [high - v for v, _, high in points]]
    line = axes.errorbar(at, [v for v, *_ in points], spans, capsize=2, **look)[0]
    line.set_label(look["label"])
    return line


def _styles(labels: Iterable[tuple[str, str]]) -> dict[tuple[str, str], dict[str, str]]:
    """How rows are drawn, in order: variants of one method share its colour and marker, and differ in their dashes and,
    where these begin again, in hollow markers."""
    dashes, seen = ("-", "--", ":", "-."), Counter()
    styles = {}
    for label in sorted(labels, key=order):
        again, which = divmod(seen[label[0]], len(dashes))
        seen[label[0]] += 1
        name = "constant: averaging" if label == ("constant", "") else style.short(titled(label), NAME)
        look = {"color": style.color(label[0]), "marker": style.marker(label[0]), "linestyle": dashes[which]}
        styles[label] = look | {"fillstyle": "none" if again else "full", "label": name}
    return styles


def _recovery(rows: Rows) -> str:
    """How many rows lie above the best floor, and what the best of them recovers of exact attention, as a sentence."""
    exact, floor = baseline(rows, "softmax"), baseline(rows, *FLOORS)
    if not exact or not floor:
        return "no exact attention or no floor to compare with"
    label = label_of(rows, floor)
    name = "averaging (constant)" if label[0] == "constant" else titled(label)
    if recovered(exact, floor, exact) is None:
        return f"{name} is not told apart from exact attention: this setting cannot see far attention"
    others = {label: runs for label, runs in rows.items() if label[0] not in BASELINES}
    shares = {label: recovered(exact, floor, runs) for label, runs in others.items()}
    known = {label: share for label, share in shares.items() if share}
    higher = above(floor, [others[label] for label in known])
    better = {label: share.value for (label, share), yes in zip(known.items(), higher, strict=True) if yes}
    if not better:
        return f"none of {len(known)} rows is significantly above {name}"
    best = max(better, key=better.__getitem__)
    way = f"goes {100 * better[best]:.0f}% of the way from {name.partition(' (')[0]} to exact attention"
    shown = style.short(titled(best), 90)
    return f"{len(better)} of {len(known)} rows significantly above {name}; the best, {shown}, {way}"


def finetune(axes: Axes, rows: Rows) -> Panel:
    """Validation accuracy against training tokens, mean over seeds; a vertical bar spans the seeds.

    Of runs that differ in learning rates and warm start alone, those of least validation loss; then softmax, constant
    and the best of the others, style.SERIES in all.
    """

    def loss(label):
        return statistics.fmean(r["result"]["curve"][-1][2] for r in rows[label])

    forms = grouped(sorted(rows, key=order), lambda label: without(label, "lr", "warmstart", "transfer_tokens"))
    best = [min(labels, key=loss) for labels in forms.values()]
    ranked = sorted(best, key=lambda label: (label[0] not in BASELINES, loss(label)))
    shown, lines = {label: rows[label] for label in ranked[: style.SERIES]}, []
    for label, look in _styles(shown).items():
        runs = shown[label]
        values = {t: [100 * x for x in v] for t, v in validation(runs).items() if len(v) == len(runs)}
        points = [(statistics.fmean(v), min(v), max(v)) for v in values.values()]
        lines.append(_bars(axes, list(values), points, look))
    left = f" ({len(shown)} of {len(rows)} rows: the best rate and start of each, the best methods)"
    axes.set(xlabel="training tokens" + left * (len(shown) < len(rows)), ylabel="validation accuracy, %")
    return _recovery(shown), lines


def swap(axes: Axes, rows: Rows) -> Panel:
    """Gap to exact against M, with intervals; averaging, which has no features, is a line with its interval as band."""
    exact = baseline(rows, "softmax")
    series: dict[tuple[str, str], list] = {}
    for label, runs in rows.items():
        if exact and runs != exact:
            lost = gap(exact, runs)
            points = [100 * x for x in (lost.value, lost.low, lost.high)]
            series.setdefault(without(label, "M="), []).append((features(runs), points))
    sizes = sorted({M for points in series.values() for M, _ in points if M})
    ends = [sizes[0] / 1.2, sizes[-1] * 1.2] if sizes else [1, 2]
    lines = []
    for i, (label, look) in enumerate(_styles(series).items()):
        if series[label][0][0] is None:
            value, low, high = series[label][0][1]
            lines += axes.plot(ends, [value, value], **look)
            axes.fill_between(ends, low, high, color=look["color"], alpha=0.2, linewidth=0)
            continue
        at, gaps = zip(*sorted(series[label], key=lambda x: x[0]), strict=True)
        shifted = [M * 2 ** (0.07 * (i - len(series) / 2)) for M in at]  # so that intervals stand side by side
        lines.append(_bars(axes, shifted, gaps, look))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.set(xlabel="random features M", ylabel="gap to exact, points (less is better)")
    return _recovery(rows), lines


def recall(axes: Axes, rows: Rows) -> Panel:
    """Accuracy of every row at every distance, as a map."""
    parts, labels = by_distance(rows), sorted(rows, key=order)
    cells = [[100 * statistics.fmean(map(accuracy, part[label])) for part in parts.values()] for label in labels]
    axes.pcolormesh(cells, cmap="Blues", vmin=0, vmax=130)  # so that ink is readable on every cell
    for i, values in enumerate(cells):
        for j, value in enumerate(values):
            axes.text(j + 0.5, i + 0.5, f"{value:.1f}", ha="center", va="center", fontsize=6)
    axes.invert_yaxis()
    axes.grid(visible=False)
    names = [style.short(titled(label), NAME) for label in labels]
    axes.set_yticks([i + 0.5 for i in range(len(labels))], names, fontsize=6)
    axes.set_xticks([j + 0.5 for j in range(len(parts))], [f"{d:,}" for d in parts])
    axes.set(xlabel="tokens between the two occurrences (numbers: accuracy over the second, %)")
    far = max(parts)
    return f"{far:,} tokens away: {_recovery(parts[far])}", []


def recall_features(axes: Axes, rows: Rows) -> Panel:
    """The panel of swap at the longest distance."""
    far, part = max(by_distance(rows).items())
    says, lines = swap(axes, part)
    return f"{far:,} tokens away: {says}", lines


def stability(axes: Axes, rows: Rows) -> Panel:
    """Accuracy (lines) and loss spikes per 100 steps (numbers) at each learning rate; whose depends least and most."""
    lines, losses = [], {}
    rates = sorted({r["training"]["recipe"]["lr"] for runs in rows.values() for r in runs})
    for label, look in _styles(rows).items():
        by_rate = grouped(rows[label], lambda r: r["training"]["recipe"]["lr"])
        at = [x for x in by_rate if all(r["result"] for r in by_rate[x])]
        values = [100 * statistics.fmean(map(accuracy, by_rate[x])) for x in at]
        if values:
            lines += axes.plot(at, values, **look)
            losses[titled(label)] = max(values) - min(values)
        for x, value in zip(at, values, strict=True):
            if count := spike_rate(by_rate[x]):
                axes.annotate(f"{count:.1f}", (x, value), (0, 4), textcoords="offset points", fontsize=6)
        for x in set(by_rate) - set(at):
            axes.plot([x], [0], color=look["color"], marker="x", linestyle="none")
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:.0e}".replace("e-0", "e-") for rate in rates])
    axes.minorticks_off()
    numbers = "peak learning rate (number at a point: loss spikes per 100 steps; x: diverged)"
    axes.set(xlabel=numbers, ylabel="test accuracy, %")
    if not losses:
        return "every run diverged", lines
    least, most = (pick(losses, key=losses.__getitem__) for pick in (min, max))
    says = f"accuracy depends least on the rate with {style.short(least, NAME)} ({losses[least]:.1f} points)"
    return says + (f", most with {style.short(most, NAME)} ({losses[most]:.1f})" if most != least else ""), lines


def anisotropy(axes: Axes, rows: Rows) -> Panel:
    """Eigenvalues of each layer's first head, as they are and aligned, with the two limits of the theory."""
    ((record,),) = rows.values()
    layers, beyond = record["result"]["layers"], []
    forms = (("spectrum", "softmax", "as they are"), ("aligned_spectrum", "darkformer", "aligned"))
    for key, method, name in forms:
        for i, layer in enumerate(layers):
            values = layer[key][0]
            shade = 0.3 + 0.7 * i / max(1, len(layers) - 1)
            (line,) = axes.plot(range(1, len(values) + 1), values, color=style.color(method), alpha=shade)
        line.set_label(f"{name} (pale: layer {layers[0]['layer']}, full: layer {layers[-1]['layer']})")
        beyond.append(f"{sum(layer[key][0][0] > 0.5 for layer in layers)} {name}")
    limits = ((1 / 2, "--", "above 1/2: no optimal proposal"), (1 / 6, ":", "above 1/6: infinite variance"))
    for limit, dash, name in limits:
        axes.axhline(limit, linestyle=dash, color=style.GREY, label=name)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    moment = "second moment of queries and keys\ntimes the square root of the scale, first head"
    axes.set(xlabel="eigenvalues, largest first", ylabel=moment)
    axes.legend(fontsize=8, loc="upper right")
    return f"layers whose largest eigenvalue is above 1/2: {' and '.join(beyond)}, of {len(layers)}", []


PANELS = {"swap": swap, "finetune": finetune, "stability": stability, "anisotropy": anisotropy}
PANELS |= {"recall": recall, "recall-features": recall_features}
