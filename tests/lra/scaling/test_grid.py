"""A cross of the grid, through the command line, and the table of its records: every task with softmax, ListOps with
every attention. (`run_all.sh` trains the 25 cells of the smoke table.)"""

import json
from dataclasses import replace

import pytest

from lra.__main__ import main
from lra.records.cells import build
from lra.registry import attention_names, load_task, task_names
from tests.conftest import Lab

STEPS = 2
SMALL = ("train.batch=4", "encoder.width=16", "encoder.ffn=16")  # what is tested here does not depend on size


CELLS = [(t, a) for t in task_names() for a in attention_names() if t == "listops" or a == "softmax"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A laboratory in which these cells of the smoke preset, with fewer examples, were trained for two steps."""
    folder = tmp_path_factory.mktemp("grid")
    lab = Lab(folder / "data", folder / "results", folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        for task in task_names():
            few(task, patch)
        yield trained(lab)


def few(task, patch):
    """The smoke preset of a task with a hundred examples, and of retrieval with the files of one package."""
    recipes = load_task(task).RECIPES
    data = recipes["smoke"].data
    options = {name: "scikit-learn" if name == "packages" else value for name, value in data.options.items()}
    data = replace(data, train=60, val=20, test=20, options=options)
    patch.setitem(recipes, "smoke", replace(recipes["smoke"], data=data))


def trained(lab):
    """The laboratory, once its data are prepared and its cells trained."""
    for task in task_names():
        assert main(["prepare", task, "--preset=smoke", "--data", str(lab.data), "--workers=1"]) == 0
        for attention in (a for t, a in CELLS if t == task):
            lab.task = task
            sets = [word for pair in SMALL for word in ("--set", pair)]
            assert lab.try_train(f"--steps={STEPS}", *sets, attention=attention) == 0
    return lab


@pytest.fixture(scope="module")
def records(grid):
    """The grid's records by (task, attention)."""
    found = [json.loads(path.read_text()) for path in grid.records()]
    return {(r["task"]["name"], r["model"]["attention"]): r for r in found}


def test_every_cell_has_one_record_that_ended(grid, records):
    assert len(task_names()) >= 5 and len(attention_names()) >= 5
    assert len(grid.records()) == len(records)
    assert set(records) == set(CELLS)
    for cell, record in records.items():
        assert record["status"] == "ok" and record["training"]["steps"] == STEPS, cell
        assert 0 <= record["result"]["n_correct"] <= record["result"]["n_test"], cell
        probe = record["result"]["probe"]["losses"]
        assert len(probe) == 20 and None not in probe, cell


def test_table_has_a_row_for_every_attention_and_a_column_for_every_task(grid):
    (table,) = build(grid.results)
    assert len(table.columns) == len(task_names()) and len(table.rows) == len(attention_names())
    filled = [cell for cell in table.cells.values() if cell.ok]
    assert len(filled) == len(CELLS) and all(cell.complete and len(cell.ok) == 1 for cell in filled)
    assert len(table.averaged) == 5


def test_table_is_the_same_bytes_every_time(grid, capsys):
    texts = []
    for _ in range(2):
        capsys.readouterr()
        assert main(["table", "--format=long", "--results", str(grid.results)]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    for name in (*attention_names(), *task_names(), "majority"):
        assert name in texts[0]


def test_rule_9_all_attentions_of_a_task_share_data_and_recipe(records):
    mine = [r for (t, _), r in records.items() if t == "listops"]
    for part in (
        lambda r: r["data"],
        lambda r: r["model"]["encoder"],
        lambda r: r["training"]["recipe"],
        lambda r: r["training"]["budget"],
        lambda r: r["training"]["examples_seen"],
    ):
        assert all(part(r) == part(mine[0]) for r in mine)


def test_rule_9_parameters_within_ten_percent_of_softmax_or_the_open_protocol(records):
    for (task, attention), record in records.items():
        ratio = record["model"]["n_params_ratio_to_softmax"]
        softmax = records[task, "softmax"]["model"]["n_params"]
        assert ratio == record["model"]["n_params"] / softmax
        assert record["task"]["protocol"] == "open"  # the recipe was changed
        if attention in ("softmax", "constant", "performer", "darkformer"):
            assert ratio <= 1.10, (task, attention)


def test_rule_10_substitutes_say_so(records):
    for (task, _), record in records.items():
        if record["task"]["substitute"]:
            assert task in ("image", "retrieval") and record["data"]["source"] == "embedded"
            assert "substitute" in record["task"]["dataset"]
        else:
            assert task in ("listops", "text", "pathfinder", "recall")


def test_majority_floor_is_stored_and_shared_by_the_cells(records):
    assert all(0 < r["data"]["floors"]["majority"] < 0.6 for r in records.values())
    floors = [r["data"]["floors"] for (t, _), r in records.items() if t == "listops"]
    assert all(f == floors[0] for f in floors)
