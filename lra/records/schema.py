"""V0, the form of a record: every field there, none beside them, each of its type and within its bounds.

RECORD is the table of fields and bounds. A dictionary of rules is an object with exactly these fields, of which those
that end in ? may be missing; a list of rules is a list of exactly these values. Only names, numbers and short
printable texts without angle brackets get through.
"""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, get_args, get_type_hints

from lra.options import PRESETS
from lra.records.record import PROTOCOL, SCHEMA
from tasks.base import SPLITS, Optim, Stack

MANY = 10**12  # beyond any count of examples, tokens or parameters
FINITE = 1e300  # any number: the reader refuses infinities
WORD = "[A-Za-z_][A-Za-z0-9_]{0,59}"


class Rejected(ValueError):
    """A record that is malformed or contradicts itself; one line that says where."""


class Unchecked(Exception):
    """A level that cannot be decided here; one line that says why, and the way out."""


# Rules: a single value, as words and as a test; another rule or null; `low` to `high` values of one rule; an object of
# at most 50 entries whose names are not fixed.
Value = NamedTuple("Value", [("words", str), ("holds", Callable[[Any], Any])])
Maybe = NamedTuple("Maybe", [("rule", Any)])
Items = NamedTuple("Items", [("rule", Any), ("low", int), ("high", int)])
Names = NamedTuple("Names", [("name", Value), ("rule", Any)])


def check(record: dict[str, Any]) -> None:
    """Raise Rejected, naming the field, unless the record has the form of RECORD."""
    _check(record, RECORD, "")
    if (record["result"] is None) != (record["status"] != "ok"):
        raise Rejected("result must be there if status is ok, and null if the run failed")
    if record["result"] and record.get("failure"):
        raise Rejected("failure must be null if status is ok")


def _check(value: Any, rule: Any, name: str) -> None:
    match rule:
        case Value():
            _require(rule.holds(value), name, rule.words, value)
        case Maybe():
            if value is not None:
                _check(value, rule.rule, name)
        case Items(inner, low, high):
            _require(isinstance(value, list) and low <= len(value) <= high, name, f"a list of {low} to {high}", value)
            for i, item in enumerate(value):
                _check(item, inner, f"{name}[{i}]")
        case Names(key_rule, inner):
            fits = isinstance(value, dict) and len(value) <= 50
            _require(fits, name, "an object of at most 50 entries", value)
            for key, item in value.items():
                _check(key, key_rule, f"a name in {name}")
                _check(item, inner, f"{name}.{key}")
        case list():
            fits = isinstance(value, list) and len(value) == len(rule)
            _require(fits, name, f"a list of {len(rule)}", value)
            for item, inner in zip(value, rule, strict=True):
                _check(item, inner, name)
        case dict():
            _require(isinstance(value, dict), name, "an object", value)
            known = {key.removesuffix("?"): inner for key, inner in rule.items()}
            dotted = {key: f"{name}.{key}".lstrip(".") for key in (*value, *known)}
            if others := [key for key in value if key not in known]:
                raise Rejected(f"unknown field {dotted[others[0]][:90]!r}")
            for key, inner in known.items():
                if key in value:
                    _check(value[key], inner, dotted[key])
                elif f"{key}?" not in rule:
                    raise Rejected(f"field {dotted[key]} is missing")


def _require(holds: Any, name: str, words: str, value: Any) -> None:
    if not holds:
        raise Rejected(f"{name} must be {words}; got {repr(value)[:60]}")


def whole(low: int = 0, high: int = MANY) -> Value:
    """A whole number within bounds."""
    return Value(f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high)


