"""The two files that a measurement leaves: results/bench/WHAT.json for programs, WHAT.md for people."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lra.machine import environment
from tasks.store.files import atomic_path

SCHEMA = "lra-bench/1"


def command_of(words: list[str], args: argparse.Namespace, elsewhere: Iterable[str], **names: str) -> str:
    """The command that repeats a measurement: every option with a value, but those `elsewhere` that decide no result.
    `names`: the option of an argument that is stored under another name."""
    for name, value in vars(args).items():
        if name not in elsewhere and value is not None and value is not False:
            option = "--" + names.get(name, name).replace("_", "-")
            for one in value if isinstance(value, list) else [value]:
                words += [option] if one is True else [option, str(one)]
    return shlex.join(words)


def write_report(results: Path, what: str, command: str, measured: dict[str, Any], text: str) -> list[Path]:
    """Write both files, each atomically; returns their paths. The JSON holds what was measured, the command, the day,
    the machine and its load average over the last minute."""
    facts = {"schema": SCHEMA, "what": what, "command": command}
    facts["date"] = datetime.now(timezone.utc).date().isoformat()
    facts["env"] = environment(torch.device("cpu")) | {"load": round(os.getloadavg()[0], 2)}
    paths = [Path(results) / "bench" / f"{what}{suffix}" for suffix in (".json", ".md")]
    texts = json.dumps(facts | measured, indent=1, allow_nan=False) + "\n", text
    for path, content in zip(paths, texts, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(content, "utf-8")
    return paths


def machine_line() -> str:
    """One sentence on the machine, the threads of this process and the load, to stand below a table."""
    env = environment(torch.device("cpu"))
    width = "1 thread" if env["threads"] == 1 else f"{env['threads']} threads"
    load = os.getloadavg()[0]
    return f"Measured on {env['cpu']}, {env['os']}, {width}, load average {load:.1f}, torch {env['torch']}."
