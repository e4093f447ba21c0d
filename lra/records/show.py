"""`table`, from its options to its output."""

from __future__ import annotations

from argparse import Namespace

from lra.records import table
from lra.records.record import report_skipped


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
