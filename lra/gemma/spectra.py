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

PAIRS = 4096  # random pairs of a query and a key


def spectra(model: torch.nn.Module, tokens_BN: torch.Tensor) -> list[dict[str, Any]]:
    """One row per layer of the exact model: norms, spectra and closed forms, per head where it is a list."""
    rows: dict[int, dict[str, Any]] = {}

    def see(layer, q, k, v, mask, scale):
        rows[layer] = {"layer": layer} | describe(q, k, scale)

    bridge.watch(model, tokens_BN, {layer: partial(see, layer) for layer in bridge.sockets(model)})
    return [rows[layer] for layer in sorted(rows)]


def describe(q_BHND: torch.Tensor, k_BHND: torch.Tensor, scale: float) -> dict[str, Any]:
    """The row of one layer, of queries and keys as they are and aligned."""
    q, k = ((scale**0.5 * x.double()).transpose(0, 1).flatten(1, 2) for x in (q_BHND, k_BHND))  # (H, T, D)
    row: dict[str, Any] = {"q_norm2": norm2(q), "k_norm2": norm2(k)}
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, q.shape[1], (PAIRS,), generator=generator) for _ in range(2))
    for prefix in ("", "aligned_"):
        if prefix:  # T^-1 (q - mean q) and T (k - mean k), which have one covariance; T is symmetric
            q, k = (x - x.mean(1, keepdim=True) for x in (q, k))
            T = balance(second_moment(q), second_moment(k))
            q, k = q @ inverse(T), k @ T
        t_HD = torch.linalg.eigvalsh((second_moment(q) + second_moment(k)) / 2).flip(-1).clamp(min=0)
        if not prefix:
            row["condition"] = rounded(t_HD[:, 0] / t_HD[:, -1].clamp(min=1e-12))
        log10s = (q[:, first] + k[:, second]).square().sum(-1).flatten() / math.log(10)  # of exp |q~ + k~|^2
        facts = {"top": rounded(t_HD[:, 0]), "above_half": (t_HD > 0.5).sum(-1).tolist()}
        facts |= {"spectrum": rounded(t_HD[:, :32])}
        facts |= {"log10_pair": {"median": float(log10s.median()), "p90": float(log10s.quantile(0.9))}}
        row |= {prefix + name: value for name, value in facts.items()}
    return row | {
        "aligned_norm2": norm2(q),
        "aligned_log10_isotropic": log10(-0.5 * ((1 - 6 * t_HD).log() + (1 + 2 * t_HD).log()).sum(-1)),
        "aligned_log10_optimal": log10(-(1 - 2 * t_HD).log().sum(-1)),
    }


def second_moment(x_HTD: torch.Tensor) -> torch.Tensor:
    """E[x x^T] per head, (H, D, D)."""
    return x_HTD.transpose(-1, -2) @ x_HTD / x_HTD.shape[1]


def norm2(x_HTD: torch.Tensor) -> float:
    """Mean squared length."""
    return float(x_HTD.square().sum(-1).mean())


def log10(logs_H: torch.Tensor) -> list[float | None]:
    """Natural logarithms of the heads' moments to base 10; null where a moment is infinite."""
    return [value / math.log(10) if math.isfinite(value) else None for value in logs_H.tolist()]


def rounded(x: torch.Tensor) -> list:
    """Four significant digits are enough for a record."""
    return [rounded(row) if row.dim() else float(f"{row.item():.4g}") for row in x]
