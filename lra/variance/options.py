"""Options of `python -m lra variance`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import at_least


def source_options(add) -> None:
    """Where queries and keys come from."""
    add("--synthetic", action="store_true", help="Gaussian q and k; what is measured when no source is given")
    run = "q and k of each layer of a trained run: its record, or its folder below --runs"
    add("--run", type=Path, dest="run_of", metavar="RUN", help=run)
    add("--tensors", type=Path, help="a safetensors file with q, k (B,H,N,D) and, if any, v and mask (B,N)")
    dim = "head width D (default: synthetic 64); with --run or --tensors it must be theirs"
    add("--dim", type=at_least(1), help=dim)
    conditions = "synthetic: condition numbers of Lambda, comma-separated (default: 1,10,100,1000)"
    add("--condition", help=conditions)
    traces = "synthetic: traces of Lambda, the mean |q|^2 after scaling, comma-separated (default: 1.5)"
    add("--trace", help=traces)
    add("--largest", help="synthetic: largest eigenvalues of Lambda instead of traces, comma-separated")
    kinds = "matched (one covariance, mean 0), skewed (opposite spectra, means apart)"
    add("--kinds", help=f"synthetic: comma-separated, of {kinds} (default: both)")
    add("--shift", type=float, help="skewed: length of the means of q and k, before scaling (default: 3)")
    add("--tokens", type=at_least(2), help="synthetic: tokens of a sequence (default: 256)")
    add("--data", type=Path, default=Path("data"), help="folder of prepared data, for --run")
    add("--runs", type=Path, default=Path("runs"), help="folder of saved weights, for --run")


def measure_options(add) -> None:
    """What is measured, and where it goes."""
    add("--features", default="16,32,64,128,256,512,1024", help="numbers of features M, comma-separated")
    add("--draws", type=at_least(2), default=16, help="independent draws of the projections per point")
    add("--schemes", default="all", help="comma-separated names; a wrong one lists them")
    add("--target-norm", type=float, default=4.0, help="of cooled schemes: mean |q|^2 + |k|^2 after scaling")
    add("--seed", type=at_least(0), default=0, help="of data and projections")
    add("--threads", type=at_least(0), default=0, help="CPU threads; 0 = PyTorch's choice")
    files = "of the files: bench/NAME.json and .md, figures/NAME-features and NAME-condition"
    add("--name", default="variance", help=files)
    add("--results", type=Path, default=Path("results"), help="folder they are written to; records of --run")
