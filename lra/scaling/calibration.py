"""Prices of a training step on this machine: one thread, fp32, eager PyTorch.

seconds = sum over COLUMNS of price * count, all prices >= 0. `cost --calibrate` fits three lists of prices to measured
steps and tries each on steps that the fit has not seen:

    flops     a constant, and a price per FLOP
    traffic   a price per operation, and per byte that it reads or writes (arXiv 2406.18922)
    both      traffic and FLOPs: what predictions use

Peak resident bytes of a process above its start = fixed + slack * (bytes of tensors that live at once).
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lra.machine import PeakMemory, set_threads
from lra.options import UsageError
from lra.records.markup import Grid, markdown
from lra.registry import attention_names, budget_options
from lra.scaling.count import COLUMNS, Work, count
from lra.scaling.reports import machine_line, write_report
from lra.training import config
from lra.training.optim import build_optimizer
from lra.training.trainer import update
from tasks.base import SPLITS, Batch

MODELS = {
    "flops": ("step", "flops"),
    "traffic": ("operations", "bytes", "tiles"),
    "both": ("operations", "flops", "bytes", "tiles"),
}
TASK, PRESET = "listops", "paper"  # whose vocabulary and head the measured models have
ROUNDS = 3  # of timed steps, interleaved; the least of a sample counts
FITTED, HELD_OUT = 4, 2  # samples of each attention
MEMORY = 10  # samples whose peak memory is measured, every second one held out


@dataclass(frozen=True)
class Machine:
    """What predicts a run: prices in seconds by COLUMNS (a missing one is 0), and what a process takes anyway."""

    prices: dict[str, float]
    start_seconds: float  # of a process, until its first step
    start_bytes: int  # resident before the run
    fixed_bytes: int  # of libraries at work
    slack: float  # resident bytes per byte of tensors: the allocator keeps blocks that it cannot use

    def seconds(self, counts: np.ndarray) -> float:
        """Of counts by COLUMNS."""
        return float(priced(counts, self.prices))

    def bytes(self, peak: float) -> int:
        """Peak resident memory above the start, as PeakMemory measures it."""
        return int(self.fixed_bytes + self.slack * peak)

    @staticmethod
    def read(results: Path) -> Machine:
        """From bench/cost.json of the user's results, or else of results/reference."""
        ours = Path(__file__).parents[2] / "results" / "reference"
        paths = [folder / "bench" / "cost.json" for folder in (Path(results), ours)]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UsageError(f"no calibration at {paths[0]}: run python -m lra cost --calibrate")
        facts = json.loads(path.read_text())["machine"]
        return Machine(**{field.name: facts[field.name] for field in dataclasses.fields(Machine)})


@dataclass(frozen=True)
class Sample:
    """One model and its batch, to be counted and measured."""

    attention: str
    overrides: dict[str, str]
    batch: int
    width: int
    padded: bool

    def run(self) -> config.Run:
        """Resolved, without data."""
        manifest = planned_manifest(self.width, dict.fromkeys(SPLITS, self.batch))
        return config.resolve(TASK, PRESET, self.attention, 0, manifest, self.overrides)

    def work(self) -> Work:
        """Of one step."""
        return count(self.run(), batch=self.batch, width=self.width, padded=self.padded)

    def stepper(self) -> Callable[[], object]:
        """A function that takes a real step on random tokens; if padded, rows end at different lengths."""
        run = self.run()
        shape = self.batch, run.meta.towers, self.width
        tokens = torch.randint(1, run.meta.vocab, shape, generator=torch.Generator().manual_seed(0))
        ends = self.width - torch.arange(self.batch) * self.width // (4 * self.batch) - 1
        mask = (torch.arange(self.width) < ends[:, None, None]).expand(shape) if self.padded else None
        batch = Batch(tokens, mask, torch.zeros(self.batch, dtype=torch.int64))
        model = run.build_model().train()
        optimizer = build_optimizer(model, run.recipe.train)
        return lambda: update(model, optimizer, batch, run.recipe.train, "fp32")


def planned_manifest(longest: int, sizes: dict[str, int]) -> dict:
    """What resolving a run needs of data that are not there: every sequence is `longest`."""
    splits = {name: {"n": n, "mean_length": longest, "max_length": longest} for name, n in sizes.items()}
    nowhere = dict.fromkeys(("source", "dataset", "schema", "task", "version", "substitute"), "planned")
    return nowhere | {"splits": splits}


