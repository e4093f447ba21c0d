"""Prices of a training step on this machine: one thread, fp32, eager PyTorch.

seconds = sum over COLUMNS of price * count, all prices >= 0. `cost --calibrate` fits three lists of prices to measured
steps and tries each on steps that the fit has not seen:

    flops     a constant, and a price per FLOP
    traffic   a price per operation, and per byte that it reads or writes (arXiv 2406.18922)
    both      traffic and FLOPs: what predictions use

Peak resident bytes of a process above its start = fixed + slack * (bytes of tensors that live at once).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

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
from lra.training.trainer import build_optimizer, update
from tasks.base import SPLITS, Batch

MODELS = {
    "flops": ("step", "flops"),
    "traffic": ("operations", "bytes", "tiles"),
    "both": ("operations", "flops", "bytes", "tiles"),
}
ROUNDS = 3  # of timed steps, interleaved; the least of a sample counts
FITTED, HELD_OUT = 4, 2  # samples of each attention
MEMORY = 10  # samples whose peak memory is measured, every second one held out


class Machine(NamedTuple):
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
        folders = Path(results), Path(__file__).parents[2] / "results" / "reference"
        paths = [folder / "bench" / "cost.json" for folder in folders]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UsageError(f"no calibration at {paths[0]}: run python -m lra cost --calibrate")
        return Machine(**json.loads(path.read_text("utf-8"))["machine"])


class Sample(NamedTuple):
    """One model and its batch, to be counted and measured; a padded batch has rows of different lengths."""

    run: config.Run
    batch: int
    width: int
    padded: bool

    def work(self) -> Work:
        """Of one step."""
        return count(**self._asdict())

    def stepper(self) -> Callable[[], object]:
        """A function that takes a real step on random tokens."""
        optim, shape = self.run.recipe.train, (self.batch, self.run.meta.towers, self.width)
        tokens = torch.randint(1, self.run.meta.vocab, shape, generator=torch.Generator().manual_seed(0))
        ends = self.width - torch.arange(self.batch) * self.width // (4 * self.batch) - 1
        mask = (torch.arange(self.width) < ends[:, None, None]).expand(shape) if self.padded else None
        batch = Batch(tokens, mask, torch.zeros(self.batch, dtype=torch.int64))
        model = self.run.build_model().train()
        optimizer = build_optimizer(model, optim)
        return lambda: update(model, optimizer, batch, optim, "fp32")


def planned_manifest(longest: int, sizes: dict[str, int]) -> dict:
    """What resolving a run needs of data that are not there: every sequence is `longest`."""
    splits = {name: {"n": n, "mean_length": longest, "max_length": longest} for name, n in sizes.items()}
    nowhere = dict.fromkeys(("source", "dataset", "schema", "task", "version", "substitute"), "planned")
    return nowhere | {"splits": splits}


def planned_run(attention: str, longest: int, sets: dict[str, str]) -> config.Run:
    """A run without data: the vocabulary and the head of ListOps."""
    manifest = planned_manifest(longest, dict.fromkeys(SPLITS, 64))
    return config.resolve("listops", "paper", attention, 0, manifest, sets)


def samples(number: int, seed: int) -> list[Sample]:
    """`number` samples of each attention at random sizes, small enough to be measured in no time."""
    draw, drawn = random.Random(seed), []
    for name in (name for name in attention_names() for _ in range(number)):
        width, length = draw.choice((32, 64, 128)), draw.choice((64, 128, 192, 256, 384, 512, 768, 1024))
        batch, size = min(draw.choice((2, 4, 8, 16)), max(1, 1536 // length)), draw.choice((32, 64, 128))
        encoder = {"width": width, "heads": draw.choice((1, 2)), "ffn": width * draw.choice((1, 2, 4))}
        encoder |= {"layers": draw.choice((1, 2, 3)), "dropout": draw.choice((0.0, 0.1)), "max_len": length}
        sets = {f"attention.{option}": str(size) for option in budget_options(name, size)}
        sets |= {f"encoder.{option}": str(value) for option, value in encoder.items()}
        drawn.append(Sample(planned_run(name, length, sets), batch, length, draw.random() < 0.5))
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
    """The x >= 0 that minimises the squared relative errors of a x = b; columns of a of any magnitude."""
    from scipy.optimize import nnls

    relative = a / b[:, None]
    scale = np.where(relative.any(0), relative.max(0), 1)
    return nnls(relative / scale, np.ones(len(b)))[0] / scale


def fit(counts: np.ndarray, seconds: np.ndarray, columns: tuple[str, ...]) -> dict[str, float]:
    """Prices of these columns, from counts (samples, COLUMNS) and seconds (samples,)."""
    prices = nonnegative(counts[:, [COLUMNS.index(column) for column in columns]], seconds)
    return dict(zip(columns, prices.tolist(), strict=True))


def priced(counts: np.ndarray, prices: dict[str, float]) -> np.ndarray:
    """Seconds of counts (..., COLUMNS)."""
    return counts @ [prices.get(column, 0.0) for column in COLUMNS]


def spread(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Median, 90th percentile and largest of |predicted - measured| / measured."""
    quantiles = np.quantile(np.abs(predicted / measured - 1), (0.5, 0.9, 1)).tolist()
    return dict(zip(("median", "p90", "max"), quantiles, strict=True))


def calibrate(results: Path) -> str:
    """Measure, fit, write results/bench/cost.json and cost.md; returns the text of the latter."""
    set_threads(1)
    fitted, held_out = samples(FITTED, seed=1), samples(HELD_OUT, seed=2)
    large = [s._replace(batch=4 * s.batch) for s in samples(1, seed=3)][:MEMORY]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as fresh:
        *start, peaks = np.array(list(fresh.map(two_steps, large))).T
    counts, seconds = np.array([s.work().counts for s in fitted + held_out]), measure(fitted + held_out)
    old, new = slice(len(fitted)), slice(len(fitted), None)
    prices = {name: fit(counts[old], seconds[old], columns) for name, columns in MODELS.items()}
    errors = {name: spread(priced(counts[new], p), seconds[new]) for name, p in prices.items()}
    live = np.array([[1, s.work().peak] for s in large])
    fixed, slack = nonnegative(live[::2], peaks[::2])
    errors["memory"] = spread(live[1::2] @ [fixed, slack], peaks[1::2])
    start_seconds, start_bytes = map(float, np.median(start, 1))
    machine = Machine(prices["both"], start_seconds, int(start_bytes), int(fixed), float(slack))
    command = "python -m lra cost --calibrate"
    measured = {"machine": machine._asdict(), "prices": prices, "held_out_errors": errors}
    rows = [[name, *(f"{100 * error:.1f}" for error in e.values())] for name, e in errors.items()]
    text = f"""# What a training step costs

Made by `{command}`. Prices are fitted to {len(fitted)} steps (all attentions, random sizes) and tried on
{len(held_out)} others. Relative error on the others in percent:

{markdown([Grid(["model", "median", "90th percentile", "largest"], rows)])}
`flops`: FLOPs and a constant. `traffic`: operations, and the bytes that they read and write (arXiv 2406.18922).
`both`: what predictions use. `memory`: peak resident bytes of a fresh process, from the bytes that live at once.

Seconds of CPU of one thread, least of {ROUNDS}. {machine_line()}
"""
    write_report(results, "cost", command, measured, text)
    return text
