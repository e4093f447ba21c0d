"""V0, the form of a record: every field there, none beside them, each of its type and within its bounds.

A specification is a function (value, name) that raises Rejected, or a dictionary of them: the exact fields of
a JSON object. Only names, numbers and short printable texts without angle brackets get through.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lra.options import PRESETS
from lra.records.record import PROTOCOL, SCHEMA
from tasks.base import SPLITS, Encoder, Optim

Spec = Callable[[Any, str], None] | dict

MANY = 10**12  # beyond any count of examples, tokens or parameters
FINITE = 1e300  # any number: the reader refuses infinities
OPTIONAL = {"source_sha256", "softmax_same_machine"}  # fields that only newer, or only older, records have
WORD = "[A-Za-z_][A-Za-z0-9_]{0,59}"


class Rejected(ValueError):
    """A record that is malformed or contradicts itself; one line that says where."""


class Unchecked(Exception):
    """A level that cannot be decided here; one line that says why, and the way out."""


def check(record: dict[str, Any]) -> None:
    """Raise Rejected, naming the field, unless the record has the form of RECORD."""
    _check(record, RECORD, "")
    if (record["result"] is None) != (record["status"] != "ok"):
        raise Rejected("result must be there if status is ok, and null if the run failed")


def _check(value: Any, spec: Spec, name: str) -> None:
    if not isinstance(spec, dict):
        return spec(value, name)
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    for key in value:
        if key not in spec:
            raise Rejected(f"unknown field {f'{name}.{key}'.lstrip('.')[:90]!r}")
    for key, inner in spec.items():
        if key not in value and key in OPTIONAL:
            continue
        if key not in value:
            raise Rejected(f"field {f'{name}.{key}'.lstrip('.')} is missing")
        _check(value[key], inner, f"{name}.{key}".lstrip("."))
    return None


def _wrong(name: str, what: str, value: Any) -> Rejected:
    return Rejected(f"{name} must be {what}; got {repr(value)[:60]}")


def whole(low: int = 0, high: int = MANY) -> Spec:
    """A whole number within bounds."""

    def spec(value, name):
        if type(value) is not int or not low <= value <= high:
            raise _wrong(name, f"a whole number from {low} to {high}", value)

    return spec


def real(low: float = 0.0, high: float = FINITE) -> Spec:
    """A number within bounds."""

    def spec(value, name):
        if type(value) not in (int, float) or not low <= value <= high:
            raise _wrong(name, f"a number from {low:g} to {high:g}", value)

    return spec


def one_of(*choices: Any) -> Spec:
    """One of these values, of the same type."""

    def spec(value, name):
        if not any(type(value) is type(c) and value == c for c in choices):
            raise _wrong(name, f"one of {', '.join(map(str, choices))}", value)

    return spec


def pattern(regex: str, what: str) -> Spec:
    """A text that matches as a whole."""

    def spec(value, name):
        if not isinstance(value, str) or not re.fullmatch(regex, value):
            raise _wrong(name, what, value)

    return spec


def text(value: Any, name: str) -> None:
    """At most 300 printable characters, none of them an angle bracket."""
    if not isinstance(value, str) or len(value) > 300 or not value.isprintable() or set(value) & set("<>"):
        raise _wrong(name, "printable text of at most 300 characters without < and >", value)


def maybe(spec: Spec) -> Spec:
    """That, or null."""
    return lambda value, name: None if value is None else _check(value, spec, name)


def items(spec: Spec, low: int, high: int) -> Spec:
    """A list of low to high of these."""

    def listed(value, name):
        if not isinstance(value, list) or not low <= len(value) <= high:
            raise _wrong(name, f"a list of {low} to {high}", value)
        for i, item in enumerate(value):
            _check(item, spec, f"{name}[{i}]")

    return listed


def mapping(spec: Spec, key: Spec) -> Spec:
    """An object of at most 50 entries whose names are not fixed."""

    def mapped(value, name):
        if not isinstance(value, dict) or len(value) > 50:
            raise _wrong(name, "an object of at most 50 entries", value)
        for k, v in value.items():
            _check(k, key, f"a name in {name}")
            _check(v, spec, f"{name}.{k}")

    return mapped


def point(value: Any, name: str) -> None:
    """An entry of the curve: [step, split, loss or null, n_correct, n]."""
    if not isinstance(value, list) or len(value) != 5:
        raise _wrong(name, "[step, split, loss, n_correct, n]", value)
    parts = (whole(1), one_of("train", "val"), maybe(real()), whole(), whole(1))
    for part, spec in zip(value, parts, strict=True):
        _check(part, spec, name)


def scalar(value: Any, name: str) -> None:
    """An option of an attention: a number, a truth value or a text."""
    if type(value) is bool:
        return
    (text if isinstance(value, str) else real(-FINITE))(value, name)


def of_dataclass(cls: type, high: int = 2**31) -> dict[str, Spec]:
    """The fields of a recipe's dataclass by their declared types; no number is negative."""
    hints, specs = get_type_hints(cls), {}
    for field in fields(cls):
        kind = hints[field.name]
        if get_origin(kind) is Literal:
            specs[field.name] = one_of(*get_args(kind))
        else:
            specs[field.name] = {int: whole(0, high), float: real()}[kind]
    return specs


