"""What takes the run itself to check: its model (V1), its first losses (V2), its saved weights (V3).

A record names its attention. A name of the suite is built; `package.module:Class` is code of its author,
imported only where the user said --trust.
"""

import math
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lra.leaderboard.consistency import Places, manifest, places, prepared_data, same
from lra.machine import environment, pick_device
from lra.options import UsageError
from lra.records import columns
from lra.records.record import Execution, read_predictions, read_record, record_path
from lra.records.schema import Rejected, Unchecked, check
from lra.registry import load_task, task_names
from lra.training import checkpoint, config
from lra.training.commands import share
from lra.training.config import Run, model_facts, protocol
from lra.training.evaluate import Counts, Diverged, Where, by_group, evaluate
from lra.training.train import run_folder
from lra.training.trainer import MIDDLE, PROBE_BATCH, WEIGHTS, middle_step, probe, validation_split
from tasks.base import majority
from tasks.store import prepared as store
from tasks.store.prepared import Prepared

LARGEST = 2**28  # parameters of a model built to check a record: a gigabyte
AGREE = 0.999  # V3: share of predictions that must be the same
RTOL = 1e-5, 1e-3  # V2: of the first loss and of the last, and geometric in between
Found = tuple[Run, Prepared, torch.nn.Module]


def run_of(record: dict[str, Any], places: Places, known: dict[str, Any] | None = None) -> Run:
    """The run a well-formed record describes, resolved as `train` would from its preset and overrides.
    `known` is the data's manifest where the data are at hand. Raises Unchecked for outside code without `trust`,
    Rejected for a configuration that no run can have, or that is too large to be built here."""
    task, model, training = record["task"], record["model"], record["training"]
    name = model["attention"]
    if ":" in name and not places.trust:
        raise Unchecked(f"attention {name!r} is outside code: read it, then give --trust to import it")
    _affordable(record)
    how = training["overrides"], record["data"]["val_rule"], Execution.of(training)
    try:
        known = known or manifest(record)
        return config.resolve(task["name"], task["preset"], name, training["seed"], known, *how)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise Rejected(f"model: the configuration cannot be built: {error}") from error


def model_again(record: dict[str, Any], places: Places) -> None:
    """V1's part of the configuration: recipe, parameters and protocol. Raises Rejected at the first difference.
    Initial weights are compared only with the software and processor of the record: others round otherwise."""
    run = run_of(record, places)
    facts = model_facts(run)
    expected = {f"model.{k}": v for k, v in facts.items() if k != "source_sha256"}
    expected |= {
        "training.recipe": asdict(run.recipe.train),
        "training.budget": run.recipe.budget,
        "training.overrides": run.overrides,
        "task.protocol": protocol(run, facts["n_params_ratio_to_softmax"]),
        "command": run.command,
    }
    here = environment(torch.device("cpu"))
    if any(record["env"][k] != here[k] for k in ("torch", "os", "cpu")):
        del expected["model.init_sha256"]
    for name, value in expected.items():
        section, _, key = name.partition(".")
        recorded = record[section][key] if key else record[section]
        same(name, recorded, value, "the preset with the overrides")


def probe_again(path: Path, record: dict[str, Any], places: Places) -> str:
    """V2: the probe's losses, on one CPU thread in fp32, from the start and from the checkpoint in the middle. Loss k
    of 20 must agree within a tolerance that grows from 1e-5 to 1e-3 of it. The checkpoint must have the hash of the
    record, and validate as the curve says. The data are at hand, so floors, revision and groups are compared, too.
    Returns why only the start was repeated; empty if both were. Raises Rejected, or Unchecked or SourceError without
    the data."""
    prepared = prepared_data(record, places)
    for key in ("floors", "revision"):
        if record["data"][key] != prepared.manifest[key]:
            raise Rejected(f"data.{key} is {record['data'][key]}, and the data say {prepared.manifest[key]}")
    run = run_of(record, places, prepared.manifest)
    if (record["result"] or {}).get("groups"):
        predictions = np.frombuffer(read_predictions(path, record), np.uint8)
        again = by_group(load_task(run.meta.name), prepared.splits["test"], predictions)
        same("result.groups", record["result"]["groups"], again.get("groups"), "the data")
    recorded = (record["result"] or record["failure"])["probe"]
    if recorded["batch"] != PROBE_BATCH:
        raise Rejected(f"result.probe.batch must be {PROBE_BATCH}")
    _repeated("result.probe", recorded["losses"], probe(run, prepared)["losses"])
    chain = (record["result"] or {}).get("chain")
    if not (chain and chain["middle"]):
        return "V2 from the start only: the record names no checkpoint in the middle"
    middle, file = chain["middle"], run_folder(places.runs, run) / MIDDLE
    if not file.exists():
        return f"V2 from the start only: no {file}"
    same("result.chain.middle.step", middle["step"], middle_step(run), "the run")
    tensors, _ = checkpoint.load(file)
    same("result.chain.middle.sha256", middle["sha256"], checkpoint.tensors_sha256(tensors), "the run")
    _repeated("result.chain.middle", middle["losses"], probe(run, prepared, file)["losses"])
    classifier = run.build_model().to(pick_device(places.device))
    classifier.load_state_dict(checkpoint.under("model", tensors))
    _validates((run, prepared, classifier), record, middle["step"])
    return ""


