"""The command line as a user meets it: help, defaults, and one line with exit code 2 for bad input."""

import io
import json
import lzma
import re
import shutil
import subprocess
import sys
from argparse import _SubParsersAction

import pytest

from lra.cli import main, parser
from lra.machine import cores
from lra.options import PRESETS
from lra.registry import attention_names, task_names
from tasks.image.cifar import CLASSES
from tasks.store.prepared import load
from tests.conftest import ROOT


def commands(of, prefix=""):
    """Name to parser of every command, those of a family as "family action"."""
    for action in (a for a in of._actions if isinstance(a, _SubParsersAction)):
        for name, sub in action.choices.items():
            yield prefix + name, sub
            yield from commands(sub, f"{prefix}{name} ")


COMMANDS = dict(commands(parser()))


def help_of(*words, capsys):
    """What --help prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


# Help


def test_help_lists_every_command_with_a_sentence(capsys):
    text = help_of(capsys=capsys)
    assert {"list", "prepare", "train", "sweep", "evaluate", "table", "doctor"} <= set(COMMANDS)
    for name in (n for n in COMMANDS if " " not in n):
        assert re.search(rf"^    {name}\s+\S+ \S+", text, re.MULTILINE), name


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_explains_every_option_and_shows_its_default(name, capsys):
    text = " ".join(help_of(*name.split(), capsys=capsys).split())
    assert text.startswith(f"usage: python -m lra {name}")
    for action in COMMANDS[name]._actions:
        if action.option_strings and action.dest != "help":
            assert action.help, f"{name} {action.option_strings[0]} has no help"
            if action.default not in (None, False, []):
                assert f"(default: {action.default})" in text, f"{name} {action.option_strings[0]}"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "listops", "--att", "softmax"],
        ["train", "listops", "--attention", "softmax", "--pre", "smoke"],
        ["sweep", "--task", "listops"],
        ["prepare", "listops", "--data-d", "x"],
        ["table", "--res", "results"],
    ],
)
def test_abbreviated_options_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("words", [[], ["gemma"], ["leaderboard"]])
def test_without_a_command_the_commands_are_listed(words, capsys):
    assert main(words) == 2
    text = capsys.readouterr().err
    below = [name for name in COMMANDS if name.startswith(" ".join(words)) and len(name.split()) == len(words) + 1]
    assert len(below) > 2 and {name.split()[-1] for name in below} <= set(text.split())


@pytest.mark.parametrize("words", [["trian"], ["train"], ["train", "listops"], ["train", "listops", "--seed", "x"]])
def test_incomplete_or_mistyped_commands_end_with_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "tiny", "--preset=smoke", "--workers=-1"],
        ["train", "tiny", "--attention=softmax", "--preset=smoke", "--threads=-1"],
        ["train", "tiny", "--attention=softmax", "--preset=smoke", "--seed=-1"],
        ["train", "tiny", "--attention=softmax", "--preset=smoke", "--seed=1000001"],  # no record may have it
        ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--jobs=-1"],
        ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--memory=-1"],
        ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--memory=0"],
        ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--memory=3 GB"],
        ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--seeds=0"],
        ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--seeds=-1"],
    ],
)
def test_numbers_out_of_range_are_refused(words, plugins, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import lra.scaling.sweep

    monkeypatch.setattr(lra.scaling.sweep, "Pool", lambda *_: pytest.fail("started to run the grid"))
    try:
        code = main(words)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words, said",
    [
        (["prepare", "listops", "--out=x"], "--out=x (see python -m lra prepare --help)"),
        (["leaderboard", "serve", "--prt=9"], "did you mean --port? (see python -m lra leaderboard serve --help)"),
        (["sweep", "--attentions", "softmax,", "performer"], "a list takes no space: softmax,performer (see"),
        (["sweep", "--attentions=softmax", ",performer"], "a list takes no space: softmax,performer (see"),
        (["sweep", "--tasks=a,", "b,", "c"], "a list takes no space: a,b,c (see python -m lra sweep --help)"),
        (["leaderboard", "serve", "--port=65536"], "must be at most 65535; got 65536"),
        (["train", "image", "--attention=softmax", "--results=/proc/x"], "--results: cannot write to /proc/x: "),
        (["sweep", "--runs=README.md/x"], "--runs: cannot write to README.md/x: "),
        (["tensorboard", "--port=99999"], "must be at most 65535; got 99999"),
        (["gemma", "swap", "--attention=softmax", "--features=64,0"], "of 1 or more; got 64,0"),
    ],
)
def test_mistyped_arguments_are_one_line_with_the_way_out(words, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(words)
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and line.startswith("error: ") and said in line


READERS = ["table", "compare", "plot", "cards", "leaderboard verify", "leaderboard build", "leaderboard serve"]
READERS += ["gemma table", "gemma plot"]


@pytest.fixture
def no_folders(tmp_path):
    """Paths of nothing, of a file, and of a link to itself."""
    absent, file, loop = (tmp_path / name for name in ("absent", "file", "loop"))
    file.write_text("")
    loop.symlink_to(loop)
    return absent, file, loop


@pytest.mark.parametrize("name", READERS)
def test_results_that_are_no_folder_are_named_and_nothing_is_made(name, no_folders, tmp_path, error_line):
    for path in no_folders:
        assert f"--results: {path}: there is no such folder" in error_line(*name.split(), f"--results={path}")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


@pytest.mark.parametrize("words", ["train tiny --attention=softmax --data", "tensorboard --runs", "gemma swap --text"])
def test_folders_that_cannot_be_read_are_one_line(words, no_folders, plugins, error_line, tiny_data):
    more = ["--attention=softmax", "--model=tiny", f"--data={tiny_data}"] if "gemma" in words else []
    for path in no_folders:
        assert str(path) in error_line(*words.split(), path, *more)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_that_cannot_spell_a_table_gets_one(encoding, monkeypatch, lab):
    lab.train()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert main(["table", f"--results={lab.results}"]) == 0
    sys.stdout.flush()
    shown = raw.getvalue().decode(encoding)
    assert "softmax" in shown and ("±" in shown) == (encoding == "cp1252") and ("?" in shown) == (encoding == "ascii")


def test_a_command_imports_the_options_of_its_own_room_alone():
    """Neither torch nor the options of another room are loaded to parse `train`, and all rooms to list all."""
    code = """
