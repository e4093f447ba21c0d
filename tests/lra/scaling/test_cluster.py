"""Cells as jobs of submitit: local and debug executors for real, Slurm up to the array it is given."""

import json
import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

import lra.scaling.sweep
from lra.__main__ import main
from lra.records.record import record_path
from lra.scaling import jobs
from tests.conftest import ROOT

submitit = pytest.importorskip("submitit", reason="pip install -r requirements-dev.txt")
BROKEN = "tests.plugins.attention.shift:Broken"
SLOWLY = """
import time
from lra.training.trainer import Trainer
original = Trainer.step
def step(self, step):
    if self.optim.batch == 8 and not self.progress.resumed: time.sleep(0.5)  # and not in the probe
    return original(self, step)
Trainer.step = step
"""


@pytest.fixture
def sweep(lab, monkeypatch):
    """`sweep(executor, *options)`: the cells of the tiny task as jobs, which leave a file where a record belongs."""
    monkeypatch.chdir(ROOT)

    def command(run, args, threads):
        if run.attention == BROKEN:
            return ["sh", "-c", "echo RuntimeError: broken on purpose; exit 1"]
        path = record_path(args.results, "tiny", run.attention, run.digest, run.seed)
        return ["sh", "-c", f"mkdir -p {path.parent} && echo done | tee {path}"]

    monkeypatch.setattr(lra.scaling.sweep, "command", command)

    def run(executor, *options, attentions):
        words = ["sweep", "--tasks=tiny", f"--attentions={attentions}", "--preset=smoke", "--device=cpu"]
        return main([*words, f"--executor={executor}", *options, *lab.places])

    return run


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # log files that submitit leaves open
@pytest.mark.parametrize("executor", ["debug", "local"])
def test_failing_job_does_not_stop_the_others_and_each_has_a_log(sweep, lab, capsys, executor):
    assert sweep(executor, "--jobs=1", attentions=f"{BROKEN},constant") == 1
    out, err = capsys.readouterr()
    assert "[2/2]" in out and f"failed: tiny {BROKEN} seed 0: RuntimeError: broken on purpose" in err
    assert [path.parts[-3] for path in lab.records()] == ["constant"]
    assert len(list(lab.runs.rglob("train.log"))) == 2
    assert sweep(executor, attentions="constant") == 0
    assert "nothing to do" in capsys.readouterr().out


def options(lab, executor, slurm=()):
    return Namespace(executor=executor, runs=lab.runs, slurm=slurm, job_minutes=20)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_preempted_job_saves_its_state_is_queued_again_and_goes_on(lab, monkeypatch):
    monkeypatch.chdir(ROOT)
    log = lab.runs / "train.log"
    made = jobs.executor(options(lab, "local"), 1, 1)
    job = made.submit(jobs.Command(lab.driver(SLOWLY) + lab.words(), str(log)))
    until = time.monotonic() + 60
    while not list(lab.runs.rglob("checkpoint.safetensors")) and time.monotonic() < until:
        time.sleep(0.1)
    children = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)  # what Slurm sends to a job that has to leave
    assert job.result() == 0
    (path,) = lab.records()
    assert json.loads(path.read_text())["training"]["resumed"] == 1
    assert "the same command resumes there" in log.read_text()


def test_slurm_gets_one_array_with_the_parameters_of_the_command_line(lab, tmp_path, monkeypatch):
    for name, says in (("sbatch", "Submitted batch job 17"), ("srun", "")):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho {says}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    made = jobs.executor(options(lab, "slurm", slurm=["partition=gpu", "gpus_per_node=1"]), 5, 3)
    with made.batch():
        submitted = [made.submit(jobs.Command(["true"], str(tmp_path / "log"))) for _ in range(2)]
    assert [job.job_id for job in submitted] == ["17_0", "17_1"]
    text = next((lab.runs / "submitit").glob("*.sh")).read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--gpus-per-node=1", "--cpus-per-task=3", "--signal=USR2@"):
        assert f"#SBATCH {line}" in text, text


def test_what_is_missing_or_unknown_is_one_line(lab, error_line, monkeypatch):
    words = ["sweep", "--tasks=tiny", "--attentions=constant", "--preset=smoke", *lab.places]
    assert "--precision fp32 or bf16" in error_line(*words, "--executor=slurm")
    words.append("--precision=fp32")
    assert "KEY=VALUE" in error_line(*words, "--executor=slurm", "--slurm=gpu")
    assert "--executor slurm" in error_line(*words, "--executor=slurm", "--slurm=colour=red")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install submitit==1.5.4" in error_line(*words, "--executor=local")
    assert "submitit==1.5.4" in (ROOT / "requirements-dev.txt").read_text()
