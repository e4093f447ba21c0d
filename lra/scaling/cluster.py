"""Cells of a grid as jobs of a cluster, through submitit: `sweep --executor slurm`, or local and debug to try it.

A job runs the same `train` command as anybody would. Told to leave (preemption, time limit), it has that command
save its state, and is queued again; the command then goes on from there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lra.options import BUSY, STOPPED, UsageError
from lra.scaling.jobs import POLL, Cell, Outcome, last_line

PIN = "submitit==1.5.4"
QUIET = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler signals every process of a job; these are for submitit
WATCH = 2.0  # seconds between looks at jobs of a cluster


@dataclass
class Job:
    """A `train` command and the log it appends to; what submitit pickles and calls."""

    command: list[str]
    log: str
    pid: int | None = None

    def __call__(self) -> int:
        """Run it; returns its exit code, so that a cell that fails is no error of the scheduler's."""
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a") as log:
            process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=_deaf
            )
        self.pid = process.pid
        while process.poll() is None:
            time.sleep(POLL)
        return process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit in a signal handler: the state is saved when this returns; the job to queue again."""
        from submitit.helpers import DelayedSubmission

        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            # Without taking its exit code: the loop above, which this handler interrupted, may be about to.
            while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                time.sleep(POLL)
        return DelayedSubmission(Job(self.command, self.log))


def _deaf() -> None:
    for number in QUIET:
        signal.signal(number, signal.SIG_IGN)  # kept across exec


def executor(args: Namespace, jobs: int, threads: int) -> Any:
    """submitit's, with `--slurm KEY=VALUE` as its own parameters (partition, account, time, gpus_per_node ...).

    Raises UsageError where submitit is missing or refuses a parameter.
    """
    try:
        import submitit
    except ImportError:
        raise UsageError(f"--executor {args.executor} needs submitit: pip install {PIN}") from None
    parameters: dict[str, Any] = {"cpus_per_task": threads, "timeout_min": args.job_minutes}
    if args.executor == "slurm":
        parameters |= {"slurm_array_parallelism": jobs}
        for pair in args.slurm:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"--slurm takes KEY=VALUE; got {pair!r}")
            parameters[f"slurm_{key}"] = int(value) if value.isdigit() else value
    try:
        made = submitit.AutoExecutor(folder=args.runs / "submitit", cluster=args.executor)
        made.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UsageError(f"--executor {args.executor}: {str(error).splitlines()[0]}") from error
    return made


def run(cells: list[Cell], commands: list[list[str]], args: Namespace, jobs: int, threads: int) -> Outcome:
    """Submit all (slurm: as one array; else `jobs` at a time) and wait. Jobs outlive an interruption of this."""
    made, outcome = executor(args, jobs, threads), Outcome()
    waiting, running = list(zip(cells, commands, strict=True)), []
    at_once = len(waiting) if args.executor == "slurm" else jobs
    while waiting or running:
        now = [waiting.pop(0) for _ in range(min(at_once - len(running), len(waiting)))]
        if now:
            with made.batch():
                queued = [made.submit(Job(command, str(cell.log))) for cell, command in now]
            running += zip((cell for cell, _ in now), queued, strict=True)
        for cell, job in list(running):
            if job.done():
                running.remove((cell, job))
                settle(outcome, cell, job)
                done = len(cells) - len(waiting) - len(running)
                print(f"[{done}/{len(cells)}]  {cell}: {last_line(cell.log)}", flush=True)
        time.sleep(POLL if args.executor != "slurm" else WATCH)
    return outcome


def settle(outcome: Outcome, cell: Cell, job: Any) -> None:
    """Take note of a job that ended."""
    error = job.exception()
    code = 1 if error else job.result()
    if code == BUSY:
        outcome.held.append(cell)
    elif code == STOPPED:
        outcome.stopped = True
    elif code:
        why = str(error).strip().splitlines()[-1] if error else last_line(cell.log)
        outcome.failed.append((cell, f"{why} (whole log: {cell.log}, job {job.job_id})"))
