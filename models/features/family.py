"""The random-feature family: normalised attention with positive random features is two softmax attentions.

With x~ = scale^1/2 x, Sigma = G^T G and w_j ~ N(0, I), positive random features

    phi_j(x) = M^-1/2 exp( w_j.G x~  -  1/2 |G x~|^2 ),    E[phi(q).phi(k)] = exp(q~^T Sigma k~)

(Choromanski et al., arXiv 2009.14794, Lemma 1; G = I there) give, with ak_j = scale^1/2 w_j, aq_j = G^T ak_j, exactly

    l_jn  = ak_j.x_n + key_bias_n               x_n = G k_n    key_bias_n = -1/2 scale |x_n|^2
    L_j   = logsumexp_n l_jn
    Y_j   = sum_n softmax_n(l_jn) v_n                                      features attend to keys
    out_i = sum_j softmax_j(aq_j.q_i + L_j + feature_bias_j) Y_j           queries attend to features

Every output is a convex combination of values, so it is finite in half precision. `window` makes a hybrid of it: exact
softmax attention for near keys, features for the others (models/features/blocks.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from models.base import AttentionBase, naive_average, option, packed, real_rows, require, wide
from models.features import memory
from models.features.blocks import fold, inside, joined, merge, near, read, state_of, sums, unfold
from models.features.flash import NEVER, flash, in_memory, weights
from models.features.projections import gaussian

BLOCK = {"cpu": 128}  # tokens of a block of the causal form without a window
LEAF = 16  # the same where blocks are summed term by term


class Maps(NamedTuple):
    """What makes a method of the family: its two softmaxes, logits aq.q + feature bias and ak.x + key bias, in fp32 at
    least. x are the keys as the features see them, as wide as v."""

    aq_HMD: torch.Tensor
    ak_HMD: torch.Tensor
    x_BHND: torch.Tensor
    key_bias_BHN: torch.Tensor
    feature_bias_HM: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Options of every method of the family."""

    num_features: int = option(64, "random features M per head", budget=True)
    orthogonal: bool = option(True, "draw the projections in orthogonal blocks")
    window: int = option(
        0,
        "exact attention in blocks of this many tokens and to the neighbouring blocks; 0 = features alone",
        later=True,
    )
    sinks: int = option(0, "first tokens that every token sees exactly, at most `window`", later=True)


