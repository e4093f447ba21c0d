"""`leaderboard verify` and `submit`: check records, and take in those of others. Loads no torch itself."""

import os
import shutil
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

from lra.leaderboard.consistency import identity, labels_of, places
from lra.leaderboard.context import Context
from lra.leaderboard.levels import FEWEST, Verdict, author, judge, verify
from lra.options import UsageError
from lra.records.record import predictions_path, read_record, write_labels
from tasks.store.files import atomic_path


def verify_all(args: Namespace) -> int:
    """`leaderboard verify`: every record, or those named, up to --level. Writes nothing.

    --level 4 is V1 and what the records of others show; those are asked for V1 alone. Exit code 1 if a record did not
    reach the level.
    """
    level, where = args.level, places(args)
    named = {os.path.realpath(path): path for path in args.files}
    verdicts = judge(where, *((1,) if level == 4 else (level, named)))
    shortfalls: dict[Path, str] = {}
    for place, verdict in verdicts.items():
        if named.pop(os.path.realpath(args.results / place), None) or not args.files:
            shortfalls[place] = _shortfall(verdict, 1 if level == 4 and author(place) else level)
    for path in named.values():  # not under --results
        shortfalls[path] = _shortfall(verify(path, min(level, 3), where), level)
    groups = defaultdict(list)  # a line for each rejected record, and one for each other reason
    for place, why in shortfalls.items():
        if why:
            groups[why, place if why.startswith("rejected") else None].append(place)
    for (why, _), group in groups.items():
        print(f"{group[0]}{f' and {len(group) - 1} more' if len(group) > 1 else ''}: {why}")
    short = sum(map(bool, shortfalls.values()))
    print(f"{len(shortfalls)} records: {len(shortfalls) - short} reached V{level}, {short} did not")
    return 1 if short else 0


def _shortfall(verdict: Verdict, level: int) -> str:
    """Why a record did not reach a level; empty if it did."""
    if verdict.rejected:
        return f"rejected: {verdict.reason}"
    why = str(verdict.reproduction or verdict.reason or f"no {FEWEST} verified runs of somebody else")
    return "" if level in verdict.levels else f"not V{level}: {why if level == 4 else verdict.reason}"


def submit(args: Namespace) -> int:
    """`leaderboard submit --by NAME`: verify records from elsewhere at V1, and add them to the tree of NAME.

    A file is a record with its predictions beside it. No run is overwritten, and none joins the owner's cells. All
    files or none: a refused one is named.
    """
    tree, where, context = counter_tree(args.results, args.by), places(args), Context(args.results)
    taken: dict[Path, Path] = {}
    for path in args.files:
        verdict = verify(path, 0, where)
        if not verdict.levels:
            raise UsageError(f"{path} is refused: {verdict.reason}")
        place = Path("records") / identity(read_record(path))
        if (tree / place).exists():
            raise UsageError(f"{path} is refused: {tree / place} is there already")
        if place in taken:
            raise UsageError(f"{path} is refused: {taken[place]} records the same run")
        taken[place] = path
        context.add(tree, place, read_record(path))
    labels = set()
    for path in taken.values():
        verdict, record = verify(path, 1, where, context, tree), read_record(path)
        if 1 not in verdict.levels:
            raise UsageError(f"{path} is refused: {verdict.reason}")
        labels |= {labels_of(record, where)} if record["result"] else set()
    for content in labels:
        write_labels(args.results, content)
    for place, path in taken.items():
        target = tree / place
        for source, goal in ((predictions_path(path), predictions_path(target)), (path, target)):
            if source.exists():
                with atomic_path(goal) as temporary:
                    shutil.copyfile(source, temporary)
        print(f"added {target}: V1")
    return 0


def counter_tree(results: Path, by: str) -> Path:
    """The tree of the records of somebody else. Raises UsageError for a name that is no plain word."""
    if not by.replace("-", "").isalnum() or not by.isascii() or len(by) > 40:
        raise UsageError(f"--by takes letters, digits and hyphens, at most 40; got {by[:60]!r}")
    return Path(results) / "counter" / by
