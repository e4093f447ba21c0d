"""Atomic checkpoints: one safetensors file with every tensor; its header holds the plain state and a hash of all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lra.options import UsageError
from tasks.store.files import atomic_path, one_line

Tensors = dict[str, torch.Tensor]


class Damaged(UsageError):
    """A checkpoint that cannot be read, or that is not what was written."""


def save(path: Path, tensors: Tensors, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write under a temporary name, sync, rename: a reader sees the old file or the new one, never half of one. The
    file that stood at `path` goes to `previous`, if given, once the new one is written."""
    # Copies, because safetensors refuses tensors that share memory, as tied parameters do.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    text = json.dumps(state)
    header = {"state": text, "sha256": _digest(plain, text)}
    with atomic_path(path) as temporary:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(errno.EIO, one_line(error), str(path)) from error
        if previous and path.exists():
            os.replace(path, previous)


def load(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Tensors and state of a checkpoint. Raises UsageError when there is none, Damaged when it fails its hash."""
    try:
        open(path, "rb").close()  # what a system refuses to open is not damaged
    except FileNotFoundError:
        raise UsageError(f"no checkpoint at {path}") from None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if header.get("sha256") != _digest(tensors, header.get("state", "")):
                raise ValueError("its content does not match its sha256")
            return tensors, json.loads(header["state"])
    except (SafetensorError, OSError, ValueError) as error:
        raise Damaged(f"checkpoint {path} is damaged ({one_line(error)})") from None


def _digest(tensors: Tensors, state: str) -> str:
    """sha256 over the state and every tensor's name, type, shape and bytes, in order of name."""
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def under(prefix: str, tensors: Tensors) -> Tensors:
    """The entries whose name starts with `prefix.`, with it stripped."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's per-parameter tensors as `<index>.<name>`."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": t for i, entries in state.items() for name, t in entries.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """Put back what `optimizer_tensors` gave; hyper-parameters stay those of the optimizer."""
    state: dict[int, Tensors] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def tensors_sha256(tensors: Tensors) -> str:
    """sha256 over names and contents, in order of name: what records call the hash of initial weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()
