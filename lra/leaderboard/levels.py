"""The levels of verification, and the identity of a record.

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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lra.leaderboard.consistency import Places, consistent, task_module
from lra.options import UsageError
from lra.records.record import cell_digest, read_record, record_path
from lra.records.schema import Rejected, Unchecked, check
from tasks.base import Encoder, Optim, Recipe, SourceError
from tasks.store.prepared import SCHEMA as DATA_SCHEMA
from tasks.store.prepared import data_identity


@dataclass
class Outcome:
    """What a verification found: the levels passed, and why the next was not."""

    levels: set[int] = field(default_factory=set)
    rejected: bool = False
    reason: str = ""


def verify(path: Path, level: int, places: Places, context: Context | None = None) -> Outcome:
    """Check one record up to `level` (0 to 3). V0 and V1 build on each other; V2 and V3 are independent.

    Never raises for what a record holds: a contradiction is `rejected`, what cannot be decided a `reason`.
    """
    outcome = Outcome()
    try:
        record = well_formed(path, context)
        outcome.levels.add(0)
        if level >= 1:
            consistent(path, record, places)
            if context is not None:
                context.agrees(path, record)
            from lra.leaderboard import rerun  # loads torch

            rerun.model_again(record, places)
            outcome.levels.add(1)
    except (Rejected, UsageError) as error:
        return replace(outcome, rejected=True, reason=str(error))
    except Unchecked as error:
        return replace(outcome, reason=str(error))
    for n in range(2, level + 1):
        try:
            {2: rerun.probe_again, 3: rerun.evaluate_again}[n](path, record, places)
            outcome.levels.add(n)
        except Rejected as error:
            return replace(outcome, rejected=True, reason=str(error))
        except (Unchecked, UsageError, SourceError) as error:
            outcome.reason = outcome.reason or f"V{n}: {error}"
    return outcome


class Context:
    """What the records of one tree say about each other: floors and revision of the same data, seeds of a cell."""

    def __init__(self, root: Path, records: Iterable[tuple[Path, dict[str, Any]]]):
        self.root, self.seeds = Path(root), defaultdict(set)
        said: dict[str, Counter] = defaultdict(Counter)
        for path, record in records:
            self.seeds[path.parent].add(path.stem)
            try:
                said[record["data"]["manifest_sha256"]][_said(record)] += 1
            except (KeyError, TypeError):
                continue  # malformed: V0 says so
        self.usual = {data: counts.most_common(1)[0][0] for data, counts in said.items()}

    def agrees(self, path: Path, record: dict[str, Any]) -> None:
        """Raise Rejected where most records of the same data say otherwise of them, Unchecked for a gap of seeds."""
        usual = self.usual.get(record["data"]["manifest_sha256"], _said(record))
        if usual != _said(record):
            raise Rejected(
                f"data: floors or revision differ from those of other records on the same data: {usual}"
            )
        if gap := missing_seeds(self.seeds[path.parent] | {path.stem}):
            raise Unchecked(f"the cell's seeds must be 0, 1, ...: missing {', '.join(map(str, gap))}")


def _said(record: dict[str, Any]) -> tuple:
    return tuple(sorted(record["data"]["floors"].items())), record["data"]["revision"]


def missing_seeds(names: Iterable[str]) -> list[int]:
    """Of the n files seed<k> of a cell, which of seed0 ... seed<n-1> are not there: seeds leave no gap."""
    names = set(names)
    return [k for k in range(len(names)) if f"seed{k}" not in names]


# V0


def well_formed(path: Path, context: Context | None = None) -> dict[str, Any]:
    """V0. Returns the record; raises Rejected or UsageError."""
    record = read_record(path)
    check(record)
    place = identity(record)
    if context is not None and path.relative_to(context.root) != place:
        raise Rejected(f"its path is not its identity: what it records belongs to {place}")
    return record


def identity(record: dict[str, Any]) -> Path:
    """The path of a well-formed record under its tree, from its content alone. Raises Rejected.

    The data hash is recomputed from the splits' hashes, the digest from it, the preset and the recorded recipe.
    """
    task, data, model, training = (record[k] for k in ("task", "data", "model", "training"))
    as_run, known = asdict(recipe(record)), data_identity(manifest(record))
    if data["manifest_sha256"] != known:
        raise Rejected(f"data.manifest_sha256 must be {known}, by the task, data set and splits beside it")
    digest = cell_digest(
        task["name"],
        task["version"],
        known,
        as_run,
        training["overrides"],
        data["val_rule"],
        model["attention"],
        model["attention_config"],
    )
    path = record_path(Path(), task["name"], model["attention"], digest, training["seed"])
    return path.relative_to("records")


def manifest(record: dict[str, Any]) -> dict[str, Any]:
    """The part of the data's manifest that a record repeats: what `resolve` and the data hash need."""
    task, data = record["task"], record["data"]
    facts = {"schema": DATA_SCHEMA, "task": task["name"], "source": data["source"], "splits": data["splits"]}
    return facts | {k: task[k] for k in ("version", "dataset", "substitute")}


def recipe(record: dict[str, Any]) -> Recipe:
    """The recipe as run: data from the preset, the rest as recorded. Raises Rejected for an unknown task."""
    task, training = record["task"], record["training"]
    preset = task_module(record).RECIPES[task["preset"]]
    return replace(
        preset,
        encoder=Encoder(**record["model"]["encoder"]),
        train=Optim(**training["recipe"]),
        budget=training["budget"],
    )
