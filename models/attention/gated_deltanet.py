"""Gated DeltaNet: a state that replaces what it held for a key, and forgets."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.features.recurrent import (
    CHUNK,
    Gate,
    Recurrence,
    chunked,
    decays,
    heads_to,
    naive_recurrence,
    outer,
    product,
    turned,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


class Attention(Recurrence):
    """S_i = a_i (I - b_i k_i k_i^T) S_(i-1) + b_i k_i v_i^T,    out_i = scale sqrt(D) q_i S_i

    with q and k of length 1 (Yang et al., arXiv 2412.06464, eq. 10): b_i in (0, 1) is how much of what the state held
    for k_i gives way to v_i, a_i in (0, 1) what remains of everything. b = sigmoid(w.v + c) as `Gate` projects, from
    b = 1/2 on; `Gate` has a. S is D x D numbers. Causal: as written. Without it, the second half of the heads runs
    from right to left; the paper is causal alone. Padding passes no time.

    By chunks of L = 64 tokens in the WY form (section 3.3): with g_i = a_1 ... a_i in the chunk and S the state ahead,

        u_i = b_i (v_i - g_i k_i S) - sum_(n < i) b_i (g_i / g_n) k_i.k_n u_n
        S_i = g_i S + sum_(n <= i) (g_i / g_n) k_n u_n^T

    The first line is one triangular system a chunk, solved by substitution (L^2 operations a column: D for v, D for S);
    no inverse is formed. 2 B H N (3 L D + 3 D^2) operations besides, L = N within one chunk; fp32 at least. What the
    paper's block has around this is left out, as the shared encoder has its own: convolution, SiLU, gated norm.
    """

    Config = Config

    def __init__(self, config, **shape):
        super().__init__(config, **shape)
        self.gate = Gate(self.heads, self.head_dim)
        self.weight_HE = nn.Parameter(torch.zeros(self.heads, self.heads * self.head_dim))
        self.bias_H = nn.Parameter(torch.zeros(self.heads))

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        q, k, log_decay_BHN, share_BHN = self._parts(q_BHND, k_BHND, v_BHND, scale)
        if mask_BN is not None:
            log_decay_BHN = log_decay_BHN.masked_fill(~mask_BN[:, None], 0)
        return turned(delta(*(turned(x, causal) for x in (q, k, v_BHND, log_decay_BHN, share_BHN)))[0], causal)

    def advance(self, q_BHD, k_BHD, v_BHD, state, scale):
        parts = self._parts(*(x[:, :, None] for x in (q_BHD, k_BHD, v_BHD)), scale)
        q, k, log_decay_BH, share_BH = (x[:, :, 0] for x in parts)
        S_BHDD = log_decay_BH[..., None, None].exp() * (state[0] + torch.zeros_like(outer(k, v_BHD)))
        S_BHDD = S_BHDD + outer(k, share_BH[..., None] * (v_BHD - product(k, S_BHDD)))
        return product(q, S_BHDD), (S_BHDD,)

    def gather(self, k_BHND, v_BHND, mask_BN, scale):
        q, k, log_decay_BHN, share_BHN = self._parts(k_BHND, k_BHND, v_BHND, scale)
        return (delta(q, k, v_BHND, log_decay_BHN.where(mask_BN[:, None], 0), share_BHN)[1],)

    def _parts(self, q, k, v, scale):
        """q and k as the state meets them, log a and b, for q, k, v of (B, H, N, D)."""
        share_BHN = heads_to(self.weight_HE, self.bias_H, v).sigmoid()
        q = scale * self.head_dim**0.5 * F.normalize(q, dim=-1)
        return q, F.normalize(k, dim=-1), self.gate(v)[1], share_BHN

    def flops(self, B, H, N, D):
        L = min(CHUNK, N)
        return 2 * B * H * N * (3 * L * D + (3 * D * D if N > L else 0)) + 4 * B * H * N * H * D

    def state_bytes(self, N):
        L = min(CHUNK, N)
        return 4 * self.heads * (4 * N * L + 4 * N * self.head_dim + -(-N // L) * self.head_dim**2)


def delta(q_BHND, k_BHND, v_BHND, log_decay_BHN, share_BHN):
    """The recurrence of the class by chunks: q S of each token and S after the last, with k of length 1."""
    N = q_BHND.shape[2]
    q, k, v, share = (chunked(x) for x in (q_BHND, k_BHND, v_BHND, share_BHN[..., None]))
    total_BHJL = chunked(log_decay_BHN).cumsum(-1)
    left_BHJLL = decays(total_BHJL)
    held = k * total_BHJL[..., None].exp()
    system = (share * left_BHJLL * (k @ k.transpose(-1, -2))).tril(-1)
    known = share * (v if q.shape[2] == 1 else torch.cat([v, held], -1))
    u = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    weight = left_BHJLL * (q @ k.transpose(-1, -2))
    fading = (k * (total_BHJL[..., -1:] - total_BHJL)[..., None].exp()).transpose(-1, -2)
    if q.shape[2] == 1:
        return (weight @ u).flatten(2, 3)[:, :, :N], (fading @ u)[:, :, 0]
    u, w = u.chunk(2, -1)  # u - w S solves the system for a chunk that starts from S
    leap = total_BHJL[..., -1, None, None].exp()
    state, news, reads = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1]), [], []
    for j in range(q.shape[2]):
        news.append(u[:, :, j] - w[:, :, j] @ state)
        reads.append(q[:, :, j] @ state)
        state = leap[:, :, j] * state + fading[:, :, j] @ news[-1]
    out = weight @ torch.stack(news, 2) + total_BHJL[..., None].exp() * torch.stack(reads, 2)
    return out.flatten(2, 3)[:, :, :N], state


def naive_gated_deltanet(attention, q, k, v, mask_BN=None, *, scale=None, causal=False):
    """The recurrence, one token, head and row at a time."""
    D, gate = q.shape[-1], attention.gate
    scale = D**-0.5 if scale is None else scale

    def token(b, h, i, state):
        x, key = v[b, :, i].flatten(), k[b, h, i] / k[b, h, i].norm()
        time = torch.log1p(torch.exp(gate.weight_HE[h] @ x + gate.bias_H[h]))
        share = 1 / (1 + torch.exp(-attention.weight_HE[h] @ x - attention.bias_H[h]))
        erased = torch.eye(D, dtype=q.dtype) - share * torch.outer(key, key)
        state = torch.exp(-time * gate.log_rate_H[h].exp()) * erased @ state + share * torch.outer(key, v[b, h, i])
        return state, scale * D**0.5 * q[b, h, i] / q[b, h, i].norm() @ state

    return naive_recurrence(v, mask_BN, causal, token)
