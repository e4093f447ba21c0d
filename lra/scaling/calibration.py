"""What a machine takes for a training step, learnt from a minute of measured ones.

Seconds are a sum of non-negative prices over what trace.py counts. Three lists of prices are fitted, to see what
each explains of steps that the fit has not seen:

    flops     per step, per FLOP
    traffic   per operation, per byte read or written (arXiv 2406.18922), by kind of operation
    both      traffic and FLOPs: what predictions use
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lra.bench.base import machine_line, markdown_table, write_report
from lra.machine import PeakMemory, set_threads
from lra.options import UsageError
from lra.registry import attention_names, budget_options
from lra.scaling.trace import KINDS, Work, trace
from lra.training import config
from lra.training.optim import build_optimizer
from lra.training.trainer import update
from tasks.base import SPLITS, Batch

COLUMNS = ("step", "operations", "flops", *KINDS)
MODELS = {
    "flops": ("step", "flops"),
    "traffic": ("operations", *KINDS),
    "both": ("operations", "flops", *KINDS),
}
TASK, PRESET = "listops", "paper"  # whose vocabulary and head the measured models have
ROUNDS = 3  # of timed steps, interleaved; the least of a configuration counts
FITTED, HELD_OUT = 4, 2  # configurations of each attention
MEMORY = 10  # configurations whose peak memory is measured, every second one held out


@dataclass(frozen=True)
class Machine:
    """Prices of this machine: one thread, fp32, eager."""

    prices: dict[str, float]  # seconds, by column of COLUMNS
    start_seconds: float  # of a process, until its first step
    start_bytes: int  # resident in a process before its run
    fixed_bytes: int  # of libraries at work, beyond that
    slack: float  # resident bytes per byte that lives: what the allocator keeps and cannot use

    linear = True  # seconds of a batch are those of one example and a constant
    gpu = False

    def seconds(self, work: Work, forward: bool = False) -> float:
        """Of a step, or of its forward pass."""
        return float(np.dot([self.prices.get(c, 0.0) for c in COLUMNS], row(work, forward)))

    def bytes(self, work_peak: float) -> int:
        """Peak resident memory above the start, as PeakMemory measures it."""
        return int(self.fixed_bytes + self.slack * work_peak)

    @staticmethod
    def read(results: Path) -> Machine:
        """As `cost --calibrate` left it in RESULTS/bench, or in results/reference where there is none."""
        ours = Path(__file__).parents[2] / "results" / "reference"
        paths = [Path(folder) / "bench" / "cost.json" for folder in (results, ours)]
        path = next((p for p in paths if p.exists()), None)
        if path is None:
            raise UsageError(f"no calibration at {paths[0]}: run python -m lra cost --calibrate")
        facts = json.loads(path.read_text())
        return Machine(**{f.name: facts["machine"][f.name] for f in dataclasses.fields(Machine)})


@dataclass(frozen=True)
class Point:
    """One configuration and its batch."""

    attention: str
    overrides: dict[str, str]
    batch: int
    width: int
    padded: bool

    def run(self) -> config.Run:
        """Resolved, without data."""
        manifest = planned_manifest(self.width, dict.fromkeys(SPLITS, self.batch))
        return config.resolve(TASK, PRESET, self.attention, 0, manifest, self.overrides)

    def data(self, run: config.Run) -> Batch:
        """Random tokens; if padded, rows end at different lengths."""
        shape = self.batch, run.meta.towers, self.width
        source = torch.Generator().manual_seed(0)
        tokens = torch.randint(1, run.meta.vocab, shape, generator=source)
        ends = self.width - torch.arange(self.batch) * self.width // (4 * self.batch) - 1
        mask = (torch.arange(self.width) < ends[:, None, None]).expand(shape) if self.padded else None
        return Batch(tokens, mask, torch.zeros(self.batch, dtype=torch.int64))


def row(work: Work, forward: bool = False) -> np.ndarray:
    """A work in the order of COLUMNS."""
    return np.array([1.0, *work.totals(forward)])


def planned_manifest(longest: int, sizes: dict[str, int]) -> dict[str, Any]:
    """What resolving a run needs to know of data that are not there: every sequence is `longest`."""
    splits = {name: {"n": n, "mean_length": longest, "max_length": longest} for name, n in sizes.items()}
    nowhere = dict.fromkeys(("source", "dataset", "schema", "task", "version", "substitute"), "planned")
    return nowhere | {"splits": splits}


def points(count: int, seed: int) -> list[Point]:
    """`count` configurations of each attention at random sizes, small enough to be measured in no time."""
    draw, found = random.Random(seed), []
    for name in attention_names():
        budget = [f"attention.{option}" for option in budget_options(name, 0)]
        for _ in range(count):
            width, length = draw.choice((32, 64, 128)), draw.choice((64, 128, 192, 256, 384, 512, 768, 1024))
            batch = min(draw.choice((2, 4, 8, 16)), max(1, 1536 // length))
            size = draw.choice((32, 64, 128))
            overrides = {
                "encoder.width": width,
                "encoder.heads": draw.choice((1, 2)),
                "encoder.ffn": width * draw.choice((1, 2, 4)),
                "encoder.layers": draw.choice((1, 2, 3)),
                "encoder.dropout": draw.choice((0.0, 0.1)),
                "encoder.max_len": length,
                "train.batch": batch,
            } | dict.fromkeys(budget, size)
            text = {key: str(value) for key, value in overrides.items()}
            found.append(Point(name, text, batch, length, draw.random() < 0.5))
    return found


def measure(chosen: list[Point], bar: tqdm) -> tuple[np.ndarray, np.ndarray]:
    """What is counted (points, COLUMNS) and seconds of CPU (points,) of one step of each."""
    counted, steps = [], []
    for point in chosen:
        run = point.run()
        counted.append(row(trace(run, batch=point.batch, width=point.width, padded=point.padded)))
        model = run.build_model().train()
        steps.append((model, build_optimizer(model, run.recipe.train), point.data(run), run.recipe.train))
        bar.update()
    seconds = np.full((ROUNDS + 1, len(chosen)), np.inf)
    for timed in seconds:
        for i, (model, optimizer, batch, optim) in enumerate(steps):
            start = time.process_time()  # of this process alone: the machine may be busy
            update(model, optimizer, batch, optim, "fp32")
            timed[i] = time.process_time() - start
            bar.update()
    return np.array(counted), seconds[1:].min(0)


def fit(counted: np.ndarray, seconds: np.ndarray, columns: tuple[str, ...]) -> dict[str, float]:
    """Prices of these columns."""
    found = nonnegative(counted[:, [COLUMNS.index(c) for c in columns]], seconds)
    return dict(zip(columns, map(float, found), strict=True))


def nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """x >= 0 of least squared relative error of a x = b."""
    from scipy.optimize import nnls

    relative = a / b[:, None]
    scale = relative.max(0)
    scale[scale == 0] = 1  # columns differ by many orders of magnitude
    return nnls(relative / scale, np.ones(len(b)))[0] / scale


def errors(counted: np.ndarray, seconds: np.ndarray, prices: dict[str, float]) -> np.ndarray:
    """|predicted - measured| / measured, of each configuration."""
    return np.abs(counted @ [prices.get(c, 0.0) for c in COLUMNS] / seconds - 1)


def calibrate(results: Path) -> str:
    """Measure, fit, write results/bench/cost.json and cost.md; returns the text of the latter."""
    set_threads(1)
    fitted, held_out = points(FITTED, seed=1), points(HELD_OUT, seed=2)
    large = [dataclasses.replace(p, batch=4 * p.batch) for p in points(1, seed=3)][:MEMORY]
    total = (ROUNDS + 2) * len(fitted + held_out) + len(large)
    with tqdm(total=total, desc="calibrating", disable=None) as bar:
        counted, seconds = measure(fitted + held_out, bar)
        fresh = [in_fresh_process(point, bar) for point in large]
    known, new = slice(len(fitted)), slice(len(fitted), None)
    prices = {name: fit(counted[known], seconds[known], columns) for name, columns in MODELS.items()}
    report = {name: spread(errors(counted[new], seconds[new], p)) for name, p in prices.items()}
    live, peaks = (np.array([f[key] for f in fresh], float) for key in ("live", "peak"))
    # Relative errors again, of fixed + slack * live; libraries alone weigh tens of megabytes.
    fixed, slack = nonnegative(np.stack([np.ones(len(live)), live], 1)[::2], peaks[::2])
    report["memory"] = spread(np.abs((fixed + slack * live) / peaks - 1)[1::2])
    start = {key: float(np.median([f[key] for f in fresh])) for key in ("start_seconds", "start_bytes")}
    machine = Machine(
        prices["both"], start["start_seconds"], int(start["start_bytes"]), int(fixed), float(slack)
    )
    measured = {"machine": dataclasses.asdict(machine), "prices": prices, "held_out_errors": report}
    measured["configurations"] = {"fitted": len(fitted), "held_out": len(held_out), "memory": len(large)}
    command = "python -m lra cost --calibrate"
    text = describe(report, prices, len(fitted), len(held_out), command)
    write_report(results, "cost", command, measured, text)
    return text


def spread(found: np.ndarray) -> dict[str, float]:
    """Median, 90th percentile and largest of relative errors."""
    return {
        "median": float(np.median(found)),
        "p90": float(np.quantile(found, 0.9)),
        "max": float(found.max()),
    }


def describe(report: dict, prices: dict, fitted: int, held_out: int, command: str) -> str:
    """The calibration as Markdown."""
    rows = [
        [name, *(f"{100 * e[key]:.1f}" for key in ("median", "p90", "max"))] for name, e in report.items()
    ]
    lines = [
        f"# What a training step costs\n\nMade by `{command}`. Prices fitted to {fitted} configurations "
    ]
    lines[0] += f"(all attentions, random sizes), tried on {held_out} others. Relative error in percent:\n"
    lines += markdown_table(["model", "median", "90th percentile", "largest"], rows)
    lines.append(
        "\n`flops`: FLOPs and a constant. `traffic`: operations and the bytes they read and write "
        "(arXiv 2406.18922), by kind of operation. `both`: what predictions use. `memory`: peak resident bytes "
        "in a fresh process, from the bytes that live at once.\n"
    )
    units = {"step": ("µs per step", 1e6), "operations": ("µs each", 1e6), "flops": ("ns per kFLOP", 1e12)}
    rows = []
    for column in COLUMNS:
        unit, factor = units.get(column, ("ns per kB", 1e12))
        found = (f"{factor * p[column]:.3g}" if column in p else "–" for p in prices.values())
        rows.append([f"{column}, {unit}", *found])
    lines += markdown_table(["price", *prices], rows)
    lines.append(f"\nSeconds of CPU of one thread, least of {ROUNDS}. {machine_line(1)}\n")
    return "\n".join(lines)


def in_fresh_process(point: Point, bar: tqdm) -> dict[str, float]:
    """Of a process that takes two steps: CPU seconds and resident bytes before them, the peak above that, and the
    bytes that live at once as counted."""
    command = [sys.executable, "-m", "lra.scaling.calibration", json.dumps(dataclasses.asdict(point))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise RuntimeError(f"{point.attention}: {done.stderr.strip().splitlines()[-1:]}")
    work = trace(point.run(), batch=point.batch, width=point.width, padded=point.padded)
    bar.update()
    return json.loads(done.stdout) | {"live": work.peak}


def _here(arguments: str) -> dict[str, Any]:
    import lra.training.train  # noqa: F401  what a training process imports

    set_threads(1)
    start = time.process_time()
    point = Point(**json.loads(arguments))
    run = point.run()
    meter = PeakMemory(torch.device("cpu"))
    model = run.build_model().train()
    optimizer, batch = build_optimizer(model, run.recipe.train), point.data(run)
    for _ in range(2):
        update(model, optimizer, batch, run.recipe.train, "fp32")
    return {"start_bytes": meter.start, "start_seconds": start, "peak": meter.read()}


if __name__ == "__main__":  # what in_fresh_process runs
    print(json.dumps(_here(sys.argv[1])))
