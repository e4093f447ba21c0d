"""What a record is a record of, and V1 without torch: does it agree with itself, its predictions and the suite?

Nothing is written.
"""

import math
import re
from argparse import Namespace
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lra import registry
from lra.options import UsageError
from lra.records.record import (
    Execution,
    cell_digest,
    predictions_path,
    pretraining_steps,
    read_labels,
    read_predictions,
    record_path,
)
from lra.records.schema import Rejected, Unchecked
from tasks.base import SourceError
from tasks.store.prepared import SCHEMA as DATA_SCHEMA
from tasks.store.prepared import Prepared, data_identity, load

LEAK = 6  # standard errors by which test accuracy may exceed that of the selected validation


@dataclass(frozen=True)
class Places:
    """Where a verification finds what a record does not hold. `trust`: outside code may be imported."""

    results: Path
    data: Path = Path("data")
    runs: Path = Path("runs")
    device: str = "cpu"
    trust: bool = False


def places(args: Namespace) -> Places:
    """From the options of a command."""
    return Places(args.results, args.data, args.runs, args.device, args.trust)


def task_module(record: dict[str, Any]) -> ModuleType:
    """The file of the record's task. Raises Rejected for a task that the suite does not have."""
    try:
        return registry.load_task(record["task"]["name"])
    except UsageError as error:
        raise Rejected(f"task.name: {error}") from None


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
    recipe = asdict(task_module(record).RECIPES[task["preset"]])
    recipe |= {"encoder": model["encoder"], "train": training["recipe"], "budget": training["budget"]}
    if data["manifest_sha256"] != (data_hash := data_identity(manifest(record))):
        raise Rejected(f"data.manifest_sha256 must be {data_hash}, by the task, data set and splits beside it")
    how, method = (training["overrides"], data["val_rule"]), (model["attention"], model["attention_config"])
    digest = cell_digest(task["name"], task["version"], data_hash, recipe, *how, *method, Execution.of(training))
    return record_path(Path(), task["name"], model["attention"], digest, training["seed"]).relative_to("records")


def consistent(path: Path, record: dict[str, Any], places: Places) -> None:
    """Sizes, clocks, curve and counts. Raises Rejected or UsageError for a contradiction, Unchecked without labels."""
    _data(record)
    _clocks(record)
    if record["result"]:
        _curve(record)
        _selected(record)
        _counts(path, record, places)
    else:
        _failure(path, record)


def same(field: str, value: Any, expected: Any, why: str) -> None:
    """Raise Rejected unless a field has the value that `why` gives it."""
    if value != expected:
        raise Rejected(f"{field} is {value}, and {why} makes it {expected}")


def _data(record: dict[str, Any]) -> None:
    """Task, sizes and seeds are those of the suite."""
    task, training = record["task"], record["training"]
    module = task_module(record)
    size = module.RECIPES[task["preset"]].data
    source, name, substitute = record["data"]["source"], task["dataset"], task["substitute"]
    if not module.META.declares(source, name, substitute):
        declared = f"task {task['name']} declares none of that name for source {source}"
        raise Rejected(f"task.dataset is {name!r}, task.substitute {str(substitute).lower()}, and {declared}")
    if len({split["sha256"] for split in record["data"]["splits"].values()}) < 3:
        raise Rejected("data.splits: two of them have the same sha256")
    same("task.version", task["version"], module.META.version, "the suite")
    same("task.seq_len", task["seq_len"], size.seq_len, "the preset")
    for name, split in record["data"]["splits"].items():
        most = getattr(size, name)
        if most and split["n"] > most:
            raise Rejected(f"data.splits.{name}.n is {split['n']}, and the preset has at most {most}")
        if not split["mean_length"] <= split["max_length"] <= size.seq_len:
            raise Rejected(f"data.splits.{name}: mean_length <= max_length <= {size.seq_len} does not hold")
    ended, planned = training["steps"], training["recipe"]["steps"]
    if (record["result"] and ended != planned) or ended > planned:
        raise Rejected(f"training.steps is {ended}, and the recipe has {planned}")
    batch, parts = training["recipe"]["batch"], training["recipe"]["accumulate"] * training["world_size"]
    if not parts or batch % parts:
        raise Rejected(f"training.world_size is {training['world_size']}: batch {batch} does not split so")
    if (record["cost"]["device"] == "cuda") != (record["env"]["gpu"] is not None):
        raise Rejected(f"env.gpu is {record['env']['gpu']}, and cost.device is {record['cost']['device']}")
    same("training.examples_seen", training["examples_seen"], ended * batch, "steps times batch")


