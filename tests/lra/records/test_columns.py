"""Length generalisation and receptive fields: what is shown of which files, and that nothing is shown of others."""

import json

import pytest

from lra.options import UsageError
from lra.records import columns, table
from lra.records.cells import build
from lra.records.stats import over_seeds
from tests.lra.builders import grid, put, windows

WEIGHTS = "5" * 64


def trained(results, attention="softmax", seed=0, **facts):
    """A record of weights that are kept."""
    path = put(results, attention=attention, seed=seed, **facts)
    record = json.loads(path.read_text())
    record["result"]["chain"] = {"middle": None, "final_sha256": WEIGHTS}
    path.write_text(json.dumps(record))
    return path


def keep(results, path, counts, fixed="", **changes):
    """What `evaluate --lengths` writes of a record: counts are (tokens, right of 1,000)."""
    points = [{"seq_len": n, "n_correct": k, "n": 1000, "majority": 0.21, "sha256": "0"} for n, k in counts]
    facts = {"schema": columns.SCHEMA, "weights": WEIGHTS, "fixed": fixed, "points": points} | changes
    return columns.write_longer(results, path.relative_to(results / "records"), facts)


def test_longer_data_are_a_table_of_their_own_and_no_accuracy_of_a_record_changes(tmp_path):
    paths = [trained(tmp_path, seed=seed, correct=2000 + 40 * seed) for seed in (0, 1)]
    paths.append(trained(tmp_path, "linformer"))
    put(tmp_path, attention="performer")  # whose weights nobody tested
    before = table.render(tmp_path, "long")
    for path, right in zip(paths, (400, 300), strict=False):
        keep(tmp_path, path, [(200, right), (400, right - 100)])
    keep(tmp_path, paths[2], [(200, 0), (400, 0)], fixed="the attention has a fixed length of 100 tokens")
    after = table.render(tmp_path, "long")
    assert after.startswith(before.split("### Published")[0].rstrip())
    rows = grid(after, 2)
    assert list(rows) == ["majority", "softmax", "linformer"]
    assert rows["majority"] == {
        "listops<br>100 tokens": "16.9", "listops<br>200 tokens": "21.0", "listops<br>400 tokens": "21.0",
    }  # fmt: skip
    softmax = [*rows["softmax"].values()]
    assert [cell.split(" [")[0] for cell in softmax] == ["50.5 ± 0.7 (2)", "35.0 ± 7.1 (2)", "25.0 ± 7.1 (2)"]
    assert [*rows["linformer"].values()][1:] == ["fixed", "fixed"]
    expected = over_seeds([0.4, 0.3], 1000)
    assert softmax[1].endswith(f"[{100 * expected.low:.1f}, {100 * expected.high:.1f}]")


def test_counts_of_other_weights_are_not_shown(tmp_path):
    keep(tmp_path, trained(tmp_path), [(200, 500)], weights="6" * 64)
    assert "200 tokens" not in table.render(tmp_path, "long")


@pytest.mark.parametrize(
    "points, changes",
    [
        ([(100, 500)], {}),  # as long as in training: no longer data
        ([(200, 1001)], {}),  # more right than there are
        ([(200, 500)], {"schema": "lra-longer/2"}),
        ([(200, 500)], {"points": [{"seq_len": 200}]}),
        ([(200, 500)], {"points": 7}),
    ],
)
def test_counts_that_make_no_sense_are_one_line(tmp_path, points, changes):
    path = keep(tmp_path, trained(tmp_path), points, **changes)
    with pytest.raises(UsageError, match="is not usable") as error:
        table.render(tmp_path, "long")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_receptive_fields_are_rows_in_order_between_constant_and_softmax(tmp_path):
    windows(tmp_path)
    put(tmp_path, attention="constant")
    put(tmp_path)
    (built,) = build(tmp_path)
    (cells,) = columns.fields(built).values()
    assert list(cells) == [5, 13, 29, 100]  # 1 + 2 x 2 x window, at most the 100 tokens of the column
    assert [c.runs[0].n_correct for c in cells.values()] == [910, 930, 970, 1540]
    rows = grid(table.render(tmp_path, "long"), 2)
    assert list(rows) == [
        "constant", "local, 5 tokens", "local, 13 tokens", "local, 29 tokens", "local, 100 tokens", "softmax",
    ]  # fmt: skip
    assert rows["local, 5 tokens"]["listops"].startswith("22.8 (1)")


@pytest.mark.parametrize("facts", [{"shape": "blocks"}, {"sinks": 1}])
def test_what_sees_other_tokens_than_its_window_is_no_receptive_field(tmp_path, facts):
    windows(tmp_path, **facts)
    assert not columns.fields(build(tmp_path)[0])


def test_one_window_or_another_recipe_makes_no_row_group(tmp_path):
    windows(tmp_path, sizes=(64,))
    put(tmp_path, attention="local", overrides={"attention.window": "3", "train.lr": "0.1"}, config={"window": 3})
    text = table.render(tmp_path, "long")
    assert "receptive field" not in text and not columns.fields(build(tmp_path)[0])
