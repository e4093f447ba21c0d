"""Verification: what a valid record reaches, and that every change to it is refused with its reason, unexecuted."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lra.__main__ import main
from lra.leaderboard.consistency import Places
from lra.leaderboard.identity import identity
from lra.leaderboard.levels import Context, verify
from lra.leaderboard.submit import verified
from lra.records.record import LARGEST, iterate_records, read_record
from lra.records.schema import RECORD
from tests.conftest import ROOT, Lab, plug_in

PLACE = Path("records/tiny/performer")


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    """A laboratory with one finished run: tiny, performer, seed 0."""
    folder = tmp_path_factory.mktemp("made")
    lab = Lab(tiny_data, folder / "results", folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch)
        lab.train(attention="performer")
    return lab


@pytest.fixture
def lab(made, tmp_path, plugins):
    """A copy of that laboratory, to be changed."""
    shutil.copytree(made.results, tmp_path / "results")
    return Lab(made.data, tmp_path / "results", made.runs)


def outcome(lab, level=1, path=None, **options):
    """Verify the only record, as `leaderboard verify` does."""
    places = Places(lab.results, lab.data, lab.runs, **options)
    root = lab.results / "records"
    context = Context(root, iterate_records(lab.results, lambda line: None))
    return verify(path or lab.records()[0], level, places, context)


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
    assert outcome(lab, 3).levels == (0, 1, 2, 3)
    assert outcome(lab, 3).reason == ""


def test_a_failed_run_is_consistent_and_has_no_probe(lab):
    shutil.rmtree(lab.results / "records")
    lab.train("--set", "train.lr=1e30")
    found = outcome(lab, 2)
    assert found.levels == (0, 1) and not found.rejected and "no probe" in found.reason


def test_an_open_run_with_overrides_is_consistent(lab):
    shutil.rmtree(lab.results / "records")
    lab.train("--set", "train.lr=3e-3", "--set", "encoder.width=20", "--val-rule=legacy", attention="linformer")
    assert outcome(lab, 2).levels == (0, 1, 2)


# The tampering suite: one field changed, and what the reason must name

OTHER = "0" * 64
TAMPERED = {
    "a count": (("result", "n_correct"), lambda v: v + 1, "result.n_correct"),
    "the test size": (("result", "n_test"), 24, "result.n_test"),
    "validation count": (("result", "val_n_correct"), lambda v: v - 1, "val_n_correct"),
    "validation size": (("result", "n_val"), 14, "n_val"),
    "a seed": (("training", "seed"), 1, "its path is not its identity"),
    "a learning rate": (("training", "recipe", "lr"), 0.02, "identity"),
    "steps": (("training", "steps"), 11, "training.steps"),
    "examples": (("training", "examples_seen"), 97, "examples_seen"),
    "the selected step": (("training", "selected_step"), lambda v: 4 if v != 4 else 8, "selected_step"),
    "an override that was none": (("training", "overrides"), {"train.lr": "0.01"}, "identity"),
    "the approximation size": (("model", "attention_config", "num_features"), 500, "identity"),
    "parameters": (("model", "n_params"), lambda v: v - 1, "model.n_params"),
    "parameters to softmax": (("model", "n_params_ratio_to_softmax"), 0.5, "n_params_ratio"),
    "exactness": (("model", "exact"), True, "model.exact"),
    "initial weights": (("model", "init_sha256"), OTHER, "init_sha256"),
    "another method": (("model", "attention"), "softmax", "identity"),
    "the data hash": (("data", "manifest_sha256"), OTHER, "manifest_sha256"),
    "a split's hash": (("data", "splits", "train", "sha256"), OTHER, "manifest_sha256"),
    "the labels' hash": (("data", "splits", "test", "labels_sha256"), OTHER, "manifest_sha256"),
    "another data set": (("task", "dataset"), "CIFAR-10", "manifest_sha256"),
    "a substitute sold as real": (("task", "substitute"), True, "manifest_sha256"),
    "the source": (("data", "source"), "hub", "manifest_sha256"),
    "the validation rule": (("data", "val_rule"), "legacy", "identity"),
    "the length": (("task", "seq_len"), 4096, "seq_len"),
    "the preset": (("task", "preset"), "paper", "training.recipe"),
    "an unknown preset": (("task", "preset"), "huge", "task.preset"),
    "the protocol": (("task", "protocol"), "open", "task.protocol"),
    "a floor": (("data", "floors", "majority"), 0.01, "majority"),
    "the predictions' hash": (("result", "predictions_sha256"), OTHER, "sha256"),
    "a training size in the curve": (("result", "curve", 0, 4), 33, "result.curve"),
    "a validation in the curve": (("result", "curve", 1, 3), 13, "selected_step|val_n_correct"),
    "a step of the curve": (("result", "curve", 2, 0), 7, "result.curve"),
    "no probe": (("result", "probe", "losses"), [], "probe.losses"),
    "speed": (("cost", "steps_per_s"), 1e6, "steps_per_s"),
    "tokens": (("cost", "tokens_per_s"), 1e12, "tokens_per_s"),
    "time": (("cost", "wall_s"), 0.0, "steps_per_s"),
    "an end before the start": (("ended",), "2001-01-01T00:00:00+00:00", "started"),
    "no such day": (("started",), "2026-02-31T00:00:00+00:00", "started"),
    "a failure with a result": (("status",), "failed: no reason", "status"),
    "a result taken out": (("result",), None, "status"),
    "the command": (("command",), "rm -rf .", "command"),
    "the optimizer": (("training", "optimizer"), "SGD", "optimizer"),
    "an added field": (("suite",), lambda v: v | {"bonus": 1}, "unknown field 'suite.bonus'"),
    "a missing field": (("env",), lambda v: {k: x for k, x in v.items() if k != "torch"}, "env.torch is missing"),
    "a text for a number": (("result", "n_correct"), "20", "result.n_correct"),
    "a truth value for a number": (("training", "seed"), False, "training.seed"),
    "a negative count": (("result", "n_correct"), -1, "result.n_correct"),
    "a path as a task": (("task", "name"), "../../../etc", "task.name"),
    "a path as an attention": (("model", "attention"), "../softmax", "model.attention"),
    "a module of the standard library": (("task", "name"), "antigravity", "unknown task 'antigravity'"),
    "script as a data set": (("task", "dataset"), "<script>alert(1)</script>", "task.dataset"),
    "script as a processor": (("env", "cpu"), "<img src=x onerror=alert(1)>", "env.cpu"),
    "script as a name of a floor": (("data", "floors"), {"<b>": 0.5, "majority": 0.5}, "data.floors"),
    "control characters": (("env", "gpu"), "\x1b[2J", "env.gpu"),
    "half of a character": (("env", "os"), "\ud800", "not a JSON record"),
    "a width beyond memory": (("model", "encoder", "width"), 2**30, "identity"),
    "millions of validations": (("training", "recipe", "steps"), 2**31, "identity"),
    "another schema": (("schema",), "lra-record/2", "lra-record/1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAMPERED)
def test_one_changed_field_is_rejected_with_the_reason(kind, lab):
    keys, to, named = TAMPERED[kind]
    change(lab, *keys, to=to)
    found = outcome(lab)
    assert found.rejected and 1 not in found.levels
    assert any(part in found.reason for part in named.split("|")), found.reason
    assert "\n" not in found.reason and len(found.reason) < 900


def test_a_changed_probe_is_rejected_by_running_it(lab):
    change(lab, "result", "probe", "losses", 7, to=lambda v: v * 1.01)
    assert outcome(lab, 1).levels == (0, 1)
    found = outcome(lab, 2)
    assert found.rejected and "result.probe.losses[7]" in found.reason


def test_a_floor_that_only_the_data_know_is_rejected_at_v2(lab):
    change(lab, "data", "floors", to=lambda v: v | {"shortcut": 0.99})
    assert outcome(lab, 1).levels == (0, 1)
    assert "data.floors" in outcome(lab, 2).reason


def test_a_floor_unlike_that_of_the_other_records_on_the_same_data_is_rejected(lab):
    for seed in (1, 2):
        lab.train(attention="performer", seed=seed)
    path = lab.records()[1]
    record = json.loads(path.read_text())
    record["data"]["floors"]["shortcut"] = 0.99
    path.write_text(json.dumps(record))
    assert "differ from those of other records" in outcome(lab, path=path).reason
    assert outcome(lab).levels == (0, 1)


def rewrite(lab, predictions):
    """Replace the stored predictions, and the record's hash with them."""
    path = change(lab, "result", "predictions_sha256", to=hashlib.sha256(predictions).hexdigest())
    path.with_name("seed0.pred.gz").write_bytes(gzip.compress(predictions))


