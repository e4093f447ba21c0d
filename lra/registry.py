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

NOT_TASKS = frozenset({"base", "store"})
TRAITS = ("exact", "random", "causal", "recurrent", "linear_memory", "fixed_length", "reads_qk")
CONTRACT = (
    "Config",
    "forward",
    *TRAITS,
    "adapts",
    "flops",
    "state_bytes",
    "before_step",
    "tie",
    "step",
    "calibrate",
    "add_alibi",
)


def attention_names() -> list[str]:
    """Attentions in models/attention/, without importing them."""
    return _names(models.attention)


def task_names() -> list[str]:
    """Tasks in tasks/, without importing them."""
    return _names(tasks, NOT_TASKS)


def attention_class(name: str) -> type:
    """The class of an attention in the folder, or of `package.module:Class` outside it."""
    if ":" in name:
        return _outside(name)
    if name not in attention_names():
        raise unknown("attention", name, attention_names())
    return importlib.import_module(f"models.attention.{name}").Attention


def attention_module(name: str) -> ModuleType:
    """The file of an attention in the folder: Config, Attention and naive_<name>."""
    return importlib.import_module(attention_class(name).__module__)


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
    return {
        f.name: size for f in dataclasses.fields(attention_class(name).Config) if f.metadata.get("budget")
    }


def load_task(name: str) -> ModuleType:
    """The task's file: META, RECIPES and Task."""
    if name not in task_names():
        raise unknown("task", name, task_names())
    return importlib.import_module(f"tasks.{name}")


def _names(package: ModuleType, skip: frozenset[str] = frozenset()) -> list[str]:
    found = (m.name for m in pkgutil.iter_modules(package.__path__))
    return sorted(n for n in found if not n.startswith("_") and n not in skip)


def _outside(name: str) -> type:
    module_name, _, class_name = name.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"attention {name!r} cannot be imported: {error}") from error
    missing = [part for part in CONTRACT if not hasattr(cls, part)]
    if missing:
        raise UsageError(
            f"attention {name!r} lacks {', '.join(missing)}: subclass models.base.AttentionBase"
        )
    return cls
