"""Predictions: what is counted is what runs, prices are fitted honestly, and what cannot fit is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from lra.__main__ import main
from lra.scaling import calibration, cost
from lra.scaling.calibration import COLUMNS, Machine, Point, planned_manifest
from lra.scaling.trace import KINDS, _Counting, trace
from lra.training.optim import build_optimizer
from lra.training.trainer import update
from tests.conftest import ROOT

SIZES = {"encoder.width": "20", "encoder.ffn": "28", "encoder.max_len": "67", "train.batch": "3"}
MACHINE = Machine({"operations": 1e-5, "flops": 1e-11, "plain": 1e-10}, 1.0, 10**8, 10**7, 1.5)


def point(attention="softmax", batch=3, padded=True, **sets):
    return Point(attention, SIZES | {"train.batch": str(batch)} | sets, batch, 67, padded)


@pytest.mark.parametrize(
    "attention", ["softmax", "performer", "optimal", "nystrom", "linformer", "s4d", "local"]
)
def test_step_without_numbers_counts_what_a_real_step_does(attention):
    chosen = point(attention)
    run = chosen.run()
    work = trace(run, batch=3, width=67, padded=True)
    model = run.build_model().train()
    optimizer = build_optimizer(model, run.recipe.train)
    batch, real = chosen.data(run), _Counting()
    with real:
        update(model, optimizer, batch, run.recipe.train, "fp32")
    kinds, flops, moved, tiles = np.array(real.rows).T
    assert kinds.tolist() == work.kinds.tolist()
    assert flops.sum() == work.flops.sum() > 0
    assert moved.sum() == work.bytes.sum()
    assert tiles.sum() == work.tiles.sum()


def test_flops_of_the_forward_pass_are_those_of_the_formula():
    work = trace(point(padded=False).run(), batch=3, width=67, padded=False)
    B, N, E, F, C = 3, 67, 20, 28, 10
    layer = 2 * B * N * (4 * E * E + 2 * E * F) + 4 * B * N * N * E
    head = 2 * B * (E * F + F * C)
    assert work.totals(forward=True)[1] == 2 * layer + head
    assert work.totals()[1] > 3 * work.totals(forward=True)[1] - head  # backward: twice the products, or more


def test_memory_held_is_parameters_gradients_and_two_moments():
    run = point("constant").run()
    parameters = sum(p.numel() for p in run.build_model().parameters())
    work = trace(run, batch=3, width=67, padded=False)
    assert 16 * parameters <= work.held < 16 * parameters + 4096 + 8 * 3 * 67
    assert work.peak > work.held
    assert trace(run, batch=6, width=67, padded=False).peak > work.peak


def test_work_on_a_gpu_needs_no_gpu_and_does_the_same_products():
    run = point("performer").run()
    here, there = (trace(run, batch=3, width=67, padded=True, gpu=gpu) for gpu in (False, True))
    assert there.flops.sum() == pytest.approx(here.flops.sum(), rel=0.01)
    large = trace(run, batch=900, width=67, padded=True, gpu=True)
    assert cost.GPUS["H100"].seconds(large) < cost.GPUS["L4"].seconds(large)
    assert cost.GPUS["L4"].seconds(there) >= cost.LAUNCH * len(there.kinds)


def test_two_lengths_one_of_them_the_longest_stand_for_all_up_to_squares():
    values = np.array([40, 41, 44, 60, 61, 75, 90, 300, 301, 480]) * 1000
    for power in range(3):
        found = sum(share * float(width) ** power for width, share in cost.quadrature(values))
        assert found == pytest.approx((values.astype(float) ** power).mean(), rel=1e-4)
    assert cost.quadrature(values)[-1][0] == 480_000
    assert cost.quadrature(np.array([7, 7, 7])) == [(7, 1.0)]


def test_large_batches_follow_from_small_ones():
    run = point(batch=48).run()
    predicted = cost.predict(run, MACHINE)
    direct = trace(run, batch=48, width=67, padded=False)
    assert predicted.step_seconds == pytest.approx(MACHINE.seconds(direct), rel=0.02)
    assert predicted.bytes == pytest.approx(MACHINE.bytes(direct.peak), rel=0.02)


def test_prediction_grows_with_steps_and_accumulation_trades_memory_for_operations():
    run = point(batch=12).run()
    once = cost.predict(run, MACHINE)
    longer = replace(run.recipe.train, steps=2 * run.recipe.train.steps, eval_every=10**6)
    assert cost.predict(replace(run, recipe=replace(run.recipe, train=longer)), MACHINE).seconds > (
        once.seconds + run.recipe.train.steps * once.step_seconds * 0.9
    )
    split = cost.predict(point(batch=12, **{"train.accumulate": "4"}).run(), MACHINE)
    assert split.bytes < once.bytes and split.step_seconds > once.step_seconds


def test_fit_finds_prices_that_are_there_and_none_below_zero():
    rng = np.random.default_rng(0)
    counted = rng.uniform(1, 1e6, (40, len(COLUMNS)))
    prices = {"operations": 3e-6, "product": 2e-10, "random": 0.0}
    seconds = counted @ [prices.get(c, 0.0) for c in COLUMNS]
    found = calibration.fit(counted, seconds, ("operations", "product", "random"))
    assert found == pytest.approx(prices, abs=1e-12)
    assert max(calibration.errors(counted, seconds, found)) < 1e-6
    against = calibration.fit(counted, seconds, ("step", "flops"))
    assert min(against.values()) >= 0


def test_committed_calibration_keeps_its_promise_on_steps_it_had_not_seen():
    measured = json.loads((ROOT / "results" / "reference" / "bench" / "cost.json").read_text())
    errors = measured["held_out_errors"]
    assert errors["traffic"]["median"] <= 0.15 and errors["both"]["median"] <= 0.15
    assert errors["traffic"]["median"] < errors["flops"]["median"]
    assert set(measured["prices"]["both"]) == {"operations", "flops", *KINDS}


def test_way_out_of_memory_is_the_next_number_of_micro_batches_that_divides():
    run = point(batch=12).run()
    assert [cost.smaller(run, f) for f in (1.01, 2, 2.1, 4.5, 7, 100)] == [2, 2, 3, 6, 12, 12]
    assert cost.smaller(point(batch=12, **{"train.accumulate": "2"}).run(), 1.5) == 3


def test_sweep_refuses_what_cannot_fit_before_it_starts(lab, capsys):
    words = ["sweep", "--tasks=tiny", "--attentions=softmax", "--preset=smoke", "--device=cpu", *lab.places]
    assert main([*words, "--memory=100M"]) == 1
    out, err = capsys.readouterr()
    assert "predicted: " in out and "needs about 0." in err and "--set train.accumulate=8" in err
    assert not lab.records()


def test_cost_of_a_grid(lab, capsys, tmp_path):
    words = ["cost", "--tasks=tiny", "--attentions=softmax,constant", "--preset=smoke", *lab.places]
    assert main([*words, "--seeds=3", "--jobs=2"]) == 0
    out = capsys.readouterr().out
    assert (
        "| tiny softmax |" in out
        and "6 runs, predicted" in out
        and "CPU thread" in out
        and "lanned" not in out
    )
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- cost:begin -->old<!-- cost:end -->\nbelow\n")
    assert main([*words, "--gpu=A100,L4", "--data=elsewhere", f"--write={page}"]) == 0
    out = capsys.readouterr().out
    assert "of one A100." in out and "of one L4." in out and "| tiny constant (planned) |" in out
    assert (
        out.strip() in page.read_text()
        and page.read_text().startswith("above")
        and "old" not in page.read_text()
    )


def test_unknown_gpu_names_the_nearest(lab, error_line):
    assert "did you mean 'A100'" in error_line("cost", "--tasks=tiny", "--gpu=A10", *lab.places)


def test_planned_data_resolve_to_a_run():
    manifest = planned_manifest(67, {"train": 5, "val": 5, "test": 5})
    assert manifest["splits"]["val"]["max_length"] == 67
    assert torch.equal(point().data(point().run()).tokens_BTN, point().data(point().run()).tokens_BTN)
