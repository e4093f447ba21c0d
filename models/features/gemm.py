"""Sizes and types of the products of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import torch

CACHE = 2**18  # numbers in a chunk of weights: 1 MB in fp32, the second-level cache of one core
NEVER = -1e30  # the logit of a key that nothing may look at: finite, and exp(NEVER - any logit) is exactly 0


def work_dtype(v: torch.Tensor, wide: torch.dtype) -> torch.dtype:
    """The type of the products that are not logits: that of the values, except for fp16 on a CPU, which has no
    fast fp16 product."""
    return wide if v.dtype == torch.float16 and v.device.type == "cpu" else v.dtype


def chunks(x: torch.Tensor, a: torch.Tensor) -> Iterator[slice]:
    """Ranges of tokens of x (..., N, D) whose weights on the features of a (..., M, D) hold CACHE numbers on a CPU,
    64 times as many elsewhere."""
    budget = CACHE if x.device.type == "cpu" else 64 * CACHE
    rows = max(1, budget // (a.shape[-2] * x.shape[:-2].numel()))
    return (slice(n, n + rows) for n in range(0, x.shape[-2], rows))
