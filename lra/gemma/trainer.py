"""The state of one finetuning run, what of the model it trains, and the optimizer step that advances it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from lra.gemma.run import Cell
from lra.machine import PeakMemory
from lra.options import UsageError
from lra.training.evaluate import autocast
from lra.training.optim import learning_rate
from models.gemma import bridge
from models.gemma.loss import Head, cross_entropy
from models.gemma.transfer import PROJECTIONS, layer_parameters
from tasks.base import Optim


@dataclass
class Progress:
    """The part of a run's state that is plain data; kept in the checkpoint's header."""

    step: int = 0
    resumed: int = 0
    seconds: float = 0.0  # of training steps, validation and transfer excluded
    transfer_seconds: float = 0.0
    transfer_losses: list[float] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)  # of every step; null: not finite
    curve: list[list] = field(default_factory=list)  # [step, split, loss, n_correct, n]


class Finetuner:
    """Model, optimizer, data and progress of one cell."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cell, self.device, r = cell, device, cell.recipe
        self.memory = PeakMemory(device)
        self.model = cell.plug_in(device)
        self.groups = trainable(self.model, r["train"])
        peaks = (r["lr_kernel"], r["lr"])
        self.optimizer = torch.optim.AdamW(
            [{"params": g, "lr": p} for g, p in zip(self.groups, peaks, strict=True)],
            betas=(0.9, 0.99), weight_decay=0.0,
        )  # fmt: skip
        self.peaks = peaks
        self.head = Head.of(self.model, cell.precision)
        if r["recompute"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        train = cell.blocks["train"]
        steps = len(train.tokens) // r["batch"]
        self.optim = Optim(steps=steps, lr=1.0, warmup=max(1, steps // 20))
        self.order = np.random.default_rng(cell.seed).permutation(len(train.tokens))
        self.progress = Progress()

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N) and which next tokens count (B, N - 1), of one step; every block is read once."""
        size = self.cell.recipe["batch"]
        rows = self.order[step * size : (step + 1) * size]
        train = self.cell.blocks["train"]
        tokens, scored = torch.from_numpy(train.tokens[rows]), torch.from_numpy(train.scored[rows])
        return tokens.long().to(self.device), scored.to(self.device)

    def step(self, step: int) -> tuple[float, float, float]:
        """One optimizer step: (mean loss, accuracy, gradient norm before clipping)."""
        for socket in bridge.sockets(self.model).values():
            socket.kernel.before_step(step)
        factor = learning_rate(step, self.optim)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = factor * peak
        tokens_BN, scored_BN = self.batch(step)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.cell.precision):
            h_BNE = self.model.model(input_ids=tokens_BN[:, :-1], use_cache=False).last_hidden_state
        total, correct = cross_entropy(h_BNE[scored_BN], self.head, tokens_BN[:, 1:][scored_BN])
        n = int(scored_BN.sum())
        (total / n).backward()
        norm = nn.utils.clip_grad_norm_([p for g in self.groups for p in g], 1.0)
        self.optimizer.step()
        return total.item() / n, int(correct) / n, norm.item()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that differs from the base model: trained weights, and the kernels with their buffers."""
        trained = {id(p) for g in self.groups for p in g}
        found = {n: p for n, p in self.model.named_parameters() if id(p) in trained}
        return found | {n: t for n, t in self.model.state_dict().items() if ".socket." in n}


def trainable(model: nn.Module, train: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze the rest; returns (parameters of kernels, pretrained parameters). UsageError if there are none."""
    model.requires_grad_(False).train()
    layers = bridge.text_layers(model)
    kernels, pretrained = [], []
    for index in bridge.sockets(model):
        own, projections = layer_parameters(layers[index].self_attn, train)
        kernels += own
        pretrained += projections
    if train == "all":
        outer = [p for m in (model.model.embed_tokens, model.lm_head) for p in m.parameters()]
        skip = {id(p) for p in outer + kernels + unread(model)}
        pretrained = [p for p in model.parameters() if id(p) not in skip]
    if not kernels and not pretrained:
        raise UsageError(
            f"--train {train}: this attention learns nothing of its own; use --train kernel+qkvo"
        )
    for p in (*kernels, *pretrained):
        p.requires_grad_()
    return kernels, pretrained


def unread(model: nn.Module) -> list[nn.Parameter]:
    """What makes queries and keys for kernels that look at neither."""
    layers, names = bridge.text_layers(model), PROJECTIONS["kernel+qk"]
    blind = [layers[i].self_attn for i, s in bridge.sockets(model).items() if not s.kernel.reads_qk]
    return [p for a in blind for n in names if hasattr(a, n) for p in getattr(a, n).parameters()]