def _clocks(record: dict[str, Any]) -> None:
    """Times and rates agree within their rounding."""
    cost, training = record["cost"], record["training"]
    low, high = max(cost["wall_s"] - 6e-4, 1e-9), cost["wall_s"] + 6e-4
    if not training["steps"] / high - 1e-4 <= cost["steps_per_s"] <= training["steps"] / low + 1e-4:
        raise Rejected(f"cost.steps_per_s {cost['steps_per_s']} is not steps / wall_s {cost['wall_s']}")
    towers = task_module(record).META.towers
    longest = towers * max(s["max_length"] for s in record["data"]["splits"].values())
    examples, rate = training["examples_seen"], cost["tokens_per_s"]
    if rate * high < 0.99 * towers * examples or rate * low > 1.01 * examples * longest + 1:
        raise Rejected(f"cost.tokens_per_s times wall_s is not between 1 and {longest} tokens per example")
    try:
        started, ended = (datetime.fromisoformat(record[k]) for k in ("started", "ended"))
    except ValueError as error:
        raise Rejected(f"started or ended is no time: {error}") from None
    # A resumed run began before its last process: its steps may have taken longer than that.
    spent = (ended - started).total_seconds()
    if spent < 0 or (not training["resumed"] and cost["wall_s"] > spent + 1):
        raise Rejected(f"cost.wall_s {cost['wall_s']} does not fit between started and ended")


