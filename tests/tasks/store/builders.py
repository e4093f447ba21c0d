"""Plain helpers of the tests of the store: damage, ages, raw data, sequences, builds of fixed splits."""

from __future__ import annotations

import json

import numpy as np

from tasks.base import SPLITS, Built, Split


def flip(path):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    """Drop the last two bytes."""
    path.write_bytes(path.read_bytes()[:-2])


def edit(folder, **changes):
    """Change the manifest; None removes a key."""
    path = folder / "manifest.json"
    manifest = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(manifest))


def seeded(tmp_path, name, seed):
    """A folder of raw data."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "seed.txt").write_text(str(seed))
    return tmp_path / name


def sequences(*texts):
    """Each text as the ids of its letters: a is 1."""
    return [np.array([ord(c) - ord("a") + 1 for c in text]) for text in texts]


def returning(changes):
    """A build function of fixed splits, one example each."""
    splits = {name: Split.of(sequences(text), [0]) for name, text in zip(SPLITS, "abc")} | changes

    def build(recipe, *, source, data_dir, workers, scratch):
        return Built(splits=splits, dataset="tiny", source=source, revision="1", licence="none")

    return build
