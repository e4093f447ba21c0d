"""`bench attention`: what is measured, against what, and how it is told."""

import io
import json
import os
import platform
import time
import warnings
from pathlib import Path

import pytest
import torch

from lra.__main__ import main
from lra.bench import attention, encoder
from lra.bench.base import compare, release, serve
from lra.bench.encoder import Step
from lra.bench.peers import PEERS, build_peer, version
from lra.options import UsageError
from lra.registry import build_attention
from models.attention.softmax import naive_softmax


class Here:
    """What Apart is, in this process and without its start."""

    order = []

    def __init__(self, module, facts):
        build = {"lra.bench.attention": attention, "lra.bench.encoder": encoder}[module].contender
        self.name, self.run = facts["name"], build(**facts)

    def __enter__(self):
        self.peak_bytes = 1_000_000
        return self

    def __exit__(self, *_):
        pass

    def seconds(self):
        self.order.append(self.name)
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


@pytest.fixture
def here(monkeypatch):
    """No processes, where what they print is not the point; returns who ran, in order."""
    monkeypatch.setattr("lra.bench.base.Apart", Here)
    monkeypatch.setattr(Here, "order", [])
    return Here.order


def test_bench_attention_writes_points_and_a_table(tmp_path, capsys, here):
    words = "bench attention --attentions softmax,performer,performer causal --lengths 13,7 --rounds 2 --batch 1"
    words = words.split(" ")
    words[3:5] = ["softmax,performer,performer causal"]
    assert main([*words, "--heads", "2", "--head-dim", "5", "--features", "11", "--results", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench" / "attention.json").read_text())
    points = {(p["name"], p["N"]): p for p in report["points"]}
    assert set(points) == {(n, N) for n in ("softmax", "performer", "performer causal") for N in (7, 13)}
    assert all(p["seconds"] > 0 and p["peak_bytes"] == 1_000_000 for p in points.values())
    assert all(points["softmax", N]["ratio"] == 1 for N in (7, 13))
    text = (tmp_path / "bench" / "attention.md").read_text()
    assert text in capsys.readouterr().out and "| performer causal |" in text


def test_the_matrix_in_memory_costs_more_than_the_fused_kernel():
    """N x N numbers, seen by a process of its own."""
    sizes = {"B": 1, "H": 1, "N": 1009, "D": 5, "M": 7}
    fused, unfused = compare("lra.bench.attention", ["softmax", "softmax unfused"], sizes, 2, lambda: None)
    assert unfused["seconds"] > 0 and unfused["ratio_range"][0] <= unfused["ratio"] <= unfused["ratio_range"][1]
    if fused["peak_bytes"] is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert unfused["peak_bytes"] > fused["peak_bytes"] + 4 * 1009**2


def test_too_large_matrices_are_left_out_and_said_so(tmp_path, capsys, monkeypatch, here):
    monkeypatch.setattr("lra.bench.attention.MEMORY_LIMIT", 1e3)
    words = ["bench", "attention", "--attentions", "softmax,softmax unfused", "--lengths", "7", "--rounds", "1"]
    assert main([*words, "--head-dim", "5", "--results", str(tmp_path)]) == 0
    assert "would not fit 1e-06 GB" in capsys.readouterr().out
    (point,) = json.loads((tmp_path / "bench" / "attention.json").read_text())["points"]
    assert point["name"] == "softmax"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--attentions", "performer"], "--attentions needs softmax"),
        (["--attentions", "softmax,perfomer"], "did you mean 'performer'?"),
        (["--attentions", "softmax,performer quickly"], "quickly is none of unfused, causal, bf16"),
        (["--attentions", "softmax,linformer causal"], "linformer has no causal form"),
        (["--lengths", "7,x"], "--lengths takes whole numbers above 0, comma-separated, such as 512; got '7,x'"),
        (["--lengths", "0"], "--lengths takes whole numbers above 0, comma-separated, such as 512; got '0'"),
        (["--attentions", "softmax,pypi:flash"], "unknown peer 'flash'"),
        (["--attentions", "softmax,pypi:flash bf16"], "unknown peer 'flash'"),
    ],
)
def test_bad_input_is_one_line(words, said, tmp_path, capsys):
    assert main(["bench", "attention", "--results", str(tmp_path), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not list(tmp_path.iterdir())


SIZES = {"heads": 2, "head_dim": 4, "max_len": 8}


@pytest.mark.parametrize("package", PEERS)
def test_a_peer_computes_its_attention_on_our_queries_keys_and_values(package):
    if version(package) is None:
        pytest.skip(f"needs {package}: pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    q, k, v = (0.2 * torch.randn(3, 2, 8, 4) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = build_peer(package, **SIZES, size=8 if package == "nystrom-attention" else 512)(q, k, v)
    assert out.shape == v.shape
    if package != "linformer":  # its projections are drawn, not an estimate
        torch.testing.assert_close(out, naive_softmax(_plain(), q, k, v), rtol=0, atol=0.05)


def _plain():
    return build_attention("softmax", **SIZES)


def test_contenders_take_turns(here):
    sizes = {"B": 1, "H": 1, "N": 7, "D": 5, "M": 11}
    compare("lra.bench.attention", ["softmax", "performer"], sizes, 3, lambda: None)
    assert here == ["softmax", "performer"] * 3


def test_a_process_that_fails_is_told_with_its_last_words():
    with pytest.raises(RuntimeError, match="softmax 0 0 0 0 0 1: .*Error"):
        compare("lra.bench.attention", ["softmax"], dict.fromkeys("BHNDM", 0), 1, lambda: None)


def test_of_two_runs_the_second_counts_and_memory_is_released(monkeypatch, capsys):
    done, now = [], [0.0]

    def run():
        done.append("run")
        now[0] += len(done)

    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    monkeypatch.setattr("lra.bench.base.release", lambda: done.append("release"))
    monkeypatch.setattr("lra.bench.base.time.perf_counter", lambda: now[0])
    serve(7, run)
    assert done == ["run", "run", "release"] * 2
    assert capsys.readouterr().out.split() == ["7", "2.0", "5.0"]


def test_a_waiting_contender_holds_no_memory():
    """Fifteen of them at 32 x 2,048 tokens once held 15 GB."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs glibc")
    before = resident()
    blocks = [torch.ones(25_000) for _ in range(601)]  # 100 kB each: from the heap, not page by page
    assert resident() > before + 50e6
    blocks = blocks[-1]  # the top of the heap is still in use: nothing is given back by itself
    release()
    assert resident() < before + 10e6 and blocks.numel()


def test_bench_encoder_writes_points_and_a_table(tmp_path, capsys, here):
    words = "bench encoder --attentions softmax,performer,constant --layouts 2x7,1x13 --rounds 2 --features 5"
    assert main([*words.split(), "--results", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "bench" / "encoder.json").read_text())
    points = {(p["name"], p["B"], p["N"]): p for p in report["points"]}
    assert set(points) == {(n, *s) for n in ("softmax", "performer", "constant") for s in ((2, 7), (1, 13))}
    assert all(0 < p["matmul_share"] < 1 and p["seconds"] > 0 for p in points.values())
    assert points["softmax", 2, 7]["ratio"] == 1 and report["matmul_rate"] > 1e9
    text = (tmp_path / "bench" / "encoder.md").read_text()
    assert text in capsys.readouterr().out and "| 2 x 7 | 1 x 13 |" in text


def test_a_step_of_the_encoder_learns():
    step = Step("performer", 2, 7, 5)
    before = [p.clone() for p in step.model.parameters()]
    step.run()
    assert all(not torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_a_compiled_step_goes_through_the_compiler(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    Step("performer", 2, 7, 5).run()
    assert not compiled
    step = Step("performer compiled", 2, 7, 5)
    step.run()
    assert compiled == [step.model]
    with pytest.raises(UsageError, match="'performer twice': a name, and at most 'compiled' behind it"):
        Step("performer twice", 2, 7, 5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layouts", "32"], "--layouts takes whole numbers above 0, comma-separated, such as 32x1024; got '32'"),
        (["--layouts", "0x7"], "such as 32x1024; got '0x7'"),
        (["--attentions", "performer"], "--attentions needs softmax"),
    ],
)
def test_bad_layouts_are_one_line(words, said, tmp_path, capsys):
    assert main(["bench", "encoder", "--results", str(tmp_path), *words]) == 2
    assert said in capsys.readouterr().err
