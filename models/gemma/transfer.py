"""Attention transfer: each replaced layer learns alone to reproduce the exact layer, before any finetuning.

The exact model runs once per batch, without gradient and without logits. A student is a copy of a replaced layer with
its new kernel. It gets the input x of the exact layer and is fitted to the output o of the exact layer:

    loss = |student(x) - o|^2 / |o|^2

No layer sees the errors of another: all learn at once, and the activations of one layer exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy

import torch
from torch import nn

from models.gemma.bridge import exact_attention, sockets, text_layers

QK = ("q_proj", "k_proj", "q_norm", "k_norm")
QKVO = (*QK, "v_proj", "o_proj")
PROJECTIONS = {"kernel": (), "kernel+qk": QK, "kernel+qkvo": QKVO, "all": QKVO}  # of a layer's attention


def parameter_groups(attentions: Iterable[nn.Module], train: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of replaced layers: (parameters of the kernels, pretrained projections that are trained with them)."""
    kernels, pretrained = [], []
    for attention in attentions:
        kernel = attention.socket.kernel
        unused = () if kernel.reads_qk else PROJECTIONS["kernel+qk"]
        names = [n for n in PROJECTIONS[train] if hasattr(attention, n) and n not in unused]
        kernels += kernel.parameters()
        pretrained += [p for n in names for p in getattr(attention, n).parameters()]
    return kernels, pretrained


def adamw(groups: Sequence[list[nn.Parameter]], peaks: Sequence[float]) -> torch.optim.AdamW:
    """AdamW without decay; each group has a peak rate of its own."""
    rated = [{"params": parameters, "lr": peak} for parameters, peak in zip(groups, peaks, strict=True)]
    return torch.optim.AdamW(rated, betas=(0.9, 0.99), weight_decay=0.0)


def set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], factor: float) -> None:
    """Learning rates for the next step: `factor` times each group's peak."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = factor * peak


class Transfer:
    """Students for all replaced layers of a model, and one optimizer for all of them."""

    def __init__(self, model: nn.Module, train: str, peaks: Sequence[float]):
        """`train`: a key of PROJECTIONS; `peaks`: peak learning rates of kernels and of projections."""
        self.model, self.peaks = model, peaks
        self.students = {i: deepcopy(text_layers(model)[i].self_attn).requires_grad_(False) for i in sockets(model)}
        groups = parameter_groups(self.students.values(), train)
        self.parameters = [p.requires_grad_() for p in sum(groups, [])]
        self.optimizer = adamw(groups, peaks)

    def step(self, tokens_BN: torch.Tensor, step: int, factor: float) -> float:
        """One optimizer step at `factor` times the peak rates; returns the loss, averaged over layers."""
        losses: list[float] = []

        def fit(student):
            def hook(_, args, kwargs, output):
                with torch.enable_grad():
                    made, target = student(*args, **kwargs)[0].float(), output[0].float()
                    loss = (made - target).square().sum() / target.square().sum()
                    loss.backward()
                losses.append(loss.item())

            return hook

        set_rates(self.optimizer, self.peaks, factor)
        self.optimizer.zero_grad(set_to_none=True)
        with ExitStack() as hooks, exact_attention(self.model), torch.no_grad():
            for index, student in self.students.items():
                student.socket.kernel.before_step(step)
                layer = text_layers(self.model)[index].self_attn
                hooks.enter_context(layer.register_forward_hook(fit(student), with_kwargs=True))
            self.model.model(input_ids=tokens_BN, use_cache=False)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return sum(losses) / len(losses)

    def finish(self) -> None:
        """Copy the students' weights into the model."""
        for index, student in self.students.items():
            text_layers(self.model)[index].self_attn.load_state_dict(student.state_dict())
