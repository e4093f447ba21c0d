"""A model with its attention exchanged, from a folder that `save_pretrained` wrote.

The folder holds the weights, the kernels among them, and in `config.lra_attention` what bridge.attach attached. The
plain `from_pretrained` reads the same folder without the kernels: that is what `detach` would give. Kernels are made
from files of models/attention alone: no code is executed that comes with the weights.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import models.attention
from models.base import AttentionBase
from models.gemma.bridge import attach


def load(path: str | Path) -> nn.Module:
    """The changed model, in evaluation mode. Raises ValueError, one line, where the folder holds none."""
    if not Path(path).is_dir():
        raise ValueError(f"no folder at {path}: give the one that save_pretrained wrote")
    groups = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "lra_attention", None)
    if not groups:
        raise ValueError(f"{path} has no lra_attention in its config.json: load it with from_pretrained")
    options = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # of kernels: "can be ignored when loading from different task/architecture"
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options).eval()
    finally:
        logging.set_verbosity(level)
    try:
        for g in groups:
            ignored = {name: g[name] for name in ("ignore_window", "ignore_softcap")}
            attach(model, lambda **shape: _kernel(g, **shape), g["layers"], **ignored)
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: its lra_attention cannot be attached: {type(error).__name__} {error}") from error
    tensors = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if ".socket." in name}
    restore(model, tensors, path)
    return model


def restore(model: nn.Module, tensors: dict[str, torch.Tensor], path: str | Path) -> None:
    """Put tensors into a model with its kernels attached. Raises ValueError unless all kernels get all of theirs."""
    try:
        left = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # another shape
        raise ValueError(f"{path} does not fit: {' '.join(str(error).split())}") from error
    alone = left.unexpected_keys + [name for name in left.missing_keys if ".socket." in name]
    if alone:
        raise ValueError(f"{path} does not fit: {alone[0]} has no partner")


def _kernel(group: dict[str, Any], **shape: int) -> AttentionBase:
    """One kernel of an entry of `lra_attention`."""
    name = group["attention"]
    if name not in (module.name for module in pkgutil.iter_modules(models.attention.__path__)):
        raise ValueError(f"attention {name!r} is not in models/attention: attach it yourself, then use `restore`")
    module = importlib.import_module(f"models.attention.{name}")
    shape["max_len"] = group["max_len"]
    return module.Attention(module.Config(**group["options"]), seed=group["seed"], **shape)
