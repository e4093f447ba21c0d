"""Seconds and memory of a run before it starts: `predict`, and `python -m lra cost`.

A step and an evaluation are counted (count.py) and priced (calibration.py): one CPU thread, fp32, eager. A run is its
steps, its validations, the test, and the probe of the record. For a GPU the prices are those of its data sheet: a
bound, not a measurement.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lra import registry
from lra.machine import cores
from lra.options import unknown
from lra.records.markup import Grid, markdown
from lra.scaling import calibration
from lra.scaling.calibration import Machine, planned_manifest
from lra.scaling.count import Uncountable, Work, count
from lra.training import config
from lra.training.batches import Batches, evaluation_widths
from lra.training.provenance import PROBE_BATCH, PROBE_STEPS
from lra.training.trainer import validation_split
from tasks.base import SPLITS
from tasks.store.prepared import Prepared, load

UNKNOWN_SIZE = 20_000  # examples of a split whose size only its source knows
TOKENS = 2**14  # of the largest batch that is counted as it is, and not from smaller ones


SHEETS = {  # of NVIDIA: bytes/s and dense bf16 products/s, taken to be reached in full
    "A100": (2.039e12, 312e12),  # SXM, 80 GB
    "H100": (3.35e12, 989e12),  # SXM
    "L4": (300e9, 121e12),
    "RTX4090": (1.008e12, 165e12),
}
GPUS = {name: Machine({"bytes": 1 / b, "flops": 1 / f}, 0.0, 0, 0, 1.0) for name, (b, f) in SHEETS.items()}


class Prediction(NamedTuple):
    """Of one run, start to record. `bytes` is the peak above an idle process, as records keep it."""

    seconds: float
    bytes: int
    step_seconds: float


def predict(run: config.Run, machine: Machine, prepared: Prepared | None = None) -> Prediction:
    """Seconds at the mean width of the batches, bytes at the largest. Without data every sequence is taken to be as
    long as the longest. Raises Uncountable.

    seconds = start + (steps + probe) * accumulate * (micro-batch in training)
                    + (batches of all validations and of the test) * (micro-batch in evaluation)
    """
    optim, validations = run.recipe.train, -(-run.recipe.train.steps // run.recipe.train.eval_every)
    val, test = (evaluated(run, prepared, name) for name in (validation_split(run), "test"))
    widths = {False: np.append(np.tile(val, validations), test)}  # by whether it is training
    widths[True] = np.array([run.manifest["splits"]["train"]["max_length"]])
    if prepared is not None:
        widths[True] = Batches(prepared.splits["train"], run.meta.towers, size=optim.batch, seed=run.seed).widths()
    mean = {training: round(w.mean()) for training, w in widths.items()}
    pairs = {(width, training) for training, w in widths.items() for width in (mean[training], int(w.max()))}
    works = {pair: work_of(run, *pair) for pair in pairs}
    step, evaluation = (machine.seconds(works[mean[training], training].counts) for training in (True, False))
    steps = optim.accumulate * (optim.steps + PROBE_STEPS * PROBE_BATCH / optim.batch)
    seconds = machine.start_seconds + steps * step + len(widths[False]) * evaluation
    return Prediction(seconds, machine.bytes(max(work.peak for work in works.values())), optim.accumulate * step)


def evaluated(run: config.Run, prepared: Prepared | None, name: str) -> np.ndarray:
    """Tokens that each batch of a split's evaluation is padded to."""
    if prepared is not None:
        return evaluation_widths(prepared.splits[name], run.meta.towers, size=run.micro_batch)
    split = run.manifest["splits"][name]
    return np.full(-(-split["n"] // run.micro_batch), split["max_length"])


def work_of(run: config.Run, width: int, training: bool) -> Work:
    """`count` of a micro-batch; a large one follows from two smaller ones, because all counts are a constant plus a
    slope times the batch."""
    large, batch, train = max(2, TOKENS // width), run.micro_batch, run.manifest["splits"]["train"]
    how = {"width": width, "padded": train["mean_length"] < train["max_length"], "training": training}
    if batch <= large:
        return count(run, batch=batch, **how)
    works = (count(run, batch=size, **how) for size in (large // 2, large))
    factor = (batch - large) / (large - large // 2)
    return Work(*(b + factor * (b - a) for a, b in zip(*works, strict=True)))


def foresee(run: config.Run, machine: Machine, prepared: Prepared | None) -> Prediction | None:
    """`predict`, or None with a line on stderr where a step cannot be counted."""
    try:
        return predict(run, machine, prepared)
    except Uncountable as error:
        print(f"no prediction for {run.meta.name} {run.attention}: {error}", file=sys.stderr)
        return None


def cost(args: Namespace) -> None:
    """`cost`: what `sweep` with the same options would take, or a calibration."""
    if args.calibrate:
        print(calibration.calibrate(args.results))
        return
    if args.gpu and args.gpu not in GPUS:
        raise unknown("GPU", args.gpu, GPUS)
    machine = GPUS[args.gpu] if args.gpu else Machine.read(args.results)
    runs = planned(args)
    bar = tqdm(runs, desc="predicting", disable=None, leave=False, delay=2)
    print(cost_table(runs, [foresee(run, machine, prepared) for run, prepared in bar], args))


def planned(args: Namespace) -> list[tuple[config.Run, Prepared | None]]:
    """The runs of the first seed: with the data where they are prepared, else as the recipe plans them."""
    overrides, runs = config.overrides(args.sets, args.steps), []
    for name in registry.choose("task", args.tasks, registry.task_names()):
        recipe = config.load_preset(registry.load_task(name), args.preset)
        folder, prepared = args.data / name / args.preset, None
        if (folder / "manifest.json").exists():
            prepared = load(folder)
            manifest = prepared.manifest
        else:
            sizes = {split: getattr(recipe.data, split) or UNKNOWN_SIZE for split in SPLITS}
            manifest = planned_manifest(recipe.data.seq_len, sizes)
        for attention in registry.choose("attention", args.attentions, registry.attention_names()):
            run = config.resolve(name, args.preset, attention, 0, manifest, overrides, args.val_rule)
            runs.append((run, prepared))
    return runs


def cost_table(runs: list, predictions: list[Prediction | None], args: Namespace) -> str:
    """A row for each (task, attention), and what all seeds take together."""
    rows = []
    for (run, prepared), p in zip(runs, predictions, strict=True):
        name = f"{run.meta.name} {run.attention}{'' if prepared else ' (planned)'}"
        cells = [f"{1e3 * p.step_seconds:.1f}", duration(p.seconds), f"{p.bytes / 1e9:.2f}"] if p else "–––"
        rows.append([name, f"{run.recipe.train.steps:,}", *cells])
    text = markdown([Grid(["predicted", "steps", "ms per step", "run", "GB"], rows)])
    total = args.seeds * sum(p.seconds for p in predictions if p)
    text += f"\n{args.seeds * len(runs)} runs, predicted: {duration(total)} of one {args.gpu or 'CPU thread'}."
    if not args.gpu:
        jobs = args.jobs or cores()
        text += f" With {jobs} at a time: {duration(total / jobs)}."
    if not all(prepared for _, prepared in runs):
        text += "\n\nPlanned: its data are not prepared, and every sequence is taken to be of full length."
    return text


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
