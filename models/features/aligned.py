"""Aligning queries and keys before random features see them, at no change to the attention they estimate.

Two transformations leave softmax over keys exactly as it was:

    centre    q.k = (q - mq).(k - mk) + mq.k + (what depends on q alone, and cancels)
    balance   q.k = (T^-T q).(T k)

so features may be taken of q' = T^-T (q - mq) and k' = T (k - mk), with scale mq.k_n added to the key bias. The
closer to zero q' and k' are, the less the features vary. In the engine, w.G q' and w.G k' (G = I but in
darkformer) give aq = s^1/2 w G T^-T, ak = s^1/2 w G T, the feature bias -(aq.mq + ak.mk) + b and the key bias
s mq.k - s |G T (k - mk)|^2 / 2. Means and T come from data, once (`calibrate`); any values are exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from models.base import naive_average, option
from models.features.family import (
    Maps,
    RandomFeatureAttention,
    RandomFeatureConfig,
    naive_phi,
)
from models.features.projections import balance, moments
from models.products import half_square


@dataclass(frozen=True, kw_only=True)
class AlignedConfig(RandomFeatureConfig):
    """Options of methods that can align queries and keys."""

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


class AlignedAttention(RandomFeatureAttention):
    """Base of methods that can align. `config` is an AlignedConfig."""

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.register_buffer("b_HM", None)  # log importance weights, where w is not drawn from N(0, I)
        if config.learn_mean and config.align == "none":
            raise ValueError("learn_mean=True needs align=centre or align=balance; got align=none")
        if config.target_norm < 0:
            raise ValueError(f"target_norm must be 0 (keep the kernel) or more; got {config.target_norm}")
        if config.align != "none":
            for name in ("mean_q_HD", "mean_k_HD"):
                mean_HD = torch.zeros(self.heads, self.head_dim)
                if config.learn_mean:
                    self.register_parameter(name, nn.Parameter(mean_HD))
                else:
                    self.register_buffer(name, mean_HD)
        if self._transforms:
            for name in ("Tq_HDD", "Tk_HDD"):  # t T^-T and t T
                self.register_buffer(name, torch.eye(self.head_dim).repeat(self.heads, 1, 1))

    @property
    def adapts(self):
        return self.config.align != "none" or self._transforms

    @property
    def cools(self) -> bool:
        """Whether the temperature of target_norm is part of T."""
        return self.config.target_norm > 0

    @property
    def _transforms(self):
        return self.config.align == "balance" or self.cools

    def geometry(self) -> torch.Tensor | None:
        """G (H or 1, feature_dim, D), a learned map of q' and k'; None = the identity."""
        return None

    def aligned(self, x_BHND: torch.Tensor, side: Literal["q", "k"]) -> torch.Tensor:
        """G T (x - mean), (B, H, N, feature_dim): what features are taken of, but for the root of the scale."""
        if self.config.align != "none":
            x_BHND = x_BHND - getattr(self, f"mean_{side}_HD")[:, None].to(x_BHND.dtype)
        if self._transforms:
            x_BHND = x_BHND @ getattr(self, f"T{side}_HDD").mT.to(x_BHND.dtype)
        G_HRD = self.geometry()
        return x_BHND if G_HRD is None else x_BHND @ G_HRD.mT.to(x_BHND.dtype)

    def maps(self, k_BHND, scale):
        dtype, G_HRD = k_BHND.dtype, self.geometry()
        aq_HMD = scale**0.5 * self.w_HMD.to(dtype)
        if G_HRD is not None:
            aq_HMD = aq_HMD @ G_HRD.to(dtype)
        ak_HMD, bias_HM = aq_HMD, self.b_HM
        if self._transforms:
            aq_HMD, ak_HMD = aq_HMD @ self.Tq_HDD.to(dtype), aq_HMD @ self.Tk_HDD.to(dtype)
        key_bias_BHN = -scale * half_square(self.aligned(k_BHND, "k"))
        if self.config.align != "none":
            mean_q_HD1, mean_k_HD1 = (x.to(dtype)[..., None] for x in (self.mean_q_HD, self.mean_k_HD))
            key_bias_BHN = key_bias_BHN + scale * (k_BHND @ mean_q_HD1)[..., 0]
            shift_HM = (aq_HMD @ mean_q_HD1 + ak_HMD @ mean_k_HD1)[..., 0]
            bias_HM = -shift_HM if bias_HM is None else bias_HM.to(dtype) - shift_HM
        return Maps(aq_HMD, ak_HMD, key_bias_BHN, bias_HM)

    @torch.no_grad()
    def calibrate(self, q_BHND, k_BHND, mask_BN=None, *, scale=None):
        if not self.adapts:
            return
        scale = self.head_dim**-0.5 if scale is None else scale
        self._watch(q_BHND, k_BHND, mask_BN, scale)
        (mean_q, cov_q), (mean_k, cov_k) = moments(q_BHND, mask_BN), moments(k_BHND, mask_BN)
        if self.config.align == "none":
            cov_q, cov_k = (c + m[..., None] * m[:, None] for m, c in ((mean_q, cov_q), (mean_k, cov_k)))
        else:
            self.mean_q_HD.copy_(mean_q)
            self.mean_k_HD.copy_(mean_k)
        T = torch.eye(self.head_dim, dtype=torch.float64).repeat(self.heads, 1, 1)
        if self.config.align == "balance":
            T = balance(scale * cov_q, scale * cov_k)
        inverse_T = torch.linalg.inv(T).mT
        cov_q, cov_k = scale * inverse_T @ cov_q @ inverse_T.mT, scale * T @ cov_k @ T.mT
        if self._transforms:
            t = self.temperature(cov_q + cov_k) if self.cools else 1
            self.Tq_HDD.copy_(t * inverse_T)
            self.Tk_HDD.copy_(t * T)
            cov_q, cov_k = t**2 * cov_q, t**2 * cov_k
        self._fit((cov_q + cov_k) / 2)
        self.calibrated.fill_(True)
        self._redraw()

    def temperature(self, total_HDD: torch.Tensor) -> torch.Tensor:
        """t (H, 1, 1), at most 1, that brings the trace of the second moments of q' and k' to target_norm."""
        norm_H11 = total_HDD.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return (self.config.target_norm / norm_H11).sqrt().clamp(max=1)

    def _fit(self, Lambda_HDD: torch.Tensor) -> None:
        """What else a method takes from the mean second moment of q' and k', scale included."""

    def flops(self, B, H, N, D):
        transforms = (
            self._transforms * 2 * B * H * N * D * D + (self.config.align != "none") * 2 * B * H * N * D
        )
        return super().flops(B, H, N, D) + transforms


def naive_aligned(attention, q, k, v, mask_BN, scale, causal):
    """Feature vectors of G T^-T (q - mq) and G T (k - mk), the keys' times exp(s mq.k), written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    w_HMD = attention.w_HMD.to(q.dtype)
    phi_q, phi_k = (
        naive_phi(w_HMD, scale**0.5 * attention.aligned(x, side)) for x, side in ((q, "q"), (k, "k"))
    )
    if attention.b_HM is not None:
        phi_q = phi_q * attention.b_HM.to(q.dtype).exp()[:, None]
    if attention.config.align != "none":
        phi_k = (
            phi_k
            * torch.exp(scale * torch.einsum("hd,bhnd->bhn", attention.mean_q_HD.to(q.dtype), k))[..., None]
        )
    return naive_average(phi_q @ phi_k.transpose(-1, -2), v, mask_BN, causal)
