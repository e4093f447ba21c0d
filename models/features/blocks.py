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

from models.features.flash import NEVER, Part, flash

GROWTH = 60.0  # exp(GROWTH) times a sum over features stays far below the largest fp32 number
CACHE = 2**18  # numbers in a chunk of weights on features: 1 MB in fp32, the second-level cache of one core


class State(NamedTuple):
    """Of a set of keys: L_j = log sum_n exp(l_jn), and Y_j = sum_n exp(l_jn - L_j) v_n  (j features, n keys)."""

    L_BHM: Tensor
    Y_BHMD: Tensor


def state_of(ak_HMD: Tensor, x_BHND: Tensor, v_BHND: Tensor, key_bias_BHN: Tensor) -> State:
    """Features attend to keys, l_jn = ak_j.x_n + key_bias_n."""
    Y_BHMD, L_BHM = flash(ak_HMD.expand(len(x_BHND), -1, -1, -1), x_BHND, v_BHND, key_bias_BHN)
    return State(L_BHM, Y_BHMD)


def read(q_BHND: Tensor, aq_HMD: Tensor, state: State, feature_bias_HM: Tensor, mass: bool = True) -> Part:
    """Queries attend to features: the part of the keys in `state`, with logits aq_j.q_i + L_j + feature_bias_j."""
    B, L_BHM = len(q_BHND), state.L_BHM + feature_bias_HM
    return flash(q_BHND, aq_HMD.expand(B, -1, -1, -1), state.Y_BHMD, L_BHM, mass=mass)


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


@torch.compiler.disable
def sums(states: State, B: int, reach: int, *, both: bool) -> State:
    """For each of the folded blocks the state of all blocks more than `reach` before it, and with `both` behind it."""

    def beyond(direction: int) -> State:
        L, Y = (x.unflatten(0, (B, -1)) for x in states)
        return State(*(x.flatten(0, 1) for x in _Earlier.apply(L, Y, direction, reach)))

    return joined(beyond(1), beyond(-1)) if both else beyond(1)


def _earlier(L_BJHM, Y_BJHMD, direction, reach):
    """The state of all blocks more than `reach` before each one, over axis 1; direction -1: behind it."""
    J = L_BJHM.shape[1]
    L, Y = torch.full_like(L_BJHM[:, 0], NEVER), torch.zeros_like(Y_BJHMD[:, 0])
    order = range(J)[::direction]
    Ls, Ys = [L] * J, [Y] * J
    for j, new in zip(order[1 + reach :], order, strict=False):
        L, Y = joined(State(L, Y), State(L_BJHM[:, new], Y_BJHMD[:, new]))
        Ls[j], Ys[j] = L, Y
    return torch.stack(Ls, 1), torch.stack(Ys, 1)


class _Earlier(torch.autograd.Function):
    """`_earlier` with a backward pass that keeps nothing but its results.

    With S' = S + x (states), a = exp(L - L') and b = exp(l - L'): Y' = a Y + b y, so that dY = a dY',
    dL = a (dL' + dY'.(Y - Y')), and the same for x with b.
    """

    @staticmethod
    def forward(ctx, L, Y, direction, reach):
        ctx.direction, ctx.reach = direction, reach
        sums = _earlier(L, Y, direction, reach)
        ctx.save_for_backward(L, Y, *sums)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gL_BJHM, gY_BJHMD):
        l_BJHM, y_BJHMD, L_BJHM, Y_BJHMD = ctx.saved_tensors
        dl, dy = torch.zeros_like(l_BJHM), torch.zeros_like(y_BJHMD)
        gL, gY = torch.zeros_like(l_BJHM[:, 0]), torch.zeros_like(y_BJHMD[:, 0])
        order = range(l_BJHM.shape[1])[:: ctx.direction]
        steps = list(zip(order[ctx.reach + 1 :], order[ctx.reach :], order, strict=False))
        for j, before, new in reversed(steps):
            gL, gY = gL + gL_BJHM[:, j], gY + gY_BJHMD[:, j]
            L, Y = L_BJHM[:, j], Y_BJHMD[:, j]
            a, b = (L_BJHM[:, before] - L).exp(), (l_BJHM[:, new] - L).exp()
            base = gL - (gY * Y).sum(-1)
            dl[:, new] = b * (base + (gY * y_BJHMD[:, new]).sum(-1))
            torch.mul(gY, b[..., None], out=dy[:, new])
            gL = a * (base + (gY * Y_BJHMD[:, before]).sum(-1))
            gY = gY * a[..., None]
        return dl, dy, None, None


