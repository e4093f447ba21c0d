"""The levels of verification. Each is computed from the records whenever it is shown; none is stored.

V0  the form of lra/records/schema.py, and a path that is the run's identity: data hash and digest recomputed.
V1  agrees with itself and its predictions (lra/leaderboard/consistency.py), with the records beside it (context.py),
    and with its configuration: model, protocol and command (rerun.py builds the model).
V2  the probe's losses are repeated from the start, and from a checkpoint in the middle whose hash stands in the record.
V3  the final weights, whose hash stands in the record, give its predictions and its validation (rerun.py).
V4  somebody else's runs of the cell, which differ in all but the recipe, have an equivalent accuracy.

No level proves honesty. Peak memory, clocks beyond their mutual agreement, hardware and commit are their author's word.
V0 and V1 never import what a record names. Torch is loaded for the model alone. Nothing is written but by `submit`.
"""

import itertools
import os
import shutil
from argparse import Namespace
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from lra.leaderboard.consistency import Places, consistent, identity, labels_of, places
from lra.leaderboard.context import Context, trees
from lra.options import UsageError
from lra.records.record import predictions_path, read_record, write_labels
from lra.records.schema import Rejected, Unchecked, check
from lra.records.stats import Estimate, equivalence, margin, mean_sd
from tasks.base import SourceError
from tasks.store.files import atomic_path

FEWEST = 3  # runs by somebody else that V4 takes
ORDER = ("disputed", "inconclusive", "reproduced")  # of several people, the one least in favour counts


@dataclass(frozen=True)
class Reproduction:
    """V4: the runs of a cell against those of somebody else. `gap` is theirs minus the recorded, in fractions."""

    by: str
    seeds: int
    verdict: str  # reproduced, disputed or inconclusive
    gap: Estimate  # with its 90% interval
    margin: float

    def __str__(self) -> str:
        gap, low, high, margin = (100 * x for x in (*self.gap, self.margin))
        return (
            f"{self.verdict} by {self.by} ({self.seeds} seeds): {gap:+.1f} points [{low:+.1f}, {high:+.1f}], "
            f"equivalent within ±{margin:.1f}"
        )


@dataclass(frozen=True)
class Verdict:
    """How far a record was verified: levels passed, whether it was rejected, why it is not higher, and V4."""

    levels: tuple[int, ...] = ()
    rejected: bool = False
    reason: str = ""
    reproduction: Reproduction | None = None

    level = property(lambda self: max(self.levels, default=-1))

    @property
    def badge(self) -> str:
        """rejected, unverified, or V0 to V4; with `disputed` where somebody else's runs disagree."""
        if self.rejected:
            return "rejected"
        disputed = self.reproduction and self.reproduction.verdict == "disputed"
        return (f"V{self.level}" if self.levels else "unverified") + (" disputed" if disputed else "")


def verify(path: Path, level: int, places: Places, context: Context | None = None, tree: Path | None = None) -> Verdict:
    """Check one record up to `level` (0 to 3). V0 and V1 build on each other; V2 and V3 are independent.
    With a `context`, the record belongs to its `tree` (default: the one it lies in), and is held against the others.
    Never raises for what a record holds: a contradiction is `rejected`, what cannot be decided a `reason`."""
    verdict = Verdict()
    try:
        record = read_record(path)
        check(record)
        place = Path("records") / identity(record)
        if context is not None and tree is None:
            tree = path.parents[4]
            if path.relative_to(tree) != place:
                raise Rejected(f"its path is not its identity: what it records belongs to {place}")
        verdict = Verdict((0,))
        if level >= 1:
            consistent(path, record, places)
            if context is not None:
                context.agrees(tree, place, path, record)
            from lra.leaderboard import rerun  # loads torch

            rerun.model_again(record, places)
            verdict = Verdict((0, 1))
    except (Rejected, UsageError) as error:
        return replace(verdict, rejected=True, reason=str(error))
    except Unchecked as error:
        return replace(verdict, reason=str(error))
    for number in range(2, level + 1):
        if verdict.rejected:
            break
        try:
            shortfall = (rerun.probe_again if number == 2 else rerun.evaluate_again)(path, record, places)
            verdict = replace(verdict, levels=(*verdict.levels, number), reason=verdict.reason or shortfall or "")
        except Rejected as error:
            verdict = replace(verdict, rejected=True, reason=str(error))
        except (Unchecked, UsageError, SourceError) as error:
            verdict = replace(verdict, reason="; ".join(filter(None, (verdict.reason, f"V{number}: {error}"))))
    return verdict


