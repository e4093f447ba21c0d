"""Runs of a grid as jobs of a cluster, through submitit: `sweep --executor slurm`, or local and debug to try it.

A job runs the same `train` command as anybody would. When the scheduler tells it to leave (preemption, time limit), the
command saves its state, the job is queued again, and the command goes on from there.
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

from lra.options import UsageError
from lra.scaling.jobs import POLL, Job, Outcome, last_line

PIN = "submitit==1.5.4"
QUIET = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler signals every process of a job; these are for submitit
WATCH = 2.0  # seconds between looks at jobs of a cluster


@dataclass
class Command:
    """A `train` command and the log that it appends to; what submitit pickles and calls."""

    words: list[str]
    log: str
    pid: int | None = None

    def __call__(self) -> int:
        """Run it; returns its exit code, so that a run that fails is no error of the scheduler's."""
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen(self.words, **streams, preexec_fn=_deaf)
        self.pid = process.pid
        while process.poll() is None:
            time.sleep(POLL)
        return process.returncode

    def checkpoint(self) -> Any:
        """Called by submitit in a signal handler. Saves the state; returns the job to queue again."""
        from submitit.helpers import DelayedSubmission

        if self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)
            # The exit code stays for the loop above, which this handler interrupted and which may be about to take it.
            while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
                time.sleep(POLL)
        return DelayedSubmission(Command(self.words, self.log))


def _deaf() -> None:
    for number in QUIET:
        signal.signal(number, signal.SIG_IGN)  # kept across exec


def executor(args: Namespace, at_once: int, threads: int) -> Any:
    """submitit's, with `--slurm KEY=VALUE` as its own parameters (partition, account, time, gpus_per_node ...). Raises
    UsageError where submitit is missing or refuses a parameter."""
    try:
        import submitit
    except ImportError:
        raise UsageError(f"--executor {args.executor} needs submitit: pip install {PIN}") from None
    parameters: dict[str, Any] = {"cpus_per_task": threads, "timeout_min": args.job_minutes}
    if args.executor == "slurm":
        parameters["slurm_array_parallelism"] = at_once
        for pair in args.slurm:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UsageError(f"--slurm takes KEY=VALUE; got {pair!r}")
            parameters[f"slurm_{key}"] = int(value) if value.isdigit() else value
    try:
        scheduler = submitit.AutoExecutor(folder=args.runs / "submitit", cluster=args.executor)
        scheduler.update_parameters(**parameters)
    except (RuntimeError, NameError, TypeError, ValueError) as error:
        raise UsageError(f"--executor {args.executor}: {str(error).splitlines()[0]}") from error
    return scheduler


def run(jobs: list[Job], commands: list[list[str]], args: Namespace, at_once: int, threads: int) -> Outcome:
    """Submit all (slurm: as one array; else `at_once` at a time) and wait. Jobs outlive an interruption of this."""
    scheduler, outcome = executor(args, at_once, threads), Outcome()
    waiting, queued = list(zip(jobs, commands, strict=True)), []
    at_once = len(waiting) if args.executor == "slurm" else at_once
    while waiting or queued:
        now = [waiting.pop(0) for _ in range(min(at_once - len(queued), len(waiting)))]
        if now:
            with scheduler.batch():
                handles = [scheduler.submit(Command(words, str(job.log))) for job, words in now]
            queued += zip((job for job, _ in now), handles, strict=True)
        for job, handle in list(queued):
            if handle.done():
                queued.remove((job, handle))
                error = handle.exception()
                why = str(error).strip().splitlines()[-1] if error else last_line(job.log)
                outcome.note(job, 1 if error else handle.result(), f"{why}, job {handle.job_id}")
                done = len(jobs) - len(waiting) - len(queued)
                print(f"[{done}/{len(jobs)}]  {job}: {last_line(job.log)}", flush=True)
        time.sleep(POLL if args.executor != "slurm" else WATCH)
    return outcome
