"""`table`: the records as tables, with what somebody else's runs say of them. No torch."""

from __future__ import annotations

from argparse import Namespace

from lra.leaderboard.submit import reproductions
from lra.records import table
from lra.records.record import report_skipped


def show_table(args: Namespace) -> int:
    """`table`: from the records alone. Exit code 1 if a file was left out; the rest is shown all the same."""
    skipped: list[str] = []
    form = "compact" if args.compact else args.format
    text = table.render(args.results, form, args.preset, skipped.append, reproductions(args.results))
    if args.write:
        table.write(args.write, text)
    else:
        print(text, end="")
    for line in skipped:
        report_skipped(line)
    return 1 if skipped else 0