def predictions_of(lab):
    """The stored predictions."""
    return bytearray(gzip.decompress(lab.records()[0].with_name("seed0.pred.gz").read_bytes()))


def test_a_flipped_prediction_is_rejected_with_or_without_its_hash(lab):
    changed = predictions_of(lab)
    changed[3] ^= 1
    lab.records()[0].with_name("seed0.pred.gz").write_bytes(gzip.compress(bytes(changed)))
    assert "sha256" in outcome(lab).reason
    rewrite(lab, bytes(changed))
    assert "counting predictions against labels" in outcome(lab).reason


def test_predictions_of_a_class_there_is_not_or_of_another_number_are_rejected(lab):
    original = predictions_of(lab)
    rewrite(lab, bytes([7, *original[1:]]))
    assert "class 7" in outcome(lab).reason
    rewrite(lab, bytes(original[:-1]))
    assert "number of predictions" in outcome(lab).reason


def test_predictions_that_exchange_a_right_answer_for_another_are_rejected_by_the_weights(lab):
    exchanged = predictions_of(lab)
    (path,) = (lab.results / "labels").iterdir()
    right = [a == b for a, b in zip(exchanged, gzip.decompress(path.read_bytes()), strict=True)]
    for i in (right.index(True), right.index(False)):
        exchanged[i] ^= 1
    rewrite(lab, bytes(exchanged))
    assert outcome(lab, 1).levels == (0, 1)
    assert "of the stored predictions" in outcome(lab, 3).reason


