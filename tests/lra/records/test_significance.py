"""Bold cells: which differences to softmax a table claims, from predictions made for the purpose."""

import hashlib
import json

import numpy as np
import pytest

from lra.records.cells import build
from lra.records.record import write_labels, write_record
from lra.records.significance import against_softmax
from lra.records.stats import holm, paired_test
from lra.records.table import render
from tests.lra.builders import grid, only, put

N = 997
LABELS = np.random.default_rng(7).integers(0, 10, N).astype(np.uint8)


def run(results, attention, seed, accuracy, **options):
    """A record whose stored predictions are right for a random share of the examples; returns its answers."""
    rng = np.random.default_rng([seed, *attention.encode()])
    right = rng.random(N) < accuracy
    predictions = np.where(right, LABELS, (LABELS + 1) % 10).astype(np.uint8).tobytes()
    path = put(results, attention=attention, seed=seed, correct=int(right.sum()), n=N, **options)
    record = json.loads(path.read_text())
    record["result"]["predictions_sha256"] = hashlib.sha256(predictions).hexdigest()
    record["data"]["splits"]["test"]["labels_sha256"] = hashlib.sha256(LABELS.tobytes()).hexdigest()
    write_labels(results, LABELS.tobytes())
    write_record(path, record, predictions)
    return right


@pytest.fixture
def grid_of_runs(tmp_path):
    """Three seeds of softmax, of one method above, one below and one equal; the answers by method."""
    levels = {"softmax": 0.5, "performer": 0.7, "linformer": 0.3, "darkformer": 0.5}
    return {a: np.array([run(tmp_path, a, k, p) for k in range(3)]) for a, p in levels.items()}


def verdicts(results):
    """The verdict of every comparison of the only table, by attention."""
    (table,) = build(results)
    return {row[1]: c.verdict for (row, _), c in against_softmax(table).items()}


def test_p_values_are_those_of_the_paired_test_on_the_answers_corrected_by_holm(grid_of_runs, tmp_path):
    (table,) = build(tmp_path)
    found = against_softmax(table)
    tests = {a: paired_test(x, grid_of_runs["softmax"]) for a, x in grid_of_runs.items() if a != "softmax"}
    assert {row[1]: (c.gap, c.p) for (row, _), c in found.items()} == tests
    assert [c.adjusted for c in found.values()] == holm([c.p for c in found.values()])


def test_bold_is_above_softmax_italics_below_and_equals_stay_plain(grid_of_runs, tmp_path):
    assert verdicts(tmp_path) == {"performer": "above", "linformer": "below", "darkformer": None}
    text = render(tmp_path, "md")
    cells = {name: only(row) for name, row in grid(text).items()}
    assert cells["performer"].startswith("**6") and cells["performer"].endswith("]**")
    assert cells["linformer"][:2] == "*2" and cells["linformer"].endswith("]*")
    assert "*" not in cells["darkformer"] + cells["softmax"]
    assert "for the 3 comparisons of this table: 1 above, 1 below." in text


def test_nothing_is_bold_with_fewer_than_three_seeds_of_either(tmp_path):
    for seed in range(3):
        run(tmp_path, "softmax", seed, 0.2)
        if seed < 2:
            run(tmp_path, "performer", seed, 0.9)
    assert verdicts(tmp_path) == {}
    assert "**" not in render(tmp_path, "md") and "Bold" not in render(tmp_path, "md")


def test_a_failed_seed_does_not_count(tmp_path):
    for seed in range(3):
        run(tmp_path, "softmax", seed, 0.2)
        run(tmp_path, "performer", seed, 0.9) if seed else put(tmp_path, attention="performer", failed="no")
    assert verdicts(tmp_path) == {}


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
    found = {row[2]: c.verdict for (row, _), c in against_softmax(table).items()}
    assert found == {("train.lr=0.01",): "below", ("attention.num_features=256",): "above"}
