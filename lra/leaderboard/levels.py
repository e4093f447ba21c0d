"""The levels of verification.

V0  the form of lra/records/schema.py, and a path that is the run's identity: data hash and digest recomputed.
V1  agrees with itself, its predictions and the records beside it (lra/leaderboard/consistency.py); model, protocol and
    command are those its configuration gives (lra/leaderboard/rerun.py builds it).
V2  the probe's losses are repeated; V3 the saved weights are evaluated again (lra/leaderboard/rerun.py).
V4  somebody else's runs of the cell have an equivalent accuracy (lra/leaderboard/submit.py).

What no computation on a record can show stays its author's word: peak memory, clocks beyond their mutual
agreement, hardware, the commit. V0 and V1 never import what a record names; torch is loaded for the model alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lra.leaderboard.consistency import Places, consistent
from lra.leaderboard.identity import identity
from lra.options import UsageError
from lra.records.record import read_record
from lra.records.schema import Rejected, Unchecked, check
from lra.records.stats import Estimate
from tasks.base import SourceError


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
    reason: str = "never verified, or changed since: python -m lra leaderboard verify"
    reproduction: Reproduction | None = None

    @property
    def badge(self) -> str:
        """rejected, unverified, or V0 to V4; with `disputed` where somebody else's runs disagree."""
        if self.rejected:
            return "rejected"
        disputed = self.reproduction and self.reproduction.verdict == "disputed"
        return (f"V{max(self.levels)}" if self.levels else "unverified") + (" disputed" if disputed else "")


def verify(path: Path, level: int, places: Places, context: Context | None = None) -> Verdict:
    """Check one record up to `level` (0 to 3). V0 and V1 build on each other; V2 and V3 are independent.

    Never raises for what a record holds: a contradiction is `rejected`, what cannot be decided a `reason`. Nothing is
    written.
    """
    verdict = Verdict(reason="")
    try:
        record = read_record(path)
        check(record)
        place = identity(record)
        if context is not None and path.relative_to(context.root) != place:
            raise Rejected(f"its path is not its identity: what it records belongs to {place}")
        verdict = replace(verdict, levels=(0,))
        if level >= 1:
            consistent(path, record, places)
            if context is not None:
                context.agrees(path, record)
            from lra.leaderboard import rerun  # loads torch

            rerun.model_again(record, places)
            verdict = replace(verdict, levels=(0, 1))
    except (Rejected, UsageError) as error:
        return replace(verdict, rejected=True, reason=str(error))
    except Unchecked as error:
        return replace(verdict, reason=str(error))
    for number, repeat in ((2, "probe_again"), (3, "evaluate_again")):
        if number > level or verdict.rejected:
            break
        try:
            getattr(rerun, repeat)(path, record, places)
            verdict = replace(verdict, levels=(*verdict.levels, number))
        except Rejected as error:
            verdict = replace(verdict, rejected=True, reason=str(error))
        except (Unchecked, UsageError, SourceError) as error:
            verdict = replace(verdict, reason=verdict.reason or f"V{number}: {error}")
    return verdict


class Context:
    """What the records of one tree say about each other: floors and revision of the same data, seeds of a cell."""

    def __init__(self, root: Path, records: Iterable[tuple[Path, dict[str, Any]]]):
        self.root, self.seeds = Path(root), defaultdict(set)
        votes: dict[str, Counter] = defaultdict(Counter)
        for path, record in records:
            self.seeds[path.parent].add(path.stem)
            try:
                votes[record["data"]["manifest_sha256"]][_data_facts(record)] += 1
            except (KeyError, TypeError):
                continue  # malformed: V0 names the field
        self.usual = {data: counts.most_common(1)[0][0] for data, counts in votes.items()}

    def agrees(self, path: Path, record: dict[str, Any]) -> None:
        """Raise Rejected where most records of the same data have other facts of them, Unchecked for a gap of seeds."""
        facts = _data_facts(record)
        usual = self.usual.get(record["data"]["manifest_sha256"], facts)
        if usual != facts:
            others = "those of other records on the same data"
            raise Rejected(f"data: floors or revision differ from {others}: {usual}")
        if gap := missing_seeds(self.seeds[path.parent] | {path.stem}):
            raise Unchecked(gap)


def _data_facts(record: dict[str, Any]) -> tuple:
    """What all records of the same data have in common: floors and revision."""
    return tuple(sorted(record["data"]["floors"].items())), record["data"]["revision"]


def missing_seeds(names: Iterable[str]) -> str:
    """Of n files seed<k> of a cell, which of seed0 ... seed<n-1> are missing, in a sentence; empty if none is."""
    names = set(names)
    gap = [str(k) for k in range(len(names)) if f"seed{k}" not in names]
    return f"the cell's seeds must be 0, 1, ...: missing {', '.join(gap)}" if gap else ""
