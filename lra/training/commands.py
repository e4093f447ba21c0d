"""`prepare` and `train`, from their options to their output."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lra import registry
from lra.machine import pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import predictions_path, read_record, record_path
from lra.records.stats import wilson
from lra.training import config, distributed
from lra.training.train import WEIGHTS, Interrupted, run_folder
from lra.training.train import train as train_run
from lra.training.trainer import Where
from tasks.store.files import sha256_file
from tasks.store.prepare import prepare as prepare_task
from tasks.store.prepared import Prepared, load

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"  # the authors' records


def prepare(args: Namespace) -> None:
    """`prepare`: build or reuse, and say what is there."""
    task = registry.load_task(args.task)
    config.load_preset(task, args.preset)
    if args.export and not hasattr(task, "export"):
        raise UsageError(f"--export {args.export}: {args.task} has no published format to write")
    workers = args.workers or os.cpu_count() or 1
    prepared, reused = prepare_task(
        task,
        args.preset,
        out=args.data,
        source=args.source,
        data_dir=args.data_dir,
        workers=workers,
        verify=args.verify,
        again=args.again,
    )
    done = ("reused, every hash verified" if args.verify else "reused") if reused else "prepared"
    print(f"{args.data / args.task / args.preset}: {done}")
    print(describe(prepared))
    if args.export:
        print("exported: " + ", ".join(map(str, task.export(prepared.splits, args.export))))


def describe(prepared: Prepared) -> str:
    """A manifest for people."""
    m = prepared.manifest
    sizes = ", ".join(f"{name} {s['n']:,}" for name, s in m["splits"].items())
    longest = max(s["max_length"] for s in m["splits"].values())
    lines = [f"  {m['dataset']} ({m['source']}, {m['revision']}): {sizes}; up to {longest} tokens"]
    if m["duplicates_removed"]:
        dropped = ", ".join(f"{n} from {name}" for name, n in m["duplicates_removed"].items())
        lines.append(f"  duplicates across splits removed: {dropped}")
    if repeated := m.get("duplicates_within"):  # manifests of before it was counted have none
        lines.append("  repeated within: " + ", ".join(f"{n} in {name}" for name, n in repeated.items()))
    lines.append(
        "  floors, % of test: " + ", ".join(f"{name} {100 * v:.1f}" for name, v in m["floors"].items())
    )
    if m["report"]:
        lines.append(
            "  "
            + ", ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in m["report"].items()
            )
        )
    return "\n".join(lines)


def train(args: Namespace) -> int:
    """`train`: resolve, train, record. Exit code 85 when stopped with a checkpoint."""
    overrides = config.overrides(args.sets, args.steps)
    where = execution(args)
    task = registry.load_task(args.task)
    config.load_preset(task, args.preset)
    prepared = load(args.data / args.task / args.preset)
    run = config.resolve(
        args.task, args.preset, args.attention, args.seed, prepared.manifest, overrides, args.val_rule
    )
    path = record_path(args.results, args.task, args.attention, run.digest, args.seed)
    state, edited = config.standing(run, path)
    if state == "changed" and not args.again:
        raise UsageError(edited)
    optim = run.recipe.train
    with distributed.process_group(where.device, optim.batch, optim.accumulate) as (world, device):
        where = replace(where, world=world, device=device)
        if world.is_main:
            threads = f"{torch.get_num_threads()} threads"
            print(f"{run.summary()}\n  runs on    {device}, {where.precision}, {threads}")
            warn_of_gap(path, args.seed)
            if args.again:
                set_aside(path)
        world.barrier()
        try:
            _, new = train_run(run, prepared, results=args.results, runs=args.runs, where=where)
        except Interrupted as stopped:
            if world.is_main:
                print(stopped, file=sys.stderr)
            return STOPPED
    if world.is_main:
        print(report(read_record(path), path, run_folder(args.runs, run)) if new else f"already done: {path}")
    return 0


def warn_of_gap(path: Path, seed: int) -> None:
    """Say before training that `leaderboard submit` takes seeds 0 to n-1, where a smaller seed has no record."""
    if missing := [k for k in range(seed) if not path.with_name(f"seed{k}.json").exists()]:
        print(
            f"note: seed {missing[0]} has no record, and submit takes seeds 0, 1, ... only", file=sys.stderr
        )


def set_aside(path: Path) -> None:
    """Rename a record and its predictions to earlier-seed<k>-<first 8 digits of its sha256>: no table reads them."""
    if path.exists():
        earlier = path.with_name(f"earlier-{path.stem}-{sha256_file(path)[:8]}.json")
        path.replace(earlier)
        if predictions_path(path).exists():
            predictions_path(path).replace(predictions_path(earlier))


def report(record: dict[str, Any], path: Path, folder: Path) -> str:
    """What a run came to: selected step, time and memory, where its files are, what to do next, test accuracy."""
    training, cost, result = record["training"], record["cost"], record["result"]
    memory = f", peak memory {cost['peak_bytes'] / 1e6:,.0f} MB" if cost["peak_bytes"] is not None else ""
    lines = [
        f"  time       {cost['wall_s']:.1f} s of training, {cost['steps_per_s']:.3g} steps/s{memory}",
        f"  record     {path}",
        f"  curves     {folder}: python -m lra tensorboard --runs {folder.parents[3]} --start",
        f"  next       python -m lra table --results {path.parents[4]}",
    ]
    if result is None:
        return "\n".join([*lines, record["status"]])
    step = f"step {training['selected_step']} of {training['steps']}"
    validation = share(result["val_n_correct"], result["n_val"])
    lines.insert(0, f"  selected   {step}, by validation: {validation}")
    lines.insert(3, f"  weights    {folder / WEIGHTS}")
    low, high = wilson(result["n_correct"], result["n_test"])
    floors = ", ".join(f"{name} {100 * floor:.1f}" for name, floor in record["data"]["floors"].items())
    reference = REFERENCE / path.relative_to(path.parents[4])
    line = f"test {share(result['n_correct'], result['n_test'])}, 95% interval [{100 * low:.1f}, {100 * high:.1f}]"
    line += f"; floors: {floors}"
    if reference.exists() and (other := read_record(reference)["result"]):
        line += f"; reference: {share(other['n_correct'], other['n_test'])}"
    return "\n".join([*lines, line])


def share(n_correct: int, n: int) -> str:
    """`45.25% (181/400)`."""
    return f"{100 * n_correct / n:.2f}% ({n_correct}/{n})"


def execution(args: Namespace) -> Where:
    """Device, precision and compilation, checked."""
    set_threads(args.threads)
    device = pick_device(args.device)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if args.debug and distributed.world_size() > 1:  # the first that stops would leave the others waiting
        raise UsageError("--debug looks into one process: leave it out, or torchrun")
    return Where(device, precision, args.compile, args.debug)
