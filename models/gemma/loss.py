"""Next-token loss, accuracy and divergence over a vocabulary so large that B x N x V is never held.

Gemma has 262,144 tokens to choose from: the logits of 1,024 positions are a gigabyte in fp32, and autograd would
hold it several times. Here they exist for one chunk of positions at a time. V counts the vocabulary, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

CHUNK = 128  # positions whose logits exist at a time


@dataclass(frozen=True)
class Head:
    """The output layer: weight (V, E), perhaps a bf16 copy made once, and Gemma 2's cap c tanh(logits / c)."""

    weight_VE: torch.Tensor
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module, precision: str) -> Head:
        """The head of a causal language model. With bf16 a frozen weight is cast here, once, not per chunk."""
        weight, cap = model.lm_head.weight, getattr(model.config, "final_logit_softcapping", None)
        if precision == "bf16" and not weight.requires_grad:
            weight = weight.detach().to(torch.bfloat16)
        return cls(weight, cap)

    def logits(self, hidden_TE: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(T, V), in the dtype of the weight; `out` spares allocating it (half of the time on a CPU)."""
        logits_TV = torch.mm(hidden_TE.to(self.weight_VE.dtype), self.weight_VE.T, out=out)
        return logits_TV if self.softcap is None else logits_TV.div_(self.softcap).tanh_().mul_(self.softcap)


class _CrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[target]; the gradients are made in the forward pass, while the logits are there.

        p = softmax(z),  log Z = max z - log max p,  dh = p W - W[target],  dW = p^T h - (h at rows target)

    Two products of the size of the logits' own, where recomputing the logits in the backward pass takes three.
    """

    @staticmethod
    def forward(ctx, hidden_TE, weight_VE, head, targets_T, chunk):
        needs_h, needs_w = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float64, device=hidden_TE.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_TE.device)
        grad_TE = torch.empty_like(hidden_TE) if needs_h else None
        grad_VE = torch.zeros_like(weight_VE) if needs_w else None
        buffers = [weight_VE.new_empty(min(chunk, len(targets_T)), len(weight_VE)) for _ in range(2)]
        for h_TE, target_T, part in _parts(hidden_TE.to(weight_VE.dtype), targets_T, chunk):
            z_TV, p_TV = (b[: len(h_TE)] for b in buffers)
            head.logits(h_TE, out=z_TV)
            torch.softmax(z_TV, -1, out=p_TV)
            gold_T1, best_T1 = z_TV.gather(1, target_T), z_TV.argmax(-1, keepdim=True)
            log_z_T1 = z_TV.gather(1, best_T1).double() - p_TV.gather(1, best_T1).double().log()
            total += (log_z_T1 - gold_T1).sum()
            correct += (best_T1 == target_T).sum()
            slope_T1 = 1.0
            if head.softcap is not None:
                slope_T1 = 1 - (gold_T1 / head.softcap).square()
                p_TV *= 1 - z_TV.div_(head.softcap).square_()
            if needs_h:
                grad_TE[part] = p_TV @ weight_VE - slope_T1 * weight_VE[target_T[:, 0]]
            if needs_w:
                grad_VE.addmm_(p_TV.T, h_TE).index_add_(0, target_T[:, 0], -slope_T1 * h_TE)
        ctx.save_for_backward(grad_TE, grad_VE)
        ctx.mark_non_differentiable(correct)
        return total.float(), correct

    @staticmethod
    def backward(ctx, grad, _):
        grads = (None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors)
        return *grads, None, None, None


def _parts(hidden_TE: torch.Tensor, targets_T: torch.Tensor, chunk: int):
    """(hidden, targets as a column, where) of one chunk of positions after another."""
    for start in range(0, len(targets_T), chunk):
        part = slice(start, start + chunk)
        yield hidden_TE[part], targets_T[part, None], part


def cross_entropy(
    hidden_TE: torch.Tensor, head: Head, targets_T: torch.Tensor, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of losses in nats, number of positions whose likeliest token is the target), never holding T x V."""
    with torch.autocast(hidden_TE.device.type, enabled=False):
        return _CrossEntropy.apply(hidden_TE, head.weight_VE, head, targets_T, chunk)


@dataclass(frozen=True)
class Reference:
    """What the divergence from a model's predictions p needs of it: sum_v p_v log p_v and sum_v p_v W_v."""

    negentropy_T: torch.Tensor
    mean_TE: torch.Tensor


@torch.no_grad()
def reference(hidden_TE: torch.Tensor, head: Head, chunk: int = CHUNK) -> Reference:
    """The predictions of the exact model, boiled down. Raises ValueError for a head with a soft cap."""
    if head.softcap is not None:
        raise ValueError("a capped head is not linear: its divergence cannot be boiled down")
    negentropies, means = [], []
    for h_TE in hidden_TE.split(chunk):
        log_p_TV = head.logits(h_TE).float().log_softmax(-1)
        p_TV = log_p_TV.exp()
        negentropies.append((p_TV * log_p_TV).sum(-1))
        means.append((p_TV.to(head.weight_VE.dtype) @ head.weight_VE).float())
    return Reference(torch.cat(negentropies), torch.cat(means))


@dataclass(frozen=True)
class Scores:
    """Per position: loss in nats, whether the likeliest token was right, KL(reference || this model) or None."""

    loss_T: torch.Tensor
    correct_T: torch.Tensor
    kl_T: torch.Tensor | None


@torch.no_grad()
def score(
    hidden_TE: torch.Tensor,
    head: Head,
    targets_T: torch.Tensor,
    against: Reference | None = None,
    chunk: int = CHUNK,
) -> Scores:
    """Scores of every position.

    The divergence costs no second set of logits: with z_v = h.W_v and log Z = logsumexp z, and the reference's p,

        KL(p || q) = sum_v p_v log p_v - h.(sum_v p_v W_v) + log Z
    """
    losses, corrects, log_zs = [], [], []
    for h_TE, target_T1, _ in _parts(hidden_TE, targets_T, chunk):
        z_TV = head.logits(h_TE).float()
        log_zs.append(z_TV.logsumexp(-1))
        losses.append(log_zs[-1] - z_TV.gather(1, target_T1)[:, 0])
        corrects.append(z_TV.argmax(-1) == target_T1[:, 0])
    kl_T = None
    if against is not None:
        cross_T = (hidden_TE.to(head.weight_VE.dtype).float() * against.mean_TE).sum(-1)
        kl_T = against.negentropy_T - cross_T + torch.cat(log_zs)
    return Scores(torch.cat(losses), torch.cat(corrects), kl_T)
