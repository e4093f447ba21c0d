"""bench tasks: its points stand for runs, and tables take their speed from it."""

import json

import pytest

from lra.__main__ import main
from lra.options import UsageError
from lra.records.cells import build
from lra.records.measured import speeds


def test_the_speed_of_a_run_in_a_table_is_what_bench_tasks_measured(lab, capsys):
    for attention in ("softmax", "performer"):
        lab.train("--attention", attention)
    (table,) = build(lab.results)
    assert not table.speeds and all(table.efficiency(cell)[0] is None for cell in table.cells.values())
    words = ["--tasks=tiny", "--preset=smoke", "--attentions=softmax,performer,constant", "--rounds=3"]
    capsys.readouterr()
    assert main(["bench", "tasks", *words, f"--data={lab.data}", f"--results={lab.results}"]) == 0
    said = capsys.readouterr().out
    report = json.loads((lab.results / "bench" / "tasks-smoke.json").read_text())
    points = {p["name"]: p for p in report["points"]}
    assert set(points) == {"softmax", "performer", "constant"} and points["softmax"]["ratio"] == 1
    assert all(0 < p["low"] <= p["ratio"] <= p["high"] and p["seconds"] > 0 for p in points.values())
    assert (lab.results / "bench" / "tasks-smoke.md").read_text() in said and "| performer | " in said
    (table,) = build(lab.results)
    for cell in table.cells.values():
        assert table.efficiency(cell)[0] == points[cell.runs[0].attention]["ratio"]


def test_what_was_not_measured_as_it_ran_has_no_speed(lab):
    lab.train("--attention", "performer", "--set", "train.lr=0.5")
    words = ["--tasks=tiny", "--preset=smoke", "--attentions=softmax,performer", "--rounds=1"]
    assert main(["bench", "tasks", *words, f"--data={lab.data}", f"--results={lab.results}"]) == 0
    (table,) = build(lab.results)
    (cell,) = table.cells.values()
    assert len(table.speeds) == 2 and table.efficiency(cell)[0] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks=tinny"], "did you mean 'tiny'?"),
        (["--attentions=performer"], "--attentions needs softmax"),
        (["--attentions=softmax,perfomer"], "did you mean 'performer'?"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(lab, words, said, error_line):
    told = error_line(
        *("bench", "tasks", "--preset=smoke", "--tasks=tiny", f"--data={lab.data}", f"--results={lab.results}", *words)
    )
    assert said in told and not (lab.results / "bench").exists()


def test_a_broken_report_is_named(tmp_path):
    (tmp_path / "bench").mkdir()
    path = tmp_path / "bench" / "tasks-small.json"
    path.write_text('{"points": [{"digest": "a", "ratio": -1}]}')
    with pytest.raises(UsageError, match="tasks-small.json is not usable"):
        speeds(tmp_path, "small")
