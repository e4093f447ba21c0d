"""`bench tasks`: the training step of every attention on every task, which the speed column of tables is made of.

Runs share a machine with others, so their clocks say little; here all attentions take the same batches in turns.
"""

from __future__ import annotations

import statistics
import time
from argparse import Namespace

from tqdm import tqdm

from lra import registry
from lra.bench.base import finish, quartiles, table
from lra.bench.peers import contenders
from lra.machine import pick_device, set_threads, synchronize
from lra.records.measured import BASELINE, tasks_report
from lra.training import config
from lra.training.trainer import Trainer, Where
from tasks.store.prepared import load

CELL = "{:,.1f} ({ratio:.2f} [{low:.2f}, {high:.2f}])"


def bench_tasks(args: Namespace) -> None:
    """`bench tasks`: measure, print and write one point for each task and attention at its defaults.

    All attentions of a task take step k of their runs (seed 0: the same batch) in round k; the first round is not
    counted. ratio, low, high: median and quartiles over rounds of (seconds of softmax) / (seconds of the attention).
    seconds: the median of a step. digest: that of the runs that the point stands for.
    """
    set_threads(args.threads)
    tasks = registry.choose("task", args.tasks, registry.task_names())
    names = contenders(args.attentions, registry.attention_names())
    # All there, before anything is timed.
    prepared = {task: load(args.data / task / args.preset) for task in tasks}
    where, points = Where(pick_device(args.device), args.precision), []
    with tqdm(total=len(tasks) * len(names) * (1 + args.rounds), disable=None, unit="step") as bar:
        for task, data in prepared.items():
            bar.set_description(task)
            how = {"manifest": data.manifest, "overrides": {}, "execution": where.execution}
            runs = {name: config.resolve(task, args.preset, name, 0, **how) for name in names}
            trainers = {name: Trainer(run, data, where) for name, run in runs.items()}
            times = {name: [] for name in names}
            for step in range(1 + args.rounds):
                for name, trainer in trainers.items():
                    synchronize(where.device)
                    start = time.perf_counter()
                    trainer.step(step)
                    synchronize(where.device)
                    times[name].append(time.perf_counter() - start)
                    bar.update()
            for name, run in runs.items():
                low, ratio, high = (round(value, 4) for value in quartiles(times[BASELINE][1:], times[name][1:]))
                seconds = round(statistics.median(times[name][1:]), 6)
                point = {"task": task, "name": name, "digest": run.digest[:16], "seconds": seconds}
                points.append(point | {"ratio": ratio, "low": low, "high": high})

    text = f"""# A training step of the {args.preset} preset

`{{command}}`: the preset's own encoder, batch and data, loading included; {args.precision}. Median of {args.rounds} \
interleaved rounds.

Milliseconds, and in brackets how many times as fast as with softmax in the same round: median [quartiles].

{table(points, lambda p: p["task"], lambda p: CELL.format(1e3 * p["seconds"], **p))}"""
    finish(args.results, tasks_report(args.preset), "tasks", {"points": points}, text)
