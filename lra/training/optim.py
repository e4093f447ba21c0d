"""Optimizer, schedule and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from tasks.base import Batch, Optim


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW; only the matrices of linear layers decay. Biases, norms, embeddings, positions and whatever an
    attention learns (DARKFormer's G, Linformer's projections) do not."""
    decay = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in decay}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, optim.beta2), eps=1e-6, fused=fused)


def learning_rate(step: int, optim: Optim) -> float:
    """Of optimizer step 0, 1, ...: linear to the peak over `warmup` steps, then half a cosine to zero at `steps`."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, optim.steps - optim.warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))


def micro_batches(batch: Batch, parts: int) -> Iterator[Batch]:
    """The batch in `parts` equal pieces, for gradient accumulation."""
    masks = [None] * parts if batch.mask_BTN is None else batch.mask_BTN.chunk(parts)
    return map(Batch, batch.tokens_BTN.chunk(parts), masks, batch.labels_B.chunk(parts))
