"""Figures of what `variance` measured: errors against features, variance against the condition number. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.figures import style
from lra.figures.labels import label_ends
from lra.options import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEWER = ("centred", "cooled")  # forms that a figure leaves out, in this order, until SERIES are left


def draw(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME-features and, where several condition numbers were measured, NAME-condition; returns the SVGs."""
    groups: dict[str, list[dict]] = {}
    for case in report["cases"]:
        groups.setdefault(case["group"], []).append(case)
    conditions = {group: cases for group, cases in groups.items() if group != "layers"}
    with style.drawing():
        middles = [cases[len(cases) // 2] for cases in groups.values()]
        written = [style.save(features(middles), folder / f"{name}-features")[0]]
        if any(len(cases) > 1 for cases in conditions.values()):
            written.append(style.save(condition(conditions), folder / f"{name}-condition")[0])
    return written


def redraw(path: Path, folder: Path, name: str) -> list[Path]:
    """Draw the figures of a report that was written before. Raises UsageError for a file that is none."""
    try:
        return draw(json.loads(path.read_text()), folder, name)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} is not usable: {type(error).__name__} {error}") from None


def selection(case: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """The schemes of a case that a figure shows, with their looks: one colour a method, one marker a scheme.

    Where there are too many, a scheme whose independent twin (NAME-iid) is there goes first: the twin has a closed
    form, and the two lines lie on each other.
    """
    shown = case["schemes"]
    if len(shown) > style.SERIES:
        names = {s["name"] for s in shown}
        shown = [s for s in shown if f"{s['name']}-iid" not in names]
    for form in FEWER:
        if len(shown) > style.SERIES:
            shown = [s for s in shown if form not in s["name"].split("-")]
    seen: Counter[str] = Counter()
    looks = []
    for s in shown[: style.SERIES]:
        marker = style.MARKERS[seen[s["attention"]] % len(style.MARKERS)]
        seen[s["attention"]] += 1
        looks.append({"color": style.color(s["attention"]), "marker": marker, "label": s["name"]})
    return list(zip(shown, looks))


def features(cases: list[dict[str, Any]]) -> Figure:
    """Errors of kernel and output against M, a row for each case; dashed: the closed form for independent features,
    sqrt(variance / M)."""
    figure, axes = style.subplots(len(cases), 2, width=11, height=0.8 + 3.4 * len(cases), squeeze=False)
    best: dict[str, None] = {}
    for case, (kernel, output) in zip(cases, axes, strict=True):
        schemes = selection(case)
        for s, look in schemes:
            M = [p["M"] for p in s["points"]]
            kernel.plot(M, [p["kernel_rms"] for p in s["points"]], **look)
            output.plot(M, [p["error"] for p in s["points"]], **look)
        for s, look in schemes:
            if (form := s["closed_form_variance_log10"]) is not None:
                curve = [math.sqrt(10 ** min(form, 300) / p["M"]) for p in s["points"]]
                kernel.plot(
                    [p["M"] for p in s["points"]], curve, color=look["color"], linestyle="--", linewidth=1
                )
        least = min((s for s, _ in schemes), key=lambda s: s["points"][-1]["error"])
        best[least["name"]] = None
        for place, what in (
            (kernel, "relative error of the kernel"),
            (output, "relative error of the output"),
        ):
            place.set_xscale("log", base=2)
            place.set(yscale="log", xlabel="features M", ylabel=what, title=case["name"])
            style.plain_ticks(place)
    M = cases[0]["schemes"][0]["points"][-1]["M"]
    style.message(figure, f"the least output error at M {M:,} is that of {style.listed(best)}")
    figure.supxlabel(f"dashed: closed form for independent features{_more(cases[0])}", fontsize=8)
    for case, row in zip(cases, axes, strict=True):
        for place in row:
            label_ends(place, place.lines[: len(selection(case))])
    return figure


def condition(groups: dict[str, list[dict[str, Any]]]) -> Figure:
    """Relative variance of one feature against the condition number, exact per pair; dashed: closed forms."""
    figure, axes = style.grid(len(groups), 4.0, 3.2)
    growth: dict[str, list[float]] = {}
    for (group, cases), place in zip(groups.items(), axes, strict=True):
        for s, look in selection(cases[0]):
            if s["exact_log10"] is not None:
                every = [(c["condition"], _scheme(c, s["name"])) for c in cases]
                means = [x["exact_log10"]["weighted_mean"] for _, x in every]
                place.plot([at for at, _ in every], means, **look)
                growth.setdefault(s["name"], []).append(means[-1] - means[0])
        shown = list(place.lines)
        for line in shown:
            forms = [
                (c["condition"], _scheme(c, line.get_label())["closed_form_variance_log10"]) for c in cases
            ]
            if known := [(at, form) for at, form in forms if form is not None]:
                place.plot(*zip(*known), color=line.get_color(), linestyle="--", linewidth=1)
        place.set(xscale="log", xlabel="condition number of Λ", title=group)
        style.plain_ticks(place)
    figure.supylabel("log10 of the relative variance of one feature", fontsize=8)
    figure.supxlabel("dashed: closed form, which ends where it ceases to exist; each panel has its own scale",
                     fontsize=8)  # fmt: skip
    style.message(figure, _growing(growth))
    for place in axes:
        label_ends(place, [line for line in place.lines if not line.get_label().startswith("_")])
    return figure


def _scheme(case: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in case["schemes"] if s["name"] == name)


def _growing(growth: dict[str, list[float]]) -> str:
    """Which scheme's variance grows most over the condition numbers, in any panel, as a sentence."""
    most = {name: max(steps) for name, steps in growth.items()}
    name = max(most, key=most.__getitem__)
    others = [value for other, value in most.items() if other != name]
    rest = f"; that of the others at most {_times(max(others))}" if others else ""
    return f"with the condition number the variance of {style.short(name)} grows {_times(most[name])}{rest}"


def _times(log10: float) -> str:
    return f"{10**log10:,.2g} times" if log10 < 2 else f"10^{log10:.1f} times"


def _more(case: dict[str, Any]) -> str:
    """Says that a figure leaves schemes out."""
    shown, every = len(selection(case)), len(case["schemes"])
    return f"; {shown} of {every} schemes, all of them in the table" if shown < every else ""
