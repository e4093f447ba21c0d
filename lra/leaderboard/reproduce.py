"""`reproduce`: run a record again from what it says of itself, and say how far the outcome is the same."""

import os
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np

from lra import registry
from lra.leaderboard.consistency import identity, places, prepared_data
from lra.leaderboard.levels import counter_tree
from lra.leaderboard.rerun import run_of, unlike
from lra.machine import pick_device, set_threads
from lra.options import UsageError
from lra.records import schema
from lra.records.record import read_labels, read_predictions, read_record, write_labels, write_record
from lra.records.stats import margin, mcnemar, paired
from lra.training.commands import header
from lra.training.train import Interrupted, train
from lra.training.trainer import Where
from tasks.base import SourceError
from tasks.store.prepare import prepare
from tasks.store.prepared import Prepared


def reproduce(args: Namespace) -> int:
    """`reproduce RECORD`: one line per thread count; exit code 1 where a rerun differs beyond the tolerance.
    The data are prepared if they are not there. The first rerun becomes a counter-record, unless it is bitwise equal:
    nothing tells that from a copy. None is overwritten."""
    record = read_record(args.record)
    where = places(args)
    try:
        schema.check(record)
        target = counter_tree(args.results, args.by) / "records" / identity(record)
        if target.exists():
            raise UsageError(f"{target} is there already: give another --by, or remove it")
        counts = _threads(args.threads, record)
        prepared = _data(record, args)
        run = run_of(record, where, prepared.manifest)
    except (schema.Rejected, schema.Unchecked) as error:
        raise UsageError(f"{args.record}: {error}") from error
    training = record["training"]
    if (processes := training["world_size"]) > 1:
        raise UsageError(f"{args.record} was made by {processes} processes, and reproduce is one: torchrun its command")
    device = pick_device(record["cost"]["device"] if args.device == "auto" else args.device)
    execution = Where(device, training["precision"], training["compile"])
    print(header(run))
    reruns = {}
    for threads in counts:
        set_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            there = Path(folder)
            try:
                path, _ = train(run, prepared, results=there, runs=there / "runs", where=execution)
            except Interrupted:
                raise KeyboardInterrupt from None
            again = read_record(path)
            reruns[threads] = again, read_predictions(path, again) if again["result"] else None
    write_labels(args.results, prepared.splits["test"].labels.tobytes())  # what reruns are counted by
    return _report(args, record, reruns, target)


def _report(args: Namespace, record: dict, reruns: dict[int, tuple], target: Path) -> int:
    """Compare every rerun with the record, later ones with the first, and keep the first."""
    original = record, read_predictions(args.record, record) if record["result"] else None
    (first, (again, predictions)), *others = reruns.items()
    verdicts = {}
    for threads, rerun in reruns.items():
        verdicts[threads], details = same_run(original, rerun, args.results)
        print(f"threads {threads}, against the record: {verdicts[threads]}{details}")
    for threads, rerun in others:
        print(f"threads {threads} against {first}: {''.join(same_run(reruns[first], rerun, args.results))}")
    if verdicts[first] == "bitwise equal":
        print("no counter-record: nothing tells an equal run from a copy; for V4, run other seeds and submit them")
    else:
        write_record(target, again, predictions)
        print(f"counter-record: {target}")
    return int("different" in verdicts.values())


def same_run(original: tuple, rerun: tuple, results: Path) -> tuple[str, str]:
    """Two runs of one cell and seed, each (record, predictions): a verdict, and what differs.

    bitwise equal     initial weights, curve, probe, counts and predictions are the same
    within tolerance  the probe agrees as V2 asks, and the accuracies differ by no more than V4's margin
    different         else
    """
    (a, stored), (b, fresh) = original, rerun
    if a["status"] != b["status"] or not a["result"]:
        verdict = "bitwise equal" if a["status"] == b["status"] else "different"
        return verdict, f": {a['status']}, then {b['status']}"
    first, second = a["result"], b["result"]
    if first == second and stored == fresh and a["model"]["init_sha256"] == b["model"]["init_sha256"]:
        return "bitwise equal", ""
    n, apart = first["n_test"], unlike(first["probe"]["losses"], second["probe"]["losses"])
    close = apart is None and abs(second["n_correct"] - first["n_correct"]) / n <= margin(first["n_correct"] / n, n)
    parts = [] if a["model"]["init_sha256"] == b["model"]["init_sha256"] else ["other initial weights"]
    if apart is not None:
        parts.append(f"probe loss {apart} is {second['probe']['losses'][apart]}")
    pairs = zip(first["curve"], second["curve"], strict=True)
    if step := next((x for x, y in pairs if x != y), None):
        parts.append(f"the curve parts at step {step[0]}")
    x, y = (np.frombuffer(p, np.uint8) for p in (stored, fresh))
    parts.append(f"{int((x != y).sum())} of {len(x)} predictions differ")
    split = a["data"]["splits"]["test"]
    labels = np.frombuffer(read_labels(results, split["labels_sha256"], split["n"]), np.uint8)
    old, new = x == labels, y == labels
    gap, p = paired(new[None], old[None]), mcnemar(int((new & ~old).sum()), int((old & ~new).sum()))
    parts.append(f"{first['n_correct']} correct became {second['n_correct']}")
    value, low, high = (100 * x for x in (gap.value, gap.low, gap.high))
    parts.append(f"{value:+.2f} points [{low:+.2f}, {high:+.2f}], McNemar p {p:.3g}")
    return ("within tolerance" if close else "different"), f": {'; '.join(parts)}"


def _threads(text: str | None, record: dict[str, Any]) -> list[int]:
    """1,2 -> [1, 2]; without any, the record's own."""
    words = text.split(",") if text else [str(record["env"]["threads"])]
    if not all(w.isdecimal() and 1 <= int(w) <= 4096 for w in words) or len(set(words)) < len(words):
        raise UsageError(f"--threads takes different numbers of at least 1, such as 1,2; got {text!r}")
    return [int(w) for w in words]


def _data(record: dict[str, Any], args: Namespace) -> Prepared:
    """The record's data, prepared where they are not there. Raises Unchecked when they come out differently."""
    task, source = record["task"], record["data"]["source"]
    try:
        return prepared_data(record, places(args))
    except (SourceError, schema.Unchecked):
        pass  # not there yet, or damaged: made again
    origin = {"source": None if source in ("generated", "local") else source, "data_dir": args.data_dir}
    module, workers = registry.load_task(task["name"]), os.cpu_count() or 1
    prepare(module, task["preset"], out=args.data, workers=workers, **origin)
    return prepared_data(record, places(args))
