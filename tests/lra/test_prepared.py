"""Prepared data: a manifest that is verified, atomic writing, disjoint splits, one folder for one origin."""

import json
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from lra.registry import load_task
from tasks import prepared
from tasks.base import SPLITS, Built, SourceError, Split
from tasks.prepared import data_identity, disjoint, load, prepare


@pytest.fixture
def task(plugins):
    """The module of the task `tiny`."""
    return load_task("tiny")


@pytest.fixture
def builds(task, monkeypatch):
    """How often the task was built, one entry each."""
    original, calls = task.Task.build, []

    def build(self, *args, **kwargs):
        calls.append(kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(task.Task, "build", build)
    return calls


def hidden(folder):
    """What stands beside a prepared folder, the lock apart."""
    return sorted(p.name for p in folder.parent.iterdir() if p != folder and p.suffix != ".lock")


def test_manifest_says_what_the_data_are(task, tmp_path):
    found, reused = prepare(task, "smoke", out=tmp_path)
    manifest = found.manifest
    assert not reused
    assert manifest == json.loads((tmp_path / "tiny" / "smoke" / "manifest.json").read_text())
    assert (manifest["task"], manifest["version"], manifest["dataset"]) == ("tiny", 1, "tiny")
    assert (manifest["source"], manifest["substitute"], manifest["licence"]) == ("embedded", False, "none")
    assert {name: facts["n"] for name, facts in manifest["splits"].items()} == task.SIZES
    assert manifest["splits"]["test"]["max_length"] == 37 and 0 < manifest["floors"]["majority"] < 1
    assert len(manifest["arrays"]) == 9
    for name in SPLITS:
        assert len(manifest["splits"][name]["sha256"]) == 64


def test_arrays_are_read_only_memory_maps_of_what_was_built(task, tmp_path):
    found, _ = prepare(task, "smoke", out=tmp_path)
    built = task.Task().build(task.RECIPES["smoke"], source="embedded", data_dir=None, workers=1)
    for name in SPLITS:
        for part in ("tokens", "offsets", "labels"):
            array = getattr(found.splits[name], part)
            assert isinstance(array, np.memmap) and not array.flags.writeable
            assert np.array_equal(array, getattr(built.splits[name], part))


def test_second_call_reuses_the_folder(task, tmp_path, builds):
    first, _ = prepare(task, "smoke", out=tmp_path)
    again, reused = prepare(task, "smoke", out=tmp_path, workers=2)
    assert reused and len(builds) == 1 and again.manifest == first.manifest


def test_same_request_gives_the_same_bytes(task, tmp_path):
    one, _ = prepare(task, "smoke", out=tmp_path / "a", workers=1)
    two, _ = prepare(task, "smoke", out=tmp_path / "b", workers=3)
    assert one.manifest == two.manifest
    files = [f for f in (tmp_path / "a" / "tiny" / "smoke").iterdir() if f.name != prepared.STAMP]
    assert len(files) == 10
    assert all(f.read_bytes() == (tmp_path / "b" / "tiny" / "smoke" / f.name).read_bytes() for f in files)


def test_changed_recipe_or_version_is_prepared_again(task, tmp_path, builds, monkeypatch):
    prepare(task, "smoke", out=tmp_path)
    recipe = task.RECIPES["smoke"]
    monkeypatch.setitem(task.RECIPES, "smoke", replace(recipe, data=replace(recipe.data, train=59)))
    found, reused = prepare(task, "smoke", out=tmp_path)
    assert not reused and found.manifest["splits"]["train"]["n"] == 59
    monkeypatch.setattr(task, "META", replace(task.META, version=2))
    assert not prepare(task, "smoke", out=tmp_path)[1] and len(builds) == 3


def test_changed_training_recipe_needs_no_new_data(task, tmp_path, monkeypatch):
    prepare(task, "smoke", out=tmp_path)
    recipe = task.RECIPES["smoke"]
    monkeypatch.setitem(task.RECIPES, "smoke", replace(recipe, train=replace(recipe.train, lr=1.0), budget=9))
    assert prepare(task, "smoke", out=tmp_path)[1]


# Damage


def flip(path):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path):
    """Drop the last two bytes."""
    path.write_bytes(path.read_bytes()[:-2])


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


