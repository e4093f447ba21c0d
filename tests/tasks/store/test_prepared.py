"""Prepared data, read: a manifest that is verified, and an identity of the content."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tasks.base import SPLITS, SourceError
from tasks.store import prepared
from tasks.store.prepare import prepare
from tasks.store.prepared import data_identity, load
from tests.tasks.store.builders import cut, edit, flip, seeded

ROOT = Path(__file__).resolve().parents[3]


def test_arrays_are_read_only_memory_maps_of_what_was_built(task, tmp_path):
    found, _ = prepare(task, "smoke", out=tmp_path)
    built = task.build(task.RECIPES["smoke"], source="embedded", data_dir=None, workers=1, scratch=tmp_path)
    for name in SPLITS:
        for part in ("tokens", "offsets", "labels"):
            array = getattr(found.splits[name], part)
            assert isinstance(array, np.memmap) and not array.flags.writeable
            assert np.array_equal(array, getattr(built.splits[name], part))


# Damage


DAMAGE = {
    "a flipped byte of tokens": lambda f: flip(f / "train.tokens.npy"),
    "a flipped byte of labels": lambda f: flip(f / "test.labels.npy"),
    "a truncated array": lambda f: cut(f / "val.tokens.npy"),
    "a missing array": lambda f: (f / "test.offsets.npy").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "half a manifest": lambda f: (f / "manifest.json").write_text((f / "manifest.json").read_text()[:200]),
    "an empty manifest": lambda f: (f / "manifest.json").write_text("{}"),
    "a manifest that is a list": lambda f: (f / "manifest.json").write_text("[]"),
    "a binary manifest": lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a manifest of no arrays": lambda f: edit(f, arrays={}),
    "a manifest with a list of arrays": lambda f: edit(f, arrays=[]),
    "a manifest without its request": lambda f: edit(f, request=None),
    "a manifest of another schema": lambda f: edit(f, schema="lra-data/0"),
    "another floor": lambda f: edit(f, floors={"majority": 0.123}),
    "another data set's name": lambda f: edit(f, dataset="CIFAR-10"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed_and_the_data_made_again(task, tmp_path, name):
    before, _ = prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    DAMAGE[name](folder)
    with pytest.raises(SourceError, match="python -m lra prepare") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    after, reused = prepare(task, "smoke", out=tmp_path)
    assert not reused and after.manifest == before.manifest


@pytest.mark.parametrize(("data", "where"), [("data", ""), ("my data", " --data 'my data'")])
def test_absent_data_name_the_command_to_copy(data, where):
    with pytest.raises(SourceError) as caught:
        load(Path(data) / "tiny" / "smoke")
    command = f"python -m lra prepare tiny --preset smoke{where}"
    assert str(caught.value) == f"no prepared data in {data}/tiny/smoke: run `{command}`"


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_change_is_noticed_whatever_the_time_of_the_file(task, tmp_path, damage):
    prepare(task, "smoke", out=tmp_path)
    path = tmp_path / "tiny" / "smoke" / "val.labels.npy"
    before = path.stat()
    damage(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SourceError, match=r"val.labels.npy: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        load(path.parent)


# Identity


@pytest.mark.parametrize("source", ["hub", "generated"])
def test_a_copy_from_elsewhere_is_the_same_data_and_a_substitute_is_not(task, tmp_path, source):
    manifest = prepare(task, "smoke", out=tmp_path, data_dir=seeded(tmp_path, "one", 1))[0].manifest
    assert data_identity(manifest | {"source": source}) == data_identity(manifest)
    assert data_identity(manifest | {"dataset": "other"}) != data_identity(manifest)
    assert data_identity(manifest | {"source": "embedded", "substitute": True}) != data_identity(manifest)


def test_identities_of_committed_records_are_those_of_their_facts():
    """A record's own facts and name give the identity it was written with, source included."""
    records = [
        json.loads(path.read_text()) for path in sorted((ROOT / "results" / "reference").glob("records/*/*/*/*.json"))
    ]
    assert records
    for record in records:
        task, data = record["task"], record["data"]
        facts = {"schema": prepared.SCHEMA, "task": task["name"], **{k: data[k] for k in ("source", "splits")}}
        facts |= {k: task[k] for k in ("version", "dataset", "substitute")}
        assert data_identity(facts) == data["manifest_sha256"]


def test_identity_is_of_the_content_and_not_of_where_it_came_from(task, tmp_path):
    one = prepare(task, "smoke", out=tmp_path / "a", data_dir=seeded(tmp_path, "one", 1))[0]
    two = prepare(task, "smoke", out=tmp_path / "b", data_dir=seeded(tmp_path, "two", 1))[0]
    three = prepare(task, "smoke", out=tmp_path / "c", data_dir=seeded(tmp_path, "three", 3))[0]
    assert data_identity(one.manifest) == data_identity(two.manifest) != data_identity(three.manifest)
