"""Which records of the Gemma track share a table and a row, and which rows others are compared with. No torch."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from lra.gemma.stats import Record, accuracy

Label = tuple[str, str]  # of a row: attention, options
Rows = dict[Label, list[Record]]
DEFAULTS = {("orthogonal", True), ("redraw_every", 0), ("pool", 8)}  # which records name all the same
NAMES = {"num_features": "M"}
FLOORS = ("constant", "local")  # averaging; a window of near keys, with or without the first tokens
RECIPE = ("lr", "lr_kernel", "batch", "warmstart", "transfer_tokens")  # of finetuning


def grouped(records: Sequence, key: Callable) -> dict:
    """Records by key, in the order of the keys."""
    groups = defaultdict(list)
    for r in records:
        groups[key(r)].append(r)
    return dict(sorted(groups.items()))


def by_setting(records: Sequence[Record], *joined: str) -> dict[str, Rows]:
    """Records by setting, then by row; rows that differ in the options `joined` alone are one."""
    settings = grouped(records, setting_of)
    return {name: grouped(runs, lambda r, runs=runs: row_of(r, runs, *joined)) for name, runs in settings.items()}


def by_distance(rows: Rows) -> dict[int, Rows]:
    """Rows of recall by distance, as if it alone had been scored; without runs that failed, and rows without others."""
    done = {label: [r for r in runs if r["result"]] for label, runs in rows.items()}
    done = {label: runs for label, runs in done.items() if runs}
    distances = sorted({int(d) for runs in done.values() for r in runs for d in r["result"]["parts"]})

    def at(runs, d):
        return [r | {"result": r["result"]["parts"][str(d)]} for r in runs]

    return {d: {label: at(runs, d) for label, runs in done.items()} for d in distances}


def setting_of(r: Record) -> str:
    """What the runs of one table share: model, text, length, layers, precision; of training, tokens and parameters."""
    e, recipe = r["model"]["encoder"], r["training"]["recipe"]
    first, last = e["layers"][0], e["layers"][-1]
    whole = e["layers"] == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole and last > first + 1 else ",".join(map(str, e["layers"]))
    shared = ", films in several splits" if r["task"]["version"] == 1 and r["data"]["source"] == "embedded" else ""
    text = f"{r['task']['dataset']} ({r['data']['splits']['test']['sha256'][:8]}{shared})"
    parts = [e["base"], text, f"{r['task']['seq_len']} tokens", f"layers {layers}", r["training"]["precision"]]
    if "passage" in (about := r["data"]["splits"]["test"]):
        passages = f"passages of {about['passage']} tokens without their first {about['skipped']}"
        parts += [f"{about['kind']}: {passages}"]
    if recipe:
        parts += [f"{recipe['tokens']:,} training tokens", f"train {recipe['train']}"]
    return ", ".join(parts)


def row_of(r: Record, among: Sequence[Record], *joined: str) -> Label:
    """(attention, options). Options are those not at their defaults, and the parts of the recipe in which the runs of
    this attention in the setting differ; `joined` ones are left out."""

    def recipe(run):
        shown = {k: run["training"]["recipe"].get(k) for k in RECIPE}
        return shown | {"window": "kept" if run["model"]["encoder"]["keeps_window"] else "ignored"}

    own, name = recipe(r), r["model"]["attention"]
    others = [recipe(x) for x in among if x["model"]["attention"] == name]
    differ = {k: v for k, v in own.items() if any(x[k] != v for x in others) and v not in (None, "none")}
    options = {k: v for k, v in r["model"]["attention_config"].items() if (k, v) not in DEFAULTS} | differ
    return without((name, ", ".join(f"{NAMES.get(k, k)}={v}" for k, v in options.items())), *joined)


def without(label: Label, *options: str) -> Label:
    """A row's name without the options that begin with one of `options`."""
    return label[0], ", ".join(p for p in label[1].split(", ") if not p.startswith(options))


def titled(label: Label) -> str:
    """The name of a row."""
    return label[0] + (f" ({label[1]})" if label[1] else "")


def order(label: Label) -> tuple:
    """Exact, floors, then by name; M = 64 before 256."""
    numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label[1])]
    return {"softmax": 0, **dict.fromkeys(FLOORS, 1)}.get(label[0], 2), label[0], numbers


def baseline(rows: Rows, *names: str) -> list[Record]:
    """The runs that methods are compared with, of the attentions of these names; [] where there are none.

    Failed runs are left out, and softmax without its windows. Of several rows it is the best one: of finetuned rows
    that of least validation loss, of others that of most accuracy. A method must not look good because the learning
    rate of its baseline was bad, or because a better floor was left out.
    """

    def loss(runs):
        trained = runs[0]["training"]["recipe"]
        return statistics.fmean(r["result"]["curve"][-1][2] if trained else -accuracy(r) for r in runs)

    ended = [[r for r in runs if r["result"]] for label, runs in rows.items() if label[0] in names]
    usable = [x for x in ended if x and ("softmax" not in names or x[0]["model"]["encoder"]["keeps_window"])]
    return min(usable, key=loss, default=[])


def label_of(rows: Rows, runs: Sequence[Record]) -> Label:
    """The row that holds the first of the runs."""
    return next(label for label, others in rows.items() if runs[0] in others)
