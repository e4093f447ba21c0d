"""What a run will take, before it starts: `predict`, `python -m lra cost`, and the refusal of what cannot fit.

Counted by trace.py, priced by calibration.py: seconds of one CPU thread in fp32 without torch.compile, the
validations, the test and the probe of the record included. For named GPUs a prediction from data sheets alone.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lra import registry
from lra.bench.base import markdown_table
from lra.machine import cores
from lra.options import unknown
from lra.records.markup import refresh_block
from lra.scaling import calibration
from lra.scaling.calibration import Machine, planned_manifest
from lra.scaling.trace import Uncountable, Work, trace
from lra.training import config
from lra.training.batches import Batches
from lra.training.provenance import PROBE_BATCH, PROBE_STEPS
from tasks.base import SPLITS
from tasks.store.files import atomic_path
from tasks.store.prepared import Prepared, load

UNKNOWN_SIZE = 20_000  # examples of a split whose size only its source knows
COUNTED = 32  # examples of the largest batch that is counted as it is on a CPU, and not from smaller ones
LAUNCH = 8e-6  # seconds in which eager PyTorch starts one operation on a GPU: an assumption


@dataclass(frozen=True)
class Gpu:
    """A GPU of which only the data sheet is known: an operation takes the longest of its launch, its bytes and its
    FLOPs, at the sheet's rates. Bytes are those of fp32, although products run in bf16."""

    bandwidth: float  # bytes/s
    flops: float  # bf16 products, dense, per second
    memory: float  # bytes

    start_seconds = 10.0  # of a process with its CUDA context: an assumption
    linear = False  # seconds of a batch are not those of one example and a constant
    gpu = True

    def seconds(self, work: Work, forward: bool = False) -> float:
        """Of a step, or of its forward pass."""
        part = slice(0, work.forward if forward else None)
        of_bytes, of_flops = work.bytes[part] / self.bandwidth, work.flops[part] / self.flops
        return float(np.maximum(np.maximum(of_bytes, of_flops), LAUNCH).sum())

    def bytes(self, work_peak: float) -> int:
        """What lives at once."""
        return int(work_peak)


GPUS = {  # NVIDIA's data sheets
    "A100": Gpu(2.039e12, 312e12, 80e9),  # SXM, 80 GB
    "H100": Gpu(3.35e12, 989e12, 80e9),  # SXM
    "L4": Gpu(300e9, 121e12, 24e9),
    "RTX4090": Gpu(1.008e12, 165e12, 24e9),
}


@dataclass(frozen=True)
class Prediction:
    """Of one run, start to record. `bytes` is the peak above an idle process, as records keep it."""

    seconds: float
    bytes: int
    step_seconds: float


