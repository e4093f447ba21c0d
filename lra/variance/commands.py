"""`variance`: how far every scheme of random features is from exact attention, on synthetic or captured data."""

from __future__ import annotations

import math
import re
import warnings
from argparse import Namespace
from typing import Any

from tqdm import tqdm

from lra.machine import set_threads
from lra.options import UsageError, unknown
from lra.registry import build_attention
from lra.scaling.reports import command_of, write_report
from lra.variance.cases import Case, cases
from lra.variance.measure import PAIRINGS, closed_forms, exact_variance, log_expm1, measure, slope
from lra.variance.report import draw, redraw, variance_tables

IID = {"orthogonal": False}
OPTIMAL = {"proposal": "variance_optimal"}
SCHEMES = {  # name: attention, options; target_norm None is filled in from --target-norm
    "performer-iid": ("performer", IID),
    "performer": ("performer", {}),
    "performer-centred": ("performer", {"align": "centre"}),
    "performer-balanced": ("performer", {"align": "balance"}),
    "performer-balanced-cooled": ("performer", {"align": "balance", "target_norm": None}),
    "darkformer-whitened": ("darkformer", {"init": "whitening"}),
    "darkformer-centred-whitened": ("darkformer", {"init": "whitening", "align": "centre"}),
    "darkformer-proposal-iid": ("darkformer", OPTIMAL | IID),
    "darkformer-proposal": ("darkformer", OPTIMAL),
    "darkformer-balanced-proposal": ("darkformer", OPTIMAL | {"align": "balance"}),
    "optimal": ("optimal", IID),  # resampling from the pool undoes orthogonality anyway
    "optimal-balanced": ("optimal", IID | {"align": "balance"}),
}
ELSEWHERE = ("run", "data", "runs", "results", "threads")  # arguments that do not say what is measured


def variance(args: Namespace) -> None:
    """`variance`: measure, print the tables, write bench/NAME.json and .md and the figures."""
    folder = args.results / "figures"
    if not re.fullmatch(r"variance[\w.-]*", args.name):  # never the files of another measurement
        form = "variance, then letters, digits, . _ or -"
        raise UsageError(f"--name must start with {form}; got {args.name!r}")
    if args.redraw:
        print(*redraw(args.results / "bench" / f"{args.name}.json", folder, args.name), sep="\n")
        return
    features = sorted(map(int, args.features.split(",")))
    names = list(SCHEMES) if args.schemes == "all" else list(dict.fromkeys(args.schemes.split(",")))
    for name in set(names) - set(SCHEMES):
        raise unknown("scheme", name, SCHEMES)
    set_threads(args.threads)
    chosen = cases(args)
    measured = []
    with tqdm(total=len(chosen) * len(names) * len(features), unit="point", disable=None, leave=False) as bar:
        for case in chosen:
            forms = closed_forms(case.eigenvalues_HD)
            logs = {name: None if form is None else form / math.log(10) for name, form in forms.items()}
            facts = {"largest": float(case.eigenvalues_HD.max()), "shape": list(case.q_BHND.shape)}
            schemes = [_scheme(case, name, features, forms, args, bar) for name in names]
            measured.append(case.facts | facts | {"closed_form_log10": logs, "schemes": schemes})
    report = {"draws": args.draws, "target_norm": args.target_norm, "pairings": PAIRINGS, "cases": measured}
    command = command_of(["python", "-m", "lra", "variance"], args, ELSEWHERE, run_of="run")
    text = variance_tables(report, command)
    written = write_report(args.results, args.name, command, report, text)
    print(text, *written, *draw(report, folder, args.name), sep="\n")


def _scheme(case, name, features, forms, args, bar) -> dict[str, Any]:
    """Everything measured of one scheme of a case."""
    attention, options = SCHEMES[name]
    options = {k: args.target_norm if v is None else v for k, v in options.items()}
    points, notes = [], set()
    for M in features:
        module, warned = calibrated(case, attention, M, args.seed, **options)
        notes |= warned
        point = {"M": M, **measure(module, case, args.draws)}
        if not all(math.isfinite(x) for x in point.values() if x is not None):
            where = f"{case.facts['name']}: {name} with {M} features"
            raise UsageError(f"{where} is beyond a double: scale q and k down")
        points.append(point)
        bar.update()
    # Section 3 speaks of independent features, and neither of an aligned Lambda nor of a whitened kernel.
    others = options.get("orthogonal", True) or set(options) - {"orthogonal", "proposal"}
    known = case.facts["gaussian"] and not others
    form = forms["optimal" if options.get("proposal") else "isotropic"] if known else None
    return {
        "name": name,
        "attention": attention,
        "options": options,
        "exact_log10": None if attention == "optimal" else exact_variance(module, case),
        "closed_form_variance_log10": None if form is None else log_expm1(form) / math.log(10),
        "kernel_slope": slope(points, "kernel_rms"),
        "error_slope": slope(points, "error"),
        "notes": sorted(notes),
        "points": points,
    }


def calibrated(case: Case, attention: str, M: int, seed: int, **options: Any) -> tuple[Any, set[str]]:
    """The attention of training, in evaluation mode, calibrated on the case; and what it warned of."""
    _, heads, N, D = case.q_BHND.shape
    shape = {"heads": heads, "head_dim": D, "max_len": N, "seed": seed}
    module = build_attention(attention, **shape, num_features=M, redraw_every=1, **options).eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.calibrate(case.q_BHND, case.k_BHND, case.mask_BN)
    return module, {str(w.message) for w in caught}
