"""Linear transformer: softmax replaced by a product of positive feature maps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.base import AttentionBase, naive_average

CHUNK = 64  # tokens between two states of the causal form
FLOOR = -40.0  # of the exponent: two features multiply to at least e^-80, which fp32 holds


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(AttentionBase):
    """out_i = sum_n phi(q_i).phi(k_n) v_n / sum_n phi(q_i).phi(k_n), phi(x) = elu(x) + 1, coordinate by coordinate
    (Katharopoulos et al., arXiv 2006.16236, eq. 4 and 7; causal, n <= i, eq. 8 to 12; `step` eq. 18 to 20).

    The paper has no scale. Here q and k are multiplied by sqrt(scale sqrt(D)): by 1 at the default scale, and
    by a temperature relative to it at any other. phi is at least e^-40 = 4e-18, so that no sum over keys is
    ever zero; sums are in fp32 at least. 4 B H N D^2 operations. Causal: chunks of 64 tokens attend to
    themselves directly and to the past through its state, D^2 numbers a chunk.
    """

    Config = Config
    causal = True
    recurrent = True
    linear_memory = True

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        dtype = v_BHND.dtype
        with torch.autocast(v_BHND.device.type, enabled=False):
            q_BHND, k_BHND, v_BHND = self._features(q_BHND, k_BHND, v_BHND, scale)
            if mask_BN is not None:
                k_BHND = k_BHND.masked_fill(~mask_BN[:, None, :, None], 0)
            if causal:
                return causal_product(q_BHND, k_BHND, v_BHND).to(dtype)
            total_BHND = q_BHND @ (k_BHND.transpose(-1, -2) @ v_BHND)
            weight_BHN1 = q_BHND @ k_BHND.sum(2)[..., None]
            return divide(total_BHND, weight_BHN1).to(dtype)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        dtype, scale = v_BHD.dtype, self.head_dim**-0.5 if scale is None else scale
        q, k, v = self._features(q_BHD, k_BHD, v_BHD, scale)
        if mask_B is not None:
            k = k.masked_fill(~mask_B[:, None, None], 0)
        sum_BHDD, sum_BHD = state or (0, 0)
        state = sum_BHDD + k[..., :, None] * v[..., None, :], sum_BHD + k
        total_BHD, weight_BH1 = (q[..., None] * state[0]).sum(-2), (q * state[1]).sum(-1, keepdim=True)
        return divide(total_BHD, weight_BH1).to(dtype), state

    def _features(self, q, k, v, scale):
        """phi(q), phi(k) and v, in fp32 at least."""
        wide = torch.promote_types(v.dtype, torch.float32)
        stretch = (scale * self.head_dim**0.5) ** 0.5
        return phi(stretch * q.to(wide)), phi(stretch * k.to(wide)), v.to(wide)

    def flops(self, B, H, N, D):
        return 4 * B * H * N * D * D

    def state_bytes(self, N):
        return 4 * self.heads * (2 * N * self.head_dim + self.head_dim * (self.head_dim + 1))


def phi(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1 as exp(min(x, 0)) + max(x, 0): adding 1 to elu would round everything below e^-17 to zero."""
    return x.clamp(FLOOR, 0).exp() + x.relu()


def divide(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total / weight, and 0 where there is no weight because there is no real token."""
    return total / weight.masked_fill(weight == 0, 1)


def causal_product(q_BHND: torch.Tensor, k_BHND: torch.Tensor, v_BHND: torch.Tensor) -> torch.Tensor:
    """sum_(n <= i) q_i.k_n v_n / sum_(n <= i) q_i.k_n for positive q and k, by chunks.

    Only the states between chunks are summed up, J D^2 numbers, not N D^2.
    """
    B, H, N, D = q_BHND.shape
    L = min(CHUNK, N)
    ahead = -N % L  # zeros at the end, which nobody earlier sees
    q, k, v = (F.pad(x, (0, 0, 0, ahead)).view(B, H, -1, L, D) for x in (q_BHND, k_BHND, v_BHND))
    inside_BHJLL = (q @ k.transpose(-1, -2)).tril()
    total_BHJLD = inside_BHJLL @ v + q @ before(k.transpose(-1, -2) @ v)
    weight_BHJL1 = inside_BHJLL.sum(-1, keepdim=True) + q @ before(k.sum(3)[..., None])
    return divide(total_BHJLD, weight_BHJL1).view(B, H, -1, D)[:, :, :N]


def before(x: torch.Tensor) -> torch.Tensor:
    """The sum over the earlier chunks, axis 2: zero for the first."""
    return F.pad(x.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))


def naive_linear(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equation 4 (causal: 9) with the N x N matrix written out, phi as in equation 7."""
    stretch = 1 if scale is None else (scale * q.shape[-1] ** 0.5) ** 0.5
    phi_q, phi_k = (F.elu(stretch * x) + 1 for x in (q, k))
    return naive_average(phi_q @ phi_k.transpose(-1, -2), v, mask_BN, causal)