def _curve(record: dict[str, Any]) -> None:
    """Validations at the steps of the recipe, up to the end of the run, and every count possible beside its loss."""
    training, splits = record["training"], record["data"]["splits"]
    recipe, curve, turn = training["recipe"], (record["result"] or record["failure"])["curve"], _turn(training)
    n_val = splits["test" if record["data"]["val_rule"] == "legacy" else "val"]["n"]
    end, every = training["steps"], max(1, recipe["eval_every"])
    # Two entries for each validation; a failed run may lack those of its last.
    most = 2 * ((end - 1) // every - turn // every + 1) if end > turn else 0
    if not (most if record["result"] else most - 2) <= len(curve) <= most:
        raise Rejected(f"result.curve has {len(curve)} entries, not two for each validation of the recipe")
    expected, before = [], turn
    for step in (*range(turn // every * every + every, end, every), end)[: most // 2]:
        expected += [[step, "train", (step - before) * recipe["batch"]], [step, "val", n_val]]
        before = step
    if [[step, split, n] for step, split, _, _, n in curve] != expected[: len(curve)]:
        raise Rejected("result.curve: its steps, splits and sizes are not those of the recipe")
    for step, split, loss, correct, n in curve:
        # The true class of a wrong answer has a probability of at most 1/2.
        if loss is None or correct > n or (n - correct) * math.log(2) > n * loss * (1 + 1e-6):
            raise Rejected(f"result.curve: {split} at step {step}: no model has {correct} of {n} right at loss {loss}")


def _turn(training: dict[str, Any]) -> int:
    """The step at which labels begin. Before it, a loss at each step of the curve, and one there."""
    steps, every = training["recipe"]["steps"], max(1, training["recipe"]["eval_every"])
    try:
        turn = pretraining_steps(training["overrides"], steps)
    except (ValueError, OverflowError):
        turn = -1
    if not 0 <= turn < max(1, steps):
        raise Rejected(f"training.overrides: pretrain.share {training['overrides']['pretrain.share']} is no share")
    losses, end = training.get("pretrain", []), min(turn, training["steps"])
    due = [*range(every, end, every), *([turn] * (end == turn > 0))]
    # A failed run may have ended at one of them, before it was written.
    if [step for step, _ in losses] not in (due, due[:-1] if training["steps"] in due else due):
        raise Rejected("training.pretrain: its steps are not those of the recipe")
    return turn


def _selected(record: dict[str, Any]) -> None:
    """The selected step is the first of the best; test accuracy does not exceed its validation beyond chance."""
    result, training = record["result"], record["training"]
    best = max((e for e in result["curve"] if e[1] == "val"), key=lambda e: e[3])  # the first of equals
    same("result.n_val", result["n_val"], best[4], "the split")
    same("training.selected_step", training["selected_step"], best[0], "the best validation of the curve")
    same("result.val_n_correct", result["val_n_correct"], best[3], "the best validation of the curve")
    (a, n), (b, m) = ((result[k], result[size]) for k, size in (("n_correct", "n_test"), ("val_n_correct", "n_val")))
    share = min((a + b) / (n + m), 1.0)
    if a / n - b / m > LEAK * math.sqrt(share * (1 - share) * (1 / n + 1 / m)):
        raise Rejected(f"test accuracy {a}/{n} is more than {LEAK} standard errors above validation {b}/{m}")


def _failure(path: Path, record: dict[str, Any]) -> None:
    """A failure carries its curve and its probe, and its reason a step that the run had reached."""
    if predictions_path(path).exists():
        raise Rejected("status is not ok, and yet there are predictions")
    if not record.get("failure"):
        raise Rejected("a failed run without its curve and probe: nothing shows that it ran")
    _curve(record)
    steps = record["training"]["steps"]
    last = max((point[0] for point in record["failure"]["curve"]), default=0)
    named = re.search(r"at step (\d+)", record["status"])
    if named and not last <= int(named[1]) <= steps + 1:
        raise Rejected(f"status names step {named[1]}, and the run went from its validation at {last} to {steps}")


def _counts(path: Path, record: dict[str, Any], places: Places) -> None:
    """Correct answers counted again, and the majority floor found among the labels' shares."""
    result, split = record["result"], record["data"]["splits"]["test"]
    same("result.n_test", result["n_test"], split["n"], "the test split")
    predictions = np.frombuffer(read_predictions(path, record), np.uint8)
    same("the number of predictions", len(predictions), split["n"], "the test split")
    classes = task_module(record).META.classes
    if predictions.max() >= classes:
        raise Rejected(f"a prediction is class {predictions.max()}, and the task has {classes}")
    labels = np.frombuffer(labels_of(record, places), np.uint8)
    right = int((predictions == labels).sum())
    same("result.n_correct", result["n_correct"], right, "counting predictions against labels")
    if groups := result.get("groups"):
        values, rights, sizes = zip(*groups["counts"], strict=True)
        same("the values of result.groups", list(values), sorted(set(values)), "their order")
        same("the sums of result.groups", [sum(rights), sum(sizes)], [right, split["n"]], "the test split")
    shares = np.bincount(labels, minlength=classes) / len(labels)
    majority = record["data"]["floors"].get("majority", math.nan)
    if not np.isclose(shares, majority, rtol=0, atol=1e-9).any():
        raise Rejected(f"data.floors.majority {majority} is the share of no class among the test labels")


def labels_of(record: dict[str, Any], places: Places) -> bytes:
    """The test labels by their hash: those kept with the results, else those of the prepared data."""
    split = record["data"]["splits"]["test"]
    try:
        return read_labels(places.results, split["labels_sha256"], split["n"])
    except UsageError as error:
        try:
            return prepared_data(record, places).splits["test"].labels.tobytes()
        except (SourceError, Unchecked):
            raise Unchecked(f"{error}; with the data prepared in --data they would be found") from None


def prepared_data(record: dict[str, Any], places: Places) -> Prepared:
    """The data of a record, from --data. Raises SourceError when absent, Unchecked when they are others."""
    folder = places.data / record["task"]["name"] / record["task"]["preset"]
    prepared = load(folder)
    if data_identity(prepared.manifest) != record["data"]["manifest_sha256"]:
        raise Unchecked(f"{folder} is not the data of the record: prepare those, or give another --data")
    return prepared
