"""Cells of a grid as processes of this machine: how many fit at once, where each stands, how long it will take."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lra.machine import StopSignals, peak_resident
from lra.options import BUSY, STOPPED, UsageError
from lra.records.record import read_record
from lra.scaling.calibration import Machine
from lra.scaling.cost import duration, foresee, smaller
from lra.training.config import Run
from tasks.store.prepared import Prepared

POLL = 0.1  # seconds between looks at the processes
REDRAW = 1.0  # seconds between two states of the status line


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    run: Run
    record: Path
    log: Path  # what the process prints
    prepared: Prepared | None = None

    def __str__(self) -> str:
        return f"{self.run.meta.name} {self.run.attention} seed {self.run.seed}"

    @property
    def kind(self) -> Path:
        """Cells that differ in the seed alone cost the same; their records share a folder."""
        return self.record.parent


@dataclass
class Outcome:
    """What became of the cells that were to run."""

    failed: list[tuple[Cell, str]] = field(default_factory=list)  # and why
    held: list[Cell] = field(default_factory=list)  # another process is at them
    stopped: bool = False


class Costs:
    """Seconds and bytes of cells, from the records of other seeds and from what this sweep measures itself; for
    kinds without either, what is predicted."""

    def __init__(self, cells: list[Cell]):
        self.seconds: dict[Path, float] = {}
        self.bytes: dict[Path, int] = {}
        self.expected: dict[Path, tuple[float, int]] = {}
        base = peak_resident("self") or 0  # a record's peak is above what its process held before training
        for kind in {cell.kind for cell in cells}:
            for path in kind.glob("seed*.json"):
                try:
                    record = read_record(path)
                    cost, (begun, ended) = record["cost"], (record["started"], record["ended"])
                    whole = datetime.fromisoformat(ended) - datetime.fromisoformat(begun)
                    self.add(kind, max(cost["wall_s"], whole.total_seconds()), 0)
                    if cost["device"] == "cpu" and cost["peak_bytes"]:
                        self.add(kind, 0.0, base + cost["peak_bytes"])
                except (UsageError, KeyError, TypeError, ValueError):
                    continue  # `table` and `leaderboard verify` say what is wrong with it

    def add(self, kind: Path, seconds: float, peak: int) -> None:
        """A measurement; the largest counts, and 0 is none."""
        self.seconds[kind] = max(seconds, self.seconds.get(kind, 0.0))
        self.bytes[kind] = max(peak, self.bytes.get(kind, 0))

    def expect(self, kind: Path, seconds: float, peak: int) -> None:
        """A prediction, for as long as nothing is measured."""
        self.expected[kind] = seconds, peak

    def need(self, cell: Cell) -> int:
        """Bytes of memory; 0 where nobody knows."""
        return self.bytes.get(cell.kind, 0) or self.expected.get(cell.kind, (0.0, 0))[1]

    def duration(self, cell: Cell) -> float:
        """Seconds; where its own kind was not measured, as predicted by what predictions were worth so far, else
        the mean of the kinds of its task, else of all; else 0."""
        if cell.kind in self.expected and not self.seconds.get(cell.kind):
            both = [(s, self.expected[k][0]) for k, s in self.seconds.items() if s and k in self.expected]
            worth = sum(s for s, _ in both) / sum(e for _, e in both) if both else 1.0
            return worth * self.expected[cell.kind][0]
        for alike in ([cell.kind], [k for k in self.seconds if k.parent.parent == cell.kind.parent.parent]):
            if known := [s for k in alike if (s := self.seconds.get(k))]:
                return sum(known) / len(known)
        known = [s for s in self.seconds.values() if s]
        return sum(known) / len(known) if known else 0.0


@dataclass
class Job:
    """One running cell."""

    cell: Cell
    process: subprocess.Popen
    begun: float
    peak: int = 0  # bytes, so far

    def look(self) -> int | None:
        """Measure it; returns the exit code once it has ended."""
        self.peak = max(self.peak, peak_resident(self.process.pid) or 0)
        return self.process.poll()

    @property
    def seconds(self) -> float:
        """So far."""
        return time.monotonic() - self.begun


class Grid:
    """Cells waiting, running and done, within `jobs` processes, `memory` bytes and `limit` seconds (None: no limit).

    Where there is a `machine` to predict with, a cell waits for its prediction, and cells that have theirs run.
    """

    def __init__(
        self,
        cells: list[Cell],
        jobs: int,
        memory: int | None,
        costs: Costs,
        machine: Machine | None = None,
        limit: float | None = None,
    ):
        self.cells, self.waiting, self.running = cells, list(cells), []
        self.machine, self.unforeseen = machine, {c.kind: c for c in reversed(cells)} if machine else {}
        self.jobs, self.memory, self.costs = jobs, memory, costs
        self.outcome, self.begun = Outcome(), time.monotonic()
        self.end = self.begun + limit if limit else float("inf")
        self.status = Status()

    def run(self, start: Callable[[Cell], subprocess.Popen]) -> Outcome:
        """Until all have ended, or a signal, a stopped cell or the limit ends it; no process outlives it."""
        with StopSignals() as stop:
            try:
                while (self.waiting or self.running) and not self.outcome.stopped:
                    if self.unforeseen:
                        self.foresee()
                    else:
                        time.sleep(POLL)
                    while not stop.requested and (cell := self.next()):
                        self.running.append(Job(cell, start(cell), time.monotonic()))
                    if not self.running and not self.waiting:
                        break
                    for job in list(self.running):
                        if (code := job.look()) is not None:
                            self.settle(job, code)
                    self.outcome.stopped |= stop.requested or time.monotonic() > self.end
                    self.status.draw(self)
            finally:
                self.status.clear()
                for job in self.running:
                    job.process.terminate()
                for job in self.running:
                    job.process.wait()
        return self.outcome

    def foresee(self) -> None:
        """Predict the next kind of cell; after the last, say what all will take."""
        kind, cell = self.unforeseen.popitem()
        if found := foresee(cell.run, self.machine, cell.prepared):
            self.costs.expect(kind, found.seconds, self.machine.start_bytes + found.bytes)
        if self.costs.expected and not self.unforeseen:
            self.status.say(self.forecast())

    def forecast(self) -> str:
        """`predicted: 1.5 min with 2 at a time (3.0 min one by one), up to 0.4 GB each`."""
        known = [self.costs.expected[c.kind] for c in self.cells if c.kind in self.costs.expected]
        total, largest = sum(seconds for seconds, _ in known), max(peak for _, peak in known)
        together = f"{duration(total / self.jobs)} with {self.jobs} at a time ({duration(total)} one by one)"
        return f"predicted: {together}, up to {largest / 1e9:.1f} GB each"

    def next(self) -> Cell | None:
        """Take a waiting cell that fits beside the running ones, of the first seeds the longest, lest a long one
        is left to run alone at the end; one that cannot fit at all fails."""
        if len(self.running) == self.jobs:
            return None
        ready = [cell for cell in self.waiting if cell.kind not in self.unforeseen]
        ready.sort(key=lambda cell: (cell.run.seed, -self.costs.duration(cell)))
        if self.memory is None and ready:
            self.waiting.remove(ready[0])
            return ready[0]
        used = sum(max(job.peak, self.need(job.cell)) for job in self.running)
        for cell in ready:
            need = self.need(cell)
            if need > self.memory:
                self.waiting.remove(cell)
                why = f"needs about {need / 1e9:.1f} GB, --memory allows {self.memory / 1e9:.1f}"
                why += f": --set train.accumulate={smaller(cell.run, need / self.memory)} needs less"
                self.outcome.failed.append((cell, why))
            elif used + need <= self.memory or not self.running:
                self.waiting.remove(cell)
                return cell
        return None

    def need(self, cell: Cell) -> int:
        """Bytes a cell is given: what its kind was seen to take, else its share of the budget."""
        return self.costs.need(cell) or self.memory // self.jobs

    def settle(self, job: Job, code: int) -> None:
        """Take note of a process that ended."""
        self.running.remove(job)
        cell, said = job.cell, last_line(job.cell.log)
        if code == STOPPED:
            self.outcome.stopped = True
        elif code == BUSY:
            self.outcome.held.append(cell)
        elif code:
            self.outcome.failed.append((cell, f"{said} (whole log: {cell.log})"))
        else:
            self.costs.add(cell.kind, job.seconds, job.peak)
        self.status.say(f"{self.progress()}  {cell}: {said}")

    def progress(self) -> str:
        """`[3/8] 1:20 spent, about 2:10 left`."""
        done = len(self.cells) - len(self.waiting) - len(self.running)
        left = sum(self.costs.duration(cell) for cell in self.waiting)
        left += sum(max(0.0, self.costs.duration(job.cell) - job.seconds) for job in self.running)
        about = f", about {clock(left / min(self.jobs, len(self.cells)))} left" if left else ""
        return f"[{done}/{len(self.cells)}] {clock(time.monotonic() - self.begun)} spent{about}"


class Status:
    """One line redrawn on a terminal; elsewhere nothing but the lines that are said."""

    def __init__(self):
        self.live, self.drawn = sys.stdout.isatty(), float("-inf")

    def draw(self, grid: Grid) -> None:
        """What is running now, once in REDRAW seconds."""
        if self.live and time.monotonic() - self.drawn > REDRAW:
            self.drawn = time.monotonic()
            names = ", ".join(str(job.cell) for job in grid.running)
            failed = f", {len(grid.outcome.failed)} failed" if grid.outcome.failed else ""
            line = f"{grid.progress()}{failed}, {len(grid.running)} running: {names}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="", flush=True)

    def clear(self) -> None:
        """Take the line away."""
        if self.live:
            print("\r\x1b[K", end="", flush=True)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.clear()
        print(line, flush=True)
        self.drawn = float("-inf")


def last_line(log: Path) -> str:
    """The last line a process printed."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def clock(seconds: float) -> str:
    """90.4 -> "1:30"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