@torch.compiler.disable
def inside(q_BHLD, k_BHLD, v_BHLD, aq_HMD, ak_HMD, key_bias_BHL, feature_bias_HM, past_L_BHM):
    """The part of a block's own keys n <= i through the features; `past_L` is that of the blocks before.

        A_in = exp(-top_i) sum_j exp(r_ij + l_jn)  (n <= i),   out = A v / A 1,   lse = log A 1 + top

    A is one product of exp(r_ij + c_j - top_i) <= 1 and exp(l_jn - c_j). The reference c_j is the log-sum-exp of l_jn
    over the past and the block's first token, never over later ones: what comes after i cannot change out_i through
    rounding. The whole sum over n, the past included, is then at least exp(top_i), so that nothing underflows that
    counts. Where a later key exceeds the reference by more than GROWTH, A is summed term by term, and so it is
    everywhere but on a CPU: a GPU would have to wait for the answer.
    """
    inputs = q_BHLD, k_BHLD, v_BHLD, key_bias_BHL, past_L_BHM.detach(), aq_HMD, ak_HMD, feature_bias_HM
    with torch.autocast(q_BHLD.device.type, enabled=False):
        return _Inside.apply(*inputs)


def _kernel(q, k, key_bias, past_L, aq, ak, feature_bias):
    """r_ij + c_j - top_i, l_jn - c_j, their exponentials, A of `inside` and top; without exponentials the first two
    are exact for any growth, and A is relative to its own largest entry."""
    r_BHLM = (q.to(aq.dtype) @ aq.mT).add_(feature_bias[:, None])
    l_BHLM = (k.to(ak.dtype) @ ak.mT).add_(key_bias[..., None])
    c_BH1M = torch.logaddexp(past_L, l_BHLM[..., 0, :])[..., None, :]
    r_BHLM, l_BHLM = r_BHLM.add_(c_BH1M), l_BHLM.sub_(c_BH1M)
    top_BHL1 = r_BHLM.amax(-1, keepdim=True)
    r_BHLM = r_BHLM.sub_(top_BHL1)
    if q.device.type != "cpu" or l_BHLM.amax() > GROWTH:
        S_BHLL = (r_BHLM[..., :, None, :] + l_BHLM[..., None, :, :]).logsumexp(-1)
        later_LL = torch.ones_like(S_BHLL[0, 0], dtype=torch.bool).triu(1)
        S_BHLL = S_BHLL.masked_fill(later_LL, float("-inf"))
        rise_BHL1 = S_BHLL.detach().amax(-1, keepdim=True)
        return r_BHLM, l_BHLM, S_BHLL, (S_BHLL - rise_BHL1).exp(), top_BHL1 + rise_BHL1
    R_BHLM, E_BHLM = r_BHLM.exp_(), l_BHLM.exp_()
    return R_BHLM, E_BHLM, None, (R_BHLM @ E_BHLM.mT).tril_(), top_BHL1


def _rows(q_BHLD, aq_HMD):
    """How many blocks `inside` takes at a time."""
    numbers = q_BHLD[0, ..., 0].numel() * aq_HMD.shape[1]
    return max(1, CACHE // numbers if q_BHLD.device.type == "cpu" else 2**26 // (numbers * q_BHLD.shape[2]))


class _Inside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        q, shared, parts = inputs[0], inputs[5:], []
        for q_, k_, v_, *biases in zip(*(x.split(_rows(q, shared[0])) for x in inputs[:5]), strict=True):
            *_, A, top = _kernel(q_, k_, *biases, *shared)
            total = A.sum(-1, keepdim=True).clamp_min_(1e-37)
            parts.append(((A @ v_.to(A.dtype)).div_(total), total.log_().add_(top)[..., 0]))
        out, lse = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(*inputs, out)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, dlse):
        *inputs, out = ctx.saved_tensors
        (q, k, v), (aq, ak, feature_bias) = inputs[:3], inputs[5:]
        delta = (g * out).sum(-1) - dlse
        grads, shared = [], [torch.zeros_like(x) for x in (aq, ak, feature_bias)]
        for *x, g_, delta_ in zip(*(x.split(_rows(q, aq)) for x in (*inputs[:5], g, delta)), strict=True):
            q_, k_, v_, *biases = x
            R, E, S, A, _ = _kernel(q_, k_, *biases, *inputs[5:])
            total = A.sum(-1, keepdim=True).clamp_min_(1e-37)
            dA = (g_ @ v_.to(A.dtype).mT).sub_(delta_[..., None]).div_(total).tril_()
            dv = (A / total).mT @ g_
            if S is None:
                dr, dl = (dA @ E).mul_(R), (dA.mT @ R).mul_(E)
            else:
                S_BHLL1 = S.masked_fill(A == 0, float("inf"))[..., None]
                weights = (A * dA)[..., None] * (R[..., :, None, :] + E[..., None, :, :] - S_BHLL1).exp()
                dr, dl = weights.sum(-2), weights.sum(-3)
            grads.append(((dr @ aq).to(q.dtype), (dl @ ak).to(k.dtype), dv.to(v.dtype), dl.sum(-1)))
            for i, (d, y) in enumerate(((dr, q_), (dl, k_))):
                if ctx.needs_input_grad[5 + i]:
                    shared[i] += (d.mT @ y.to(d.dtype)).sum(0)
            shared[2] += dr.sum((0, 2))
        return *map(torch.cat, zip(*grads, strict=True)), None, *shared


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
