"""The compact table: default rows and floors, interval, marks, and lines that fit."""

from lra.records.table import render
from tests.lra.builders import FIVE, put


def rows(results, *presets):
    """The rows of the first table by name, cells as text; and the paragraph below it."""
    table, text = render(results, "compact", presets).split("\n\n")[:2]
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]
    return {name: cells for name, *cells in (lines[0], *lines[2:])}, " ".join(text.split())


def test_a_cell_is_accuracy_with_the_longer_half_of_its_interval(tmp_path):
    put(tmp_path, floors={"majority": 0.169, "digits": 0.2, "root": 0.254})
    table, text = rows(tmp_path)
    assert table == {
        "method": ["listops"],
        "majority": ["16.9 ± 1.2"],
        "shortcut": ["25.4 ± 1.4"],
        "softmax": ["34.0 ± 1.5"],
    }
    assert "preset small, 1 seed. listops: 100 tokens." in text and "Bold" not in text


def test_substitutes_failures_missing_cells_and_open_runs_are_marked(tmp_path):
    for seed in range(2):
        put(tmp_path, "image", dataset="digits", substitute=True, seed=seed, failed="no" if seed else None)
        put(tmp_path, "image", "linformer", dataset="digits", substitute=True, seed=seed, failed="no")
    put(tmp_path, attention="linformer", protocol="open")
    table, text = rows(tmp_path)
    assert table["method"] == ["listops", "image (substitute)"]
    assert table["softmax"] == ["–", "34.0 ± 1.5 (1/2)"]
    assert table["linformer"] == ["34.0 ± 1.5 (1) †", "failed 2/2"]
    assert "†: outside lra-v1." in text and "2 seeds. " in text and "(1): a cell of one seed" in text
    assert "(2/3): " in text and "image: substitute: digits, 100 tokens" in text


def test_two_data_sets_of_one_task_are_told_apart(tmp_path):
    put(tmp_path, "text", data="one")
    put(tmp_path, "text", "performer", data="two")
    header = rows(tmp_path)[0]["method"]
    assert len(set(header)) == 2 and all(name.startswith("text ") for name in header)


def test_changed_runs_stay_in_the_wide_table_and_are_counted(tmp_path):
    put(tmp_path)
    put(tmp_path, overrides={"train.lr": "1e-4"}, lr=1e-4)
    table, text = rows(tmp_path)
    assert list(table) == ["method", "majority", "shortcut", "softmax"]
    assert "Rows with changed options: 1, shown by table --format long." in text


def test_no_line_is_wider_than_110_characters(tmp_path):
    for task in FIVE:
        for attention in ("softmax", "constant", "darkformer"):
            substitute = task in ("text", "retrieval", "image")  # the others are generated
            put(tmp_path, task, attention, dataset=f"a data set of {task} with a long name", substitute=substitute)
    text = render(tmp_path, "compact")
    assert max(map(len, text.splitlines())) <= 110


def test_nothing_recorded_is_said(tmp_path):
    assert render(tmp_path, "compact").startswith("No results yet")
