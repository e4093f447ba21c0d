"""Bias and variance of kernel and attention estimates by random features, and their closed forms.

For q~, k~ ~ N(0, Lambda) (queries and keys times the root of the scale) with eigenvalues t, and one feature
Z = phi(q) phi(k), whose mean is kappa = exp(q~.k~):

    E[Z^2], w ~ N(0, I)          prod_t ((1 - 6t)(1 + 2t))^-1/2    exists for t < 1/6
    E[Z^2], w ~ N(0, Sigma*)     prod_t (1 - 2t)^-1                exists for t < 1/2
    E[kappa^2], no sampling      prod_t (1 - 4t^2)^-1/2            exists for t < 1/2

(arXiv 2603.04127, theorem 3.2). The relative variance is E[Z^2] / E[kappa^2] - 1, over M for M independent
features. For one pair and Gaussian w it is exact, without sampling: log E[Z^2 | q, k] / kappa^2 is |u|^2 with
u = q~ + k~, or with a proposal N(0, S) it is log|S|/2 - log|A|/2 + 2 u^T A^-1 u - |u|^2, A = 2 I - S^-1.
Where means of exp(|u|^2) rest on rare pairs and draws, a sample's variance is too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lra.variance.cases import Case
from models.features.projections import generator, inverse

PAIRINGS = 16  # keys that each query meets where the variance is exact; sampled estimates use the first


def closed_forms(t_HD: torch.Tensor) -> dict[str, float | None]:
    """The logs of E[Z^2] / E[kappa^2] ("isotropic", "optimal") and of E[kappa^2] ("no_sampling"), each the log of a
    mean over heads. None where one head has no such mean."""
    t_HD = t_HD.double()
    log1p, largest = torch.log1p, t_HD.max()
    forms = {}
    if largest < 1 / 2:
        forms["no_sampling"] = -0.5 * log1p(-4 * t_HD.square()).sum(-1)
        forms["optimal"] = -log1p(-2 * t_HD).sum(-1) - forms["no_sampling"]
    if largest < 1 / 6:
        forms["isotropic"] = -0.5 * (log1p(-6 * t_HD) + log1p(2 * t_HD)).sum(-1) - forms["no_sampling"]
    means = {name: float(x_H.logsumexp(0)) - math.log(len(x_H)) for name, x_H in forms.items()}
    return dict.fromkeys(("isotropic", "optimal", "no_sampling")) | means


def pairs(case: Case, count: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """`count` times: q (B, H, N, D) and k in float64, the tokens of k in another order; and a mask (B, N) of the pairs
    whose two tokens are real."""
    B, _, N, _ = case.q_BHND.shape
    real_BN = torch.ones(B, N, dtype=torch.bool) if case.mask_BN is None else case.mask_BN
    source = generator("pairs")
    for _ in range(count):
        order = torch.randperm(N, generator=source)
        yield case.q_BHND.double(), case.k_BHND[:, :, order].double(), real_BN & real_BN[:, order]


def seen(module: Any, q_BHND: torch.Tensor, k_BHND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vectors that the features see: q and k after alignment, times the root of the scale."""
    root = module.head_dim**-0.25
    return root * module.aligned(q_BHND, "q"), root * module.aligned(k_BHND, "k")


@torch.no_grad()
def log_ratio(module: Any, q_BHND: torch.Tensor, k_BHND: torch.Tensor) -> torch.Tensor:
    """log of (estimate / the kernel it estimates) for pairs (q_n, k_n), (B, H, N), from the maps of training."""
    scale = module.head_dim**-0.5
    maps = module.maps(k_BHND, scale)
    logs_BHMN = maps.aq_HMD @ q_BHND.mT + maps.ak_HMD @ maps.x_BHND.mT + maps.feature_bias_HM[..., None]
    u_q, u_k = seen(module, q_BHND, k_BHND)
    # Up to what depends on q alone and cancels in attention, the kernel is exp(u_q.u_k + scale mq.k).
    log_kernel_BHN = (u_q * u_k).sum(-1)
    if module.config.align != "none":
        log_kernel_BHN = log_kernel_BHN + scale * (k_BHND @ module.mean_q_HD.double()[..., None])[..., 0]
    log_estimate_BHN = logs_BHMN.logsumexp(-2) - math.log(logs_BHMN.shape[-2]) + maps.key_bias_BHN
    return log_estimate_BHN - u_q.square().sum(-1) / 2 - log_kernel_BHN


