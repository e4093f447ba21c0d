"""`leaderboard submit` and `verify`: take records in, and keep how far each was verified. Loads no torch itself.

results/verification.json keeps, for each record, the levels passed and the sha256 of what was checked: a record
or predictions changed afterwards have lost their badge. It holds no date, so checking again gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from argparse import Namespace
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lra.leaderboard.consistency import labels_of, places
from lra.leaderboard.identity import identity
from lra.leaderboard.levels import Context, Reproduction, Verdict, missing_seeds, verify
from lra.options import UsageError
from lra.records.compare import equivalent
from lra.records.record import iterate_records, predictions_path, read_limited, read_record, write_labels
from tasks.store.files import atomic_path

SCHEMA = "lra-verification/1"
FIELDS = {"sha256", "levels", "rejected", "reason"}
FEWEST = 3  # runs by somebody else that V4 takes


def _real(path: Path) -> Path:
    """The path without links; of a link that points to itself (for which Path.resolve fails) the link."""
    return Path(os.path.realpath(path))


def verify_all(args: Namespace) -> int:
    """`leaderboard verify`: every record, or those named, up to --level; what is known of unchanged ones is kept.

    --level 4 is V1 and what the counter-records show; a counter-record itself is asked for V1 alone. Exit code 1 if
    a record did not reach the level.
    """
    results, level = args.results, 1 if args.level == 4 else args.level
    known, where = _read(results), places(args)
    shortfalls: dict[Path, str] = {}  # why a record did not reach the level; empty if it did
    named, checked = {_real(path) for path in args.files}, set()
    for root in roots(results):
        paths = sorted(root.glob("*/*/*/seed*.json"))
        wanted = [p for p in paths if not named or _real(p) in named]
        checked |= set(map(_real, wanted))
        context = Context(root, iterate_records(root.parent, report=lambda line: None)) if wanted else None
        for path in tqdm(wanted, desc="verifying", unit="record", disable=None, leave=False, delay=2):
            verdict, place = verify(path, level, where, context), path.relative_to(results)
            known[place.as_posix()] = _entry(path, verdict, known.get(place.as_posix()), results)
            shortfalls[place] = _shortfall(verdict, level)
    if not named:
        known = {place: entry for place, entry in known.items() if (results / place).exists()}
    _write(results, known)
    for path in sorted(named - checked):  # not under --results: checked, and kept nowhere
        shortfalls[path] = _shortfall(verify(path, level, where), level)
    if args.level == 4:
        shortfalls = _without_v4(shortfalls, verified(results))
    _print_grouped(shortfalls)
    short = sum(map(bool, shortfalls.values()))
    print(f"{len(shortfalls)} records: {len(shortfalls) - short} reached V{args.level}, {short} did not")
    return 1 if short else 0


def _shortfall(verdict: Verdict, level: int) -> str:
    """Why a record did not reach a level; empty if it did."""
    if verdict.rejected:
        return f"rejected: {verdict.reason}"
    return "" if level in verdict.levels else f"not V{level}: {verdict.reason}"


def _without_v4(shortfalls: dict[Path, str], verdicts: dict[Path, Verdict]) -> dict[Path, str]:
    """The same for V4: records that reached V1 and have no equivalent runs by somebody else fall short, too."""
    asked = {place: why for place, why in shortfalls.items() if why or place.parts[0] != "counter"}
    for place, why in asked.items():
        if not why and place in verdicts and 4 not in verdicts[place].levels:
            none = f"not V4: no {FEWEST} verified counter-records"
            asked[place] = str(verdicts[place].reproduction or none)
    return asked


def _print_grouped(shortfalls: dict[Path, str]) -> None:
    """One line for each rejected record, and one for each other reason, such as data that are not prepared."""
    groups = defaultdict(list)
    for place, why in shortfalls.items():
        if why:
            groups[why, place if why.startswith("rejected") else None].append(place)
    for (why, _), group in groups.items():
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        print(f"{group[0]}{others}: {why}")


def submit(args: Namespace) -> int:
    """`leaderboard submit`: verify records that came from elsewhere at V1, then put them where they belong.

    A file is a record with its predictions beside it. Nothing is overwritten: a run that is there already is
    refused, or with --by NAME added to the counter-records of NAME. All files or none: a refused one is named.
    """
    root = counter_root(args.results, args.by) if args.by else args.results / "records"
    taken: dict[Path, Path] = {}
    labels: set[bytes] = set()
    for path in args.files:
        verdict = verify(path, 1, places(args))
        if 1 not in verdict.levels:
            raise UsageError(f"{path} is refused: {verdict.reason}")
        record = read_record(path)
        target = root / identity(record)
        if target.exists():
            differs = "and differs: --by NAME adds it as a counter-record"
            how = "already" if target.read_bytes() == path.read_bytes() else differs
            raise UsageError(f"{path} is refused: {target} is there {how}")
        if target in taken:
            raise UsageError(f"{path} is refused: {taken[target]} records the same run")
        taken[target] = path
        labels |= {labels_of(record, places(args))} if record["result"] else set()
    for folder in {target.parent for target in taken}:
        names = {p.stem for p in folder.glob("seed*.json")} | {t.stem for t in taken if t.parent == folder}
        if gap := missing_seeds(names):
            raise UsageError(f"{folder} is refused: {gap}")
    for content in labels:
        write_labels(args.results, content)
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
                    verdicts[place] = replace(verdicts[place], levels=(0,), reason=gap)
    for place, reproduction in _reproductions(results, verdicts).items():
        before = verdicts[place]
        levels = (*before.levels, 4) if reproduction.verdict == "reproduced" else before.levels
        verdicts[place] = replace(before, levels=levels, reproduction=reproduction)
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
    worst: dict[Path, Reproduction] = {}
    for (by, cell), theirs in sorted(cells.items()):
        ours = cells.get(("", cell), [])
        if not by or len(theirs) < FEWEST or not ours:
            continue
        reproduction = _reproduction(results, by, ours, theirs)
        for place in ours if reproduction else ():
            other = worst.get(place)
            if other is None or order.index(reproduction.verdict) < order.index(other.verdict):
                worst[place] = reproduction
    return worst


def _reproduction(results: Path, by: str, ours: list[Path], theirs: list[Path]) -> Reproduction | None:
    """The equivalence test of a cell; None without enough runs that ended on both sides."""
    accuracies, n = [], 0
    for group in (ours, theirs):
        ended = {p.stem: r["result"] for p in group if (r := read_record(results / p))["result"]}
        accuracies.append({seed: result["n_correct"] / result["n_test"] for seed, result in ended.items()})
        n = n or next((result["n_test"] for result in ended.values()), 0)
    if min(map(len, accuracies)) < FEWEST:
        return None
    verdict, gap, within = equivalent(*accuracies, n)
    return Reproduction(by, len(accuracies[1]), verdict, gap, within)


def _entry(path: Path, verdict: Verdict, before: dict[str, Any] | None, results: Path) -> dict[str, Any]:
    """What is kept of a verdict, with what was known of the same bytes.

    * Levels add up. A rejection stays until the level it happened at is passed.
    * A reason of this machine, such as absent weights, is not kept.
    """
    levels, rejected, sha256 = set(verdict.levels), verdict.rejected, _fingerprint(path)
    reason = verdict.reason.replace(f"{results}/", "") if rejected or 1 not in levels else ""
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
        file = json.loads(read_limited(path))
        entries = file["records"]
        if file["schema"] != SCHEMA or not all(e.keys() == FIELDS for e in entries.values()):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UsageError(f"{path} is damaged: remove it, and verify again") from None
    return entries


def _write(results: Path, known: dict[str, dict[str, Any]]) -> None:
    text = json.dumps({"schema": SCHEMA, "records": known}, indent=1, sort_keys=True) + "\n"
    with atomic_path(Path(results) / "verification.json") as temporary:
        temporary.write_text(text, "utf-8")
