"""`leaderboard submit` and `verify`, the badges they leave, and what other people's runs say of a cell."""

import json
import shutil

import numpy as np
import pytest

from lra.__main__ import main
from lra.leaderboard.submit import verified
from lra.records.record import labels_path, predictions_path, read_record
from tests.conftest import Lab, plug_in


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_data):
    """A laboratory with three seeds of one cell."""
    folder = tmp_path_factory.mktemp("made")
    lab = Lab(tiny_data, folder / "results", folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch)
        for seed in range(3):
            lab.train(attention="performer", seed=seed)
    return lab


@pytest.fixture
def lab(made, tmp_path, plugins):
    """A copy of that laboratory, to be changed."""
    shutil.copytree(made.results, tmp_path / "results")
    return Lab(made.data, tmp_path / "results", made.runs)


@pytest.fixture
def inbox(made, tmp_path):
    """Records that came from elsewhere: seed<k>.json and its predictions in one flat folder."""
    folder = tmp_path / "inbox"
    folder.mkdir()
    for path in made.records():
        shutil.copy(path, folder)
        shutil.copy(predictions_path(path), folder)
    return folder


def leaderboard(lab, action, *words):
    """Run `leaderboard ACTION`; returns its exit code."""
    return main(["leaderboard", action, *map(str, words), *lab.places])


def badges(lab):
    """The badge of every record, in order of path."""
    return [v.badge for _, v in sorted(verified(lab.results).items())]


# Badges


def test_a_record_has_the_badge_of_the_level_it_reached_and_keeps_it(lab, capsys):
    assert badges(lab) == ["unverified"] * 3
    assert leaderboard(lab, "verify") == 0
    assert "3 records: 3 reached V1, 0 did not" in capsys.readouterr().out
    assert leaderboard(lab, "verify", lab.records()[1], "--level=2") == 0
    assert badges(lab) == ["V1", "V2", "V1"]
    assert leaderboard(lab, "verify", "--level=0") == 0
    assert badges(lab) == ["V1", "V2", "V1"]


def test_verifying_again_gives_the_same_bytes(lab):
    path = lab.results / "verification.json"
    leaderboard(lab, "verify")
    before = path.read_bytes()
    path.unlink()
    leaderboard(lab, "verify")
    assert path.read_bytes() == before and str(lab.results).encode() not in before


@pytest.mark.parametrize("suffix", ["json", "pred.gz"])
def test_a_file_that_changes_after_it_was_verified_loses_its_badge(lab, suffix):
    leaderboard(lab, "verify")
    with open(lab.records()[0].with_suffix("." + suffix), "ab") as file:
        file.write(b" ")
    assert badges(lab) == ["unverified", "V1", "V1"]


def test_a_rejected_record_is_named_with_its_reason_and_does_not_stop_the_others(lab, capsys):
    path = lab.records()[1]
    record = json.loads(path.read_text())
    record["result"]["n_correct"] += 1
    path.write_text(json.dumps(record))
    assert leaderboard(lab, "verify") == 1
    assert "seed1.json: rejected: result.n_correct is" in capsys.readouterr().out
    assert badges(lab) == ["V1", "rejected", "V1"]


def test_a_rejection_by_the_probe_stays_until_the_probe_is_passed(lab):
    path = lab.records()[0]
    whole = path.read_bytes()
    record = json.loads(whole)
    record["result"]["probe"]["losses"][0] *= 2
    path.write_text(json.dumps(record))
    assert leaderboard(lab, "verify", "--level=2") == 1
    assert leaderboard(lab, "verify") == 0
    assert badges(lab) == ["rejected", "V2", "V2"]
    path.write_bytes(whole)
    assert leaderboard(lab, "verify", "--level=2") == 0
    assert badges(lab) == ["V2"] * 3


def test_weights_reach_v3_and_without_them_the_reason_is_said(lab, tmp_path, capsys):
    assert leaderboard(lab, "verify", "--level=3") == 0
    assert badges(lab) == ["V3"] * 3
    lab.runs = tmp_path / "no-runs"
    assert leaderboard(lab, "verify", "--level=3") == 1
    assert "seed0.json: not V3: V3: no weights of" in capsys.readouterr().out


def test_data_that_are_not_prepared_are_said_once(lab, tmp_path, capsys):
    lab.data = tmp_path / "none"
    assert leaderboard(lab, "verify", "--level=2") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "seed0.json and 2 more: not V2: V2: no prepared data in" in lines[0]


def test_an_empty_results_folder_is_verified_at_once(tmp_path, lab, capsys):
    lab.results = tmp_path / "none"
    assert verified(lab.results) == {}
    lab.results.mkdir()
    assert leaderboard(lab, "verify") == 0
    assert "0 records" in capsys.readouterr().out


def test_records_that_cannot_be_read_are_named_and_the_others_verified(lab, capsys):
    first, second, _ = lab.records()
    first.write_text(first.read_text()[:300])
    second.write_text(second.read_text().replace("lra-record/1", "lra-record/9"))
    assert leaderboard(lab, "verify") == 1
    said = capsys.readouterr().out
    assert "seed0.json is not a JSON record" in said and "found 'lra-record/9'" in said
    assert badges(lab)[:2] == ["rejected", "rejected"]


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 1, "records": {}}', '{"schema": "lra-verification/1"}'])
def test_damaged_badges_are_one_line(lab, error_line, text):
    (lab.results / "verification.json").write_text(text)
    assert "verification.json is damaged" in error_line("leaderboard", "verify", *lab.places)