def _repeated(field: str, recorded: list[float | None], again: list[float | None]) -> None:
    """Raise Rejected at the first loss that is not repeated."""
    same(f"the number of {field}.losses", len(recorded), len(again), "the run")
    if (k := unlike(recorded, again)) is not None:
        raise Rejected(f"{field}.losses[{k}] is {recorded[k]}, and running the step again gives {again[k]}")


def _validates(found: Found, record: dict[str, Any], step: int) -> None:
    """Raise Rejected unless the weights of a step get as many validation examples right as the curve says there."""
    claimed, n = next(point[3:] for point in record["result"]["curve"] if point[:2] == [step, "val"])
    right = _evaluated(found, record, validation_split(found[0])).n_correct
    if abs(right - claimed) > (1 - AGREE) * n:
        raise Rejected(f"result.curve: {claimed} right at step {step}, and the weights of that step get {right}")


def _evaluated(found: Found, record: dict[str, Any], split: str) -> Counts:
    """A model on a split, where it is, in the precision of the record."""
    run, prepared, classifier = found
    device = next(classifier.parameters()).device
    where = Where(device, record["training"]["precision"])
    return evaluate(classifier, prepared.splits[split], run.meta.towers, batch=run.micro_batch, where=where, name=split)


def unlike(recorded: list[float | None], again: list[float | None]) -> int | None:
    """The first of two runs' first losses that differ by more than RTOL allows; None if none does."""
    for k, allowed in enumerate(np.geomspace(*RTOL, len(recorded))):
        a, b = (math.nan if losses[k] is None else losses[k] for losses in (recorded, again))
        if abs(a - b) > allowed * abs(b) or math.isnan(a) != math.isnan(b):
            return k
    return None


def evaluate_again(path: Path, record: dict[str, Any], places: Places) -> None:
    """V3: the final weights have the hash of the record, predict what is stored, and validate as the curve says.
    Raises Rejected, or UsageError where there are no weights."""
    found = saved_model(path, record, places)
    if chain := record["result"].get("chain"):
        again = checkpoint.tensors_sha256(found[2].state_dict())
        same("result.chain.final_sha256", chain["final_sha256"], again, "the run")
    _, agree = _against_stored(found, path, record)
    if agree < AGREE:
        raise Rejected(f"the saved weights give {100 * agree:.2f}% of the stored predictions, below {AGREE:.1%}")
    _validates(found, record, record["training"]["selected_step"])


def saved_model(path: Path, record: dict[str, Any], places: Places) -> Found:
    """The run of a well-formed record, its data, and its model with the saved weights."""
    if not record["result"]:
        raise Unchecked(f"{path} has no result: {record['status']}")
    prepared = prepared_data(record, places)
    run = run_of(record, places, prepared.manifest)
    file, own = _weights(run, places)
    if not file.exists():
        command = run.command + (" --again" if own.exists() else "")
        raise UsageError(f"no weights of {path}, looked for {file}: `{command}` trains the cell")
    weights, state = checkpoint.load(file)
    if (state["digest"], state["seed"]) != (run.digest, run.seed):
        raise UsageError(f"{file.parent} holds weights of another run")
    classifier = run.build_model().to(pick_device(places.device))
    classifier.load_state_dict(weights)
    return run, prepared, classifier


def _against_stored(found: Found, path: Path, record: dict[str, Any]) -> tuple[Counts, float]:
    """A model on the test split: counts, and the share of the stored predictions that it repeats."""
    counts = _evaluated(found, record, "test")
    stored = np.frombuffer(read_predictions(path, record), np.uint8)
    if len(stored) != counts.n:
        raise Rejected(f"{len(stored)} predictions for {counts.n} test examples")
    return counts, float((stored == counts.predictions).mean())


def _weights(run: Run, places: Places) -> tuple[Path, Path]:
    """The saved weights that stand for a run, and the record of the run that made them, if it was written."""
    own = record_path(places.results, run.meta.name, run.attention, run.digest, run.seed)
    return run_folder(places.runs, run) / WEIGHTS, own


