"""bench data: what it times is what training does, and what it writes can be read."""

import json

import numpy as np
import pytest

from lra.__main__ import main
from lra.bench import data as bench_data
from lra.records import published
from tasks.store.prepared import load


@pytest.fixture
def quick(monkeypatch):
    """Timings short enough for a test."""
    monkeypatch.setattr(bench_data, "SECONDS", 1e-3)
    monkeypatch.setattr(bench_data, "STEPS", 2)


def test_bench_data_writes_every_generator_and_task(lab, quick, capsys):
    words = [
        "bench",
        "data",
        "--tasks=tiny",
        "--preset=smoke",
        f"--data={lab.data}",
        f"--results={lab.results}",
    ]
    assert main(words) == 0
    report = json.loads((lab.results / "bench" / "data.json").read_text())
    assert report["command"] == "python -m lra bench data --preset smoke --tasks tiny"
    assert report["env"]["cpu"] and report["env"]["load"] >= 0
    rates = {row["name"]: row for row in report["generators"]}
    assert len(rates) == 10 and published.GENERATORS.keys() <= rates.keys()
    for name, row in rates.items():
        assert row["per_second"] > 0 and row["samples"] >= 1
        if name in published.GENERATORS:
            assert row["ratio"] == pytest.approx(row["per_second"] / published.GENERATORS[name], abs=0.1)
        else:
            assert row["ratio"] is None
    (tiny,) = report["loading"]
    lengths = np.diff(load(lab.data / "tiny" / "smoke").splits["train"].offsets)
    assert (tiny["task"], tiny["batch"], tiny["attention"]) == ("tiny", 8, "constant")
    # 61 sequences of at most 13 tokens, in batches as wide as the longest of all, which is below a rounding step
    assert tiny["padding"] == pytest.approx(1 - lengths.mean() / lengths.max(), abs=0.1)
    assert tiny["waiting"] == pytest.approx(tiny["batch_ms"] / tiny["step_ms"], rel=0.01)
    text = (lab.results / "bench" / "data.md").read_text()
    assert text in capsys.readouterr().out and "| tiny (smoke) | 8 |" in text


def test_the_rate_is_samples_per_second_of_cpu_time(quick):
    def spin(count):
        for _ in range(count):
            sum(range(20_000))

    slow, count = bench_data.samples_per_second(spin)
    fast, _ = bench_data.samples_per_second(lambda count: spin(count // 4))
    assert count >= 1 and 2 < fast / slow < 8


def test_bench_data_needs_prepared_data_before_it_times_anything(tmp_path, error_line, monkeypatch):
    monkeypatch.setattr(bench_data, "generators", lambda: pytest.fail("timed too early"))
    line = error_line("bench", "data", "--tasks=listops", f"--data={tmp_path}", f"--results={tmp_path}")
    assert "no prepared data in" in line and "python -m lra prepare" in line
    assert not (tmp_path / "bench").exists()
    assert "unknown task 'tex'" in error_line("bench", "data", "--tasks=tex")
