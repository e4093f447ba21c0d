"""Verification: what a valid record reaches, and that every change to it is refused with its reason, unexecuted."""

import json
import shutil
import sys

import pytest

import models.attention
from lra.__main__ import main
from lra.leaderboard.consistency import Places, identity
from lra.leaderboard.context import Context
from lra.leaderboard.levels import judge, verify
from lra.records.record import iterate_records, predictions_path, read_record
from lra.records.schema import RECORD
from tests.conftest import ROOT

OTHER = "0" * 64


@pytest.fixture
def lab(trained, owner):
    """The owner's laboratory with the first of its runs alone, to be changed."""
    for path in owner.records()[1:]:
        path.unlink()
        predictions_path(path).unlink()
    return owner


def outcome(lab, level=1, path=None, **options):
    """Verify the only record, as `leaderboard verify` does."""
    places = Places(lab.results, lab.data, lab.runs, **options)
    return verify(path or lab.records()[0], level, places, Context(lab.results))


def change(lab, *keys, to):
    """Set one field of the record, keys leading to it; returns its path."""
    (path,) = lab.records()
    record = json.loads(path.read_text())
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to(inner[keys[-1]]) if callable(to) else to
    path.write_text(json.dumps(record))
    return path


def test_an_unchanged_record_reaches_every_level_that_needs_no_one_else(lab):
    found = outcome(lab, 3)
    assert found.levels == (0, 1, 2, 3) and found.reason == ""


def test_a_copied_attention_stays_in_the_table_without_a_level(lab, tmp_path, monkeypatch, capsys):
    """Who brings an attention begins with a copy of one. Its runs are equal, bit for bit, to those of the other."""
    name = read_record(lab.records()[0])["model"]["attention"]
    shutil.rmtree(lab.results / "records")
    (tmp_path / "plugin").mkdir()
    shutil.copy(ROOT / "models" / "attention" / f"{name}.py", tmp_path / "plugin" / "mine.py")
    monkeypatch.setattr(models.attention, "__path__", [*models.attention.__path__, str(tmp_path / "plugin")])
    for attention in (name, "mine"):
        lab.train(attention=attention)
    capsys.readouterr()
    assert main(["table", "--results", str(lab.results), "--preset=smoke"]) == 0
    assert {name, "mine"} <= {
        line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "|" in line
    }
    for path in lab.records():
        found = outcome(lab, path=path)
        assert found.levels == (0,) and "one attention under two names" in found.reason


def test_a_failed_run_carries_its_curve_and_probe_and_is_consistent(lab):
    shutil.rmtree(lab.results / "records")
    lab.train("--set", "train.lr=1e30")
    assert outcome(lab, 2).levels == (0, 1, 2)


def test_an_open_run_with_overrides_is_consistent(lab):
    shutil.rmtree(lab.results / "records")
    lab.train("--set", "train.lr=3e-3", "--set", "encoder.width=20", "--val-rule=legacy", attention="linformer")
    assert outcome(lab, 2).levels == (0, 1, 2)


def test_a_floor_that_only_the_data_know_is_rejected_at_v2(lab):
    change(lab, "data", "floors", to=lambda v: v | {"shortcut": 0.99})
    assert outcome(lab, 1).levels == (0, 1)
    assert "data.floors" in outcome(lab, 2).reason


def test_a_floor_unlike_that_of_the_other_records_on_the_same_data_is_rejected(owner):
    path = owner.records()[1]
    record = json.loads(path.read_text())
    record["data"]["floors"]["shortcut"] = 0.99
    path.write_text(json.dumps(record))
    assert "differ from those of other records" in outcome(owner, path=path).reason
    assert outcome(owner).levels == (0, 1)