SHA256 = pattern("[0-9a-f]{64}", "a sha256 in 64 hexadecimal digits")
NAME = pattern(WORD, "a name of letters, digits and underscores")
OUTSIDE = rf"{WORD}(\.{WORD}){{0,9}}:{WORD}"
TIME = pattern(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", "a time like 2026-01-31T12:00:00+00:00")
FLAG = one_of(True, False)
SPLIT = {
    "n": whole(1, 10**8),
    "sha256": SHA256,
    "labels_sha256": SHA256,
    "mean_length": real(0, 10**7),
    "max_length": whole(1, 10**7),
}

RECORD: dict[str, Spec] = {
    "schema": one_of(SCHEMA),
    "suite": {
        "version": pattern(r"[0-9a-z.+-]{1,40}", "a version"),
        "git_commit": maybe(pattern("[0-9a-f]{40,64}", "a commit in hexadecimal digits")),
        "git_dirty": maybe(FLAG),
    },
    "task": {
        "name": NAME,
        "version": whole(1, 10**6),
        "preset": one_of(*PRESETS),
        "protocol": one_of(PROTOCOL, "open"),
        "seq_len": whole(1, 10**7),
        "dataset": text,
        "substitute": FLAG,
        "source_sha256": SHA256,
    },
    "data": {
        "source": one_of("embedded", "hub", "local", "generated"),
        "revision": text,
        "splits": dict.fromkeys(SPLITS, SPLIT),
        "floors": mapping(real(0, 1), text),
        "manifest_sha256": SHA256,
        "val_rule": one_of("held-out", "legacy"),
    },
    "model": {
        "attention": pattern(f"{WORD}|{OUTSIDE}", "a name, or package.module:Class"),
        "attention_config": mapping(scalar, NAME),
        "encoder": of_dataclass(Encoder),
        "exact": FLAG,
        "n_params": whole(1),
        "n_params_ratio_to_softmax": real(),
        "init_sha256": SHA256,
        "source_sha256": SHA256,
    },
    "training": {
        "seed": whole(0, 10**6),
        "precision": one_of("fp32", "bf16"),
        "compile": FLAG,
        "optimizer": one_of("AdamW"),
        "recipe": of_dataclass(Optim),
        "budget": whole(0, 10**6),
        "overrides": mapping(text, pattern(rf"(attention|encoder|train)\.{WORD}", "a group.option")),
        "world_size": whole(1, 10**6),
        "steps": whole(1),
        "examples_seen": whole(1),
        "selected_step": whole(),
        "resumed": whole(0, 10**6),
    },
    "result": maybe(
        {
            "n_correct": whole(0, 10**8),
            "n_test": whole(1, 10**8),
            "val_n_correct": whole(0, 10**8),
            "n_val": whole(1, 10**8),
            "curve": items(point, 2, 20_000),
            "predictions_sha256": SHA256,
            "probe": {"batch": whole(1, 10**4), "losses": items(maybe(real()), 20, 20)},
        }
    ),
    "cost": {
        "device": one_of("cpu", "cuda", "mps"),
        "wall_s": real(),
        "steps_per_s": real(),
        "tokens_per_s": real(),
        "peak_bytes": maybe(whole(0, 10**14)),
        "softmax_same_machine": maybe({"step_time_ratio": real(1e-9, 1e9), "pairs": whole(1, 1000)}),
    },
    "env": {
        **dict.fromkeys(("python", "torch", "numpy", "os", "cpu"), text),
        "threads": whole(1, 10**5),
        "gpu": maybe(text),
    },
    "status": pattern("ok|failed: [ -;=?-~]{1,200}", "ok, or failed: and a reason"),
    "command": text,
    "started": TIME,
    "ended": TIME,
}
