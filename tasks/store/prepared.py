"""Prepared data: built once, written as memory-mapped arrays with a manifest, verified whenever it is read.

OUT/<task>/<preset>/ holds, for each split, `<split>.tokens.npy`, `<split>.offsets.npy` and
`<split>.labels.npy` (see base.Split), and manifest.json. Training reads only that folder. It appears whole, by
one rename; beside it stand its lock and, while it is made, hidden folders that the next `prepare` clears away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from tasks.base import SPLITS, Built, SourceError, Split
from tasks.store import archives, parts, stamps
from tasks.store.duplicates import disjoint
from tasks.store.files import atomic_path, one_line, sha256_file

SCHEMA = "lra-data/1"


@dataclass(frozen=True)
class Prepared:
    """A verified folder: its manifest and its splits as read-only memory maps."""

    manifest: dict[str, Any]
    splits: dict[str, Split]


def prepare(
    task: ModuleType,
    preset: str,
    *,
    out: Path,
    source: str | None = None,
    data_dir: Path | None = None,
    workers: int = 1,
    verify: bool = False,
) -> tuple[Prepared, bool]:
    """Build `task` at `preset` into out/<task>/<preset>, or reuse what is there. Returns (data, reused).

    `source` is embedded, hub or local; None means local with a `data_dir`, else what the recipe names. A
    generated task uses its files in `data_dir` where there are any. `data_dir` may be an archive. `verify`
    hashes every byte of what is there instead of trusting sizes and times. A folder that is incomplete or does
    not match its hashes is rebuilt; one made from another source is left alone and raises SourceError. Two
    processes preparing the same task take turns; a resumable task goes on where an interrupted call stopped.
    """
    recipe = task.RECIPES[preset]
    source = source or ("local" if data_dir and not task.META.generated else recipe.data.source)
    folder = Path(out) / task.META.name / preset
    origin = {"source": source, "data_dir": str(Path(data_dir).resolve()) if data_dir else None}
    request = {"task": task.META.name, "version": task.META.version, **asdict(recipe.data), **origin}
    with _locked(folder), parts.resumable(task.META, folder) as resumed:
        try:
            found = load(folder, full=verify)
        except SourceError as error:
            found = None
            if folder.exists():
                print(f"making it again: {error}", file=sys.stderr)
        if found is not None:
            before = found.manifest["request"]
            if before == request:
                return found, True
            if {k: before[k] for k in origin} != origin:
                raise SourceError(
                    f"{folder} holds data from {_origin(before)}, and {_origin(origin)} was asked for: "
                    f"give another --data, or remove the folder"
                )
        with archives.opened(task, recipe.data, data_dir, _hidden(folder, "raw")) as (raw, files):
            built = task.Task().build(recipe, source=source, data_dir=raw, workers=workers, **resumed)
        splits, removed, repeated = disjoint(built.splits, task.META.towers)
        manifest = _manifest(task, request, built, splits)
        manifest |= {"duplicates_removed": removed, "duplicates_within": repeated}
        manifest["files"] = files | manifest["files"]
        _write(folder, splits, manifest)
        return load(folder), False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; what a killed process left beside the folder is cleared away.

    Data in a folder that is read-only are used as they are.
    """
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
        lock.release()


