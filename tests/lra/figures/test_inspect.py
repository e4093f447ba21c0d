"""inspect and cards: what is shown is what is in the prepared arrays, and tasks/DATA.md says what was found."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lra.__main__ import main
from lra.figures import inspect
from lra.records.markup import refresh_block
from lra.registry import load_task, task_names
from tasks import listops
from tasks.base import SPLITS, Meta, Split
from tasks.store.prepared import load
from tests.conftest import ROOT

FACTS = inspect.read_facts(ROOT / "results" / "reference" / "data")
DATA = ROOT / "tasks" / "DATA.md"


def module(reads, towers=1, **more):
    """A task of which only the facts count."""
    meta = Meta(name="any", version=1, classes=2, vocab=257, towers=towers, description="", reads=reads)
    return SimpleNamespace(META=meta, **more)


def test_inspect_prints_and_writes_what_the_arrays_hold(lab, tmp_path, capsys):
    words = ["inspect", "tiny", "--preset=smoke", f"--data={lab.data}", f"--out={tmp_path}"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    prepared = load(lab.data / "tiny" / "smoke")
    facts = json.loads((tmp_path / "tiny-smoke.json").read_text())
    for name in SPLITS:
        split, found = prepared.splits[name], facts["splits"][name]
        lengths = np.diff(split.offsets)
        assert found["n"] == len(split.labels) == sum(found["labels"])
        assert found["tokens"]["longest"] == lengths.max() and found["tokens"]["shortest"] == lengths.min()
        assert re.search(rf"{name} +{found['n']}  {lengths.min()} / ", shown)
    assert facts["floors"] == prepared.manifest["floors"]
    assert " ".join(map(str, prepared.splits["train"].sequence(0))) in shown
    assert str(lab.data) not in json.dumps(facts), "facts name no machine"
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.keys() == {"tiny-smoke.json", "tiny-smoke-lengths.svg", "tiny-smoke-lengths.png"}
    assert main(words) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files, "the same bytes twice"


def test_examples_are_spelled_as_they_are_read():
    split = Split.of([np.frombuffer(b"a\xc3\xa9\n\x1b[2J\xff", np.uint8) + np.uint16(1)], np.array([1]))
    (line,) = inspect.examples(module("bytes"), split)
    assert line == "0: label 1, 9 tokens: aé\\n\\x1b[2J\\xff"  # nothing that a terminal obeys
    pair = Split.of([np.array([98, 99]), np.array([100])], np.array([0]))
    assert [line.split(": ", 2)[2] for line in inspect.examples(module("bytes", 2), pair)] == ["ab", "c"]
    tokens = np.random.default_rng(0).integers(1, listops.META.vocab, 900)
    (line,) = inspect.examples(listops, Split.of([tokens], np.array([3])))
    text = listops.decode(tokens)
    assert line.endswith(f"{text[:400]} ... ({len(text) - 400:,} characters more)")


def test_contact_sheet_shows_the_pixels_and_their_labels(tmp_path):
    images, labels = np.random.default_rng(4).integers(0, 128, (13, 32, 32), np.uint8), np.arange(13) % 2
    images[0, 0, 0] = 255
    split = Split.of(list(images.reshape(13, -1).astype(np.uint16) + 1), labels)
    assert np.array_equal(inspect.pictures(split, 13), images)
    with Image.open(inspect.contact_sheet(split, tmp_path / "sheet.png")) as sheet:
        pixels = np.asarray(sheet)
    scale, side, gap = 3, 96, 8
    for i in range(13):
        y, x = gap + i // 10 * (side + 16 + gap), gap + i % 10 * (side + gap)
        assert np.array_equal(pixels[y : y + side : scale, x : x + side : scale], images[i])
        assert (pixels[y + side : y + side + 16, x : x + side] < 128).any(), "a label below"
    art = inspect.examples(module("pixels"), split)
    assert len(art) == 17 and art[0].split("  ")[0].strip() == f"0: label {labels[0]}"
    assert all(len(line) == 5 * 16 + 4 * 2 for line in art)


def test_few_levels_are_spread_over_the_greys():
    split = Split.of([np.array([1, 2, 3, 4])], np.array([0]))
    assert inspect.pictures(split, 1).ravel().tolist() == [0, 85, 170, 255]


def test_inspect_refuses_what_is_not_there(tmp_path, error_line, lab):
    assert "python -m lra prepare image --preset small" in error_line("inspect", "image", f"--data={tmp_path}")
    assert "did you mean 'small'" in error_line("inspect", "image", "--preset=smal")
    assert "did you mean 'image'" in error_line("inspect", "imag")


def test_cards_refuse_files_that_hold_no_facts(tmp_path, error_line):
    line = error_line("cards", f"--results={tmp_path}")
    assert "no facts in" in line and "python -m lra inspect TASK" in line
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.json").write_text('{"schema": "other"}')
    assert "x.json holds no facts of `inspect`" in error_line("cards", f"--results={tmp_path}")
    shutil.copy(ROOT / "results" / "reference" / "data" / "image-small.json", tmp_path / "data" / "x.json")
    (tmp_path / "cards.md").write_text("no markers\n")
    line = error_line("cards", f"--results={tmp_path}", f"--write={tmp_path / 'cards.md'}")
    assert "image:begin" in line and (tmp_path / "cards.md").read_text() == "no markers\n"


def test_every_task_has_a_card_with_the_numbers_of_what_was_inspected():
    text = DATA.read_text()
    assert set(FACTS) == {name for name in task_names() if name != "tiny"}
    for task, presets in FACTS.items():
        assert {"small", "paper"} <= set(presets), task
        made = inspect.card(list(presets.values()), ROOT / "results" / "reference" / "data")
        assert refresh_block(text, task, made) == text, (
            "run: python -m lra cards --results results/reference --write tasks/DATA.md"
        )
    for target in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (DATA.parent / target).is_file(), target


@pytest.mark.parametrize("task", sorted(FACTS))
def test_inspected_data_are_those_of_the_present_recipes(task):
    made = load_task(task)
    for preset, facts in FACTS[task].items():
        data = made.RECIPES[preset].data
        again = f"python -m lra inspect {task} --preset {preset} --out results/reference/data"
        assert facts["version"] == made.META.version, again
        wanted = {"seq_len": data.seq_len, "seed": data.seed, "options": dict(data.options)}
        assert facts["recipe"] == wanted, again
        for name in SPLITS:
            asked = getattr(data, name)
            removed = facts["duplicates_removed"].get(name, 0)
            assert asked in (0, facts["splits"][name]["n"] + removed), again


@pytest.mark.parametrize("task", ["image", "listops"])
def test_inspecting_again_finds_the_same(task, tmp_path):
    where = [f"--data={tmp_path / 'data'}", "--preset=small"]
    assert main(["prepare", task, *where, "--workers=1"]) == 0
    assert main(["inspect", task, "--preset=small", f"--data={tmp_path / 'data'}", f"--out={tmp_path}"]) == 0
    made = sorted(path for path in tmp_path.iterdir() if path.is_file())
    assert len(made) == (4 if task == "image" else 3)
    for path in made:
        assert path.read_bytes() == (ROOT / "results" / "reference" / "data" / path.name).read_bytes(), path.name
