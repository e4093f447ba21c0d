"""Local attention: a sliding window around every token."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from models.base import AttentionBase, alibi, option, real_first, real_rows, require, take


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the window."""

    window: int = option(64, "tokens a query sees on each side of itself; causal: behind itself", budget=True)


class Attention(AttentionBase):
    """out_i = sum_n softmax_n(scale q_i.k_n) v_n over |i - n| <= window, causal 0 <= i - n <= window
    (Longformer's sliding window, Beltagy et al., arXiv 2004.05150, section 3.1, without its global tokens; the
    paper's window w counts both sides). Equals softmax from window = N - 1 on.

    Distances, ALiBi's too, count real tokens: padding between two tokens does not move them apart, so `step`,
    which keeps the last `window` keys and values, agrees with it. Blocks of `window` queries attend to their
    own block and its neighbours: 12 B H N window D operations (causal 8), O(N window) memory.
    """

    Config = Config
    causal = True
    recurrent = True
    linear_memory = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, window=1)
        self.register_buffer("slopes_H", None, persistent=False)  # of ALiBi

    def add_alibi(self, slopes_H):
        self.slopes_H = slopes_H

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        if mask_BN is None:
            everyone_BN = torch.ones_like(q_BHND[:, 0, :, 0], dtype=torch.bool)
            return self._window(q_BHND, k_BHND, v_BHND, everyone_BN, scale, causal)
        # Real tokens to the front, in their order.
        order_BN = real_first(mask_BN)
        packed = (take(x, order_BN) for x in (q_BHND, k_BHND, v_BHND))
        out_BHND = self._window(*packed, mask_BN.gather(1, order_BN), scale, causal)
        return take(out_BHND, order_BN.argsort(1)).masked_fill(~real_rows(mask_BN), 0)

    def _window(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        """`attend` by blocks, real tokens first. K is the number of keys of a block."""
        B, H, N, D = q_BHND.shape
        L = min(self.config.window, N)
        J = -(-N // L)
        shifts = [0] if J == 1 else [-1, 0] if causal else [-1, 0, 1]
        q_BJHLD, k_BJHKD, v_BJHKD = (
            blocks(x.transpose(1, 2), L, s).transpose(2, 3)
            for x, s in ((q_BHND, [0]), (k_BHND, shifts), (v_BHND, shifts))
        )
        key_BJ1K = blocks(mask_BN[..., None, None], L, shifts)[..., 0].transpose(2, 3)
        query_L1 = torch.arange(L, device=q_BHND.device)[:, None]
        ahead_LK = torch.arange(len(shifts) * L, device=q_BHND.device) + shifts[0] * L - query_L1
        near_LK = ahead_LK.abs() <= self.config.window
        if causal:
            near_LK = near_LK & (ahead_LK <= 0)
        # A query that is padding sees itself, so that its softmax stays finite.
        allowed = ((near_LK & key_BJ1K) | (ahead_LK == 0)).flatten(0, 1)[:, None]
        if self.slopes_H is not None:
            bias_HLK = -self.slopes_H[:, None, None] * ahead_LK.abs()
            allowed = bias_HLK.masked_fill(~allowed, float("-inf")).to(q_BHND.dtype)
        out_JHLD = F.scaled_dot_product_attention(
            *(x.flatten(0, 1) for x in (q_BJHLD, k_BJHKD, v_BJHKD)), attn_mask=allowed, scale=scale
        )
        return out_JHLD.view(B, J, H, L, D).transpose(2, 3).reshape(B, J * L, H, D)[:, :N].transpose(1, 2)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        K, (B, H, D) = self.config.window, q_BHD.shape
        if state is None:
            empty_BHKD = k_BHD.new_zeros(B, H, K, D)
            state = empty_BHKD, empty_BHKD, torch.zeros(B, 1, 1, 1, dtype=torch.int64, device=q_BHD.device)
        old_k_BHKD, old_v_BHKD, seen_B111 = state
        # The last `window` tokens, oldest first, and the new one behind them.
        k = torch.cat([old_k_BHKD, k_BHD[:, :, None]], 2)
        v = torch.cat([old_v_BHKD, v_BHD[:, :, None]], 2)
        ago = torch.arange(K, -1, -1, device=q_BHD.device)
        allowed = ago <= seen_B111
        if self.slopes_H is not None:
            bias = -self.slopes_H[:, None, None] * ago
            allowed = bias.masked_fill(~allowed, float("-inf")).to(q_BHD.dtype)
        out_BH1D = F.scaled_dot_product_attention(q_BHD[:, :, None], k, v, attn_mask=allowed, scale=scale)
        real = (torch.ones_like(seen_B111) if mask_B is None else mask_B.view(B, 1, 1, 1)).bool()
        kept = torch.where(real, k[:, :, 1:], old_k_BHKD), torch.where(real, v[:, :, 1:], old_v_BHKD)
        return out_BH1D[:, :, 0], (*kept, seen_B111 + real)

    def flops(self, B, H, N, D):
        L = min(self.config.window, N)
        J = -(-N // L)
        return 4 * B * H * J * L * (L if J == 1 else 3 * L) * D

    def state_bytes(self, N):
        L = min(self.config.window, N)
        keys = -(-N // L) * (L if L == N else 3 * L)
        return 4 * keys * (2 * self.heads * self.head_dim + L)  # keys and values by block, and who sees whom


def blocks(x_BNHD: torch.Tensor, L: int, shifts: list[int]) -> torch.Tensor:
    """Blocks of L tokens, each joined with the blocks at the given consecutive shifts: (B, J, L * shifts, H, D).

    Zeros, or False, beyond both ends.
    """
    B, N, H, D = x_BNHD.shape
    J = -(-N // L)
    before, after = -shifts[0] * L, shifts[-1] * L
    padded = F.pad(x_BNHD, (0, 0, 0, 0, before, J * L - N + after)).view(B, -1, L, H, D)
    return torch.cat([padded[:, s : s + J] for s in range(len(shifts))], 2)


def naive_local(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """Section 3.1, one row at a time on its real tokens alone: a full matrix of logits, cut to the band."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = torch.arange(q.shape[2]) if mask_BN is None else mask_BN[b].nonzero()[:, 0]
        logits_HNN = scale * q[b][:, real] @ k[b][:, real].transpose(-1, -2)
        if attention.slopes_H is not None:
            logits_HNN = logits_HNN + alibi(attention.slopes_H.to(q.dtype), len(real))
        ahead_NN = torch.arange(len(real)) - torch.arange(len(real))[:, None]
        beyond_NN = (ahead_NN.abs() > attention.config.window) | (causal & (ahead_NN > 0))
        out[b, :, real] = logits_HNN.masked_fill(beyond_NN, float("-inf")).softmax(-1) @ v[b][:, real]
    return out
