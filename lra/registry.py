"""Names to code: one file in models/attention/ or tasks/ is one attention or one task, found by its name; `list`."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import re
from argparse import Namespace
from types import ModuleType
from typing import Any

import models.attention
import tasks
from lra.options import PRESETS, UsageError, construct, unknown
from tasks.store.files import one_line

TRAITS = ("exact", "random", "causal", "recurrent", "linear_memory", "fixed_length", "reads_qk")


def attention_names() -> list[str]:
    """Attentions in models/attention/, without importing them."""
    return _names(models.attention)


def task_names() -> list[str]:
    """Tasks in tasks/, without importing them."""
    return [name for name in _names(tasks) if name not in ("base", "store")]


def _names(package: ModuleType) -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def attention_class(name: str) -> type:
    """The class of an attention in the folder, or of `package.module:Class` outside it. Raises UsageError, one line,
    for an unknown name and for code that cannot be imported or is no attention."""
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
        absent = isinstance(error, ModuleNotFoundError) and module.partition(".")[0] == error.name
        hint = "; run from the folder that holds it, or add that folder to PYTHONPATH" if absent else ""
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
    """The option that holds an attention's approximation size (features, landmarks, ...), set to `size`, if any."""
    fields = dataclasses.fields(attention_class(name).Config)
    return {f.name: size for f in fields if f.metadata.get("budget")}


def show(args: Namespace) -> None:
    """`list`: each name with a line about it; a plug-in that cannot be imported has its error there."""
    kinds = {
        "attentions": (attention_names, attention_line),
        "tasks": (task_names, lambda name: load_task(name).META.description),
        "presets": (lambda: list(PRESETS), PRESETS.get),
    }
    chosen = [args.what] if args.what else list(kinds)
    if args.json:
        names = {kind: kinds[kind][0]() for kind in chosen}
        print(json.dumps(names[args.what] if args.what else names))
        return
    for kind in chosen:
        names, line = kinds[kind]
        if not args.what:
            print(f"{kind}:")
        for name in names():
            try:
                about = line(name)
            except UsageError as error:
                about = f"broken: {error}"
            print(f"{'' if args.what else '  '}{name:<12} {about}".rstrip())


def attention_line(name: str) -> str:
    """An attention in the first line of its docstring, its paper, and the traits it claims."""
    cls, text = attention_class(name), attention_module(name).__doc__ or ""
    papers = re.findall(r"arXiv \d{4}\.\d{4,5}", f"{cls.__doc__} {text}")
    traits = [trait for trait in TRAITS if trait != "reads_qk" and getattr(cls, trait)]
    about = [*text.strip().splitlines(), ""][0].rstrip(".")
    return f"{about} [{'; '.join([*papers[:1], ', '.join(traits)])}]"
