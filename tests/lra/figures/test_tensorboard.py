"""Event files read back as TensorBoard reads them: the mean over seeds, the layout, the hyper-parameters."""

import json
import os
import re
import shutil
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lra.__main__ import main
from lra.training.log import LAYOUT, read_log
from tests.conftest import Lab, plug_in

CELL = "tiny/performer/smoke"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """The folder of runs of two seeds of performer and one of softmax. Not to be changed."""
    folder = tmp_path_factory.mktemp("seeds")
    lab = Lab(tiny_data, folder / "results", folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch)
        for attention, seed in (("performer", 0), ("performer", 1), ("softmax", 0)):
            lab.train(attention=attention, seed=seed)
    return lab.runs


@pytest.fixture
def seeds(lab, trained):
    """A laboratory with these runs, to be changed."""
    shutil.copytree(trained, lab.runs)
    return lab


def events(folder):
    """TensorBoard's own reading of a run."""
    return EventAccumulator(str(folder)).Reload()


def curve(folder, tag):
    """{step: value}."""
    return {e.step: e.value for e in events(folder).Scalars(tag)}


@pytest.fixture
def tags(seeds):
    """What a run logs."""
    return {tag for line in read_log(seeds.runs / CELL / "seed0" / "log.jsonl") for tag in line} - {"step"}


def test_mean_of_a_cell_is_the_mean_of_its_seeds_at_every_step_and_tag(seeds, tags, capsys):
    assert main(["tensorboard", f"--runs={seeds.runs}"]) == 0
    count, tabs, command = capsys.readouterr().out.splitlines()[-3:]
    assert count.startswith("mean over seeds: 1 of 2 cells") and "Custom Scalars" in tabs and "HPARAMS" in tabs
    assert command == f"{sys.executable} -m tensorboard.main --logdir {seeds.runs} --host 127.0.0.1 --port 6006"
    cell = seeds.runs / CELL
    assert set(events(cell / "mean").Tags()["scalars"]) == tags
    for tag in tags:
        one, two, mean = (curve(cell / name, tag) for name in ("seed0", "seed1", "mean"))
        assert mean == pytest.approx({step: (one[step] + two[step]) / 2 for step in one}, rel=1e-6), tag
    assert curve(cell / "seed0", "train/loss") != curve(cell / "seed1", "train/loss")
    assert not (seeds.runs / "tiny/softmax/smoke/mean").exists(), "one seed: the same curve twice"


def test_mean_is_made_anew_over_the_steps_that_every_seed_has(seeds):
    cell = seeds.runs / CELL
    for _ in range(2):
        assert main(["tensorboard", f"--runs={seeds.runs}", "--task=tiny"]) == 0
        assert sorted(p.name for p in cell.iterdir()) == ["mean", "seed0", "seed1"]
        assert len(list((cell / "mean").iterdir())) == 1
    log = cell / "seed1" / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= 8) + '{"step": 12, "val/')
    assert main(["tensorboard", f"--runs={seeds.runs}"]) == 0
    assert set(curve(cell / "mean", "val/loss")) == {4, 8}


def test_layout_shows_one_tag_a_chart_and_every_tag_exists(seeds, tags):
    assert main(["tensorboard", f"--runs={seeds.runs}"]) == 0
    for name in ("seed0", "mean"):
        (content,) = events(seeds.runs / CELL / name).Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(content.tensor_proto.string_val[0])
        assert {c.title for c in layout.category} == set(LAYOUT)
        shown = [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
        assert set(shown) <= tags and len(shown) == len(set(shown))
        assert {"val/acc", "attn/approx_err", "perf/steps_per_s"} <= set(shown)


def test_hyperparameters_have_the_same_keys_in_every_run(seeds):
    keys = {}
    for folder in sorted(seeds.runs.glob("*/*/*/seed*")):
        found = events(folder).PluginTagToContent("hparams")
        start = plugin_data_pb2.HParamsPluginData.FromString(found["_hparams_/session_start_info"])
        keys[folder] = set(start.session_start_info.hparams)
        assert min(keys[folder]) == "accuracy", "TensorBoard sorts by name, and accuracy is what one looks for"
        assert 0 < start.session_start_info.hparams["accuracy"].number_value < 1
    assert len(keys) == 3 and len(set(map(frozenset, keys.values()))) == 1
    assert {"task", "attention", "seed", "lr", "steps", "options"} <= set.union(*keys.values())


def test_a_task_is_shown_alone_and_start_becomes_tensorboard(seeds, monkeypatch, capsys):
    became = []
    monkeypatch.setattr(os, "execv", lambda path, command: became.append((path, command)))
    assert main(["tensorboard", f"--runs={seeds.runs}", "--task=tiny", "--port=6123", "--start"]) == 0
    ((path, command),) = became
    assert path == sys.executable and command[1:3] == ["-m", "tensorboard.main"]
    assert command[3:] == ["--logdir", str(seeds.runs / "tiny"), "--host", "127.0.0.1", "--port", "6123"]
    assert capsys.readouterr().out.splitlines()[-1] == " ".join(command)


def test_no_runs_an_unknown_task_and_a_damaged_log_are_one_line(seeds, tmp_path, error_line):
    assert "no runs under" in error_line("tensorboard", "--runs", tmp_path / "none")
    assert "did you mean 'tiny'" in error_line("tensorboard", "--runs", seeds.runs, "--task", "tny")
    log = seeds.runs / CELL / "seed0" / "log.jsonl"
    log.write_text("not json\n")
    assert re.search(r"seed0/log.jsonl is damaged", error_line("tensorboard", "--runs", seeds.runs))
    assert not list((seeds.runs / CELL).glob(".mean*"))
