"""Uniform averaging: the floor that every attention has to beat."""

from dataclasses import dataclass

import torch

from models.base import AttentionBase


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(AttentionBase):
    """out_i = mean of v_n over the real tokens n, the same for every i (a floor of arXiv 2603.04127).

    Causal: over the real tokens up to i. Trained like any other method. Where it ties softmax, the task at
    that size does not measure attention. 2 B H N D operations.
    """

    Config = Config
    causal = True
    recurrent = True
    linear_memory = True
    reads_qk = False

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        # Summed in fp32 at least: a sum over thousands of tokens overflows fp16.
        wide = torch.promote_types(v_BHND.dtype, torch.float32)
        B, _, N, _ = v_BHND.shape
        if mask_BN is None:
            mask_BN = torch.ones(B, N, dtype=torch.bool, device=v_BHND.device)
        real_B1N1 = mask_BN[:, None, :, None]
        if causal:
            mean = v_BHND.cumsum(2, dtype=wide) / real_B1N1.cumsum(2).clamp(min=1)
        else:
            mean = v_BHND.sum(2, keepdim=True, dtype=wide) / real_B1N1.sum(2, keepdim=True).clamp(min=1)
        return mean.to(v_BHND.dtype).expand_as(v_BHND)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        wide = torch.promote_types(v_BHD.dtype, torch.float32)
        v = v_BHD.to(wide)
        real_B11 = torch.ones_like(v[:, :1, :1]) if mask_B is None else mask_B[:, None, None].to(wide)
        total, count = state or (torch.zeros_like(v), torch.zeros_like(real_B11))
        total, count = total + v.where(real_B11 > 0, 0), count + real_B11
        return (total / count.clamp(min=1)).to(v_BHD.dtype), (total, count)

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
