"""The state of a run, and the optimizer step that advances it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from lra.machine import PeakMemory
from lra.training.batches import Batches
from lra.training.config import Run
from lra.training.distributed import ALONE, World, gradient_sync
from lra.training.evaluate import Counts, autocast, evaluate, to_device
from lra.training.optim import build_optimizer, learning_rate, micro_batches
from tasks.base import Batch, Optim
from tasks.store.prepared import Prepared


class Diverged(Exception):
    """The loss stopped being finite."""


@dataclass(frozen=True)
class Where:
    """How a run is executed: nothing here changes what is measured, except by rounding."""

    device: torch.device
    precision: str = "fp32"  # or bf16 autocast
    compiled: bool = False
    debug: bool = False  # look for values that are not finite wherever an attention is called
    world: World = ALONE  # the processes of the run


@dataclass
class Progress:
    """The part of a run's state that is plain data; kept in the checkpoint's header."""

    step: int = 0
    best_step: int = 0
    best_correct: int = -1
    resumed: int = 0
    seconds: float = 0.0  # of training steps, validation excluded
    tokens: int = 0
    # since the last validation: sum of losses, number correct, steps
    window: list[float] = field(default_factory=lambda: [0.0, 0, 0])
    curve: list[list] = field(default_factory=list)  # [step, split, loss, n_correct, n]


class Trainer:
    """Model, optimizer, data and progress of one run, and the optimizer step that advances them."""

    def __init__(self, run: Run, prepared: Prepared, where: Where):
        self.run, self.prepared, self.where, self.optim = run, prepared, where, run.recipe.train
        self.memory = PeakMemory(where.device)
        self.model = run.build_model()
        self.model.to(where.device).train()
        if where.debug:
            for layer, attention in enumerate(self.model.encoder.attentions):
                attention.register_forward_hook(finite(layer, self))
        self.forward = where.world.data_parallel(torch.compile(self.model) if where.compiled else self.model)
        where.world.reseed(run.seed)
        self.optimizer = build_optimizer(self.model, self.optim)
        train_split = prepared.splits["train"]
        self.batches = Batches(train_split, run.meta.towers, size=self.optim.batch, seed=run.seed)
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}

    def step(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One optimizer step: (mean loss, number correct, gradient norm before clipping), left on the device."""
        o, device, world = self.optim, self.where.device, self.where.world
        for attention in self.model.encoder.attentions:
            if attention.adapts:
                world.broadcast_buffers(attention)
            attention.before_step(step)
        if step % o.eval_every == 0:
            world.check_equal("weights or projections", lambda: tensors_sha256(self.model.state_dict()))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, o)
        batch = self.batches.batch(step)
        self.progress.tokens += batch.tokens_BTN.numel()
        mine = to_device(world.shard(batch), device)
        loss, correct, norm = update(self.forward, self.optimizer, mine, o, self.where.precision)
        return world.all_reduce(loss / world.size), world.all_reduce(correct), norm

    def evaluate(self, split: str) -> Counts:
        """Counts over a split, in batches twice the training size."""
        return evaluate(
            self.model,
            self.prepared.splits[split],
            self.run.meta.towers,
            batch=2 * self.optim.batch,
            device=self.where.device,
            precision=self.where.precision,
            name=split,
            world=self.where.world,
        )


def finite(layer: int, trainer: Trainer):
    """A hook that raises Diverged, naming what of an attention's inputs and output is not finite, and when."""

    def check(attention, inputs, out):
        for name, x in (*zip("qkv", inputs, strict=False), ("the output", out)):
            if not x.isfinite().all():
                where = f"of {attention.name} in layer {layer} at step {trainer.progress.step + 1}"
                raise Diverged(f"{name} {where} is not finite")

    return check


def update(
    forward: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    optim: Optim,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the mean loss over `batch`, in micro-batches, clipped, and one optimizer step.

    Returns (loss, number correct, gradient norm before clipping). lra/scaling/count.py counts what this does.
    """
    device, examples = batch.labels_B.device, len(batch.labels_B)
    optimizer.zero_grad(set_to_none=True)
    loss, correct = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64)
    for number, part in enumerate(micro_batches(batch, optim.accumulate), 1):
        with gradient_sync(forward, last=number == optim.accumulate):
            with autocast(device, precision):
                logits_BC = forward(part.tokens_BTN, part.mask_BTN)
            part_loss = F.cross_entropy(logits_BC.float(), part.labels_B, reduction="sum") / examples
            part_loss.backward()
        loss += part_loss.detach()
        correct += (logits_BC.argmax(-1) == part.labels_B).sum()

    norm = nn.utils.clip_grad_norm_(forward.parameters(), optim.clip)
    optimizer.step()
    return loss, correct, norm


def tensors_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names and contents, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
