"""How far real queries and keys are from what random features like: spectra, closed forms, measured errors.

With q~ = sqrt(scale) q and k~ alike, positive features of N(0, I) have, for one pair, the relative second moment
E[Z^2] / E[Z]^2 = exp |q~ + k~|^2. For q~, k~ ~ N(0, Lambda) with eigenvalues t its counterparts in closed form are

    w ~ N(0, I):        prod_t ((1 - 6t)(1 + 2t))^-1/2      finite only below t = 1/6
    w ~ N(0, Sigma*):   prod_t (1 - 2t)^-1                  finite only below t = 1/2

(arXiv 2603.04127, Theorem 3.2; E[Z^2], not yet divided by E[kappa^2]). Aligned: centred and balanced, so that both
sides have the same covariance, as attention allows without changing its output.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from models.features.projections import balance, inverse
from models.gemma import bridge


def spectra(model: torch.nn.Module, tokens_BN: torch.Tensor) -> list[dict[str, Any]]:
    """One row per layer of the exact model: norms, spectra and closed forms, per head where it is a list."""
    rows: dict[int, dict[str, Any]] = {}

    def see(layer, q, k, v, mask, scale):
        rows[layer] = {"layer": layer} | describe(q, k, scale)

    bridge.watch(model, tokens_BN, {layer: partial(see, layer) for layer in bridge.sockets(model)})
    return [rows[layer] for layer in sorted(rows)]


def describe(q_BHND: torch.Tensor, k_BHND: torch.Tensor, scale: float) -> dict[str, Any]:
    """The row of one layer."""
    q_HTD, k_HTD = ((scale**0.5 * x.double()).transpose(0, 1).flatten(1, 2) for x in (q_BHND, k_BHND))
    qa_HTD, ka_HTD = align(q_HTD, k_HTD)
    t_HD, a_HD = spectrum(q_HTD, k_HTD), spectrum(qa_HTD, ka_HTD)
    return {
        "q_norm2": norm2(q_HTD),
        "k_norm2": norm2(k_HTD),
        "top": rounded(t_HD[:, 0]),
        "condition": rounded(t_HD[:, 0] / t_HD[:, -1].clamp(min=1e-12)),
        "above_half": (t_HD > 0.5).sum(-1).tolist(),
        "spectrum": rounded(t_HD[:, :32]),
        "log10_pair": log10_pair(q_HTD, k_HTD),
        "aligned_norm2": norm2(qa_HTD),
        "aligned_top": rounded(a_HD[:, 0]),
        "aligned_above_half": (a_HD > 0.5).sum(-1).tolist(),
        "aligned_spectrum": rounded(a_HD[:, :32]),
        "aligned_log10_pair": log10_pair(qa_HTD, ka_HTD),
        "aligned_log10_isotropic": log10(-0.5 * ((1 - 6 * a_HD).log() + (1 + 2 * a_HD).log()).sum(-1)),
        "aligned_log10_optimal": log10(-(1 - 2 * a_HD).log().sum(-1)),
    }


def spectrum(q_HTD: torch.Tensor, k_HTD: torch.Tensor) -> torch.Tensor:
    """Eigenvalues of the mean second moment of queries and keys, the largest first: (H, D)."""
    return torch.linalg.eigvalsh((second_moment(q_HTD) + second_moment(k_HTD)) / 2).flip(-1).clamp(min=0)


def second_moment(x_HTD: torch.Tensor) -> torch.Tensor:
    """E[x x^T] per head, (H, D, D)."""
    return x_HTD.transpose(-1, -2) @ x_HTD / x_HTD.shape[1]


def align(q_HTD: torch.Tensor, k_HTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centred and balanced: T^-1 (q - mean q) and T (k - mean k), which have one covariance (projections.balance)."""
    q, k = (x - x.mean(1, keepdim=True) for x in (q_HTD, k_HTD))
    T = balance(second_moment(q), second_moment(k))
    return q @ inverse(T), k @ T  # T is symmetric


def log10_pair(q_HTD: torch.Tensor, k_HTD: torch.Tensor, pairs: int = 4096) -> dict[str, float]:
    """Of exp |q~ + k~|^2 over random pairs: median and 90th percentile of its logarithm to base 10."""
    generator = torch.Generator().manual_seed(0)
    i, j = (torch.randint(0, q_HTD.shape[1], (pairs,), generator=generator) for _ in range(2))
    exponents = (q_HTD[:, i] + k_HTD[:, j]).square().sum(-1).flatten() / math.log(10)
    return {"median": float(exponents.median()), "p90": float(exponents.quantile(0.9))}


def log10(logs_H: torch.Tensor) -> list[float | None]:
    """Natural logarithms of the heads' moments to base 10; null where a moment is infinite."""
    return [value / math.log(10) if math.isfinite(value) else None for value in logs_H.tolist()]


def norm2(x_HTD: torch.Tensor) -> float:
    """Mean squared length."""
    return float(x_HTD.square().sum(-1).mean())


def rounded(x: torch.Tensor) -> list:
    """Four significant digits are enough for a record."""
    if x.dim() > 1:
        return [rounded(row) for row in x]
    return [float(f"{v:.4g}") for v in x.tolist()]