def real(low: float = 0.0, high: float = FINITE) -> Value:
    """A number within bounds."""
    return Value(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def one_of(*choices: Any) -> Value:
    """One of these values, of the same type."""
    words = f"one of {', '.join(map(str, choices))}"
    return Value(words, lambda v: any(type(v) is type(choice) and v == choice for choice in choices))


def matching(regex: str, words: str) -> Value:
    """A text that matches as a whole."""
    return Value(words, lambda v: isinstance(v, str) and re.fullmatch(regex, v))


def of_dataclass(cls: type) -> dict[str, Value]:
    """The fields of a dataclass by their declared types; no number is negative."""
    kinds, hints = {int: whole(0, 2**31), float: real()}, get_type_hints(cls)
    return {f.name: kinds.get(hints[f.name]) or one_of(*get_args(hints[f.name])) for f in fields(cls)}


PLAIN = "printable text of at most 300 characters without < and >"
TEXT = Value(PLAIN, lambda v: isinstance(v, str) and len(v) <= 300 and v.isprintable() and not set(v) & set("<>"))
NUMBER = real(-FINITE)
OPTION = Value("a number, a flag or a text", lambda v: type(v) is bool or TEXT.holds(v) or NUMBER.holds(v))
FLAG = one_of(True, False)
SHA256 = matching("[0-9a-f]{64}", "a sha256 in 64 hexadecimal digits")
NAME = matching(WORD, "a name of letters, digits and underscores")
TIME = matching(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?\+00:00", "a time like 2026-01-31T12:00:00+00:00")
# An entry of the curve: step, split, loss, n_correct, n.
POINT = [whole(1), one_of("train", "val"), Maybe(real()), whole(), whole(1)]
CURVE, PROBE = Items(POINT, 0, 20_000), {"batch": whole(1, 10**4), "losses": Items(Maybe(real()), 20, 20)}
EXAMPLES, LENGTH = 10**8, 10**7
SPLIT = {"n": whole(1, EXAMPLES), "sha256": SHA256, "labels_sha256": SHA256}
SPLIT |= {"mean_length": real(0, LENGTH), "max_length": whole(1, LENGTH)}
MIDDLE = {"step": whole(1), "sha256": SHA256, "losses": Items(Maybe(real()), 1, 20)}
RESULT = {
    "n_correct": whole(0, EXAMPLES),
    "n_test": whole(1, EXAMPLES),
    "val_n_correct": whole(0, EXAMPLES),
    "n_val": whole(1, EXAMPLES),
    "curve": CURVE,
    "predictions_sha256": SHA256,
    # Test examples that are alike, such as those of as many pairs: value, n_correct, n.
    "groups?": {"by": NAME, "counts": Items([whole(0, 10**6), whole(0, EXAMPLES), whole(1, EXAMPLES)], 1, 100)},
    "probe": PROBE,
    "chain?": {"middle": Maybe(MIDDLE), "final_sha256": SHA256},
}

RECORD: dict[str, Any] = {
    "schema": one_of(SCHEMA),
    "suite": {
        "version": matching(r"[0-9a-z.+-]{1,40}", "a version"),
        "git_commit": Maybe(matching("[0-9a-f]{40,64}", "a commit in hexadecimal digits")),
        "git_dirty": Maybe(FLAG),
    },
    "task": {
        "name": NAME,
        "version": whole(1, 10**6),
        "preset": one_of(*PRESETS),
        "protocol": one_of(PROTOCOL, "open"),
        "seq_len": whole(1, LENGTH),
        "dataset": TEXT,
        "substitute": FLAG,
        "source_sha256?": SHA256,
    },
    "data": {
        "source": one_of("embedded", "hub", "local", "generated"),
        "revision": TEXT,
        "splits": dict.fromkeys(SPLITS, SPLIT),
        "floors": Names(TEXT, real(0, 1)),
        "manifest_sha256": SHA256,
        "val_rule": one_of("held-out", "legacy"),
    },
    "model": {
        "attention": matching(rf"{WORD}|{WORD}(\.{WORD}){{0,9}}:{WORD}", "a name, or package.module:Class"),
        "attention_config": Names(NAME, OPTION),
        "encoder": of_dataclass(Stack),
        "exact": FLAG,
        "n_params": whole(1),
        "n_params_ratio_to_softmax": real(),
        "init_sha256": SHA256,
        "source_sha256?": SHA256,
    },
    "training": {
        "seed": whole(0, 10**6),
        "precision": one_of("fp32", "bf16"),
        "compile": FLAG,
        "optimizer": one_of("AdamW"),
        "recipe": of_dataclass(Optim),
        "budget": whole(0, 10**6),
        "overrides": Names(matching(rf"(attention|encoder|train|pretrain)\.{WORD}", "a group.option"), TEXT),
        "world_size": whole(1, 10**6),
        **dict.fromkeys(("steps", "examples_seen"), whole(1)),
        "selected_step": whole(),
        "resumed": whole(0, 10**6),
        "pretrain?": Items([whole(1), real()], 0, 20_000),  # step, mean loss since the one before
    },
    "result": Maybe(RESULT),
    "failure?": Maybe({"curve": CURVE, "probe": PROBE}),
    "cost": {
        "device": one_of("cpu", "cuda", "mps"),
        **dict.fromkeys(("wall_s", "steps_per_s", "tokens_per_s"), real()),
        "peak_bytes": Maybe(whole(0, 10**14)),
        "softmax_same_machine?": Maybe({"step_time_ratio": real(1e-9, 1e9), "pairs": whole(1, 1000)}),
    },
    "env": {
        **dict.fromkeys(("python", "torch", "numpy", "os", "cpu"), TEXT),
        "threads": whole(1, 10**5),
        "gpu": Maybe(TEXT),
    },
    "status": matching("ok|failed: [ -;=?-~]{1,200}", "ok, or failed: and a reason"),
    "command": TEXT,
    "started": TIME,
    "ended": TIME,
}