def edit(folder, **changes):
    """Change the manifest; None removes a key."""
    path = folder / "manifest.json"
    manifest = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(manifest))


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


def test_absent_data_name_the_way_out(tmp_path):
    with pytest.raises(SourceError, match="no prepared data in .*python -m lra prepare"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("nth", [1, 4, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_write_leaves_nothing(task, tmp_path, monkeypatch, nth, error):
    original, saved = np.save, []

    def save(path, array):
        saved.append(path)
        if len(saved) == nth:
            path.write_bytes(b"half")
            raise error
        original(path, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", save)
        with pytest.raises(type(error)):
            prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    assert not folder.exists() and not hidden(folder)
    assert not prepare(task, "smoke", out=tmp_path)[1]


def test_interrupted_renewal_keeps_the_old_data(task, tmp_path, monkeypatch):
    before, _ = prepare(task, "smoke", out=tmp_path)
    recipe = task.RECIPES["smoke"]
    with monkeypatch.context() as patch:
        patch.setitem(task.RECIPES, "smoke", replace(recipe, data=replace(recipe.data, seed=1)))
        patch.setattr(prepared, "sha256_file", lambda path: 1 / 0 if ".smoke." in str(path) else "-")
        patch.setattr(prepared, "load", lambda folder: before)
        with pytest.raises(ZeroDivisionError):
            prepare(task, "smoke", out=tmp_path)
    assert load(tmp_path / "tiny" / "smoke").manifest == before.manifest
    assert not hidden(tmp_path / "tiny" / "smoke")


def test_what_a_killed_process_left_behind_is_cleared_away(task, tmp_path):
    prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    shutil.copytree(folder, folder.with_name(".smoke.new"))
    flip(folder / "train.tokens.npy")
    prepare(task, "smoke", out=tmp_path)
    assert not hidden(folder)


# Sharing


def test_two_processes_that_prepare_the_same_task_take_turns(task, tmp_path, monkeypatch):
    """Threads stand for processes: the lock is of the file, and each call opens it anew."""
    original, calls, results = task.Task.build, [], []

    def build(self, *args, **kwargs):
        calls.append(1)
        time.sleep(0.2)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(task.Task, "build", build)

    def work():
        results.append(prepare(task, "smoke", out=tmp_path))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1 and sorted(reused for _, reused in results) == [False, True, True]


def seeded(tmp_path, name, seed):
    """A folder of raw data."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "seed.txt").write_text(str(seed))
    return tmp_path / name


def test_another_source_into_the_same_folder_is_refused(task, tmp_path):
    before, _ = prepare(task, "smoke", out=tmp_path / "out")
    local = seeded(tmp_path, "raw", 1)
    with pytest.raises(SourceError, match="holds data from source 'embedded'.*raw.*another --out"):
        prepare(task, "smoke", out=tmp_path / "out", data_dir=local)
    assert load(tmp_path / "out" / "tiny" / "smoke").manifest == before.manifest


def test_another_data_dir_into_the_same_folder_is_refused(task, tmp_path):
    one, two = seeded(tmp_path, "one", 1), seeded(tmp_path, "two", 2)
    before, _ = prepare(task, "smoke", out=tmp_path / "out", data_dir=one)
    assert before.manifest["source"] == "local" and list(before.manifest["files"]) == ["seed.txt"]
    with pytest.raises(SourceError, match="holds data from .*one, and .*two was asked for"):
        prepare(task, "smoke", out=tmp_path / "out", data_dir=two)
    assert prepare(task, "smoke", out=tmp_path / "out", data_dir=one)[1]


def test_data_dir_given_another_way_is_the_same_folder(task, tmp_path, monkeypatch):
    local = seeded(tmp_path, "raw", 1)
    prepare(task, "smoke", out=tmp_path / "out", data_dir=local)
    monkeypatch.chdir(tmp_path)
    assert prepare(task, "smoke", out=tmp_path / "out", data_dir="raw")[1]


def test_identity_is_of_the_content_and_not_of_where_it_came_from(task, tmp_path):
    one = prepare(task, "smoke", out=tmp_path / "a", data_dir=seeded(tmp_path, "one", 1))[0]
    two = prepare(task, "smoke", out=tmp_path / "b", data_dir=seeded(tmp_path, "two", 1))[0]
    three = prepare(task, "smoke", out=tmp_path / "c", data_dir=seeded(tmp_path, "three", 3))[0]
    assert data_identity(one.manifest) == data_identity(two.manifest) != data_identity(three.manifest)


# Rule 7


def sequences(*texts):
    """Each text as the ids of its letters."""
    return [np.array([ord(c) for c in text]) for text in texts]


def test_rule_7_splits_are_disjoint_by_content_and_test_is_never_touched():
    splits = {
        "train": Split.of(sequences("a", "b", "c", "d", "a"), [0, 1, 2, 3, 4]),
        "val": Split.of(sequences("c", "e", "f"), [2, 5, 6]),
        "test": Split.of(sequences("b", "e", "g"), [1, 5, 7]),
    }
    kept, removed, repeated = disjoint(splits, 1)
    assert removed == {"train": 2, "val": 1} and repeated == {"train": 1}
    assert kept["test"] is splits["test"]
    assert kept["val"].labels.tolist() == [2, 6]
    assert kept["train"].labels.tolist() == [0, 3, 4]
    assert [kept["train"].sequence(i).tolist() for i in range(3)] == [[97], [100], [97]]


def test_rule_7_a_pair_is_a_duplicate_only_as_a_pair():
    splits = {
        "train": Split.of(sequences("a", "b", "ab", "c", "x", "y"), [0, 1, 2]),
        "val": Split.of(sequences("b", "a", "a", "bc"), [3, 4]),
        "test": Split.of(sequences("x", "y"), [5]),
    }
    kept, removed, repeated = disjoint(splits, 2)
    assert removed == {"train": 1} and not repeated and kept["train"].labels.tolist() == [0, 1]
    assert len(kept["train"].offsets) == 5 and len(kept["val"].labels) == 2


def test_rule_7_removed_duplicates_are_counted_in_the_manifest(task, tmp_path, monkeypatch):
    original = task.Task.build

    def build(self, *args, **kwargs):
        built = original(self, *args, **kwargs)
        train, test = built.splits["train"], built.splits["test"]
        built.splits["train"] = Split.of([test.sequence(0), *map(train.sequence, range(9))], np.zeros(10))
        return built

    monkeypatch.setattr(task.Task, "build", build)
    manifest = prepare(task, "smoke", out=tmp_path)[0].manifest
    assert manifest["duplicates_removed"] == {"train": 1} and manifest["splits"]["train"]["n"] == 9
    assert manifest["duplicates_within"] == {}


# What a task may not deliver


@pytest.mark.parametrize("name", SPLITS)
def test_empty_split_is_refused(task, tmp_path, monkeypatch, name):
    monkeypatch.setattr(task.Task, "build", returning({name: Split.of([], [])}))
    with pytest.raises(SourceError, match=f"the {name} split is empty"):
        prepare(task, "smoke", out=tmp_path)


def test_sequence_beyond_seq_len_is_refused(task, tmp_path, monkeypatch):
    monkeypatch.setattr(task.Task, "build", returning({"val": Split.of([np.ones(42)], [0])}))
    with pytest.raises(SourceError, match="val sequence is longer than seq_len 41"):
        prepare(task, "smoke", out=tmp_path)
    assert not (tmp_path / "tiny" / "smoke").exists()


def returning(changes):
    """A build method of fixed splits."""
    splits = {name: Split.of(sequences(name), [0]) for name in SPLITS} | changes

    def build(self, recipe, *, source, data_dir, workers):
        facts = dict(dataset="d", substitute=False, source=source, revision="1", licence="none")
        return Built(splits=splits, **facts)

    return build
