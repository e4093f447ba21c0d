"""A small dose of every fault; all of it: `python -m tests.faults --kills 50` (results/reference/bench/faults.json)."""

import json
import subprocess
import sys

from tests.conftest import ROOT
from tests.faults import FAULTS

SLOW = {"sweep", "NaN loss"}  # they start processes that import everything; test_sweep.py has both


def test_faults_lose_nothing(tmp_path):
    # In a process of its own: it forks, and this one may have threads.
    only = [name for name in FAULTS if name not in SLOW]
    command = [sys.executable, "-m", "tests.faults", "--kills=3", f"--only={','.join(only)}"]
    command += [f"--results={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench" / "faults.json").read_text())
    assert found["losses_of_data"] == 0 and found["kills"] >= 3
    assert {"SIGKILL", *found["faults"], *found["skipped"]} == set(only)
    assert "losses of data: 0" in done.stdout.splitlines()[-1]


def test_committed_summary_is_of_fifty_kills_and_no_loss():
    found = json.loads((ROOT / "results" / "reference" / "bench" / "faults.json").read_text())
    assert found["kills"] >= 50 and found["losses_of_data"] == 0
    assert {"SIGKILL", *found["faults"]} == set(FAULTS) and not found["skipped"]
    assert found["command"].startswith("python -m tests.faults --kills ")
