"""What a record is a record of, from its content alone: task, data, recipe, digest, path. No torch."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from lra import registry
from lra.options import UsageError
from lra.records.record import Execution, cell_digest, record_path
from lra.records.schema import Rejected
from tasks.base import Optim, Recipe, Stack
from tasks.store.prepared import SCHEMA as DATA_SCHEMA
from tasks.store.prepared import data_identity


def task_module(record: dict[str, Any]) -> ModuleType:
    """The file of the record's task. Raises Rejected for a task that the suite does not have."""
    try:
        return registry.load_task(record["task"]["name"])
    except UsageError as error:
        raise Rejected(f"task.name: {error}") from None


def recipe(record: dict[str, Any]) -> Recipe:
    """The recipe as run: data from the preset, the rest as recorded. Raises Rejected for an unknown task."""
    return replace(
        task_module(record).RECIPES[record["task"]["preset"]],
        encoder=Stack(**record["model"]["encoder"]),
        train=Optim(**record["training"]["recipe"]),
        budget=record["training"]["budget"],
    )


def manifest(record: dict[str, Any]) -> dict[str, Any]:
    """The part of the data's manifest that a record repeats: enough to resolve a run and to hash the data."""
    task, data = record["task"], record["data"]
    facts = {"schema": DATA_SCHEMA, "task": task["name"], "source": data["source"], "splits": data["splits"]}
    return facts | {k: task[k] for k in ("version", "dataset", "substitute")}


def identity(record: dict[str, Any]) -> Path:
    """The path of a well-formed record under its tree. Raises Rejected.

    data hash = sha256 of the splits' hashes, task, data set, source
    digest    = sha256 of task, data hash, recipe, overrides, validation rule, attention, execution
    """
    task, data, model, training = (record[k] for k in ("task", "data", "model", "training"))
    as_run, data_hash = asdict(recipe(record)), data_identity(manifest(record))
    if data["manifest_sha256"] != data_hash:
        why = "by the task, data set and splits beside it"
        raise Rejected(f"data.manifest_sha256 must be {data_hash}, {why}")
    how, method = (training["overrides"], data["val_rule"]), (model["attention"], model["attention_config"])
    execution = Execution.of(training)
    digest = cell_digest(task["name"], task["version"], data_hash, as_run, *how, *method, execution)
    path = record_path(Path(), task["name"], model["attention"], digest, training["seed"])
    return path.relative_to("records")
