"""Linformer: keys and values projected to a fixed length."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from models.base import AttentionBase, option, require


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the low-rank projection."""

    projected_length: int = option(64, "projected length K of keys and values", budget=True)
    share: Literal["none", "heads", "kv", "layers"] = option(
        "layers", "one projection per: none = head and k/v, heads = k/v and layer, kv = layer, layers = model"
    )


class Attention(AttentionBase):
    """out = softmax(scale q (P k)^T) (R v), P and R learned, (K, max_len)  (Wang et al., arXiv 2006.04768, eq. 7).

    The paper calls P and R E_i and F_i, and K k. Padded keys and values are zeroed before the projection; a
    shorter batch uses the first N columns. Not causal: every projected key mixes all positions.
    8 B H N K D operations, O(N K) memory.
    """

    Config = Config
    linear_memory = fixed_length = half = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, projected_length=1)
        heads = self.heads if config.share == "none" else 1
        # Entries of variance 1 / max_len keep a projected key at the scale of a key.
        std = self.max_len**-0.5
        self.project_k_HKN = nn.Parameter(std * torch.randn(heads, config.projected_length, self.max_len))
        if config.share in ("none", "heads"):
            self.project_v_HKN = nn.Parameter(std * torch.randn(heads, config.projected_length, self.max_len))
        else:
            self.project_v_HKN = self.project_k_HKN

    def tie(self, first):
        if self.config.share == "layers":
            self.project_k_HKN = self.project_v_HKN = first.project_k_HKN

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        N = q_BHND.shape[2]
        k_BHKD = self.project_k_HKN[..., :N].to(k_BHND.dtype) @ k_BHND
        v_BHKD = self.project_v_HKN[..., :N].to(v_BHND.dtype) @ v_BHND
        return F.scaled_dot_product_attention(q_BHND, k_BHKD, v_BHKD, scale=scale)

    def flops(self, B, H, N, D):
        return 8 * B * H * N * self.config.projected_length * D

    def state_bytes(self, N):
        return 4 * self.heads * (2 * self.config.projected_length * self.head_dim + N)


def naive_linformer(attention, q, k, v, mask_BN=None, *, scale=None):
    """Equation 7, one batch element and head at a time, on the real tokens only."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if mask_BN is None else mask_BN[b].nonzero()[:, 0]
        for h in range(q.shape[1]):
            P = attention.project_k_HKN.to(q.dtype)[h % len(attention.project_k_HKN)][:, real]
            R = attention.project_v_HKN.to(q.dtype)[h % len(attention.project_v_HKN)][:, real]
            out[b, h] = torch.softmax(scale * q[b, h] @ (P @ k[b, h, real]).T, -1) @ (R @ v[b, h, real])
    return out
