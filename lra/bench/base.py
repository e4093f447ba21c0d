"""What every bench shares: the files that a measurement leaves."""

from __future__ import annotations

import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lra.machine import environment
from lra.records.markup import Grid, markdown
from tasks.store.files import atomic_path

SCHEMA = "lra-bench/1"


def write_report(results: Path, what: str, command: str, measured: dict[str, Any], text: str) -> list[Path]:
    """Write results/bench/WHAT.json and WHAT.md (`text`), each atomically; returns their paths.

    Beside what was measured, the JSON holds the command, the day, the machine and how busy it was (load average
    over the last minute, 1 = one core).
    """
    facts = {"schema": SCHEMA, "what": what, "command": command}
    facts["date"] = datetime.now(timezone.utc).date().isoformat()
    facts["env"] = environment(torch.device("cpu")) | {"load": round(os.getloadavg()[0], 2)}
    paths = [Path(results) / "bench" / f"{what}{suffix}" for suffix in (".json", ".md")]
    texts = json.dumps(facts | measured, indent=1, allow_nan=False) + "\n", text
    for path, content in zip(paths, texts, strict=True):
        with atomic_path(path) as temporary:
            temporary.write_text(content)
    return paths


def machine_line(threads: int) -> str:
    """One sentence on the machine, to stand below a table."""
    env = environment(torch.device("cpu"))
    load = os.getloadavg()[0]
    width = "1 thread" if threads == 1 else f"{threads} threads"
    return f"Measured on {env['cpu']}, {env['os']}, {width}, load average {load:.1f}, torch {env['torch']}."


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is text and whose others are numbers."""
    return markdown([Grid(tuple(header), tuple(map(tuple, rows)))]).splitlines()
