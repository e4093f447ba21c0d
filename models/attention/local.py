"""Local attention: a sliding window around every token."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from models.base import AttentionBase, alibi, option, packed, require
from models.features.memory import extended, of


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the window."""

    window: int = option(64, "tokens a query sees on each side of itself; causal: behind itself", budget=True)
    sinks: int = option(0, "first tokens that every token sees besides", later=True)
    shape: Literal["sliding", "blocks"] = option(
        "sliding", "blocks: a query sees its own block of `window` tokens and the neighbouring ones", later=True
    )


class Attention(AttentionBase):
    """out_i = sum_n softmax_n(scale q_i.k_n) v_n over |i - n| <= window, causal 0 <= i - n <= window
    (Longformer's sliding window, Beltagy et al., arXiv 2004.05150, section 3.1, without its global tokens; the
    paper's window w counts both sides). Equals softmax from window = N - 1 on. With `sinks` the first tokens are seen
    by all (attention sinks, Xiao et al., arXiv 2309.17453). With `shape=blocks` it is what a hybrid of random features
    (models/features/family.py) is without its far keys: the floor that the far keys have to beat.

    Distances, ALiBi's too, count real tokens: padding between two tokens does not move them apart, so `step`,
    which keeps the last `window` keys and values, agrees with it. Blocks of `window` queries attend to their
    own block and its neighbours: 12 B H N window D operations (causal 8), O(N window) memory.
    """

    Config = Config
    causal = recurrent = linear_memory = half = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, window=1, sinks=0)
        self.register_buffer("slopes_H", None, persistent=False)  # of ALiBi

    def add_alibi(self, slopes_H):
        self.slopes_H = slopes_H

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        blocks = functools.partial(self._blocks, scale=scale, causal=causal)
        return packed(blocks, mask_BN, q_BHND, k_BHND, v_BHND)

    def _blocks(self, q_BHND, k_BHND, v_BHND, mask_BN, *, scale, causal):
        """`attend` by blocks, real tokens first. K: the sinks and the keys of a block and its neighbours."""
        B, H, N, D = q_BHND.shape
        mask_BN = q_BHND.new_ones(B, N, dtype=torch.bool) if mask_BN is None else mask_BN
        L, S = min(self.config.window, N), min(self.config.sinks, N)
        J = -(-N // L)
        shifts = [0] if J == 1 else [-1, 0] if causal else [-1, 0, 1]
        place_N = torch.arange(J * L, device=q_BHND.device)
        query_JL1 = place_N.view(J, L, 1)
        around_J1K = query_JL1[:, :1] + torch.arange(shifts[0] * L, shifts[-1] * L + L, device=place_N.device)
        key_J1K = torch.cat([place_N[:S].expand(J, 1, S), around_J1K], -1)
        ahead_JLK = key_J1K - query_JL1
        sink_K = torch.arange(key_J1K.shape[-1], device=place_N.device) < S
        allowed_JLK = self._near(key_J1K, query_JL1) ^ sink_K  # a sink that is near is among the near keys already
        if causal:
            allowed_JLK = allowed_JLK & (ahead_JLK <= 0)
        q_BJHLD, k_BJHKD, v_BJHKD, real_BJ1K = (
            blocks(x, L, s, first).transpose(2, 3)
            for x, s, first in (
                (q_BHND.transpose(1, 2), [0], 0),
                *((x.transpose(1, 2), shifts, S) for x in (k_BHND, v_BHND)),
                (mask_BN[..., None, None], shifts, S),
            )
        )
        # A query that is padding sees itself, so that its softmax stays finite.
        itself_JLK = (ahead_JLK == 0) & ~sink_K
        allowed = ((allowed_JLK & real_BJ1K[..., 0]) | itself_JLK).flatten(0, 1)[:, None]
        if self.slopes_H is not None:
            bias = -self.slopes_H[:, None, None] * ahead_JLK.abs()[:, None].repeat(B, 1, 1, 1)
            allowed = bias.masked_fill(~allowed, float("-inf")).to(q_BHND.dtype)
        out_JHLD = F.scaled_dot_product_attention(
            *(x.flatten(0, 1) for x in (q_BJHLD, k_BJHKD, v_BJHKD)), attn_mask=allowed, scale=scale
        )
        return out_JHLD.view(B, J, H, L, D).transpose(2, 3).reshape(B, J * L, H, D)[:, :N].transpose(1, 2)

    def _near(self, key, query):
        """Whether the places of key and query are within the window of each other."""
        if self.config.shape == "sliding":
            return (key - query).abs() <= self.config.window
        return (key // self.config.window - query // self.config.window).abs() <= 1

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        B, H, D = q_BHD.shape
        if state is None:
            none_BHND, none_BN = k_BHD.new_zeros(B, H, 0, D), torch.zeros(B, 0, dtype=torch.bool, device=k_BHD.device)
            state = self.gather(none_BHND, none_BHND, none_BN, scale)
        K, S = state.k_BHKD.shape[2], self.config.sinks
        k_BH1D, v_BH1D, count_B1 = k_BHD[:, :, None], v_BHD[:, :, None], state.count_B[:, None]
        # The sinks, the last K tokens, oldest first, and the new one behind them.
        k = torch.cat([state.sink_k_BHSD, state.k_BHKD, k_BH1D], 2)
        v = torch.cat([state.sink_v_BHSD, state.v_BHKD, v_BH1D], 2)
        index = torch.arange(S + K + 1, device=k.device)
        place_BK = torch.where(index < S, index, index - S - K + count_B1)
        allowed = (place_BK >= 0) & (place_BK <= count_B1) & (self._near(place_BK, count_B1) ^ (index < S))
        allowed = allowed[:, None, None]
        if self.slopes_H is not None:
            bias = -self.slopes_H[:, None, None] * (count_B1 - place_BK)[:, None, None]
            allowed = bias.masked_fill(~allowed, float("-inf")).to(q_BHD.dtype)
        out_BH1D = F.scaled_dot_product_attention(q_BHD[:, :, None], k, v, attn_mask=allowed, scale=scale)
        real_B = torch.ones_like(state.count_B, dtype=torch.bool) if mask_B is None else mask_B
        return out_BH1D[:, :, 0], extended(state, k_BH1D, v_BH1D, real_B)

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        ring = self.config.window * (2 if self.config.shape == "blocks" else 1)
        return of(None, k_BHND, v_BHND, mask_BN, ring, self.config.sinks)

    def _keys(self, N):
        """Blocks, tokens and keys of each."""
        L = min(self.config.window, N)
        return -(-N // L), L, min(self.config.sinks, N) + (L if L == N else 3 * L)

    def flops(self, B, H, N, D):
        J, L, K = self._keys(N)
        return 4 * B * H * J * L * K * D

    def state_bytes(self, N):
        J, L, K = self._keys(N)
        return 4 * J * K * (2 * self.heads * self.head_dim + L)  # keys and values by block, and who sees whom


def blocks(x_BNHD: torch.Tensor, L: int, shifts: list[int], first: int) -> torch.Tensor:
    """Blocks of L tokens, each joined with the blocks at the given consecutive shifts, behind the `first` tokens of
    the row: (B, J, first + L * shifts, H, D). Zeros, or False, beyond both ends."""
    B, N, H, D = x_BNHD.shape
    J = -(-N // L)
    before, after = -shifts[0] * L, shifts[-1] * L
    padded = F.pad(x_BNHD, (0, 0, 0, 0, before, J * L - N + after)).view(B, -1, L, H, D)
    sinks = [x_BNHD[:, None, :first].expand(-1, J, -1, -1, -1)] if first else []
    return torch.cat([*sinks, *(padded[:, s : s + J] for s in range(len(shifts)))], 2)


def naive_local(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Section 3.1, one row at a time on its real tokens alone: a full matrix of logits, cut to band and sinks."""
    scale, W = q.shape[-1] ** -0.5 if scale is None else scale, attention.config.window
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if mask_BN is None else mask_BN[b].nonzero()[:, 0]
        logits_HNN = scale * q[b][:, real] @ k[b][:, real].transpose(-1, -2)
        if attention.slopes_H is not None:
            logits_HNN = logits_HNN + alibi(attention.slopes_H.to(q.dtype), len(real))
        key_N, query_N1 = torch.arange(len(real)), torch.arange(len(real))[:, None]
        if attention.config.shape == "blocks":
            near_NN = (key_N // W - query_N1 // W).abs() <= 1
        else:
            near_NN = (key_N - query_N1).abs() <= W
        hidden_NN = ~(near_NN | (key_N < attention.config.sinks)) | (causal & (key_N > query_N1))
        out[b, :, real] = logits_HNN.masked_fill(hidden_NN, float("-inf")).softmax(-1) @ v[b][:, real]
    return out
