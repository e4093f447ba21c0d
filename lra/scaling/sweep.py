"""A grid of runs: every missing (task, attention, seed), each in its own process."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace

from lra import registry
from lra.machine import available_memory, cores, pick_device
from lra.options import BUSY, STOPPED, UsageError
from lra.records.record import record_path
from lra.scaling import cluster, cost
from lra.scaling.jobs import Cell, Costs, Grid, Outcome
from lra.training import config
from lra.training.prepare import describe
from lra.training.train import run_folder
from tasks.base import SourceError
from tasks.store.prepared import Prepared, prepare


def sweep(args: Namespace) -> int:
    """`sweep`: prepare the data, list what is missing, run it, say what happened.

    Records that exist are left alone, so the same command continues after an interruption. A cell that fails, or
    a task without data, does not stop the others; the exit code is then 1. It is 75 when cells were left to
    another process, and 85 when the sweep was interrupted or reached its time limit.
    """
    if args.time_limit and args.executor != "here":
        raise UsageError("--time-limit is for --executor here; --job-minutes limits a job")
    cells, unprepared = grid(args)
    missing, changed = to_run(cells, args.again)
    done = len(cells) - len(missing) - len(changed)
    print(
        f"{len(cells)} cells, {done} done, {len(missing)} to run"
        + f", {len(changed)} changed" * bool(changed)
    )
    outcome = Outcome()
    if missing:
        cpu = pick_device(args.device).type == "cpu"
        jobs = min(args.jobs or (cores() if cpu else 1), len(missing))
        threads = args.threads or max(1, cores() // jobs)
        memory = args.memory or available_memory()
        if args.executor == "here":
            machine = cost.machine(args.results, pick_device(args.device))
            limit = args.time_limit * 60 if args.time_limit else None
            running = Grid(missing, jobs, memory, Costs(cells), machine, limit)
            outcome = running.run(lambda cell: start(cell, args, threads))
        else:
            commands = [command(cell.run, args, threads) for cell in missing]
            outcome = cluster.run(missing, commands, args, jobs, threads)
    elif not unprepared and not changed:
        print("nothing to do: every record is there")
    for line in changed:
        print(f"changed: {line}", file=sys.stderr)
    for cell, why in outcome.failed:
        print(f"failed: {cell}: {why}", file=sys.stderr)
    for name, error in unprepared.items():
        print(f"failed: {name}: no data: {error}", file=sys.stderr)
    for cell in outcome.held:
        print(f"left alone: {cell}: another process is at it", file=sys.stderr)
    if outcome.stopped:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return STOPPED
    return 1 if outcome.failed or unprepared or changed else BUSY if outcome.held else 0


def to_run(cells: list[Cell], again: bool) -> tuple[list[Cell], list[str]]:
    """Cells without a record, with `again` those of an edited source too; and else a line for each of the latter."""
    missing, changed = [], []
    for cell in cells:
        state, why = config.standing(cell.run, cell.record)
        if state == "changed" and not again:
            changed.append(f"{cell}: {why}")
        elif state != "done":
            missing.append(cell)
    return missing, changed


def grid(args: Namespace) -> tuple[list[Cell], dict[str, Exception]]:
    """Every cell asked for, seeds outermost so that a table is complete as early as possible; and the tasks whose
    data cannot be had. Raises the first of their errors when that leaves no cell."""
    tasks = registry.choose("task", args.tasks, registry.task_names())
    attentions = registry.choose("attention", args.attentions, registry.attention_names())
    overrides = config.overrides(args.sets, args.steps)
    for name in tasks:
        config.load_preset(registry.load_task(name), args.preset)
    prepared, unprepared = {}, {}
    for name in tasks:
        try:
            prepared[name] = data(name, args)
        except (SourceError, OSError) as error:
            unprepared[name] = error
    if not prepared:
        raise next(iter(unprepared.values()))
    cells = []
    for seed in range(args.seeds):
        for name, found in prepared.items():
            for attention in attentions:
                run = config.resolve(
                    name, args.preset, attention, seed, found.manifest, overrides, args.val_rule
                )
                path = record_path(args.results, name, attention, run.digest, seed)
                cells.append(Cell(run, path, run_folder(args.runs, run) / "train.log", found))
    return cells, unprepared


def data(name: str, args: Namespace) -> Prepared:
    """Prepare one task and say what there is."""
    prepared, reused = prepare(
        registry.load_task(name),
        args.preset,
        out=args.data,
        source=args.source,
        data_dir=args.data_dir,
        workers=cores(),
    )
    print(f"{name}: data {'reused' if reused else 'prepared'}\n{describe(prepared)}", flush=True)
    return prepared


def command(run: config.Run, args: Namespace, threads: int) -> list[str]:
    """The `train` command that a user would type for a run."""
    words = [sys.executable, "-m", "lra", "train", run.meta.name, "--attention", run.attention]
    words += ["--preset", run.preset, "--seed", str(run.seed), "--val-rule", run.val_rule]
    words += [word for k, v in run.overrides.items() for word in ("--set", f"{k}={v}")]
    words += ["--device", args.device, "--precision", args.precision, "--threads", str(threads)]
    words += ["--compile"] if args.compile else []
    words += ["--debug"] if args.debug else []
    words += ["--again"] if args.again else []
    return words + ["--data", str(args.data), "--results", str(args.results), "--runs", str(args.runs)]


def start(cell: Cell, args: Namespace, threads: int) -> subprocess.Popen:
    """The process of one cell, its output at the end of the cell's log."""
    cell.log.parent.mkdir(parents=True, exist_ok=True)
    with open(cell.log, "a") as log:
        return subprocess.Popen(
            command(cell.run, args, threads), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
