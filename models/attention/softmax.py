"""Exact softmax attention: the baseline of every ratio."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.base import AttentionBase, alibi, naive_average, packed, real_rows


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(AttentionBase):
    """out_i = sum_n softmax_n(scale q_i.k_n) v_n  (Vaswani et al., arXiv 1706.03762, eq. 1).

    PyTorch's fused kernel: 4 B H N^2 D operations (half of them causal), O(N) memory; with ALiBi a bias of
    (B, H, N, N) besides.
    """

    Config = Config
    exact = causal = half = True
    linear_memory = True  # the fused kernel never holds the N x N matrix

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.register_buffer("slopes_H", None, persistent=False)  # of ALiBi

    def add_alibi(self, slopes_H):
        self.slopes_H = slopes_H

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        qkv = q_BHND, k_BHND, v_BHND
        if self.slopes_H is not None:
            return self._biased(*qkv, mask_BN, scale, causal)
        if mask_BN is None:
            return F.scaled_dot_product_attention(*qkv, scale=scale, is_causal=causal)
        real = real_rows(mask_BN)
        if causal:
            # Padding behind the real tokens is the future, and needs no N x N mask.
            causally = functools.partial(F.scaled_dot_product_attention, scale=scale, is_causal=True)
            return packed(lambda q, k, v, _: causally(q, k, v), mask_BN, *qkv)
        # A row without real tokens may look anywhere: its softmax stays finite, and its output becomes 0.
        allowed_B11N = mask_BN[:, None, None, :] | ~real
        out_BHND = F.scaled_dot_product_attention(*qkv, attn_mask=allowed_B11N, scale=scale)
        return out_BHND.masked_fill(~real, 0)

    def _biased(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        """With ALiBi's distances, and -inf where a token may not look, as one additive bias."""
        bias_BHNN = alibi(self.slopes_H, q_BHND.shape[2])[None]
        if causal:
            bias_BHNN = bias_BHNN + torch.full_like(bias_BHNN[0, 0], float("-inf")).triu(1)
        if mask_BN is not None:
            bias_BHNN = bias_BHNN.masked_fill(~mask_BN[:, None, None, :], float("-inf"))
        blind = bias_BHNN.isneginf().all(-1, keepdim=True)
        bias_BHNN = bias_BHNN.masked_fill(blind, 0).to(q_BHND.dtype)
        out_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=bias_BHNN, scale=scale)
        return out_BHND.masked_fill(blind, 0)

    def flops(self, B, H, N, D):
        return 4 * B * H * N * N * D

    def state_bytes(self, N):
        return 4 * self.heads * N  # the log-sum-exp of each query


def naive_softmax(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Equation 1 with the N x N matrix written out."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits_BHNN = scale * q @ k.transpose(-1, -2)
    if attention.slopes_H is not None:
        logits_BHNN = logits_BHNN + alibi(attention.slopes_H.to(q.dtype), q.shape[2])
    return naive_average(torch.exp(logits_BHNN), v, mask_BN, causal)