def test_a_bomb_of_predictions_is_not_unpacked(lab):
    path = lab.records()[0].with_name("seed0.pred.gz")
    path.write_bytes(gzip.compress(bytes(64 << 20)))
    assert "sha256" in outcome(lab).reason


@pytest.mark.parametrize("suffix", ["json", "pred.gz"])
def test_a_file_of_a_hundred_megabytes_is_not_read(lab, suffix):
    path = lab.records()[0].with_suffix("." + suffix)
    with open(path, "r+b") as file:
        file.truncate(100 << 20)
    found = outcome(lab)
    assert found.rejected and f"the limit is {LARGEST:,}" in found.reason


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_a_link_or_a_pipe_is_not_read(lab, what, tmp_path):
    path = lab.records()[0]
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json") if what == "link" else os.mkfifo(path)
    assert "no regular file" in outcome(lab, path=path).reason


NOT_STRICT = {
    "NaN": ('"lr": 0.01', '"lr": NaN', "NaN"),
    "infinity": ('"lr": 0.01', '"lr": -Infinity', "Infinity"),
    "a number beyond doubles": ('"lr": 0.01', '"lr": 1e999', "1e999"),
    "a huge whole number": ('"seed": 0', f'"seed": {"9" * 5000}', "64 bits"),
    "a key twice": ('"seed": 0', '"seed": 0, "seed": 1', "twice"),
    "deep nesting": ('"seed": 0', f'"seed": {"[" * 100_000}{"]" * 100_000}', "recursion"),
    "an added section": ('"schema":', '"extra": 1, "schema":', "unknown field 'extra'"),
}


@pytest.mark.parametrize("kind", NOT_STRICT)
def test_json_beyond_the_strict_form_is_rejected(kind, lab):
    old, new, named = NOT_STRICT[kind]
    (path,) = lab.records()
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    found = outcome(lab)
    assert found.rejected and named in found.reason and len(found.reason) < 900


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
    assert "--trust" in error_line("leaderboard", "submit", path, *lab.places[:1], elsewhere)
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


def test_verification_loads_torch_for_the_model_alone():
    code = "import sys, lra.leaderboard.submit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# The cell


def test_a_cell_with_a_gap_in_its_seeds_is_not_v1(lab):
    for seed in (1, 2):
        lab.train(attention="performer", seed=seed)
    places = ["leaderboard", "verify", *lab.places]
    assert main(places) == 0
    lab.records()[1].unlink()
    assert outcome(lab).levels == (0,) and "missing 1" in outcome(lab).reason
    assert {v.badge for v in verified(lab.results).values()} == {"V0"}


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
    assert set(json.loads(lab.records()[0].read_text())) == set(RECORD)


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
    records = list(iterate_records(results, pytest.fail))
    context, places = Context(results / "records", records), Places(results, ROOT / "no-data")
    found = {path: verify(path, 1, places, context) for path, _ in records}
    assert records and {path: o.reason for path, o in found.items() if o.levels != (0, 1)} == {}


def test_badges_of_the_committed_records_are_those_of_their_bytes():
    found = verified(ROOT / "results" / "reference")
    low = {str(place): v.reason for place, v in found.items() if not set(v.levels) >= {0, 1}}
    assert found and not low, "run: python -m lra leaderboard verify --results results/reference"


def test_first_losses_of_two_committed_records_are_repeated(tmp_path):
    assert main(["prepare", "image", "--preset=small", f"--data={tmp_path}", "--workers=1"]) == 0
    places = Places(ROOT / "results" / "reference", tmp_path)
    for attention, seed in (("softmax", 0), ("performer", 1)):
        made = (ROOT / "results" / "reference" / "records" / "image" / attention).glob(f"*/seed{seed}.json")
        (path,) = (p for p in made if read_record(p)["task"]["preset"] == "small")
        found = verify(path, 2, places)
        assert found.levels == (0, 1, 2), found.reason
