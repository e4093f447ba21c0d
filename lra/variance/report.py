"""Tables and figures of what `variance` measured. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.figures import style
from lra.figures.style import label_ends
from lra.options import UsageError
from lra.records.markup import MISSING, Grid, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
# Left out where there are too many: forms between two that are shown, and forms on whose lines those of their
# independent twin (NAME-iid) lie, which has a closed form.
DASHED = {"linestyle": "--", "linewidth": 1}  # a closed form
HIDDEN = ("performer", "performer-centred", "darkformer-proposal", "darkformer-centred-whitened")


def variance_tables(report: dict[str, Any], command: str) -> str:
    """What was measured and how, then one table for each case."""
    parts = [f"`{command}`\n", NOTES.format(draws=report["draws"])]
    for case in report["cases"]:
        B, H, N, D = case["shape"]
        sizes = f"B {B}, H {H}, N {N}, D {D}; condition number {case['condition']:.3g}, trace of Λ "
        sizes += f"{case['trace']:.3g}, largest eigenvalue {case['largest']:.3g}"
        forms = []
        for key, label, bound in FORMS:
            log10 = case["closed_form_log10"][key]
            absent = f"does not exist (t up to {case['largest']:.3g}, bound {bound})"
            forms.append(f"{label}: {absent if log10 is None else power(log10)}")
        condition = "" if case["gaussian"] else ", if q and k were Gaussian with mean 0 and this Λ"
        closed = f"Closed forms{condition}: {'; '.join(forms)}"
        lines = [f"### {case['name']}", "", sizes, closed, "", case_table(case)]
        notes = sorted({f"{s['name']}: {n}" for s in case["schemes"] for n in s["notes"]})
        parts.append("\n".join(lines + [f"* {note}" for note in notes] + [""] * bool(notes)))
    return "\n".join(parts)


def power(log10: float) -> str:
    """10^log10 in three digits."""
    return f"{10**log10:.3g}" if log10 < 300 else f"1e{log10:.0f}"


def case_table(case: dict[str, Any]) -> str:
    """A row for each scheme."""
    first, last = (case["schemes"][0]["points"][i]["M"] for i in (0, -1))
    header = ["scheme", "variance, median", "variance, mean", "closed form", "kernel bias"]
    header += [f"kernel error M {last}", "slope", f"output error M {first}", f"M {last}", "slope"]
    rows = []
    for s in case["schemes"]:
        exact, low, high = s["exact_log10"], s["points"][0], s["points"][-1]
        if exact:
            variances = [power(exact[which]) for which in ("median", "weighted_mean")]
        else:
            variances = [f"{high['M'] * high[f'kernel_{which}'] ** 2:.3g} sampled" for which in ("median", "rms")]
        form, se = s["closed_form_variance_log10"], high["bias_squared_se"]
        slopes = [f"{x[0]:.2f} ± {x[1]:.2f}" if x else MISSING for x in (s["kernel_slope"], s["error_slope"])]
        cells = [s["name"], *variances, MISSING if form is None else power(form), "{:+.2g} ± {:.1g}".format(*bias(s))]
        cells += [f"{high['kernel_rms']:.3g}", slopes[0], f"{low['error']:.3g}"]
        cells += [f"{high['error']:.3g} ± {high['error_se']:.1g}", slopes[1]]
        cells.append(f"{high['bias_squared']:.2g}" + ("" if se is None else f" ± {se:.1g}"))
        rows.append([*cells, f"{high['variance']:.2g}"])
    return markdown([Grid([*header, f"bias² M {last}", f"variance M {last}"], rows)])


def bias(scheme: dict[str, Any]) -> list[float]:
    """Mean over M of the kernel's relative bias, every M weighted by its features, and its standard error.

    The draws of different M share a seed: the errors are added as if they were one, which is never too small.
    """
    points = scheme["points"]
    total = sum(p["M"] for p in points)
    return [sum(p["M"] * p[key] for p in points) / total for key in ("kernel_bias", "kernel_bias_se")]


# Figures


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
        looks.append((s, {"color": style.color(s["attention"]), "marker": marker, "label": s["name"]}))
    return looks


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
                    place.plot(*zip(*curve), color=look["color"], **DASHED)
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
                forms = zip(at, (row["closed_form_variance_log10"] for row in rows), strict=True)
                if curve := [(x, y) for x, y in forms if y is not None]:
                    place.plot(*zip(*curve), color=look["color"], **DASHED)
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
