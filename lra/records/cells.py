"""From records to tables: which runs share a row, a column and a cell. No torch."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from lra.options import PRESETS, unknown
from lra.records import measured
from lra.records.markup import flat
from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL, Execution, Report, iterate_records, report_skipped
from lra.records.stats import Uncertain, design_effect, over_seeds, proportion, wilson

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
Row = tuple[int, str, tuple[str, ...]]  # order, attention, what differs from the defaults
Names, Reasons = Sequence[str] | None, Mapping[Path, str] | None
Tables = list["Table"]


def row_name(row: Row) -> str:
    """A row as it is named everywhere: its attention, and what differs from the defaults."""
    _, attention, label = row
    return flat(attention) + (f" [{flat(', '.join(label))}]" if label else "")


@dataclass(frozen=True)
class Column:
    """One task on one data set at one length. Records share a column if their examples and execution are the same."""

    task: str
    substitute: bool
    dataset: str
    version: int
    seq_len: int
    data: str  # sha256 over the content hashes of the splits
    execution: tuple[str, ...] = ()  # words of Execution

    @property
    def order(self) -> tuple:
        """Sort key: the five tasks first, in their usual order; substitutes after the real set."""
        place = TASKS.index(self.task) if self.task in TASKS else len(TASKS)
        return place, *astuple(self)

    @property
    def effect(self) -> float:
        """The design effect of its test examples: n of them tell as much as n / effect independent ones."""
        return design_effect(self.task, self.version, self.dataset)

    @property
    def parts(self) -> list[str]:
        """Task; data set, if its name adds something; length; execution."""
        mark = "substitute: " if self.substitute and "substitute" not in self.dataset.lower() else ""
        datasets = [mark + self.dataset] if mark or self.dataset.lower() != self.task.lower() else []
        return [self.task, *datasets, f"{self.seq_len:,} tokens", *self.execution]


class Entry:
    """What tables, figures and the page read of the record at `path`.
    Raises KeyError, TypeError, ValueError or AttributeError for a record that makes no sense."""

    def __init__(self, path: Path, record: dict[str, Any]):
        task, data, model, training = (record[k] for k in ("task", "data", "model", "training"))
        result, cost, env = record["result"], record["cost"] or {}, record["env"]
        curve = (result or {}).get("curve", ())
        hashes = json.dumps({name: split["sha256"] for name, split in data["splits"].items()}, sort_keys=True)
        overrides = [f"{k}={v}" for k, v in sorted(training["overrides"].items())]
        self.n_test = int((result or {"n_test": data["splits"]["test"]["n"]})["n_test"])
        self.n_correct = int(result["n_correct"]) if record["status"] == "ok" else None  # None: the run failed
        wilson(self.n_correct or 0, self.n_test)  # raises ValueError unless the counts are a proportion
        self.params_ratio, execution = float(model["n_params_ratio_to_softmax"]), Execution.of(training)
        hardware = [cost.get("device"), env.get("gpu"), env.get("cpu"), f"{env.get('threads')} threads"]
        self.path, self.results = path, path.parents[4]  # that holds records/ and labels/
        self.preset = str(task["preset"])
        what = str(task["name"]), bool(task["substitute"]), str(task["dataset"]), int(task["version"])
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()
        self.column = Column(*what, int(task["seq_len"]), sha256, execution.words)
        self.n = self.n_test / self.column.effect  # independent test examples that tell as much
        self.floors = {str(k): float(v) for k, v in data["floors"].items()}
        self.attention = str(model["attention"])
        # label: what differs from the defaults, ("attention.num_features=256",). config: whatever may differ beside it.
        self.label = (*overrides, *([] if data["val_rule"] == "held-out" else [f"val-rule={data['val_rule']}"]))
        self.overrides = " ".join(overrides)
        parts = {"attention": model["attention_config"], "encoder": model["encoder"], "train": training["recipe"]}
        self.config = {k: v for name, part in parts.items() for k, v in _flatten(name, part).items()}
        self.open = task["protocol"] != PROTOCOL or self.params_ratio > MAX_PARAMETER_RATIO
        self.seed = int(training["seed"])
        self.weights = ((result or {}).get("chain") or {}).get("final_sha256")
        # (name, {value: (n_correct, n)}) of test examples that are alike, such as those of as many pairs
        groups = (result or {}).get("groups") or {"by": "", "counts": ()}
        self.groups = str(groups["by"]), {int(value): (int(k), int(n)) for value, k, n in groups["counts"]}
        self.peak_bytes = None if cost.get("peak_bytes") is None else int(cost["peak_bytes"])
        facts = map(str, filter(None, (*hardware, execution.precision, *execution.words)))
        self.machine = ", ".join(dict.fromkeys(facts))  # equal for two runs whose memory may be compared
        self.dirty = bool(record["suite"]["git_dirty"])
        self.status, self.command = str(record["status"]), str(record.get("command", ""))
        self.device = str(cost.get("gpu") or cost.get("device"))
        # (step, validation accuracy)
        self.curve = [(int(step), correct / n) for step, split, _, correct, n in curve if split == "val"]

    @property
    def row(self) -> Row:
        """Key and order of the row: constant, softmax, the others by name; default runs before changed ones."""
        return {"constant": 0, "softmax": 1}.get(self.attention, 2), self.attention, self.label

    @cached_property
    def setting(self) -> tuple:
        """Equal for two runs that differ in their attention alone."""
        shared = {k: v for k, v in self.config.items() if not k.startswith("attention.")}
        return self.column, self.machine, json.dumps(shared, sort_keys=True)


def _flatten(prefix: str, value: Any) -> dict[str, str]:
    """A nested dictionary as {"a.b.c": value}."""
    if not isinstance(value, dict):
        return {prefix: str(value)}
    return {k: v for key, inner in value.items() for k, v in _flatten(f"{prefix}.{key}", inner).items()}


class Cell:
    """The runs of one row in one column, by seed; `ok` are those that ended."""

    def __init__(self, runs: Sequence[Entry]):
        self.runs = runs
        self.seeds = runs[-1].seed + 1  # that there should be: seeds are 0, 1, ..., so the largest tells
        self.ok = [e for e in runs if e.n_correct is not None]
        self.complete = len(self.ok) == self.seeds
        self.dagger = " †" if any(e.open for e in self.ok) else ""  # outside PROTOCOL
        self.accuracies = [e.n_correct / e.n_test for e in self.ok]  # fractions
        self.estimate: Uncertain | None = over_seeds(self.accuracies, self.ok[0].n) if self.ok else None


class Table:
    """All runs of one preset; columns and rows in the order shown.
    speeds: relative to softmax, by digest of the runs, as `bench tasks` measured. averaged: the first column of each of
    the five tasks, real before substitute; none if a task is missing."""

    def __init__(self, preset: str, entries: Sequence[Entry], speeds: dict[str, float]):
        self.preset, self.entries, self.speeds = preset, entries, speeds
        self.columns = sorted({e.column for e in entries}, key=lambda c: c.order)
        self.rows = sorted({e.row for e in entries})
        runs, self._softmax_peaks = defaultdict(list), defaultdict(list)  # bytes of softmax by setting
        for e in sorted(entries, key=lambda e: e.seed):
            runs[e.row, e.column].append(e)
            if e.attention == "softmax" and e.peak_bytes:
                self._softmax_peaks[e.setting].append(e.peak_bytes)
        self.cells: dict[tuple[Row, Column], Cell] = {key: Cell(group) for key, group in runs.items()}
        firsts = [next((c for c in self.columns if c.task == task), None) for task in TASKS]
        self.averaged = [] if None in firsts else firsts

    def cell(self, attention: str, column: Column) -> Cell | None:
        """The cell of an attention's default row."""
        return next((self.cells.get((r, column)) for r in self.rows if r[1:] == (attention, ())), None)

    def whole(self, row: Row, columns: Sequence[Column]) -> list[Cell]:
        """The cells of a row in these columns if all are there, complete and of equally many seeds; else none."""
        cells = [self.cells.get((row, column)) for column in columns]
        return cells if all(c and c.complete for c in cells) and len({c.seeds for c in cells}) == 1 else []

    def efficiency(self, cell: Cell) -> tuple[float | None, float | None]:
        """Speed by `bench tasks` and median peak memory, relative to softmax; None: not measured."""
        runs = [e for e in cell.ok if e.peak_bytes and e.setting in self._softmax_peaks]
        memory = [e.peak_bytes / median(self._softmax_peaks[e.setting]) for e in runs]
        return self.speeds.get(cell.runs[0].path.parent.name), median(memory) if memory else None

    def first(self, column: Column) -> Entry:
        """Any entry of a column, for what its entries share: floors and test set."""
        return next(e for e in self.entries if e.column == column)

    def floor(self, column: Column, kind: str) -> tuple[str, Uncertain] | None:
        """Name and interval of a floor: majority, shortcut (the highest of the others) or highest (of all)."""
        floors = self.first(column).floors
        if kind != "highest":
            floors = {n: v for n, v in floors.items() if (n == "majority") == (kind == "majority")}
        name = max(sorted(floors), key=floors.__getitem__, default=None)
        return None if name is None else (name, proportion(floors[name], self.first(column).n))


