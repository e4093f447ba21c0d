"""Adapters: what finetuning changed, in one safetensors file that says in its header which model it belongs to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra.gemma.experiment import VERSION, Experiment, Method, plug_in
from lra.gemma.weights import Base
from lra.options import UsageError
from lra.training import checkpoint
from models.gemma.saved import restore

if TYPE_CHECKING:
    import torch

FORMAT = f"lra-gemma-adapter/{VERSION}"


def describe(experiment: Experiment) -> dict[str, Any]:
    """The header: format, base model and its weights' hash, method, seed, length."""
    base = experiment.base
    return {
        "format": FORMAT,
        "base": {"name": base.name, "source": base.source, "sha256": base.sha256},
        "method": asdict(experiment.method),
        "seed": experiment.seed,
        "length": experiment.length,
    }


def load(path: Path, base: Base) -> torch.nn.Module:
    """The base model with the adapter on it, ready to score or to generate.

    Raises UsageError when the file is no adapter, or belongs to another base model.
    """
    tensors, state = checkpoint.load(path)
    if state.get("format") != FORMAT:
        raise UsageError(f"{path} is not an adapter of format {FORMAT}: found {state.get('format')!r}")
    if state["base"]["sha256"] != base.sha256:
        raise UsageError(
            f"{path} was trained on {state['base']['name']} ({state['base']['source']}), whose weights differ from "
            f"those of {base.name} ({base.source}): give the base model it was trained on with --model"
        )
    method = Method(**state["method"] | {"layers": tuple(state["method"]["layers"])})
    plug_in(base, method, seed=state["seed"], length=state["length"])
    try:
        restore(base.model, tensors, path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return base.model
