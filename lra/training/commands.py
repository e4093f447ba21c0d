"""`train`, from its options to its output."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import torch

from lra import registry
from lra.machine import pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import Execution, predictions_path, read_record, record_path
from lra.training import config, distributed
from lra.training.report import header, missing_seeds, outcome, report
from lra.training.train import Interrupted, check_unfinished, run_folder
from lra.training.train import train as train_run
from lra.training.trainer import Where
from tasks.store.files import sha256_file
from tasks.store.prepared import load


def train(args: Namespace) -> int:
    """`train`: resolve, train, record. Exit code 1 when the run failed, 85 when it was stopped with a checkpoint."""
    overrides = config.overrides(args.sets, args.steps)
    where = execution(args)
    task = registry.load_task(args.task)
    config.load_preset(task, args.preset)
    prepared = load(args.data / args.task / args.preset)
    cell = args.task, args.preset, args.attention, args.seed
    how = Execution(where.precision, where.compiled, distributed.world_size())
    run = config.resolve(*cell, prepared.manifest, overrides, args.val_rule, how)
    path = record_path(args.results, args.task, args.attention, run.digest, args.seed)
    state, edited = config.standing(run, path)
    if state == "changed" and not args.again:
        raise UsageError(edited)
    if state == "missing" or args.again:
        check_unfinished(args.runs, run)
    optim = run.recipe.train
    with distributed.process_group(where.device, optim.batch, optim.accumulate) as (world, device):
        where = replace(where, world=world, device=device)
        if world.is_main:
            threads = torch.get_num_threads()
            print(f"{header(run)}\n  runs on    {device}, {where.precision}, {threads} threads")
            if note := missing_seeds(path, args.seed):
                print(note, file=sys.stderr)
            if args.again:
                set_aside(path)
        world.barrier()
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


def execution(args: Namespace) -> Where:
    """Device, precision and compilation, checked."""
    set_threads(args.threads)
    device = pick_device(args.device)
    if args.debug and distributed.world_size() > 1:  # the first that stops would leave the others waiting
        raise UsageError("--debug looks into one process: leave it out, or torchrun")
    return Where(device, precision(args), args.compile, args.debug)


def precision(args: Namespace) -> str:
    """--precision; auto is bf16 on cuda, else fp32."""
    auto = "bf16" if pick_device(args.device).type == "cuda" else "fp32"
    return auto if args.precision == "auto" else args.precision
