"""From records to the cells of tables: which runs share a row, a column and a cell. No torch."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lra.options import unknown
from lra.record import MAX_PARAMETER_RATIO, PRESETS, PROTOCOL, iterate_records, report_skipped
from lra.stats import Estimate, over_seeds, wilson

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")


@dataclass(frozen=True)
class Column:
    """One task on one data set at one length: only records of the very same examples share it."""

    task: str
    substitute: bool
    dataset: str
    version: int
    seq_len: int
    data: str  # sha256 over the content hashes of the splits

    @property
    def order(self) -> tuple:
        """The five tasks first, in their usual order; substitutes after the real set."""
        place = TASKS.index(self.task) if self.task in TASKS else len(TASKS)
        return place, self.task, self.substitute, self.dataset, self.version, self.seq_len, self.data

    @property
    def parts(self) -> list[str]:
        """Task, data set where its name adds something, length."""
        dataset = self.dataset
        if self.substitute and "substitute" not in dataset.lower():
            dataset = f"substitute: {dataset}"
        shown = [] if dataset.lower() == self.task.lower() else [dataset]
        return [self.task, *shown, f"{self.seq_len:,} tokens"]


@dataclass(frozen=True)
class Entry:
    """What the tables read of one record."""

    preset: str
    column: Column
    floors: dict[str, float]
    attention: str
    label: tuple[str, ...]  # what differs from the defaults: ("attention.num_features=256",)
    overrides: str
    config: dict[str, str]  # flat: every setting that may differ between runs of one name
    open: bool  # outside PROTOCOL
    seed: int
    n_correct: int | None  # None: failed
    n_test: int
    params_ratio: float
    step_time_ratio: float | None
    peak_bytes: int | None
    machine: str
    dirty: bool
    status: str
    command: str
    path: Path
    predictions_sha256: str | None
    labels_sha256: str | None  # of the test split

    @property
    def results(self) -> Path:
        """The folder that holds records/ and labels/."""
        return self.path.parents[4]

    @property
    def row(self) -> tuple[int, str, tuple[str, ...]]:
        """Key and order of rows: constant, softmax, the others by name; changed runs after default ones."""
        return {"constant": 0, "softmax": 1}.get(self.attention, 2), self.attention, self.label

    def beside(self, other: Entry) -> bool:
        """Whether two runs differ in nothing that costs memory but their attention."""
        mine, theirs = (
            (e.column, e.machine, {k: v for k, v in e.config.items() if not k.startswith("attention.")})
            for e in (self, other)
        )
        return mine == theirs


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
            e = _entry(path, record)
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
    order = [p for p in PRESETS if p in known] + sorted(known - set(PRESETS))
    chosen = [p for p in order if not presets or p in presets]
    return [Table(p, tuple(_tell_apart([e for e in entries if e.preset == p]))) for p in chosen]


def _entry(path: Path, record: dict[str, Any]) -> Entry:
    task, data, model, training = (record[k] for k in ("task", "data", "model", "training"))
    result, cost = record["result"], record["cost"] or {}
    hashes = json.dumps({name: split["sha256"] for name, split in data["splits"].items()}, sort_keys=True)
    overrides = [f"{k}={v}" for k, v in sorted(training["overrides"].items())]
    n_test = int((result or {"n_test": data["splits"]["test"]["n"]})["n_test"])
    n_correct = int(result["n_correct"]) if record["status"] == "ok" else None
    wilson(n_correct or 0, n_test)  # raises ValueError unless the counts are a proportion
    ratio = float(model["n_params_ratio_to_softmax"])
    pairs = cost.get("softmax_same_machine")
    return Entry(
        preset=str(task["preset"]),
        column=Column(
            task=str(task["name"]),
            substitute=bool(task["substitute"]),
            dataset=str(task["dataset"]),
            version=int(task["version"]),
            seq_len=int(task["seq_len"]),
            data=hashlib.sha256(hashes.encode()).hexdigest(),
        ),
        floors={str(k): float(v) for k, v in data["floors"].items()},
        attention=str(model["attention"]),
        label=(*overrides, *([] if data["val_rule"] == "held-out" else [f"val-rule={data['val_rule']}"])),
        overrides=" ".join(overrides),
        config=dict(
            [
                *_flat("attention", model["attention_config"]),
                *_flat("encoder", model["encoder"]),
                *_flat("train", training["recipe"]),
            ]
        ),
        open=task["protocol"] != PROTOCOL or ratio > MAX_PARAMETER_RATIO,
        seed=int(training["seed"]),
        n_correct=n_correct,
        n_test=n_test,
        params_ratio=ratio,
        step_time_ratio=float(pairs["step_time_ratio"]) if pairs else None,
        peak_bytes=None if cost.get("peak_bytes") is None else int(cost["peak_bytes"]),
        machine=_machine(cost, record["env"], training),
        dirty=bool(record["suite"]["git_dirty"]),
        status=str(record["status"]),
        command=str(record.get("command", "")),
        path=path,
        predictions_sha256=result and result.get("predictions_sha256"),
        labels_sha256=data["splits"]["test"].get("labels_sha256"),
    )


def _machine(cost: dict[str, Any], env: dict[str, Any], training: dict[str, Any]) -> str:
    """What two runs must share for their memory to be compared."""
    processes = training["world_size"]
    parts = (
        cost.get("device"),
        env.get("gpu"),
        env.get("cpu"),
        f"{env.get('threads')} threads",
        training["precision"],
        "compiled" if training["compile"] else None,
        f"{processes} processes" if processes > 1 else None,
    )
    return ", ".join(str(p) for p in parts if p)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """A nested dictionary as ("a.b.c", value) pairs."""
    if not isinstance(value, dict):
        yield prefix, str(value)
        return
    for key, inner in value.items():
        yield from _flat(f"{prefix}.{key}", inner)


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
