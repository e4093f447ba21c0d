"""Layers of PyTorch in a form that is faster on a CPU: dropout, the linear layer, half squares.

PyTorch gives products in fp32 to MKL, and only those in bf16 to oneDNN. On AMD processors oneDNN is twice as fast in
fp32 too, at the same accuracy (LOG.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BITS = 16  # random bits for each element that dropout decides on: p is rounded to a multiple of 2^-16


class Dropout(nn.Dropout):
    """out = x keep / (1 - p), keep ~ Bernoulli(1 - p) independently for each element; x itself outside training.

    On a CPU, 16 random bits decide on each element, and one draw of the generator serves four elements. PyTorch
    draws a floating-point number for each element, which took a sixth to a third of an encoder's training step.
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


class Linear(nn.Linear):
    """nn.Linear, in fp32 on a CPU through `product`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., K) W^T + b, (..., C)."""
        plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or not by_onednn(x)
        return super().forward(x) if plain else _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        g_RC = g.flatten(0, -2)
        # The gradient of the weight sums over rows. oneDNN would have to copy its two transposed factors.
        return product(g_RC, weight.mT).view(x.shape), g_RC.mT @ x.flatten(0, -2), g_RC.sum(0)


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., R, K) w^T (..., K, C) + bias (..., C). Not differentiable.

    Batches of matrices go the usual way: oneDNN's linear layer has one weight.
    """
    if x.dim() == 2 and by_onednn(x):
        # A weight with gaps, such as one head of q, falls back to a reference loop, a hundred times slower.
        dense = w if w.is_contiguous() or w.mT.is_contiguous() else w.contiguous()
        return torch.ops.mkldnn._linear_pointwise(x, dense, bias, "none", [], "")
    if x.dim() == 2:
        return F.linear(x, w, bias)
    out = x @ w.mT
    return out if bias is None else out + bias[..., None, :]


def by_onednn(x: torch.Tensor) -> bool:
    """Whether products of x are computed by oneDNN here and by MKL in PyTorch's own functions."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()


def half_square(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x, and |x|^2 / 2 over its last axis. What is computed from this x gives its gradient a place: for all but small x
    there is no tensor of squares in either direction."""
    small = torch.compiler.is_compiling() or x.numel() < 2**16
    return (x, x.square().sum(-1) / 2) if small else _HalfSquare.apply(x)


class _HalfSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x, torch.linalg.vector_norm(x, dim=-1).square_().div_(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dx, g):
        (x,) = ctx.saved_tensors
        if dx is None or g is None:
            return dx if g is None else x * g[..., None]
        return dx.addcmul_(x, g[..., None])  # in place: products alone read this x, and their gradients are new