# Code that a record names


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The name of an attention outside the suite, whose import leaves a file behind; and that file."""
    witness = tmp_path / "imported"
    source = "from pathlib import Path\nfrom models.attention.softmax import Attention as Mine\n"
    (tmp_path / "outsider.py").write_text(f"{source}Path({str(witness)!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "outsider:Mine", witness
    sys.modules.pop("outsider", None)


def test_outside_code_is_never_imported_without_trust(lab, outside, error_line, tmp_path):
    name, witness = outside
    shutil.rmtree(lab.results / "records")
    lab.train(attention=name)
    witness.unlink()
    del sys.modules["outsider"]
    path = str(lab.records()[0])
    found = outcome(lab, 3)
    assert found.levels == (0,) and not found.rejected and "--trust" in found.reason
    assert "--trust" in error_line("evaluate", path, *lab.places)
    assert "--trust" in error_line("reproduce", path, *lab.places)
    elsewhere = f"--results={tmp_path / 'elsewhere'}"
    assert "--trust" in error_line("leaderboard", "submit", path, "--by=eve", *lab.places[:1], elsewhere)
    assert "outsider" not in sys.modules and not witness.exists()
    assert outcome(lab, 3, trust=True).levels == (0, 1, 2, 3)
    assert witness.exists()


def test_overrides_that_ask_for_more_than_is_recorded_are_refused_before_anything_is_built(lab):
    change(lab, "training", "overrides", to={"encoder.width": str(2**20)})
    (path,) = lab.records()
    proper = lab.results / "records" / identity(read_record(path))
    proper.parent.mkdir(parents=True)
    path.rename(proper)
    path.with_name("seed0.pred.gz").rename(proper.with_name("seed0.pred.gz"))
    assert "encoder.width=1048576 is not what the run used" in outcome(lab).reason


def test_sizes_beyond_memory_are_refused_before_anything_is_built(lab):
    change(lab, "training", "overrides", to={"encoder.ffn": str(2**30)})
    change(lab, "model", "encoder", "ffn", to=2**30)
    path = lab.records()[0]
    found = verify(path, 1, Places(lab.results, lab.data))
    assert found.rejected and "exceed the" in found.reason


# The cell


def test_a_cell_with_a_gap_in_its_seeds_is_not_v1(owner):
    assert main(["leaderboard", "verify", *owner.places]) == 0
    owner.records()[1].unlink()
    found = outcome(owner)
    assert found.levels == (0,) and "missing 1" in found.reason
    assert {v.badge for v in judge(Places(owner.results)).values()} == {"V0"}


def test_a_record_somewhere_else_than_its_identity_is_rejected(lab):
    (path,) = lab.records()
    moved = path.parent.with_name("0" * 16)
    path.parent.rename(moved)
    assert "its path is not its identity" in outcome(lab).reason
    assert verify(moved / "seed0.json", 1, Places(lab.results, lab.data)).levels == (0, 1)


def test_labels_that_are_not_kept_are_taken_from_the_data_or_said_to_be_missing(lab, tmp_path):
    shutil.rmtree(lab.results / "labels")
    nowhere = verify(lab.records()[0], 1, Places(lab.results, tmp_path / "none"))
    assert nowhere.levels == (0,) and not nowhere.rejected and "--data" in nowhere.reason
    assert outcome(lab).levels == (0, 1)
    assert not (lab.results / "labels").exists(), "verification wrote into what it checks"


def test_schema_names_every_section_of_a_record(lab):
    names = {name for name in RECORD if not name.endswith("?")}
    assert set(json.loads(lab.records()[0].read_text())) == names


def test_fields_of_earlier_and_later_records_may_be_there_or_not(lab):
    (path,) = lab.records()
    record = json.loads(path.read_text())
    record["cost"].pop("softmax_same_machine", None)
    for section in ("task", "model"):
        record[section].pop("source_sha256", None)
    path.write_text(json.dumps(record))
    assert outcome(lab).levels == (0, 1)
    record["cost"]["softmax_same_machine"] = {"step_time_ratio": 1.0, "pairs": 5}
    for section in ("task", "model"):
        record[section]["source_sha256"] = OTHER
    path.write_text(json.dumps(record))
    assert outcome(lab).levels == (0, 1)
    change(lab, "model", "source_sha256", to="abc")
    assert "model.source_sha256 must be" in outcome(lab).reason


# The committed records


def test_every_committed_record_is_verified_at_v1():
    results = ROOT / "results" / "reference"
    found = judge(Places(results, ROOT / "no-data"))
    assert len(found) == len(list(iterate_records(results, pytest.fail))) > 0
    assert {path: v.reason for path, v in found.items() if v.levels != (0, 1)} == {}


def test_first_losses_of_two_committed_records_are_repeated(tmp_path):
    assert main(["prepare", "image", "--preset=small", f"--data={tmp_path}", "--workers=1"]) == 0
    places = Places(ROOT / "results" / "reference", tmp_path)
    for attention, seed in (("softmax", 0), ("performer", 1)):
        made = (ROOT / "results" / "reference" / "records" / "image" / attention).glob(f"*/seed{seed}.json")
        (path,) = (p for p in made if read_record(p)["task"]["preset"] == "small")
        found = verify(path, 2, places)
        assert found.levels == (0, 1, 2), found.reason
