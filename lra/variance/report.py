"""Tables of what `variance` measured. No torch."""

from __future__ import annotations

from typing import Any

from lra.records.markup import MISSING, Grid, markdown

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
        sizes = f"B {B}, H {H}, N {N}, D {D}; condition number {case['condition']:.3g}, trace of Λ "
        sizes += f"{case['trace']:.3g}, largest eigenvalue {case['largest']:.3g}"
        forms = "; ".join(f"{label}: {_form(case, key, bound)}" for key, label, bound in FORMS)
        condition = "" if case["gaussian"] else ", if q and k were Gaussian with mean 0 and this Λ"
        lines = [f"### {case['name']}", "", sizes, f"Closed forms{condition}: {forms}", "", case_table(case)]
        notes = sorted({f"{s['name']}: {n}" for s in case["schemes"] for n in s["notes"]})
        parts.append("\n".join(lines + [f"* {note}" for note in notes] + [""] * bool(notes)))
    return "\n".join(parts)


def _form(case: dict[str, Any], key: str, bound: str) -> str:
    log10 = case["closed_form_log10"][key]
    absent = f"does not exist (t up to {case['largest']:.3g}, bound {bound})"
    return absent if log10 is None else power(log10)


def power(log10: float) -> str:
    """10^log10 in three digits."""
    return f"{10**log10:.3g}" if log10 < 300 else f"1e{log10:.0f}"


def case_table(case: dict[str, Any]) -> str:
    """A row for each scheme."""
    first, last = (case["schemes"][0]["points"][i]["M"] for i in (0, -1))
    header = ["scheme", "variance, median", "variance, mean", "closed form", "kernel bias"]
    header += [f"kernel error M {last}", "slope", f"output error M {first}", f"M {last}", "slope"]
    rows = [_row(scheme) for scheme in case["schemes"]]
    return markdown([Grid([*header, f"bias² M {last}", f"variance M {last}"], rows)])


def _row(s: dict[str, Any]) -> list[str]:
    exact, low, high = s["exact_log10"], s["points"][0], s["points"][-1]
    if exact:
        variances = [power(exact[which]) for which in ("median", "weighted_mean")]
    else:
        variances = [f"{high['M'] * high[f'kernel_{which}'] ** 2:.3g} sampled" for which in ("median", "rms")]
    form = s["closed_form_variance_log10"]
    slopes = [f"{x[0]:.2f} ± {x[1]:.2f}" if x else MISSING for x in (s["kernel_slope"], s["error_slope"])]
    return [
        s["name"],
        *variances,
        MISSING if form is None else power(form),
        "{:+.2g} ± {:.1g}".format(*bias(s)),
        f"{high['kernel_rms']:.3g}",
        slopes[0],
        f"{low['error']:.3g}",
        f"{high['error']:.3g} ± {high['error_se']:.1g}",
        slopes[1],
        f"{high['bias_squared']:.2g}" + (f" ± {se:.1g}" if (se := high["bias_squared_se"]) is not None else ""),
        f"{high['variance']:.2g}",
    ]


def bias(scheme: dict[str, Any]) -> list[float]:
    """Mean over M of the kernel's relative bias, every M weighted by its features, and its standard error.

    The draws of different M share a seed: the errors are added as if they were one, which is never too small.
    """
    points = scheme["points"]
    total = sum(p["M"] for p in points)
    return [sum(p["M"] * p[key] for p in points) / total for key in ("kernel_bias", "kernel_bias_se")]
