"""Attention transfer: each replaced layer learns alone to reproduce the exact layer, before any finetuning.

The exact model runs once per batch, without gradient and without logits. A student is a copy of a replaced layer with
its new kernel. It gets the input x of the exact layer and is fitted to the output o of the exact layer:

    loss = |student(x) - o|^2 / |o|^2

No layer sees the errors of another: all learn at once, and the activations of one layer exist at a time.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn

from models.gemma.bridge import exact_attention, sockets, text_layers

QK = ("q_proj", "k_proj", "q_norm", "k_norm")
QKVO = (*QK, "v_proj", "o_proj")
PROJECTIONS = {"kernel": (), "kernel+qk": QK, "kernel+qkvo": QKVO, "all": QKVO}  # of a layer's attention


def layer_parameters(attention: nn.Module, train: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Of one replaced layer: (parameters of the kernel, pretrained projections that are trained with them)."""
    kernel = attention.socket.kernel
    unused = () if kernel.reads_qk else PROJECTIONS["kernel+qk"]
    names = [n for n in PROJECTIONS[train] if hasattr(attention, n) and n not in unused]
    return list(kernel.parameters()), [p for n in names for p in getattr(attention, n).parameters()]


class Transfer:
    """Students for all replaced layers of a model, and one optimizer for all of them."""

    def __init__(self, model: nn.Module, train: str, *, lr: float, lr_kernel: float):
        """`train`: a key of PROJECTIONS; `lr`: peak rates of AdamW. Raises ValueError if nothing can be trained."""
        self.model = model
        self.students: dict[int, nn.Module] = {}
        groups: list[dict] = [{"params": [], "lr": lr_kernel}, {"params": [], "lr": lr}]
        for index in sockets(model):
            student = deepcopy(text_layers(model)[index].self_attn).requires_grad_(False)
            for group, parameters in zip(groups, layer_parameters(student, train), strict=True):
                group["params"] += [p.requires_grad_() for p in parameters]
            self.students[index] = student
        if not any(g["params"] for g in groups):
            raise ValueError(f"nothing to train: this kernel learns nothing, and train is {train!r}")
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        self.peaks = [g["lr"] for g in groups]

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

        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = factor * peak
        self.optimizer.zero_grad(set_to_none=True)
        hooks = []
        for index, student in self.students.items():
            student.socket.kernel.before_step(step)
            layer = text_layers(self.model)[index].self_attn
            hooks.append(layer.register_forward_hook(fit(student), with_kwargs=True))
        try:
            with exact_attention(self.model), torch.no_grad():
                self.model.model(input_ids=tokens_BN, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        return sum(losses) / len(losses)

    def finish(self) -> None:
        """Copy the students' weights into the model."""
        for index, student in self.students.items():
            text_layers(self.model)[index].self_attn.load_state_dict(student.state_dict())
