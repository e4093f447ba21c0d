"""What a run prints: its header, lines while it trains, and what it came to."""

import io
import re
import sys

import pytest

import lra.training.commands
import lra.training.log
from lra.training.log import Display


def test_header_and_end_name_what_a_reader_wants_to_know(lab, other, capsys, monkeypatch):
    other.train()
    monkeypatch.setattr(lra.training.commands, "REFERENCE", other.results)
    capsys.readouterr()
    record = lab.train("--threads=1")
    out = capsys.readouterr().out
    (path,) = lab.records()
    result = record["result"]
    assert f"{record['model']['n_params']:,} parameters" in out and "cpu, fp32, 1 threads" in out
    assert not re.search(r"^  attention\s*$", out, re.MULTILINE)  # softmax has no options to show
    lines = out.splitlines()[-7:]
    expected = (
        rf"selected +step {record['training']['selected_step']} of 12, .*\({result['val_n_correct']}/13\); "
        r"training loss (did not fall: )?\d\.\d{3} to \d\.\d{3}$",
        r"time .* s of training, .* steps/s, peak memory \d+ MB",
        rf"record +{path}",
        rf"weights +{lab.folder('model.safetensors')}/model.safetensors",
        r"curves .*python -m lra tensorboard --runs",
        rf"next +python -m lra table --results {lab.results}",
        rf"^test [\d.]+% \({result['n_correct']}/23\), 95% interval \[[\d.]+, [\d.]+\]; floors: majority [\d.]+; "
        r"the authors' run of this seed \(results/reference, 1 seed\): "
        rf"[\d.]+% \({result['n_correct']}/23\)$",
    )
    for line, pattern in zip(lines, expected, strict=True):
        assert re.search(pattern, line), line


@pytest.mark.parametrize("interval, steps", [(0.0, [4, 8, 12]), (1e6, [4])])
def test_without_a_terminal_a_line_at_validations_but_not_too_often(lab, capsys, monkeypatch, interval, steps):
    monkeypatch.setattr(lra.training.log, "INTERVAL", interval)
    lab.train()
    form = r"tiny softmax: step (\d+) of 12, loss \d\.\d{3}, val_acc (\d\.\d{3}), best (\d\.\d{3}), [\d.]+ min left"
    matches = re.findall(form, capsys.readouterr().out)
    assert [int(step) for step, *_ in matches] == steps
    accuracies = [accuracy for _, accuracy, _ in matches]
    assert [best for *_, best in matches] == [max(accuracies[: k + 1]) for k in range(len(steps))]


def test_on_a_terminal_the_bar_shows_loss_and_accuracies_and_no_line_is_printed(capsys, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Display("a title", 0, 3, shown=True) as display:
        display.step()
        display.trained(1.25)
        display.validated(0.5, 0.75)
    assert "loss=1.250, val_acc=0.500, best=0.750" in sys.stderr.getvalue() and not capsys.readouterr().out


@pytest.mark.parametrize("seed, noted", [(0, False), (2, True)])
def test_seed_that_submit_will_not_take_is_noted_before_training(lab, capsys, at_step, seed, noted):
    notes = []
    at_step(0, lambda trainer: notes.append(capsys.readouterr().err))
    lab.train(seed=seed)
    assert [("seed 0 has no record" in note) for note in notes] == [noted]
    assert len(notes[0].splitlines()) == noted