class FeatureAttention(AttentionBase):
    """Base of the family. A method is its `maps`; `config` is a FeatureConfig.

    With `window` = W > 0, token i attends exactly, with logits scale q.k, to its own block of W tokens, to the blocks
    before and (not causal) behind it, and to the first `sinks` tokens. All other keys weigh what the features
    estimate, times exp(far_H), a number per head that calibration sets. Blocks count real tokens.
    """

    random = causal = recurrent = linear_memory = half = True

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        require(config, num_features=1, window=0, sinks=0)
        if config.sinks > config.window:
            raise ValueError(f"sinks must be at most the window, {config.window} tokens; got {config.sinks}")
        if config.window:
            self.register_buffer("far_H", torch.zeros(self.heads))

    def maps(self, k_BHND: torch.Tensor, scale: float, *, moved: bool = False) -> Maps:
        """The method: called outside of autocast with keys in fp32 at least. `moved`: aq is for queries that `aligned`
        has moved, which costs less where there are fewer queries than features."""
        raise NotImplementedError

    def aligned(self, x_BHND: torch.Tensor, side: Literal["q", "k"]) -> torch.Tensor:
        """The vectors that features are taken of, but for scale^1/2, (B, H, N, feature_dim), of queries or keys."""
        return x_BHND

    def log_norm(self, q_BHND: torch.Tensor, scale: float) -> torch.Tensor:
        """What the log of the estimated mass of query i has beside the lse of the two softmaxes, (B, H, N)."""
        raise NotImplementedError

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        with torch.autocast(v_BHND.device.type, enabled=False):
            if causal or self.config.window:
                blocks = functools.partial(self.by_blocks, scale=scale, causal=causal)
                return packed(blocks, mask_BN, q_BHND, k_BHND, v_BHND).to(v_BHND.dtype)
            maps = self.maps(k_BHND.to(wide(k_BHND.dtype)), scale)
            key_bias_BHN = hidden(maps.key_bias_BHN, mask_BN)
            if q_BHND.shape[2] <= q_BHND.shape[3] and in_memory(q_BHND, maps.aq_HMD[None]):  # P p has few columns
                p_BHMN, L_BHM = weights(maps.ak_HMD, maps.x_BHND, key_bias_BHN)
                P_BHNM, _ = weights(q_BHND, maps.aq_HMD, L_BHM + maps.feature_bias_HM, mass=False)
                out_BHND = P_BHNM @ p_BHMN @ v_BHND.to(P_BHNM)
            else:
                state = state_of(maps.ak_HMD, maps.x_BHND, v_BHND, key_bias_BHN)
                out_BHND, _ = read(q_BHND, maps.aq_HMD, state, maps.feature_bias_HM, mass=False)
            return (out_BHND if mask_BN is None else out_BHND.masked_fill(~real_rows(mask_BN), 0)).to(v_BHND.dtype)

    def by_blocks(self, q_BHND, k_BHND, v_BHND, mask_BN, *, scale, causal):
        """The causal form and the hybrids, by blocks of real tokens, which come first."""
        (B, _, N, _), window, sinks = q_BHND.shape, self.config.window, self.config.sinks
        maps, L = self.maps(k_BHND.to(wide(k_BHND.dtype)), scale), min(window or BLOCK.get(q_BHND.device.type, LEAF), N)
        dead_BHN = hidden(torch.zeros_like(maps.key_bias_BHN), mask_BN)
        q, k, v, x = (fold(t, L) for t in (q_BHND, k_BHND, v_BHND, maps.x_BHND))
        dead, key_bias = fold(dead_BHN, L, NEVER), fold(maps.key_bias_BHN, L) + fold(dead_BHN, L, NEVER)
        reach, parts, far = min(window, 1), [], None
        if N > (1 + reach) * L:
            far_bias = key_bias
            if sinks:
                first = torch.arange(len(q), device=q.device) % (len(q) // B) == 0
                first = first[:, None, None] & (torch.arange(L, device=q.device) < sinks)
                far_bias = key_bias.masked_fill(first, NEVER)
            far = sums(state_of(maps.ak_HMD, x, v, far_bias), B, reach, both=not causal)
            out, lse = read(q, maps.aq_HMD, far, maps.feature_bias_HM)
            if window:
                lse = lse + self.far_H[:, None] + self.log_norm(q.to(lse.dtype), scale)
            parts.append((out, lse))
        if window:
            parts += near(scale * q.to(wide(q.dtype)), k, v, dead, B, sinks, causal=causal)
        else:
            past = torch.full_like(maps.feature_bias_HM, NEVER).expand(len(q), -1, -1) if far is None else far.L_BHM
            shared = maps.aq_HMD, maps.ak_HMD, key_bias, maps.feature_bias_HM
            parts.append(inside(q, x, v, *shared, past))
        return unfold(merge(*parts), B, N)

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        """State: the State of all keys so far, or with a window the Memory."""
        scale = self.head_dim**-0.5 if scale is None else scale
        window, sinks = self.config.window, self.config.sinks
        q, k, v = (x.to(wide(v_BHD.dtype))[:, :, None] for x in (q_BHD, k_BHD, v_BHD))
        real_B = torch.ones_like(q[:, 0, 0, 0], dtype=torch.bool) if mask_B is None else mask_B
        with torch.autocast(q.device.type, enabled=False):
            maps = self.maps(k, scale, moved=True)
            moved = self.aligned(q, "q")
            moved = F.pad(moved, (0, maps.aq_HMD.shape[-1] - moved.shape[-1]))
            if not window:
                new = state_of(maps.ak_HMD, maps.x_BHND, v, hidden(maps.key_bias_BHN, real_B[:, None]))
                state = new if state is None else joined(state, new)
                out, _ = read(moved, maps.aq_HMD, state, maps.feature_bias_HM, mass=False)
                real_B = state.L_BHM.amax((1, 2)) > NEVER / 2  # before the first real token there is nothing to see
            else:
                before = memory.empty(maps, v, window, sinks) if state is None else state
                before = memory.absorbed(before, real_B, window, sinks, lambda k: self.maps(k, scale, moved=True))
                far, lse = read(moved, maps.aq_HMD, before.far, maps.feature_bias_HM)
                exact = flash(scale * q, *memory.near_keys(before, k, v, window))
                out = merge(exact, (far, lse + self.far_H[:, None] + self.log_norm(q, scale)))
                state = memory.extended(before, k, v, real_B)
        return out[:, :, 0].where(real_B[:, None, None], 0).to(v_BHD.dtype), state

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        k, v = (x.to(wide(v_BHND.dtype)) for x in (k_BHND, v_BHND))
        maps, window, sinks, far_BN = self.maps(k, scale, moved=True), self.config.window, self.config.sinks, mask_BN
        if window:  # far: what `step` has absorbed before the last token
            place_BN, count_B1 = mask_BN.cumsum(1) - 1, mask_BN.sum(1, keepdim=True)
            far_BN = mask_BN & (place_BN >= sinks) & (place_BN < ((count_B1 - 1) // window - 1) * window)
        far = state_of(maps.ak_HMD, maps.x_BHND, v, hidden(maps.key_bias_BHN, far_BN))
        return memory.of(far, k, v, mask_BN, 2 * window, sinks) if window else far

    @torch.no_grad()
    def calibrate(self, q_BHND, k_BHND, mask_BN=None, *, scale=None):
        """Set far_H: the mean over queries of the log of the exact mass of all keys less that of the estimated one."""
        if not self.config.window:
            return
        scale = self.head_dim**-0.5 if scale is None else scale
        q, k = (x.to(wide(x.dtype)) for x in (q_BHND, k_BHND))
        maps, dead_BHN = self.maps(k, scale), hidden(torch.zeros_like(k[..., 0]), mask_BN)
        state = state_of(maps.ak_HMD, maps.x_BHND, k, maps.key_bias_BHN + dead_BHN)
        estimated = read(q, maps.aq_HMD, state, maps.feature_bias_HM)[1] + self.log_norm(q, scale)
        gap_BHN, real_BHN = flash(scale * q, k, k, dead_BHN)[1] - estimated, dead_BHN == 0
        self.far_H.copy_(gap_BHN.where(real_BHN, 0).sum((0, 2)) / real_BHN.sum((0, 2)))

    def flops(self, B, H, N, D):
        exact = 0
        if self.config.window:
            L = min(self.config.window, N)
            J = -(-N // L)
            exact = 4 * B * H * J * L * (3 * L + self.config.sinks) * D
            if J <= 2:
                return exact
        return 8 * B * H * N * self.config.num_features * D + exact

    def state_bytes(self, N):
        M, W = self.config.num_features, min(self.config.window, N)
        blocks = -(-N // W) if W else 1
        return 4 * self.heads * (blocks * M + (4 * N if W else 0)) * (self.head_dim + 1)  # Y and L; near keys

    @property
    def feature_dim(self) -> int:
        """Width of the vectors that the projections are drawn for."""
        return self.head_dim

    def gaussian(self, redraw: int = 0, *, pool: int = 1) -> torch.Tensor:
        """`pool` times as many projections as there are features, (H, pool M, feature_dim)."""
        size = self.heads, pool * self.config.num_features, self.feature_dim
        key = {"seed": self.seed, "layer": self.layer, "redraw": redraw}
        return gaussian(*size, orthogonal=self.config.orthogonal, **key)


def hidden(bias_BHN: torch.Tensor, mask_BN: torch.Tensor | None) -> torch.Tensor:
    """Biases of keys, NEVER at padding."""
    return bias_BHN if mask_BN is None else bias_BHN.masked_fill(~mask_BN[:, None], NEVER)


def naive_phi(w_HMD, x_BHND):
    """exp(w.x - |x|^2 / 2) / M^1/2, (B, H, N, M): positive random features of scaled vectors x."""
    dot_BHNM = torch.einsum("hmd,bhnd->bhnm", w_HMD, x_BHND)
    return torch.exp(dot_BHNM - x_BHND.square().sum(-1, keepdim=True) / 2) / w_HMD.shape[1] ** 0.5


def naive_family(attention, kernel_BHNN, q, k, v, mask_BN, scale, causal):
    """Attention with the matrix of kernel estimates written out, near pairs and sinks replaced by exp(scale q.k)."""
    W, sinks = attention.config.window, attention.config.sinks
    if W:
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if mask_BN is None else mask_BN
        place_BN = mask.cumsum(1) - 1
        block_BN = place_BN // W
        near_BNN = (block_BN[:, :, None] - block_BN[:, None]).abs() <= 1
        near_BNN = near_BNN | (place_BN < sinks)[:, None]
        far = attention.far_H.to(q.dtype)[:, None, None].exp() * kernel_BHNN
        kernel_BHNN = torch.where(near_BNN[:, None], torch.exp(scale * q @ k.mT), far)
    return naive_average(kernel_BHNN, v, mask_BN, causal)