def test_a_file_that_is_nowhere_is_named(lab, capsys):
    assert leaderboard(lab, "verify", "absent.json") == 1
    assert "rejected: no record at" in capsys.readouterr().out


# Submissions


def test_submitted_records_go_where_they_belong_with_a_badge(lab, inbox, tmp_path, capsys):
    before = [p.read_bytes() for p in lab.records()]
    lab.results = tmp_path / "board"
    assert leaderboard(lab, "submit", *sorted(inbox.glob("*.json"))) == 0
    assert [p.read_bytes() for p in lab.records()] == before and badges(lab) == ["V1"] * 3
    assert len(list((lab.results / "labels").iterdir())) == 1
    assert capsys.readouterr().out.count("added ") == 3


def test_nothing_is_added_where_one_file_is_refused(lab, inbox, tmp_path, error_line):
    lab.results = tmp_path / "board"
    record = json.loads((inbox / "seed2.json").read_text())
    record["training"]["recipe"]["lr"] = 1.0
    (inbox / "seed2.json").write_text(json.dumps(record))
    line = error_line("leaderboard", "submit", *sorted(inbox.glob("*.json")), *lab.places)
    assert "seed2.json is refused: training.recipe is" in line
    assert not lab.records()


def test_a_submission_that_leaves_out_a_seed_is_refused(lab, inbox, tmp_path, error_line):
    lab.results = tmp_path / "board"
    files = (inbox / "seed0.json", inbox / "seed2.json")
    assert "missing 1" in error_line("leaderboard", "submit", *files, *lab.places)


def test_a_run_that_is_there_is_never_overwritten(lab, inbox, error_line):
    before = lab.records()[0].read_bytes()
    assert "is there already" in error_line("leaderboard", "submit", inbox / "seed0.json", *lab.places)
    text = (inbox / "seed0.json").read_text().replace('"numpy": "', '"numpy": "9')
    (inbox / "seed0.json").write_text(text)
    assert "--by NAME adds it" in error_line("leaderboard", "submit", inbox / "seed0.json", *lab.places)
    assert lab.records()[0].read_bytes() == before


@pytest.mark.parametrize("name", ["../up", "a/b", "", "<b>", "x" * 41, "ünï"])
def test_a_name_that_is_no_plain_word_is_refused(lab, inbox, error_line, name, tmp_path):
    if name:
        words = ("leaderboard", "submit", inbox / "seed0.json", f"--by={name}", *lab.places)
        assert "--by takes letters" in error_line(*words)
    assert not (lab.results / "counter").exists()


# V4


def counter(lab, inbox, by="anna"):
    """Submit all three seeds as somebody's counter-records."""
    return leaderboard(lab, "submit", *sorted(inbox.glob("*.json")), f"--by={by}")


def tables(lab):
    """What `table` writes."""
    assert main(["table", "--results", str(lab.results), "--write", str(lab.results / "t.csv")]) == 0
    return (lab.results / "t.csv").read_text()


def with_correct(lab, path, n):
    """Rewrite a submitted record so that it is consistent with n right answers."""
    import gzip
    import hashlib

    record = read_record(path)
    sha256 = record["data"]["splits"]["test"]["labels_sha256"]
    labels = np.frombuffer(gzip.decompress(labels_path(lab.results, sha256).read_bytes()), np.uint8)
    predictions = labels ^ (np.arange(len(labels)) >= n)
    predictions = predictions.astype(np.uint8).tobytes()
    record["result"] |= {"n_correct": n, "predictions_sha256": hashlib.sha256(predictions).hexdigest()}
    path.write_text(json.dumps(record))
    predictions_path(path).write_bytes(gzip.compress(predictions))


def test_three_equal_runs_of_somebody_else_make_v4_and_are_shown(lab, inbox, capsys):
    leaderboard(lab, "verify")
    assert counter(lab, inbox) == 0
    assert badges(lab) == ["V1"] * 3 + ["V4"] * 3  # the counter-records come first
    assert leaderboard(lab, "verify", "--level=4") == 0
    assert "\n3 records: 3 reached V4, 0 did not\n" in capsys.readouterr().out, "counter-records are asked for V1"
    assert "tiny, performer: reproduced by anna (3 seeds): +0.0 points" in tables(lab)


def test_runs_that_disagree_dispute_the_cell_and_lower_no_level(lab, inbox):
    leaderboard(lab, "verify")
    for path in inbox.glob("*.json"):
        with_correct(lab, path, 1)
    assert counter(lab, inbox) == 0
    assert badges(lab)[3:] == ["V1 disputed"] * 3
    assert "disputed by anna" in tables(lab)


def test_of_several_people_the_least_favourable_counts(lab, inbox):
    leaderboard(lab, "verify")
    assert counter(lab, inbox, "anna") == 0
    for path in inbox.glob("*.json"):
        with_correct(lab, path, 1)
    assert counter(lab, inbox, "bob") == 0
    assert badges(lab)[-3:] == ["V1 disputed"] * 3


def test_two_runs_or_unverified_ones_say_nothing(lab, inbox, capsys):
    leaderboard(lab, "verify")
    (inbox / "seed2.json").unlink()
    assert counter(lab, inbox) == 0
    assert badges(lab)[2:] == ["V1"] * 3
    assert leaderboard(lab, "verify", *lab.records(), "--level=4") == 1
    assert "not V4: no 3 verified counter-records" in capsys.readouterr().out
