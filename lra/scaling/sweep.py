"""A grid of runs: every missing (task, attention, seed), each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from itertools import product

from lra import registry
from lra.machine import cores, pick_device, set_threads
from lra.options import BUSY, STOPPED, UsageError
from lra.records.record import Execution, record_path
from lra.scaling.calibration import Machine
from lra.scaling.jobs import Job, Outcome, Pool, available_memory, needs, submit
from lra.training import config
from lra.training.commands import precision
from lra.training.train import run_folder
from tasks.base import SourceError
from tasks.store.prepare import prepare


def sweep(args: Namespace) -> int:
    """`sweep`: prepare the data, list what is missing, run it, say what happened. Records that exist are left alone:
    the same command continues after an interruption. A job that fails, or a task without data, does not stop the
    others. Exit code: 0, all is there; 1, something failed; 75, another process is at some of it; 85, interrupted or
    out of time."""
    if args.time_limit and args.executor != "here":
        raise UsageError("--time-limit is for --executor here; --job-minutes limits a job")
    if args.executor == "slurm" and args.precision == "auto":
        raise UsageError("--executor slurm takes --precision fp32 or bf16: auto asks a device that is not known yet")
    if args.executor == "here":
        set_threads(args.threads)
    jobs, unprepared = grid(args)
    cells = {"missing": [], "done": [], "failed": [], "changed": []}
    for job in jobs:
        state, why = config.standing(job.run, job.record)
        cells["missing" if state == "changed" and args.again else state].append((job, why))
    missing, changed = [job for job, _ in cells["missing"]], cells["changed"]
    done, edited = len(jobs) - len(missing) - len(changed), f", {len(changed)} changed" if changed else ""
    print(f"{len(jobs)} cells, {done} done, {len(missing)} to run{edited}")
    if not missing and not unprepared and not changed:
        print("nothing to do: every record is there")
    outcome = execute(missing, args) if missing else Outcome()
    failed = cells["failed"] + outcome.failed + [(name, f"no data: {error}") for name, error in unprepared.items()]
    problems = [("changed", *cell) for cell in changed] + [("failed", *cell) for cell in failed]
    for kind, what, why in problems:
        print(f"{kind}: {what}: {why}", file=sys.stderr)
    for job in outcome.held:
        print(f"left alone: {job}: another process is at it", file=sys.stderr)
    if outcome.stopped:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return STOPPED
    return 1 if problems else BUSY if outcome.held else 0


def execute(jobs: list[Job], args: Namespace) -> Outcome:
    """Run the jobs here or on a cluster."""
    cpu = pick_device(args.device).type == "cpu"
    at_once = min(args.jobs or (cores() if cpu else 1), len(jobs))
    threads = args.threads or max(1, cores() // at_once)
    if args.executor != "here":
        commands = [command(job.run, args, threads) for job in jobs]
        return submit(jobs, commands, args, at_once, threads)
    machine = Machine.read(args.results) if cpu else None  # other devices are not calibrated
    limit = args.time_limit * 60 if args.time_limit else None
    pool = Pool(jobs, at_once, args.memory or available_memory(), needs(jobs, machine), limit)
    return pool.run(lambda job: start(job, args, threads))


def grid(args: Namespace) -> tuple[list[Job], dict[str, Exception]]:
    """Every job asked for, seeds outermost so that a table is complete as early as possible; and the tasks whose
    data cannot be had. Raises the first of their errors when no other task is left."""
    tasks = registry.choose("task", args.tasks, registry.task_names())
    attentions = registry.choose("attention", args.attentions, registry.attention_names())
    overrides, how = config.overrides(args.sets, args.steps), Execution(precision(args), args.compile)
    for name in tasks:
        config.load_preset(registry.load_task(name), args.preset)
    places = {"out": args.data, "source": args.source, "data_dir": args.data_dir}
    available, unprepared, jobs = {}, {}, []
    for name in tasks:
        try:
            prepared, reused = prepare(registry.load_task(name), args.preset, **places, workers=cores())
        except (SourceError, OSError) as error:
            unprepared[name] = error
            continue
        available[name], m = prepared, prepared.manifest
        sizes = ", ".join(f"{split} {s['n']:,}" for split, s in m["splits"].items())
        state = "reused" if reused else "prepared"
        print(f"{name}: data {state}: {m['dataset']} ({m['source']}): {sizes}", flush=True)
    if not available:
        raise next(iter(unprepared.values()))
    for seed, (name, prepared), attention in product(range(args.seeds), available.items(), attentions):
        run = config.resolve(name, args.preset, attention, seed, prepared.manifest, overrides, args.val_rule, how)
        record = record_path(args.results, name, attention, run.digest, seed)
        jobs.append(Job(run, record, run_folder(args.runs, run) / "train.log", prepared))
    return jobs, unprepared


def command(run: config.Run, args: Namespace, threads: int) -> list[str]:
    """The `train` command that a user would type for a run."""
    words = [sys.executable, "-m", "lra", "train", run.meta.name, "--attention", run.attention]
    words += ["--preset", run.preset, "--seed", str(run.seed), "--val-rule", run.val_rule]
    words += [word for k, v in run.overrides.items() for word in ("--set", f"{k}={v}")]
    words += ["--device", args.device, "--precision", run.execution.precision, "--threads", str(threads)]
    words += [f"--{switch}" for switch in ("compile", "again") if getattr(args, switch)]
    return words + ["--data", str(args.data), "--results", str(args.results), "--runs", str(args.runs)]


def start(job: Job, args: Namespace, threads: int) -> subprocess.Popen:
    """The process of one job, its output at the end of the job's log."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as log:
        how = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        return subprocess.Popen(command(job.run, args, threads), **how)
