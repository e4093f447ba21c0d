"""Finetuning of one experiment: what is trained, its optimizer step, its transfer, its validations and its test."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lra.gemma.experiment import Experiment, Method, evaluate, hidden, plug_in
from lra.gemma.weights import Base
from lra.machine import PeakMemory, StopSignals
from lra.options import UsageError
from lra.records.record import finite
from lra.training import checkpoint
from lra.training.evaluate import Diverged, autocast
from lra.training.log import RunLog
from lra.training.train import Interrupted
from lra.training.trainer import Progress, Training, Where, learning_rate
from models.gemma import bridge
from models.gemma.loss import Head, cross_entropy
from models.gemma.saved import restore
from models.gemma.transfer import PROJECTIONS, Transfer, adamw, parameter_groups, set_rates
from tasks.base import Optim

FORMAT = "lra-gemma-adapter/1"  # one safetensors file: what was trained; in its header, the base model


@dataclass
class FinetuningProgress(Progress):
    """Adds what the record of a finetuning keeps of every step."""

    transfer_seconds: float = 0.0
    transfer_losses: list[float | None] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)  # null: not finite


class Finetuner(Training):
    """A finetuning as train.py sees it. Nothing is selected by validation: the weights of the last step are tested."""

    read_every = 1

    def __init__(self, experiment: Experiment, device: torch.device, command: str):
        self.experiment, self.command, self.recipe = experiment, command, experiment.recipe
        self.title, self.digest, self.seed = experiment.method.attention, experiment.digest, experiment.seed
        self.where = Where(device, experiment.precision)
        self.memory = PeakMemory(device)
        self.model = experiment.plug_in(device)
        self.groups = trainable(self.model, self.recipe["train"])
        self.peaks = self.recipe["lr_kernel"], self.recipe["lr"]
        self.optimizer = adamw(self.groups, self.peaks)
        self.head = Head.of(self.model, experiment.precision)
        if self.recipe["recompute"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.train = experiment.blocks["train"]
        self.steps = len(self.train.tokens) // self.recipe["batch"]
        self.eval_every = max(1, math.ceil(self.steps / self.recipe["evaluations"]))
        self.save_every = self.recipe["checkpoint_every"]
        self.order = np.random.default_rng(self.seed).permutation(len(self.train.tokens))
        self.progress = FinetuningProgress()

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, N) and which next tokens count (B, N - 1), of one step; every block is read once."""
        size = self.recipe["batch"]
        rows = self.order[step * size : (step + 1) * size]
        tokens, scored = torch.from_numpy(self.train.tokens[rows]), torch.from_numpy(self.train.scored[rows])
        return tokens.long().to(self.where.device), scored.to(self.where.device)

    def begin(self, log: RunLog, stop: StopSignals) -> bool:
        """Attention transfer, if asked for, on the training blocks, which the finetuning then reads again."""
        if self.recipe["warmstart"] != "transfer":
            return True
        r, p = self.recipe, self.progress
        steps = max(1, r["transfer_tokens"] // (r["batch"] * self.experiment.length))
        students, start = Transfer(self.model, r["train"], self.peaks), time.perf_counter()
        for step in tqdm(range(steps), desc="transfer", unit="step", disable=None):
            if stop.requested:
                raise Interrupted("stopped during the transfer, which starts again with the same command")
            with autocast(self.where.device, self.where.precision):
                loss = students.step(self.batch(step % self.steps)[0], step, factor(step, steps))
            p.transfer_losses.append(finite(loss))
            log.writer.add_scalar("transfer/loss", loss, step + 1)
            if not math.isfinite(loss):
                raise Diverged(f"transfer loss is not finite at step {step + 1}")
        students.finish()
        p.transfer_seconds += time.perf_counter() - start
        return True

    def step(self, step: int) -> tuple[float, torch.Tensor, torch.Tensor]:
        """One optimizer step: (mean loss, number correct, gradient norm before clipping)."""
        for socket in bridge.sockets(self.model).values():
            socket.kernel.before_step(step)
        set_rates(self.optimizer, self.peaks, factor(step, self.steps))
        tokens_BN, scored_BN = self.batch(step)
        self.optimizer.zero_grad(set_to_none=True)
        h_BNE = hidden(self.model, tokens_BN, self.where.precision)
        total, correct = cross_entropy(h_BNE[scored_BN], self.head, tokens_BN[:, 1:][scored_BN])
        self.predictions = int(scored_BN.sum())
        self.progress.tokens += tokens_BN.numel()
        (total / self.predictions).backward()
        norm = nn.utils.clip_grad_norm_(sum(self.groups, []), 1.0)
        self.optimizer.step()
        return total.item() / self.predictions, correct, norm

    def count(self, loss: float, correct: int) -> None:
        """Every loss is in the record."""
        self.progress.losses.append(finite(loss))

    def validate(self) -> dict[str, float]:
        """Count on the validation blocks."""
        s = self.evaluate("val")
        self.progress.curve.append([self.progress.step, "val", s["loss"], s["n_correct"], s["n_test"]])
        return {"val/loss": s["loss"], "val/acc": s["n_correct"] / s["n_test"]}

    def test(self) -> dict[str, Any]:
        """Count on the test blocks."""
        return self.evaluate("test")

    def evaluate(self, split: str) -> dict[str, Any]:
        """Counts on all blocks of a split."""
        e = self.experiment
        return evaluate(self.model, self.head, split, e.blocks[split], e.precision, self.where.device)

    def outcome(self, tested: dict[str, Any], folder: Path) -> dict[str, Any]:
        """Counts of every block. What was trained becomes an adapter, with what puts it on its base model again."""
        e = self.experiment
        base = {"name": e.base.name, "source": e.base.source, "sha256": e.base.sha256}
        state = {"format": FORMAT, "base": base, "method": asdict(e.method), "seed": e.seed, "length": e.length}
        checkpoint.save(folder / "adapter.safetensors", self.tensors(), state)
        curve = self.progress.curve
        return tested | {"curve": curve, "val_n_correct": curve[-1][3], "n_val": curve[-1][4]}

    def sections(self, peak: int | None) -> dict[str, Any]:
        """Of the experiment, and of this run of it."""
        p = self.progress
        facts = {"n_trainable": sum(x.numel() for x in sum(self.groups, [])), "selected_step": p.step}
        facts |= {"losses": p.losses, "transfer_losses": p.transfer_losses}
        spent = self.cost_section(peak) | {"transfer_s": round(p.transfer_seconds, 3)}
        return self.experiment.sections(self.training_section(self.recipe["batch"]) | facts, spent)

    def hparams(self) -> dict[str, Any]:
        """The experiment, and of its recipe what is a number or a word."""
        e, m = self.experiment, self.experiment.method
        options = {"task": f"gemma-{e.kind}", "model": e.base.name, "attention": m.attention}
        options |= {"options": str(m.config), "layers": str(m.layers), "seed": e.seed}
        return options | {k: v for k, v in e.recipe.items() if isinstance(v, int | float | str)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that differs from the base model: trained weights, and the kernels with their buffers."""
        trained = {id(p) for p in sum(self.groups, [])}
        weights = {n: p for n, p in self.model.named_parameters() if id(p) in trained}
        return weights | {n: t for n, t in self.model.state_dict().items() if ".socket." in n}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put them back; the base model has the rest."""
        self.model.load_state_dict(tensors, strict=False)


def factor(step: int, steps: int) -> float:
    """Of the peak learning rates, at step 0, 1, ... of `steps`."""
    return learning_rate(step, Optim(steps=steps, lr=1.0, warmup=max(1, steps // 20)))


def with_adapter(path: Path, base: Base) -> nn.Module:
    """The base model with the adapter of a finetuning on it, ready to score or to generate.

    Raises UsageError when the file is no adapter, or belongs to another base model.
    """
    tensors, state = checkpoint.load(path)
    if state.get("format") != FORMAT:
        raise UsageError(f"{path} is not an adapter of format {FORMAT}: found {state.get('format')!r}")
    if state["base"]["sha256"] != base.sha256:
        own, way_out = state["base"], "give the base model it was trained on with --model"
        differ = f"{own['name']} ({own['source']}), whose weights differ from those of {base.name} ({base.source})"
        raise UsageError(f"{path} was trained on {differ}: {way_out}")
    method = Method(**state["method"] | {"layers": tuple(state["method"]["layers"])})
    plug_in(base, method, seed=state["seed"], length=state["length"])
    try:
        restore(base.model, tensors, path)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return base.model


def trainable(model: nn.Module, train: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze the rest; returns (parameters of kernels, pretrained parameters). UsageError if there are none."""
    model.requires_grad_(False).train()
    layers, sockets = bridge.text_layers(model), bridge.sockets(model)
    kernels, pretrained = parameter_groups((layers[i].self_attn for i in sockets), train)
    if train == "all":
        outer = [p for m in (model.model.embed_tokens, model.lm_head) for p in m.parameters()]
        # What makes queries and keys for kernels that look at neither.
        blind = [layers[i].self_attn for i, s in sockets.items() if not s.kernel.reads_qk]
        unread = [getattr(a, n) for a in blind for n in PROJECTIONS["kernel+qk"] if hasattr(a, n)]
        skip = {id(p) for p in (*outer, *kernels, *(p for m in unread for p in m.parameters()))}
        pretrained = [p for p in model.parameters() if id(p) not in skip]
    if not kernels and not pretrained:
        raise UsageError(f"--train {train}: this attention learns nothing of its own; use --train kernel+qkvo")
    for p in (*kernels, *pretrained):
        p.requires_grad_()
    return kernels, pretrained
