"""What README and docs say is true: examples run, numbers are those of the reference, links lead somewhere."""

import re
import sys
from pathlib import Path

import pytest
import torch

import models.attention
import tasks
from lra.__main__ import main
from tests.models import contract

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "tasks" / "DATA.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(text):
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def section(title):
    """A section of README, without its heading."""
    return README.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_readme_is_a_door():
    lines = README.splitlines()
    assert len(lines) <= 180
    assert [line for line in lines if line.startswith("|") and len(line) > 110] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in t]
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_every_number_of_the_headlines_stands_in_the_reference_tables():
    said = section("What the results say").split("<!-- results:begin -->")[0]
    tables = "".join(p.read_text() for p in sorted((ROOT / "results" / "reference").rglob("*.md")))
    numbers = set(re.findall(r"\d+\.\d+", re.sub(r"arXiv \d+\.\d+", "", said)))
    assert numbers and [n for n in sorted(numbers) if n not in tables] == []


def test_an_attention_serves_on_own_tensors_as_readme_says():
    scope = {}
    exec(examples(section("Use an attention in your own code"))[0], scope)  # noqa: S102
    assert scope["out_BHND"].shape == (2, 4, 1024, 32) and scope["out_BHND"].isfinite().all()


def test_a_gemma_takes_an_attention_as_readme_says(tmp_path):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8, "vocab_size": 4099}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16, "max_position_embeddings": 64}
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    Gemma3ForCausalLM(Gemma3TextConfig(**shape, **heads, **layers)).save_pretrained(tmp_path / "gemma")
    code = examples(section("In a Hugging Face Gemma"))[0]
    scope = {"torch": torch}
    exec(code.replace("data/gemma/gemma-3-270m", str(tmp_path / "gemma")), scope)  # noqa: S102
    assert scope["out"].shape == (1, 3, 4099) and scope["out"].isfinite().all()
    scope["detach"](scope["model"])


def written(monkeypatch, package, folder, name, text):
    """A file of a plug-in, as if it stood in the package's own folder."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)


def test_the_example_of_an_attention_keeps_the_contract(monkeypatch, tmp_path):
    (code,) = examples((ROOT / "docs" / "attention.md").read_text())
    written(monkeypatch, models.attention, tmp_path / "attention", "square", code)
    assert contract.main(["square"]) == 0


def test_the_example_of_a_task_trains(monkeypatch, tmp_path, capsys):
    (code,) = examples((ROOT / "docs" / "task.md").read_text())
    written(monkeypatch, tasks, tmp_path / "tasks", "parity", code)
    places = ["--data", str(tmp_path / "data"), "--preset", "smoke"]
    assert main(["prepare", "parity", *places]) == 0
    runs = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert main(["train", "parity", "--attention", "softmax", *places, *runs]) == 0
    assert len(list((tmp_path / "results").rglob("seed0.json"))) == 1
