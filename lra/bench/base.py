"""What every bench shares: timing by interleaved pairs, and the files a measurement leaves.

An interleaved pair gives a ratio that survives a machine whose speed drifts.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lra.machine import environment, synchronize
from lra.records.markup import Grid, markdown
from lra.training.evaluate import autocast
from lra.training.trainer import Where
from tasks.base import Batch
from tasks.store.files import atomic_path

SCHEMA = "lra-bench/1"
PAIRS = 5


def step_time_ratio(model: nn.Module, reference: nn.Module, batch: Batch, *, where: Where) -> float:
    """Median over PAIRS of (seconds of a step of `reference`) / (seconds of a step of `model`); above 1 = faster.

    A step is forward and backward on `batch`; the two alternate, after one step each that is not counted.
    """

    def seconds(timed: nn.Module) -> float:
        timed.zero_grad(set_to_none=True)
        synchronize(where.device)
        start = time.perf_counter()
        with autocast(where.device, where.precision):
            logits_BC = timed(batch.tokens_BTN, batch.mask_BTN)
        F.cross_entropy(logits_BC.float(), batch.labels_B).backward()
        synchronize(where.device)
        return time.perf_counter() - start

    seconds(reference), seconds(model)
    return statistics.median(seconds(reference) / seconds(model) for _ in range(PAIRS))


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
