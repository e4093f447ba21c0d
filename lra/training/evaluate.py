"""Evaluation: counts and predictions over a split, and how far an attention is from exact softmax."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lra.records.record import Execution
from lra.training.batches import UNASKED, evaluation_batches
from lra.training.distributed import ALONE, World
from tasks.base import Batch, Split


class Diverged(Exception):
    """A loss or a logit is not finite: the run failed."""


@dataclass(frozen=True)
class Where:
    """How a run is executed."""

    device: torch.device
    precision: str = "fp32"  # or bf16 autocast
    compiled: bool = False
    world: World = ALONE  # the processes of the run

    @property
    def execution(self) -> Execution:
        """What of it is part of the cell."""
        return Execution(self.precision, self.compiled, self.world.size)


@dataclass(frozen=True)
class Counts:
    """What an evaluation counted: mean loss in nats, correct examples of n, and each predicted class."""

    loss: float
    n_correct: int
    n: int
    predictions: np.ndarray  # uint8, in the order of the split


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    parts = vars(batch).values()
    return Batch(*(part if part is None else part.to(device, non_blocking=True) for part in parts))


def autocast(device: torch.device, precision: str):
    """The context a forward pass runs in: bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def summed_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over examples. An example with several answers, logits (B, K, C), has the mean of
    those that are asked for."""
    if labels.dim() == 1:
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    losses_BK = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none", ignore_index=UNASKED)
    return (losses_BK.sum(1) / (labels != UNASKED).sum(1)).sum()


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, towers: int, batch: int, where: Where, name="") -> Counts:
    """Every example of `split` once: none dropped, none twice. The model is left in the mode it was in. The ranks of a
    world share the batches, and each returns the counts of all. Losses and classes are read from the device once, at
    the end. Raises Diverged when a logit is not finite: the example has no class then."""
    training = model.training
    model.eval()
    total = len(split.labels)
    examples, losses, classes = [np.zeros(0, np.int64)], [], []
    batches = islice(evaluation_batches(split, towers, size=batch), where.world.rank, None, where.world.size)
    with tqdm(total=total, desc=f"evaluating {name}", unit="ex", disable=None, leave=False, delay=2) as bar:
        for chosen, part in batches:
            part = to_device(part, where.device)
            with autocast(where.device, where.precision):
                logits_BC = model(part.tokens_BTN, part.mask_BTN)
            examples.append(chosen)
            losses.append(summed_loss(logits_BC, part.labels_B))
            classes.append(logits_BC.argmax(-1).where(logits_BC.isfinite().all(-1), -1))
            bar.update(len(chosen))
    model.train(training)
    predictions = np.zeros(total, np.int64)
    predictions[np.concatenate(examples)] = [k for part in classes for k in part.tolist()]
    loss = math.fsum(x.item() for x in losses)
    loss, predictions = (sum(where.world.all_gather(x)) for x in (loss, predictions))
    if failed := int((predictions < 0).sum()):
        raise Diverged(f"logits of {failed} of {total} {name} examples are not finite")
    return Counts(loss / total, int((predictions == split.labels).sum()), total, predictions.astype(np.uint8))


def by_group(task: ModuleType, split: Split, predictions: np.ndarray) -> dict[str, Any]:
    """The record's `groups`, {"by": name, "counts": [[value, n_correct, n], ...]}, of a task that has them; else {}."""
    if not hasattr(task, "groups"):
        return {}
    (by, values), right = task.groups(split), predictions == split.labels
    alike = [(int(value), values == value) for value in np.unique(values)]
    return {"groups": {"by": by, "counts": [[value, int(right[of].sum()), int(of.sum())] for value, of in alike]}}


@torch.no_grad()
def capture(model: nn.Module, batch: Batch) -> list[tuple[nn.Module, tuple, torch.Tensor]]:
    """(attention, (q, k, v, mask), out) of each layer, in evaluation mode, on a batch."""
    calls, training = [], model.training
    hooks = [a.register_forward_hook(lambda *call: calls.append(call)) for a in model.encoder.attentions]
    model.eval()(batch.tokens_BTN, batch.mask_BTN)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def attention_report(model: nn.Module, batch: Batch) -> dict[str, float]:
    """How the attentions behave on a batch, averaged over layers.

    `approx_err`: |out - exact| / |exact| over real tokens (Frobenius), exact = softmax attention on the same q, k, v.
    `eff_rank`: exp of the entropy of the normalised singular values of each head's (N, D) output
    (Roy and Vetterli, EUSIPCO 2007), between 1 and D; averaged over heads.
    `redraws`: how often random projections were redrawn (0 for methods without any).
    """
    errors, ranks = [], []
    for _, (q_BHND, k_BHND, v_BHND, mask_BN), out_BHND in capture(model, batch):
        real_BN = q_BHND.new_ones(q_BHND[:, 0, :, 0].shape, dtype=torch.bool) if mask_BN is None else mask_BN
        real_B1N1, seen_B11N = real_BN[:, None, :, None], real_BN[:, None, None]
        exact_BHND = F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=seen_B11N)
        exact_BHND, out_BHND = exact_BHND * real_B1N1, out_BHND * real_B1N1
        errors.append(((out_BHND - exact_BHND).norm() / exact_BHND.norm()).item())
        if not out_BHND.isfinite().all():  # a run about to be recorded as failed; svdvals would raise
            ranks.append(float("nan"))
            continue
        spectrum_BHD = torch.linalg.svdvals(out_BHND.float().cpu())
        p_BHD = spectrum_BHD / spectrum_BHD.sum(-1, keepdim=True).clamp(min=1e-30)
        ranks.append(torch.special.entr(p_BHD).sum(-1).exp().mean().item())
    redraws = max(float(getattr(a, "redraws", 0)) for a in model.encoder.attentions)
    return {"approx_err": float(np.mean(errors)), "eff_rank": float(np.mean(ranks)), "redraws": redraws}
