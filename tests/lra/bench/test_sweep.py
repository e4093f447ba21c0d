"""bench sweep: the same grid on one core and on several, in turns."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import lra.bench.sweep
from lra.cli import main, parser
from tests.conftest import ROOT

CORES = {3, 5, 7}
pytestmark = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="only Linux holds a process to some cores"
)


def process(returncode=0, err="", ended=None):
    """Stands for a sweep's process; `ended` takes note of how it is ended."""

    def communicate():
        if ended == []:
            raise KeyboardInterrupt
        if ended:
            ended.append("waited")
        return None, err

    calls = {name: lambda name=name: ended.append(name) for name in ("terminate", "kill")}
    return SimpleNamespace(returncode=returncode, communicate=communicate, **calls)


@pytest.fixture
def machine(monkeypatch):
    """Three cores on which a sweep takes 12 s on one and 5 s on all; `turns` holds what ran, on which cores."""
    now, turns, held = [0.0], [], [CORES]

    def popen(command, **options):
        results = Path(command[command.index("--results") + 1])
        turns.append(
            SimpleNamespace(command=command, cores=list(held[0]), files=list(results.rglob("*.json")))
        )
        now[0] += 12 if len(held[0]) == 1 else 5
        return process()

    monkeypatch.setattr(lra.bench.sweep.os, "sched_getaffinity", lambda process: CORES)
    monkeypatch.setattr(lra.bench.sweep.os, "sched_setaffinity", lambda process, to: held.__setitem__(0, to))
    monkeypatch.setattr(lra.bench.sweep.subprocess, "Popen", popen)
    monkeypatch.setattr(lra.bench.sweep.time, "perf_counter", lambda: now[0])
    return SimpleNamespace(turns=turns, held=held)


def words(lab, *more):
    return [
        "bench",
        "sweep",
        "--preset=smoke",
        "--tasks=tiny",
        f"--data={lab.data}",
        f"--results={lab.results}",
        *more,
    ]


def test_one_core_and_all_take_turns_on_the_same_grid(lab, machine, capsys):
    (lab.results / "bench").mkdir(parents=True)
    (lab.results / "bench" / "cost.json").write_text("{}")
    assert main(words(lab, "--attentions=softmax,performer", "--rounds=2")) == 0
    assert [turn.cores for turn in machine.turns] == [[3], [3, 5, 7], [3, 5, 7], [3]]
    for turn in machine.turns:
        said = dict(zip(turn.command[4::2], turn.command[5::2], strict=True))
        assert turn.command[3] == "sweep" and said["--attentions"] == "softmax,performer"
        assert said["--jobs"] == str(len(turn.cores)) and said["--threads"] == "1"
        assert [file.name for file in turn.files] == ["cost.json"] and not Path(said["--runs"]).exists()
    assert machine.held == [CORES], "the cores of this process are its own again"
    report = json.loads((lab.results / "bench" / "sweep.json").read_text())
    assert report["points"] == [{"jobs": 1, "seconds": [12, 12]}, {"jobs": 3, "seconds": [5, 5]}]
    assert report["ratio"] == report["ratio_range"][0] == 0.8 and report["cells"] == 2
    text = (lab.results / "bench" / "sweep.md").read_text()
    assert text in capsys.readouterr().out and "median 0.80, from 0.80 to 0.80" in text


def test_a_sweep_that_fails_is_told_with_its_last_line(lab, machine, monkeypatch, error_line):
    failed = process(1, "of many\nfailed: tiny: no luck\n")
    monkeypatch.setattr(lra.bench.sweep.subprocess, "Popen", lambda command, **options: failed)
    assert "sweep with 1 jobs failed: failed: tiny: no luck" in error_line(*words(lab))
    assert machine.held == [CORES] and not (lab.results / "bench" / "sweep.json").exists()


def test_an_interrupted_sweep_is_asked_to_end_its_cells(lab, machine, monkeypatch):
    ended = []
    monkeypatch.setattr(lra.bench.sweep.subprocess, "Popen", lambda command, **options: process(ended=ended))
    assert main(words(lab)) == 85 and ended == ["terminate", "waited"] and machine.held == [CORES]


def test_the_grid_is_that_of_run_all():
    args = parser(["bench"]).parse_args(["bench", "sweep"])
    assert f"attentions={args.attentions} " in (ROOT / "run_all.sh").read_text()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--jobs=1"], "from 2 to the 3 cores of this machine; got 1"),
        (["--jobs=4"], "got 4"),
        (["--tasks=tinny"], "did you mean 'tiny'?"),
        (["--attentions=perfomer"], "did you mean 'performer'?"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(lab, machine, more, said, error_line):
    assert said in error_line(*words(lab, *more)) and not machine.turns
