"""From one record to what tables, figures and the page read of it. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL
from lra.records.stats import wilson

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
    """What tables, figures and the page read of one record."""

    path: Path
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
    peak_bytes: int | None
    machine: str
    dirty: bool
    status: str
    command: str
    protocol: str
    device: str
    curve: tuple[tuple[int, float], ...]  # (step, validation accuracy)
    predictions_sha256: str | None
    labels_sha256: str | None  # of the test split

    @property
    def digest(self) -> str:
        """The first 16 digits of that of its configuration, which name its folder."""
        return self.path.parent.name

    @property
    def results(self) -> Path:
        """The folder that holds records/ and labels/."""
        return self.path.parents[4]

    @property
    def row(self) -> tuple[int, str, tuple[str, ...]]:
        """Key and order of rows: constant, softmax, the others by name; changed runs after default ones."""
        return {"constant": 0, "softmax": 1}.get(self.attention, 2), self.attention, self.label

    @cached_property
    def setting(self) -> tuple:
        """What two runs that differ only in their attention share: their memory may be compared."""
        same = {k: v for k, v in self.config.items() if not k.startswith("attention.")}
        return self.column, self.machine, json.dumps(same, sort_keys=True)


def read_entry(path: Path, record: dict[str, Any]) -> Entry:
    """The entry of the record at `path`. Raises KeyError, TypeError, ValueError or
    AttributeError for a record that makes no sense."""
    task, data, model, training = (record[k] for k in ("task", "data", "model", "training"))
    result, cost = record["result"], record["cost"] or {}
    hashes = json.dumps({name: split["sha256"] for name, split in data["splits"].items()}, sort_keys=True)
    overrides = [f"{k}={v}" for k, v in sorted(training["overrides"].items())]
    n_test = int((result or {"n_test": data["splits"]["test"]["n"]})["n_test"])
    n_correct = int(result["n_correct"]) if record["status"] == "ok" else None
    wilson(n_correct or 0, n_test)  # raises ValueError unless the counts are a proportion
    ratio = float(model["n_params_ratio_to_softmax"])
    return Entry(
        path=path,
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
        peak_bytes=None if cost.get("peak_bytes") is None else int(cost["peak_bytes"]),
        machine=_machine(cost, record["env"], training),
        dirty=bool(record["suite"]["git_dirty"]),
        status=str(record["status"]),
        command=str(record.get("command", "")),
        protocol=str(task["protocol"]),
        device=str(cost.get("gpu") or cost.get("device")),
        curve=_curve(result),
        predictions_sha256=result and result.get("predictions_sha256"),
        labels_sha256=data["splits"]["test"].get("labels_sha256"),
    )


def _curve(result: dict[str, Any] | None) -> tuple[tuple[int, float], ...]:
    points = (result or {}).get("curve", ())
    return tuple((int(step), correct / n) for step, split, _, correct, n in points if split == "val")


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
