"""Preparing: built once, checked, written whole or not at all; one folder for one origin and one source code."""

import importlib
import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tasks
from lra.__main__ import main
from lra.registry import load_task
from tasks.base import SPLITS, SourceError, Split
from tasks.store import prepare as preparing
from tasks.store import prepared
from tasks.store.files import source_sha256
from tasks.store.prepare import prepare
from tasks.store.prepared import data_identity, load
from tests.tasks.store.builders import flip, returning, seeded, sequences

ROOT = Path(__file__).resolve().parents[3]


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


def test_second_call_reuses_the_folder(task, tmp_path, builds):
    first, _ = prepare(task, "smoke", out=tmp_path)
    again, reused = prepare(task, "smoke", out=tmp_path, workers=2)
    assert reused and len(builds) == 1 and again.manifest == first.manifest


def test_same_request_gives_the_same_bytes(task, tmp_path):
    one, _ = prepare(task, "smoke", out=tmp_path / "a", workers=1)
    two, _ = prepare(task, "smoke", out=tmp_path / "b", workers=3)
    assert one.manifest == two.manifest
    files = list((tmp_path / "a" / "tiny" / "smoke").iterdir())
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


# Interrupted


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
        with pytest.raises(kind, match="No space left on device.*free space" if kind is SourceError else None):
            prepare(task, "smoke", out=tmp_path)
    folder = tmp_path / "tiny" / "smoke"
    assert not folder.exists() and not hidden(folder)
    assert not prepare(task, "smoke", out=tmp_path)[1]


def test_interrupted_renewal_keeps_the_old_data(task, tmp_path, monkeypatch):
    before, _ = prepare(task, "smoke", out=tmp_path)
    recipe = task.RECIPES["smoke"]
    with monkeypatch.context() as patch:
        patch.setitem(task.RECIPES, "smoke", replace(recipe, data=replace(recipe.data, seed=1)))
        patch.setattr(preparing, "sha256_file", lambda path: 1 / 0)
        patch.setattr(preparing, "load", lambda folder: before)
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
    if len(saved) == 7:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    original(path, array)