import sys
from lra.cli import parser
parser({called})
print(*sorted(name for name in sys.modules if name == "torch" or name.endswith(".options")))
"""
    for called, expected in (
        ("['train']", "lra.options lra.training.options"),
        ("['sweep']", "lra.options lra.scaling.options lra.training.options"),
        ("[]", "lra.options"),
    ):
        command = [sys.executable, "-c", code.replace("{called}", called)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
        assert done.stdout.split() == expected.split()


# Lists


def test_list_prints_a_line_for_each_name_or_names_as_json(capsys):
    kinds = {"attentions": attention_names(), "tasks": task_names(), "presets": list(PRESETS)}
    for what, names in kinds.items():
        assert main(["list", what]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == names and all(len(line.split()) > 2 for line in lines)
        assert main(["list", what, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == names
    assert main(["list", "attentions"]) == 0
    performer = r"^performer +Performer: .* features .* \[arXiv 2009.14794; random, .*linear"
    assert re.search(performer, capsys.readouterr().out, re.MULTILINE)
    assert main(["list"]) == 0
    text = capsys.readouterr().out
    assert all(f"{kind}:\n  {names[0]}" in text for kind, names in kinds.items())
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == kinds


# Bad names and values: nearest name, one line


@pytest.mark.parametrize(
    "words, nearest",
    [
        (["prepare", "listop"], "listops"),
        (["prepare", "tiny", "--preset=smal"], "small"),
        (["train", "pathfindr", "--attention=softmax"], "pathfinder"),
        (["train", "tiny", "--attention=perfomer"], "performer"),
        (["train", "tiny", "--attention=softmax", "--preset=smok"], "smoke"),
        (["train", "tiny", "--attention=performer", "--set=attention.num_feature=8"], "num_features"),
        (["train", "tiny", "--attention=softmax", "--set=train.step=8"], "steps"),
        (["train", "tiny", "--attention=softmax", "--set=encoder.layer=8"], "layers"),
        (["train", "tiny", "--attention=softmax", "--set=encodr.layers=8"], "encoder"),
        (["sweep", "--tasks=tiny,imag", "--attentions=softmax", "--preset=smoke"], "image"),
        (["sweep", "--tasks=tiny", "--attentions=sofmax", "--preset=smoke"], "softmax"),
    ],
)
def test_unknown_name_is_one_line_with_the_nearest(words, nearest, lab, error_line, tmp_path):
    if words[0] == "train":
        words = [*words, *lab.places, *([] if any("--preset" in w for w in words) else ["--preset=smoke"])]
    elif words[0] == "prepare":
        words = [*words, f"--data={tmp_path}"]
    else:
        words = [*words, *lab.places]
    line = error_line(*words)
    assert f"did you mean '{nearest}'?" in line


@pytest.mark.parametrize(
    "setting, words",
    [
        ("train.lr=fast", ["train.lr", "float", "'fast'"]),
        ("train.steps=1.5", ["train.steps", "int", "'1.5'"]),
        ("encoder.positions=rope", ["encoder.positions", "learned, sinusoidal", "'rope'"]),
        ("encoder.max_len=8", ["37 tokens", "maximum 8", "encoder.max_len=37"]),
        ("encoder.heads=5", ["12", "5 heads"]),
        ("train.batch=1000", ["1000", "61 training examples"]),
        ("data.seq_len=9", ["data.seq_len=9", "preset"]),
        ("lr=1", ["GROUP.OPTION=VALUE", "'lr=1'", "did you mean train.lr=1?"]),
        ("layers=1", ["did you mean encoder.layers=1?"]),
        ("num_features=64", ["did you mean attention.num_features=64?"]),
    ],
)
def test_wrong_value_of_set_is_one_line_that_names_it(setting, words, lab, error_line):
    line = error_line(*lab.words("--set", setting))
    assert all(word in line for word in words) and not lab.records()


@pytest.mark.parametrize("attention", ["softmax", "constant"])
def test_option_without_effect_is_refused(attention, lab, error_line):
    line = error_line(*lab.words("--set", "attention.num_features=8", attention=attention))
    assert "num_features" in line and "none" in line


def test_steps_and_set_of_steps_together_are_refused(lab, error_line):
    assert "train.steps" in error_line(*lab.words("--steps=3", "--set", "train.steps=4"))


def test_more_threads_than_cores_are_refused(lab, error_line):
    assert f"--threads 9999: this process may use {cores()} CPU cores" in error_line(*lab.words("--threads=9999"))
    assert "--threads 9999" in error_line("sweep", "--tasks=tiny", "--threads=9999", *lab.places)


def test_device_that_is_not_there_is_refused(lab, error_line, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [w for w in lab.words() if w != "--device=cpu"]
    assert "'cuda' is not available" in error_line(*words, "--device=cuda")
    line = error_line(*words, "--device=gpu")
    assert "gpu" in line and "cpu" in line


# Bad data


def test_data_that_were_not_prepared_name_the_command(lab, error_line, tmp_path):
    lab.data = tmp_path / "nothing"
    line = error_line(*lab.words())
    assert "no prepared data" in line
    assert f"`python -m lra prepare tiny --preset smoke --data {tmp_path / 'nothing'}`" in line


def test_damaged_prepared_data_are_noticed_before_training(lab, error_line, tmp_path):
    shutil.copytree(lab.data / "tiny", tmp_path / "data" / "tiny")
    lab.data = tmp_path / "data"
    path = lab.data / "tiny" / "smoke" / "train.labels.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert "train.labels.npy" in error_line(*lab.words())


@pytest.mark.parametrize("task", ["text", "image", "retrieval"])
@pytest.mark.parametrize("exists", [True, False])
def test_data_folder_without_the_files_names_what_is_looked_for(task, exists, error_line, tmp_path):
    raw = tmp_path / "raw"
    if exists:
        raw.mkdir()
    line = error_line("prepare", task, "--preset=smoke", "--data", tmp_path / "out", "--data-dir", raw)
    assert str(raw) in line and ("looked for" if exists else "no such folder or archive") in line
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))  # no lock either


@pytest.mark.parametrize("task", ["listops", "pathfinder"])
def test_generated_task_asked_for_local_files_that_are_not_there(task, error_line, tmp_path):
    (tmp_path / "raw").mkdir()
    words = ["--preset=smoke", "--source=local", "--data", tmp_path / "out", "--data-dir", tmp_path / "raw"]
    assert str(tmp_path / "raw") in error_line("prepare", task, *words)


def test_truncated_parquet_is_one_line(error_line, tmp_path):
    import pyarrow
    import pyarrow.parquet

    for half in ("train", "test"):
        columns = {"text": [f"review {k}" for k in range(50)], "label": [k % 2 for k in range(50)]}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"imdb_{half}.parquet")
    path = tmp_path / "imdb_train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    line = error_line("prepare", "text", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", tmp_path)
    assert "imdb_train.parquet" in line and "fetch it again" in line


def test_corrupt_image_is_one_line(error_line, tmp_path):
    from PIL import Image

    for half in ("train", "test"):
        for name in CLASSES:
            (tmp_path / half / name).mkdir(parents=True)
            Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / half / name / "0001.png")
    path = tmp_path / "train" / "cat" / "0001.png"
    path.write_bytes(path.read_bytes()[:60])
    line = error_line("prepare", "image", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", tmp_path)
    assert "0001.png" in line


def test_listops_row_with_missing_columns_names_the_line(error_line, tmp_path):
    row = "( ( ( [MAX 3 ) 5 ) ] )"
    for split in ("train", "val", "test"):
        (tmp_path / f"basic_{split}.tsv").write_text(f"Source\tTarget\n{row}\t5\n{row}\n")
    words = ["--preset=smoke", "--data", tmp_path / "out", "--data-dir", tmp_path]
    line = error_line("prepare", "listops", *words)
    assert "basic_train.tsv" in line and "line 3" in line


def test_retrieval_row_with_missing_columns_names_the_line(error_line, tmp_path):
    for split in ("train", "eval", "test"):
        rows = [f"{k % 2}.0\ta{k}\tb{k}\ttext a {split} {k}\ttext b {split} {k}" for k in range(4)]
        if split == "train":
            rows[2] = "1.0\tonly\ttwo"
        with lzma.open(tmp_path / f"new_aan_pairs.{split}.tsv.xz", "wt") as file:
            file.write("\n".join(rows) + "\n")
    words = ("prepare", "retrieval", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", tmp_path)
    assert "new_aan_pairs.train.tsv.xz" in error_line(*words)
    assert "line 3" in error_line(*words)


@pytest.mark.parametrize("task", ["text", "image", "retrieval"])
def test_unreachable_source_lists_the_ways_out(task, error_line, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    line = error_line("prepare", task, "--preset=smoke", "--data", tmp_path / "out", "--source=hub")
    assert "--data-dir" in line and "--source embedded" in line


def test_source_and_data_dir_that_contradict_each_other_are_refused(error_line, tmp_path):
    words = ["--preset=smoke", "--source=embedded", "--data", tmp_path / "out", "--data-dir", tmp_path]
    assert "--source" in error_line("prepare", "text", *words)


def test_unwritable_data_folder_is_one_line(error_line, plugins, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in error_line("prepare", "tiny", "--preset=smoke", "--data", tmp_path / "file" / "out")


# Bad records


@pytest.fixture
def broken_record(tmp_path):
    """`broken_record(text)`: the path of a record with that text."""

    def write(text):
        path = tmp_path / "results" / "records" / "tiny" / "softmax" / "0" / "seed0.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


NOT_RECORDS = {
    "text": "not json",
    "empty": "",
    "binary": b"\xff\xfe\x00\x01",
    "half": '{"schema": "lra-record/1", "su',
    "list": "[1, 2]",
    "number": "7",
    "deep": "[" * 100_000,
    "another schema": '{"schema": "lra-record/0"}',
    "no sections": '{"schema": "lra-record/1"}',
}


def skipped_line(results, capsys):
    """The one line on stderr of a table that leaves a file out and shows the rest, with exit code 1."""
    capsys.readouterr()
    assert main(["table", "--results", str(results)]) == 1
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("skipped: ") and shown.out
    return line


@pytest.mark.parametrize("kind", NOT_RECORDS)
def test_record_that_is_none_is_one_line_in_evaluate_and_table(kind, broken_record, error_line, lab, capsys):
    path = broken_record(NOT_RECORDS[kind])
    assert str(path) in error_line("evaluate", path, *lab.places)
    assert str(path) in skipped_line(path.parents[4], capsys)


def test_record_whose_sections_are_empty_is_one_line(lab, error_line, capsys):
    record = lab.train()
    (path,) = lab.records()
    for section in ("task", "data", "model", "training"):
        path.write_text(json.dumps(record | {section: {}}))
        assert str(path) in error_line("evaluate", path, *lab.places), section
        assert str(path) in skipped_line(lab.results, capsys), section


def test_record_that_does_not_exist_is_one_line(error_line, lab, tmp_path):
    assert "no record at" in error_line("evaluate", tmp_path / "none.json", *lab.places)
    assert str(tmp_path) in error_line("evaluate", tmp_path, *lab.places)


def test_evaluate_refuses_damaged_predictions_absent_weights_and_other_data(lab, error_line, tmp_path):
    lab.train()
    path = lab.records()[0]
    predictions = path.with_name("seed0.pred.gz")
    packed = predictions.read_bytes()
    for damaged in (packed[:-9], packed[:12], b"", b"\x00" * 40):
        predictions.write_bytes(damaged)
        assert "pred.gz" in error_line("evaluate", path, *lab.places)
    predictions.unlink()
    assert "pred.gz" in error_line("evaluate", path, *lab.places)
    predictions.write_bytes(packed)
    weights = lab.folder("model.safetensors") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    assert "model.safetensors" in error_line("evaluate", path, *lab.places)
    weights.unlink()
    command = "python -m lra train tiny --attention softmax --preset smoke --seed 0"
    assert f"`{command} --again` trains the cell" in error_line("evaluate", path, *lab.places)
    elsewhere = lab.places[:1] + [f"--results={tmp_path}", f"--runs={tmp_path}"]
    assert f"`{command}` trains the cell" in error_line("evaluate", path, *elsewhere)
    weights.write_bytes(whole)
    record = json.loads(path.read_text())
    record["data"]["manifest_sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    assert "is not the data of" in error_line("evaluate", path, *lab.places)


def test_evaluate_says_whose_weights_it_took(lab, capsys, tmp_path):
    lab.train()
    (path,) = lab.records()
    shutil.copytree(path.parent, tmp_path / "theirs")
    theirs = tmp_path / "theirs" / "seed0.json"
    theirs.write_text(json.dumps(json.loads(path.read_text()) | {"started": "2026-01-01T00:00:00+00:00"}))
    weights = lab.folder("model.safetensors") / "model.safetensors"
    for record, said in ((path, "made by the run of the record"), (theirs, "made by another run of the same cell")):
        capsys.readouterr()
        assert main(["evaluate", str(record), "--device=cpu", *lab.places]) == 0
        assert f"weights {weights}: {said}" in capsys.readouterr().out
    path.unlink()
    assert main(["evaluate", str(theirs), "--device=cpu", *lab.places]) == 0
    assert f"no record at {path} says which run made them" in capsys.readouterr().out


def test_evaluate_of_a_failed_run_says_that_it_failed(lab, error_line):
    lab.train("--set", "train.lr=1e30")
    assert "failed: loss is not finite" in error_line("evaluate", lab.records()[0], *lab.places)


def test_table_of_an_unknown_preset_or_into_a_text_without_markers_is_one_line(lab, error_line, tmp_path):
    lab.train()
    assert "smoke" in error_line("table", "--results", lab.results, "--preset=smokey")
    (tmp_path / "README.md").write_text("# No markers\n")
    assert "README.md" in error_line("table", "--results", lab.results, "--write", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "# No markers\n"


# As a process


def test_module_runs_from_the_repository_and_its_exit_code_is_the_shells(tmp_path):
    command = [sys.executable, "-m", "lra", "train", "listops", "--attention=softmax", f"--data={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no prepared data in ")


def test_prepare_says_what_it_made_and_then_that_it_is_reused(plugins, tmp_path, capsys):
    for said in ("prepared", "reused"):
        assert main(["prepare", "tiny", "--preset=smoke", "--data", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert f"{tmp_path / 'tiny' / 'smoke'}: {said}" in out and "train 61" in out and "majority" in out
    assert load(tmp_path / "tiny" / "smoke").manifest["dataset"] == "tiny"
