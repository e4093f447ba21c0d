"""Performer: softmax attention through positive orthogonal random features (FAVOR+)."""

from dataclasses import dataclass

import torch

from models.attention._features import FeatureConfig, Maps, RandomFeatureAttention, naive_features


@dataclass(frozen=True, kw_only=True)
class Config(FeatureConfig):
    """Options of FAVOR+."""


class Attention(RandomFeatureAttention):
    """Unbiased estimate of the kernel exp(scale q.k), normalised (Choromanski et al., arXiv 2009.14794).

    The engine with a_j = sqrt(scale) w_j and key bias -scale |k|^2 / 2. Our w_j are the
    paper's omega_j; our M its m. 8 B H N M D operations, O(N + M) memory.
    """

    Config = Config

    def maps(self, k_BHND, scale):
        a_HMD = scale**0.5 * self.w_HMD.to(k_BHND.dtype)
        return Maps(a_HMD, a_HMD, -0.5 * scale * k_BHND.square().sum(-1))


def naive_performer(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equations 5-7 of the paper, feature vectors written out."""
    w_HMD = attention.w_HMD.to(q.dtype)
    identity_HDD = torch.eye(q.shape[-1], dtype=q.dtype).expand(q.shape[1], -1, -1)
    return naive_features(q, k, v, w_HMD, identity_HDD, mask_BN, scale, causal)
