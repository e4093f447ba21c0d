"""What `list` and `table` do, with the arguments that commandline.py parses; answers at once, without torch."""

from __future__ import annotations

import json
from argparse import Namespace

from lra import registry
from lra.records import table
from lra.records.record import PRESETS, report_skipped


def list_names(args: Namespace) -> None:
    """`list`: names, one a line or as JSON."""
    known = {
        "tasks": registry.task_names,
        "attentions": registry.attention_names,
        "presets": lambda: list(PRESETS),
    }
    names = known[args.what]()
    print(json.dumps(names) if args.json else "\n".join(names))


def show_table(args: Namespace) -> int:
    """`table`: from the records alone. Exit code 1 when a file was left out; the rest is shown all the same."""
    skipped: list[str] = []
    text = table.render(args.results, args.format, args.preset, skipped.append)
    if args.write:
        table.write(args.write, text)
    else:
        print(text, end="")
    for line in skipped:
        report_skipped(line)
    return 1 if skipped else 0
