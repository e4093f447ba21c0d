"""One attention that also returns its log-sum-exp, and is differentiable in all of it.

    out_i = sum_n p_in v_n,    p_in = exp(q_i.k_n + bias_n - lse_i),    lse_i = log sum_n exp(q_i.k_n + bias_n)

is what every method of the family is made of. With g and dlse the gradients of out and lse,

    S_in = p_in (g_i.v_n - delta_i)     delta_i = g_i.out_i - dlse_i
    dq = S k     dk = S^T q     dv = p^T g     dbias_n = sum_i S_in

PyTorch's fused kernels run it in linear memory. On a CPU that is the forward pass: their backward pass knows neither a
gradient of the bias nor one of lse, and computes dq and dk whether they are wanted or not. On CUDA bias and dlse are
extra columns of the operands:

    q' = [q, 1]   k' = [k, bias]   v' = [v, 0]   out' = [out, -dlse]   g' = [g, 1]       dbias is the column of dk'

In half precision bias and dlse take several columns, each the rounding error of those before.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.base import wide

NEVER = -1e30  # bias of a key that nothing may look at: finite, and exp(NEVER - any logit) is exactly 0
SMALL = 2**23  # numbers in p, (B, H, Q, K), up to which a CPU is fastest with `plain`, p kept for the backward pass
CHUNK = 2**19  # numbers of p that a CPU computes again at a time, for the sake of its cache
Part = tuple[Tensor, Tensor | None]  # out (B, H, Q, D), and lse (B, H, Q) where it is asked for
aten = torch.ops.aten


class Kernels(NamedTuple):
    """A forward and a backward pass, as `forward` and `backward` describe them."""

    forward: Callable[..., Part]
    backward: Callable[..., list[Tensor | None]]


def flash(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, key_bias_BHK: Tensor, *, causal=False, mass=True) -> Part:
    """(out, lse) as above; causal (Q = K): over n <= i. Without `mass`, lse may be None.

    Computes in fp32 at least, but on a GPU in bf16 where v is: a CPU without instructions for bf16 takes four times as
    long in it. Never follows autocast; lse is in fp32 at least. Batch or heads may be expanded. Differentiable once,
    in every input and through both outputs.
    """
    device, dtype = v_BHKD.device.type, v_BHKD.dtype
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return flash(q_BHQD, k_BHKD, v_BHKD, key_bias_BHK, causal=causal, mass=mass)
    work = dtype if dtype == torch.bfloat16 and device != "cpu" else wide(dtype)
    inputs = q_BHQD.to(work), k_BHKD.to(work), v_BHKD.to(work), key_bias_BHK.to(wide(work))
    if torch.compiler.is_compiling():
        return _forward_op(*inputs, causal)
    return plain(*inputs, causal, mass) if in_memory(q_BHQD, k_BHKD) else _Flash.apply(*inputs, causal)


def in_memory(q_BHQD: Tensor, k_BHKD: Tensor) -> bool:
    """Whether `flash` runs `plain` because the matrix p is small."""
    small = q_BHQD.shape[:3].numel() * k_BHKD.shape[2] <= SMALL
    return small and q_BHQD.device.type == "cpu" and not torch.compiler.is_compiling()


def plain(q, k, v, key_bias, causal, mass=True):
    """The definition, with the matrix p in memory: out and, with `mass`, lse."""
    p, lse = weights(q, k, key_bias, causal, mass)
    return (p @ v.to(key_bias)).to(v.dtype), lse


def weights(q, k, key_bias, causal=False, mass=True):
    """p and, with `mass`, lse."""
    logits = (q.to(key_bias) @ k.to(key_bias).mT).add_(key_bias[..., None, :])
    if causal:
        logits = logits.masked_fill_(torch.ones(logits.shape[-2:], dtype=torch.bool).to(q.device).triu(1), -torch.inf)
    return _Softmax.apply(logits, mass)


class _Softmax(torch.autograd.Function):
    """p in the place of the logits, and lse; dlogits = p (dp - p.dp + dlse) in the place of dp. amax is kept out of
    PyTorch's gradients, which count its ties in int64."""

    @staticmethod
    def forward(ctx, logits, mass):
        top = logits.amax(-1) if mass else None
        p = torch.softmax(logits, -1, out=logits)
        ctx.mark_dirty(logits)
        ctx.save_for_backward(p)
        return p, top if top is None else top.sub_(p.amax(-1).log_())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dp, dlse):
        (p,) = ctx.saved_tensors
        torch.ops.aten._softmax_backward_data.out(dp, p, -1, p.dtype, grad_input=dp)
        return dp if dlse is None else dp.addcmul_(p, dlse[..., None]), None


