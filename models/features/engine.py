"""The engine of the random-feature family: two softmaxes, or their causal form, in linear memory.

With a_j the projections of M features (aq on the query side, ak on the key side), attention is exactly

    l_jn  = ak_j.k_n + key_bias_n
    L_j   = logsumexp_n l_jn + feature_bias_j
    Y_j   = sum_n softmax_n(l_jn) v_n                   features attend to keys
    out_i = sum_j softmax_j(aq_j.q_i + L_j) Y_j         queries attend to features

Nothing is divided by a small number and every output is a convex combination of values, so it is finite in
half precision. The backward pass keeps the inputs, L, Y and the output, and recomputes the N x M weights by chunks
of tokens. bidirectional.py and causal.py compute one head; logits, exponentials and sums are in fp32 at
least, and with bf16 values the other products take bf16 factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from models.base import real_rows
from models.features import bidirectional
from models.features import causal as prefix
from models.features.gemm import CACHE, NEVER

LONG = 2**21  # multiply-adds of one product, tokens x features x width, from which heads are computed singly


def attend(
    q_BHND: torch.Tensor,
    k_BHND: torch.Tensor,
    v_BHND: torch.Tensor,
    aq_HMD: torch.Tensor,
    ak_HMD: torch.Tensor,
    key_bias_BHN: torch.Tensor | None = None,
    feature_bias_HM: torch.Tensor | None = None,
    mask_BN: torch.Tensor | None = None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    """The output above, (B, H, N, D) in the dtype of v; causal: the sums over n end at i.

    Rows without a real token (causal: up to i) give 0. Differentiable once, with respect to every float input.
    """
    wide = torch.promote_types(v_BHND.dtype, torch.float32)
    aq_HMD, ak_HMD = aq_HMD.to(wide), ak_HMD.to(wide)
    if key_bias_BHN is None:
        key_bias_BHN = k_BHND.new_zeros(k_BHND.shape[:3], dtype=wide)
    if feature_bias_HM is None:
        feature_bias_HM = aq_HMD.new_zeros(aq_HMD.shape[:2])
    key_bias_BHN, feature_bias_HM = key_bias_BHN.to(wide), feature_bias_HM.to(wide)
    if mask_BN is not None:
        # Finite, so that a row of padding alone stays finite too; such rows are zeroed below.
        key_bias_BHN = key_bias_BHN.masked_fill(~mask_BN[:, None, :], NEVER)
    run = _forward_op if torch.compiler.is_compiling() else _Attend.apply
    out_BHND = run(q_BHND, k_BHND, v_BHND, aq_HMD, ak_HMD, key_bias_BHN, feature_bias_HM, causal)[0]
    if mask_BN is not None:
        seen = mask_BN.cumsum(1)[:, None, :, None] > 0 if causal else real_rows(mask_BN)
        out_BHND = out_BHND.masked_fill(~seen, 0)
    return out_BHND


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    aq: torch.Tensor,
    ak: torch.Tensor,
    key_bias: torch.Tensor,
    feature_bias: torch.Tensor,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out (B, H, N, D); then Y (B, H, M, D) and L (B, H, M), or causal: nothing, and the log of the sum of the
    weights of each token (B, H, N)."""
    shapes = _shapes(q, aq, causal)
    out, Y, L = (x.new_empty(shape) for x, shape in zip((v, aq, aq), shapes, strict=True))
    one = (prefix if causal else bidirectional).forward
    with torch.autocast(q.device.type, enabled=False):
        for b, h in units(q, aq, causal):
            one(
                q[b, h],
                k[b, h],
                v[b, h],
                aq[h],
                ak[h],
                key_bias[b, h],
                feature_bias[h],
                out[b, h],
                Y[b, h],
                L[b, h],
            )
    return out, Y, L


def backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    aq: torch.Tensor,
    ak: torch.Tensor,
    key_bias: torch.Tensor,
    feature_bias: torch.Tensor,
    out: torch.Tensor,
    Y: torch.Tensor,
    L: torch.Tensor,
    causal: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, aq, ak, key_bias, feature_bias, given that of out and what `forward` returned."""
    inputs = q, k, v, aq, ak, key_bias, feature_bias
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs]
    for total in (grads[3], grads[4], grads[6]):
        total.zero_()
    one = (prefix if causal else bidirectional).backward
    with torch.autocast(q.device.type, enabled=False):
        for b, h in units(q, aq, causal):
            mine = q[b, h], k[b, h], v[b, h], aq[h], ak[h], key_bias[b, h], feature_bias[h]
            dq, dk, dv, daq, dak, dkey_bias, dfeature_bias = grads
            written = dq[b, h], dk[b, h], dv[b, h], dkey_bias[b, h]
            added = one(g[b, h], *mine, out[b, h], Y[b, h], L[b, h], *written)
            for total, part in zip((daq[h], dak[h], dfeature_bias[h]), added, strict=True):
                total += part.sum_to_size(total.shape)
    return grads


def units(q: torch.Tensor, aq: torch.Tensor, causal: bool) -> Iterator[tuple]:
    """Indices (b, h) of what is computed at once. On a CPU one head at a time where its products are long enough
    for the faster library (models/layers.py), else as many rows as fit the cache; elsewhere everything together."""
    (B, H, N, D), M = q.shape, aq.shape[1]
    tokens = min(N, prefix.ROWS) if causal else N
    if q.device.type == "cpu" and tokens * M * D >= LONG:
        yield from itertools.product(range(B), range(H))
        return
    rows = max(1, CACHE // (H * tokens * M)) if q.device.type == "cpu" else B
    for b in range(0, B, rows):
        yield slice(b, b + rows), slice(None)


def _save(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx, g, *_):
    run = _backward_op if torch.compiler.is_compiling() else backward
    return *run(g, *ctx.saved_tensors, ctx.causal), None


class _Attend(torch.autograd.Function):
    """`forward` and `backward` for eager mode. There is no second derivative: asking for one raises."""

    forward = staticmethod(forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(torch.autograd.function.once_differentiable(_gradients))


# The same for torch.compile, each one node of its graph: their chunks, unrolled, would be thousands.
_forward_op = torch.library.custom_op("lra::attend", forward, mutates_args=())
_backward_op = torch.library.custom_op("lra::attend_backward", backward, mutates_args=())
_forward_op.register_autograd(_gradients, setup_context=_save)


@_forward_op.register_fake
def _(q, k, v, aq, ak, key_bias, feature_bias, causal):
    return tuple(x.new_empty(shape) for x, shape in zip((v, aq, aq), _shapes(q, aq, causal), strict=True))


@_backward_op.register_fake
def _(g, q, k, v, aq, ak, key_bias, feature_bias, out, Y, L, causal):
    return [x.new_empty(x.shape) for x in (q, k, v, aq, ak, key_bias, feature_bias)]


def _shapes(q, aq, causal):
    """Of what `forward` returns."""
    (B, H, N, D), M = q.shape, aq.shape[1]
    return (B, H, N, D), (B, H, 0 if causal else M, D), (B, H, N if causal else M)
