"""Predictions: what is counted is what runs, prices are fitted honestly, and what cannot fit is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from lra.__main__ import main
from lra.scaling import calibration, cost
from lra.scaling.calibration import COLUMNS, Machine, Sample, planned_manifest, planned_run
from lra.scaling.count import Counter, count
from lra.scaling.jobs import smaller
from lra.training.config import resolve
from models.features import flash
from tasks.store.prepared import load
from tests.conftest import ROOT
from tests.lra.builders import MACHINE

SIZES = {"encoder.width": "20", "encoder.ffn": "28", "encoder.max_len": "67", "train.batch": "3"}


def sample(attention="softmax", batch=3, padded=True, **sets):
    run = planned_run(attention, 67, SIZES | {"train.batch": str(batch)} | sets)
    return Sample(run, batch, 67, padded)


@pytest.mark.parametrize("attention", ["softmax", "performer", "optimal", "nystrom", "linformer", "s4d", "local"])
def test_step_without_numbers_counts_what_a_real_step_does(attention):
    step, real = sample(attention).stepper(), Counter()
    with real:
        step()
    counted = sample(attention).work().counts
    assert dict(zip(COLUMNS, counted, strict=True)) == dict(zip(COLUMNS, real.total, strict=True))
    assert all(counted[:4] > 0)


def test_flops_of_the_forward_pass_are_those_of_the_formula():
    s, flops = sample(padded=False), COLUMNS.index("flops")
    forward = count(s.run, batch=3, width=67, padded=False, training=False)
    B, N, E, F, C = 3, 67, 20, 28, 10
    layer = 2 * B * N * (4 * E * E + 2 * E * F) + 4 * B * N * N * E
    head = 2 * B * (E * F + F * C)
    assert forward.counts[flops] == 2 * layer + head
    assert s.work().counts[flops] > 3 * forward.counts[flops] - head  # backward: twice the products, or more
    assert forward.peak < s.work().peak


def test_memory_is_parameters_gradients_and_two_moments_and_grows_with_the_batch():
    run = sample("constant").run
    parameters = sum(p.numel() for p in run.build_model().parameters())
    small, large = (count(run, batch=batch, width=67, padded=False).peak for batch in (3, 6))
    assert 16 * parameters < small < large


def test_code_that_reads_numbers_is_uncountable_and_named(monkeypatch, capsys):
    from models.attention.constant import Attention

    monkeypatch.setattr(Attention, "attend", lambda self, q, *_: q * q.sum().item())
    assert cost.foresee(sample("constant").run, MACHINE, None) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no prediction for listops constant: ")


def test_random_features_of_any_size_are_counted(monkeypatch):
    """Their kernel is tried once, on numbers: not on the fake tensors of a count."""
    monkeypatch.setattr(flash, "SMALL", 0)
    flash._trial.cache_clear()
    assert sample("performer").work().counts[COLUMNS.index("flops")] > 0


def test_prediction_grows_with_steps_and_accumulation_trades_memory_for_operations():
    run = sample(batch=12).run
    once = cost.predict(run, MACHINE)
    longer = replace(run.recipe.train, steps=2 * run.recipe.train.steps, eval_every=10**6)
    assert cost.predict(replace(run, recipe=replace(run.recipe, train=longer)), MACHINE).seconds > (
        once.seconds + run.recipe.train.steps * once.step_seconds * 0.9
    )
    split = cost.predict(sample(batch=12, **{"train.accumulate": "4"}).run, MACHINE)
    assert split.bytes < once.bytes and split.step_seconds > once.step_seconds


def test_prediction_counts_every_validation_and_the_test_in_micro_batches():
    run = sample(batch=12, **{"train.accumulate": "4", "train.steps": "6", "train.eval_every": "2"}).run
    seldom = replace(run, recipe=replace(run.recipe, train=replace(run.recipe.train, eval_every=6)))
    often, once = (cost.predict(r, MACHINE).seconds for r in (run, seldom))
    forward = MACHINE.seconds(count(run, batch=3, width=67, padded=False, training=False).counts)
    batches = -(-64 // 3)  # of validation and of test
    assert often - once == pytest.approx(2 * batches * forward)
    steps = (6 + 20 * 4 / 12) * cost.predict(run, MACHINE).step_seconds
    assert once == pytest.approx(MACHINE.start_seconds + steps + 2 * batches * forward)


def test_memory_is_that_of_the_evaluation_where_its_sequences_are_longer(lab):
    prepared = load(lab.data / "tiny" / "smoke")  # 13 tokens in training, 37 in the test
    shape = {"encoder.layers": "1", "encoder.width": "2", "encoder.ffn": "128"}
    run = resolve("tiny", "smoke", "softmax", 0, prepared.manifest, shape)
    longest = count(run, batch=8, width=37, padded=True, training=False).peak
    assert longest > count(run, batch=8, width=13, padded=True).peak
    assert cost.predict(run, MACHINE, prepared).bytes == MACHINE.bytes(longest)


def test_fit_finds_prices_that_are_there_and_none_below_zero():
    rng = np.random.default_rng(0)
    counts = rng.uniform(1, 1e6, (40, len(COLUMNS)))
    prices = {"operations": 3e-6, "bytes": 2e-10, "tiles": 0.0}
    seconds = calibration.priced(counts, prices)
    assert calibration.fit(counts, seconds, tuple(prices)) == pytest.approx(prices, abs=1e-12)
    assert min(calibration.fit(counts, seconds, ("step", "flops")).values()) >= 0
    assert calibration.spread(1.1 * seconds, seconds) == pytest.approx({"median": 0.1, "p90": 0.1, "max": 0.1})


def test_calibration_is_what_predictions_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "attention_names", lambda: ["constant", "softmax"])
    for number, value in (("FITTED", 2), ("HELD_OUT", 1), ("ROUNDS", 1)):
        monkeypatch.setattr(calibration, number, value)
    assert main(["cost", "--calibrate", f"--results={tmp_path}"]) == 0
    machine = Machine.read(tmp_path)
    report = json.loads((tmp_path / "bench" / "cost.json").read_text())
    assert machine.prices == report["prices"]["both"] and machine.start_bytes > 10**7
    assert set(report["held_out_errors"]) == {"flops", "traffic", "both", "memory"}
    assert (tmp_path / "bench" / "cost.md").read_text() in capsys.readouterr().out


def test_way_out_of_memory_is_the_next_number_of_micro_batches_that_divides():
    run = sample(batch=12).run
    assert [smaller(run, f) for f in (1.01, 2, 2.1, 4.5, 7, 100)] == [2, 2, 3, 6, 12, 12]
    assert smaller(sample(batch=12, **{"train.accumulate": "2"}).run, 1.5) == 3


def test_sweep_refuses_what_cannot_fit_before_it_starts(lab, capsys):
    words = ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--device=cpu", *lab.places]
    assert main([*words, "--memory=100M"]) == 1
    out, err = capsys.readouterr()
    assert "predicted: " in out and "needs about 0." in err and "--set train.accumulate=" in err
    assert not lab.records()


def test_cost_of_a_grid(lab, capsys):
    words = ["cost", "--tasks=tiny", "--attentions=softmax,constant", "--preset=smoke", *lab.places]
    assert main([*words, "--seeds=3", "--jobs=2"]) == 0
    out = capsys.readouterr().out
    assert "| tiny softmax |" in out and "6 runs, predicted" in out and "of one CPU thread. With 2 at a time" in out
    assert "lanned" not in out
    assert main([*words, "--gpu=A100", "--data=elsewhere"]) == 0
    out = capsys.readouterr().out
    assert "of one A100." in out and "| tiny constant (planned) |" in out and "Planned: " in out


def test_a_data_sheet_prices_bytes_and_flops():
    counts = np.array([1, 10**6, 312e12, 2.039e12, 10**12])
    assert cost.GPUS["A100"].seconds(counts) == pytest.approx(2)


def test_unknown_gpu_names_the_nearest(lab, error_line):
    assert "did you mean 'A100'" in error_line("cost", "--tasks=tiny", "--gpu=A10", *lab.places)


def test_planned_data_resolve_to_a_run():
    manifest = planned_manifest(67, {"train": 5, "val": 5, "test": 5})
    assert manifest["splits"]["val"]["max_length"] == 67 and sample().run.digest == sample().run.digest


def test_committed_calibration_keeps_its_promise_on_steps_it_had_not_seen():
    measured = json.loads((ROOT / "results" / "reference" / "bench" / "cost.json").read_text())
    errors = measured["held_out_errors"]
    assert errors["traffic"]["median"] <= 0.15 and errors["both"]["median"] <= 0.15
    assert errors["traffic"]["median"] < errors["flops"]["median"]
    assert set(measured["machine"]["prices"]) <= set(COLUMNS), "run: python -m lra cost --calibrate"
