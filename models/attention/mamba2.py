"""Mamba-2: a state-space model whose state decays by one number per head and token, computed like attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.features.recurrent import CHUNK, Gate, Recurrence, naive_recurrence, outer, product, scan, turned


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(Recurrence):
    """S_i = e^(-rate step_i) S_(i-1) + step_i k_i v_i^T,    out_i = scale q_i S_i + skip v_i

    (state-space duality, Dao and Gu, arXiv 2405.21060, eq. 1 with scalar A: its C, B, X are q, k, v here). `Gate` has
    step and rate, one of each per head. S is D x D numbers. Causal: as written. Without it, the second half of the
    heads runs from right to left, as the paper has no form for both directions. Padding passes no time.

    Computed by the paper's chunks (section 6): 64 tokens attend to themselves through the masked matrix
    e^(-rate (step_(n+1) + ... + step_i)) q_i.k_n, and to the past through its state; 4 B H N D (64 + D) operations, in
    fp32 at least. What the paper's block has around this is left out, as the shared encoder has its own: the
    convolution over four tokens ahead of q, k, v, their SiLU, the gated norm behind. B and C are not shared by heads.
    """

    Config = Config

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.gate = Gate(self.heads, self.head_dim)
        self.skip_H = nn.Parameter(torch.ones(self.heads))

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        step_BHN, log_decay_BHN = self.gate(v_BHND)
        if mask_BN is not None:
            log_decay_BHN = log_decay_BHN.masked_fill(~mask_BN[:, None], 0)
        written_BHND = step_BHN[..., None] * v_BHND
        moving = (turned(x, causal) for x in (scale * q_BHND, k_BHND, written_BHND, log_decay_BHN))
        return turned(scan(*moving), causal) + self.skip_H.to(v_BHND.dtype)[:, None, None] * v_BHND

    def advance(self, q_BHD, k_BHD, v_BHD, state, scale):
        step_BH1, log_decay_BH1 = self.gate(v_BHD[:, :, None])
        S_BHDD = log_decay_BH1[..., None].exp() * state[0] + outer(step_BH1 * k_BHD, v_BHD)
        return scale * product(q_BHD, S_BHDD) + self.skip_H.to(v_BHD.dtype)[:, None] * v_BHD, (S_BHDD,)

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        step_BHN, log_decay_BHN = self.gate(v_BHND)
        since_BHN = log_decay_BHN.where(mask_BN[:, None], 0).flip(-1).cumsum(-1)[..., :-1]
        left_BHN = F.pad(since_BHN, (1, 0)).flip(-1).exp()  # of what token n brought, after the last one
        return ((k_BHND * (left_BHN * step_BHN)[..., None]).mT @ v_BHND,)

    def flops(self, B, H, N, D):
        L = min(CHUNK, N)
        return 4 * B * H * N * D * (L + (D if N > L else 0)) + 2 * B * H * N * H * D

    def state_bytes(self, N):
        L = min(CHUNK, N)
        return 4 * self.heads * (3 * N * L + -(-N // L) * self.head_dim**2)


def naive_mamba2(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """The recurrence, one token, head and row at a time."""
    scale, gate = q.shape[-1] ** -0.5 if scale is None else scale, attention.gate

    def token(b, h, i, state):
        step = torch.log1p(torch.exp(gate.weight_HE[h] @ v[b, :, i].flatten() + gate.bias_H[h]))
        decay = torch.exp(-step * gate.log_rate_H[h].exp())
        state = decay * state + step * torch.outer(k[b, h, i], v[b, h, i])
        return state, scale * q[b, h, i] @ state + attention.skip_H[h] * v[b, h, i]

    return naive_recurrence(v, mask_BN, causal, token)
