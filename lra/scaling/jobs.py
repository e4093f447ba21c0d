"""Runs of a grid as processes of this machine: which of them fit side by side, and how long the rest will take.

And as jobs of a cluster, through submitit: `sweep --executor slurm`, or local and debug to try it. A job runs the same
`train` command as anybody would. When the scheduler tells it to leave (preemption, time limit), the command saves its
state, the job is queued again, and the command goes on from there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from lra.machine import StopSignals, peak_resident
from lra.options import BUSY, STOPPED, UsageError
from lra.scaling.calibration import Machine
from lra.scaling.cost import duration, foresee
from lra.training.config import Run
from tasks.store.prepared import Prepared

POLL = 0.1  # seconds between looks at the processes
WATCH = 2.0  # seconds between looks at jobs of a cluster
PIN = "submitit==1.5.4"
QUIET = (signal.SIGUSR1, signal.SIGUSR2)  # a scheduler signals every process of a job; these are for submitit
LINE = {"disable": None, "leave": False, "mininterval": 1, "miniters": 0, "dynamic_ncols": True}


def available_memory() -> int | None:
    """Bytes that processes may still take: of the machine, or of the control group where that is less."""
    try:
        facts = Path("/proc/meminfo").read_text("utf-8").splitlines()
        available = next(int(f.split()[1]) * 1024 for f in facts if f.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (Path("/sys/fs/cgroup", f"memory.{name}").read_text("utf-8") for name in ("max", "current"))
        return min(available, int(limit) - int(used))
    except (OSError, ValueError):  # no such group, or no limit: "max"
        return available


@dataclass(frozen=True)
class Job:
    """One run of the grid."""

    run: Run
    record: Path
    log: Path  # what its process prints
    prepared: Prepared | None = None

    def __str__(self) -> str:
        return f"{self.run.meta.name} {self.run.attention} seed {self.run.seed}"

    @property
    def kind(self) -> Path:
        """Jobs that differ in the seed alone cost the same; their records share a folder."""
        return self.record.parent


@dataclass
class Outcome:
    """What became of the jobs."""

    failed: list[tuple[Job, str]] = field(default_factory=list)  # and why
    held: list[Job] = field(default_factory=list)  # another process is at them
    stopped: bool = False

    def note(self, job: Job, code: int, why: str) -> None:
        """The exit code of a job that ended; `why` it failed, if it did."""
        if code == STOPPED:
            self.stopped = True
        elif code == BUSY:
            self.held.append(job)
        elif code:
            self.failed.append((job, f"{why} (whole log: {job.log})"))


class Need(NamedTuple):
    """What one kind of job takes; 0: not known."""

    seconds: float = 0.0
    bytes: int = 0


def needs(jobs: list[Job], machine: Machine | None) -> dict[Path, Need]:
    """The need of each kind of job, as predicted for `machine`; what a job took replaces it."""
    predicted = dict.fromkeys((job.kind for job in jobs), Need())
    kinds = {job.kind: job for job in jobs} if machine else {}
    for kind, job in tqdm(kinds.items(), desc="predicting", disable=None, leave=False, delay=2):
        if p := foresee(job.run, machine, job.prepared):
            predicted[kind] = Need(p.seconds, machine.start_bytes + p.bytes)
    return predicted


class Running:
    """A job at work, with its seconds and its peak bytes so far."""

    def __init__(self, job: Job, process: subprocess.Popen):
        self.job, self.process, self.begun, self.seconds, self.peak = job, process, time.monotonic(), 0.0, 0

    def look(self) -> int | None:
        """Measure it; returns the exit code once it has ended."""
        self.seconds = time.monotonic() - self.begun
        self.peak = max(self.peak, peak_resident(self.process.pid))
        return self.process.poll()


class Pool:
    """Jobs waiting, running and done, within `at_once` processes, `memory` bytes and `limit` seconds (None: no limit).
    Order: first seeds first, of one seed the longest first, so that no long job is left to run alone at the end."""

    def __init__(self, jobs: list[Job], at_once: int, memory: int | None, needs: dict, limit: float | None = None):
        self.total, self.at_once, self.memory, self.needs = len(jobs), at_once, memory or sys.maxsize, needs
        self.waiting = sorted(jobs, key=lambda job: (job.run.seed, -needs[job.kind].seconds))
        self.running: list[Running] = []
        self.outcome, self.begun = Outcome(), time.monotonic()
        self.end = self.begun + (limit or float("inf"))

    def run(self, start: Callable[[Job], subprocess.Popen]) -> Outcome:
        """Until all have ended, or a signal, a stopped job or the limit ends it; no process outlives it."""
        if any(need.seconds for need in self.needs.values()):
            total = sum(map(self.seconds_of, self.waiting))
            largest = max(self.needs[job.kind].bytes for job in self.waiting)
            line = f"predicted: {duration(total / self.at_once)} with {self.at_once} at a time"
            print(f"{line} ({duration(total)} one by one), up to {largest / 1e9:.1f} GB each", flush=True)
        with StopSignals() as stop, tqdm(bar_format="{desc}", **LINE) as line:
            try:
                while (self.waiting or self.running) and not self.outcome.stopped:
                    while not stop.requested and (job := self.next()):
                        self.running.append(Running(job, start(job)))
                    time.sleep(POLL)
                    for running in list(self.running):
                        if (code := running.look()) is not None:
                            self.settle(running, code)
                    self.outcome.stopped |= stop.requested or time.monotonic() > self.end
                    names = ", ".join(str(running.job) for running in self.running)
                    line.set_description_str(f"{self.progress()}, running: {names}", refresh=False)
                    line.update(0)
            finally:
                for running in self.running:
                    running.process.terminate()
                for running in self.running:
                    running.process.wait()
        return self.outcome

    def next(self) -> Job | None:
        """Take the first waiting job that fits beside the running ones; one that can never fit fails."""
        used = sum(max(running.peak, self.bytes_of(running.job)) for running in self.running)
        for job in list(self.waiting) if len(self.running) < self.at_once else ():
            need = self.bytes_of(job)
            if need > self.memory:
                self.waiting.remove(job)
                why = f"needs about {need / 1e9:.1f} GB, --memory allows {self.memory / 1e9:.1f}"
                why += f": --set train.accumulate={smaller(job.run, need / self.memory)} needs less"
                self.outcome.failed.append((job, why))
            elif used + need <= self.memory or not self.running:
                self.waiting.remove(job)
                return job
        return None

    def bytes_of(self, job: Job) -> int:
        """The memory that a job is given: its need, or its share of the budget where the need is not known."""
        return self.needs[job.kind].bytes or self.memory // self.at_once

    def seconds_of(self, job: Job) -> float:
        """The need of a job, or the mean of the known ones."""
        known = [need.seconds for need in self.needs.values() if need.seconds]
        return self.needs[job.kind].seconds or sum(known) / max(1, len(known))

    def settle(self, running: Running, code: int) -> None:
        """Note that a job ended; what it took counts for its other seeds."""
        self.running.remove(running)
        job, words = running.job, last_line(running.job.log)
        self.outcome.note(job, code, words)
        if not code:
            self.needs[job.kind] = Need(running.seconds, running.peak)
        tqdm.write(f"{self.progress()}  {job}: {words}")
        sys.stdout.flush()

    def progress(self) -> str:
        """`[3/8] 1.3 min spent, about 2.2 min left`."""
        done = self.total - len(self.waiting) - len(self.running)
        left = sum(map(self.seconds_of, self.waiting))
        left += sum(max(0.0, self.seconds_of(running.job) - running.seconds) for running in self.running)
        about = f", about {duration(left / min(self.at_once, self.total))} left" if left else ""
        return f"[{done}/{self.total}] {duration(time.monotonic() - self.begun)} spent{about}"


def smaller(run: Run, factor: float) -> int:
    """The train.accumulate that makes micro-batches at least `factor` times smaller, or as small as they get."""
    batch = run.recipe.train.batch
    least = min(batch, run.recipe.train.accumulate * factor)
    return next(parts for parts in range(1, batch + 1) if batch % parts == 0 and parts >= least)


def last_line(log: Path) -> str:
    """The last line that a process printed."""
    lines = log.read_text("utf-8", "replace").splitlines()
    return next(filter(str.strip, reversed(lines)), "no output")


# On a cluster


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


def submit(jobs: list[Job], commands: list[list[str]], args: Namespace, at_once: int, threads: int) -> Outcome:
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
