"""The state of a run, its optimizer and schedule, and the optimizer step that advances it."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from lra.machine import PeakMemory, StopSignals
from lra.records.record import finite
from lra.registry import load_task
from lra.training import checkpoint
from lra.training.batches import MASKED, UNASKED, Batches, collate, example_lengths
from lra.training.config import Run, cell_sections
from lra.training.distributed import gradient_sync
from lra.training.evaluate import Counts, Where, attention_report, autocast, by_group, evaluate, summed_loss, to_device
from lra.training.log import RunLog
from tasks.base import Batch, Optim
from tasks.store.prepared import Prepared

PROBE_STEPS, PROBE_BATCH = 20, 4
REPORT = 4  # validation examples that the attention report looks at, at most
WEIGHTS, MIDDLE = "model.safetensors", "middle.safetensors"  # of the selected step, and of Training.middle
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # mean loss, number correct, gradient norm before clipping


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
    middle_sha256: str = ""  # of the checkpoint in the middle, once it is kept
    pretrain: list[list] = field(default_factory=list)  # [step, mean loss since the entry before], without labels


class Training:
    """A run as train.py sees it: its state, and what it does at each point of its life.

    Two kinds exist: `Trainer` below, and `Finetuner` of lra/gemma. A subclass sets the fields and has the methods

        step(step)               one optimizer step: see Step
        count(loss, correct)     add a step to the progress, whether its loss is finite or not
        validate()               add a validation to the curve; what to log, val/loss and val/acc among it
        test()                   the one reading of the test split, after the last step
        outcome(tested, folder)  the record's `result` from what `test` returned; keeps the weights in `folder`
        remains()                the record's `failure`, of a run that failed; None: nothing is recorded of it
        sections(peak)           the record's task, data, model, training and cost; `peak` bytes were in use
        hparams()                hyper-parameters, for TensorBoard
    """

    title: str  # beside the progress bar
    command: str  # repeats the run
    digest: str  # names the cell: a checkpoint of another one is refused
    sources: dict[str, str] = {}  # name to hash of code that decides the numbers: as the digest
    seed: int
    where: Where
    steps: int  # in all
    read_every: int  # steps between two readings of losses from the device
    eval_every: int
    save_every: int
    predictions: int  # of one step
    turn = 0  # the step at which the labels begin: self-pretraining comes before; 0: there is none
    middle = 0  # the step whose weights and optimizer are kept in the run's folder for V2; 0: of none
    memory: PeakMemory
    model: nn.Module
    optimizer: Optimizer
    progress: Progress
    best: dict[str, torch.Tensor] = {}  # the weights of the selected step, where one is selected

    def begin(self, log: RunLog, stop: StopSignals) -> bool:
        """What comes before the first step. True: a validation and a checkpoint follow it."""
        return False

    def remains(self) -> dict[str, Any] | None:
        """See above."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights that a checkpoint needs."""
        return self.model.state_dict()

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Put back what `tensors` gave."""
        self.model.load_state_dict(tensors)

    def training_section(self, batch: int) -> dict[str, Any]:
        """The record's training section, as far as all runs share it."""
        p, where = self.progress, self.where
        facts = {"seed": self.seed, "precision": where.precision, "compile": where.compiled, "optimizer": "AdamW"}
        facts |= {"world_size": where.world.size, "steps": p.step, "examples_seen": p.step * batch}
        return facts | {"resumed": p.resumed}

    def cost_section(self, peak: int | None) -> dict[str, Any]:
        """Seconds are those of training steps, over all processes of a resumed run; validation is excluded."""
        p = self.progress
        facts = {"device": self.where.device.type, "wall_s": round(p.seconds, 3)}
        facts["steps_per_s"] = round(p.step / p.seconds, 4) if p.seconds else None
        facts["tokens_per_s"] = round(p.tokens / p.seconds, 1) if p.seconds else None
        return facts | {"peak_bytes": peak}


