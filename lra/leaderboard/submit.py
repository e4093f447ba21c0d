"""`leaderboard`: take records in, verify them, and say how far each was verified. Nothing here loads torch itself.

results/verification.json keeps, for each record, the levels passed and the sha256 of what was checked: a record
or predictions changed afterwards have lost their badge. It holds no date, so checking again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lra.leaderboard.consistency import places
from lra.leaderboard.levels import Context, Outcome, identity, missing_seeds, verify
from lra.options import UsageError
from lra.records.record import iterate_records, predictions_path, read_limited, read_record
from lra.records.stats import Estimate, equivalence, margin
from tasks.store.files import atomic_path

SCHEMA = "lra-verification/1"
FIELDS = {"sha256", "levels", "rejected", "reason"}
FEWEST = 3  # runs by somebody else that V4 takes


@dataclass(frozen=True)
class Verdict:
    """How far a record was verified: `levels` passed, whether it was rejected, why it is not higher, and V4."""

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


@dataclass(frozen=True)
class Reproduction:
    """V4: the runs of a cell against those of somebody else. `gap` is theirs minus the recorded, in fractions."""

    by: str
    seeds: int
    verdict: str  # reproduced, disputed or inconclusive
    gap: Estimate  # with its 90% interval
    margin: float

    def __str__(self) -> str:
        numbers = (100 * x for x in (self.gap.value, self.gap.low, self.gap.high, self.margin))
        gap, low, high, within = numbers
        return (
            f"{self.verdict} by {self.by} ({self.seeds} seeds): {gap:+.1f} points [{low:+.1f}, {high:+.1f}], "
            f"equivalent within ±{within:.1f}"
        )


def verify_all(args: Namespace) -> int:
    """`leaderboard verify`: every record, or those named, up to --level; what is known of unchanged ones is kept.

    --level 4 is V1 and what the counter-records say, which are asked for V1 alone. Exit code 1 when a record did not
    reach the level.
    """
    results, level = args.results, 1 if args.level == 4 else args.level
    known, where, reached, seen = _read(results), places(args), {}, set()
    named = {path.resolve() for path in args.files}
    for root in roots(results):
        paths = sorted(root.glob("*/*/*/seed*.json"))
        wanted = [p for p in paths if not named or p.resolve() in named]
        seen |= {p.resolve() for p in wanted}
        context = Context(root, iterate_records(root.parent, report=lambda line: None)) if wanted else None
        for path in tqdm(wanted, desc="verifying", unit="record", disable=None, leave=False, delay=2):
            outcome = verify(path, level, where, context)
            place = path.relative_to(results)
            known[place.as_posix()] = _entry(path, outcome, known.get(place.as_posix()), results)
            reached[place] = _said(outcome, level)
    if not named:
        known = {place: entry for place, entry in known.items() if (results / place).exists()}
    _write(results, known)
    for path in sorted(named - seen):  # not under --results: said, and kept nowhere
        reached[path] = _said(verify(path, level, where), level)
    if args.level == 4:
        found = verified(results)
        reached = {place: why for place, why in reached.items() if why or place.parts[0] != "counter"}
        for place in [p for p, why in reached.items() if not why and p in found]:
            if 4 not in found[place].levels:
                reached[place] = str(
                    found[place].reproduction or f"not V4: no {FEWEST} verified counter-records"
                )
    for place, why in reached.items():
        if why:
            print(f"{place}: {why}")
    short = sum(map(bool, reached.values()))
    print(f"{len(reached)} records: {len(reached) - short} reached V{args.level}, {short} did not")
    return 1 if short else 0


def _said(outcome: Outcome, level: int) -> str:
    """Why a record did not reach a level; nothing if it did."""
    if outcome.rejected:
        return f"rejected: {outcome.reason}"
    return "" if level in outcome.levels else f"not V{level}: {outcome.reason}"


def submit(args: Namespace) -> int:
    """`leaderboard submit`: verify records that came from elsewhere at V1, then put them where they belong.

    A file is a record with its predictions beside it. Nothing is overwritten: a run that is there already is
    refused, or with --by NAME added to the counter-records of NAME. All files or none: a refused one is named.
    """
    root = counter_root(args.results, args.by) if args.by else args.results / "records"
    taken: dict[Path, Path] = {}
    for path in args.files:
        outcome = verify(path, 1, places(args))
        if 1 not in outcome.levels:
            raise UsageError(f"{path} is refused: {outcome.reason}")
        target = root / identity(read_record(path))
        if target.exists():
            same = target.read_bytes() == path.read_bytes()
            way_out = "" if same else ": --by NAME adds it as a counter-record"
            raise UsageError(
                f"{path} is refused: {target} is there {'already' if same else 'and differs'}{way_out}"
            )
        if target in taken:
            raise UsageError(f"{path} is refused: {taken[target]} records the same run")
        taken[target] = path
    for folder in {target.parent for target in taken}:
        names = {p.stem for p in folder.glob("seed*.json")} | {t.stem for t in taken if t.parent == folder}
        if gap := missing_seeds(names):
            raise UsageError(f"refused: the seeds of {folder} must be 0, 1, ...; missing {gap[0]}")
    for target, path in taken.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        for source, goal in ((predictions_path(path), predictions_path(target)), (path, target)):
            if source.exists():
                with atomic_path(goal) as temporary:
                    shutil.copyfile(source, temporary)
        print(f"added {target}")
    return verify_all(Namespace(**vars(args) | {"files": sorted(taken), "level": 1}))


def verified(results: Path) -> dict[Path, Verdict]:
    """Every record and counter-record under `results` (paths relative to it) with how far it was verified.

    From results/verification.json alone, apart from two rules that depend on other files and are looked up now:
    a cell whose seeds have a gap is not V1, and V4 is computed from the verified counter-records.
    """
    results = Path(results)
    known, verdicts = _read(results), {}
    for root in roots(results):
        for path in sorted(root.glob("*/*/*/seed*.json")):
            place = path.relative_to(results)
            entry = known.get(place.as_posix())
            if entry is None or entry["sha256"] != _fingerprint(path):
                verdicts[place] = Verdict()
            else:
                verdicts[place] = Verdict(tuple(entry["levels"]), entry["rejected"], entry["reason"])
    cells = defaultdict(list)
    for place in verdicts:
        cells[place.parent].append(place)
    for cell in cells.values():
        if gap := missing_seeds(p.stem for p in cell):
            for place in cell:
                if verdicts[place].levels:
                    reason = f"the cell's seeds must be 0, 1, ...: missing {', '.join(map(str, gap))}"
                    verdicts[place] = replace(verdicts[place], levels=(0,), reason=reason)
    for place, found in _reproductions(results, verdicts).items():
        before = verdicts[place]
        levels = (*before.levels, 4) if found.verdict == "reproduced" else before.levels
        verdicts[place] = replace(before, levels=levels, reproduction=found)
    return verdicts


def reproductions(results: Path) -> dict[Path, Reproduction]:
    """V4 of the records that somebody else ran, too; paths relative to `results`."""
    if not (Path(results) / "counter").exists():
        return {}
    return {place: v.reproduction for place, v in verified(results).items() if v.reproduction}


def roots(results: Path) -> list[Path]:
    """The trees of records: records/, then counter/<by>/records/ of everybody who repeated runs."""
    return [Path(results) / "records", *sorted(Path(results).glob("counter/*/records"))]


def counter_root(results: Path, by: str) -> Path:
    """The tree of the counter-records of somebody. Raises UsageError for a name that is no plain word."""
    if not by.replace("-", "").isalnum() or not by.isascii() or len(by) > 40:
        raise UsageError(f"--by takes letters, digits and hyphens, at most 40; got {by[:60]!r}")
    return Path(results) / "counter" / by / "records"


def _reproductions(results: Path, verdicts: dict[Path, Verdict]) -> dict[Path, Reproduction]:
    """V4 of the records whose cell somebody else ran with at least FEWEST verified seeds.

    Several people: the one least in favour counts, disputed before inconclusive before reproduced.
    """
    cells: dict[tuple[str, tuple[str, ...]], list[Path]] = defaultdict(list)
    for place, verdict in verdicts.items():
        if 1 in verdict.levels:
            counter = place.parts[0] == "counter"
            cells[place.parts[1] if counter else "", place.parts[3 if counter else 1 : -1]].append(place)
    order = ("disputed", "inconclusive", "reproduced")
    found: dict[Path, Reproduction] = {}
    for (by, cell), theirs in sorted(cells.items()):
        ours = cells.get(("", cell), [])
        if not by or len(theirs) < FEWEST or not ours:
            continue
        reproduction = _compare(results, by, ours, theirs)
        for place in ours if reproduction else ():
            other = found.get(place)
            if other is None or order.index(reproduction.verdict) < order.index(other.verdict):
                found[place] = reproduction
    return found


def _compare(results: Path, by: str, ours: list[Path], theirs: list[Path]) -> Reproduction | None:
    """The equivalence test of a cell; None without enough runs that ended on both sides."""
    scores = []
    for places_ in (theirs, ours):
        ended = {p.stem: r["result"] for p in places_ if (r := read_record(results / p))["result"]}
        scores.append({seed: r["n_correct"] / r["n_test"] for seed, r in ended.items()})
        n = next((r["n_test"] for r in ended.values()), 0)
    if min(map(len, scores)) < FEWEST:
        return None
    a, b = scores
    paired = a.keys() == b.keys()
    if paired:
        b = {seed: b[seed] for seed in a}
    within = margin(sum(b.values()) / len(b), n)
    verdict, gap = equivalence([*a.values()], [*b.values()], within, paired)
    return Reproduction(by, len(a), verdict, gap, within)


def _entry(path: Path, outcome: Outcome, before: dict[str, Any] | None, results: Path) -> dict[str, Any]:
    """What is kept of an outcome, with what was known of the same bytes: levels add up, a rejection stays until
    the level it happened at is passed. Reasons of this machine, such as absent weights, are not kept."""
    levels, rejected, sha256 = set(outcome.levels), outcome.rejected, _fingerprint(path)
    reason = outcome.reason.replace(f"{results}/", "") if rejected or 1 not in levels else ""
    if before and before["sha256"] == sha256 and not rejected:
        if before["rejected"] and levels <= set(before["levels"]):
            return before
        levels |= set() if before["rejected"] else set(before["levels"])
        reason = "" if 1 in levels else reason
    return {"sha256": sha256, "levels": sorted(levels), "rejected": rejected, "reason": reason}


def _fingerprint(path: Path) -> str:
    """sha256 over a record and its predictions; empty for what is not to be read."""
    digest = hashlib.sha256()
    for part in (path, predictions_path(path)):
        try:
            content = read_limited(part)
        except FileNotFoundError:
            content = b""
        except (OSError, ValueError):
            return ""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _read(results: Path) -> dict[str, dict[str, Any]]:
    path = Path(results) / "verification.json"
    try:
        found = json.loads(read_limited(path))
        entries = found["records"]
        if found["schema"] != SCHEMA or not all(e.keys() == FIELDS for e in entries.values()):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is damaged: remove it, and verify again") from None
    return entries


def _write(results: Path, known: dict[str, dict[str, Any]]) -> None:
    text = json.dumps({"schema": SCHEMA, "records": known}, indent=1, sort_keys=True) + "\n"
    with atomic_path(Path(results) / "verification.json") as temporary:
        temporary.write_text(text)