def predict(run: config.Run, machine: Machine | Gpu, prepared: Prepared | None = None) -> Prediction:
    """Seconds and bytes of a run. Without its data, every sequence is taken to be as long as the longest."""
    optim, splits = run.recipe.train, run.manifest["splits"]
    widths = np.array([splits["train"]["max_length"]])
    if prepared is not None:
        train = prepared.splits["train"]
        widths = Batches(train, run.meta.towers, size=optim.batch, seed=run.seed).widths()
    padded = splits["train"]["mean_length"] < splits["train"]["max_length"]
    micro = optim.batch // optim.accumulate
    step = probe = forward = 0.0
    for width, share in quadrature(widths):  # the longest comes last
        constant, slope = _affine(run, machine, micro, width, padded)
        step += share * optim.accumulate * (constant + slope * micro)[0]
        forward += share * (constant + slope * micro)[1] / micro
        probe += share * (constant + slope * PROBE_BATCH)[0]
    evaluations = -(-optim.steps // optim.eval_every)
    seconds = machine.start_seconds + optim.steps * step + PROBE_STEPS * probe
    seconds += forward * (evaluations * splits["val"]["n"] + splits["test"]["n"])
    return Prediction(seconds, machine.bytes((constant + slope * micro)[2]), step)


def _affine(run, machine, batch: int, width: int, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """(seconds of a step, seconds of its forward pass, live bytes) as constant + slope * batch.

    What is counted grows linearly with the batch once small products are put together: where prices are linear
    too, a large batch follows from two smaller ones.
    """
    values = []
    sizes = COUNTED // 4, COUNTED // 2
    for size in sizes if machine.linear and batch > COUNTED else (batch,):
        work = trace(run, batch=size, width=width, padded=padded, gpu=machine.gpu)
        values.append(np.array([machine.seconds(work), machine.seconds(work, forward=True), work.peak]))
    if len(values) == 1:
        return np.zeros(3), values[0] / batch
    slope = (values[1] - values[0]) / (sizes[1] - sizes[0])
    return values[1] - slope * sizes[1], slope


def quadrature(values: np.ndarray) -> list[tuple[int, float]]:
    """Two lengths and their shares, of which the second is the largest, that give the mean over `values` of any
    quadratic (Gauss and Radau); the first is rounded to an integer.

    Costs grow at most with the square of the length, and memory is that of the longest, so two lengths stand for all.
    """
    largest, room = int(values.max()), values.max() - values
    if room.mean() < 0.5:
        return [(largest, 1.0)]
    other = round((values * room).mean() / room.mean())
    share = (largest - values.mean()) / (largest - other)
    return [(other, float(share)), (largest, float(1 - share))]


def smaller(run: config.Run, factor: float) -> int:
    """The train.accumulate that makes micro-batches at least `factor` times smaller, or as small as they get."""
    batch = run.recipe.train.batch
    least = min(batch, run.recipe.train.accumulate * factor)
    return next(parts for parts in range(1, batch + 1) if batch % parts == 0 and parts >= least)


def machine(results: Path, device: torch.device) -> Machine | None:
    """What predicts the runs of a sweep: the calibration of a CPU, and of other devices nothing."""
    return Machine.read(results) if device.type == "cpu" else None


def foresee(run: config.Run, machine: Machine | Gpu, prepared: Prepared | None) -> Prediction | None:
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
    names = args.gpu.split(",") if args.gpu else []
    if wrong := [name for name in names if name not in GPUS]:
        raise unknown("GPU", wrong[0], GPUS)
    machines = {name: GPUS[name] for name in names} or {"CPU thread": Machine.read(args.results)}
    runs = planned(args)
    found = {name: [] for name in machines}
    with tqdm(total=len(machines) * len(runs), desc="predicting", disable=None, leave=False, delay=2) as bar:
        for name, machine in machines.items():
            for run, prepared in runs:
                found[name].append(foresee(run, machine, prepared))
                bar.update()
    text = report(runs, found, args)
    print(text)
    if args.write:
        page = refresh_block(args.write.read_text(), "cost", text)
        with atomic_path(args.write) as temporary:
            temporary.write_text(page)


def planned(args: Namespace) -> list[tuple[config.Run, Prepared | None]]:
    """The runs of the first seed: with the data where they are prepared, else as the recipe plans them."""
    overrides, runs = config.overrides(args.sets, args.steps), []
    for name in registry.choose("task", args.tasks, registry.task_names()):
        task = registry.load_task(name)
        recipe = config.load_preset(task, args.preset)
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


def report(runs: list, found: dict[str, list[Prediction | None]], args: Namespace) -> str:
    """A row for each cell, with its columns for each machine, and what the grid takes."""
    rows = []
    for (run, prepared), *predictions in zip(runs, *found.values(), strict=True):
        cells = [f"{run.meta.name} {run.attention}{'' if prepared else ' (planned)'}"]
        cells.append(f"{run.recipe.train.steps:,}")
        for p in predictions:
            cells += [f"{1e3 * p.step_seconds:.1f}", duration(p.seconds)] if p else ["–", "–"]
        rows.append([*cells, f"{predictions[0].bytes / 1e9:.2f}" if predictions[0] else "–"])
    heads = [f"{name}, {what}" for name in found for what in ("ms per step", "run")]
    lines = markdown_table(["predicted", "steps", *heads, "GB"], rows) + [""]
    for name, predictions in found.items():
        total = args.seeds * sum(p.seconds for p in predictions if p)
        lines.append(f"{args.seeds * len(runs)} runs, predicted: {duration(total)} of one {name}.")
        if not args.gpu:
            jobs = args.jobs or cores()
            lines[-1] += f" With {jobs} at a time: {duration(total / jobs)}."
    if not all(prepared for _, prepared in runs):
        lines.append(
            "\nPlanned: its data are not prepared, and every sequence is taken to be of full length."
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """90 -> "1.5 min"."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
