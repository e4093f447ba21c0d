"""Counts of a training step or an evaluation: operations, FLOPs, bytes read and written, memory. Nothing is computed.

What lra/training/trainer.py does runs on fake tensors, which have a shape and no numbers. A dispatch mode sees every
operation of the forward pass, the backward pass and the optimizer. The count follows the code: an attention from
outside this repository is counted too.
"""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from lra.training.config import Run
from lra.training.trainer import build_optimizer, update
from models.features.flash import why_plain
from tasks.base import Batch

# `tiles` are bytes, too: those of the N x N weights of the fused attention, which stay in the cache of a processor.
COLUMNS = ("step", "operations", "flops", "bytes", "tiles")  # step: always 1
FUSED = "_scaled_dot_product_flash_attention_for_cpu"


class Uncountable(Exception):
    """The step needs numbers, which fake tensors do not have; one line that says where."""


class Work(NamedTuple):
    """Counts by COLUMNS, and the most bytes that live at one time."""

    counts: np.ndarray
    peak: float


def count(run: Run, *, batch: int, width: int, padded: bool, training: bool = True, asked: int = 0) -> Work:
    """The work of one fp32 step on `batch` examples of `width` tokens, or of their evaluation; `padded`: with a mask.
    `asked`: a step of self-pretraining that reconstructs so many tokens of each sequence. Raises Uncountable."""
    why_plain("cpu", torch.float32)  # it tries the kernels of random features once, on numbers
    counter, fake, optim = Counter(), FakeTensorMode(), replace(run.recipe.train, accumulate=1)
    try:
        with FakeCopyMode(fake):
            model = copy.deepcopy(run.build_model().train(training))
        counter.hold(*model.parameters(), *model.buffers())
        # PyTorch clips the gradients of fake tensors one by one unless told that it may take them together.
        with patch("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True), fake:
            tokens_BTN = torch.zeros(batch, run.meta.towers, width, dtype=torch.int64)
            mask_BTN = torch.ones(tokens_BTN.shape, dtype=torch.bool) if padded else None
            asked_BTK = tokens_BTN[..., :asked] if asked else None
            labels = torch.zeros(batch, *[run.meta.towers * asked] * (asked > 0), dtype=torch.int64)
            zeros = Batch(tokens_BTN, mask_BTN, labels, asked_BTK)
            with counter, torch.set_grad_enabled(training):
                if training:
                    update(model, build_optimizer(model, optim), zeros, optim, "fp32")
                else:
                    model(tokens_BTN, mask_BTN)
    except Exception as error:  # code from outside may read numbers, or fail as it will in training
        raise Uncountable(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
    return Work(counter.total, counter.peak)


class Counter(TorchDispatchMode):
    """While entered, adds up every operation and follows the memory of the tensors that are created or held."""

    def __init__(self):
        super().__init__()
        self.total = np.array([1.0, 0, 0, 0, 0])  # by COLUMNS
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        created = _tensors(out)
        if (created or not func._schema.returns) and not func.is_view:
            moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs)) + created)
            flops, tiles = _flops_and_tiles(func._overloadpacket, args, kwargs, out)
            self.total += (0, 1, flops, moved, tiles)
        self.hold(*created)
        return out

    def hold(self, *tensors: torch.Tensor) -> None:
        """Count the memory of tensors until they are freed; memory that tensors share counts once."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._release(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _flops_and_tiles(packet: Any, args: tuple, kwargs: dict, out: Any) -> tuple[int, int]:
    """FLOPs of a matrix product (a multiplication and an addition are two) and bytes of tiles; 0 elsewhere."""
    name = packet.__name__
    if name.startswith(FUSED):
        backward = name != FUSED
        q, k = args[backward : backward + 2]  # the gradient of the output comes before them
        # Forward: logits and weights are written and read. Backward: both again, and three gradients.
        passes, weights = (10, 4)[not backward], q.shape[:-1].numel() * k.shape[-2]
        return passes * weights * q.shape[-1], passes * weights * q.element_size()
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out), 0
    if name == "_linear_pointwise":  # oneDNN's linear layer, which the registry does not know
        return 2 * args[0].numel() * args[1].shape[0], 0
    return 0, 0