@torch.no_grad()
def log_second_moment(module: Any, q_BHND: torch.Tensor, k_BHND: torch.Tensor) -> torch.Tensor:
    """log E[Z^2 | q, k] / kappa^2 of one independent feature for pairs (q_n, k_n), (B, H, N), without sampling."""
    u = sum(seen(module, q_BHND, k_BHND))
    norm_BHN = u.square().sum(-1)
    if not hasattr(module, "root_HRR"):
        return norm_BHN
    S = module.root_HRR.double() @ module.root_HRR.double()
    A = 2 * torch.eye(S.shape[-1]) - inverse(S)
    quadratic_BHN = (u * (u @ inverse(A))).sum(-1)
    log_det_S, log_det_A = (torch.linalg.eigvalsh(x).log().sum(-1) for x in (S, A))
    return (log_det_S - log_det_A)[:, None] / 2 + 2 * quadratic_BHN - norm_BHN


@torch.no_grad()
def exact_variance(module: Any, case: Case) -> dict[str, float]:
    """log10 of the exact relative variance of one independent feature: median over pairs, and the mean weighted by
    the squared kernel, which is the E[Z^2] / E[kappa^2] - 1 of the closed forms on this sample of pairs."""
    parts = []
    for q_BHND, k_BHND, real_BN in pairs(case, PAIRINGS):
        u_q, u_k = seen(module, q_BHND, k_BHND)
        values_BHN = log_second_moment(module, q_BHND, k_BHND), 2 * (u_q * u_k).sum(-1)
        parts.append([x.transpose(1, 2)[real_BN].flatten() for x in values_BHN])
    logs, weights = map(torch.cat, zip(*parts, strict=True))
    mean = float((logs + weights).logsumexp(0) - weights.logsumexp(0))
    values = {"median": float(logs.median()), "weighted_mean": mean}
    return {name: log_expm1(x) / math.log(10) for name, x in values.items()}


def log_expm1(x: float) -> float:
    """log(e^x - 1) for x > 0, without overflow."""
    return x + math.log(-math.expm1(-max(x, 1e-300)))


@torch.no_grad()
def measure(module: Any, case: Case, draws: int) -> dict[str, float | None]:
    """Relative errors of kernel estimates and of the attention output over `draws` independent projections.

    kernel_bias: the mean, with its standard error over draws and heads. kernel_rms: the root of the mean square,
    weighted by the squared kernel. kernel_median: the median over pairs of the root mean square.
    """
    q, k, v, mask = case.q_BHND, case.k_BHND, case.v_BHND, case.mask_BN
    real_B1N1 = torch.ones(1, 1, 1, 1, dtype=torch.bool) if mask is None else mask[:, None, :, None]
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=real_B1N1.mT) * real_B1N1
    ((paired_q, paired_k, pair_BN),) = pairs(case)
    ratios, errors = [], []
    for redraw in range(draws):
        module.before_step(redraw)  # independent projections, as training redraws them
        ratios.append(log_ratio(module, paired_q, paired_k).exp().transpose(1, 2)[pair_BN].T)  # (H, pairs)
        errors.append(((module(q, k, v, mask) * real_B1N1 - exact) / exact.norm()).flatten())
    u_q, u_k = seen(module, paired_q, paired_k)
    log_weights = (2 * (u_q * u_k).sum(-1)).transpose(1, 2)[pair_BN].T
    shares = log_weights.flatten().softmax(0).view_as(log_weights)
    kernel_errors = torch.stack(ratios) - 1
    replicates, squares = kernel_errors.mean(-1).flatten(), kernel_errors.square().mean(0)
    return {
        "kernel_bias": float(replicates.mean()),
        "kernel_bias_se": float(replicates.std() / len(replicates) ** 0.5),
        "kernel_rms": float((shares * squares).sum().sqrt()),
        "kernel_median": float(squares.sqrt().median()),
    } | output_error(torch.stack(errors))


def output_error(errors: torch.Tensor) -> dict[str, float]:
    """Statistics of relative errors of the output (draws, values).

    error^2 = squared bias + variance. Products of different draws estimate the squared bias without bias; its standard
    error is that of the jackknife.
    """
    draws = len(errors)
    gram = (errors @ errors.T).numpy()
    square, total = gram.diagonal(), gram.sum()
    bias2 = (total - square.sum()) / (draws * (draws - 1))
    error = math.sqrt(square.mean())
    without = None
    if draws > 2:
        left = total - 2 * gram.sum(0) + square  # sums of products among the other draws
        without = (left - (square.sum() - square)) / ((draws - 1) * (draws - 2))
    return {
        "error": error,
        "error_se": float(square.std(ddof=1) / math.sqrt(draws) / (2 * error)),
        "bias_squared": float(bias2),
        "bias_squared_se": None if without is None else float(math.sqrt((draws - 1) * without.var())),
        "variance": float(square.mean() - bias2),
    }


def slope(points: list[dict[str, Any]], key: str) -> list[float] | None:
    """[slope, its standard error] of log error over log M; None below three points."""
    from scipy.stats import linregress

    if len(points) < 3:
        return None
    fitted = linregress(*(np.log([p[name] for p in points]) for name in ("M", key)))
    return [float(fitted.slope), float(fitted.stderr)]
