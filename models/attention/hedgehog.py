"""Hedgehog: linear attention whose features are learned, spiky like those of softmax."""

from dataclasses import dataclass

import torch
from torch import nn

from models.base import AttentionBase, naive_average
from models.features.recurrent import CHUNK, scan

FLOOR = -40.0  # of the logarithm of a feature: two features multiply to at least e^-80, which fp32 holds


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(AttentionBase):
    """out_i = sum_n phi(q_i).phi(k_n) v_n / sum_n phi(q_i).phi(k_n),   phi(x) = [softmax(W x), softmax(-W x)]

    over 2 D features, W of each head learned from the identity on, the same for q and k (Zhang et al.,
    arXiv 2402.04347, section 4.2). Causal: n <= i. Otherwise every token sees all tokens: no head runs backward.

    The paper distils its maps, one of q and one of k, from a softmax model; here W is trained with all else. The paper
    has no scale: q and k are multiplied by sqrt(scale sqrt(D)), which is 1 at the default. A feature is at least e^-40,
    so that no sum over keys is zero; sums are in fp32 at least. 12 B H N D^2 operations, 4 of them for W. Causal:
    chunks of 64 tokens attend to themselves directly, and to the past through its state of 2 D (D + 1) numbers a head.
    """

    Config = Config
    causal = True
    recurrent = True
    linear_memory = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.map_HDD = nn.Parameter(torch.eye(self.head_dim).repeat(self.heads, 1, 1))

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        dtype = v_BHND.dtype
        with torch.autocast(v_BHND.device.type, enabled=False):
            q, k, v = self._features(q_BHND, k_BHND, v_BHND, scale)
            if mask_BN is not None:
                k = k.masked_fill(~mask_BN[:, None, :, None], 0)
            # The last column sums the weights.
            both = scan(q, k, v, None) if causal else q @ (k.transpose(-1, -2) @ v)
            return divide(both).to(dtype)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        scale = self.head_dim**-0.5 if scale is None else scale
        q, k, v = (x[:, :, 0] for x in self._features(*(x[:, :, None] for x in (q_BHD, k_BHD, v_BHD)), scale))
        if mask_B is not None:
            k = k.masked_fill(~mask_B[:, None, None], 0)
        state = (0 if state is None else state) + k[..., :, None] * v[..., None, :]
        return divide((q[..., None] * state).sum(-2)).to(v_BHD.dtype), state

    def _features(self, q, k, v, scale):
        """phi(q), phi(k), and v with a column of ones, in fp32 at least."""
        wide = torch.promote_types(v.dtype, torch.float32)
        map_HDD = (scale * self.head_dim**0.5) ** 0.5 * self.map_HDD.to(wide)
        return *(phi(x.to(wide) @ map_HDD.transpose(-1, -2)) for x in (q, k)), nn.functional.pad(
            v.to(wide), (0, 1), value=1
        )

    def flops(self, B, H, N, D):
        return 4 * B * H * N * D * D + 4 * B * H * N * D * (2 * D + 2)

    def state_bytes(self, N):
        return 4 * self.heads * (N * (4 * self.head_dim + CHUNK) + 2 * self.head_dim * (self.head_dim + 1))


def phi(x: torch.Tensor) -> torch.Tensor:
    """[softmax(x), softmax(-x)], each at least e^-40."""
    return torch.cat([x.log_softmax(-1), (-x).log_softmax(-1)], -1).clamp(min=FLOOR).exp()


def divide(both: torch.Tensor) -> torch.Tensor:
    """All columns but the last over the last; 0 where that is 0, because there is no real token."""
    total, weight = both[..., :-1], both[..., -1:]
    return total / weight.masked_fill(weight == 0, 1)


def naive_hedgehog(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """The same with the N x N matrix written out."""
    stretch = 1 if scale is None else (scale * q.shape[-1] ** 0.5) ** 0.5
    logits = (stretch * torch.einsum("hde,bhne->bhnd", attention.map_HDD, x) for x in (q, k))
    phi_q, phi_k = (torch.cat([x.softmax(-1), (-x).softmax(-1)], -1) for x in logits)
    return naive_average(phi_q @ phi_k.transpose(-1, -2), v, mask_BN, causal)
