"""`bench sweep`: how much of the ideal a sweep reaches on several cores.

Ideal is 1 / J of the time that the same grid takes one job on one core, J the number of jobs and cores. Both
commands are timed whole, start and prediction included.
"""

from __future__ import annotations

import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lra import registry
from lra.bench.base import machine_line, markdown_table, write_report
from lra.machine import cores
from lra.options import UsageError
from tasks.store.prepared import load


def bench(args: Namespace) -> None:
    """`bench sweep`: measure, print and write."""
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("bench sweep holds each sweep to some cores, which only Linux can do")
    jobs = args.jobs or cores()
    if not 2 <= jobs <= cores():
        raise UsageError(f"--jobs must be from 2 to the {cores()} cores of this machine; got {jobs}")
    tasks = registry.choose("task", args.tasks, registry.task_names())
    attentions = registry.choose("attention", args.attentions, registry.attention_names())
    for task in tasks:  # all there, before anything is timed
        load(args.data / task / args.preset)
    words = ["--preset", args.preset, "--tasks", ",".join(tasks), "--attentions", ",".join(attentions)]
    seconds: dict[int, list[float]] = {1: [], jobs: []}
    with tqdm(total=2 * args.rounds, disable=None, unit="sweep") as bar:
        for i in range(args.rounds):
            for j in sorted(seconds, reverse=i % 2 == 1):  # a machine that slows down slows neither more
                seconds[j].append(round(turn(words, j, args.data, args.results), 2))
                bar.update()
    ratios = [one / jobs / together for one, together in zip(seconds[1], seconds[jobs], strict=True)]
    found = {
        "preset": args.preset,
        "cells": len(tasks) * len(attentions),
        "points": [{"jobs": j, "seconds": times} for j, times in seconds.items()],
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(f(ratios), 3) for f in (min, max)],
    }
    command = shlex.join(["python", "-m", "lra", "bench", "sweep", *sys.argv[3:]])
    text = markdown(found, command)
    paths = write_report(args.results, "sweep", command, found, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))


def turn(words: list[str], jobs: int, data: Path, results: Path) -> float:
    """Seconds of one sweep into empty folders, `jobs` jobs of one thread on as many cores. It predicts with the
    calibration of `results`, as a sweep there would."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        calibration = results / "bench" / "cost.json"
        if calibration.exists():
            (folder / "results" / "bench").mkdir(parents=True)
            shutil.copy(calibration, folder / "results" / "bench")
        places = ["--data", str(data), "--results", str(folder / "results"), "--runs", str(folder / "runs")]
        command = [sys.executable, "-m", "lra", "sweep", *words, "--device", "cpu", *places]
        command += ["--jobs", str(jobs), "--threads", "1"]
        allowed = os.sched_getaffinity(0)
        try:
            os.sched_setaffinity(0, sorted(allowed)[:jobs])  # the process inherits it
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                said = process.communicate()[1]
            except KeyboardInterrupt:
                process.terminate()  # not killed: it has to end its cells
                process.communicate()
                raise
            seconds = time.perf_counter() - start
        finally:
            os.sched_setaffinity(0, allowed)
    if process.returncode:
        raise UsageError(f"sweep with {jobs} jobs failed: {(said.strip() or 'no output').splitlines()[-1]}")
    return seconds


def markdown(found: dict[str, Any], command: str) -> str:
    """One table, and the share of the ideal."""
    rounds = len(found["points"][0]["seconds"])
    rows = [
        [str(p["jobs"]), *(f"{s:.1f}" for s in p["seconds"]), f"{statistics.median(p['seconds']):.1f}"]
        for p in found["points"]
    ]
    low, high = found["ratio_range"]
    lines = [
        "# A sweep on several cores",
        "",
        f"`{command}`: {found['cells']} cells of the {found['preset']} preset from empty folders, one job of one "
        "thread on each core; seconds of the whole command, in turns.",
        "",
        *markdown_table(["jobs and cores", *(f"round {i + 1}" for i in range(rounds)), "median"], rows),
        "",
        f"Share of the ideal, 1 / {found['points'][1]['jobs']} of the time on one core: median {found['ratio']:.2f}, "
        f"from {low:.2f} to {high:.2f}.",
    ]
    return "\n".join([*lines, "", machine_line(1), ""])
