"""`prepare` and `train`, from their options to their output."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import replace

from lra import registry
from lra.machine import pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import read_record
from lra.training import config, distributed
from lra.training.train import Interrupted
from lra.training.train import train as train_run
from lra.training.trainer import Where
from tasks.store.prepared import Prepared, load
from tasks.store.prepared import prepare as prepare_task


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
    optim = run.recipe.train
    with distributed.join(where.device, optim.batch, optim.accumulate) as (world, device):
        where = replace(where, world=world, device=device)
        world.main_only(print, run.summary())
        try:
            path, new = train_run(run, prepared, results=args.results, runs=args.runs, where=where)
        except Interrupted as stopped:
            world.main_only(print, stopped, file=sys.stderr)
            return STOPPED
    if world.rank:
        return 0
    record = read_record(path)
    if not new:
        print(f"already done: {path}")
    elif record["result"]:
        r = record["result"]
        print(f"test {100 * r['n_correct'] / r['n_test']:.2f}% ({r['n_correct']}/{r['n_test']}): {path}")
    else:
        print(f"{record['status']}: {path}")
    return 0


def execution(args: Namespace) -> Where:
    """Device, precision and compilation, checked."""
    set_threads(args.threads)
    device = pick_device(args.device)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if args.debug and distributed.processes() > 1:  # the first that stops would leave the others waiting
        raise UsageError("--debug looks into one process: leave it out, or torchrun")
    return Where(device, precision, args.compile, args.debug)
