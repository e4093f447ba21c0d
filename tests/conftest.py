"""Shared by all tests: one thread, fixed seeds, and a laboratory with a task that trains in no time."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # of processes, too; two threads of each that share two cores wait for one another

import torch

import models.attention
import tasks
from lra.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = Path(__file__).resolve().parent / "plugins"


LONG = ("test_contract", "test_train", "test_faults", "test_grid", "test_cost", "test_distributed", "test_cluster")


def pytest_collection_modifyitems(items):
    """Long files first: begun last, one would keep its process busy while the others have nothing to do."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def deterministic():
    """One thread and a fixed seed in every test, whatever the one before it did. A fixture of more than one test begins
    before this."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def plug_in(patch: pytest.MonkeyPatch) -> None:
    """Make the folders of tests/plugins part of tasks/ and models/attention/, as if files were added."""
    patch.setattr(tasks, "__path__", [*tasks.__path__, str(PLUGINS / "tasks")])
    patch.setattr(models.attention, "__path__", [*models.attention.__path__, str(PLUGINS / "attention")])


# `python -c DRIVER ...` is `python -m lra ...` with the plugins; EXTRA is code run before it.
DRIVER = f"""
import sys
import models.attention, tasks
tasks.__path__.append({str(PLUGINS / "tasks")!r})
models.attention.__path__.append({str(PLUGINS / "attention")!r})
EXTRA
from lra.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Lab:
    """The command line in this process, with its own results and runs; `task` is prepared in `data`."""

    data: Path
    results: Path
    runs: Path
    task: str = "tiny"

    @property
    def places(self) -> list[str]:
        """The options that say where things are."""
        return [f"--data={self.data}", f"--results={self.results}", f"--runs={self.runs}"]

    def words(self, *options: str, attention: str = "softmax", seed: int = 0, preset: str = "smoke") -> list[str]:
        """The arguments of one `train` command."""
        command = ["train", self.task, "--attention", attention, "--seed", str(seed), "--preset", preset]
        return [*command, "--device=cpu", *options, *self.places]

    def try_train(self, *options: str, **cell) -> int:
        """Run `train`; returns its exit code."""
        return main(self.words(*options, **cell))

    def train(self, *options: str, **cell) -> dict:
        """Run `train`, which must make one new record, and end with 1 if the run failed; returns that record."""
        before = set(self.records())
        code = self.try_train(*options, **cell)
        (new,) = set(self.records()) - before
        record = json.loads(new.read_text())
        assert code == (record["status"] != "ok")
        return record

    def records(self) -> list[Path]:
        """All record files, in order of path."""
        return sorted(self.results.glob("records/*/*/*/seed*.json"))

    def folder(self, name: str) -> Path:
        """The folder of the only run that has a file `name`."""
        (found,) = self.runs.rglob(name)
        return found.parent

    def driver(self, extra: str = "") -> list[str]:
        """The start of a command that does in a process of its own what this class does here."""
        return [sys.executable, "-c", DRIVER.replace("EXTRA", extra)]


@pytest.fixture
def plugins(monkeypatch):
    """The test's own task `tiny` and attention `shift`, as if their files stood in the real folders."""
    plug_in(monkeypatch)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder of prepared data that holds `tiny`, presets smoke and small; not to be changed."""
    out = tmp_path_factory.mktemp("tiny-data")
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch)
        for preset in ("smoke", "small"):
            assert main(["prepare", "tiny", "--preset", preset, "--data", str(out), "--workers", "1"]) == 0
    return out


@pytest.fixture
def lab(tmp_path, tiny_data, plugins):
    """A laboratory on `tiny`."""
    return Lab(tiny_data, tmp_path / "results", tmp_path / "runs")


@pytest.fixture
def error_line(capsys):
    """`error_line(*words)`: the one line on stderr of a command that must end with exit code 2."""

    def run(*words) -> str:
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as ended:  # argparse's own
            code = ended.code
        err = capsys.readouterr().err
        assert code == 2, err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def timeless(record: dict) -> dict:
    """A record without what may differ between two runs of the same thing."""
    kept = {k: v for k, v in record.items() if k not in ("cost", "started", "ended", "suite", "env")}
    return kept | {"training": {k: v for k, v in record["training"].items() if k != "resumed"}}
