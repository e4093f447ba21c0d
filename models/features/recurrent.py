"""Recurrences in the form of matrix products: chunks, decays that depend on the data, and two directions.

Padding passes no time: its key is 0 and its decay 1. A recurrence sees the past alone. Where the encoder asks for
both directions, the second half of the heads runs from right to left; with one head there is no such half.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models.base import AttentionBase, wide

CHUNK = 64  # tokens between two states


class Recurrence(AttentionBase):
    """A method with a state of constant size: tensors that start at 0, and that padding leaves as they are."""

    causal = recurrent = linear_memory = True

    def advance(self, q_BHD, k_BHD, v_BHD, state: Sequence, scale: float) -> tuple[torch.Tensor, tuple]:
        """Output and state after one more token, in fp32 at least; in `state` a number 0 stands for zeros."""
        raise NotImplementedError

    def step(self, q_BHD, k_BHD, v_BHD, state=None, mask_B=None, *, scale=None):
        scale, old = self.head_dim**-0.5 if scale is None else scale, state or (0.0, 0.0)
        with torch.autocast(v_BHD.device.type, enabled=False):
            out_BHD, state = self.advance(*(x.to(wide(x.dtype)) for x in (q_BHD, k_BHD, v_BHD)), old, scale)
        if mask_B is not None:
            pairs = zip(state, old, strict=False)
            state = tuple(torch.where(mask_B.view(-1, *(1,) * (new.dim() - 1)), new, x) for new, x in pairs)
        return out_BHD.to(v_BHD.dtype), state


class FeatureMap(Recurrence):
    """out_i = sum_n phi(q_i).phi(k_n) v_n / sum_n phi(q_i).phi(k_n), phi > 0 (arXiv 2006.16236, eq. 4 to 20).

    A method is its `features`. Causal: chunks attend to themselves directly, and to the past through its state.
    """

    def features(self, x_BHND: torch.Tensor, scale: float) -> torch.Tensor:
        """phi(x), (B, H, N, features), of queries or keys."""
        raise NotImplementedError

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        q, k = self.features(q_BHND, scale), self.features(k_BHND, scale)
        if mask_BN is not None:
            k = k.masked_fill(~mask_BN[:, None, :, None], 0)
        if not causal:
            return divide(q @ (k.mT @ v_BHND), q @ k.sum(2)[..., None])
        both = scan(q, k, F.pad(v_BHND, (0, 1), value=1), None)  # the last column sums the weights
        return divide(both[..., :-1], both[..., -1:])

    def advance(self, q_BHD, k_BHD, v_BHD, state, scale):
        q, k = (self.features(x[:, :, None], scale)[:, :, 0] for x in (q_BHD, k_BHD))
        state = state[0] + outer(k, v_BHD), state[1] + k
        return divide(product(q, state[0]), (q * state[1]).sum(-1, keepdim=True)), state

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        k = self.features(k_BHND, scale).masked_fill(~mask_BN[:, None, :, None], 0)
        return k.mT @ v_BHND, k.sum(2)


def divide(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total / weight, and 0 where there is no weight because there is no real token."""
    return total / weight.masked_fill(weight == 0, 1)


