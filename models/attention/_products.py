"""Matrix products and chunk sizes of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

CACHE = 2**18  # numbers in a chunk of weights: 1 MB in fp32, the second-level cache of one core
NEVER = -1e30  # the logit of a key that nothing may look at: finite, and exp(NEVER - any logit) is exactly 0


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., R, K) w^T (..., K, C) + bias (..., C).

    In fp32 on a CPU by oneDNN, which PyTorch keeps for bf16: on AMD it is twice as fast as MKL (LOG.md), to
    the same fp32 accuracy. Matrices, not batches of them, as oneDNN's linear layer has one weight.
    """
    if (
        x.dim() == 2
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "")
    if x.dim() == 2:
        return F.linear(x, w, bias)
    out = x @ w.mT
    return out if bias is None else out + bias[..., None, :]


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
