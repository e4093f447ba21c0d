"""The attention contract, for the attentions of the folder and for anybody's own.

    python -m tests.models.contract performer package.module:Class

runs every check that applies, for the default options and for every other value of each choice, and exits with 1 when
one fails, with 2 when there is no such class. `tests/models/test_contract.py` runs the same list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints

from tqdm import tqdm

from lra import registry
from lra.options import UsageError
from models.features import flash
from tests.models import checks_method, checks_output  # noqa: F401, they fill CHECKS
from tests.models.cases import CHECKS, PADDED, Case, Check


def variants(name: str) -> list[Case]:
    """The defaults, and each value of each choice or switch on its own where the constructor accepts it; then
    all of them once more in the causal form where there is one. A file that is broken has one variant."""
    cases = [Case(name)]
    if not cases[0].loads:
        return cases
    cls = cases[0].cls
    config, types = cls.Config, get_type_hints(cls.Config)
    for field in dataclasses.fields(config):
        kind = types[field.name]
        for value in get_args(kind) if get_origin(kind) is Literal else (True, False) if kind is bool else ():
            case = Case(name, {field.name: value})
            with contextlib.suppress(ValueError):
                case.build(PADDED)
                cases += [case] if value != field.default else []
    return cases + [case._replace(causal=True) for case in cases if cls.causal]


def checks_of(case: Case, names: Iterable[str] = CHECKS) -> list[Check]:
    """The named checks, of those that apply."""
    if not case.loads:
        return [CHECKS["can_be_built"]]
    return [CHECKS[name] for name in names if CHECKS[name].applies(case)]


def failures(case: Case, names: Iterable[str] = CHECKS, shown: bool = False) -> dict[str, str]:
    """The named checks, of those that apply, that fail, with their first messages. `shown`: with a bar."""
    messages: dict[str, str] = {}
    checks = checks_of(case, names)
    for check in tqdm(checks, str(case), unit="check", leave=False, disable=None if shown else True):
        try:
            check(case)
        except Exception as error:  # whatever an unknown class raises is its failure
            messages[check.name] = f"{type(error).__name__}: {error}"
    return messages


def main(names: list[str]) -> int:
    """Check each attention and print what fails, a line for each variant as soon as it is known; the exit code."""
    flash.SMALL = 0  # small as the inputs are: through the fused kernels, as in tests/models/conftest.py
    broken = False
    for name in names:
        try:
            registry.attention_class(name)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except Exception:  # a file that cannot be imported fails its check below
            pass
        cases = variants(name)
        for number, case in enumerate(cases, 1):
            messages = failures(case, shown=True)
            broken |= bool(messages)
            lines = [f"[{number} of {len(cases)}] {case} {'FAILS' if messages else 'holds'}"]
            print("\n".join([*lines, *(f"  {check}: {text}" for check, text in messages.items())]), flush=True)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
