"""`leaderboard submit` and `verify`, the badges they leave, and what other people's runs say of a cell."""

import gzip
import hashlib
import json
import shutil

import numpy as np
import pytest

from lra.__main__ import main
from lra.leaderboard.consistency import Places
from lra.leaderboard.levels import judge, reproductions
from lra.records.record import labels_path, predictions_path, read_record
from lra.records.table import render
from tests.lra.leaderboard.conftest import same_files


@pytest.fixture
def lab(owner):
    """The owner's laboratory: seeds 0 to 2 of one cell."""
    return owner


@pytest.fixture
def inbox(trained, tmp_path):
    """Records that came from elsewhere: a guest's seeds 3 to 5 and their predictions in one flat folder."""
    folder = tmp_path / "inbox"
    folder.mkdir()
    for path in trained[1].records():
        shutil.copy(path, folder)
        shutil.copy(predictions_path(path), folder)
    return folder


def leaderboard(lab, action, *words):
    """Run `leaderboard ACTION`; returns its exit code."""
    return main(["leaderboard", action, *map(str, words), *lab.places])


def badges(lab):
    """The badge of every record, in order of path."""
    found = judge(Places(lab.results, lab.data, lab.runs))
    return [verdict.badge for _, verdict in sorted(found.items())]


def shown(lab):
    """The same, and the wide table beside them."""
    found = judge(Places(lab.results, lab.data))
    table = render(lab.results, "long", reproduced=reproductions(found))
    return [verdict.badge for _, verdict in sorted(found.items())], table


# Levels


def test_verifying_says_how_many_reached_a_level_and_writes_nothing(lab, capsys):
    before = same_files(lab.results)
    assert leaderboard(lab, "verify") == 0
    assert "3 records: 3 reached V1, 0 did not" in capsys.readouterr().out
    assert leaderboard(lab, "verify", lab.records()[1], "--level=3") == 0
    assert "1 records: 1 reached V3, 0 did not" in capsys.readouterr().out
    assert same_files(lab.results) == before


def test_a_rejected_record_is_named_with_its_reason_and_does_not_stop_the_others(lab, capsys):
    path = lab.records()[1]
    record = json.loads(path.read_text())
    record["result"]["n_correct"] += 1
    path.write_text(json.dumps(record))
    assert leaderboard(lab, "verify") == 1
    assert "seed1.json: rejected: result.n_correct is" in capsys.readouterr().out
    assert badges(lab) == ["V1", "rejected", "V1"]


def test_without_weights_the_reason_is_said(lab, tmp_path, capsys):
    lab.runs = tmp_path / "no-runs"
    assert leaderboard(lab, "verify", lab.records()[0], "--level=3") == 1
    assert "; V3: no weights of" in capsys.readouterr().out


def test_data_that_are_not_prepared_are_said_once(lab, tmp_path, capsys):
    lab.data = tmp_path / "none"
    assert leaderboard(lab, "verify", "--level=2") == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "seed0.json and 2 more: not V2: V2: no prepared data in" in lines[0]


def test_an_empty_results_folder_is_verified_at_once(tmp_path, lab, capsys):
    lab.results = tmp_path / "none"
    assert badges(lab) == []
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


def test_a_file_that_is_nowhere_is_named(lab, capsys):
    assert leaderboard(lab, "verify", "absent.json") == 1
    assert "rejected: no record at" in capsys.readouterr().out


# Submissions


def counter(lab, inbox, by="anna"):
    """Submit all of somebody's records."""
    return leaderboard(lab, "submit", *sorted(inbox.glob("*.json")), f"--by={by}")


def test_submitted_records_live_in_a_tree_of_their_author(lab, inbox, tmp_path, capsys):
    before = [p.read_bytes() for p in lab.records()]
    assert counter(lab, inbox) == 0
    assert capsys.readouterr().out.count("added ") == 3
    assert [p.read_bytes() for p in lab.records()] == before
    assert len(list(lab.results.glob("counter/anna/records/tiny/performer/*/seed[345].json"))) == 3


