"""Random features that are drawn: alignment with data, temperature, importance weights, redraws.

Two transformations leave softmax over keys exactly as it was:

    centre    q.k = (q - mq).(k - mk) + mq.k + (a term of q alone, which cancels)
    balance   q.k = (T^-T q).(T k)

So features may be taken of q' = T^-T (q - mq) and k' = T (k - mk), with scale mq.k_n added to the key bias. Features
vary the less the closer to zero q' and k' are. With G the learned geometry (the identity but in darkformer):

    aq = scale^1/2 w G T^-T                       feature bias = b - aq.mq
    ak = scale^1/2 w      x = G T (k - mk)        key bias = scale mq.k - scale |x|^2 / 2

b are log importance weights, where w is not drawn from N(0, I). The key bias needs x in any case, and w does not learn:
ak.x spares the gradient of M vectors G^T w. Means and T come from data, once (`calibrate`); the kernel is the same for
any values of them. The paper of no method has this: it is this suite's own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from models.base import option
from models.features.family import FeatureAttention, FeatureConfig, Maps, naive_family, naive_phi
from models.features.projections import balance, inverse, moments, redraw_due
from models.layers import half_square

SAMPLE = 256  # queries and keys that a method remembers of a training step


@dataclass(frozen=True, kw_only=True)
class AlignedConfig(FeatureConfig):
    """Options of methods that draw their projections."""

    redraw_every: int = option(0, "training steps between redraws of the projections; 0 = never")
    align: Literal["none", "centre", "balance"] = option(
        "none",
        "subtract the means of q and k, and (balance) give both the same covariance; the kernel stays",
        later=True,
    )
    learn_mean: bool = option(False, "the means are parameters, calibrated at first; needs align", later=True)
    target_norm: float = option(
        0.0,
        "temperature: shrink q and k so that their mean |q|^2 + |k|^2 is at most this; 0 = keep the kernel",
        later=True,
    )


class AlignedAttention(FeatureAttention):
    """Features that are drawn, of aligned queries and keys. `config` is an AlignedConfig.

    Data come from `calibrate`, or before training step 1 from SAMPLE queries and keys of step 0. A subclass may define
    `fit` and `draw`, and tells this constructor what it does beyond Performer:

        adapts       its draws or parameters follow data even without `align`
        resamples    every redraw wants the queries and keys of the step before
        cools        T has the temperature of target_norm
    """

    def __init__(self, config, *, adapts: bool = False, resamples: bool = False, cools: bool = True, **shape):
        super().__init__(config, **shape)
        if config.redraw_every < 0:
            raise ValueError(f"redraw_every must be 0 (never) or more; got {config.redraw_every}")
        if config.learn_mean and config.align == "none":
            raise ValueError("learn_mean=True needs align=centre or align=balance; got align=none")
        if config.target_norm < 0:
            raise ValueError(f"target_norm must be 0 (keep the kernel) or more; got {config.target_norm}")
        self.resamples, self.cools = resamples, cools and config.target_norm > 0
        self.centres, self.transforms = config.align != "none", config.align == "balance" or self.cools
        self.adapts = adapts or self.centres or self.transforms or config.window > 0
        self.watching = False  # whether the queries and keys of this training step are wanted
        self.G_HDD: nn.Parameter | None = None  # (H or 1, feature_dim, D), a learned map of q' and k'
        self.register_buffer("b_HM", None)
        self.register_buffer("redraws", torch.zeros((), dtype=torch.int64))
        self.register_buffer("w_HMD", self.gaussian())
        H, D = self.heads, self.head_dim
        if self.adapts:
            for name in ("seen_q_HSD", "seen_k_HSD"):
                self.register_buffer(name, torch.zeros(H, SAMPLE, D))
            self.register_buffer("seen_scale", torch.zeros((), dtype=torch.float64))
            self.register_buffer("calibrated", torch.zeros((), dtype=torch.bool))
        if self.centres:
            for name in ("mean_q_HD", "mean_k_HD"):
                if config.learn_mean:
                    self.register_parameter(name, nn.Parameter(torch.zeros(H, D)))
                else:
                    self.register_buffer(name, torch.zeros(H, D))
        if self.transforms:
            for name in ("Tq_HDD", "Tk_HDD"):  # t T^-T and t T, t the temperature
                self.register_buffer(name, torch.eye(D).repeat(H, 1, 1))

    def aligned(self, x_BHND: torch.Tensor, side: Literal["q", "k"]) -> torch.Tensor:
        """G T (x - mean)."""
        if self.centres:
            x_BHND = x_BHND - getattr(self, f"mean_{side}_HD")[:, None].to(x_BHND.dtype)
        if self.transforms:
            x_BHND = x_BHND @ getattr(self, f"T{side}_HDD").mT.to(x_BHND.dtype)
        return x_BHND if self.G_HDD is None else x_BHND @ self.G_HDD.mT.to(x_BHND.dtype)

    def maps(self, k_BHND, scale, *, moved=False):
        dtype = k_BHND.dtype
        ak_HMD, (x_BHND, square_BHN) = scale**0.5 * self.w_HMD.to(dtype), half_square(self.aligned(k_BHND, "k"))
        aq_HMD = ak_HMD if moved or self.G_HDD is None else ak_HMD @ self.G_HDD.to(dtype)
        if self.transforms and not moved:
            aq_HMD = aq_HMD @ self.Tq_HDD.to(dtype)
        bias_HM = aq_HMD.new_zeros(aq_HMD.shape[:2]) if self.b_HM is None else self.b_HM.to(dtype)
        key_bias_BHN = -scale * square_BHN
        if self.centres:
            mean_q_HD1 = self.mean_q_HD.to(dtype)[..., None]
            key_bias_BHN = key_bias_BHN + scale * (k_BHND @ mean_q_HD1)[..., 0]
            bias_HM = bias_HM if moved else bias_HM - (aq_HMD @ mean_q_HD1)[..., 0]
        if self.feature_dim < self.head_dim:  # fused kernels want one width
            ak_HMD, x_BHND = (F.pad(t, (0, self.head_dim - self.feature_dim)) for t in (ak_HMD, x_BHND))
            aq_HMD = ak_HMD if moved else aq_HMD
        return Maps(aq_HMD, ak_HMD, x_BHND, key_bias_BHN, bias_HM)

    def log_norm(self, q_BHND, scale):
        log_BHN = -scale * half_square(self.aligned(q_BHND, "q"))[1] - math.log(self.config.num_features)
        if self.centres:
            mean_q_HD, mean_k_HD = (x.to(q_BHND.dtype) for x in (self.mean_q_HD, self.mean_k_HD))
            log_BHN = log_BHN + scale * ((q_BHND - mean_q_HD[:, None]) @ mean_k_HD[..., None])[..., 0]
        return log_BHN

    # Draws and data

    def draw(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """w_HMD for the present number of redraws, and its log importance weights b_HM where it has any."""
        return self.gaussian(int(self.redraws)), None

    def redraw(self) -> None:
        """Put new draws into the buffers."""
        w_HMD, b_HM = self.draw()
        self.w_HMD.copy_(w_HMD)
        if b_HM is not None:
            self.b_HM.copy_(b_HM)

    def before_step(self, step):
        if self.adapts and step == 1 and not self.calibrated:
            self.calibrate(self.seen_q_HSD[None], self.seen_k_HSD[None], scale=float(self.seen_scale))
        every = self.config.redraw_every
        if redraw_due(self.redraws, step, every):
            self.redraw()
        first = step == 0 and self.adapts and not self.calibrated
        self.watching = first or bool(self.resamples and every and (step + 1) % every == 0)

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        if self.watching and self.training:
            self.watch(q_BHND.detach(), k_BHND.detach(), mask_BN, scale)
        return super().attend(q_BHND, k_BHND, v_BHND, mask_BN, scale, causal)

    def watch(self, q_BHND, k_BHND, mask_BN, scale) -> None:
        """Remember SAMPLE tokens, evenly spaced over the real ones of the batch."""
        B, _, N, _ = q_BHND.shape
        real = torch.ones(B * N, device=q_BHND.device) if mask_BN is None else mask_BN.flatten()
        count = real.cumsum(0, dtype=torch.int64)
        wanted = 1 + torch.arange(SAMPLE, device=count.device) * count[-1] // SAMPLE
        index = torch.searchsorted(count, wanted).clamp(max=B * N - 1)
        for seen_HSD, x_BHND in ((self.seen_q_HSD, q_BHND), (self.seen_k_HSD, k_BHND)):
            seen_HSD.copy_(x_BHND[index // N, :, index % N].transpose(0, 1))
        self.seen_scale.fill_(scale)

    @torch.no_grad()
    def calibrate(self, q_BHND, k_BHND, mask_BN=None, *, scale=None):
        if not self.adapts:
            return
        scale = self.head_dim**-0.5 if scale is None else scale
        self.watch(q_BHND, k_BHND, mask_BN, scale)
        (mean_q, cov_q), (mean_k, cov_k) = moments(q_BHND, mask_BN), moments(k_BHND, mask_BN)
        if self.centres:
            self.mean_q_HD.copy_(mean_q)
            self.mean_k_HD.copy_(mean_k)
        else:  # second moments around 0
            cov_q, cov_k = (c + m[..., None] * m[:, None] for m, c in ((mean_q, cov_q), (mean_k, cov_k)))
        T = torch.eye(self.head_dim, dtype=torch.float64).repeat(self.heads, 1, 1)
        if self.config.align == "balance":
            T = balance(scale * cov_q, scale * cov_k)
        inverse_T = inverse(T)  # T is symmetric
        cov_q, cov_k = scale * inverse_T @ cov_q @ inverse_T, scale * T @ cov_k @ T
        if self.transforms:
            t = self.temperature(cov_q + cov_k) if self.cools else 1
            self.Tq_HDD.copy_(t * inverse_T)
            self.Tk_HDD.copy_(t * T)
            cov_q, cov_k = t**2 * cov_q, t**2 * cov_k
        self.fit((cov_q + cov_k) / 2)
        self.calibrated.fill_(True)
        self.redraw()
        super().calibrate(q_BHND, k_BHND, mask_BN, scale=scale)

    def fit(self, Lambda_HDD: torch.Tensor) -> None:
        """What else a method takes from the mean second moment of q' and k', scale included."""

    def temperature(self, total_HDD: torch.Tensor) -> torch.Tensor:
        """t (H, 1, 1), at most 1, that brings the trace of the second moments of q' and k' to target_norm."""
        norm_H11 = total_HDD.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return (self.config.target_norm / norm_H11).sqrt().clamp(max=1)

    def flops(self, B, H, N, D):
        widths = self.transforms * D + self.centres + (0 if self.G_HDD is None else self.feature_dim)
        sides = 2 if self.config.window else 1  # a hybrid needs |G T (q - mq)|^2 too
        return super().flops(B, H, N, D) + sides * 2 * B * H * N * D * widths


def naive_aligned(attention, q, k, v, mask_BN, scale, causal):
    """Feature vectors of q' = G T^-T (q - mq) and k' = G T (k - mk) written out, times exp(s mq.k + s (q - mq).mk)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    w_HMD = attention.w_HMD.to(q.dtype)
    phi_q, phi_k = (naive_phi(w_HMD, scale**0.5 * attention.aligned(x, side)) for x, side in ((q, "q"), (k, "k")))
    if attention.b_HM is not None:
        phi_q = phi_q * attention.b_HM.to(q.dtype).exp()[:, None]
    if attention.centres:
        mean_q_H1D, mean_k_H1D = (x.to(q.dtype)[:, None] for x in (attention.mean_q_HD, attention.mean_k_HD))
        phi_q = phi_q * torch.exp(scale * (q - mean_q_H1D) @ mean_k_H1D.mT)
        phi_k = phi_k * torch.exp(scale * k @ mean_q_H1D.mT)
    return naive_family(attention, phi_q @ phi_k.mT, q, k, v, mask_BN, scale, causal)
