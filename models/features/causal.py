"""The causal form of the engine: sums over n <= i, by chunks of tokens, with a state (L_j, Y_j) carried over.

    w_ijn = exp(r_ij + l_jn),  n <= i        r_ij = aq_j.q_i + feature_bias_j,  l_jn = ak_j.k_n + key_bias_n
    out_i = sum_jn w_ijn v_n / sum_jn w_ijn

Inside a chunk the weights are factored through a reference c_j, E_ij = exp(r_ij + c_j - top_i) and
F_nj = exp(l_jn - c_j), so that the sum over features is one product E F^T. The reference is the logsumexp of l_jn
up to the first token of the chunk, never of later ones: what comes after i cannot change out_i through
rounding. A later key may be larger than the reference by any amount; a chunk in which F would exceed
e^GROWTH is halved, down to single tokens, where F <= 1. The state has its own reference, L_j, the logsumexp over all
tokens so far. Gradients, with Z_i = log sum_jn w_ijn and d_i = g_i.out_i:

    dr_ij = sum_n<=i w_ijn exp(-Z_i) (g_i.v_n - d_i)          dq = dr aq    daq = dr^T q   dfeature_bias_j = sum_i dr_ij
    dl_jn = sum_i>=n w_ijn exp(-Z_i) (g_i.v_n - d_i)          dk = dl ak    dak = dl^T k   dkey_bias_n = sum_j dl_jn
    dv_n  = sum_i>=n sum_j w_ijn exp(-Z_i) g_i

where the sums over i carry a second state backwards, R_j = sum_i exp(r_ij + L_j - Z_i) (g_i, d_i); no weight in
it exceeds 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from models.features.gemm import NEVER, work_dtype
from models.layers import product

ROWS = 128  # tokens in a chunk: the N x N part of the work grows with it, the number of steps falls
GROWTH = 60.0  # exp(GROWTH) times any sum of a chunk stays far below the largest fp32 number


class State(NamedTuple):
    """Of the tokens so far: L_j = logsumexp l_jn, and Y_j = sum_n exp(l_jn - L_j) v_n."""

    L_M: torch.Tensor
    Y_MD: torch.Tensor


class Span(NamedTuple):
    """A chunk: its tokens, its reference, F, the state before it and L after it."""

    n: slice
    c_M: torch.Tensor
    F_NM: torch.Tensor
    before: State
    L_M: torch.Tensor


def spans(k, v, ak, key_bias) -> Iterator[Span]:
    """The chunks in order; sequential, as each starts from the state that the one before leaves."""
    N, wide, work = k.shape[-2], ak.dtype, work_dtype(v, ak.dtype)
    Y_MD = torch.zeros((*k.shape[:-2], *ak.shape[-2:]), dtype=wide, device=k.device)
    state = State(torch.full_like(Y_MD[..., 0], NEVER), Y_MD)
    todo = [(n, min(n + ROWS, N)) for n in reversed(range(0, N, ROWS))]
    while todo:
        start, stop = todo.pop()
        n = slice(start, stop)
        l_NM = product(k[..., n, :].to(wide), ak).add_(key_bias[..., n, None])
        c_M = torch.logaddexp(state.L_M, l_NM[..., 0, :])
        growth_NM = l_NM.sub_(c_M[..., None, :])
        if stop - start > 1 and growth_NM.max() > GROWTH:
            middle = (start + stop) // 2
            todo += [(middle, stop), (start, middle)]
            continue
        F_NM = growth_NM.exp_()
        L_M = c_M + ((state.L_M - c_M).exp() + F_NM.sum(-2)).log()
        yield Span(n, c_M, F_NM, state, L_M)
        shares_NM = F_NM.mul_((c_M - L_M).exp()[..., None, :]).to(work)
        new_MD = product(shares_NM.mT, v[..., n, :].to(work).mT).to(wide)
        state = State(L_M, state.Y_MD * (state.L_M - L_M).exp()[..., None] + new_MD)


def forward(q, k, v, aq, ak, key_bias, feature_bias, out, Y, Z):
    """Of one head, or of a batch of them: writes out (N, D) and Z (N,); Y is not used."""
    wide, work = aq.dtype, work_dtype(v, aq.dtype)
    for n, c_M, F_NM, before, _ in spans(k, v, ak, key_bias):
        r_NM = product(q[..., n, :].to(wide), aq, feature_bias + c_M)
        top_N1 = r_NM.amax(-1, keepdim=True)
        E_NM = r_NM.sub_(top_N1).exp_()
        past_M = (before.L_M - c_M).exp()
        w_NN = product(E_NM, F_NM).tril_()
        total_N1 = w_NN.sum(-1, keepdim=True) + E_NM @ past_M[..., None]
        Z[..., n] = (top_N1 + total_N1.log())[..., 0]
        w_NN, E_NM = w_NN.div_(total_N1).to(work), E_NM.div_(total_N1).to(work)
        recent_ND = product(w_NN, v[..., n, :].to(work).mT)
        out[..., n, :] = recent_ND + product(E_NM, (past_M[..., None] * before.Y_MD).mT.to(work))


def backward(g, q, k, v, aq, ak, key_bias, feature_bias, out, Y, Z, dq, dk, dv, dkey_bias):
    """Writes dq, dk, dv, dkey_bias; returns daq, dak and dfeature_bias."""
    wide, work = aq.dtype, work_dtype(v, aq.dtype)
    aq_DM, ak_DM = aq.mT.to(work), ak.mT.to(work)
    held = [span._replace(F_NM=None) for span in spans(k, v, ak, key_bias)]
    R_MD, Rd_M = torch.zeros_like(held[0].before.Y_MD), torch.zeros_like(held[0].c_M)
    daq_DM, dak_DM, dfeature_bias = (
        torch.zeros_like(R_MD.mT),
        torch.zeros_like(R_MD.mT),
        torch.zeros_like(Rd_M),
    )
    for n, c_M, _, before, L_M in reversed(held):
        q_ND, k_ND, v_ND, g_ND = q[..., n, :], k[..., n, :], v[..., n, :].to(work), g[..., n, :].to(work)
        d_N1 = (g_ND.to(wide) * out[..., n, :]).sum(-1, keepdim=True)
        past_M, fall_M = (before.L_M - c_M).exp(), (c_M - L_M).exp()
        F_NM = product(k_ND.to(wide), ak).add_(key_bias[..., n, None]).sub_(c_M[..., None, :]).exp_()
        E_NM = product(q_ND.to(wide), aq, feature_bias + c_M).sub_(Z[..., n, None]).exp_()
        w_NN = product(E_NM, F_NM).tril_().to(work)
        x_NN = product(g_ND, v_ND).to(wide).sub_(d_N1).tril_()

        past_NM = product(g_ND, (past_M[..., None] * before.Y_MD).to(work)).to(wide)
        dr_NM = product(x_NN, F_NM.mT).add_(past_NM).sub_(d_N1 * past_M[..., None, :]).mul_(E_NM)
        dfeature_bias += dr_NM.sum(-2)
        dr_NM, E_NM = dr_NM.to(work), E_NM.to(work)
        dq[..., n, :] = product(dr_NM, aq_DM)
        daq_DM += product(q_ND.to(work).mT, dr_NM.mT)

        future_NM = product(v_ND, (fall_M[..., None] * R_MD).to(work)).to(wide)
        dl_NM = product(x_NN.to(work).mT, E_NM.mT).to(wide).add_(future_NM)
        dl_NM = dl_NM.sub_((fall_M * Rd_M)[..., None, :]).mul_(F_NM)
        dkey_bias[..., n] = dl_NM.sum(-1)
        dl_NM = dl_NM.to(work)
        dk[..., n, :] = product(dl_NM, ak_DM)
        dak_DM += product(k_ND.to(work).mT, dl_NM.mT)
        shares_NM = F_NM.mul_(fall_M[..., None, :]).to(work)
        dv[..., n, :] = product(w_NN.mT, g_ND.mT) + product(shares_NM, R_MD.mT.to(work))

        # From the reference L after the chunk to the one before it.
        R_MD = past_M[..., None] * (fall_M[..., None] * R_MD + product(E_NM.mT, g_ND.mT).to(wide))
        Rd_M = past_M * (fall_M * Rd_M + (E_NM.to(wide) * d_N1).sum(-2))
    return daq_DM.mT, dak_DM.mT, dfeature_bias
