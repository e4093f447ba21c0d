"""Options of `variance`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import DATA, RESULTS, RUNS, THREADS, TRUST, Command, at_least, numbers, option, written

SCALES = numbers(float, 1e-6, True)
SYNTHETIC = (
    option("--synthetic", "Gaussian q and k; what is measured when no source is given", bool),
    option("--dim", "synthetic: head width D (default: 64)", at_least(1)),
    option("--condition", "synthetic: condition numbers of Lambda (default: 1,10,100,1000)", numbers(float, 1, True)),
    option("--trace", "synthetic: traces of Lambda, mean |q|^2 after scaling, comma-separated (default: 1.5)", SCALES),
    option("--largest", "synthetic: largest eigenvalues of Lambda instead of traces, comma-separated", SCALES),
    option("--kinds", "synthetic: matched (one covariance), skewed (opposite spectra, means apart); default: both"),
    option("--shift", "skewed: length of the means of q and k, before scaling (default: 3)", numbers(float, 0)),
    option("--tokens", "synthetic: tokens of a sequence (default: 256)", at_least(2)),
)
RUN = "q and k of a trained run: its record, or its folder below --runs"
SOURCE = (
    option("--run", RUN, Path, dest="run_of", metavar="RUN"),
    option("--tensors", "a safetensors file with q, k (B,H,N,D) and, if any, v and mask (B,N)", Path),
    DATA,
    RUNS,
)
MEASURE = (
    option("--features", "numbers of features M, comma-separated", numbers(int, 1, True), "16,32,64,128,256,512,1024"),
    option("--draws", "independent draws of the projections per point", at_least(2), 16),
    option("--schemes", "comma-separated names; a wrong one lists them", default="all"),
    option("--target-norm", "of cooled schemes: mean |q|^2 + |k|^2 after scaling", numbers(float, 1e-12), 4.0),
    option("--seed", "of data and projections", at_least(0, 10**6), 0),
    THREADS,
    option("--name", "of the files bench/NAME.*, figures/NAME-*", default="variance"),
    option("--redraw", "measure nothing: draw the figures of bench/NAME.json again", bool),
    written(RESULTS),
)
COMMANDS = {"variance": Command("lra.variance.commands:variance", (*SYNTHETIC, *SOURCE, *MEASURE, TRUST))}
