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
from lra.scaling.count import Uncountable, count
from lra.training import config
from lra.training.batches import MASKED, Batches, evaluation_widths
from lra.training.trainer import PROBE_BATCH, PROBE_STEPS, validation_split
from tasks.base import SPLITS
from tasks.store.prepared import Prepared, load

UNKNOWN_SIZE = 20_000  # examples of a split whose size only its source knows
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

    seconds = start + (steps + probe) * accumulate * (micro-batch in training, by shares of pretraining and labels)
                    + (batches of all validations and of the test) * (micro-batch in evaluation)
    """
    optim, towers, splits = run.recipe.train, run.meta.towers, run.manifest["splits"]
    train, evaluated = splits["train"], (validation_split(run), "test")
    if prepared is None:
        trained = np.array([train["max_length"]])
        each = [np.full(-(-splits[n]["n"] // run.micro_batch), splits[n]["max_length"]) for n in evaluated]
    else:
        trained = Batches(prepared.splits["train"], towers, size=optim.batch, seed=run.seed).widths()
        each = [evaluation_widths(prepared.splits[name], towers, size=run.micro_batch) for name in evaluated]
    validations = -(-optim.steps // optim.eval_every)
    widths = {True: trained, False: np.append(np.tile(each[0], validations), each[1])}  # by whether it is training
    mean = {training: round(w.mean()) for training, w in widths.items()}
    how = {"batch": run.micro_batch, "padded": train["mean_length"] < train["max_length"]}
    pairs = {(width, training) for training, w in widths.items() for width in (mean[training], int(w.max()))}
    works = {(width, training): count(run, width=width, training=training, **how) for width, training in pairs}
    step, evaluation = (machine.seconds(works[mean[training], training].counts) for training in (True, False))
    if run.turn:
        for width in (mean[True], int(trained.max())):
            asked = max(1, round(MASKED[run.meta.reads] * width))
            works[width, "pretraining"] = count(run, width=width, asked=asked, **how)
        share = run.turn / optim.steps
        step += share * (machine.seconds(works[mean[True], "pretraining"].counts) - step)
    steps = optim.accumulate * (optim.steps + PROBE_STEPS * PROBE_BATCH / optim.batch)
    seconds = machine.start_seconds + steps * step + len(widths[False]) * evaluation
    return Prediction(seconds, machine.bytes(max(work.peak for work in works.values())), optim.accumulate * step)


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
    runs, rows, total = planned(args), [], 0.0
    for run, prepared in tqdm(runs, desc="predicting", disable=None, leave=False, delay=2):
        cells = "–––"
        if p := foresee(run, machine, prepared):
            cells = [f"{1e3 * p.step_seconds:.1f}", duration(p.seconds), f"{p.bytes / 1e9:.2f}"]
            total += args.seeds * p.seconds
        name = f"{run.meta.name} {run.attention}{'' if prepared else ' (planned)'}"
        rows.append([name, f"{run.recipe.train.steps:,}", *cells])
    text = markdown([Grid(["predicted", "steps", "ms per step", "run", "GB"], rows)])
    text += f"\n{args.seeds * len(runs)} runs, predicted: {duration(total)} of one {args.gpu or 'CPU thread'}."
    if not args.gpu:
        jobs = args.jobs or cores()
        text += f" With {jobs} at a time: {duration(total / jobs)}."
    if not all(prepared for _, prepared in runs):
        text += "\n\nPlanned: its data are not prepared, and every sequence is taken to be of full length."
    print(text)


def planned(args: Namespace) -> list[tuple[config.Run, Prepared | None]]:
    """The runs of the first seed: with the data where they are prepared, else as the recipe plans them."""
    overrides, runs = config.overrides(args.sets, args.steps), []
    for name in registry.choose("task", args.tasks, registry.task_names()):
        recipe = config.load_preset(registry.load_task(name), args.preset)
        folder = args.data / name / args.preset
        prepared = load(folder) if (folder / "manifest.json").exists() else None
        sizes = {split: getattr(recipe.data, split) or UNKNOWN_SIZE for split in SPLITS}
        manifest = prepared.manifest if prepared else planned_manifest(recipe.data.seq_len, sizes)
        for attention in registry.choose("attention", args.attentions, registry.attention_names()):
            run = config.resolve(name, args.preset, attention, 0, manifest, overrides, args.val_rule)
            runs.append((run, prepared))
    return runs


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