def _hidden(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _clear(folder: Path) -> None:
    """Remove the hidden folders; what stood in `folder` goes back there if nothing took its place."""
    if _hidden(folder, "old").exists() and not folder.exists():
        _hidden(folder, "old").rename(folder)
    for left in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(left)


def load(folder: Path, *, full: bool = False) -> Prepared:
    """Open and verify a prepared folder. Raises SourceError when it is absent, incomplete or altered.

    Arrays are hashed unless their sizes and times are those of the last time; `full` hashes them anyway.
    """
    path = Path(folder) / "manifest.json"
    remedy = "run `python -m lra prepare` to make it again"
    try:
        manifest = json.loads(path.read_text())
        if manifest["sha256"] != _seal(manifest):
            raise ValueError
        arrays = manifest["arrays"]
    except FileNotFoundError:
        task, preset = path.parent.parts[-2:]
        command = f"python -m lra prepare {task} --preset {preset}"
        command += f" --data {path.parents[2]}" if path.parents[2] != Path("data") else ""
        raise SourceError(f"no prepared data in {folder}: run `{command}`") from None
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{path} is damaged: {remedy}") from None
    if manifest["schema"] != SCHEMA:
        raise SourceError(f"{path} has schema {manifest['schema']!r}, not {SCHEMA!r}: {remedy}")
    if full or not stamps.unchanged(path.parent, manifest):
        for name, digest in arrays.items():
            if not (path.parent / name).is_file():
                raise SourceError(f"{path.parent / name} is missing: {remedy}")
            if (found := sha256_file(path.parent / name)) != digest:
                raise SourceError(f"{path.parent / name}: sha256 is {found}, expected {digest}: {remedy}")
        stamps.remember(path.parent, manifest)

    def array(split, part):
        return np.load(path.parent / f"{split}.{part}.npy", mmap_mode="r", allow_pickle=False)

    splits = {s: Split(array(s, "tokens"), array(s, "offsets"), array(s, "labels")) for s in SPLITS}
    return Prepared(manifest, splits)


def data_identity(manifest: dict[str, Any]) -> str:
    """sha256 of what the model trains on: task, data set and split contents; no host, date or measurement.

    Copies of one data set are the same data wherever they were found. (The hash has always held a word for
    the source. Records made with it tell embedded from generated, so these two words stay.)
    """
    parts = {k: manifest[k] for k in ("schema", "task", "version", "dataset", "substitute", "splits")}
    parts["source"] = "embedded" if manifest["source"] == "embedded" else "generated"
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _seal(manifest: dict[str, Any]) -> str:
    """sha256 over all of a manifest but the seal itself."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _origin(request: dict[str, Any]) -> str:
    return request["data_dir"] or f"source {request['source']!r}"


def _split_facts(split: Split) -> dict[str, Any]:
    whole = hashlib.sha256()
    for array in (split.tokens, split.offsets, split.labels):
        whole.update(np.ascontiguousarray(array).tobytes())
    lengths = np.diff(split.offsets)
    return {
        "n": len(split.labels),
        "sha256": whole.hexdigest(),
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(split.labels).tobytes()).hexdigest(),
        "mean_length": round(float(lengths.mean()), 1),
        "max_length": int(lengths.max()),
    }


def _manifest(
    task: ModuleType, request: dict[str, Any], built: Built, splits: dict[str, Split]
) -> dict[str, Any]:
    for name, split in splits.items():
        if not len(split.labels):
            raise SourceError(
                f"{task.META.name}: the {name} split is empty; ask for fewer examples elsewhere"
            )
        if int(np.diff(split.offsets).max()) > request["seq_len"]:
            raise SourceError(
                f"{task.META.name}: a {name} sequence is longer than seq_len {request['seq_len']}"
            )
    manifest = {"schema": SCHEMA, "task": task.META.name, "version": task.META.version, "request": request}
    manifest |= {k: v for k, v in vars(built).items() if k != "splits"}
    manifest["splits"] = {name: _split_facts(split) for name, split in splits.items()}
    return manifest


def _write(folder: Path, splits: dict[str, Split], manifest: dict[str, Any]) -> None:
    """Write into a sibling folder, then put it in place by one rename; the caller holds the lock."""
    temporary = _hidden(folder, "new")
    try:
        temporary.mkdir()
        for name, split in splits.items():
            for part, array in vars(split).items():
                with atomic_path(temporary / f"{name}.{part}.npy") as path:
                    np.save(path, array)
        manifest["arrays"] = {p.name: sha256_file(p) for p in sorted(temporary.glob("*.npy"))}
        manifest["sha256"] = _seal(manifest)
        with atomic_path(temporary / "manifest.json") as path:
            path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if folder.exists():
            folder.rename(_hidden(folder, "old"))
        temporary.rename(folder)
    except OSError as error:
        problem = f"cannot be written ({one_line(error)})"
        raise SourceError(f"{folder}: {problem}; free space or give another --data") from error
    finally:
        _clear(folder)
