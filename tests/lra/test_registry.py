"""Names to code: files found by name, outside code by package.module:Class, and what one new file brings."""

import shutil
import sys

import pytest

import models.attention
import tasks
from lra.__main__ import main
from lra.options import UsageError
from lra.registry import attention_class, attention_names, build_attention, load_task, task_names
from tests.conftest import PLUGINS

SHAPE = dict(heads=2, head_dim=3, max_len=5)


def test_lists_the_tasks_and_the_attentions_without_helpers():
    assert {"listops", "text", "retrieval", "image", "pathfinder", "recall"} == set(task_names())
    assert {"softmax", "performer", "darkformer", "linformer", "constant"} <= set(attention_names())
    for names in (task_names(), attention_names()):
        assert names == sorted(names)
        assert not any(n.startswith("_") or n in ("base", "prepared") for n in names)


@pytest.mark.parametrize("wrong, right", [("performr", "performer"), ("soft_max", "softmax"), ("dark", "darkformer")])
def test_unknown_attention_names_the_nearest_and_the_list(wrong, right):
    with pytest.raises(UsageError, match=f"unknown attention '{wrong}': did you mean '{right}'.*linformer"):
        attention_class(wrong)


@pytest.mark.parametrize("wrong, right", [("list_ops", "listops"), ("pathfindr", "pathfinder")])
def test_unknown_task_names_the_nearest_and_the_list(wrong, right):
    with pytest.raises(UsageError, match=f"unknown task '{wrong}': did you mean '{right}'.*text"):
        load_task(wrong)


@pytest.mark.parametrize("name", ["base", "prepared", "_sources", "../tasks", "", "os"])
def test_only_tasks_are_loaded_as_tasks(name):
    with pytest.raises(UsageError, match="unknown task"):
        load_task(name)


def test_unknown_or_mistyped_option_is_refused():
    with pytest.raises(UsageError, match="did you mean 'num_features'"):
        build_attention("performer", num_feature=3, **SHAPE)
    with pytest.raises(UsageError, match="attention.num_features must be int"):
        build_attention("performer", num_features="x", **SHAPE)


# Outside code


def test_outside_class_is_imported_by_its_path():
    built = build_attention("tests.plugins.attention.shift:Attention", by="2", **SHAPE)
    assert built.config.by == 2 and built.heads == 2


@pytest.mark.parametrize(
    "name, words",
    [
        ("no_such_package.module:Class", "no_such_package"),
        ("models.attention.softmax:Nothing", "Nothing"),
        ("pathlib:Path", "AttentionBase"),
        (":Class", "cannot be imported"),
        ("models.attention.softmax:", "has no class"),
        (".softmax:Attention", "cannot be imported"),
        ("a b:C", "cannot be imported"),
    ],
)
def test_outside_name_that_leads_nowhere_is_one_line(name, words):
    with pytest.raises(UsageError) as caught:
        attention_class(name)
    assert name in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_outside_attention_trains_and_its_record_is_found_by_name(lab):
    name = "tests.plugins.attention.shift:Attention"
    record = lab.train(attention=name)
    assert record["model"]["attention"] == name and record["model"]["attention_config"] == {"by": 1}
    assert "tests.plugins.attention.shift-Attention" in lab.records()[0].as_posix()
    assert main(["evaluate", str(lab.records()[0]), "--device=cpu", "--trust", *lab.places]) == 0


@pytest.mark.parametrize("name", ["mypackage.attention:Class", "mypackage:Class"])
def test_outside_module_that_is_not_found_names_the_path_to_set(name):
    with pytest.raises(UsageError, match="No module named 'mypackage'; .*PYTHONPATH"):
        attention_class(name)


# Broken files


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """`broken(package, name, text)`: add a file to models.attention or tasks."""

    def add(package, name, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / name)])
        sys.modules.pop(f"{package.__name__}.{name}", None)

    return add


@pytest.mark.parametrize(
    "text, said",
    [
        ("def f(:", "SyntaxError"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("x = 1", "models.attention.broken_one has no class Attention(AttentionBase) with a Config: docs"),
        ("class Attention: pass", "models.attention.broken_one has no class Attention(AttentionBase)"),
    ],
)
def test_broken_attention_is_one_line_and_others_are_listed(text, said, broken, error_line, lab, capsys):
    broken(models.attention, "broken_one", text)
    assert main(["list", "attentions"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == attention_names() and said in lines["broken_one"]
    assert sum("broken: " in line for line in lines.values()) == 1
    assert said in error_line(*lab.words(attention="broken_one"))


@pytest.mark.parametrize(
    "text, said",
    [
        ("def f(:", "SyntaxError"),
        ("META = 1", "has no RECIPES"),
        ((PLUGINS / "tasks" / "tiny.py").read_text(), "META.name is 'tiny'"),
    ],
)
def test_broken_task_is_one_line_and_others_are_listed(text, said, broken, error_line, capsys, tmp_path):
    broken(tasks, "broken_two", text)
    assert main(["list", "tasks"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert list(lines) == task_names() and said in lines["broken_two"]
    assert said in error_line("prepare", "broken_two", f"--data={tmp_path}")


# One file, zero edits


def test_adding_an_attention_is_one_file(lab, tmp_path, monkeypatch, capsys):
    """Listed, configured, trained, evaluated and in the table: nothing but the file was added."""
    (tmp_path / "plugin").mkdir()
    shutil.copy(PLUGINS / "attention" / "shift.py", tmp_path / "plugin" / "brand_new.py")
    monkeypatch.setattr(models.attention, "__path__", [*models.attention.__path__, str(tmp_path / "plugin")])
    assert "brand_new" in attention_names()
    capsys.readouterr()
    assert main(["list", "attentions"]) == 0
    assert "brand_new" in capsys.readouterr().out.split()
    record = lab.train("--set", "attention.by=2", attention="brand_new")
    assert record["model"]["attention_config"] == {"by": 2}
    assert main(["evaluate", str(lab.records()[0]), "--device=cpu", *lab.places]) == 0
    capsys.readouterr()
    assert main(["table", "--format=long", "--results", str(lab.results)]) == 0
    assert "brand\\_new" in capsys.readouterr().out.replace("brand_new", "brand\\_new")


def test_adding_a_task_is_one_file(lab, tmp_path, monkeypatch, capsys):
    text = (PLUGINS / "tasks" / "tiny.py").read_text().replace('name="tiny"', 'name="brand_new"')
    (tmp_path / "plugin").mkdir()
    (tmp_path / "plugin" / "brand_new.py").write_text(text)
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "plugin")])
    lab.task, lab.data = "brand_new", tmp_path / "data"
    assert main(["prepare", "brand_new", "--preset", "smoke", "--data", str(lab.data), "--workers", "1"]) == 0
    assert lab.train()["task"]["name"] == "brand_new"
    capsys.readouterr()
    assert main(["table", "--results", str(lab.results)]) == 0
    assert "brand" in capsys.readouterr().out
