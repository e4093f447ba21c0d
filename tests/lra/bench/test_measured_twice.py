"""`bench attention` and `bench encoder`: what is measured, against what, and how it is told."""

import functools
import importlib
import json
import os
import platform
import warnings
from pathlib import Path

import pytest
import torch

from lra.__main__ import main
from lra.bench import base
from lra.bench.base import SETTINGS, TUNED, Column, against, answers, interleaved, quartiles, release, seconds_of, twice
from lra.bench.encoder import Step
from lra.bench.peers import PEERS, PYPI, build, build_peer, rivals, version
from lra.options import UsageError
from lra.registry import build_attention
from models.attention.softmax import naive_softmax
from tests.lra.bench import impostor

SIZES = {"B": 1, "H": 2, "N": 7, "D": 5, "M": 11}


@pytest.fixture
def here(monkeypatch):
    """No processes, where what they print is not the point, and no run for long."""
    monkeypatch.setattr(base, "LEAST", 1e-9)
    monkeypatch.setattr(base, "apart", lambda *facts: functools.partial(next, answers(*facts[:3])))

    def once(module, columns):
        return dict.fromkeys(SETTINGS, interleaved(importlib.import_module(module).contender, columns, 1))

    for name in ("attention", "encoder"):
        monkeypatch.setattr(f"lra.bench.{name}.twice", once)


def report(results, name, capsys):
    """The JSON of a report, and its text, which was printed as well."""
    text = (results / "bench" / f"{name}.md").read_text()
    assert text in capsys.readouterr().out
    return json.loads((results / "bench" / f"{name}.json").read_text()), text


def test_bench_attention_writes_points_and_tables(tmp_path, capsys, here):
    names = (
        "softmax",
        "softmax causal",
        "performer",
        "performer plain",
        "performer M3 causal",
        "performer hybrid causal",
    )
    sizes = ["--batch=1", "--heads=2", "--head-dim=5", "--features=11", "--rounds=2", "--memory=no"]
    words = ["bench", "attention", f"--attentions={','.join(names)}", "--lengths=13,7", *sizes]
    assert main([*words, f"--results={tmp_path}"]) == 0
    measured, text = report(tmp_path, "attention", capsys)
    for setting in ("points", "as_found"):
        points = {(p["name"], p["N"]): p for p in measured[setting]}
        assert set(points) == {(name, N) for name in names for N in (7, 13)}
        assert all(p["seconds"] > 0 and len(p["rounds"]) == 2 for p in points.values())
        assert all(points["softmax", N]["ratio"] == 1 for N in (7, 13))
    assert text.index("Allocator tuned") < text.index("As users find") and f"GLIBC_TUNABLES={TUNED}" in text
    assert "| performer | plain formulation |" in text and "| performer M3 causal | fused exact attention |" in text


def test_processes_measure_memory_with_both_settings():
    """N x N numbers, seen by processes of their own; a column without rounds has no time."""
    columns = [
        Column(SIZES | {"N": 1009}, 1, ["softmax"]),
        Column(SIZES | {"N": 1009}, 0, ["softmax", "softmax unfused"]),
    ]
    measured = twice("lra.bench.attention", columns)
    assert list(measured) == ["tuned", "as_found"]
    for timed, fused, unfused in measured.values():
        assert timed["seconds"] > 0 and "seconds" not in fused
        if fused["peak_bytes"] is None:
            pytest.skip("this system does not tell a process its peak memory")
        assert unfused["peak_bytes"] > fused["peak_bytes"] + 4 * 1009**2


def test_each_setting_has_its_own_allocator():
    with pytest.raises(UsageError, match=f"softmax: ValueError: tunables {TUNED}"):
        twice("tests.lra.bench.impostor", [Column({}, 1, ["softmax"])])


def test_a_contender_that_fails_is_told_with_its_last_words(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "none")
    for name, said in (("softmax", "softmax: ValueError: tunables none"), ("dies", "dies: killed")):
        with pytest.raises(UsageError, match=said):
            base.apart(impostor.contender, name, [Column({}, 1, [name])], 1)()


def test_contenders_take_turns(here):
    order = []

    def recorded(name, N):
        return {"run": lambda: order.append(name), "part": lambda: order.append(f"{name} part")}

    points = interleaved(recorded, [Column({"N": 1}, 3, ["softmax", "a"]), Column({"N": 2}, 0, ["a"])], 1)
    turns = [name for name in order[4:] if "part" not in name]
    assert list(dict.fromkeys(turns)) == ["softmax", "a"] and sum(a != b for a, b in zip(turns, turns[1:])) == 5
    assert [(p["name"], p["N"], "part" in p.get("parts", {})) for p in points] == [
        ("softmax", 1, True), ("a", 1, True), ("a", 2, False)
    ]  # fmt: skip


def test_the_first_of_several_runs_does_not_count(monkeypatch):
    monkeypatch.setattr(base, "LEAST", 0.1)
    now, took = [0.0], iter([9, 0.02, 0.05, 0.04])
    monkeypatch.setattr(base.time, "perf_counter", lambda: now[0])
    assert seconds_of(lambda: now.__setitem__(0, now[0] + next(took))) == pytest.approx(0.04)


