"""Hedgehog: linear attention whose features are learned, spiky like those of softmax."""

from dataclasses import dataclass

import torch
from torch import nn

from models.base import naive_average
from models.features.recurrent import CHUNK, FeatureMap

FLOOR = -40.0  # of the logarithm of a feature: two features multiply to at least e^-80, which fp32 holds


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(FeatureMap):
    """out_i = sum_n phi(q_i).phi(k_n) v_n / sum_n phi(q_i).phi(k_n),   phi(x) = [softmax(W x), softmax(-W x)]

    over 2 D features, W of each head learned from the identity on, the same for q and k (Zhang et al.,
    arXiv 2402.04347, section 4.2). Causal: n <= i. Otherwise every token sees all tokens: no head runs backward.

    The paper distils its maps, one of q and one of k, from a softmax model; here W is trained with all else. The paper
    has no scale: q and k are multiplied by sqrt(scale sqrt(D)), which is 1 at the default. A feature is at least e^-40,
    so that no sum over keys is zero; sums are in fp32 at least. 12 B H N D^2 operations, 4 of them for W. Causal:
    chunks of 64 tokens attend to themselves directly, and to the past through its state of 2 D (D + 1) numbers a head.
    """

    Config = Config

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.map_HDD = nn.Parameter(torch.eye(self.head_dim).repeat(self.heads, 1, 1))

    def features(self, x_BHND, scale):
        map_HDD = (scale * self.head_dim**0.5) ** 0.5 * self.map_HDD.to(x_BHND.dtype)
        return phi(x_BHND @ map_HDD.transpose(-1, -2))

    def flops(self, B, H, N, D):
        return 4 * B * H * N * D * D + 4 * B * H * N * D * (2 * D + 2)

    def state_bytes(self, N):
        return 4 * self.heads * (N * (4 * self.head_dim + CHUNK) + 2 * self.head_dim * (self.head_dim + 1))


def phi(x: torch.Tensor) -> torch.Tensor:
    """[softmax(x), softmax(-x)], each at least e^-40."""
    return torch.cat([x.log_softmax(-1), (-x).log_softmax(-1)], -1).clamp(min=FLOOR).exp()


def naive_hedgehog(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """The same with the N x N matrix written out."""
    stretch = 1 if scale is None else (scale * q.shape[-1] ** 0.5) ** 0.5
    logits = (stretch * torch.einsum("hde,bhne->bhnd", attention.map_HDD, x) for x in (q, k))
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in logits)
    return naive_average(phi_q @ phi_k.transpose(-1, -2), v, mask_BN, causal)
