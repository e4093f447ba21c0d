"""Options of `sweep`, `cost` and `doctor`; answers --help without torch."""

from __future__ import annotations

import argparse

from lra.options import PRESET, WRITTEN, Command, at_least, option
from lra.training.options import SOURCE, TRAINING


def size(text: str) -> int:
    """An argparse type: bytes, with K, M, G or T for powers of 1000."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in "KMGT" else (text, "")
    if not number.isascii() or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"must be a number of bytes, such as 6000000000 or 6G; got {text}")
    return int(number) * 1000 ** " KMGT".index(unit or " ")


GRID = (
    option("--tasks", "comma-separated names", default="all"),
    option("--attentions", "comma-separated names", default="all"),
    option("--seeds", "seeds 0..N-1 of each cell", at_least(1, 10**6), 1),
    option("--jobs", "runs at a time, sharing the threads; 0 = one per CPU core, 1 on a GPU", at_least(0), 0),
    option("--memory", "bytes all runs together may hold, such as 6G (default: what is free)", size),
)
WHERE = "here: processes of this command; slurm: an array of jobs; local, debug: the same without Slurm"
EXECUTOR = (
    option("--executor", WHERE, ("here", "slurm", "local", "debug"), "here"),
    option("--slurm", "of every job: partition=gpu, gpus_per_node=1, mem=8G ...", list, [], metavar="KEY=VALUE"),
    option("--job-minutes", "time limit of a job, which is then saved and queued again", at_least(1), 240),
    option("--time-limit", "minutes until runs are saved and the sweep ends with 85 (default: none)", at_least(1)),
)
AGAIN = option("--again", "train anew cells whose source was edited, and keep their old records", bool)
COST = (
    option("--calibrate", "measure this machine, a few minutes: results/bench/cost.json", bool),
    option("--gpu", "predict for a GPU from its data sheet: A100, H100, L4 or RTX4090"),
)

COMMANDS = {
    "sweep": Command("lra.scaling.sweep:sweep", (*GRID, *EXECUTOR, PRESET, *SOURCE, AGAIN, *TRAINING, *WRITTEN)),
    "cost": Command("lra.scaling.cost:cost", (*GRID, PRESET, *COST, *TRAINING, *WRITTEN)),
    "doctor": Command("lra.scaling.doctor:doctor"),
}
