"""`prepare` and `train`, from their options to their output."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

from lra import registry
from lra.machine import pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import Execution, predictions_path, read_record, record_path
from lra.training import config, distributed
from lra.training.evaluate import Where
from lra.training.report import data, header, missing_seeds, outcome, report
from lra.training.train import Interrupted, check_unfinished, run_folder
from lra.training.train import train as train_run
from tasks.store.files import sha256_file
from tasks.store.prepare import prepare as prepare_task
from tasks.store.prepared import load


def prepare(args: Namespace) -> None:
    """`prepare`: build or reuse, and say what is there."""
    task = registry.load_task(args.task)
    config.load_preset(task, args.preset)
    if args.export and not hasattr(task, "export"):
        raise UsageError(f"--export {args.export}: {args.task} has no published format to write")
    origin = {"source": args.source, "data_dir": args.data_dir, "out": args.data}
    workers = args.workers or os.cpu_count() or 1
    prepared, reused = prepare_task(task, args.preset, workers=workers, again=args.again, **origin)
    done = "reused" if reused else "prepared"
    print(f"{args.data / args.task / args.preset}: {done}\n{data(prepared.manifest)}")
    if args.export:
        print("exported: " + ", ".join(map(str, task.export(prepared.splits, args.export))))


def train(args: Namespace) -> int:
    """`train`: resolve, train, record. Exit code 1 when the run failed, 85 when it was stopped with a checkpoint."""
    set_threads(args.threads)
    device, how = pick_device(args.device), Execution(precision(args), args.compile, distributed.world_size())
    overrides = config.overrides(args.sets, args.steps)
    config.load_preset(registry.load_task(args.task), args.preset)
    prepared = load(args.data / args.task / args.preset)
    cell = args.task, args.preset, args.attention, args.seed
    run = config.resolve(*cell, prepared.manifest, overrides, args.val_rule, how)
    path = record_path(args.results, args.task, args.attention, run.digest, args.seed)
    state, edited = config.standing(run, path)
    if state == "changed" and not args.again:
        raise UsageError(edited)
    if state == "missing" or args.again:
        check_unfinished(args.runs, run)
    optim = run.recipe.train
    with distributed.process_group(device, optim.batch, optim.accumulate) as (world, device):
        if world.is_main:
            print(f"{header(run)}\n  runs on    {device}, {how.precision}, {torch.get_num_threads()} threads")
            if note := missing_seeds(path, args.seed):
                print(note, file=sys.stderr)
            if args.again:
                set_aside(path)
        world.barrier()
        where = Where(device, how.precision, how.compiled, world)
        try:
            _, new = train_run(run, prepared, results=args.results, runs=args.runs, where=where)
        except Interrupted as stopped:
            if world.is_main:
                print(stopped, file=sys.stderr)
            return STOPPED
    if not world.is_main:
        return 0
    record = read_record(path)
    if new:
        print(report(record, path, run_folder(args.runs, run)))
    else:
        print(f"already done: {path}; --again trains the cell anew\n{outcome(record, path)}")
    return int(record["status"] != "ok")


def set_aside(path: Path) -> None:
    """Rename a record and its predictions to earlier-seed<k>-<first 8 digits of its sha256>: no table reads them."""
    if path.exists():
        earlier = path.with_name(f"earlier-{path.stem}-{sha256_file(path)[:8]}.json")
        path.replace(earlier)
        if predictions_path(path).exists():
            predictions_path(path).replace(predictions_path(earlier))


def precision(args: Namespace) -> str:
    """--precision; auto is bf16 on cuda, else fp32."""
    auto = "bf16" if pick_device(args.device).type == "cuda" else "fp32"
    return auto if args.precision == "auto" else args.precision
