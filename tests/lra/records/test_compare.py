"""A user's runs beside the reference's: each verdict from runs made for it."""

import hashlib
import json

import pytest

import lra.leaderboard.page
from lra.__main__ import main
from tests.lra.builders import put

N = 4000  # the margin at 34% is 1.5 points


@pytest.fixture(autouse=True)
def believed(monkeypatch):
    """`put` writes no whole records: they are taken as they are."""
    monkeypatch.setattr(lra.leaderboard.page, "judge", lambda *_: {})


def runs(results, *corrects, attention="softmax", curve=0.5, **options):
    """One run for each number of right answers; `curve` stands for what the validations measured."""
    for seed, correct in enumerate(corrects):
        failed = "loss is not finite" if correct is None else None
        path = put(results, attention=attention, seed=seed, correct=correct, n=N, failed=failed, **options)
        if not failed:
            record = json.loads(path.read_text())
            predictions = hashlib.sha256(f"{correct}".encode()).hexdigest()
            record["result"] |= {"predictions_sha256": predictions, "curve": [[10, "val", curve, 5, 10]]}
            path.write_text(json.dumps(record))


@pytest.fixture
def compared(tmp_path, capsys):
    """`compared()`: the row of softmax and the last line that `compare` prints."""

    def run(*words, code=0):
        places = [f"--results={tmp_path / 'mine'}", f"--reference={tmp_path / 'theirs'}"]
        assert main(["compare", *places, *words]) == code
        lines = capsys.readouterr().out.splitlines()
        (row,) = [line for line in lines if line.startswith("| softmax |")] or [""]
        return row.removeprefix("| softmax | ").removesuffix(" |"), lines[-1]

    return run


CASES = {
    "the same runs": ((1360, 1380, 1400), (1360, 1380, 1400), "34.5 = 34.5 (3 seeds)"),
    "a seed less": ((1360,), (1360, 1380, 1400), "34.0 = 34.0 (1 seed)"),
    "a seed more, which is not compared": ((1360, 3000), (1360,), "34.0 = 34.0 (1 seed)"),
    "one seed, a gap within the margin": ((1360,), (1380,), "34.0 ≈ 34.5 (1 seed)"),
    "one seed, a gap beyond the margin": ((1360,), (1500,), "34.0 ≠ 37.5 (1 seed)"),
    "seeds that are equivalent": ((1360, 1370, 1380), (1361, 1371, 1379), "34.2 ≈ 34.3 (3 seeds)"),
    "seeds that are not": ((1360, 1370, 1380), (1560, 1570, 1581), "34.2 ≠ 39.3 (3 seeds)"),
    "seeds that spread too far to tell": ((1200, 1370, 1500), (1300, 1250, 1600), "33.9 ? 34.6 (3 seeds)"),
    "failures of one kind": ((None,), (None,), "failed = failed (1 seed)"),
    "a failure where the reference ends": ((None,), (1360,), "failed ≠ 34.0 (1 seed)"),
    "no reference": ((1360, 1380), (), "34.2 –"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_cell_has_one_of_the_verdicts(case, tmp_path, compared):
    mine, theirs, row = CASES[case]
    (tmp_path / "theirs").mkdir()
    runs(tmp_path / "mine", *mine)
    runs(tmp_path / "theirs", *theirs)
    assert compared()[0] == row


def test_another_curve_with_the_same_predictions_is_not_bit_for_bit(tmp_path, compared):
    runs(tmp_path / "mine", 1360, curve=0.5)
    runs(tmp_path / "theirs", 1360, curve=0.5000001)
    row, last = compared()
    assert row == "34.0 ≈ 34.0 (1 seed)"
    assert last.endswith("0 equal bit for bit (=), 1 within seed noise (≈), 0 different (≠)")


def test_cells_are_counted_and_one_without_a_reference_is_said_to_have_none(tmp_path, compared):
    for attention in ("softmax", "constant", "linear"):
        runs(tmp_path / "mine", 1360, attention=attention)
    runs(tmp_path / "mine", 1360, lr=0.5, overrides={"train.lr": "0.5"})
    runs(tmp_path / "theirs", 1360)
    runs(tmp_path / "theirs", 3000, attention="constant")
    row, last = compared()
    assert last == (
        f"4 cells beside {tmp_path / 'theirs'}: 1 equal bit for bit (=), 0 within seed noise (≈), "
        "1 different (≠), 2 without a reference (–)"
    )


def test_presets_are_chosen_and_nothing_is_written(tmp_path, compared):
    (tmp_path / "theirs").mkdir()
    runs(tmp_path / "mine", 1360)
    runs(tmp_path / "mine", 1360, preset="paper", data="long")
    before = sorted(tmp_path.rglob("*"))
    assert compared("--preset=small")[1].startswith("1 cells beside")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_record_of_yours_is_reported_and_one_of_the_reference_is_none(tmp_path, compared, capsys):
    runs(tmp_path / "mine", 1360, 1360)
    runs(tmp_path / "theirs", 1360)
    (path,) = (tmp_path / "theirs").rglob("seed0.json")
    path.write_text("{")
    next((tmp_path / "mine").rglob("seed1.json")).write_text("{")
    assert compared(code=1)[0] == "34.0 –"