def test_ratios_are_taken_within_rounds_and_the_strongest_rival_is_bold():
    rounds = {
        "performer": [1, 2, 4],
        "softmax": [2, 4, 8],
        "performer plain": [3, 6, 12],
        f"{PYPI}performer-pytorch": [4, 8, 16],
    }
    points = [{"name": name, "N": 7, "rounds": seconds} for name, seconds in rounds.items()]
    lines = against(points, lambda p: f"N {p['N']}").splitlines()[2:]
    assert lines == [
        "| performer | fused exact attention | **2.00 [2.00, 2.00]** |",
        "| performer | plain formulation | 3.00 [3.00, 3.00] |",
        "| performer | the better package | 4.00 [4.00, 4.00] |",
    ]
    assert quartiles([1, 2, 3, 4, 5]) == [2, 3, 4]


def test_rivals_do_the_same():
    names = [
        "softmax",
        "softmax bf16",
        "softmax causal",
        "softmax unfused",
        "performer plain",
        "performer",
        "performer hybrid",
    ]
    assert rivals("performer hybrid", names) == {
        "fused exact attention": ["softmax"],
        "plain formulation": ["performer plain"],
    }
    assert rivals("performer causal", names) == {
        "fused exact attention": ["softmax causal"], "itself without causal": ["performer"]
    }  # fmt: skip
    assert rivals("performer M64", ["softmax", "performer plain", f"{PYPI}performer-pytorch M64"]) == {
        "fused exact attention": ["softmax"], "the better package": [f"{PYPI}performer-pytorch M64"]
    }  # fmt: skip
    assert not rivals("performer plain", names) and not rivals("linear", names)


@pytest.mark.parametrize("method", ["performer", "darkformer"])
def test_the_plain_formulation_equals_the_method(method):
    shape = {"heads": 2, "head_dim": 5, "max_len": 13}
    results = []
    for name in (method, f"{method} plain"):
        torch.manual_seed(0)
        leaves = [torch.randn(3, 2, 13, 5, dtype=torch.float64).requires_grad_() for _ in range(3)]
        attention, _ = build(name, 11, **shape)
        leaves += attention.double().parameters()
        for G_HDD in leaves[3:]:
            G_HDD.data += 0.3 * torch.randn_like(G_HDD)  # away from the identity
        out = attention(*leaves[:3])
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["attention", "--attentions=performer"], "--attentions needs softmax"),
        (["attention", "--attentions=softmax,perfomer"], "did you mean 'performer'?"),
        (["attention", "--attentions=softmax,performer quickly"], "quickly is none of bf16, causal"),
        (["attention", "--attentions=softmax,linear hybrid"], "hybrid is none of bf16, causal, M64"),
        (["attention", "--attentions=softmax,performer plain hybrid"], "hybrid is none of bf16, causal, plain, M64"),
        (["attention", "--attentions=softmax,performer M0"], "M0 is none of bf16, causal, hybrid, plain, M64"),
        (["attention", "--attentions=softmax,linformer causal"], "linformer has no causal form"),
        (["attention", "--attentions=softmax,performer plain causal"], "performer plain has no causal form"),
        (["attention", "--lengths=7,x"], "--lengths takes whole numbers above 0, comma-separated, such as 512"),
        (["attention", "--lengths=0"], "such as 512; got '0'"),
        (["attention", "--attentions=softmax,pypi:flash bf16"], "unknown peer 'flash'"),
        (["encoder", "--layouts=32"], "--layouts takes whole numbers above 0, comma-separated, such as 32x1024"),
        (["encoder", "--attentions=performer"], "--attentions needs softmax"),
        (["encoder", "--attentions=softmax,performer twice"], "twice is none of compiled, hybrid, plain, M64"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(words, said, tmp_path, error_line):
    assert said in error_line("bench", *words, f"--results={tmp_path}") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", PEERS)
def test_a_peer_computes_its_attention_on_our_queries_keys_and_values(package):
    if version(PYPI + package) is None:
        pytest.skip(f"needs {package}: pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    shape = {"heads": 2, "head_dim": 4, "max_len": 8}
    q, k, v = (0.2 * torch.randn(3, 2, 8, 4) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = build_peer(package, **shape, size=512)(q, k, v)
    torch.testing.assert_close(out, naive_softmax(build_attention("softmax", **shape), q, k, v), rtol=0, atol=0.05)


def test_a_package_that_is_absent_is_left_out_with_a_line(tmp_path, capsys, here, monkeypatch):
    monkeypatch.setattr("lra.bench.peers.version", lambda name: None)
    names = "--attentions=softmax,pypi:performer-pytorch bf16"
    assert main(["bench", "attention", names, "--lengths=7", "--memory=no", f"--results={tmp_path}"]) == 0
    said = capsys.readouterr()
    assert "left out, not installed: pypi:performer-pytorch bf16 (pip install" in said.err and "pytorch" not in said.out


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


def test_bench_encoder_writes_points_and_what_a_step_is_made_of(tmp_path, capsys, here):
    words = ["--attentions=softmax,performer M3,constant", "--layouts=2x7,1x13", "--rounds=2", "--features=5"]
    assert main(["bench", "encoder", *words, f"--results={tmp_path}"]) == 0
    measured, text = report(tmp_path, "encoder", capsys)
    names = ("softmax", "performer M3", "constant")
    for points in (measured["points"], measured["as_found"]):
        assert [(p["name"], p["B"], p["N"]) for p in points] == [(n, *s) for s in ((2, 7), (1, 13)) for n in names]
        assert all(set(p["parts"]) == {"attention", "mixer", "feed-forward", "optimiser"} for p in points)
    *_, row = (line for line in text.splitlines() if line.startswith("| constant |"))
    assert all(sum(map(int, cell.split("/"))) in range(97, 104) for cell in row.strip("|").split("|")[1:])


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
