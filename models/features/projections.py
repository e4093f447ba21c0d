"""Random projections, and what makes them fit the data without changing the kernel.

All in float64 on the CPU, functions of their arguments alone.
"""

from __future__ import annotations

import hashlib
import math
import warnings

import torch

RIDGE = 0.03  # of the mean eigenvalue, added to a covariance before it is inverted
LARGEST = 0.45  # eigenvalues of Lambda are clipped to it: from 1/2 on the variance-optimal proposal does not exist


def generator(*key: object) -> torch.Generator:
    """Seeded by a hash of `key`."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def gaussian(heads: int, features: int, dim: int, *, orthogonal: bool, seed: int, layer: int, redraw: int):
    """Projections w_HMD with rows N(0, I), a pure function of the arguments, drawn in float64 on the CPU.

    `orthogonal`: in blocks of `dim`, rows are Haar-distributed directions times independent chi(dim) norms;
    each row is still N(0, I), but rows of a block are orthogonal (arXiv 2009.14794, section 2.4). QR alone is
    not Haar: the sign of diag(R) has to be moved into Q (Mezzadri 2007, arXiv math-ph/0609050).
    """
    source = generator("gaussian", seed, layer, redraw)

    def normal(*shape):
        return torch.randn(*shape, generator=source, dtype=torch.float64)

    if not orthogonal:
        return normal(heads, features, dim).float()
    blocks = -(-features // dim)
    q, r = torch.linalg.qr(normal(heads, blocks, dim, dim))
    haar = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    norms_HM1 = normal(heads, features, dim).norm(dim=-1, keepdim=True)
    return (haar.transpose(-1, -2).reshape(heads, blocks * dim, dim)[:, :features] * norms_HM1).float()


def redraw_due(redraws: torch.Tensor, step: int, every: int) -> bool:
    """Whether projections are to be drawn anew before training step `step`, every `every` steps (0 = never).

    `redraws` counts the redraws so far and is kept with the model. Together with seed and layer it determines the
    draws, so that they are the same on every rank and after a resume.
    """
    count = step // every if every else 0
    due = count != int(redraws)
    redraws.fill_(count)
    return due


def moments(x_BHND: torch.Tensor, mask_BN: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (H, D) and covariance (H, D, D) of the real tokens, per head."""
    x_BHND = x_BHND.detach().cpu().double()
    if mask_BN is None:
        mask_BN = torch.ones(x_BHND.shape[0], x_BHND.shape[2], dtype=torch.bool)
    x_HND = x_BHND.transpose(1, 2)[mask_BN.cpu()].transpose(0, 1)
    mean_HD = x_HND.mean(1)
    centred = x_HND - mean_HD[:, None]
    return mean_HD, centred.mT @ centred / x_HND.shape[1]


def power(S_HDD: torch.Tensor, exponent: float) -> torch.Tensor:
    """S^exponent of symmetric positive matrices."""
    values, vectors = torch.linalg.eigh(S_HDD)
    return (vectors * values.clamp(min=0).pow(exponent)[..., None, :]) @ vectors.mT


def inverse(S_HDD: torch.Tensor) -> torch.Tensor:
    """S^-1 of symmetric positive matrices. torch.linalg.inv (LU) can hang for ever with two threads (MKL 2024.2)."""
    return power(S_HDD, -1)


def balance(q_cov_HDD: torch.Tensor, k_cov_HDD: torch.Tensor) -> torch.Tensor:
    """T = P^1/2 (symmetric), P the geometric mean of Lq and Lk^-1: T k and T^-1 q then have one covariance.

    q.k = (T^-1 q).(T k) for any T; this one makes E|T^-1 q|^2 + E|T k|^2 least, 2 tr (Lk^1/2 Lq Lk^1/2)^1/2.
    """
    q_cov_HDD, k_cov_HDD = ridged(q_cov_HDD), ridged(k_cov_HDD)
    root, inverse = power(k_cov_HDD, 0.5), power(k_cov_HDD, -0.5)
    return power(inverse @ power(root @ q_cov_HDD @ root, 0.5) @ inverse, 0.5)


def ridged(S_HDD: torch.Tensor) -> torch.Tensor:
    """S + RIDGE tr(S)/D I."""
    D = S_HDD.shape[-1]
    trace = S_HDD.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    return S_HDD + (RIDGE / D * trace).clamp(min=torch.finfo(S_HDD.dtype).tiny) * torch.eye(D).to(S_HDD)


def variance_optimal(Lambda_HDD: torch.Tensor, name: str) -> torch.Tensor:
    """Root of Sigma* = (I + 2 Lambda)(I - 2 Lambda)^-1: the Gaussian proposal of least variance when q~ and k~ are
    N(0, Lambda)  (arXiv 2603.04127, theorem 3.2).

    It exists while every eigenvalue is below 1/2: larger ones are clipped to LARGEST, with a warning.
    """
    values, vectors = torch.linalg.eigh(Lambda_HDD)
    if values.max() > LARGEST:
        warnings.warn(
            f"{name}: largest eigenvalue {values.max():.3g} of Lambda clipped to {LARGEST}: "
            "from 1/2 on the variance-optimal proposal does not exist",
            stacklevel=2,
        )
    values = values.clamp(0, LARGEST)
    return (vectors * ((1 + 2 * values) / (1 - 2 * values)).sqrt()[..., None, :]) @ vectors.mT


def optimal_resample(
    pool_HPD: torch.Tensor, q_HSD: torch.Tensor, k_HSD: torch.Tensor, features: int, source: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`features` of the pool in proportion to (E_q phi(q; w)^2 E_k phi(k; w)^2)^1/2, and their log importance
    weights: uniform over the pool against that proportion  (arXiv 2406.18802; phi(x; w) = exp(w.x - |x|^2/2)).

    q and k are scaled by the root of the scale. A candidate may be taken more than once.
    """

    def log_second_moment(x_HSD):
        norms_H1S = x_HSD.square().sum(-1)[:, None, :]
        return torch.baddbmm(norms_H1S, pool_HPD, x_HSD.mT, beta=-1, alpha=2).logsumexp(-1)

    log_weight_HP = 0.5 * (log_second_moment(q_HSD) + log_second_moment(k_HSD))
    log_share_HP = log_weight_HP.log_softmax(-1)
    taken_HM = log_share_HP.exp().multinomial(features, replacement=True, generator=source)
    w_HMD = pool_HPD.gather(1, taken_HM[..., None].expand(-1, -1, pool_HPD.shape[-1]))
    return w_HMD, -log_share_HP.gather(1, taken_HM) - math.log(pool_HPD.shape[1])
