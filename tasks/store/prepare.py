"""Preparing data: build a task's splits once, check them, write them whole or not at all.

DATA/<task>/<preset>/ (see tasks/store/prepared.py) appears by one rename. Beside it stand its lock and, while it
is made, hidden folders: the next `prepare` removes what a killed process leaves of them, and uses the pieces of
a long generation.
"""

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from tasks.base import SPLITS, SourceError, Split, majority
from tasks.store import archives
from tasks.store.files import atomic_path, one_line, sha256_file, source_sha256
from tasks.store.prepared import SCHEMA, Prepared, check, command, disjoint, facts, load, seal


def prepare(
    task: ModuleType,
    preset: str,
    *,
    out: Path,
    source: str | None = None,
    data_dir: Path | None = None,
    workers: int = 1,
    again: bool = False,
) -> tuple[Prepared, bool]:
    """Build `task` at `preset` into out/<task>/<preset>, or reuse what is there. Returns (data, reused).

    source      embedded, hub, local or generated; None: local with a `data_dir`, else what the recipe names
    data_dir    folder or archive of raw files; a generated task uses its files there, if there are any
    again       build in any case, and keep the folder that is there as <preset>.1, .2, ...

    A folder that is incomplete, does not match its hashes or was made for another recipe or META.version is
    built again. SourceError, which leaves the folder alone, if it was made from another source of data or by
    another source code of the task. Two processes that prepare the same task take turns.
    """
    meta, name, recipe = task.META, task.META.name, task.RECIPES[preset]
    source = source or ("local" if data_dir and not meta.generated else recipe.data.source)
    folder = Path(out) / name / preset
    origin = {"source": source, "data_dir": os.path.realpath(data_dir) if data_dir else None}
    request = {"task": name, "version": meta.version, **asdict(recipe.data), **origin}
    code, parts = source_sha256(task), folder.with_name(f".parts.{preset}")
    with _locked(folder):
        if not again and (existing := _reusable(task, folder, request)):
            return existing, True
        with archives.opened(task, recipe.data, data_dir, folder.with_name(f".{preset}.raw")) as (raw, files):
            built = task.build(recipe, source=source, data_dir=raw, workers=workers, scratch=parts / code[:16])
        if data_dir and source != "generated" and built.source == "generated":
            names = ", ".join(task.members(recipe.data) if hasattr(task, "members") else ()) or "no file at all"
            print(f"the data are generated: --data-dir {data_dir} was searched for {names}", file=sys.stderr)
        if not meta.declares(built.source, built.dataset, built.substitute):
            what = f"{built.dataset!r} ({built.source}, substitute {built.substitute})"
            raise SourceError(f"task {name}: its META.datasets has no {what}")
        for split in SPLITS:
            check(meta, split, built.splits.get(split, Split.of([], [])), recipe.data.seq_len)
        splits, removed, repeated = disjoint(built.splits, meta.towers)
        if empty := [split for split in SPLITS if not len(splits[split].labels)]:
            raise SourceError(f"task {name}, {empty[0]} split: every example occurs in a later split, too")
        most_frequent = majority(built.splits["train"].labels, built.splits["test"].labels)
        manifest = {"schema": SCHEMA, "task": name, "version": meta.version, "request": request, "source_sha256": code}
        manifest |= vars(built) | {"duplicates_removed": removed, "duplicates_within": repeated}
        manifest |= {"files": files | built.files, "floors": {"majority": most_frequent} | built.floors}
        manifest["splits"] = {split: facts(splits[split]) for split in SPLITS}
        _write(folder, splits, manifest, again)
        shutil.rmtree(parts, ignore_errors=True)
        return load(folder), False


def check_unedited(task: ModuleType, folder: Path, prepared: Prepared) -> None:
    """Raise SourceError if the source of the task is no longer the one that made the data in `folder`."""
    request, code = prepared.manifest["request"], source_sha256(task)
    if prepared.manifest.get("source_sha256", code) != code:
        data_dir = request["data_dir"]
        again = command(folder, *(("--data-dir", data_dir) if data_dir else ("--source", request["source"])), "--again")
        problem = f"the source code of task {request['task']} has changed since {folder} was prepared"
        raise SourceError(f"{problem}: `{again}` prepares anew and keeps the old folder beside the new one")


def _reusable(task: ModuleType, folder: Path, request: dict[str, Any]) -> Prepared | None:
    """The data in `folder` if they answer the request, None if they have to be built (again)."""
    try:
        existing = load(folder)
    except SourceError as error:
        if folder.exists():
            print(f"making it again: {error}", file=sys.stderr)
        return None
    before = existing.manifest["request"]
    if any(before[key] != request[key] for key in ("source", "data_dir")):
        held, asked = (req["data_dir"] or f"source {req['source']!r}" for req in (before, request))
        way_out = "give another --data, or --again, which keeps the old folder beside the new one"
        raise SourceError(f"{folder} holds data from {held}, and {asked} was asked for: {way_out}")
    if before != request:
        return None
    check_unedited(task, folder, existing)
    return existing


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, if it is not read-only, and clear away what a killed process left beside the folder."""
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that prepares {folder}", file=sys.stderr)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES) or not folder.exists():
            raise
    try:
        if lock.is_locked:
            _clear(folder)
        yield
    finally:
        if lock.is_locked and not folder.exists():
            Path(lock.lock_file).unlink()  # a process that waits for it notices, and makes a new one
        lock.release()


def _clear(folder: Path) -> None:
    """Remove the hidden folders; what stood in `folder` goes back there if nothing took its place."""
    if (old := folder.with_name(f".{folder.name}.old")).exists() and not folder.exists():
        old.rename(folder)
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left)


def _write(folder: Path, splits: dict[str, Split], manifest: dict[str, Any], keep: bool) -> None:
    """Write into a sibling folder, then rename it; `keep`: the folder that was there becomes <preset>.1, .2, ..."""
    temporary = folder.with_name(f".{folder.name}.new")
    try:
        temporary.mkdir()
        for name, split in splits.items():
            for part, array in vars(split).items():
                with atomic_path(temporary / f"{name}.{part}.npy") as path:
                    np.save(path, array)
        manifest["arrays"] = {p.name: sha256_file(p) for p in sorted(temporary.glob("*.npy"))}
        manifest["sha256"] = seal(manifest)
        with atomic_path(temporary / "manifest.json") as path:
            path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", "utf-8")
        if folder.exists() and keep:
            names = (folder.with_name(f"{folder.name}.{k}") for k in itertools.count(1))
            print(f"kept as {folder.rename(next(n for n in names if not n.exists()))}", file=sys.stderr)
        elif folder.exists():
            folder.rename(folder.with_name(f".{folder.name}.old"))
        temporary.rename(folder)
    except OSError as error:
        problem = f"cannot be written ({one_line(error)})"
        raise SourceError(f"{folder}: {problem}; free space or give another --data") from error
    finally:
        _clear(folder)
