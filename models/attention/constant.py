"""Uniform averaging: the floor that every attention has to beat."""

from dataclasses import dataclass

import torch

from models.features.recurrent import Recurrence


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(Recurrence):
    """out_i = mean of v_n over the real tokens n, the same for every i (a floor of arXiv 2603.04127).

    Causal: over the real tokens up to i. Trained like any other method. Where it ties softmax, the task at
    that size does not measure attention. 2 B H N D operations.
    """

    Config = Config
    reads_qk = False

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        real_BN = torch.ones_like(v_BHND[:, 0, :, 0], dtype=torch.bool) if mask_BN is None else mask_BN
        real_B1N1 = real_BN[:, None, :, None]
        if causal:
            return v_BHND.cumsum(2) / real_B1N1.cumsum(2).clamp(min=1)
        mean_BH1D = v_BHND.sum(2, keepdim=True) / real_B1N1.sum(2, keepdim=True).clamp(min=1)
        return mean_BH1D.expand_as(v_BHND)

    def advance(self, q_BHD, k_BHD, v_BHD, state, scale):
        total, count = state[0] + v_BHD, state[1] + torch.ones_like(v_BHD[:, :1, :1])
        return total / count, (total, count)

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        return v_BHND.sum(2), mask_BN.sum(1)[:, None, None].to(v_BHND.dtype)

    def flops(self, B, H, N, D):
        return 2 * B * H * N * D

    def state_bytes(self, N):
        return 4 * self.heads * self.head_dim


def naive_constant(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """The mean of the real values, one row at a time."""
    out = torch.zeros_like(v)
    for b in range(v.shape[0]):
        real = torch.ones(v.shape[2], dtype=torch.bool) if mask_BN is None else mask_BN[b]
        for i in range(v.shape[2]):
            seen = real & (torch.arange(v.shape[2]) <= i) if causal else real
            if seen.any():
                out[b, :, i] = v[b][:, seen].mean(1)
    return out
