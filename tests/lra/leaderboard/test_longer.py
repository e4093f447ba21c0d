"""`evaluate --lengths`: the weights of a record on longer data, as evidence beside it that changes nothing of it."""

import json
import sys

import pytest
import torch

from lra.__main__ import main
from lra.leaderboard.consistency import Places
from lra.leaderboard.rerun import run_of
from lra.records import columns
from lra.records.cells import build
from lra.records.record import read_record
from lra.training import checkpoint
from lra.training.evaluate import Where, evaluate
from tasks.store.prepared import load

ROTARY = ("--set", "encoder.positions=rotary")


def evaluated(lab, *lengths, path=None):
    """Run `evaluate`; returns what it kept."""
    (path,) = [path] if path else lab.records()
    assert main(["evaluate", str(path), "--device=cpu", *(f"--lengths={n}" for n in lengths), *lab.places]) == 0
    kept = [*lab.results.glob("longer/*/*/*/seed*.json")]
    return json.loads(kept[0].read_text()) if kept else None


def test_counts_are_those_of_the_same_weights_in_a_longer_model_and_the_record_stays(lab, capsys):
    lab.train(*ROTARY, attention="performer")
    (path,) = lab.records()
    before = path.read_bytes()
    assert evaluated(lab) is None  # without --lengths nothing is kept
    facts = evaluated(lab, "3,2")
    assert path.read_bytes() == before and "82 tokens: " in capsys.readouterr().out
    record, prepared = read_record(path), load(lab.data / "tiny" / "smoke")
    weights, _ = checkpoint.load(lab.folder("model.safetensors") / "model.safetensors")
    assert facts["weights"] == record["result"]["chain"]["final_sha256"] and facts["fixed"] == ""
    task = sys.modules["tasks.tiny"]
    for point, factor in zip(facts["points"], (2, 3), strict=True):
        record["model"]["encoder"]["max_len"] = factor * 41
        record["training"]["overrides"]["encoder.max_len"] = str(factor * 41)
        model = run_of(record, Places(lab.results), prepared.manifest).build_model()
        model.load_state_dict(weights)
        split = task.longer(task.RECIPES["smoke"].data, prepared.splits["test"], factor)
        counts = evaluate(model, split, 1, batch=8, where=Where(torch.device("cpu")))
        assert (point["seq_len"], point["n_correct"], point["n"]) == (factor * 41, counts.n_correct, 23)


@pytest.mark.parametrize(
    "attention, sets, why",
    [
        ("softmax", (), "learned positions end at 41 tokens"),
        ("linformer", ROTARY, "the attention has a fixed length of 41 tokens"),
    ],
)
def test_a_method_of_fixed_length_is_said_to_be_and_is_not_counted_as_wrong(lab, attention, sets, why):
    lab.train(*sets, attention=attention)
    facts = evaluated(lab, "2,4")
    assert facts["fixed"] == why and facts["points"] == [{"seq_len": 82}, {"seq_len": 164}]


def test_a_kept_file_speaks_of_the_weights_of_its_record_alone(lab):
    lab.train(*ROTARY)
    evaluated(lab, "2")
    (table,) = build(lab.results)
    assert len(columns.longer(table)[1]) == 2  # the floor and softmax
    (kept,) = lab.results.glob("longer/*/*/*/seed*.json")
    kept.write_text(kept.read_text().replace('"weights": "', '"weights": "0'))
    assert columns.longer(table)[1] == []


def test_longer_data_that_hold_examples_of_train_are_refused(lab, error_line, monkeypatch):
    lab.train(*ROTARY)
    train = load(lab.data / "tiny" / "smoke").splits["train"]
    monkeypatch.setattr(sys.modules["tasks.tiny"], "longer", lambda *_: train)
    line = error_line("evaluate", lab.records()[0], "--lengths=2", "--device=cpu", *lab.places)
    assert "--lengths 2: the longer data of tiny hold examples of train or val" in line
    assert not (lab.results / "longer").exists()


def test_a_task_without_longer_data_says_which_have_them(lab, error_line, monkeypatch):
    lab.train(*ROTARY)
    monkeypatch.delattr(sys.modules["tasks.tiny"], "longer")
    line = error_line("evaluate", lab.records()[0], "--lengths=2", "--device=cpu", *lab.places)
    assert line.endswith("tiny has no longer data; tasks that have: listops, recall")


@pytest.mark.parametrize("lengths", ["1", "2,2", "0.5", "two", "-2"])
def test_lengths_are_different_whole_numbers_from_2_on(lab, error_line, lengths):
    assert "different numbers, comma-separated, of 2 or more" in error_line("evaluate", "x", f"--lengths={lengths}")