def plain_backward(g, dlse, q, k, v, key_bias, out, lse, causal, wanted):
    """Its gradients, by chunks of the batch and of the longer one of queries and keys."""
    (B, H, Q, _), K = q.shape, k.shape[2]
    size = CHUNK if q.device.type == "cpu" else B * H * Q * K
    rows, tokens = max(1, size // (H * Q * K)), max(1, size // (H * min(Q, K)))
    delta, everything = (g * out).sum(-1).to(lse).sub_(dlse), slice(None)
    dq, dk, dv = (lse.new_empty(x.shape) if want else None for x, want in zip((q, k, v), wanted[:3], strict=True))
    dbias = lse.new_zeros(key_bias.shape)
    for b, start in itertools.product(range(0, B, rows), range(0, max(Q, K), tokens)):
        some = slice(start, start + tokens)
        i, n = (some, everything) if Q >= K else (everything, some)

        def part(x, tokens, b=b):
            return x[b : b + rows, :, tokens].flatten(0, 1)

        logits = torch.baddbmm(part(key_bias, n)[:, None], part(q, i).to(lse), part(k, n).to(lse).mT)
        weights = logits.sub_(part(lse, i)[..., None]).exp_()
        weights = weights.tril_(start if Q >= K else -start) if causal else weights
        S = torch.baddbmm(part(delta, i)[..., None], part(g, i).to(lse), part(v, n).to(lse).mT, beta=-1).mul_(weights)
        for grad, t, left, x, s in ((dq, i, S, k, n), (dk, n, S.mT, q, i), (dv, n, weights.mT, g, i)):
            if grad is not None:  # beta = 0 does not read what stands there
                target = grad[b : b + rows].flatten(0, 1)[:, t]
                target.baddbmm_(left, part(x, s).to(lse), beta=0.0 if t is some or not start else 1.0)
        dbias[b : b + rows, :, n] += S.sum(-2).unflatten(0, (-1, H))
    grads = zip((dq, dk, dv, dbias), (q, k, v, key_bias), strict=True)
    return [x if x is None else x.to(y.dtype) for x, y in grads]


def cpu_forward(q, k, v, key_bias, causal):
    """`forward` by PyTorch's flash attention on a CPU."""
    bias = key_bias[..., None, :]
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=bias, scale=1.0)


def cuda_forward(q, k, v, key_bias, causal):
    """`forward` by PyTorch's memory-efficient attention on CUDA."""
    operands = (widened(x, fill) for x, fill in ((q, 1.0), (k, key_bias), (v, 0.0)))
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(*operands, None, True, 0.0, causal, scale=1.0)
    return out[..., : v.shape[-1]], lse[..., : q.shape[2]]


def cuda_backward(g, dlse, q, k, v, key_bias, out, lse, causal, wanted):
    """`backward` by the same."""
    operands = [widened(x, fill) for x, fill in ((g, 1.0), (q, 1.0), (k, key_bias), (v, 0.0), (out, -dlse))]
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))  # as its forward returns it
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    operator = aten._scaled_dot_product_efficient_attention_backward
    found = [True, True, True, False]
    grads = operator(*operands[:4], None, operands[4], lse, seed, seed, 0.0, found, causal, scale=1.0)
    D = v.shape[-1]
    return [*(x[..., :D] for x in grads[:3]), grads[1][..., D].to(key_bias.dtype)]


