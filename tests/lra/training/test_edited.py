"""A source that was edited after its record was written: noticed by train and sweep, and never forgotten."""

import json
import shutil
import subprocess
import sys

import pytest

import lra.records.record
import lra.scaling.sweep
import lra.training.config
import models.attention
import tasks.store.prepare
from lra.cli import main
from lra.records.record import predictions_path, suite_facts
from lra.scaling.jobs import Outcome
from tasks.store.files import sha256_file
from tests.conftest import PLUGINS


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The file of an attention `editable`, as if it stood in models/attention/."""
    (tmp_path / "plugin").mkdir()
    file = tmp_path / "plugin" / "editable.py"
    shutil.copy(PLUGINS / "attention" / "shift.py", file)
    monkeypatch.setattr(models.attention, "__path__", [*models.attention.__path__, str(file.parent)])
    sys.modules.pop("models.attention.editable", None)  # of the test before
    return file


def edit(file):
    """Change a source."""
    file.write_text(file.read_text() + "# edited\n")


def test_edited_attention_is_not_done_and_again_keeps_the_old_record(lab, plugin, error_line, capsys):
    old = lab.train(attention="editable")
    (path,) = lab.records()
    text, predictions = path.read_bytes(), predictions_path(path).read_bytes()
    edit(plugin)
    line = error_line(*lab.words(attention="editable"))
    assert f"attention editable has changed since {path}" in line and "--again" in line and "task" not in line
    assert lab.try_train("--again", attention="editable") == 0
    assert lab.records() == [path]
    new = json.loads(path.read_text())
    assert new["model"]["source_sha256"] != old["model"]["source_sha256"]
    assert new["task"]["source_sha256"] == old["task"]["source_sha256"]
    (earlier,) = path.parent.glob("earlier-*.json")
    assert earlier.read_bytes() == text and earlier.name == f"earlier-seed0-{sha256_file(earlier)[:8]}.json"
    assert predictions_path(earlier).read_bytes() == predictions
    capsys.readouterr()
    assert lab.try_train(attention="editable") == 0 and "already done" in capsys.readouterr().out
    assert main(["leaderboard", "verify", str(path), "--device=cpu", *lab.places]) == 0  # V0 knows the fields


def test_edited_task_is_not_done_and_nothing_is_trained_on_its_old_data(lab, monkeypatch, error_line):
    lab.train()
    original = lra.training.config.source_sha256
    edited = {"tasks.tiny": "0" * 64}
    for module in (lra.training.config, tasks.store.prepare):
        monkeypatch.setattr(module, "source_sha256", lambda m, *shared: edited.get(m.__name__) or original(m, *shared))
    assert "the source of task tiny has changed" in error_line(*lab.words())
    for words in ([*lab.words(), "--again"], lab.words(seed=1), lab.words(attention="constant")):
        assert "the source code of task tiny has changed since" in error_line(*words)
    assert len(lab.records()) == 1


def test_record_that_holds_no_hash_counts_as_unchanged(lab, plugin, capsys):
    record = lab.train(attention="editable")
    (path,) = lab.records()
    for section in ("task", "model"):
        del record[section]["source_sha256"]
    path.write_text(json.dumps(record))
    edit(plugin)
    assert lab.try_train(attention="editable") == 0 and "already done" in capsys.readouterr().out
    assert main(["leaderboard", "verify", str(path), "--device=cpu", *lab.places]) == 0


def test_checkpoint_of_another_source_is_refused(lab, plugin, error_line, monkeypatch):
    class Requested:  # stop after the first step
        def __enter__(self):
            self.requested = True
            return self

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("lra.training.train.StopSignals", Requested)
        assert lab.try_train(attention="editable") == 85
    edit(plugin)
    assert "made with another source" in error_line(*lab.words(attention="editable"))


def test_sweep_lists_changed_cells_and_again_runs_them(lab, plugin, capsys, monkeypatch):
    lab.train(attention="editable")
    lab.train()
    edit(plugin)
    words = ["sweep", "--tasks=tiny", "--attentions=softmax,editable", "--preset=smoke", "--device=cpu", *lab.places]
    capsys.readouterr()
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "2 cells, 1 done, 0 to run, 1 changed" in shown.out and "nothing to do" not in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith("changed: tiny editable seed 0: ") and "--again" in line
    ran = []
    monkeypatch.setattr(lra.scaling.sweep, "execute", lambda jobs, args: ran.extend(map(str, jobs)) or Outcome())
    assert main([*words, "--again"]) == 0 and ran == ["tiny editable seed 0"]


def test_new_file_makes_the_commit_dirty_and_new_results_do_not(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True, timeout=300)
    (tmp_path / "lra" / "records").mkdir(parents=True)
    monkeypatch.setattr(lra.records.record, "__file__", str(tmp_path / "lra" / "records" / "record.py"))
    for folder in ("results", "data", "runs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "new").write_text("")
    assert suite_facts()["git_dirty"] is False
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "new.py").write_text("")
    assert suite_facts()["git_dirty"] is True
