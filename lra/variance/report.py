"""Tables and figures of what `variance` measured. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.figures.style import MARKERS, color, drawing, plain_ticks, save, subplots
from lra.records.markup import Grid, markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "–"
ABSENT = "does not exist"
FORMS = (
    ("isotropic", "E[Z²]/E[κ²], w ~ N(0, I)", "1/6"),
    ("optimal", "E[Z²]/E[κ²], w ~ N(0, Σ*)", "1/2"),
    ("no_sampling", "E[κ²]", "1/2"),
)
NOTES = """\
Relative variance of one feature: exact for each pair of a query and a key where w is Gaussian and independent
(median over pairs; mean weighted by κ², which on this finite sample of pairs is what the closed form is of a
population), sampled elsewhere. Orthogonal schemes: the exact column is that of independent draws. Schemes are
calibrated on the very tokens they are measured on, as in training: with few tokens that flatters them.
Kernel and output: {draws} draws of the projections; "bias" is the mean of estimate/kernel - 1 over pairs, draws
and M, with its standard error; errors are relative root mean squares. Isotropic features are heavy-tailed: with
large t a sample of {draws} draws misses the rare large ones and its variance, error and standard error are too
small, and its mean, too: a bias of a few such standard errors is no evidence that a scheme is biased.
The kernel column speaks of the kernel that a scheme estimates; whitening and cooling estimate another one than
exp(s q.k), and that difference is in the bias² of the output. Slopes: d log error / d log M; -1/2 for a mean of
independent terms.
"""


def variance_tables(report: dict[str, Any], command: str) -> str:
    """What was measured and how, then one table for each case."""
    parts = [f"`{command}`\n", NOTES.format(draws=report["draws"])]
    for case in report["cases"]:
        B, H, N, D = case["shape"]
        lines = [f"### {case['name']}", ""]
        lines.append(
            f"B {B}, H {H}, N {N}, D {D}; condition number {case['condition']:.3g}, trace of Λ {case['trace']:.3g}, "
            f"largest eigenvalue {case['largest']:.3g}"
        )
        forms = "; ".join(f"{label}: {_form(case, key, bound)}" for key, label, bound in FORMS)
        condition = "" if case["gaussian"] else ", if q and k were Gaussian with mean 0 and this Λ"
        lines += [f"Closed forms{condition}: {forms}", "", case_table(case)]
        notes = sorted({f"{s['name']}: {n}" for s in case["schemes"] for n in s["notes"]})
        parts.append("\n".join(lines + [f"* {note}" for note in notes] + [""] * bool(notes)))
    return "\n".join(parts)


def _form(case: dict[str, Any], key: str, bound: str) -> str:
    log10 = case["closed_form_log10"][key]
    return power(log10) if log10 is not None else f"{ABSENT} (t up to {case['largest']:.3g}, bound {bound})"


def power(log10: float) -> str:
    """10^log10 in three digits."""
    return f"{10**log10:.3g}" if log10 < 300 else f"1e{log10:.0f}"


def case_table(case: dict[str, Any]) -> str:
    """A row for each scheme."""
    first, last = (case["schemes"][0]["points"][i]["M"] for i in (0, -1))
    header = (
        "scheme", "variance, median", "variance, mean", "closed form", "kernel bias", f"kernel error M {last}",
        "slope", f"output error M {first}", f"M {last}", "slope", f"bias² M {last}", f"variance M {last}",
    )  # fmt: skip
    rows = []
    for s in case["schemes"]:
        exact, low, high = s["exact_log10"], s["points"][0], s["points"][-1]
        sampled = f"{high['M'] * high['kernel_median'] ** 2:.3g} sampled"
        mean, se = bias(s)
        row = [
            s["name"],
            power(exact["median"]) if exact else sampled,
            power(exact["weighted_mean"]) if exact else f"{high['M'] * high['kernel_rms'] ** 2:.3g} sampled",
            MISSING if s["closed_form_variance_log10"] is None else power(s["closed_form_variance_log10"]),
            f"{mean:+.2g} ± {se:.1g}",
            f"{high['kernel_rms']:.3g}",
            _slope(s["kernel_slope"]),
            f"{low['error']:.3g}",
            f"{high['error']:.3g} ± {high['error_se']:.1g}",
            _slope(s["error_slope"]),
            _with_error(high["bias_squared"], high["bias_squared_se"]),
            f"{high['variance']:.2g}",
        ]
        rows.append(row)
    return markdown([Grid(header, rows)])


def bias(scheme: dict[str, Any]) -> tuple[float, float]:
    """Mean over M of the kernel's relative bias, every M weighted by its features, and its standard error.

    The draws of different M share a seed: the errors are added as if they were one, which is never too small.
    """
    total = sum(p["M"] for p in scheme["points"])
    return tuple(
        sum(p["M"] * p[key] for p in scheme["points"]) / total for key in ("kernel_bias", "kernel_bias_se")
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.2g}" if error is None else f"{value:.2g} ± {error:.1g}"


def _slope(fitted: Sequence[float] | None) -> str:
    return MISSING if fitted is None else f"{fitted[0]:.2f} ± {fitted[1]:.2f}"


def shown(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The case in the middle of each group: what the figure over M shows, and the points of the file."""
    groups: dict[str, list] = {}
    for case in cases:
        groups.setdefault(case["group"], []).append(case)
    return [group[len(group) // 2] for group in groups.values()]


def draw(report: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write NAME-features and, where several condition numbers were measured, NAME-condition; returns the SVGs."""
    with drawing():
        written = [save(features_figure(report), folder / f"{name}-features")[0]]
        if any(len(group) > 1 for group in _conditions(report).values()):
            written.append(save(condition_figure(report), folder / f"{name}-condition")[0])
    return written


def features_figure(report: dict[str, Any]) -> Figure:
    """Errors of kernel and output against M, for the case in the middle of each group; dashed: the closed form of
    section 3 over M."""
    groups: dict[str, list] = {}
    for case in report["cases"]:
        groups.setdefault(case["group"], []).append(case)
    rows = [group[len(group) // 2] for group in groups.values()]
    figure, axes = subplots(len(rows), 2, width=10, height=0.8 + 3.2 * len(rows), squeeze=False)
    for case, (kernel, output) in zip(rows, axes, strict=True):
        for s, look in zip(case["schemes"], _looks(case), strict=True):
            M = [p["M"] for p in s["points"]]
            kernel.plot(M, [p["kernel_rms"] for p in s["points"]], **look)
            output.plot(M, [p["error"] for p in s["points"]], **look)
            if (form := s["closed_form_variance_log10"]) is not None:
                curve = [math.sqrt(10 ** min(form, 300) / m) for m in M]
                kernel.plot(M, curve, color=look["color"], linestyle="--", linewidth=1)
        for place, what in (
            (kernel, "relative error of the kernel"),
            (output, "relative error of the output"),
        ):
            place.set_xscale("log", base=2)
            place.set(yscale="log", xlabel="features M", ylabel=what, title=case["name"])
            plain_ticks(place)
    _legend(figure, axes[0][0], "one line per scheme; dashed: closed form of independent features")
    return figure


def _looks(case: dict[str, Any]) -> list[dict[str, str]]:
    """The schemes of a method share its colour and differ in their markers."""
    seen: Counter[str] = Counter()
    looks = []
    for s in case["schemes"]:
        mark = MARKERS[seen[s["attention"]] % len(MARKERS)]
        seen[s["attention"]] += 1
        looks.append({"color": color(s["attention"]), "marker": mark, "label": s["name"]})
    return looks


def _conditions(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list] = {}
    for case in report["cases"]:
        if case["group"] != "layers":
            groups.setdefault(case["group"], []).append(case)
    return groups


def condition_figure(report: dict[str, Any]) -> Figure:
    """Relative variance of one feature against the condition number, exact per pair; dashed: closed forms."""
    groups = _conditions(report)
    figure, axes = subplots(1, len(groups), width=2 + 4 * len(groups), height=4, squeeze=False, sharey=True)
    for (group, cases), place in zip(groups.items(), axes[0], strict=True):
        for i, (s, look) in enumerate(zip(cases[0]["schemes"], _looks(cases[0]), strict=True)):
            if s["exact_log10"] is None:
                continue
            found = [(c["condition"], c["schemes"][i]) for c in cases]
            points = [(x, f["exact_log10"]["weighted_mean"]) for x, f in found]
            place.plot(*zip(*points, strict=True), **look)
            forms = [(x, f["closed_form_variance_log10"]) for x, f in found]
            known = [(x, v) for x, v in forms if v is not None]
            if known:
                place.plot(*zip(*known, strict=True), color=look["color"], linestyle="--", linewidth=1)
        place.set(xscale="log", xlabel="condition number of Λ", title=group)
        plain_ticks(place)
    axes[0][0].set_ylabel("log10 of the relative variance of one feature")
    _legend(figure, axes[0][0], "a dashed line ends where the closed form ceases to exist")
    return figure


def _legend(figure: Figure, axes: Axes, title: str) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=8, title=title)
