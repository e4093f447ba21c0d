"""What records say about each other: copies, facts of the same data, seeds of a cell. No torch.

A results folder holds trees: RESULTS itself, with the records of its owner, and RESULTS/counter/<name>, with those that
<name> submitted. The owner's records are held against each other, those of somebody else against the owner's, too.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lra.options import UsageError
from lra.records.record import iterate_records, read_predictions
from lra.records.schema import Rejected, Unchecked
from tasks.base import SPLITS

TELLING = 10  # equal answers are no chance if so many are wrong, and so many are not of the commonest class


# Whose run a record is of; `place`: the path below the tree.
Origin = NamedTuple("Origin", [("tree", Path), ("place", Path), ("attention", str), ("seed", int), ("seconds", float)])


def trees(results: Path) -> list[Path]:
    """RESULTS, then RESULTS/counter/<name> of everybody who submitted records."""
    return [Path(results), *sorted(p.parent for p in Path(results).glob("counter/*/records"))]


class Context:
    """The records of a results folder, side by side."""

    def __init__(self, results: Path):
        self.owner = Path(results)
        self.seeds: dict[tuple[Path, Path], set[str]] = defaultdict(set)
        self.claims: dict[tuple, Counter] = defaultdict(Counter)  # (tree, subject, key) -> values by records
        self.runs: dict[tuple[str, Any], list[Origin]] = defaultdict(list)  # (trace, value) -> who left it
        for tree in trees(results):
            for path, record in iterate_records(tree, report=lambda line: None):
                self.add(tree, path.relative_to(tree), record)

    def add(self, tree: Path, place: Path, record: dict[str, Any]) -> None:
        """Take a record in that stands, or is to stand, at `place` below a tree."""
        self.seeds[tree, place.parent].add(place.stem)
        try:
            traces, claims, origin = [*_traces(place, record)], [*_claims(record)], _origin(tree, place, record)
        except (KeyError, TypeError, AttributeError):
            return  # malformed: V0 names the field
        for trace in traces:
            self.runs[trace].append(origin)
        for subject, key, value in claims:
            self.claims[tree, subject, key][value] += 1

    def agrees(self, tree: Path, place: Path, path: Path, record: dict[str, Any]) -> None:
        """Raise Rejected for a copy or for other facts of the same data, Unchecked for a gap of seeds or one attention
        under two names, as whoever starts from a copy of a file has it: such runs stay in tables, without a level.
        `path` is where the record is now, with its predictions beside it."""
        # Of facts the owner's records decide; where there are none of these data, most of the tree.
        for subject, key, value in _claims(record):
            known = self.claims.get((self.owner, subject, key)) or self.claims.get((tree, subject, key))
            usual = known.most_common(1)[0][0] if known else value
            if value != usual:
                raise Rejected(f"data: {subject} differ from those of other records on the same data: {usual}")
        self._copies(tree, place, path, record)
        names = self.seeds[tree, place.parent] | {place.stem}
        first = 0 if tree == self.owner else min(int(name.removeprefix("seed")) for name in names)
        if gap := [str(k) for k in range(first, first + len(names)) if f"seed{k}" not in names]:
            raise Unchecked(f"the cell's seeds must be {first}, {first + 1}, ...: missing {', '.join(gap)}")

    def _copies(self, tree: Path, place: Path, path: Path, record: dict[str, Any]) -> None:
        """No two runs are equal but those of one author, attention and seed, whose options may change nothing."""
        me = _origin(tree, place, record)
        for trace in _traces(place, record):
            for other in self.runs.get(trace, ()):
                own, same = other.tree == tree, other[2:4] == me[2:4]
                if (own and same) or (other.tree != self.owner and tree == self.owner):
                    continue
                what = trace[0]
                if what == "start" and own and "." not in record["started"] and other.seconds != me.seconds:
                    continue  # known to the second alone, and processes of a sweep start together
                # After few steps different attentions of one author may well give the same answers.
                if what == "predictions" and (own and other.attention != me.attention or not _telling(path, record)):
                    continue
                where = (other.tree / other.place).relative_to(self.owner)
                if what == "curve" and own and tree == self.owner and other.attention != me.attention:
                    raise Unchecked(f"its curve is that of {where}: one attention under two names, or a copy of a run")
                way_out = "one run is one record" if own else "take other seeds than theirs"
                raise Rejected(f"its {what} is that of {where}, so it is a copy, or cannot be told from one: {way_out}")


def _origin(tree: Path, place: Path, record: dict[str, Any]) -> Origin:
    return Origin(tree, place, record["model"]["attention"], record["training"]["seed"], record["cost"]["wall_s"])


def _traces(place: Path, record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What no two runs share: the losses of the curve, the predictions, and of one cell the start."""
    if result := record["result"]:
        losses = json.dumps([point[2] for point in result["curve"]])
        yield "curve", hashlib.sha256(losses.encode()).hexdigest()
        yield "predictions", (record["data"]["splits"]["test"]["labels_sha256"], result["predictions_sha256"])
    yield "start", (place.parent, record["started"])


def _claims(record: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(subject, key, value): records of one key have one value."""
    task, data = record["task"], record["data"]
    yield "floors or revision", data["manifest_sha256"], (tuple(sorted(data["floors"].items())), data["revision"])
    splits = [data["splits"][name] for name in SPLITS]
    yield "task or substitute", splits[2]["labels_sha256"], (task["name"], task["substitute"])
    if data["source"] != "local":  # copies of one data set may differ in their encoding
        facts = tuple(task[k] for k in ("name", "version", "dataset", "seq_len")), *(s["n"] for s in splits)
        yield "hashes of the splits", facts, tuple(s["sha256"][:16] for s in splits)


def _telling(path: Path, record: dict[str, Any]) -> bool:
    """Whether two runs cannot have these answers by chance: neither nearly constant nor nearly all right."""
    try:
        counts = np.bincount(np.frombuffer(read_predictions(path, record), np.uint8))
    except UsageError:
        return False  # V1 says what is wrong with them
    wrong = record["result"]["n_test"] - record["result"]["n_correct"]
    return min(wrong, counts.sum() - counts.max()) >= TELLING
