"""Linear transformer: softmax replaced by a product of positive feature maps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.base import naive_average
from models.features.recurrent import FeatureMap

FLOOR = -40.0  # of the exponent: two features multiply to at least e^-80, which fp32 holds


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(FeatureMap):
    """out_i = sum_n phi(q_i).phi(k_n) v_n / sum_n phi(q_i).phi(k_n), phi(x) = elu(x) + 1, coordinate by coordinate
    (Katharopoulos et al., arXiv 2006.16236, eq. 4 and 7; causal, n <= i, eq. 8 to 12; `step` eq. 18 to 20).

    The paper has no scale. Here q and k are multiplied by sqrt(scale sqrt(D)): by 1 at the default scale, and
    by a temperature relative to it at any other. phi is at least e^-40 = 4e-18, so that no sum over keys is
    ever zero; sums are in fp32 at least. 4 B H N D^2 operations. Causal: chunks of 64 tokens attend to
    themselves directly and to the past through its state, D^2 numbers a chunk.
    """

    Config = Config

    def features(self, x_BHND, scale):
        return phi((scale * self.head_dim**0.5) ** 0.5 * x_BHND)

    def flops(self, B, H, N, D):
        return 4 * B * H * N * D * D

    def state_bytes(self, N):
        return 4 * self.heads * (2 * N * self.head_dim + self.head_dim * (self.head_dim + 1))


def phi(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 as exp(min(x, 0)) + max(x, 0): adding 1 to elu would round everything below e^-17 to zero."""
    return x.clamp(FLOOR, 0).exp() + x.relu()


def naive_linear(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equation 4 (causal: 9) with the N x N matrix written out, phi as in equation 7."""
    stretch = 1 if scale is None else (scale * q.shape[-1] ** 0.5) ** 0.5
    phi_q, phi_k = (F.elu(stretch * x) + 1 for x in (q, k))
    return naive_average(phi_q @ phi_k.transpose(-1, -2), v, mask_BN, causal)
