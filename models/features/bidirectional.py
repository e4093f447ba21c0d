"""The two softmaxes of the engine, by chunks of tokens that fit a CPU core's cache, and their gradients.

With p_nj and P_ij the weights of the first and the second softmax, g the gradient of out and d_i = g_i.out_i:

    S_ij = P_ij (g_i.Y_j - d_i)                  dq = S aq    daq = S^T q    dY = P^T g    dL_j = sum_i S_ij
    T_nj = p_nj (dY_j.v_n + dL_j - dY_j.Y_j)     dk = T ak    dak = T^T k    dv = p dY     dkey_bias_n = sum_j T_nj

8 N M D operations forward; 20 backward, of which 4 recompute the logits.
"""

from __future__ import annotations

import torch

from models.features.gemm import chunks, work_dtype
from models.layers import product


def forward(q, k, v, aq, ak, key_bias, feature_bias, out, Y, L):
    """Of one head, or of a batch of them: writes out (N, D), Y (M, D) and L (M,)."""
    wide, work = aq.dtype, work_dtype(v, aq.dtype)
    parts, tops = [], []
    for n in chunks(k, aq):
        l_MN = product(ak, k[..., n, :].to(wide), key_bias[..., n])
        p_MN = l_MN.softmax(-1)
        tops.append(l_MN.amax(-1) - p_MN.amax(-1).log())
        parts.append(product(p_MN.to(work), v[..., n, :].to(work).mT).to(wide))
    tops = torch.stack(tops)
    total = tops.logsumexp(0)
    Y.copy_(sum(part * (top - total).exp()[..., None] for part, top in zip(parts, tops, strict=True)))
    L.copy_(total + feature_bias)
    Y_DM = Y.mT.to(work).contiguous()
    for n in chunks(q, aq):
        P_NM = product(q[..., n, :].to(wide), aq, L).softmax(-1)
        out[..., n, :] = product(P_NM.to(work), Y_DM)


def backward(g, q, k, v, aq, ak, key_bias, feature_bias, out, Y, L, dq, dk, dv, dkey_bias):
    """Writes dq, dk, dv, dkey_bias; returns daq, dak and dfeature_bias."""
    wide, work = aq.dtype, work_dtype(v, aq.dtype)
    dY_DM, daq_DM, dak_DM = (torch.zeros_like(Y.mT) for _ in range(3))
    dL = torch.zeros_like(L)
    Y_MD, aq_DM, ak_DM = Y.to(work), aq.mT.to(work).contiguous(), ak.mT.to(work).contiguous()
    for n in chunks(q, aq):
        q_ND, g_ND = q[..., n, :], g[..., n, :].to(work)
        d_N1 = (g_ND.to(wide) * out[..., n, :]).sum(-1, keepdim=True)
        P_NM = product(q_ND.to(wide), aq, L).softmax(-1)
        S_NM = product(g_ND, Y_MD).to(wide).sub_(d_N1).mul_(P_NM)
        dL += S_NM.sum(-2)
        P_NM, S_NM = P_NM.to(work), S_NM.to(work)
        dq[..., n, :] = product(S_NM, aq_DM)
        dY_DM += product(g_ND.mT, P_NM.mT)
        daq_DM += product(q_ND.to(work).mT, S_NM.mT)
    constant_M = dL - (dY_DM.mT * Y).sum(-1)
    ak_shift_M, dY_MD, dY_DM = feature_bias - L, dY_DM.mT.to(work).contiguous(), dY_DM.to(work)
    for n in chunks(k, aq):
        k_ND, v_ND = k[..., n, :], v[..., n, :].to(work)
        p_NM = product(k_ND.to(wide), ak, ak_shift_M).add_(key_bias[..., n, None]).exp_()
        T_NM = product(v_ND, dY_MD).to(wide).add_(constant_M[..., None, :]).mul_(p_NM)
        dkey_bias[..., n] = T_NM.sum(-1)
        p_NM, T_NM = p_NM.to(work), T_NM.to(work)
        dk[..., n, :] = product(T_NM, ak_DM)
        dv[..., n, :] = product(p_NM, dY_DM)
        dak_DM += product(k_ND.to(work).mT, T_NM.mT)
    return daq_DM.mT, dak_DM.mT, dL
