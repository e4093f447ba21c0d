"""Learned feature kernel: the projections themselves are parameters."""

import math
from dataclasses import dataclass

from torch import nn

from models.features.family import FeatureAttention, FeatureConfig, Maps, naive_family, naive_phi
from models.layers import half_square


@dataclass(frozen=True, kw_only=True)
class Config(FeatureConfig):
    """Options of the learned feature kernel."""


class Attention(FeatureAttention):
    """phi_j(x) = M^-1/2 exp(w_j.x~ - |x~|^2 / 2), every w_j learned from a Gaussian draw on (arXiv 2603.04127).

    A baseline of the DARKFormer paper: M D free numbers per head instead of DARKFormer's D^2, and no kernel
    that it estimates once they have moved. 8 B H N M D operations, O(N + M) memory.
    """

    Config = Config

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.w_HMD = nn.Parameter(self.gaussian())

    def maps(self, k_BHND, scale, *, moved=False):
        a_HMD, (x_BHND, square_BHN) = scale**0.5 * self.w_HMD.to(k_BHND.dtype), half_square(k_BHND)
        return Maps(a_HMD, a_HMD, x_BHND, -scale * square_BHN, a_HMD.new_zeros(a_HMD.shape[:2]))

    def log_norm(self, q_BHND, scale):
        return -scale * half_square(q_BHND)[1] - math.log(self.config.num_features)


def naive_lfk(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Feature vectors written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    w_HMD = attention.w_HMD.to(q.dtype)
    phi_q, phi_k = (naive_phi(w_HMD, scale**0.5 * x) for x in (q, k))
    return naive_family(attention, phi_q @ phi_k.mT, q, k, v, mask_BN, scale, causal)
