"""Dropout with a cheaper mask."""

from __future__ import annotations

import torch
from torch import nn

BITS = 16  # of randomness for each element: p is kept to a multiple of 2^-16


class Dropout(nn.Dropout):
    """out = x keep / (1 - p), keep ~ Bernoulli(1 - p) independently for each element; x itself outside training.

    On a CPU, 16 random bits decide on each element, four elements to a draw of the generator, where PyTorch makes
    a floating-point number for each: that took a sixth to a third of an encoder's training step (LOG.md).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape and float dtype."""
        idle = not self.training or self.p in (0, 1) or torch.compiler.is_compiling()
        return super().forward(x) if idle or x.device.type != "cpu" else _Dropout.apply(x, self.p)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        dropped = round(p * 2**BITS)
        draws = torch.empty(-(-x.numel() * BITS // 64), dtype=torch.int64, device=x.device)
        bits = draws.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
        keep = bits >= dropped - 2 ** (BITS - 1)
        ctx.save_for_backward(keep)
        ctx.scale = 2**BITS / (2**BITS - dropped)
        return keep.to(x.dtype).mul_(ctx.scale).mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (keep,) = ctx.saved_tensors
        return keep.to(g.dtype).mul_(ctx.scale).mul_(g), None
