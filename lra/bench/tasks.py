"""`bench tasks`: the training step of every attention on every task, which the speed column of tables is made of.

Runs share a machine with others, so their clocks say little; here all attentions take the same batches in turns.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lra import registry
from lra.bench.base import machine_line, markdown_table, write_report
from lra.bench.peers import BASELINE, contenders
from lra.machine import pick_device, set_threads, synchronize
from lra.records.measured import tasks_report
from lra.training import config
from lra.training.trainer import Trainer, Where
from tasks.store.prepared import Prepared, load


def bench(args: Namespace) -> None:
    """`bench tasks`: measure, print and write."""
    set_threads(args.threads)
    tasks = registry.choose("task", args.tasks, registry.task_names())
    names = contenders(args.attentions, registry.attention_names())
    # All there, before anything is timed.
    prepared = {task: load(args.data / task / args.preset) for task in tasks}
    where = Where(pick_device(args.device), args.precision)
    points: list[dict[str, Any]] = []
    with tqdm(total=len(tasks) * len(names) * (1 + args.rounds), disable=None, unit="step") as bar:
        for task, data in prepared.items():
            bar.set_description(task)
            points += measure(task, args.preset, names, data, where, args.rounds, bar.update)
    command = shlex.join(["python", "-m", "lra", "bench", "tasks", *sys.argv[3:]])
    text = markdown(points, command, args)
    paths = write_report(args.results, tasks_report(args.preset), command, {"points": points}, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))


def measure(
    task: str,
    preset: str,
    names: Sequence[str],
    data: Prepared,
    where: Where,
    rounds: int,
    done: Callable[[], Any],
) -> list[dict[str, Any]]:
    """One point for each attention at its defaults: all take step k of their runs (seed 0: the same batch) in round
    k, the first not counted. `ratio` is the median over rounds of softmax's time by the attention's, `low` and `high`
    its quartiles, `seconds` the median of a step, `digest` that of the runs it stands for."""
    runs = {name: config.resolve(task, preset, name, 0, data.manifest, {}) for name in names}
    trainers = {name: Trainer(run, data, where) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in range(1 + rounds):
        for name, trainer in trainers.items():
            synchronize(where.device)
            start = time.perf_counter()
            trainer.step(step)
            synchronize(where.device)
            times[name].append(time.perf_counter() - start)
            done()
    points = []
    for name, run in runs.items():
        ratios = [s / t for s, t in zip(times[BASELINE][1:], times[name][1:], strict=True)]
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        seconds = statistics.median(times[name][1:])
        points.append(
            {"task": task, "name": name, "digest": run.digest[:16], "seconds": round(seconds, 6),
             "ratio": round(middle, 4), "low": round(low, 4), "high": round(high, 4)}
        )  # fmt: skip
    return points


def markdown(points: list[dict[str, Any]], command: str, args: Namespace) -> str:
    """One table: milliseconds with ratios."""
    by = {(p["name"], p["task"]): p for p in points}
    tasks = list(dict.fromkeys(p["task"] for p in points))
    rows = [[n, *(_cell(by[n, t]) for t in tasks)] for n in dict.fromkeys(p["name"] for p in points)]
    lines = [
        f"# A training step of the {args.preset} preset",
        "",
        f"`{command}`: the preset's own encoder, batch and data, loading included; {args.precision}. "
        f"Median of {args.rounds} interleaved rounds.",
        "",
        "Milliseconds, and in brackets how many times as fast as with softmax in the same round: median [quartiles].",
        "",
        *markdown_table(["attention", *tasks], rows),
    ]
    return "\n".join([*lines, "", machine_line(torch.get_num_threads()), ""])


def _cell(p: dict[str, Any]) -> str:
    return f"{1e3 * p['seconds']:,.1f} ({p['ratio']:.2f} [{p['low']:.2f}, {p['high']:.2f}])"
