"""Several processes train one model: what one process would have trained, up to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lra.training.distributed import ALONE, World
from tasks.base import Batch
from tests.conftest import ROOT

EXACT = ("--set=encoder.dropout=0", "--threads=1")

# Threads of the process group that outlive it may abort a rank as it exits. One that was joined is listed until the
# kernel has taken it down, so it gets the time.
THREADS_AT_EXIT = """
import atexit, os, pathlib, time
def threads():
    for _ in range(200):
        if (number := len(os.listdir("/proc/self/task"))) == 1:
            break
        time.sleep(0.05)
    pathlib.Path("FOLDER", "threads" + os.environ["RANK"]).write_text(str(number))
atexit.register(threads)
"""


# Two ranks without torchrun, from one process that has imported everything: first each fits projections to its own
# shard, then as they are.
FORKED = """
import os, shutil, socket, lra.training.commands, lra.training.distributed as distributed
codes = []
for alone in (True, False):
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    for rank in ("0", "1"):
        if not os.fork():
            os.environ["RANK"] = rank
            if alone:
                distributed.World.broadcast_buffers = lambda *_: None
            break
    else:
        codes.append(max(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)))
        shutil.rmtree("RUNS") if alone else None
        continue
    break
else:
    sys.exit(f"exit codes {codes}")
"""


@pytest.fixture
def torchrun(lab, tmp_path):
    """`torchrun(*options)`: start `train` on two ranks; returns the process."""
    script = tmp_path / "main.py"
    started = []

    def run(*options, extra="", torchrun=True, **cell):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        env["PYTHONWARNINGS"] = "error::FutureWarning"
        script.write_text(lab.driver(extra)[2])
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] * torchrun
        words = [sys.executable, *ranks, str(script), *lab.words(*options, **cell)]
        pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(words, env=env, cwd=ROOT, **pipes))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()


def test_two_ranks_train_what_one_does(lab, torchrun, tmp_path):
    extra = THREADS_AT_EXIT.replace("FOLDER", str(tmp_path)) if Path("/proc/self/task").exists() else ""
    process = torchrun(*EXACT, "--set=train.accumulate=2", attention="performer", extra=extra)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert [path.read_text() for path in tmp_path.glob("threads*")] == ["1", "1"] * bool(extra)
    (path,) = lab.records()
    two = json.loads(path.read_text())
    weights = load_file(lab.folder("model.safetensors") / "model.safetensors")
    assert two["training"]["world_size"] == 2 and two["command"].startswith("torchrun --nproc-per-node 2 -m lra train")
    assert out.count("tiny / performer / smoke") == out.count("test ") == 1  # rank 0 alone prints
    lab.results, lab.runs = tmp_path / "alone", tmp_path / "runs-alone"
    one = lab.train(*EXACT, attention="performer")
    assert one["training"]["world_size"] == 1 and path.parent.name != lab.records()[0].parent.name  # another cell
    for a, b in zip(one["result"]["curve"], two["result"]["curve"], strict=True):
        assert a[:2] == b[:2] and a[3:] == b[3:]
        assert a[2] == pytest.approx(b[2], rel=1e-5)
    alone = load_file(lab.folder("model.safetensors") / "model.safetensors")
    for name, tensor in alone.items():
        assert torch.allclose(tensor, weights[name], rtol=1e-5, atol=1e-5), name
    assert one["cost"].keys() == two["cost"].keys()


def test_projections_redrawn_every_step_are_equal_on_all_ranks_or_stop_the_run(lab, torchrun):
    # The checksum of weights and projections is compared at steps 0, 4 and 8.
    fitted = {"attention": "optimal", "extra": FORKED.replace("RUNS", str(lab.runs)), "torchrun": False}
    process = torchrun(*EXACT, "--set=attention.redraw_every=1", **fitted)
    out, _ = process.communicate(timeout=300)
    assert "exit codes [1, 0]" in out and "weights or projections differ between ranks" in out, out
    (path,) = lab.records()
    assert json.loads(path.read_text())["status"] == "ok"
    weights = load_file(lab.folder("model.safetensors") / "model.safetensors")
    assert weights["encoder.blocks.0.mixer.attention.redraws"] > 0


def test_shares_make_up_the_batch_and_one_process_gets_all_of_it():
    batch = Batch(torch.arange(7 * 2 * 3).view(7, 2, 3), None, torch.arange(7))
    shares = [World(rank, 3).shard(batch) for rank in range(3)]
    assert sorted(torch.cat([s.labels_B for s in shares]).tolist()) == list(range(7))
    assert torch.equal(shares[1].tokens_BTN, batch.tokens_BTN[[1, 4]])
    assert torch.equal(ALONE.shard(batch).tokens_BTN, batch.tokens_BTN)


def test_only_rank_zero_is_the_main_process_and_keeps_its_random_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for rank in range(3):
        World(rank, 3).reseed(5)
        assert torch.equal(torch.get_rng_state(), before) == World(rank, 3).is_main == (rank == 0)


def test_batch_that_does_not_split_is_refused_with_the_nearest_that_does(lab, monkeypatch, error_line):
    monkeypatch.setenv("WORLD_SIZE", "3")
    line = error_line(*lab.words("--set=train.accumulate=2"))
    assert "train.batch 8 does not split over 3 processes" in line and "--set train.batch=12" in line
