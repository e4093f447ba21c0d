"""One attention that also returns its log-sum-exp, and is differentiable in all of it.

    out_i = sum_n softmax_n(q_i.k_n + bias_n) v_n,    lse_i = log sum_n exp(q_i.k_n + bias_n)

is what every method of the family is made of. PyTorch's fused kernels compute it in linear memory, but know neither a
bias of the keys with a gradient nor a gradient through lse. Both are extra columns of the operands:

    q' = [q, 1]   k' = [k, bias]   v' = [v, 0]          dbias is the column of dk'
    out' = [out, -dlse]   dout' = [dout, 1]             for the backward kernel

The second line works because the kernel computes dlogits_in = p_in (dout_i.v_n - delta_i) with delta_i = dout_i.out_i:
the columns change delta to delta - dlse, and nothing else. In half precision bias and dlse take several columns, each
the rounding error of those before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NEVER = -1e30  # bias of a key that nothing may look at: finite, and exp(NEVER - any logit) is exactly 0
SMALL = 2**20  # numbers in the B x H x Q x K matrix up to which, on a CPU, writing it out is the faster way
aten = torch.ops.aten


class Kernels(NamedTuple):
    """A fused attention without scale: (q, k, v, causal) -> (out, lse), its backward, and a divisor of widths."""

    forward: Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    divisor: int


def cpu_forward(q, k, v, causal):
    """PyTorch's flash attention on a CPU: (out, lse)."""
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=1.0)


def cpu_backward(g, q, k, v, out, lse, causal):
    """Its gradients of q, k and v."""
    operator = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return operator(g, q, k, v, out, lse, 0.0, causal, scale=1.0)


def cuda_forward(q, k, v, causal):
    """PyTorch's memory-efficient attention on CUDA: (out, lse)."""
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=1.0)
    return out, lse[..., : q.shape[2]]


def cuda_backward(g, q, k, v, out, lse, causal):
    """Its gradients of q, k and v."""
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))  # as its forward returns it
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]
    operator = aten._scaled_dot_product_efficient_attention_backward
    return operator(g, q, k, v, None, out, lse, seed, seed, 0.0, wanted, causal, scale=1.0)[:3]


KERNELS = {"cpu": Kernels(cpu_forward, cpu_backward, 1), "cuda": Kernels(cuda_forward, cuda_backward, 8)}


def flash(
    q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, key_bias_BHK: Tensor, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, lse), (B, H, Q, D) and (B, H, Q), as above; causal (Q = K): over n <= i.

    Computes in the type of v, in fp32 instead of fp16, and never follows autocast; lse is in fp32 at least. Batch or
    heads may be expanded. Differentiable once, in every input and through both outputs.
    """
    work = torch.float32 if v_BHKD.dtype == torch.float16 else v_BHKD.dtype
    inputs = q_BHQD.to(work), k_BHKD.to(work), v_BHKD.to(work), key_bias_BHK.to(wide(work))
    with torch.autocast(v_BHKD.device.type, enabled=False):
        if torch.compiler.is_compiling():
            return _forward_op(*inputs, causal)
        small = v_BHKD.device.type == "cpu" and q_BHQD.shape[:3].numel() * k_BHKD.shape[2] <= SMALL
        return plain(*inputs, causal) if small else _Flash.apply(*inputs, causal)


def wide(dtype: torch.dtype) -> torch.dtype:
    """fp32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def logits(q, k, key_bias, causal):
    """q.k + bias, (.., Q, K); -inf where a causal query may not look."""
    logits_QK = q.to(key_bias) @ k.to(key_bias).mT + key_bias[..., None, :]
    if not causal:
        return logits_QK
    return logits_QK.masked_fill(torch.ones_like(logits_QK, dtype=torch.bool).triu(1), float("-inf"))


def plain(q, k, v, key_bias, causal):
    """The definition, with the Q x K matrix in memory."""
    logits_QK = logits(q, k, key_bias, causal)
    return (logits_QK.softmax(-1) @ v.to(key_bias)).to(v.dtype), logits_QK.logsumexp(-1)


def plain_backward(g, dlse, q, k, v, key_bias, out, lse, causal):
    """Its gradients, with p_QK computed again."""
    p, g, q_, k_ = (logits(q, k, key_bias, causal) - lse[..., None]).exp(), *(x.to(lse) for x in (g, q, k))
    delta = (g * out).sum(-1) - dlse
    S = p * (g @ v.to(lse).mT - delta[..., None])
    return (S @ k_).to(q.dtype), (S.mT @ q_).to(k.dtype), (p.mT @ g).to(v.dtype), S.sum(-2)


def backend(device: str, dtype: torch.dtype) -> str:
    """`fused` or `plain`: how `flash` computes on this type of device, in this type of numbers."""
    return "plain" if why_plain(device, dtype) else "fused"


