"""What finetuning steps cost, beside what the machine could do at best."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from lra.machine import synchronize
from models.gemma import bridge

if TYPE_CHECKING:
    from lra.gemma.trainer import Finetuner


def cost(tuner: Finetuner, seconds: float, transfer_seconds: float) -> dict[str, Any]:
    """Seconds, tokens per second and peak memory of training steps, and the floor of their matrix products."""
    recipe, blocks = tuner.cell.recipe, tuner.cell.blocks["train"]
    length = blocks.tokens.shape[1]
    steps = tuner.progress.step
    flops = step_flops(tuner.model, recipe["batch"], length - 1)
    peak = peak_flops(tuner.device, tuner.cell.precision)
    tokens = recipe["batch"] * length
    return {
        "wall_s": round(seconds, 3),
        "transfer_s": round(transfer_seconds, 3),
        "steps_per_s": round(steps / seconds, 4) if seconds else None,
        "tokens_per_s": round(steps * tokens / seconds, 1) if seconds else None,
        "peak_bytes": tuner.memory.read(),
        "step_flops": flops,
        "measured_peak_flops": round(peak),
        "floor_tokens_per_s": round(tokens * peak / flops, 1),
        "softmax_same_machine": None,
    }


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
        size = sum(p.numel() for n, p in layer.named_parameters() if p.dim() == 2 and ".socket." not in n)
        learned = sum(
            p.numel() for n, p in layer.named_parameters()
            if p.dim() == 2 and p.requires_grad and ".socket." not in n
        )  # fmt: skip
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
