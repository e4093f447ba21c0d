"""Attention by parts of the keys: states of blocks, their sums over earlier and later blocks, and merging by mass.

Attention over a disjoint union of key sets is the mean of the attentions over the sets, weighted by their masses:

    out = sum_p softmax_p(lse_p) out_p

A part is a pair (out, lse), and `merge` joins any number. A set of keys as the features see it is a State; states of
disjoint sets have a sum in log space, so that no part is ever subtracted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.features.flash import NEVER, flash

GROWTH = 60.0  # exp(GROWTH) times a sum over features stays far below the largest fp32 number
CACHE = 2**18  # numbers in a chunk of weights on features: 1 MB in fp32, the second-level cache of one core


class State(NamedTuple):
    """Of a set of keys: L_j = log sum_n exp(l_jn), and Y_j = sum_n exp(l_jn - L_j) v_n  (j features, n keys)."""

    L_BHM: Tensor
    Y_BHMD: Tensor


def state_of(ak_HMD: Tensor, k_BHND: Tensor, v_BHND: Tensor, key_bias_BHN: Tensor) -> State:
    """Features attend to keys, l_jn = ak_j.k_n + key_bias_n."""
    Y_BHMD, L_BHM = flash(ak_HMD.expand(len(k_BHND), -1, -1, -1), k_BHND, v_BHND, key_bias_BHN)
    return State(L_BHM, Y_BHMD)


def read(q_BHND: Tensor, aq_HMD: Tensor, state: State, feature_bias_HM: Tensor) -> tuple[Tensor, Tensor]:
    """Queries attend to features: the part of the keys in `state`, with logits aq_j.q_i + L_j + feature_bias_j."""
    aq_BHMD = aq_HMD.expand(len(q_BHND), -1, -1, -1)
    return flash(q_BHND, aq_BHMD, state.Y_BHMD, state.L_BHM + feature_bias_HM)


def joined(one: State, other: State) -> State:
    """The state of the union."""
    L_BHM = torch.logaddexp(one.L_BHM, other.L_BHM)
    shares = ((s.L_BHM - L_BHM).exp()[..., None].to(s.Y_BHMD) * s.Y_BHMD for s in (one, other))
    return State(L_BHM, sum(shares))


def merge(*parts: tuple[Tensor, Tensor]) -> Tensor:
    """The attention over the union of the parts, in fp32 at least."""
    weights = torch.stack([lse for _, lse in parts]).softmax(0)
    return sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True))


def fold(x_BHND: Tensor, L: int, fill: float = 0.0) -> Tensor:
    """Blocks of L tokens as rows of a batch: (B, H, N, ...) -> (B J, H, L, ...), filled up at the end."""
    B, H, N, *rest = x_BHND.shape
    padded = F.pad(x_BHND, (0, 0) * len(rest) + (0, -N % L), value=fill).unflatten(2, (-1, L))
    return padded.transpose(1, 2).flatten(0, 1)


def unfold(x_BHLD: Tensor, B: int, N: int) -> Tensor:
    """The inverse of `fold`."""
    return x_BHLD.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :N]


def shifted(x_BHLD: Tensor, B: int, by: int, fill: float = 0.0) -> Tensor:
    """Of folded blocks: in place of each block the one `by` before it (negative: after it), `fill` beyond the ends."""
    x_BJHLD = x_BHLD.unflatten(0, (B, -1))
    ends = (max(by, 0), max(-by, 0))
    wide = F.pad(x_BJHLD, (0, 0) * (x_BJHLD.dim() - 2) + ends, value=fill)
    J = x_BJHLD.shape[1]
    return wide[:, max(-by, 0) : max(-by, 0) + J].flatten(0, 1)


def sums(states: State, B: int, reach: int, *, both: bool) -> State:
    """For each of the folded blocks the state of all blocks more than `reach` before it, and with `both` behind it."""

    def beyond(states: State, direction: int) -> State:
        turned = State(*(x.unflatten(0, (B, -1)).flip(1) if direction < 0 else x.unflatten(0, (B, -1)) for x in states))
        before = earlier(turned)
        L, Y = (x.flip(1) if direction < 0 else x for x in before)
        fills = zip((L, Y), (NEVER, 0.0), strict=True)
        return State(*(shifted(x.flatten(0, 1), B, direction * reach, fill) for x, fill in fills))

    return joined(beyond(states, 1), beyond(states, -1)) if both else beyond(states, 1)


def earlier(states: State) -> State:
    """The state of all blocks before each one, over axis 1: sums of pairs, of pairs of pairs, and back."""
    J = states.L_BHM.shape[1]
    if J == 1:
        return State(torch.full_like(states.L_BHM, NEVER), torch.zeros_like(states.Y_BHMD))
    fills = zip(states, (NEVER, 0.0), strict=True)
    padded = (F.pad(x, (0, 0) * (x.dim() - 2) + (0, J % 2), value=fill).unflatten(1, (-1, 2)) for x, fill in fills)
    first, second = (State(*pair) for pair in zip(*(x.unbind(2) for x in padded), strict=True))
    before = earlier(joined(first, second))
    return State(*(torch.stack(x, 2).flatten(1, 2)[:, :J] for x in zip(before, joined(before, first), strict=True)))


def inside(q_BHLD, k_BHLD, v_BHLD, aq_HMD, ak_HMD, key_bias_BHL, feature_bias_HM, past_L_BHM):
    """The part of a block's own keys n <= i through the features; `past_L` is that of the blocks before.

    The N x M weights are recomputed in the backward pass, by chunks of blocks.
    """
    tensors = q_BHLD, k_BHLD, v_BHLD, key_bias_BHL, past_L_BHM
    shared = aq_HMD, ak_HMD, feature_bias_HM
    if torch.compiler.is_compiling():
        return _inside(*tensors, *shared)
    rows = len(q_BHLD)
    if q_BHLD.device.type == "cpu":
        rows = max(1, CACHE // (q_BHLD[0, ..., 0].numel() * aq_HMD.shape[1]))
    chunks = zip(*(x.split(rows) for x in tensors), strict=True)
    return tuple(torch.cat(x) for x in zip(*(_Inside.apply(*c, *shared) for c in chunks), strict=True))


class _Inside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return _inside(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        with torch.enable_grad():
            tensors = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return torch.autograd.grad(_inside(*tensors), tensors, grads, allow_unused=True)


def _inside(q_BHLD, k_BHLD, v_BHLD, key_bias_BHL, past_L_BHM, aq_HMD, ak_HMD, feature_bias_HM):
    """`inside`: the log kernel S_in = log sum_j exp(r_ij + l_jn), then a masked softmax over n.

    The sum is one product of exp(r_ij + c_j - top_i) <= 1 and exp(l_jn - c_j). The reference c_j is the log-sum-exp of
    l_jn over the past and the block's first token, never over later ones: what comes after i cannot change out_i
    through rounding. The whole sum over n, the past included, is then at least exp(top_i), so that nothing underflows
    that counts. Where a later key exceeds the reference by more than GROWTH, S is summed term by term.
    """
    wide = aq_HMD.dtype
    with torch.autocast(q_BHLD.device.type, enabled=False):
        r_BHLM = q_BHLD.to(wide) @ aq_HMD.mT + feature_bias_HM[:, None]
        l_BHLM = k_BHLD.to(wide) @ ak_HMD.mT + key_bias_BHL[..., None]
        c_BH1M = torch.logaddexp(past_L_BHM, l_BHLM[..., 0, :]).detach()[..., None, :]
        r_BHLM, growth_BHLM = r_BHLM + c_BH1M, l_BHLM - c_BH1M
        top_BHL1 = r_BHLM.amax(-1, keepdim=True).detach()
        r_BHLM = r_BHLM - top_BHL1
        if growth_BHLM.max() > GROWTH:
            S_BHLL = (r_BHLM[..., :, None, :] + growth_BHLM[..., None, :, :]).logsumexp(-1)
        else:
            S_BHLL = (r_BHLM.exp() @ growth_BHLM.exp().mT).clamp_min(1e-37).log()
        later_LL = torch.ones(S_BHLL.shape[-2:], dtype=torch.bool, device=S_BHLL.device).triu(1)
        S_BHLL = S_BHLL.masked_fill(later_LL, float("-inf"))
        out_BHLD = S_BHLL.softmax(-1).to(v_BHLD.dtype) @ v_BHLD
        return out_BHLD, S_BHLL.logsumexp(-1) + top_BHL1[..., 0]


def near(q_BHLD, k_BHLD, v_BHLD, dead_BHL, B: int, sinks: int, *, causal: bool) -> list[tuple[Tensor, Tensor]]:
    """Exact attention of folded blocks, q scaled, to their own and the neighbouring blocks and to the first `sinks`
    tokens of the row: parts for `merge`. `dead` is 0 at real keys, NEVER at padding."""

    def keys(*shifts):
        k, v = (torch.cat([shifted(x, B, s) for s in shifts], 2) for x in (k_BHLD, v_BHLD))
        return k, v, torch.cat([shifted(dead_BHL, B, s, NEVER) for s in shifts], 2)

    others = keys(1) if causal else keys(1, 0, -1)
    if sinks:
        J = len(q_BHLD) // B
        first = (x.unflatten(0, (B, J))[:, :1, :, :sinks].expand(-1, J, *(-1,) * (x.dim() - 1)).flatten(0, 1)
                 for x in (k_BHLD, v_BHLD, dead_BHL))  # fmt: skip
        k, v, dead = (torch.cat(pair, 2) for pair in zip(first, others, strict=True))
        block_J = torch.arange(J, device=dead.device).repeat(B)[:, None, None]
        # Blocks 0 and 1 have the first block, sinks included, among their neighbours.
        hidden = (block_J < 2) & (torch.arange(dead.shape[-1], device=dead.device) < sinks)
        others = k, v, dead.masked_fill(hidden, NEVER)
    parts = [flash(q_BHLD, *others)]
    return [flash(q_BHLD, k_BHLD, v_BHLD, dead_BHL, causal=True), *parts] if causal else parts