def widened(x: Tensor, fill: Tensor | float) -> Tensor:
    """x with more columns, to a multiple of 8: a number, or the columns whose sum is the tensor `fill`, then zeros."""
    if x.shape[0] > 1 and x.stride(0) == 0 and not isinstance(fill, Tensor):
        return widened(x[:1], fill).expand(*x.shape[:-1], -1)
    D, columns = x.shape[-1], 3 if x.dtype == torch.bfloat16 else 1  # that hold a number of fp32
    out = x.new_zeros((*x.shape[:-1], D + columns + -(D + columns) % 8))
    out[..., :D] = x
    if not isinstance(fill, Tensor):
        out[..., D:] = fill
        return out
    for column in range(D, D + columns):
        out[..., column] = fill
        fill = fill - out[..., column]
    return out


KERNELS = {"cpu": Kernels(cpu_forward, plain_backward), "cuda": Kernels(cuda_forward, cuda_backward)}


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
            for run, back in (KERNELS[device], (plain, plain_backward)):
                out, lse, *_ = run(*inputs, False)
                results.append([out, lse, *back(out, lse, *inputs, out, lse, False, [True] * 4)])
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"the kernel of PyTorch raises {type(error).__name__}"
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-3
    same = all((x - y).abs().max() < tolerance for x, y in zip(*results, strict=True))
    return "" if same else "the kernel of PyTorch gives other numbers than the definition"


def forward(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """`flash`, without gradients."""
    fused = backend(v.device.type, v.dtype) == "fused"
    return (KERNELS[v.device.type].forward if fused else plain)(q, k, v, key_bias, causal)[:2]


def backward(g, dlse, q, k, v, key_bias, out, lse, causal, wanted):
    """Gradients of q, k, v and key_bias; of one that is not `wanted`, None or what the kernel gives nevertheless."""
    fused = backend(v.device.type, v.dtype) == "fused"
    run = KERNELS[v.device.type].backward if fused else plain_backward
    return run(g, dlse, q, k, v, key_bias, out, lse, causal, wanted)


class _Flash(torch.autograd.Function):
    """`forward` and `backward` for eager mode. There is no second derivative: asking for one raises."""

    @staticmethod
    def forward(ctx, *inputs):
        output = forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, dlse):
        return *backward(g, dlse, *ctx.saved_tensors, ctx.causal, ctx.needs_input_grad), None


# The same for torch.compile, each one node of its graph, which is fused or plain when it runs.
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor key_bias"
operation = functools.partial(torch.library.custom_op, mutates_args=())


@operation("lra::flash", schema=f"({INPUTS}, bool causal) -> (Tensor, Tensor)")
def _forward_op(*inputs):
    return tuple(x.contiguous() for x in forward(*inputs))


@operation(
    "lra::flash_backward", schema=f"(Tensor g, Tensor dlse, {INPUTS}, Tensor out, Tensor lse, bool causal) -> Tensor[]"
)
def _backward_op(*inputs):
    return [x.contiguous() for x in backward(*inputs, [True] * 4)]


def _save(ctx, inputs, output):
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, g, dlse):
    return *_backward_op(g, dlse, *ctx.saved_tensors, ctx.causal), None


_forward_op.register_autograd(_gradients, setup_context=_save)


@_forward_op.register_fake
def _(q, k, v, key_bias, causal):
    return v.new_empty((*q.shape[:-1], v.shape[-1])), key_bias.new_empty(q.shape[:-1])


@_backward_op.register_fake
def _(g, dlse, q, k, v, key_bias, out, lse, causal):
    return [x.new_empty(x.shape) for x in (q, k, v, key_bias)]
