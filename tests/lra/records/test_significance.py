"""Bold cells and verdicts: which differences a table claims, from predictions made for the purpose."""

import numpy as np
import pytest

from lra.records.cells import build
from lra.records.significance import compare_all
from lra.records.stats import holm, mcnemar, paired
from lra.records.table import render
from tests.lra.builders import answer, grid, only, put

N = 997


def run(results, attention, seed, accuracy, **options):
    """A record whose stored predictions are right for a random share of the examples; returns its answers."""
    rng = np.random.default_rng([seed, *attention.encode()])
    return answer(put(results, attention=attention, seed=seed, n=N, **options), rng.random(N) < accuracy)


@pytest.fixture
def grid_of_runs(tmp_path):
    """Three seeds of softmax, of one method above, one below and one equal; the answers by method."""
    levels = {"softmax": 0.5, "performer": 0.7, "linformer": 0.3, "darkformer": 0.5}
    return {a: np.array([run(tmp_path, a, k, p) for k in range(3)]) for a, p in levels.items()}


def verdicts(results):
    """The verdict of every comparison of the only table, by attention."""
    (table,) = build(results)
    return {row[1]: c.face for (row, _, baseline), c in compare_all(table).items() if baseline == "softmax"}


def test_p_values_are_those_of_the_paired_test_on_the_answers_corrected_by_holm(grid_of_runs, tmp_path):
    (table,) = build(tmp_path)
    compared = compare_all(table)
    tests = {a: paired(x, grid_of_runs["softmax"]) for a, x in grid_of_runs.items() if a != "softmax"}
    assert {row[1]: c.gap for (row, *_), c in compared.items()} == tests
    assert [c.adjusted for c in compared.values()] == holm([tests[row[1]].p_value for row, *_ in compared])


def test_comparisons_with_constant_belong_to_the_family(grid_of_runs, tmp_path):
    for seed in range(3):
        run(tmp_path, "constant", seed, 0.5)
    (table,) = build(tmp_path)
    compared = compare_all(table)
    pairs = {(row[1], baseline) for row, _, baseline in compared}
    methods = {"performer", "linformer", "darkformer"}
    assert pairs == {(m, b) for m in methods for b in ("softmax", "constant")} | {("constant", "softmax")}
    assert [c.adjusted for c in compared.values()] == holm([c.gap.p_value for c in compared.values()])
    assert (
        "for all 7 comparisons of this table: 4 with softmax (1 above, 1 below) and 3 with constant (1 above, 1 below)"
        in render(tmp_path, "long")
    )


def test_with_one_seed_each_the_test_is_mcnemars_and_no_cell_is_bold(tmp_path):
    softmax, other = run(tmp_path, "softmax", 0, 0.2), run(tmp_path, "performer", 0, 0.9)
    (table,) = build(tmp_path)
    (comparison,) = compare_all(table).values()
    assert comparison.adjusted == mcnemar(int((other & ~softmax).sum()), int((softmax & ~other).sum()))
    assert (comparison.verdict, comparison.face) == ("above", None)
    assert "**" not in render(tmp_path, "long")


def test_a_single_seed_is_not_tested_against_several(tmp_path):
    for seed in range(3):
        run(tmp_path, "softmax", seed, 0.2)
    run(tmp_path, "performer", 0, 0.9)
    assert verdicts(tmp_path) == {}


def equals(results, noise, seeds=3):
    """softmax and constant, each right for the same examples but for a share that is lost by chance."""
    same = np.random.default_rng(1).random(N) < 0.5
    for a in ("softmax", "constant"):
        for seed in range(seeds):
            rng = np.random.default_rng([seed, *a.encode()])
            flipped = rng.random(N) < (noise[seed] if isinstance(noise, tuple) else noise)
            answer(put(results, attention=a, seed=seed), same & ~flipped)


def test_a_tie_is_shown_by_equivalence_and_not_by_the_lack_of_a_difference(tmp_path):
    equals(tmp_path / "alike", 0.01)
    equals(tmp_path / "scattered", (0.0, 0.1, 0.3))
    equals(tmp_path / "single", 0.01, seeds=1)
    said = {}
    for name in ("alike", "scattered", "single"):
        (table,) = build(tmp_path / name)
        (comparison,) = compare_all(table).values()
        said[name] = comparison.verdict
        assert comparison.verdict != "ties" or comparison.gap.within(comparison.margin)
    assert said == {"alike": "ties", "scattered": "untold", "single": "untold"}
    assert "constant ties softmax within 3.1 points (softmax − constant: " in render(tmp_path / "alike", "long")
    assert "constant is not told apart from softmax (" in render(tmp_path / "scattered", "long")
    assert "this compares two runs, not two methods" in render(tmp_path / "single", "long")


def test_bold_is_above_softmax_italics_below_and_equals_stay_plain(grid_of_runs, tmp_path):
    assert verdicts(tmp_path) == {"performer": "above", "linformer": "below", "darkformer": None}
    text = render(tmp_path, "long")
    cells = {name: only(row) for name, row in grid(text).items()}
    assert cells["performer"].startswith("**6") and cells["performer"].endswith("]**")
    assert cells["linformer"][:2] == "*2" and cells["linformer"].endswith("]*")
    assert "*" not in cells["darkformer"] + cells["softmax"]
    assert "for all 3 comparisons of this table: 3 with softmax (1 above, 1 below)" in text


def test_nothing_is_bold_with_fewer_than_three_seeds_of_either(tmp_path):
    for seed in range(3):
        run(tmp_path, "softmax", seed, 0.2)
        if seed < 2:
            run(tmp_path, "performer", seed, 0.9)
    assert verdicts(tmp_path) == {"performer": None}
    assert "**" not in render(tmp_path, "long") and "Bold" not in render(tmp_path, "long")


def test_a_failed_seed_does_not_count(tmp_path):
    for seed in range(3):
        run(tmp_path, "softmax", seed, 0.2)
        run(tmp_path, "performer", seed, 0.9) if seed else put(tmp_path, attention="performer", failed="no")
    assert verdicts(tmp_path) == {"performer": None}


@pytest.mark.parametrize("lost", ["labels/*.gz", "records/listops/performer/*/seed1.pred.gz"])
def test_nothing_is_claimed_without_predictions_and_labels(grid_of_runs, tmp_path, lost):
    for path in tmp_path.glob(lost):
        path.unlink()
    assert "performer" not in verdicts(tmp_path)


def test_methods_are_compared_with_softmax_at_the_same_settings(tmp_path):
    for seed in range(3):
        for accuracy, rate in ((0.2, 1e-3), (0.9, 1e-2)):
            options = {"lr": rate, "overrides": {"train.lr": str(rate)} if rate == 1e-2 else {}}
            run(tmp_path, "softmax", seed, accuracy, **options)
        run(tmp_path, "performer", seed, 0.5, lr=1e-2, overrides={"train.lr": "0.01"})
        wide = {"overrides": {"attention.num_features": "256"}, "config": {"num_features": 256}}
        run(tmp_path, "performer", seed, 0.5, **wide)
    (table,) = build(tmp_path)
    said = {row[2]: c.face for (row, *_), c in compare_all(table).items()}
    assert said == {("train.lr=0.01",): "below", ("attention.num_features=256",): "above"}
