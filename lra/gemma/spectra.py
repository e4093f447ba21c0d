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
from typing import Any

import torch

from models.features.projections import balance, inverse
from models.gemma import bridge


def spectra(model: torch.nn.Module, tokens_BN: torch.Tensor) -> list[dict[str, Any]]:
    """One row per layer of the exact model: norms, spectra and closed forms, per head where it is a list."""
    rows: dict[int, dict[str, Any]] = {}

    def tap(layer):
        def see(q, k, v, mask, scale):
            rows[layer] = {"layer": layer} | describe(q, k, scale)

        return see

    bridge.watch(model, tokens_BN, {i: tap(i) for i in bridge.sockets(model)})
    return [rows[i] for i in sorted(rows)]


def describe(q_BHND: torch.Tensor, k_BHND: torch.Tensor, scale: float) -> dict[str, Any]:
    """The row of one layer."""
    q_HTD, k_HTD = ((scale**0.5 * x.double()).transpose(0, 1).flatten(1, 2) for x in (q_BHND, k_BHND))
    moment_HDD = (second_moment(q_HTD) + second_moment(k_HTD)) / 2
    t_HD = torch.linalg.eigvalsh(moment_HDD).flip(-1).clamp(min=0)
    qa_HTD, ka_HTD = align(q_HTD, k_HTD)
    a_HD = torch.linalg.eigvalsh((second_moment(qa_HTD) + second_moment(ka_HTD)) / 2).flip(-1).clamp(min=0)
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
        "aligned_log10_isotropic": closed_form(a_HD, isotropic),
        "aligned_log10_optimal": closed_form(a_HD, optimal),
    }


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


def isotropic(t_D: torch.Tensor) -> torch.Tensor:
    """log E[Z^2] for w ~ N(0, I)."""
    return -0.5 * ((1 - 6 * t_D).log() + (1 + 2 * t_D).log()).sum(-1)


def optimal(t_D: torch.Tensor) -> torch.Tensor:
    """log E[Z^2] for w ~ N(0, Sigma*)."""
    return -(1 - 2 * t_D).log().sum(-1)


def closed_form(t_HD: torch.Tensor, form) -> list[float | None]:
    """Of each head, to base 10; null where the moment is infinite."""
    values = [float(form(t)) / math.log(10) for t in t_HD]
    return [v if math.isfinite(v) else None for v in values]


def norm2(x_HTD: torch.Tensor) -> float:
    """Mean squared length."""
    return float(x_HTD.square().sum(-1).mean())


def rounded(x: torch.Tensor) -> list:
    """Four significant digits are enough for a record."""
    if x.dim() > 1:
        return [rounded(row) for row in x]
    return [float(f"{v:.4g}") for v in x.tolist()]