def samples(number: int, seed: int) -> list[Sample]:
    """`number` samples of each attention at random sizes, small enough to be measured in no time."""
    draw, drawn = random.Random(seed), []
    for name in attention_names():
        for _ in range(number):
            width, length = draw.choice((32, 64, 128)), draw.choice((64, 128, 192, 256, 384, 512, 768, 1024))
            batch = min(draw.choice((2, 4, 8, 16)), max(1, 1536 // length))
            size = draw.choice((32, 64, 128))
            sizes = {f"attention.{option}": size for option in budget_options(name, size)}
            sizes |= {"encoder.width": width, "encoder.heads": draw.choice((1, 2))}
            sizes |= {"encoder.ffn": width * draw.choice((1, 2, 4)), "encoder.layers": draw.choice((1, 2, 3))}
            sizes |= {
                "encoder.dropout": draw.choice((0.0, 0.1)),
                "encoder.max_len": length,
                "train.batch": batch,
            }
            overrides = {key: str(value) for key, value in sizes.items()}
            drawn.append(Sample(name, overrides, batch, length, draw.random() < 0.5))
    return drawn


def measure(chosen: list[Sample]) -> np.ndarray:
    """Seconds of CPU (samples,) of one step of each; of this process alone, for the machine may be busy."""
    steppers = [sample.stepper() for sample in chosen]
    seconds = np.full((ROUNDS + 1, len(chosen)), np.inf)
    for row in tqdm(seconds, desc="timing", disable=None):
        for i, step in enumerate(steppers):
            start = time.process_time()
            step()
            row[i] = time.process_time() - start
    return seconds[1:].min(0)


def two_steps(sample: Sample) -> tuple[float, float, float]:
    """Of a fresh process: seconds of CPU and resident bytes until its first step, and the peak above those."""
    import lra.training.train  # noqa: F401  what a training process imports

    set_threads(1)
    seconds, meter = time.process_time(), PeakMemory(torch.device("cpu"))
    step = sample.stepper()
    step(), step()
    return seconds, meter.start, meter.read()


def nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The x >= 0 that minimises the squared relative errors of a x = b."""
    from scipy.optimize import nnls

    relative = a / b[:, None]
    scale = relative.max(0)
    scale[scale == 0] = 1  # columns differ by many orders of magnitude
    return nnls(relative / scale, np.ones(len(b)))[0] / scale


def fit(counts: np.ndarray, seconds: np.ndarray, columns: tuple[str, ...]) -> dict[str, float]:
    """Prices of these columns, from counts (samples, COLUMNS) and seconds (samples,)."""
    prices = nonnegative(counts[:, [COLUMNS.index(column) for column in columns]], seconds)
    return dict(zip(columns, map(float, prices), strict=True))


def priced(counts: np.ndarray, prices: dict[str, float]) -> np.ndarray:
    """Seconds of counts (..., COLUMNS)."""
    return counts @ [prices.get(column, 0.0) for column in COLUMNS]


def spread(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Median, 90th percentile and largest of |predicted - measured| / measured."""
    quantiles = np.quantile(np.abs(predicted / measured - 1), (0.5, 0.9, 1))
    return dict(zip(("median", "p90", "max"), map(float, quantiles), strict=True))


def calibrate(results: Path) -> str:
    """Measure, fit, write results/bench/cost.json and cost.md; returns the text of the latter."""
    set_threads(1)
    fitted, held_out = samples(FITTED, seed=1), samples(HELD_OUT, seed=2)
    large = [dataclasses.replace(s, batch=4 * s.batch) for s in samples(1, seed=3)][:MEMORY]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        *start, peaks = np.array(list(fresh.map(two_steps, large))).T
    counts, seconds = np.array([s.work().step for s in fitted + held_out]), measure(fitted + held_out)
    old, new = slice(len(fitted)), slice(len(fitted), None)
    prices = {name: fit(counts[old], seconds[old], columns) for name, columns in MODELS.items()}
    errors = {name: spread(priced(counts[new], p), seconds[new]) for name, p in prices.items()}
    live = np.array([[1, s.work().peak] for s in large])
    fixed, slack = nonnegative(live[::2], peaks[::2])
    errors["memory"] = spread(live[1::2] @ [fixed, slack], peaks[1::2])
    start_seconds, start_bytes = map(float, np.median(start, 1))
    machine = Machine(prices["both"], start_seconds, int(start_bytes), int(fixed), float(slack))
    numbers = {"fitted": len(fitted), "held_out": len(held_out), "memory": len(large)}
    measured = {"machine": dataclasses.asdict(machine), "prices": prices, "held_out_errors": errors}
    command = "python -m lra cost --calibrate"
    text = errors_table(errors, numbers, command)
    write_report(results, "cost", command, measured | {"configurations": numbers}, text)
    return text


def errors_table(errors: dict[str, dict[str, float]], numbers: dict[str, int], command: str) -> str:
    """The report for people."""
    rows = [[name, *(f"{100 * error:.1f}" for error in e.values())] for name, e in errors.items()]
    table = markdown([Grid(["model", "median", "90th percentile", "largest"], rows)])
    return f"""# What a training step costs

Made by `{command}`. Prices are fitted to {numbers["fitted"]} steps (all attentions, random sizes) and tried on
{numbers["held_out"]} others. Relative error on the others in percent:

{table}
`flops`: FLOPs and a constant. `traffic`: operations, and the bytes that they read and write (arXiv 2406.18922).
`both`: what predictions use. `memory`: peak resident bytes of a fresh process, from the bytes that live at once.

Seconds of CPU of one thread, least of {ROUNDS}. {machine_line()}
"""
