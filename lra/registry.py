"""Names to code: one file in models/attention/ or tasks/ is one attention or one task, found by its name."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from types import ModuleType
from typing import Any

import models.attention
import tasks
from lra.options import UsageError, construct, unknown
from tasks.store.files import one_line

NOT_TASKS = frozenset({"base", "store"})
TRAITS = ("exact", "random", "causal", "recurrent", "linear_memory", "fixed_length", "reads_qk")


def attention_names() -> list[str]:
    """Attentions in models/attention/, without importing them."""
    return _names(models.attention)


def task_names() -> list[str]:
    """Tasks in tasks/, without importing them."""
    return _names(tasks, NOT_TASKS)


def _names(package: ModuleType, skip: frozenset[str] = frozenset()) -> list[str]:
    files = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in files if not n.startswith("_") and n not in skip)


def attention_class(name: str) -> type:
    """The class of an attention in the folder, or of `package.module:Class` outside it.

    Raises UsageError, one line, for an unknown name and for code that cannot be imported or is no attention.
    """
    module, outside, class_name = name.partition(":")
    if not outside:
        if name not in attention_names():
            raise unknown("attention", name, attention_names())
        module, class_name = f"models.attention.{name}", "Attention"
    plug_in = f"attention {name!r}"
    cls = getattr(_imported(module, plug_in), class_name, None)
    from models.base import AttentionBase  # torch is not needed to list names

    if not (isinstance(cls, type) and issubclass(cls, AttentionBase) and hasattr(cls, "Config")):
        expected = f"class {class_name or 'NAME'}(AttentionBase) with a Config"
        raise UsageError(f"{plug_in}: {module} has no {expected}: docs/attention.md has an example")
    return cls


def attention_module(name: str) -> ModuleType:
    """The module that defines an attention: Config, Attention and naive_<name> where it is in the folder."""
    return importlib.import_module(attention_class(name).__module__)


def load_task(name: str) -> ModuleType:
    """The task's module. Raises UsageError, one line, for an unknown name and for code that is no task."""
    if name not in task_names():
        raise unknown("task", name, task_names())
    task = _imported(f"tasks.{name}", f"task {name!r}", ("META", "RECIPES"))
    if task.META.name != name:
        raise UsageError(f"task {name!r}: its META.name is {task.META.name!r}; make it the name of the file")
    return task


def _imported(module: str, plug_in: str, parts: tuple[str, ...] = ()) -> ModuleType:
    try:
        code = importlib.import_module(module)
    except Exception as error:  # a plug-in's own code may raise anything
        if isinstance(error, ModuleNotFoundError) and module.partition(".")[0] == error.name:
            hint = "; run from the folder that holds it, or add that folder to PYTHONPATH"
        else:
            hint = ""
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise UsageError(f"{plug_in} cannot be imported: {kind}{one_line(error)}{hint}") from error
    if missing := [part for part in parts if not hasattr(code, part)]:
        raise UsageError(f"{plug_in} cannot be imported: {module} has no {', '.join(missing)}")
    return code


def build_attention(
    name: str, *, heads: int, head_dim: int, max_len: int, seed: int = 0, layer: int = 0, **config: Any
) -> Any:
    """An attention module with the contract's forward; `config` are the fields of its Config."""
    cls = attention_class(name)
    options = construct(cls.Config, config, where="attention")
    return cls(options, heads=heads, head_dim=head_dim, max_len=max_len, seed=seed, layer=layer)


def choose(kind: str, text: str, known: list[str]) -> list[str]:
    """Names from "all" or a comma-separated list; outside attentions are checked when they are resolved."""
    names = known if text == "all" else [n for n in dict.fromkeys(text.split(",")) if n]
    for name in names:
        if name not in known and ":" not in name:
            raise unknown(kind, name, known)
    if not names:
        raise UsageError(f"no {kind} named in {text!r}")
    return names


def budget_options(name: str, size: int) -> dict[str, int]:
    """The option that holds an attention's approximation size (features, landmarks, ...), set to `size`; nothing
    where it has none."""
    fields = dataclasses.fields(attention_class(name).Config)
    return {f.name: size for f in fields if f.metadata.get("budget")}
