"""DARKFormer: random features whose covariance Sigma = G^T G is learned."""

from dataclasses import dataclass

import torch
from torch import nn

from models.attention._features import FeatureConfig, Maps, RandomFeatureAttention, naive_features


@dataclass(frozen=True, kw_only=True)
class Config(FeatureConfig):
    """Options of the data-aware random kernel."""


class Attention(RandomFeatureAttention):
    """Unbiased estimate of the kernel exp(scale q^T Sigma k), normalised, Sigma = G^T G (arXiv 2603.04127).

    The engine with a_j = sqrt(scale) G^T w_j, so that a_j ~ N(0, scale Sigma), and key bias
    -scale |G k|^2 / 2. The paper calls the geometry matrix M; M here is the number of features. G, one D x D
    matrix per head, starts at the identity: DARKFormer then is Performer.
    8 B H N M D + 2 B H N D^2 operations, O(N + M) memory.
    """

    Config = Config

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.G_HDD = nn.Parameter(torch.eye(self.head_dim).repeat(self.heads, 1, 1))

    def maps(self, k_BHND, scale):
        G_HDD = self.G_HDD.to(k_BHND.dtype)
        a_HMD = scale**0.5 * self.w_HMD.to(k_BHND.dtype) @ G_HDD
        Gk_BHND = k_BHND @ G_HDD.transpose(-1, -2)
        return Maps(a_HMD, a_HMD, -0.5 * scale * Gk_BHND.square().sum(-1))

    def flops(self, B, H, N, D):
        return super().flops(B, H, N, D) + 2 * B * H * N * D * D


def naive_darkformer(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """phi(x) = M^-1/2 exp(w.G x~ - |G x~|^2 / 2), feature vectors written out."""
    w_HMD, G_HDD = attention.w_HMD.to(q.dtype), attention.G_HDD.to(q.dtype)
    return naive_features(q, k, v, w_HMD, G_HDD, mask_BN, scale, causal)