class Trainer(Training):
    """A run of the arena: model, optimizer and data of one cell and seed."""

    read_every = 10

    def __init__(self, run: Run, prepared: Prepared, where: Where):
        self.run, self.prepared, self.where, self.optim = run, prepared, where, run.recipe.train
        self.title, self.command = f"{run.meta.name} {run.attention}", run.command
        self.digest, self.seed, self.sources = run.digest, run.seed, run.sources
        self.steps = self.optim.steps
        self.eval_every = self.save_every = self.optim.eval_every
        self.turn, self.middle = run.turn, middle_step(run)
        self.memory = PeakMemory(where.device)
        self.model = run.build_model().to(where.device).train()
        compiled = torch.compile(self.model) if where.compiled else self.model
        self.forward = where.world.data_parallel(compiled, unused=self.turn > 0)
        where.world.reseed(run.seed)
        self.optimizer = build_optimizer(self.model, self.optim)
        self.batches = Batches(prepared.splits["train"], run.meta.towers, size=self.optim.batch, seed=run.seed)
        self.progress = Progress()

    def step(self, step: int) -> Step:
        """One optimizer step; its numbers are left on the device."""
        o, device, world = self.optim, self.where.device, self.where.world
        for attention in self.model.encoder.attentions:
            if attention.adapts:
                world.broadcast_buffers(attention)
            attention.before_step(step)
        if step % o.eval_every == 0:
            world.check_equal("weights or projections", lambda: checkpoint.tensors_sha256(self.model.state_dict()))
        if step == self.turn > 0:
            self.optimizer = build_optimizer(self.model, o)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, o, self.turn)
        batch = self.batches.batch(step, MASKED[self.run.meta.reads] if step < self.turn else 0)
        self.predictions = np.count_nonzero(batch.labels_B.numpy() != UNASKED)
        self.progress.tokens += batch.tokens_BTN.numel()
        mine = to_device(world.shard(batch), device)
        loss, correct, norm = update(self.forward, self.optimizer, mine, o, self.where.precision)
        return world.all_reduce(loss / world.size), world.all_reduce(correct), norm

    def count(self, loss: float, correct: int) -> None:
        """Into the window, which the next validation empties."""
        total, right, steps = self.progress.window
        self.progress.window = [total + loss, right + correct, steps + 1]

    def validate(self) -> dict[str, float]:
        """Keep the weights of the step with most validation examples correct, the earliest on a tie. While
        pretraining: keep the mean loss alone, because the head is as it was drawn."""
        p, towers, val = self.progress, self.run.meta.towers, self.prepared.splits["val"]
        (loss_sum, correct, steps), p.window = p.window, [0.0, 0, 0]
        if p.step <= self.turn:
            p.pretrain.append([p.step, loss_sum / steps])
            return {"pretrain/loss": loss_sum / steps}
        p.curve.append([p.step, "train", loss_sum / steps, correct, steps * self.optim.batch])
        counts = self.evaluate(validation_split(self.run))
        p.curve.append([p.step, "val", finite(counts.loss), counts.n_correct, counts.n])
        if counts.n_correct > p.best_correct:
            p.best_correct, p.best_step = counts.n_correct, p.step
            self.best = {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}
        lengths = example_lengths(val, towers)[: min(REPORT, self.run.micro_batch)]
        first = collate(val, towers, np.arange(len(lengths)), int(lengths.max()))
        report = attention_report(self.model, to_device(first, self.where.device))
        scalars = {"val/loss": counts.loss, "val/acc": counts.n_correct / counts.n}
        return scalars | {f"attn/{name}": value for name, value in report.items()}

    def test(self) -> Counts:
        """The test split, with the selected weights."""
        self.model.load_state_dict(self.best)
        return self.evaluate("test")

    def evaluate(self, split: str) -> Counts:
        """Counts over a split."""
        how = {"batch": self.run.micro_batch, "name": split, "where": self.where}
        return evaluate(self.model, self.prepared.splits[split], self.run.meta.towers, **how)

    def outcome(self, tested: Counts, folder: Path) -> dict[str, Any]:
        """Raw counts and the probe; whoever reads the record computes accuracies."""
        p = self.progress
        selected = next(entry for entry in p.curve if entry[0] == p.best_step and entry[1] == "val")
        result = {"n_correct": tested.n_correct, "n_test": tested.n}
        result |= {"val_n_correct": selected[3], "n_val": selected[4], "curve": p.curve}
        result["predictions_sha256"] = hashlib.sha256(tested.predictions.tobytes()).hexdigest()
        result |= by_group(load_task(self.run.meta.name), self.prepared.splits["test"], tested.predictions)
        result["probe"] = probe(self.run, self.prepared)
        result["chain"] = {"middle": None, "final_sha256": checkpoint.tensors_sha256(self.best)}
        if p.middle_sha256 and (folder / MIDDLE).exists():
            losses = probe(self.run, self.prepared, folder / MIDDLE)["losses"]
            result["chain"]["middle"] = {"step": self.middle, "sha256": p.middle_sha256, "losses": losses}
        checkpoint.save(folder / WEIGHTS, self.best, {"digest": self.digest, "seed": self.seed})
        return result

    def remains(self) -> dict[str, Any]:
        """The curve as far as it goes, and the probe."""
        return {"curve": self.progress.curve, "probe": probe(self.run, self.prepared)}

    def sections(self, peak: int | None) -> dict[str, Any]:
        """Of the cell, and of this run of it."""
        run, p, training = self.run, self.progress, self.training_section(self.optim.batch)
        training |= {"recipe": asdict(self.optim), "budget": run.recipe.budget, "overrides": run.overrides}
        training |= {"selected_step": p.best_step} | ({"pretrain": p.pretrain} if p.pretrain else {})
        return cell_sections(run) | {"training": training, "cost": self.cost_section(peak)}

    def hparams(self) -> dict[str, Any]:
        """The same keys in every run."""
        run, recipe = self.run, self.run.recipe
        cell = {"task": run.meta.name, "dataset": run.manifest["dataset"], "preset": run.preset}
        cell |= {"attention": run.attention, "options": json.dumps(run.attention_config)}
        cell |= {"overrides": json.dumps(run.overrides), "seed": run.seed, "seq_len": recipe.data.seq_len}
        cell |= {name: getattr(recipe.encoder, name) for name in ("layers", "width", "heads")}
        return cell | {name: getattr(self.optim, name) for name in ("lr", "batch", "steps")}