def outer(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k v^T, (..., D, D)."""
    return k[..., :, None] * v[..., None, :]


def product(q: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    """q S of vectors q."""
    return (q[..., None] * S).sum(-2)


class Gate(nn.Module):
    """step_ih = softplus(w_h . [v_i of all heads] + b_h),    log decay_ih = -rate_h step_ih,    both (B, H, N)

    The time that token i takes in head h, and what it leaves of the state (Mamba-2, arXiv 2405.21060, section 7; the
    same in gated DeltaNet, arXiv 2412.06464). The papers project the token itself. Here v of all heads stands for it: a
    linear map of the token, which rotary positions do not turn as they turn k. Starts: w = 0, step log-uniform in
    [0.001, 0.1], rate uniform in [1, 16].
    """

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        step_H = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.weight_HE = nn.Parameter(torch.zeros(heads, heads * head_dim))
        self.bias_H = nn.Parameter(step_H.expm1().log())
        self.log_rate_H = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())

    def forward(self, v_BHND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step and log decay of each token, in the dtype of v."""
        step_BHN = F.softplus(heads_to(self.weight_HE, self.bias_H, v_BHND))
        return step_BHN, -step_BHN * self.log_rate_H.to(v_BHND.dtype).exp()[:, None]


def heads_to(weight_HE: torch.Tensor, bias_H: torch.Tensor, v_BHND: torch.Tensor) -> torch.Tensor:
    """One number per head and token, (B, H, N), of v of all heads."""
    weight_HED = weight_HE.to(v_BHND.dtype).unflatten(1, (v_BHND.shape[1], -1))
    return torch.einsum("hed,bend->bhn", weight_HED, v_BHND) + bias_H.to(v_BHND.dtype)[:, None]


def turned(x: torch.Tensor, causal: bool) -> torch.Tensor:
    """The second half of the heads with its tokens, axis 2, from right to left; done twice, it is undone."""
    first = (x.shape[1] + 1) // 2
    return x if causal or first == x.shape[1] else torch.cat([x[:, :first], x[:, first:].flip(2)], 1)


def chunked(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, ...) -> (B, H, J, L, ...), with zeros at the end."""
    L = min(CHUNK, x.shape[2])
    return F.pad(x, (0, 0) * (x.dim() - 3) + (0, -x.shape[2] % L)).unflatten(2, (-1, L))


def decays(total_BHJL: torch.Tensor) -> torch.Tensor:
    """What is left at token i of what token n <= i brought, e^(total_i - total_n), (B, H, J, L, L); 0 for n > i.

    `total` is the sum of the log decays of a chunk up to each token.
    """
    difference = total_BHJL[..., :, None] - total_BHJL[..., None, :]
    later = torch.ones(difference.shape[-2:], dtype=torch.bool, device=difference.device).triu(1)
    return difference.masked_fill(later, -math.inf).exp()


def scan(q_BHND: torch.Tensor, k_BHND: torch.Tensor, v_BHND: torch.Tensor, log_decay_BHN: torch.Tensor | None):
    """out_i = q_i S_i,   S_i = decay_i S_(i-1) + k_i v_i^T;   no decay is a decay of 1. v may be wider than k.

    2 B H N (L + D) (D + width of v) operations with chunks of L = 64 tokens; one chunk needs no state, and no second
    half of them.
    """
    N = q_BHND.shape[2]
    q, k, v = (chunked(x) for x in (q_BHND, k_BHND, v_BHND))
    weight_BHJLL = q @ k.transpose(-1, -2)
    if log_decay_BHN is None:
        weight_BHJLL = weight_BHJLL.tril()
    else:
        total_BHJL = chunked(log_decay_BHN).cumsum(-1)
        weight_BHJLL = weight_BHJLL * decays(total_BHJL)
    out = weight_BHJLL @ v
    if q.shape[2] > 1:
        leap = None
        if log_decay_BHN is not None:
            q = q * total_BHJL[..., None].exp()
            k = k * (total_BHJL[..., -1:] - total_BHJL)[..., None].exp()
            leap = total_BHJL[..., -1, None, None].exp()
        out = out + q @ arriving(k.transpose(-1, -2) @ v, leap)
    return out.flatten(2, 3)[:, :, :N]


def arriving(new: torch.Tensor, leap: torch.Tensor | None) -> torch.Tensor:
    """The state that each chunk, axis 2, starts from: what the earlier ones brought, times the leaps since."""
    if leap is None:
        return F.pad(new.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    states = [torch.zeros_like(new[:, :, 0])]
    for j in range(new.shape[2] - 1):
        states.append(leap[:, :, j] * states[-1] + new[:, :, j])
    return torch.stack(states, 2)


def naive_recurrence(v: torch.Tensor, mask_BN: torch.Tensor | None, causal: bool, token) -> torch.Tensor:
    """Outputs (B, H, N, D) of a recurrence, one token, head and row at a time; 0 at padding.

    `token(b, h, i, state)` returns the state (D, D) after token i, and its output (D). Without `causal` the second half
    of the heads goes from right to left.
    """
    B, H, N, D = v.shape
    rows = []
    for b in range(B):
        real = list(range(N)) if mask_BN is None else mask_BN[b].nonzero()[:, 0].tolist()
        for h in range(H):
            state, out = v.new_zeros(D, D), list(v.new_zeros(N, D))
            for i in reversed(real) if not causal and h >= (H + 1) // 2 else real:
                state, out[i] = token(b, h, i, state)
            rows.append(torch.stack(out))
    return torch.stack(rows).view(B, H, N, D)
