"""Prepared data: memory-mapped arrays with a manifest, verified whenever they are read.

DATA/<task>/<preset>/ holds, for each split, `<split>.tokens.npy`, `<split>.offsets.npy` and
`<split>.labels.npy` (see base.Split), and manifest.json. Training reads only that folder.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import SPLITS, SourceError, Split
from tasks.store.files import sha256_file

SCHEMA = "lra-data/1"


@dataclass(frozen=True)
class Prepared:
    """A verified folder: its manifest and its splits as read-only memory maps."""

    manifest: dict[str, Any]
    splits: dict[str, Split]


def command(folder: Path, *options: str) -> str:
    """The command line that prepares a folder."""
    data = folder.parent.parent
    where = () if data == Path("data") else ("--data", str(data))
    words = ("python", "-m", "lra", "prepare", folder.parent.name, "--preset", folder.name)
    return shlex.join([*words, *where, *options])


def load(folder: Path) -> Prepared:
    """Open a prepared folder and hash all of it. Raises SourceError when it is absent, incomplete or altered."""
    folder = Path(folder)
    path, remedy = folder / "manifest.json", f"run `{command(folder)}` to make it again"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["sha256"] != seal(manifest):
            raise ValueError
        arrays = manifest["arrays"]
    except FileNotFoundError:
        raise SourceError(f"no prepared data in {folder}: run `{command(folder)}`") from None
    except (ValueError, KeyError, TypeError):
        raise SourceError(f"{path} is damaged: {remedy}") from None
    if manifest["schema"] != SCHEMA:
        raise SourceError(f"{path} has schema {manifest['schema']!r}, not {SCHEMA!r}: {remedy}")
    for name, expected in arrays.items():
        if not (folder / name).is_file():
            raise SourceError(f"{folder / name} is missing: {remedy}")
        if (digest := sha256_file(folder / name)) != expected:
            raise SourceError(f"{folder / name}: sha256 is {digest}, expected {expected}: {remedy}")

    def array(split: str, part: str) -> np.ndarray:
        return np.load(folder / f"{split}.{part}.npy", mmap_mode="r", allow_pickle=False)

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


def seal(manifest: dict[str, Any]) -> str:
    """sha256 over all of a manifest but the seal itself."""
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