def _affordable(record: dict[str, Any]) -> None:
    """Raise Rejected for sizes whose model would fill the memory, before anything of them is built."""
    e, options = record["model"]["encoder"], record["model"]["attention_config"]
    groups = {"encoder": e, "attention": options, "train": record["training"]["recipe"]}
    for key, value in record["training"]["overrides"].items():  # from here, overrides and sizes are the same
        group, _, option = key.partition(".")
        if group in groups and str(groups[group].get(option)) != value:
            raise Rejected(f"training.overrides: {key}={value} is not what the run used")
    length = max(e["max_len"], record["task"]["seq_len"])
    widest = max([1, *(v for v in options.values() if type(v) in (int, float))])
    layer = 4 * e["width"] ** 2 + 2 * e["width"] * e["ffn"] + e["heads"] * widest * max(length, e["width"])
    if e["layers"] > 1000 or e["layers"] * layer + length * e["width"] > LARGEST:
        raise Rejected(f"model: its sizes exceed the {LARGEST:,} parameters that are built to check a record")


def show(args: Namespace) -> int:
    """`evaluate`: the saved weights of a record, on its test split, against its stored predictions; with --lengths, on
    longer data, too. Exit code 1 where fewer than AGREE of the predictions are the same."""
    record, where = read_record(args.record), places(args)
    try:
        check(record)
        found = saved_model(args.record, record, where)
        counts, agree = _against_stored(found, args.record, record)
    except (Rejected, Unchecked) as error:
        raise UsageError(f"{args.record}: {error}") from error
    file, own = _weights(found[0], where)
    maker = f"made by another run of the same cell and seed, {own}: not the weights of the record"
    if not own.exists():
        maker = f"no record at {own} says which run made them"
    elif read_record(own) == record:
        maker = "made by the run of the record"
    print(f"weights {file}: {maker}")
    r = record["result"]
    recorded, equal = f"record {r['n_correct']}/{r['n_test']}", f"predictions agree {100 * agree:.2f}%"
    print(f"test {counts.n_correct}/{counts.n}; {recorded}; {equal}")
    if agree < AGREE:
        print(f"not repeated: below {AGREE:.1%}; weights, code or data are not those of the record", file=sys.stderr)
    elif args.lengths:
        evaluate_longer(args, record, found)
    return int(agree < AGREE)


def evaluate_longer(args: Namespace, record: dict[str, Any], found: Found) -> None:
    """`evaluate --lengths`: the weights on longer test data, none of which is in train; counts go to RESULTS/longer/,
    beside the hash of the weights, so that they speak of no other run. The record stays as it is."""
    run, prepared, classifier = found
    task, factors = load_task(run.meta.name), sorted(map(int, args.lengths.split(",")))
    if not hasattr(task, "longer"):
        raise UsageError(f"--lengths: {run.meta.name} has no longer data; tasks that have: {', '.join(_lengthened())}")
    facts = {"schema": columns.SCHEMA, "weights": checkpoint.tensors_sha256(classifier.state_dict())}
    facts |= {"fixed": "", "points": []}
    train = prepared.splits["train"]
    for factor in factors:
        length = factor * run.recipe.data.seq_len
        try:
            classifier.encoder.lengthen(length)
        except ValueError as error:
            facts |= {"fixed": str(error), "points": [{"seq_len": f * run.recipe.data.seq_len} for f in factors]}
            print(f"--lengths {args.lengths}: {error}")
            break
        split = task.longer(run.recipe.data, prepared.splits["test"], factor)
        store.check(run.meta, f"{factor} times longer", split, length)
        if store.disjoint(prepared.splits | {"test": split}, run.meta.towers)[1]:
            raise UsageError(f"--lengths {factor}: the longer data of {run.meta.name} hold examples of train or val")
        try:
            counts = _evaluated((run, replace(prepared, splits={"test": split}), classifier), record, "test")
        except Diverged as error:
            raise UsageError(f"--lengths {factor}: {error}") from None
        floor = majority(train.labels, split.labels)
        facts["points"].append({"seq_len": length, "n_correct": counts.n_correct, "n": counts.n, "majority": floor})
        facts["points"][-1]["sha256"] = store.facts(split)["sha256"]
        print(f"{length:,} tokens: {share(counts.n_correct, counts.n)}; floor: majority {100 * floor:.1f}")
    place = _weights(run, places(args))[1].relative_to(args.results / "records")
    print(f"written: {columns.write_longer(args.results, place, facts)}")


def _lengthened() -> list[str]:
    """Tasks that have longer data."""
    return [name for name in task_names() if hasattr(load_task(name), "longer")]