def judge(places: Places, level: int = 1, named: Collection[str] = ()) -> dict[Path, Verdict]:
    """Every record below places.results by its path relative to it: levels up to `level`, and V4.
    Those of others are checked up to V2 in any case, where the data are at hand: below it they say nothing of V4.
    `named`: real paths of the records that are wanted, if not all of them."""
    results, context = places.results, Context(places.results)
    paths = [path for tree in trees(results) for path in sorted(tree.glob("records/*/*/*/seed*.json"))]
    wanted = [path for path in paths if not named or os.path.realpath(path) in named]
    verdicts = {}
    for path in tqdm(wanted, desc="verifying", unit="record", disable=None, leave=False, delay=2):
        place = path.relative_to(results)
        verdicts[place] = verify(path, max(level, 2) if author(place) else level, places, context)
    for place, reproduction in _reproductions(results, verdicts).items():
        before = verdicts[place]
        levels = (*before.levels, 4) if reproduction.verdict == "reproduced" else before.levels
        verdicts[place] = replace(before, levels=levels, reproduction=reproduction)
    return verdicts


def reproductions(verdicts: dict[Path, Verdict]) -> dict[Path, Reproduction]:
    """V4 of the records that somebody else ran, too."""
    return {place: v.reproduction for place, v in verdicts.items() if v.reproduction}


def author(place: Path) -> str:
    """Who submitted the record at a path below a results folder; empty for its owner."""
    return place.parts[1] if place.parts[0] == "counter" else ""


def _reproductions(results: Path, verdicts: dict[Path, Verdict]) -> dict[Path, Reproduction]:
    """V4 of the records that reached V1 and whose cell somebody else ran, with at least FEWEST seeds that reached V2.
    The owner's own runs count for others at V1."""
    cells: dict[tuple[str, ...], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for place, verdict in verdicts.items():
        if {1, 2 if author(place) else 1} <= set(verdict.levels):
            cells[place.parts[-4:-1]][author(place)].append(place)
    least: dict[Path, Reproduction] = {}
    for groups in (groups for groups in cells.values() if len(groups) > 1):
        read = {by: {p.stem: read_record(results / p)["result"] for p in places} for by, places in groups.items()}
        ended = {by: {seed: r for seed, r in runs.items() if r} for by, runs in read.items()}
        for (by, theirs), (other, ours) in itertools.permutations(ended.items(), 2):
            if min(len(ours), len(theirs)) < FEWEST:
                continue
            shares = [{seed: r["n_correct"] / r["n_test"] for seed, r in runs.items()} for runs in (ours, theirs)]
            within = margin(mean_sd([*shares[0].values()])[0], next(iter(ours.values()))["n_test"])
            verdict, gap = equivalence(*shares, within)
            found = Reproduction(by or "the owner of these results", len(theirs), verdict, gap, within)
            for place in groups[other]:
                known = least.get(place, found)
                least[place] = min(known, found, key=lambda r: ORDER.index(r.verdict))
    return least


def verify_all(args: Namespace) -> int:
    """`leaderboard verify`: every record, or those named, up to --level. Writes nothing. --level 4 is V1 and what the
    records of others show; those are asked for V1 alone. Exit code 1 if a record did not reach the level."""
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
    files or none: a refused one is named."""
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
