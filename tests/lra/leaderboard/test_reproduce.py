"""`reproduce`: a run rebuilt from its record, compared, and kept as a counter-record."""

import json
import shutil

import pytest

from lra.__main__ import main
from tests.conftest import Lab, plug_in


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_data):
    """The results of one run of softmax. Not to be changed."""
    folder = tmp_path_factory.mktemp("reproduced")
    made = Lab(tiny_data, folder / "results", folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        plug_in(patch)
        made.train()
    return made.results


@pytest.fixture
def run(lab, trained):
    """A laboratory with this run, to be changed."""
    shutil.copytree(trained, lab.results)
    return lab


def reproduce(lab, *words):
    """Run `reproduce` on the only record; returns its exit code."""
    return main(["reproduce", str(lab.records()[0]), *words, *lab.places])


def counters(lab):
    """All counter-records."""
    return sorted(lab.results.glob("counter/*/records/*/*/*/seed*.json"))


def test_a_smoke_run_is_bitwise_equal_and_its_rerun_no_counter_record(lab, capsys):
    lab.train(attention="performer", seed=1)
    before = lab.records()[0].read_bytes()
    assert reproduce(lab) == 0
    out = capsys.readouterr().out
    assert "threads 1, against the record: bitwise equal" in out
    assert "no counter-record: nothing tells an equal run from a copy" in out and not counters(lab)
    assert lab.records()[0].read_bytes() == before


def test_overrides_and_the_validation_rule_are_those_of_the_record(lab, capsys):
    lab.train("--set", "train.lr=3e-3", "--set", "attention.num_features=7", "--val-rule=legacy", attention="performer")
    assert reproduce(lab) == 0
    assert "bitwise equal" in capsys.readouterr().out


def test_two_thread_counts_are_compared_with_the_record_and_each_other(run, capsys):
    assert reproduce(run, "--threads=1,2") == 0
    lines = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("threads")]
    assert lines == ["threads 1, against the record", "threads 2, against the record", "threads 2 against 1"]


def test_data_that_are_not_there_are_prepared(run, tmp_path, capsys):
    run.data = tmp_path / "fresh"
    assert reproduce(run) == 0
    assert "bitwise equal" in capsys.readouterr().out and (run.data / "tiny" / "smoke").is_dir()


def test_a_curve_that_differs_by_rounding_is_within_tolerance_and_no_counter_record_is_overwritten(
    run, capsys, error_line
):
    edited(run, lambda r: r["result"]["curve"][2].__setitem__(2, r["result"]["curve"][2][2] * (1 + 1e-7)))
    assert reproduce(run) == 0
    out = capsys.readouterr().out
    assert "within tolerance: the curve parts at step 8; 0 of 23 predictions differ" in out
    words = ("reproduce", run.records()[0], *run.places)
    assert "is there already: give another --by" in error_line(*words)
    assert reproduce(run, "--by=second") == 0 and len(counters(run)) == 2


def edited(lab, edit):
    """Change the only record by `edit(record)`."""
    (path,) = lab.records()
    record = json.loads(path.read_text())
    edit(record)
    path.write_text(json.dumps(record))


def test_a_record_that_claims_more_is_found_out(run, capsys):
    edited(run, lambda r: r["result"].update(n_correct=23))
    assert reproduce(run) == 1
    out = capsys.readouterr().out
    assert "against the record: different: 0 of 23 predictions differ; 23 correct became" in out
    assert "McNemar p" in out


def test_a_probe_that_differs_is_different(run, capsys):
    edited(run, lambda r: r["result"]["probe"]["losses"].__setitem__(5, 9.9))
    assert reproduce(run) == 1
    assert "different: probe loss 5 is" in capsys.readouterr().out


def test_a_run_that_failed_fails_again(lab, capsys):
    lab.train("--set", "train.lr=1e30")
    assert reproduce(lab) == 0
    assert "bitwise equal: failed: loss is not finite at step" in capsys.readouterr().out


def test_threads_and_names_that_make_no_sense_are_one_line(run, error_line):
    for words, named in ((["--threads=0"], "--threads"), (["--threads=1,1"], "--threads"), (["--by=a/b"], "--by")):
        assert named in error_line("reproduce", run.records()[0], *words, *run.places)
    assert not counters(run)