def test_nothing_is_added_where_one_file_is_refused_and_nothing_is_added_twice(lab, inbox, capsys):
    whole = (inbox / "seed5.json").read_text()
    (inbox / "seed5.json").write_text(whole.replace('"lr": 0.01', '"lr": 1.0'))
    assert counter(lab, inbox) == 2
    assert "seed5.json is refused: " in capsys.readouterr().err and not (lab.results / "counter").exists()
    (inbox / "seed5.json").write_text(whole)
    assert counter(lab, inbox) == 0
    assert counter(lab, inbox) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../up", "a/b", "", "<b>", "x" * 41, "ünï"])
def test_a_name_that_is_no_plain_word_is_refused(lab, inbox, error_line, name, tmp_path):
    if name:
        words = ("leaderboard", "submit", inbox / "seed3.json", f"--by={name}", *lab.places)
        assert "--by takes letters" in error_line(*words)
    assert not (lab.results / "counter").exists()


# V4


def different(lab, inbox, n):
    """Give the guest's records n right answers, and a curve and a start that no other run has."""
    for path in inbox.glob("*.json"):
        record = read_record(path)
        sha256 = record["data"]["splits"]["test"]["labels_sha256"]
        labels = np.frombuffer(gzip.decompress(labels_path(lab.results, sha256).read_bytes()), np.uint8)
        answers = (labels ^ (np.arange(len(labels)) >= n)).astype(np.uint8).tobytes()
        record["result"] |= {"n_correct": n, "predictions_sha256": hashlib.sha256(answers).hexdigest()}
        del record["result"]["groups"]
        for point in record["result"]["curve"]:
            point[2] += n + 1
        record["started"] = f"{record['started'][:20]}{1000 * n + record['training']['seed']:06}+00:00"
        record["ended"] = record["ended"][:19].replace(record["ended"][11:19], "23:59:59") + ".000000+00:00"
        path.write_text(json.dumps(record))
        predictions_path(path).write_bytes(gzip.compress(answers))


def test_three_equivalent_runs_of_somebody_else_make_v4_and_are_shown(lab, inbox, capsys):
    assert counter(lab, inbox) == 0
    found, table = shown(lab)
    assert found == ["V4"] * 6 and "tiny, performer: reproduced by anna (3 seeds): +0.0 points" in table
    assert leaderboard(lab, "verify", "--level=4") == 0
    assert "\n6 records: 6 reached V4, 0 did not\n" in capsys.readouterr().out


def test_runs_that_disagree_dispute_the_cell_and_lower_no_level(lab, inbox):
    different(lab, inbox, 1)
    assert counter(lab, inbox) == 0
    found, table = shown(lab)
    assert found[3:] == ["V1 disputed"] * 3 and "disputed by anna" in table


def test_of_several_people_the_least_favourable_counts(lab, inbox):
    assert counter(lab, inbox, "anna") == 0
    different(lab, inbox, 1)
    assert counter(lab, inbox, "bob") == 0
    assert badges(lab)[-3:] == ["V1 disputed"] * 3


def test_runs_of_others_say_nothing_where_they_are_two_or_below_v2(lab, inbox, tmp_path, capsys):
    assert counter(lab, inbox) == 0
    without_data = judge(Places(lab.results, tmp_path / "none"))
    assert {v.badge for v in without_data.values()} == {"V1"} and not any(v.reproduction for v in without_data.values())
    next(iter(lab.results.glob("counter/*/records/*/*/*/seed5.json"))).unlink()
    assert badges(lab) == ["V2"] * 2 + ["V1"] * 3
    assert leaderboard(lab, "verify", *lab.records(), "--level=4") == 1
    assert "not V4: no 3 verified runs of somebody else" in capsys.readouterr().out


def test_what_reached_v2_and_v4_joins_the_page_and_before_that_stands_apart(lab, inbox):
    assert counter(lab, inbox) == 0
    page = lab.results / "index.html"
    for data, joined in ((lab.results / "none", False), (lab.data, True)):
        assert main(["leaderboard", "build", f"--results={lab.results}", f"--data={data}"]) == 0
        above = page.read_text().partition('<h2 id="others">')[0]
        assert ("performer, by anna" in above) == joined
