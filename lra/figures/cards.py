"""`cards`: the numbers of tasks/DATA.md, from what `inspect --out results/reference/data` wrote. No torch."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from lra.figures.inspection import SCHEMA, TOKENS
from lra.options import PRESETS, UsageError
from lra.records.markup import Grid, markdown, refresh_block
from tasks.base import SPLITS
from tasks.store.files import atomic_path

FROM_CARDS = "../results/reference/data"  # the folder of the figures as tasks/DATA.md links to it


def cards(args: Namespace) -> None:
    """`cards`: print the block of each task, or put it between the markers of a file."""
    facts = read_facts(args.results / "data")
    blocks = {task: block(list(presets.values()), args.results / "data") for task, presets in facts.items()}
    if not args.write:
        print("\n\n".join(f"## {task}\n\n{text}" for task, text in blocks.items()))
        return
    text = args.write.read_text()
    for task, made in blocks.items():
        text = refresh_block(text, task, made)
    with atomic_path(args.write) as path:
        path.write_text(text)


def read_facts(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Facts by task and preset, presets in the usual order. Raises UsageError for a file that holds none."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        try:
            facts = json.loads(path.read_text())
            if facts["schema"] != SCHEMA:
                raise ValueError(f"schema {facts['schema']!r}")
            found.setdefault(facts["task"], {})[facts["preset"]] = facts
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no facts of `inspect` ({error}): write it again") from None
    if not found:
        raise UsageError(f"no facts in {folder}: run `python -m lra inspect TASK --out {folder}` first")
    order = {name: i for i, name in enumerate(PRESETS)}
    return {
        task: dict(sorted(presets.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
        for task, presets in found.items()
    }


def block(presets: list[dict[str, Any]], folder: Path) -> str:
    """One table, a column a preset, and links to the figures in `folder`."""
    rows: dict[str, list[str]] = {}
    for i, facts in enumerate(presets):
        for name, value in _rows(facts).items():
            rows.setdefault(name, [""] * len(presets))[i] = value
    header = ("", *(facts["preset"] for facts in presets))
    table = markdown([Grid(header, tuple((name, *values) for name, values in rows.items()))])
    links = []
    for facts in presets:
        stem = f"{facts['task']}-{facts['preset']}"
        for end, what in (("lengths.svg", "lengths"), ("sheet.png", "examples")):
            if (folder / f"{stem}-{end}").is_file():
                links.append(f"[{what}, {facts['preset']}]({FROM_CARDS}/{stem}-{end})")
    return table + (f"\nFigures: {', '.join(links)}.\n" if links else "")


def _rows(facts: dict[str, Any]) -> dict[str, str]:
    splits = facts["splits"]
    test = splits["test"]
    removed = ", ".join(f"{n:,} from {name}" for name, n in facts["duplicates_removed"].items())
    within = ", ".join(f"{n:,} in {name}" for name, n in facts["duplicates_within"].items())
    rows = {
        "data set": facts["dataset"],
        "revision": facts["revision"],
        "train / val / test": " / ".join(f"{splits[name]['n']:,}" for name in SPLITS),
        f"training tokens: {' / '.join(TOKENS)}": " / ".join(
            f"{splits['train']['tokens'][which]:,.6g}" for which in TOKENS
        ),
        "labels of test, %": "–".join(f"{100 * pick(test['labels']) / test['n']:.1f}" for pick in (min, max)),
        "duplicates across splits removed": removed or "none",
        "duplicates within a split, kept": within or "none",
    }
    rows |= {f"floor: {name}, % of test": f"{100 * value:.1f}" for name, value in facts["floors"].items()}
    return rows | {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in facts["report"].items()}
