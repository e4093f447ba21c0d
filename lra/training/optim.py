"""Optimizer, schedule and micro-batches."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import nn

from tasks.base import Batch, Optim


class AdamW(torch.optim.AdamW):
    """PyTorch's own, without the wrappers that hide it from torch.compile. Nothing here compiles an optimizer, and the
    wrappers import that compiler: 2.1 s and 73 MB of every run (measured with PyTorch 2.13, one core)."""

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def build_optimizer(model: nn.Module, optim: Optim) -> AdamW:
    """AdamW; only the matrices of linear layers decay. Biases, norms, embeddings, positions and whatever an
    attention learns (DARKFormer's G, Linformer's projections) do not."""
    decay = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return AdamW(groups, lr=optim.lr, betas=(0.9, optim.beta2), eps=1e-6, fused=fused)


def learning_rate(step: int, optim: Optim) -> float:
    """Of optimizer step 0, 1, ...: linear to the peak over `warmup` steps, then half a cosine to zero at `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    return (
        optim.lr * 0.5 * (1 + math.cos(math.pi * (step - optim.warmup) / max(1, optim.steps - optim.warmup)))
    )


def micro_batches(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in `parts` equal pieces, for gradient accumulation."""
    masks = [None] * parts if batch.mask_BTN is None else batch.mask_BTN.chunk(parts)
    for tokens, mask, labels in zip(
        batch.tokens_BTN.chunk(parts), masks, batch.labels_B.chunk(parts), strict=True
    ):
        yield Batch(tokens, mask, labels)
