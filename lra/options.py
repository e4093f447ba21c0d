"""Typed options: every value a user gives is checked against the dataclass that documents it."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

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
    """`cls(**values)` for a frozen dataclass, strings converted to the declared types.

    With `base`, an instance of cls, unnamed fields keep its values. Raises UsageError for an unknown key
    (naming the nearest) or a value of the wrong type. `where` prefixes names in messages: "attention".
    """
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


def at_least(least: int):
    """An argparse type: a whole number not below `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}; got {value}")
        return value

    return number


def size(text: str) -> int:
    """An argparse type: bytes, with K, M, G or T for powers of 1000."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in "KMGT" else (text, "")
    if not number.isascii() or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"must be a number of bytes, such as 6000000000 or 6G; got {text}")
    return int(number) * 1000 ** " KMGT".index(unit or " ")
