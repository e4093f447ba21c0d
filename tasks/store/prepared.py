"""Prepared data: what their splits must hold, and the folder that they are read from, verified whenever they are.

DATA/<task>/<preset>/ holds, for each split, `<split>.tokens.npy`, `<split>.offsets.npy` and
`<split>.labels.npy` (see base.Split), and manifest.json. Training reads only that folder.
"""

import hashlib
import json
import shlex
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tasks.base import SPLITS, Meta, SourceError, Split
from tasks.store.files import sha256_file

SCHEMA = "lra-data/1"
Splits = dict[str, Split]


def check(meta: Meta, name: str, split: Split, seq_len: int) -> None:
    """SourceError, which names task, split and value, unless the split keeps these rules.

    It has at least one example, and `towers` sequences an example. A sequence has 1 to `seq_len` tokens. Token ids are
    1 to vocab - 1 (0 is padding) and labels are 0 to classes - 1, stored as uint16 and uint8.
    """
    where, n, lengths = f"task {meta.name}, {name} split", len(split.labels), np.diff(split.offsets)
    if not n:
        raise SourceError(f"{where}: empty; ask for fewer examples of the other splits")
    if len(lengths) != meta.towers * n or split.offsets[0] or split.offsets[-1] != len(split.tokens):
        raise SourceError(f"{where}: {len(lengths)} sequences of {n} examples, expected {meta.towers} each")
    if lengths.min() < 1 or lengths.max() > seq_len:
        i = int(lengths.argmin() if lengths.min() < 1 else lengths.argmax())
        raise SourceError(f"{where}: sequence {i} has {lengths[i]} tokens, expected 1 to seq_len={seq_len}")
    for what, values, dtype, least, most, source in (
        ("token id", split.tokens, np.uint16, 1, meta.vocab - 1, "0 is padding, META.vocab"),
        ("label", split.labels, np.uint8, 0, meta.classes - 1, "META.classes"),
    ):
        for value in (values.min(), values.max()):
            if not least <= value <= most:
                raise SourceError(f"{where}: {what} {value} is outside {least} to {most} ({source})")
        if values.dtype != dtype:
            limit = f"whole numbers up to {np.iinfo(dtype).max:,} (give rare ones one shared {what})"
            raise SourceError(f"{where}: the {what}s are {values.dtype}, expected {np.dtype(dtype)}: {limit}")


def disjoint(splits: Splits, towers: int) -> tuple[Splits, dict[str, int], dict[str, int]]:
    """Drop from train what occurs in val or test, and from val what occurs in test. Test is never touched.

    Examples are compared by content, as the model sees them. Returns the splits, the numbers dropped, and
    how many examples of each remaining split repeat an earlier one of it, where any do; these stay.
    """
    kept, known, removed, repeated = dict(splits), set(), {}, {}
    for name in reversed(SPLITS):
        split = splits[name]
        lengths, bounds = np.diff(split.offsets).reshape(-1, towers), pairwise(split.offsets[::towers])
        parts = (n.tobytes() + split.tokens[start:end].tobytes() for n, (start, end) in zip(lengths, bounds))
        contents = [hashlib.blake2b(part, digest_size=16).digest() for part in parts]
        fresh = [i for i, content in enumerate(contents) if content not in known]
        if dropped := len(contents) - len(fresh):
            removed[name] = dropped
            sequences = [split.sequence(towers * i + t) for i in fresh for t in range(towers)]
            kept[name] = Split.of(sequences, split.labels[fresh])
        if again := len(fresh) - len({contents[i] for i in fresh}):
            repeated[name] = again
        known.update(contents)
    return kept, removed, repeated


def facts(split: Split) -> dict[str, Any]:
    """Number of examples, sha256 of all arrays and of the labels, mean and longest length in tokens."""
    whole, lengths = hashlib.sha256(), np.diff(split.offsets)
    for array in vars(split).values():
        whole.update(np.ascontiguousarray(array))
    return {
        "n": len(split.labels),
        "sha256": whole.hexdigest(),
        "labels_sha256": hashlib.sha256(np.ascontiguousarray(split.labels)).hexdigest(),
        "mean_length": round(float(lengths.mean()), 1),
        "max_length": int(lengths.max()),
    }


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

    paths = {name: [folder / f"{name}.{part}.npy" for part in ("tokens", "offsets", "labels")] for name in SPLITS}
    arrays = {name: [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths[name]] for name in SPLITS}
    return Prepared(manifest, {name: Split(*arrays[name]) for name in SPLITS})


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
