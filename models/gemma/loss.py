"""Next-token loss, accuracy and divergence over a vocabulary so large that B x N x V is never held.

Gemma has V = 262,144 tokens. The logits of 1,024 positions are a gigabyte in fp32, and autograd would hold several
copies. Here logits exist for one chunk of positions at a time. V counts the vocabulary, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

CHUNK = 128  # positions whose logits exist at a time
Reference = tuple[torch.Tensor, torch.Tensor]  # of a model's predictions p: sum_v p_v log p_v, sum_v p_v W_v


@dataclass(frozen=True)
class Head:
    """The output layer: its weight (V, E), in fp32 or bf16, and the cap of Gemma 2: c tanh(logits / c)."""

    weight_VE: torch.Tensor
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module, precision: str) -> Head:
        """The head of a causal language model. With bf16, a frozen weight is cast once, here."""
        weight, cap = model.lm_head.weight, getattr(model.config, "final_logit_softcapping", None)
        if precision == "bf16" and not weight.requires_grad:
            weight = weight.detach().to(torch.bfloat16)
        return cls(weight, cap)

    def logits(self, hidden_TE: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(T, V), in the dtype of the weight; `out` spares allocating it (half of the time on a CPU)."""
        logits_TV = torch.mm(hidden_TE.to(self.weight_VE.dtype), self.weight_VE.T, out=out)
        return logits_TV if self.softcap is None else logits_TV.div_(self.softcap).tanh_().mul_(self.softcap)


class _CrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[target]. The forward pass computes the gradients too, while the logits exist.

        p = softmax(z),  log Z = max z - log max p,  dh = p W - W[target],  dW = p^T h - (h at rows target)

    Beside the logits this takes two matrix products of their size; logits made again in the backward pass take three.
    """

    @staticmethod
    def forward(ctx, hidden_TE, weight_VE, head, targets_T, chunk):
        needs_h, needs_w = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float64, device=hidden_TE.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_TE.device)
        grad_TE = torch.empty_like(hidden_TE) if needs_h else None
        grad_VE = torch.zeros_like(weight_VE) if needs_w else None
        buffers = [weight_VE.new_empty(min(chunk, len(targets_T)), len(weight_VE)) for _ in range(2)]
        cast_TE = hidden_TE.to(weight_VE.dtype)
        for start in range(0, len(targets_T), chunk):
            part = slice(start, start + chunk)
            h_TE, target_T1 = cast_TE[part], targets_T[part, None]
            z_TV, p_TV = (b[: len(h_TE)] for b in buffers)
            head.logits(h_TE, out=z_TV)
            torch.softmax(z_TV, -1, out=p_TV)
            gold_T1, best_T1 = z_TV.gather(1, target_T1), z_TV.argmax(-1, keepdim=True)
            log_z_T1 = z_TV.gather(1, best_T1).double() - p_TV.gather(1, best_T1).double().log()
            total += (log_z_T1 - gold_T1).sum()
            correct += (best_T1 == target_T1).sum()
            slope_T1 = 1.0
            if head.softcap is not None:
                slope_T1 = 1 - (gold_T1 / head.softcap).square()
                p_TV *= 1 - z_TV.div_(head.softcap).square_()
            if needs_h:
                grad_TE[part] = p_TV @ weight_VE - slope_T1 * weight_VE[target_T1[:, 0]]
            if needs_w:
                grad_VE.addmm_(p_TV.T, h_TE).index_add_(0, target_T1[:, 0], -slope_T1 * h_TE)
        ctx.save_for_backward(grad_TE, grad_VE)
        ctx.mark_non_differentiable(correct)
        return total.float(), correct

    @staticmethod
    def backward(ctx, grad, _):
        grads = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None


def cross_entropy(
    hidden_TE: torch.Tensor, head: Head, targets_T: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of losses in nats, number of positions whose likeliest token is the target); T x V never exists."""
    with torch.autocast(hidden_TE.device.type, enabled=False):
        return _CrossEntropy.apply(hidden_TE, head.weight_VE, head, targets_T, chunk)


@torch.no_grad()
def reference(hidden_TE: torch.Tensor, head: Head, chunk: int = CHUNK) -> Reference:
    """What KL(p || q) needs of a model's predictions p. Raises ValueError for a head with a soft cap."""
    if head.softcap is not None:
        raise ValueError("a capped head is not linear: its divergence needs all logits")
    parts, weight_VE = [], head.weight_VE
    for h_TE in hidden_TE.split(chunk):
        # Sums of 262,144 numbers of fp32: log_softmax and one long product would each be some 1e-4 off.
        log_p_TV = head.logits(h_TE).float()
        log_p_TV -= log_p_TV.logsumexp(-1, keepdim=True)
        p_TV = log_p_TV.exp()
        pairs = zip(p_TV.to(weight_VE.dtype).split(4096, 1), weight_VE.split(4096), strict=True)
        parts.append(((p_TV * log_p_TV).sum(-1), sum((p @ weight).float() for p, weight in pairs)))
    negentropy_T, mean_TE = map(torch.cat, zip(*parts, strict=True))
    return negentropy_T, mean_TE


@torch.no_grad()
def score(
    hidden_TE: torch.Tensor, head: Head, targets_T: torch.Tensor, against: Reference | None = None, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of every position: loss in nats, whether the likeliest token was right, KL(reference || this model) or None.

    The loss is NaN where a logit is not finite. The divergence needs no second set of logits. With z_v = h.W_v,
    log Z = logsumexp z and the reference's p:

        KL(p || q) = sum_v p_v log p_v - h.(sum_v p_v W_v) + log Z
    """
    parts = []
    for h_TE, target_T1 in zip(hidden_TE.split(chunk), targets_T[:, None].split(chunk), strict=True):
        z_TV = head.logits(h_TE).float()
        log_z_T = z_TV.logsumexp(-1)
        finite_T = log_z_T.isfinite() & z_TV.amin(-1).isfinite()  # log Z shows NaN and inf, the least logit -inf
        loss_T = (log_z_T - z_TV.gather(1, target_T1)[:, 0]).where(finite_T, torch.nan)
        parts.append((log_z_T, loss_T, z_TV.argmax(-1) == target_T1[:, 0]))
    log_z_T, loss_T, correct_T = map(torch.cat, zip(*parts, strict=True))
    if against is None:
        return loss_T, correct_T, None
    negentropy_T, mean_TE = against
    cross_T = (hidden_TE.to(head.weight_VE.dtype).float() * mean_TE).sum(-1)
    return loss_T, correct_T, negentropy_T - cross_T + log_z_T
