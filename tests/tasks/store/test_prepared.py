"""Prepared data: a manifest that is verified, atomic writing, disjoint splits, one folder for one origin."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lra.__main__ import main
from lra.registry import load_task
from tasks.base import SPLITS, Built, SourceError, Split
from tasks.store import prepared, stamps
from tasks.store.prepared import data_identity, disjoint, load, prepare

ROOT = Path(__file__).resolve().parents[3]


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
    files = [f for f in (tmp_path / "a" / "tiny" / "smoke").iterdir() if f.name != stamps.STAMP]
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
        kind = SourceError if isinstance(error, OSError) else type(error)
        with pytest.raises(
            kind, match="No space left on device.*free space" if kind is SourceError else None
        ):
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
        patch.setattr(prepared, "load", lambda folder, full: before)
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


def test_what_stood_there_comes_back_when_a_process_is_killed_between_the_two_renames(task, tmp_path, builds):
    before, _ = prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    folder.rename(folder.with_name(".smoke.old"))
    after, reused = prepare(task, "smoke", out=tmp_path)
    assert reused and len(builds) == 1 and after.manifest == before.manifest and not hidden(folder)


DIE = """
import os, signal, numpy
original, saved = numpy.save, []
def save(path, array):
    saved.append(path)
    if len(saved) == NTH:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, array)
numpy.save = save
"""


@pytest.mark.parametrize("nth", [1, 7])
def test_the_same_command_after_sigkill_makes_the_same_data(lab, task, tmp_path, nth):
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    killed = subprocess.run([*lab.driver(DIE.replace("NTH", str(nth))), *words], cwd=ROOT, timeout=60)
    folder = tmp_path / "tiny" / "smoke"
    assert killed.returncode == -signal.SIGKILL and not folder.exists() and hidden(folder) == [".smoke.new"]
    assert main(words) == 0
    assert not hidden(folder)
    assert load(folder, full=True).manifest == load(lab.data / "tiny" / "smoke").manifest


def test_two_processes_at_once_make_the_data_once(lab, tmp_path):
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    slow = "import time, numpy; save = numpy.save; numpy.save = lambda *a: (time.sleep(0.2), save(*a))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    running = [subprocess.Popen([*lab.driver(slow), *words], **pipes) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sorted("reused" in out for out, _ in said) == [False, True]
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == ["smoke", "smoke.lock"]
    load(tmp_path / "tiny" / "smoke", full=True)


def test_a_disk_that_is_really_full_is_one_line_and_leaves_nothing(lab, tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare(1) to mount a small disk with")
    mount = f"mount -t tmpfs -o size=16k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a tmpfs")
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    script = f"{mount} && {shlex.join([*lab.driver(), *words])}; echo $?; ls -A {tmp_path}/tiny"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/tiny/smoke: cannot be written (") and "free space" in line
    assert done.stdout.split() == ["2", "smoke.lock"]


# What is hashed


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that are hashed from here on."""
    original, names = prepared.sha256_file, []

    def record(path):
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(prepared, "sha256_file", record)
    return names


def age(folder, seconds=60):
    """Let the arrays have been written a while ago."""
    then = time.time() - seconds
    for path in folder.glob("*.npy"):
        os.utime(path, (then, then))


def test_arrays_of_known_size_and_time_are_not_hashed_again_unless_asked_for(task, tmp_path, hashed):
    prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    age(folder)
    hashed.clear()
    for expected in (9, 9, 9):  # once after the change of times, and then never
        load(folder)
        assert len(hashed) == expected
    load(folder, full=True)
    assert len(hashed) == 18
    assert prepare(task, "smoke", out=tmp_path)[1] and len(hashed) == 18
    assert prepare(task, "smoke", out=tmp_path, verify=True)[1] and len(hashed) == 27


def test_arrays_written_just_now_are_hashed_because_their_time_tells_nothing(task, tmp_path, hashed):
    prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    age(folder, 0)
    hashed.clear()
    load(folder)
    load(folder)
    assert len(hashed) == 18 and not (folder / stamps.STAMP).exists()


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_change_of_size_or_time_is_noticed_by_itself(task, tmp_path, damage):
    prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    age(folder)
    load(folder)
    damage(folder / "val.labels.npy")
    with pytest.raises(SourceError, match=r"val.labels.npy: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"):
        load(folder)


def test_verify_notices_what_size_and_time_hide_and_makes_the_data_again(lab, task, tmp_path, capsys):
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    main(words)
    folder = tmp_path / "tiny" / "smoke"
    age(folder)
    load(folder)
    flip(folder / "test.tokens.npy")
    age(folder, 60)
    stamp = json.loads((folder / stamps.STAMP).read_text())
    for name, (_, time_ns) in stamp["arrays"].items():
        os.utime(folder / name, ns=(time_ns, time_ns))
    load(folder)  # the fast path cannot see it
    capsys.readouterr()
    assert main([*words, "--verify"]) == 0
    said = capsys.readouterr()
    assert "prepared" in said.out and "test.tokens.npy: sha256 is" in said.err
    assert main([*words, "--verify"]) == 0
    assert "reused, every hash verified" in capsys.readouterr().out


def test_a_stamp_is_of_one_manifest(task, tmp_path, monkeypatch, hashed):
    prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    age(folder)
    load(folder)
    (folder / stamps.STAMP).write_text("{")
    hashed.clear()
    load(folder)
    stamp = json.loads((folder / stamps.STAMP).read_text())
    (folder / stamps.STAMP).write_text(json.dumps(stamp | {"manifest": "0" * 64}))
    load(folder)
    assert len(hashed) == 18


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
    with pytest.raises(SourceError, match="holds data from source 'embedded'.*raw.*another --data"):
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


@pytest.mark.parametrize("source", ["hub", "generated"])
def test_a_copy_from_elsewhere_is_the_same_data_and_a_substitute_is_not(task, tmp_path, source):
    manifest = prepare(task, "smoke", out=tmp_path, data_dir=seeded(tmp_path, "one", 1))[0].manifest
    assert data_identity(manifest | {"source": source}) == data_identity(manifest)
    assert data_identity(manifest | {"dataset": "other"}) != data_identity(manifest)
    assert data_identity(manifest | {"source": "embedded", "substitute": True}) != data_identity(manifest)


def test_identities_of_committed_records_are_those_of_their_facts():
    """A record's own facts and name give the identity it was written with, source included."""
    records = [
        json.loads(path.read_text())
        for path in sorted((ROOT / "results" / "reference").glob("records/*/*/*/*.json"))
    ]
    assert records
    for record in records:
        task, data = record["task"], record["data"]
        facts = {
            "schema": prepared.SCHEMA,
            "task": task["name"],
            **{k: data[k] for k in ("source", "splits")},
        }
        facts |= {k: task[k] for k in ("version", "dataset", "substitute")}
        assert data_identity(facts) == data["manifest_sha256"]


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