def validation_split(run: Run) -> str:
    """Validation data; the test split takes its place only under the `legacy` rule, which the record names."""
    return "test" if run.val_rule == "legacy" else "val"


def build_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW; only the matrices of linear layers decay. Biases, norms, embeddings, positions and whatever an
    attention learns (DARKFormer's G, Linformer's projections) do not."""
    decay = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rest = [p for p in model.parameters() if not any(p is q for q in decay)]
    groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, optim.beta2), eps=1e-6, fused=fused)


def learning_rate(step: int, optim: Optim, turn: int = 0) -> float:
    """Of optimizer step 0, 1, ...: linear to the peak over `warmup` steps, then half a cosine to zero at `steps`; once
    up to `turn`, and once more after it."""
    step, steps = (step, turn) if step < turn else (step - turn, optim.steps - turn)
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, steps - optim.warmup)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))


def update(forward: nn.Module, optimizer: Optimizer, batch: Batch, optim: Optim, precision: str) -> Step:
    """Gradients of the mean loss over `batch`, in micro-batches, clipped, and one optimizer step. lra/scaling/count.py
    counts what this does."""
    device, examples, parts = batch.labels_B.device, len(batch.labels_B), optim.accumulate
    optimizer.zero_grad(set_to_none=True)
    loss, correct = torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64)
    pieces = [[None] * parts if part is None else part.chunk(parts) for part in vars(batch).values()]
    for number, (tokens_BTN, mask_BTN, labels_B, asked_BTK) in enumerate(zip(*pieces, strict=True), 1):
        with gradient_sync(forward, last=number == parts):
            with autocast(device, precision):
                logits_BC = forward(tokens_BTN, mask_BTN, asked_BTK)
            part_loss = summed_loss(logits_BC, labels_B) / examples
            part_loss.backward()
        loss += part_loss.detach()
        correct += (logits_BC.argmax(-1) == labels_B).sum()
    norm = nn.utils.clip_grad_norm_(forward.parameters(), optim.clip)
    optimizer.step()
    return loss, correct, norm


def middle_step(run: Run) -> int:
    """The first validation in the second half of the steps with labels; 0 where that is the last one."""
    steps, every = run.recipe.train.steps, run.recipe.train.eval_every
    step = -(-(run.turn + steps) // (2 * every)) * every
    return step if step < steps else 0


def probe(run: Run, prepared: Prepared, middle: Path | None = None) -> dict[str, Any]:
    """The first training losses in fp32 on one CPU thread with a small batch: cheap for anybody to repeat. With
    `middle`, those after the checkpoint there, at most as many."""
    small = replace(run.recipe.train, batch=PROBE_BATCH, accumulate=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = middle_step(run) if middle else 0
        run = replace(run, recipe=replace(run.recipe, train=small))
        trainer = Trainer(run, prepared, Where(torch.device("cpu")))
        if middle:
            tensors, _ = checkpoint.load(middle)
            trainer.load(checkpoint.under("model", tensors))
            checkpoint.restore_optimizer(trainer.optimizer, checkpoint.under("optim", tensors))
        steps = range(start, min(start + PROBE_STEPS, small.steps) if middle else PROBE_STEPS)
        losses = [trainer.step(step)[0].item() for step in steps]
    finally:
        torch.set_num_threads(threads)
    return {"batch": PROBE_BATCH, "losses": [finite(loss) for loss in losses]}