def why_plain(device: str, dtype: torch.dtype) -> str:
    """Why there is no fused kernel to compute with; empty where there is one.

    PyTorch may have none, or one that no longer gives what `plain` gives (tried once), or fused kernels may be
    switched off (torch.nn.attention.sdpa_kernel).
    """
    return _trial(device, dtype) if torch.backends.cuda.flash_sdp_enabled() else "fused kernels are switched off"


@functools.cache
def _trial(device, dtype):
    if device not in KERNELS or dtype == torch.float64 and device == "cuda":
        return "PyTorch has no such kernel"
    source = torch.Generator().manual_seed(0)
    shapes = (2, 2, 3, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5)
    inputs = [torch.randn(shape, generator=source).to(device, dtype) for shape in shapes]
    inputs[3] = inputs[3].to(wide(dtype))
    try:
        results = []
        with torch.no_grad():
            for run, back in ((fused, fused_backward), (plain, plain_backward)):
                out, lse = run(*inputs, False)
                results.append([out, lse, *back(out, lse, *inputs, out, lse, False)])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"the kernel of PyTorch raises {type(error).__name__}"
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3
    same = all((x - y).abs().max() < tolerance for x, y in zip(*results, strict=True))
    return "" if same else "the kernel of PyTorch gives other numbers than the definition"


def widened(x: Tensor, extra: int, fill: Tensor | float, dtype: torch.dtype) -> Tensor:
    """x with `extra` more columns: a number, or the columns whose sum is the tensor `fill`, then zeros."""
    if x.shape[0] > 1 and x.stride(0) == 0 and not isinstance(fill, Tensor):
        return widened(x[:1], extra, fill, dtype).expand(*x.shape[:-1], -1)
    D = x.shape[-1]
    out = torch.empty((*x.shape[:-1], D + extra), dtype=dtype, device=x.device)
    out[..., :D] = x
    if not isinstance(fill, Tensor):
        out[..., D:] = fill
        return out
    for column in range(D, D + columns(dtype)):
        out[..., column] = fill
        fill = fill - out[..., column]
    out[..., D + columns(dtype) :] = 0
    return out


def columns(dtype: torch.dtype) -> int:
    """How many columns of `dtype` hold a number of fp32."""
    return 3 if dtype == torch.bfloat16 else 1


def forward(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`flash`, without gradients."""
    if backend(v.device.type, v.dtype) == "plain":
        return plain(q, k, v, key_bias, causal)
    return fused(q, k, v, key_bias, causal)


def fused(q, k, v, key_bias, causal):
    """`flash` by the kernel of the device."""
    kernels, (D, dtype) = KERNELS[v.device.type], (v.shape[-1], v.dtype)
    extra = columns(dtype) + -(D + columns(dtype)) % kernels.divisor
    operands = ((q, 1.0), (k, key_bias), (v, 0.0))
    out, lse = kernels.forward(*(widened(x, extra, fill, dtype) for x, fill in operands), causal)
    return out[..., :D], lse


def backward(
    g: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias."""
    run = plain_backward if backend(v.device.type, v.dtype) == "plain" else fused_backward
    return run(g, dlse, q, k, v, key_bias, out, lse, causal)


def fused_backward(g, dlse, q, k, v, key_bias, out, lse, causal):
    """The same by the kernel of the device."""
    kernels, (D, dtype) = KERNELS[v.device.type], (v.shape[-1], v.dtype)
    extra = columns(dtype) + -(D + columns(dtype)) % kernels.divisor
    operands = ((g, 1.0), (q, 1.0), (k, key_bias), (v, 0.0), (out, -dlse))
    dq, dk, dv = kernels.backward(*(widened(x, extra, fill, dtype) for x, fill in operands), lse, causal)
    return dq[..., :D], dk[..., :D], dv[..., :D], dk[..., D].to(key_bias.dtype)


def _save(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, g, dlse):
    run = _backward_op if torch.compiler.is_compiling() else backward
    return *run(g, dlse, *ctx.saved_tensors, ctx.causal), None


class _Flash(torch.autograd.Function):
    """`forward` and `backward` for eager mode. There is no second derivative: asking for one raises."""

    forward = staticmethod(forward)
    setup_context = staticmethod(_save)
    backward = staticmethod(torch.autograd.function.once_differentiable(_gradients))


# The same for torch.compile, each one node of its graph, which is fused or plain when it runs.
@functools.partial(torch.library.custom_op, "lra::flash", mutates_args=())
def _forward_op(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = forward(q, k, v, key_bias, causal)
    return out.contiguous(), lse.contiguous()


@functools.partial(torch.library.custom_op, "lra::flash_backward", mutates_args=())
def _backward_op(
    g: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = backward(g, dlse, q, k, v, key_bias, out, lse, causal)
    return tuple(x.contiguous() for x in grads)


_forward_op.register_autograd(_gradients, setup_context=_save)


@_forward_op.register_fake
def _(q, k, v, key_bias, causal):
    return v.new_empty((*q.shape[:-1], v.shape[-1])), key_bias.new_empty(q.shape[:-1])


@_backward_op.register_fake
def _(g, dlse, q, k, v, key_bias, out, lse, causal):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, key_bias))
