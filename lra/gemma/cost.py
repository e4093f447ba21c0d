"""What finetuning steps cost at least, on this machine."""

from __future__ import annotations

import time
from typing import Any

import torch

from lra.machine import synchronize
from lra.training.trainer import Where
from models.gemma import bridge


def bound(model: torch.nn.Module, batch: int, length: int, where: Where) -> dict[str, Any]:
    """The matrix products of a step of `batch` blocks of `length` tokens, and tokens/s if nothing else took time."""
    flops, peak = step_flops(model, batch, length - 1), peak_flops(where.device, where.precision)
    floor = round(batch * length * peak / flops, 1)
    return {"step_flops": flops, "measured_peak_flops": round(peak), "floor_tokens_per_s": floor}


def step_flops(model: torch.nn.Module, batch: int, length: int) -> int:
    """Matrix products of one training step, a multiply-add counted as two operations.

    Linear layers: 2 T P forward; 2 T P for the gradient of their input from the first layer that is trained on; 2 T P
    for that of weights that are trained. The output layer: logits and the gradient of its input. Attention: what
    the kernel itself declares, three times where a gradient passes; unreplaced layers as exact attention, causal.
    """
    T, layers, total = batch * length, bridge.text_layers(model), 0
    reached = False
    for layer in layers:
        attention = layer.self_attn
        matrices = [p for n, p in layer.named_parameters() if p.dim() == 2 and ".socket." not in n]
        size = sum(p.numel() for p in matrices)
        learned = sum(p.numel() for p in matrices if p.requires_grad)
        reached = reached or any(p.requires_grad for p in layer.parameters())
        total += 2 * T * (size * (2 if reached else 1) + learned)
        heads, dim = attention.q_proj.out_features // attention.head_dim, attention.head_dim
        socket = getattr(attention, "socket", None)
        if socket is None or socket.kernel.exact:
            forward = 2 * batch * heads * length * length * dim
        else:
            forward = socket.kernel.flops(batch, heads, length, dim)
        total += forward * (3 if reached else 1)
    return total + 2 * 2 * T * model.lm_head.weight.numel()


def peak_flops(device: torch.device, precision: str, size: int = 1024, tries: int = 5) -> float:
    """Operations per second of the fastest of a few square matrix products on this machine, now."""
    x = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    best = float("inf")
    for _ in range(tries):
        synchronize(device)
        start = time.perf_counter()
        x @ x
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
