"""Cells of a grid as processes of this machine: how many fit, where each stands, how long it will take."""

from __future__ import annotations

import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lra.config import Run
from lra.machine import StopSignals, available_memory, resident
from lra.options import BUSY, STOPPED
from lra.record import iterate_records

POLL = 0.1  # seconds between looks at the processes
REDRAW = 1.0  # seconds between two states of the status line


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    run: Run
    record: Path
    log: Path  # what the process prints

    def __str__(self) -> str:
        return f"{self.run.meta.name} {self.run.attention} seed {self.run.seed}"

    @property
    def kind(self) -> tuple[str, str, str]:
        """What cells of equal cost share."""
        return self.run.meta.name, self.run.preset, self.run.attention


@dataclass
class Outcome:
    """What became of the cells that were to run."""

    failed: list[tuple[Cell, str]] = field(default_factory=list)  # and why
    held: list[Cell] = field(default_factory=list)  # another process is at them
    stopped: bool = False


class Costs:
    """Seconds and bytes of a cell: as measured in earlier records or by this sweep, else None.

    Bytes are what the process holds at its peak; a record's are those above what it held before training, which
    is about what this process holds now.
    """

    def __init__(self, results: Path):
        self.seconds: dict[tuple, float] = {}
        self.bytes: dict[tuple, int] = {}
        base = resident()
        for _, record in iterate_records(results, report=lambda line: None):
            try:
                task, cost = record["task"], record["cost"]
                kind = task["name"], task["preset"], record["model"]["attention"]
                self.seconds[kind] = max(cost["wall_s"], self.seconds.get(kind, 0.0))
                if cost["device"] == "cpu" and cost["peak_bytes"] is not None:
                    self.bytes[kind] = max(base + cost["peak_bytes"], self.bytes.get(kind, 0))
            except (KeyError, TypeError):
                continue  # a record that is not sound tells nothing

    def need(self, cell: Cell) -> int | None:
        """Bytes of host memory."""
        return self.bytes.get(cell.kind)

    def left(self, cells: list[Cell]) -> float | None:
        """Seconds of all these cells, one after another; a kind that is not known takes the mean of the others."""
        known = [s for c in cells if (s := self.seconds.get(c.kind)) is not None]
        if not known:
            known = list(self.seconds.values())
            return sum(known) / len(known) * len(cells) if known else None
        return sum(known) / len(known) * len(cells)
