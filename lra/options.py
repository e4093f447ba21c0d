"""Options: what a user may give to a command, and values checked against the dataclass that documents them."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

STOPPED = 85  # exit code of a command that saved its state and can be repeated to go on
BUSY = 75  # exit code of a command that left a run to the other process that is at it


class UsageError(ValueError):
    """Bad input from the user: one line that names the value and the way out; the CLI exits with 2."""


class Held(UsageError):
    """Another process is at it: no fault of the user's; the CLI exits with BUSY."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that does not exist, with the nearest one and the list."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known) or 'none'}")


def construct(cls: type, values: dict[str, Any], *, where: str, base: Any = None) -> Any:
    """`cls(**values)` for a frozen dataclass, strings converted to the declared types. With `base`, an instance of cls,
    unnamed fields keep its values. Raises UsageError for an unknown key (naming the nearest) or a value of the wrong
    type. `where` prefixes names in messages: "attention"."""
    types = get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    checked = {}
    for key, value in values.items():
        if key not in fields:
            raise unknown(f"option of {where}", key, fields)
        checked[key] = _convert(value, types[key], f"{where}.{key}")
    return cls(**checked) if base is None else dataclasses.replace(base, **checked)


def _convert(value: Any, kind: Any, name: str) -> Any:
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UsageError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}; got {value!r}")
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        try:
            # float -> int only where nothing is lost, so that 1e3 may be written for 1000
            number = float(value) if kind is float or not str(value).lstrip("+-").isdigit() else int(value)
            if math.isfinite(number) and number == kind(number):
                return kind(number)
        except (ValueError, OverflowError):
            pass
    if kind is str and isinstance(value, str):
        return value
    raise UsageError(f"{name} must be {kind.__name__}; got {value!r}")


def at_least(least: int, most: int | None = None):
    """An argparse type: a whole number from `least` to `most`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}; got {value}")
        return value

    return number


def folder(text: str) -> Path:
    """An argparse type: a folder that is there and can be read."""
    if not os.access(text, os.R_OK | os.X_OK) or not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder, or it cannot be read")
    return Path(text)


def numbers(kind: type, least: float, several: bool = False):
    """An argparse type: a number of `least` or more; with `several`, the text of different ones, comma-separated."""
    what = "different numbers, comma-separated," if several else "a number"

    def check(text: str):
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            values = []
        ok = all(least <= value < math.inf for value in values) and len(set(values)) == len(values) > 0
        if not ok or len(values) > 1 and not several:
            raise argparse.ArgumentTypeError(f"must be {what} of {least:g} or more; got {text}")
        return text if several else values[0]

    return check


def writable(text: str) -> Path:
    """An argparse type: a folder that files can be written to, or that can be made."""
    path = Path(text)
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot write to {path}: {error.strerror}: {nearest}") from None


class Command(NamedTuple):
    """A command of the command line: its code as module:function, its options, its line in --help."""

    run: str
    options: tuple = ()
    help: str = ""  # only of an action such as `leaderboard submit`; lra/cli.py has the others


def option(name: str, help: str, kind: Any = str, default: Any = None, **more: Any) -> tuple[str, dict[str, Any]]:
    """One option of a command, as the arguments of argparse's add_argument. `kind`: an argparse type; a tuple of
    choices; bool, a switch; list, an option that may be repeated."""
    if kind is bool:
        return name, {"help": help, "action": "store_true", **more}
    if kind is list:
        return name, {"help": f"{help} (may be repeated)", "action": "append", "default": default, **more}
    facts = {"choices": kind} if isinstance(kind, tuple | range) else {"type": kind}
    return name, {"help": help, "default": default, **facts, **more}


def written(place: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The option of a folder, for a command that writes to it: one that cannot be written to is refused at once."""
    name, facts = place
    return name, facts | {"type": writable, "default": str(facts["default"])}  # argparse converts a text alone


# Options that commands of several rooms share.

PRESETS = {
    "smoke": "minutes on a CPU, whole grid",
    "small": "real learning on a CPU",
    "paper": "LRA's lengths, GPU",
    "paper-large": "those, with LRA's encoders of 3 to 6 layers, GPU",
    "path-x": "pathfinder alone, 128 px, GPU",
}
TASK = option("task", "a name of `list tasks`")
PRESET = option("--preset", "; ".join(f"{k}: {v}" for k, v in PRESETS.items()), default="small")
DATA = option("--data", "folder of prepared data", Path, Path("data"))
RESULTS = option("--results", "folder of records", Path, Path("results"))
READ = option("--results", "folder of records, which is there", folder, Path("results"))
RUNS = option("--runs", "folder of logs, checkpoints and weights", Path, Path("runs"))
DEVICE = option("--device", "auto, cpu, cuda or mps", default="auto")
THREADS = option("--threads", "CPU threads; 0 = PyTorch's choice", at_least(0), 0)
PORT = option("--port", "on 127.0.0.1; 0 = any that is free", at_least(0, 65535), 8000)
PLACES = (DATA, RESULTS, RUNS, DEVICE)
WRITTEN = (DATA, written(RESULTS), written(RUNS), DEVICE)
TRUST = option("--trust", "import the attention package.module:Class of a record: code of its author", bool)

COMMANDS = {
    "list": Command(
        "lra.registry:show",
        (
            option("what", "default: all three", ("tasks", "attentions", "presets"), nargs="?"),
            option("--json", "names alone, as JSON", bool),
        ),
    )
}
