"""Figures of what `variance` measured: errors against features, variance against the condition number. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.figures import style
from lra.figures.style import label_ends
from lra.options import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Left out where there are too many: forms between two that are shown, and forms on whose lines those of their
# independent twin (NAME-iid) lie, which has a closed form.
HIDDEN = ("performer", "performer-centred", "darkformer-proposal", "darkformer-centred-whitened")


def draw(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME-features and, where several condition numbers were measured, NAME-condition; returns the SVGs."""
    groups: dict[str, list[dict]] = {}
    for case in report["cases"]:
        groups.setdefault(case["group"], []).append(case)
    with style.drawing():
        figures = {"features": features([cases[len(cases) // 2] for cases in groups.values()])}
        groups.pop("layers", None)
        if any(len(cases) > 1 for cases in groups.values()):
            figures["condition"] = condition(groups)
    return [style.save(figure, folder / f"{name}-{what}")[0] for what, figure in figures.items()]


def redraw(path: Path, folder: Path, name: str) -> list[Path]:
    """Draw the figures of a report that was written before. Raises UsageError for a file that is none."""
    try:
        return draw(json.loads(path.read_text("utf-8")), folder, name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is not usable: {type(error).__name__} {error}") from None


def selection(case: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The schemes of a case that a figure shows, with their looks: one colour a method, one marker a scheme."""
    shown = case["schemes"]
    if len(shown) > style.SERIES:
        shown = [s for s in shown if s["name"] not in HIDDEN]
    drawn: Counter[str] = Counter()
    looks = []
    for s in shown[: style.SERIES]:
        marker = style.MARKERS[drawn[s["attention"]] % len(style.MARKERS)]
        drawn[s["attention"]] += 1
        looks.append({"color": style.color(s["attention"]), "marker": marker, "label": s["name"]})
    return list(zip(shown, looks))


def _dashed(axes: Axes, points: list[tuple[float, float]], look: dict[str, str]) -> None:
    """The closed form of a scheme."""
    if points:
        axes.plot(*zip(*points), color=look["color"], linestyle="--", linewidth=1)


def features(cases: list[dict[str, Any]]) -> Figure:
    """Errors of kernel and output against M, a row for each case; dashed: the closed form for independent features,
    sqrt(variance / M)."""
    figure, axes = style.subplots(len(cases), 2, width=11, height=0.8 + 3.4 * len(cases), squeeze=False)
    best: dict[str, None] = {}
    for case, row in zip(cases, axes, strict=True):
        schemes = selection(case)
        for place, key, what in zip(row, ("kernel_rms", "error"), ("kernel", "output"), strict=True):
            for s, look in schemes:
                place.plot([p["M"] for p in s["points"]], [p[key] for p in s["points"]], **look)
                form = s["closed_form_variance_log10"]
                if what == "kernel" and form is not None:
                    curve = [(p["M"], math.sqrt(10 ** min(form, 300) / p["M"])) for p in s["points"]]
                    _dashed(place, curve, look)
            labels = {"ylabel": f"relative error of the {what}", "title": case["name"]}
            style.log_axes(place, 2, xlabel="features M", **labels)
        best[min((s for s, _ in schemes), key=lambda s: s["points"][-1]["error"])["name"]] = None
    M = cases[0]["schemes"][0]["points"][-1]["M"]
    style.message(figure, f"the least output error at M {M:,} is that of {style.listed(best)}")
    shown, every = len(selection(cases[0])), len(cases[0]["schemes"])
    more = f"; {shown} of {every} schemes, all of them in the table" if shown < every else ""
    figure.supxlabel(f"dashed: closed form for independent features{more}", fontsize=8)
    for place in axes.flat:
        label_ends(place)
    return figure


def condition(groups: dict[str, list[dict[str, Any]]]) -> Figure:
    """Relative variance of one feature against the condition number, exact per pair; dashed: closed forms."""
    figure, axes = style.grid(len(groups), 4.0, 3.2)
    growth: dict[str, float] = {}  # of the log10 of the variance, the most of any panel
    for (group, cases), place in zip(groups.items(), axes, strict=True):
        at = [case["condition"] for case in cases]
        for s, look in selection(cases[0]):
            name = s["name"]
            rows = [next(other for other in case["schemes"] if other["name"] == name) for case in cases]
            if s["exact_log10"] is not None:
                means = [row["exact_log10"]["weighted_mean"] for row in rows]
                place.plot(at, means, **look)
                growth[name] = max(growth.get(name, -math.inf), means[-1] - means[0])
                forms = [row["closed_form_variance_log10"] for row in rows]
                _dashed(place, [(x, y) for x, y in zip(at, forms, strict=True) if y is not None], look)
        style.log_axes(place, y="linear", xlabel="condition number of Λ", title=group)
    if growth:
        most, *others = sorted(growth, key=growth.__getitem__, reverse=True)
        rest = f"; that of the others at most {_times(growth[others[0]])}" if others else ""
        grows = f"with the condition number the variance of {style.short(most)} grows {_times(growth[most])}"
        style.message(figure, grows + rest)
    figure.supylabel("log10 of the relative variance of one feature", fontsize=8)
    ends = "dashed: closed form, which ends where it ceases to exist; each panel has its own scale"
    figure.supxlabel(ends, fontsize=8)
    for place in axes:
        label_ends(place)
    return figure


def _times(log10: float) -> str:
    return f"{10**log10:,.2g} times" if log10 < 2 else f"10^{log10:.1f} times"
