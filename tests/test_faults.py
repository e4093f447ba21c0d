"""Every fault in a small dose; the whole is `python -m tests.faults --kills 50`."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults import FAULTS


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What all faults did, from a process of its own: it forks, and this one may have threads."""
    folder = tmp_path_factory.mktemp("faults")
    command = [sys.executable, "-m", "tests.faults", "--kills=3", f"--results={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return json.loads((folder / "bench" / "faults.json").read_text())


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_loses_nothing(fault, report):
    if fault in report["skipped"]:
        pytest.skip(report["skipped"][fault])
    times = report["kills"] if fault == "SIGKILL" else report["faults"][fault]
    assert times >= (3 if fault == "SIGKILL" else 1)
    assert report["losses"].get(fault, []) == []


def test_committed_summary_is_of_fifty_kills_and_no_loss():
    summary = json.loads((ROOT / "results" / "reference" / "bench" / "faults.json").read_text())
    assert summary["kills"] >= 50 and summary["losses_of_data"] == 0
    assert {"SIGKILL", *summary["faults"]} == set(FAULTS) and not summary["skipped"]
    assert summary["command"].startswith("python -m tests.faults --kills ")
