"""Accuracies and speeds that others published: printed beside our tables, never used as our baseline.

published.json: {"accuracy": [source, ...], "speed": source}. A source has a title, a citation, a caveat, which says why
no column of ours compares with it, and rows {name: numbers}, in the order of TASKS or of SPEEDS.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lra.records.markup import Block, Grid, Heading, Text
from lra.records.stats import mean_sd

TASKS = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder")  # percent
SPEEDS = tuple(f"{length} {unit}" for unit in ("steps/s", "GB") for length in ("1K", "2K", "3K", "4K"))


def read() -> dict[str, Any]:
    """What published.json holds."""
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def blocks() -> list[Block]:
    """The block "Published, not rerun": one table per source, averages computed here."""
    sources = read()
    intro = "Accuracy in percent, from the papers; other data, code and sizes: no row compares with one above."
    tables: list[Block] = [Heading("Published, not rerun"), Text(intro)]
    for source in sources["accuracy"]:
        averaged = {name: (*row, mean_sd(row)[0]) for name, row in source["rows"].items()}
        tables += _table(source | {"rows": averaged}, (*TASKS, "average"))
    return tables + _table(sources["speed"], SPEEDS)


def _table(source: dict[str, Any], header: tuple[str, ...]) -> list[Block]:
    def cell(value, column):
        return f"{value:.1f}" if column.endswith("steps/s") else f"{value:.2f}"

    lines = tuple((name, *map(cell, row, header)) for name, row in source["rows"].items())
    return [Text("{title} ({citation}). {caveat}".format(**source)), Grid(("published", *header), lines)]