numpy.save = save
"""


def test_the_same_command_after_sigkill_makes_the_same_data(lab, task, tmp_path):
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    killed = subprocess.run([*lab.driver(DIE), *words], cwd=ROOT, timeout=300)
    folder = tmp_path / "tiny" / "smoke"
    assert killed.returncode == -signal.SIGKILL and not folder.exists() and hidden(folder) == [".smoke.new"]
    assert main(words) == 0
    assert not hidden(folder)
    assert load(folder).manifest == load(lab.data / "tiny" / "smoke").manifest


def test_two_processes_at_once_make_the_data_once(lab, tmp_path):
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    slow = "import time, numpy; save = numpy.save; numpy.save = lambda *a: (time.sleep(0.1), save(*a))"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    running = [subprocess.Popen([*lab.driver(slow), *words], **pipes) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sorted("reused" in out for out, _ in said) == [False, True]
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == ["smoke", "smoke.lock"]
    load(tmp_path / "tiny" / "smoke")


def test_a_disk_that_is_really_full_is_one_line_and_leaves_nothing(lab, tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare(1) to mount a small disk with")
    mount = f"mount -t tmpfs -o size=16k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a tmpfs")
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", "--data", str(tmp_path)]
    script = f"{mount} && {shlex.join([*lab.driver(), *words])}; echo $?; ls -A {tmp_path}/tiny"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/tiny/smoke: cannot be written (") and "free space" in line
    assert done.stdout.split() == ["2"]


# Sharing


def test_two_processes_that_prepare_the_same_task_take_turns(task, tmp_path, monkeypatch):
    """Threads stand for processes: the lock is of the file, and each call opens it anew."""
    original, calls, results = task.build, [], []

    def build(*args, **kwargs):
        calls.append(1)
        time.sleep(0.2)
        return original(*args, **kwargs)

    monkeypatch.setattr(task, "build", build)

    def work():
        results.append(prepare(task, "smoke", out=tmp_path))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(calls) == 1 and sorted(reused for _, reused in results) == [False, True, True]


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


# Source code


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A task `mine` in a file of its own, as if it stood in tasks/; `mine(old, new)` edits and loads it."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    file = folder / "mine.py"
    file.write_text((ROOT / "tests/plugins/tasks/tiny.py").read_text().replace('name="tiny"', 'name="mine"'))
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(folder)])

    def edit_and_load(old="", new=""):
        file.write_text(file.read_text().replace(old, new))
        monkeypatch.delitem(sys.modules, "tasks.mine", raising=False)
        importlib.invalidate_caches()
        return load_task("mine")

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield edit_and_load
    sys.modules.pop("tasks.mine", None)


def test_edited_source_code_is_not_answered_with_old_data(mine, tmp_path, error_line, capsys):
    out = tmp_path / "my data"
    before, _ = prepare(mine(), "smoke", out=out)
    mine("(s == 1).sum() > (s == 2).sum()", "(s == 1).sum() < (s == 2).sum()")
    line = error_line("prepare", "mine", "--preset=smoke", "--data", out)
    command = f"python -m lra prepare mine --preset smoke --data '{out}' --source embedded --again"
    assert f"the source code of task mine has changed since {out}/mine/smoke was prepared: `{command}`" in line
    assert load(out / "mine" / "smoke").manifest == before.manifest, "nothing was touched"
    words = ["prepare", "mine", "--preset=smoke", "--data", str(out), "--source=embedded"]
    assert main([*words, "--again"]) == 0
    assert f"kept as {out}/mine/smoke.1" in capsys.readouterr().err
    assert load(out / "mine" / "smoke.1").manifest == before.manifest
    assert load(out / "mine" / "smoke").manifest["splits"] != before.manifest["splits"]
    assert main(words) == 0 and "reused" in capsys.readouterr().out
    assert main([*words, "--again"]) == 0 and "prepared" in capsys.readouterr().out
    assert sorted(path.name for path in (out / "mine").glob("smoke*/")) == ["smoke", "smoke.1", "smoke.2"]


def test_a_higher_version_takes_an_edit_without_again(mine, tmp_path):
    prepare(mine(), "smoke", out=tmp_path)
    assert not prepare(mine("version=1", "version=2"), "smoke", out=tmp_path)[1]
    assert not (tmp_path / "mine" / "smoke.1").exists()


def test_a_manifest_of_before_source_code_was_hashed_counts_as_unchanged(task, tmp_path):
    manifest = prepare(task, "smoke", out=tmp_path)[0].manifest
    assert manifest["source_sha256"] == source_sha256(task)
    del manifest["source_sha256"]
    manifest["sha256"] = prepared.seal(manifest)
    (tmp_path / "tiny" / "smoke" / "manifest.json").write_text(json.dumps(manifest))
    assert prepare(task, "smoke", out=tmp_path)[1]


def test_the_identity_of_data_does_not_depend_on_source_code(task, tmp_path):
    manifest = prepare(task, "smoke", out=tmp_path)[0].manifest
    assert data_identity(manifest | {"source_sha256": "0" * 64}) == data_identity(manifest)


# What a task may not deliver


@pytest.mark.parametrize(
    ("split", "says"),
    [
        (Split.of(sequences("ab"), [2]), "label 2 is outside 0 to 1"),
        (Split.of([np.array([70_000])], [0]), "token id 70000 is outside 1 to 4"),
        (Split.of([np.ones(42)], [0]), "sequence 0 has 42 tokens, expected 1 to seq_len=41"),
        (Split.of([], []), "empty; ask for fewer examples"),
        (Split.of(sequences("c"), [0]), "every example occurs in a later split, too"),
    ],
)
def test_bad_splits_are_one_line_and_leave_nothing(task, tmp_path, monkeypatch, error_line, split, says):
    monkeypatch.setattr(task, "build", returning({"val": split}))
    line = error_line("prepare", "tiny", "--preset=smoke", "--data", tmp_path)
    assert f"task tiny, val split: {says}" in line
    assert not list((tmp_path / "tiny").iterdir())


def test_a_split_that_is_not_there_is_one_line(task, tmp_path, monkeypatch, error_line):
    incomplete = returning({})(None, source="embedded", data_dir=None, workers=1, scratch=None)
    del incomplete.splits["val"]
    monkeypatch.setattr(task, "build", lambda recipe, **options: incomplete)
    line = error_line("prepare", "tiny", "--preset=smoke", "--data", tmp_path)
    assert line.startswith("error: task tiny, val split: empty")


def test_a_folder_of_raw_data_that_is_not_there_is_named_without_layouts(tmp_path, plugins, error_line):
    for name in ("tiny", "text", "image", "listops"):
        words = ("prepare", name, "--preset=smoke", "--data", tmp_path / "out", "--data-dir", tmp_path / "absent")
        assert error_line(*words) == f"error: --data-dir {tmp_path}/absent: no such folder or archive"


def test_rule_7_removed_duplicates_are_counted_in_the_manifest(task, tmp_path, monkeypatch):
    original = task.build

    def build(*args, **kwargs):
        built = original(*args, **kwargs)
        train, test = built.splits["train"], built.splits["test"]
        built.splits["train"] = Split.of([test.sequence(0), *map(train.sequence, range(9))], np.zeros(10))
        return built

    monkeypatch.setattr(task, "build", build)
    manifest = prepare(task, "smoke", out=tmp_path)[0].manifest
    assert manifest["duplicates_removed"] == {"train": 1} and manifest["splits"]["train"]["n"] == 9
    assert manifest["duplicates_within"] == {}