def build(results: Path, presets: Names = None, report: Report = report_skipped, left_out: Reasons = None) -> Tables:
    """Tables of all records under a results folder, one per preset: paper ones, small, smoke, others by name.
    Reported and left out, a line each: files that are no records, copies of one run, `left_out` (path: reason). Raises
    UsageError for a preset without records."""
    runs, left_out = defaultdict(list), left_out or {}
    for path, record in iterate_records(results, report):
        try:
            if path in left_out:
                report(f"{path}: {left_out[path]}")
            else:
                e = Entry(path, record)
                runs[e.preset, e.column, e.row, json.dumps(e.config, sort_keys=True), e.seed].append(e)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            report(f"{path} is not a usable record: {type(error).__name__} {error}")
    by_preset = defaultdict(list)
    for copies in runs.values():
        by_preset[copies[0].preset] += copies if len(copies) == 1 else []
        if len(copies) > 1:
            report(f"{' and '.join(str(e.path) for e in copies)} record the same run: none of them is shown")
    for preset in presets or ():
        if by_preset and preset not in by_preset:
            raise unknown("preset of the records", preset, by_preset)
    order = [p for p in reversed(PRESETS) if p in by_preset] + sorted(by_preset.keys() - set(PRESETS))
    chosen = [p for p in order if not presets or p in presets]
    return [Table(p, _tell_apart(by_preset[p]), measured.speeds(results, p)) for p in chosen]


def _tell_apart(entries: list[Entry]) -> list[Entry]:
    """Label runs of one name in one column that differ in configuration by the settings that differ."""
    groups = defaultdict(list)
    for e in entries:
        groups[e.row, e.column].append(e)
    for group in groups.values():
        keys = sorted({k for e in group for k in e.config})
        differ = [k for k in keys if len({e.config.get(k) for e in group}) > 1]
        for e in group:
            e.label += tuple(f"{k}={e.config.get(k)}" for k in differ)
    return entries
