"""From records to the cells of tables: which runs share a row, a column and a cell. No torch."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lra.options import PRESETS, unknown
from lra.records import measured
from lra.records.entries import TASKS, Column, Entry, read_entry
from lra.records.record import iterate_records, report_skipped
from lra.records.stats import Estimate, over_seeds


@dataclass(frozen=True)
class Cell:
    """The runs of one row in one column; `seeds` is how many the column's fullest default row has."""

    runs: tuple[Entry, ...]
    seeds: int

    @property
    def ok(self) -> list[Entry]:
        """Runs that ended."""
        return [e for e in self.runs if e.n_correct is not None]

    @property
    def complete(self) -> bool:
        """Whether no seed is missing or failed."""
        return len(self.ok) == len(self.runs) >= self.seeds

    @property
    def accuracies(self) -> list[float]:
        """Fractions, one per run that ended."""
        return [e.n_correct / e.n_test for e in self.ok]

    @property
    def estimate(self) -> Estimate | None:
        """Mean accuracy with its interval; None if every run failed."""
        return over_seeds(self.accuracies, self.ok[0].n_test) if self.ok else None


@dataclass(frozen=True)
class Table:
    """All runs of one preset."""

    preset: str
    entries: tuple[Entry, ...]
    speeds: dict[str, float]  # relative to softmax, by digest of the runs: what `bench tasks` measured

    @cached_property
    def columns(self) -> list[Column]:
        """In the order shown."""
        return sorted({e.column for e in self.entries}, key=lambda c: c.order)

    @cached_property
    def rows(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """Row keys in the order shown."""
        return sorted({e.row for e in self.entries})

    @cached_property
    def cells(self) -> dict[tuple, Cell]:
        """(row, column) to cell, for the cells that have runs."""
        runs = defaultdict(list)
        for e in sorted(self.entries, key=lambda e: e.seed):
            runs[e.row, e.column].append(e)
        seeds: dict[Column, int] = defaultdict(int)
        for ((*_, label), column), found in runs.items():
            if not label:
                seeds[column] = max(seeds[column], len(found))
        return {(row, column): Cell(tuple(found), seeds[column]) for (row, column), found in runs.items()}

    def cell(self, attention: str, column: Column) -> Cell | None:
        """The cell of an attention's default row."""
        return next((self.cells.get((r, column)) for r in self.rows if r[1:] == (attention, ())), None)

    def efficiency(self, cell: Cell) -> tuple[float | None, float | None]:
        """Speed, by `bench tasks`, and peak memory, median over seeds, relative to softmax; None where nothing was
        measured."""
        peaks = [(e.peak_bytes, self._softmax_peaks.get(e.setting)) for e in cell.ok]
        memory = [mine / softmax for mine, softmax in peaks if mine is not None and softmax]
        return self.speeds.get(cell.runs[0].digest), statistics.median(memory) if memory else None

    @cached_property
    def _softmax_peaks(self) -> dict[tuple, float]:
        """Median peak memory of softmax by setting."""
        peaks = defaultdict(list)
        for e in self.entries:
            if e.attention == "softmax" and e.peak_bytes:
                peaks[e.setting].append(e.peak_bytes)
        return {setting: statistics.median(found) for setting, found in peaks.items()}

    def first(self, column: Column) -> Entry:
        """Any entry of a column, for what its entries share: floors and test set."""
        return next(e for e in self.entries if e.column == column)

    @cached_property
    def averaged(self) -> list[Column]:
        """The average's columns: the first of each of the five tasks, real before substitute; else none."""
        found = [next((c for c in self.columns if c.task == task), None) for task in TASKS]
        return [] if None in found else found


def build(
    results: Path, presets: Sequence[str] | None = None, report: Callable[[str], None] = report_skipped
) -> list[Table]:
    """Tables of all records under a results folder, one per preset: smoke, small, paper, then others by name.

    A file that is no record of this schema and every copy of a run recorded twice are left out and reported, a
    line each. Raises UsageError for a preset without records.
    """
    runs = defaultdict(list)
    for path, record in iterate_records(results, report):
        try:
            e = read_entry(path, record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            report(f"{path} is not a usable record: {type(error).__name__} {error}")
            continue
        runs[e.preset, e.column, e.row, json.dumps(e.config, sort_keys=True), e.seed].append(e)
    for copies in runs.values():
        if len(copies) > 1:
            report(f"{' and '.join(str(e.path) for e in copies)} record the same run: none of them is shown")
    entries = [copies[0] for copies in runs.values() if len(copies) == 1]
    known = {e.preset for e in entries}
    for preset in presets or ():
        if known and preset not in known:
            raise unknown("preset of the records", preset, known)
    # What says most comes first, smoke runs last but for presets that nobody knows.
    order = [p for p in reversed(PRESETS) if p in known] + sorted(known - set(PRESETS))
    chosen = [p for p in order if not presets or p in presets]
    told = {p: tuple(_tell_apart([e for e in entries if e.preset == p])) for p in chosen}
    return [Table(p, found, measured.speeds(results, p)) for p, found in told.items()]


def _tell_apart(entries: list[Entry]) -> list[Entry]:
    """Label runs of one name in one column that differ in configuration by the settings that differ."""
    groups = defaultdict(list)
    for e in entries:
        groups[e.row, e.column].append(e)
    told = []
    for group in groups.values():
        keys = sorted({k for e in group for k in e.config})
        differ = [k for k in keys if len({e.config.get(k) for e in group}) > 1]
        told += [replace(e, label=(*e.label, *(f"{k}={e.config.get(k)}" for k in differ))) for e in group]
    return told
