"""Matrix products of a CPU in fp32 through oneDNN, the linear layer built on them, and chunk sizes of the engine.

PyTorch gives fp32 products to MKL, and only bf16 ones to oneDNN; on AMD processors oneDNN is twice as fast in fp32
too, to the same accuracy (LOG.md).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

CACHE = 2**18  # numbers in a chunk of weights: 1 MB in fp32, the second-level cache of one core
NEVER = -1e30  # the logit of a key that nothing may look at: finite, and exp(NEVER - any logit) is exactly 0


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
        # The gradient of the weight sums over rows: as two transposed factors that oneDNN would have to copy.
        return product(g_RC, weight.mT).view(x.shape), g_RC.mT @ x.flatten(0, -2), g_RC.sum(0)


def half_square(x: torch.Tensor) -> torch.Tensor:
    """|x|^2 / 2 over the last axis, without a tensor of squares in either direction."""
    return x.square().sum(-1) / 2 if torch.compiler.is_compiling() else _HalfSquare.apply(x)


class _HalfSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.linalg.vector_norm(x, dim=-1).square_().div_(2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return ctx.saved_tensors[0] * g[..., None]


def work_dtype(v: torch.Tensor, wide: torch.dtype) -> torch.dtype:
    """What the products that are not logits compute in: as the values, except fp16 on a CPU, which has no
    fast fp16 product."""
    return wide if v.dtype == torch.float16 and v.device.type == "cpu" else v.dtype


def chunks(x: torch.Tensor, a: torch.Tensor) -> Iterator[slice]:
    """Ranges of tokens of x (..., N, D) whose weights on the features of a (..., M, D) hold CACHE numbers on a CPU,
    64 times as many elsewhere."""
    budget = CACHE if x.device.type == "cpu" else 64 * CACHE
    rows = max(1, budget // (a.shape[-2] * x.shape[:-2].numel()))
    return (slice(n, n + rows) for n in range(0, x.shape[-2], rows))
