"""Which records of the Gemma track share a table and a row, and how both are named. No torch."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from lra.gemma.stats import Record, accuracy

DEFAULTS = {("orthogonal", True), ("redraw_every", 0), ("pool", 8)}  # which records name all the same
NAMES = {"num_features": "M"}
FLOORS = ("constant", "local")  # averaging; a window of near keys, with or without the first tokens
RECIPE = ("lr", "lr_kernel", "batch", "warmstart", "transfer_tokens")  # of finetuning


def setting_of(r: Record) -> str:
    """What the runs of one table share: model, text, length, layers, precision; of training, tokens and parameters."""
    e, recipe = r["model"]["encoder"], r["training"]["recipe"]
    first, last = e["layers"][0], e["layers"][-1]
    whole = e["layers"] == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole and last > first + 1 else ",".join(map(str, e["layers"]))
    text = f"{r['task']['dataset']} ({r['data']['splits']['test']['sha256'][:8]})"
    parts = [e["base"], text, f"{r['task']['seq_len']} tokens", f"layers {layers}", r["training"]["precision"]]
    if recipe:
        parts += [f"{recipe['tokens']:,} training tokens", f"train {recipe['train']}"]
    return ", ".join(parts)


def grouped(records: Sequence[Record], key: Callable) -> dict:
    """Records by key, in the order of the keys."""
    groups = defaultdict(list)
    for r in records:
        groups[key(r)].append(r)
    return dict(sorted(groups.items()))


def features(r: Record) -> int | None:
    """The number of random features M; None for a method without any."""
    return r["model"]["attention_config"].get("num_features")


def row_of(r: Record, among: Sequence[Record]) -> tuple[str, str]:
    """(attention, options). Options are those not at their defaults, and the parts of the recipe in which the runs of
    this attention in the setting differ."""

    def recipe(run):
        shown = {k: run["training"]["recipe"].get(k) for k in RECIPE}
        return shown | {"window": "kept" if run["model"]["encoder"]["keeps_window"] else "ignored"}

    own, name = recipe(r), r["model"]["attention"]
    others = [recipe(x) for x in among if x["model"]["attention"] == name]
    differ = {k: v for k, v in own.items() if any(x[k] != v for x in others) and v not in (None, "none")}
    options = {k: v for k, v in r["model"]["attention_config"].items() if (k, v) not in DEFAULTS} | differ
    return name, ", ".join(f"{NAMES.get(k, k)}={v}" for k, v in options.items())


def without(label: tuple[str, str], option: str) -> tuple[str, str]:
    """A row's name without the options that begin with `option`."""
    return label[0], ", ".join(p for p in label[1].split(", ") if not p.startswith(option))


def titled(label: tuple[str, str]) -> str:
    """The name of a row."""
    return label[0] + (f" ({label[1]})" if label[1] else "")


def order(label: tuple[str, str]) -> tuple:
    """Exact, constant, then by name; M = 64 before 256."""
    numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label[1])]
    return {"softmax": 0, "constant": 1}.get(label[0], 2), label[0], numbers


def baseline(rows, *names: str) -> list[Record]:
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


def label_of(rows, runs: Sequence[Record]) -> tuple[str, str]:
    """The row that holds the first of the runs."""
    return next(label for label, others in rows.items() if runs[0] in others)
