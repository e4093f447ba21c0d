"""Which records of the Gemma track share a table and a row, and how both are named. No torch."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from lra.gemma.stats import Record

DEFAULTS = {("orthogonal", True), ("redraw_every", 0), ("pool", 8)}  # which records name all the same
NAMES = {"num_features": "M"}
RECIPE = ("lr", "lr_kernel", "batch", "warmstart", "transfer_tokens")  # of finetuning


def setting_of(r: Record) -> str:
    """What runs must share to stand in one table: model, text, length, layers and, trained, tokens and parameters."""
    e, recipe = r["model"]["encoder"], r["training"]["recipe"]
    first, last = e["layers"][0], e["layers"][-1]
    whole = e["layers"] == list(range(first, last + 1))
    layers = f"{first} to {last}" if whole and last > first + 1 else ",".join(map(str, e["layers"]))
    text = f"{r['task']['dataset']} ({r['data']['splits']['test']['sha256'][:8]})"
    parts = [
        e["base"],
        text,
        f"{r['task']['seq_len']} tokens",
        f"layers {layers}",
        r["training"]["precision"],
    ]
    if recipe:
        parts += [f"{recipe['tokens']:,} training tokens", f"train {recipe['train']}"]
    return ", ".join(parts)


def grouped(records: Sequence[Record], key: Callable) -> dict:
    """In the order of the keys."""
    found = defaultdict(list)
    for r in records:
        found[key(r)].append(r)
    return {k: found[k] for k in sorted(found)}


def features(r: Record) -> int | None:
    """M, where the method has it."""
    return r["model"]["attention_config"].get("num_features")


def row_of(r: Record, among: Sequence[Record]) -> tuple[str, str]:
    """(attention, its options other than defaults, and of the recipe what differs from others of its name in the
    setting)."""

    def recipe(run):
        shown = {k: run["training"]["recipe"].get(k) for k in RECIPE}
        return shown | {"window": "kept" if run["model"]["encoder"]["keeps_window"] else "ignored"}

    own, name = recipe(r), r["model"]["attention"]
    others = [recipe(x) for x in among if x["model"]["attention"] == name]
    differ = {k: v for k, v in own.items() if any(x[k] != v for x in others) and v not in (None, "none")}
    options = {k: v for k, v in r["model"]["attention_config"].items() if (k, v) not in DEFAULTS} | differ
    return name, ", ".join(f"{NAMES.get(k, k)}={v}" for k, v in options.items())


def without(label: tuple[str, str], option: str) -> tuple[str, str]:
    """A row's name less the options that begin so."""
    return label[0], ", ".join(p for p in label[1].split(", ") if not p.startswith(option))


def titled(label: tuple[str, str]) -> str:
    """The name of a row."""
    return label[0] + (f" ({label[1]})" if label[1] else "")


def order(label: tuple[str, str]) -> tuple:
    """Exact, constant, then by name; M = 64 before 256."""
    numbers = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", label[1])]
    return {"softmax": 0, "constant": 1}.get(label[0], 2), label[0], numbers


def baseline(rows, attention: str) -> list[Record]:
    """Ended runs of softmax, with its windows, or of constant. Of rows that were trained in several ways it is the one
    with the least validation loss, so that no method looks good beside a baseline that its rate has spoilt; of several
    that were not, none."""
    found = [[r for r in runs if r["result"]] for label, runs in rows.items() if label[0] == attention]
    found = [x for x in found if x and (attention == "constant" or x[0]["model"]["encoder"]["keeps_window"])]
    if len(found) > 1 and found[0][0]["training"]["recipe"]:
        return min(found, key=lambda runs: statistics.fmean(r["result"]["curve"][-1][2] for r in runs))
    return found[0] if len(found) == 1 else []
