"""Finetuning of one cell, read from top to bottom: transfer -> steps -> test -> record and adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lra.gemma.adapter import describe
from lra.gemma.cost import cost
from lra.gemma.run import Cell, build_record, evaluate
from lra.gemma.trainer import Finetuner, Progress
from lra.machine import StopSignals
from lra.options import UsageError
from lra.records.record import finite, write_record
from lra.training import checkpoint
from lra.training.evaluate import autocast
from lra.training.log import RunLog
from lra.training.optim import learning_rate
from lra.training.train import Interrupted
from lra.training.trainer import Diverged
from models.gemma import bridge
from models.gemma.transfer import Transfer
from tasks.base import Optim


def finetune(
    cell: Cell, *, results: Path, runs: Path, device: torch.device, command: str
) -> tuple[Path, bool]:
    """Run a cell unless its record exists; returns (its record, newly made).

    Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved, and UsageError when another process holds it.
    """
    path = cell.path(results)
    if path.exists():
        return path, False
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = run_folder(runs, cell)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            started = datetime.now(timezone.utc)
            tuner = Finetuner(cell, device)
            resume(tuner, folder)
            status, result = "ok", None
            with RunLog(folder, None, tuner.progress.step) as log:
                try:
                    fit(tuner, folder, log)
                    result = test(tuner)
                    save_adapter(tuner, folder)
                except Diverged as error:
                    status = f"failed: {error}"
                record = _record(tuner, status, result, started, command)
                log.writer.add_hparams(_hparams(cell), _metrics(result), run_name=".")
            write_record(path, record, None)
            (folder / "checkpoint.safetensors").unlink(missing_ok=True)
    except Timeout:
        raise UsageError(f"another process is training this cell: {folder / 'lock'} is held") from None
    finally:
        bridge.detach(cell.base.model)
    return path, True


def run_folder(runs: Path, cell: Cell) -> Path:
    """runs/gemma-<kind>/<attention>/<base>-<digest>/seed<k>."""
    name = f"{cell.base.name.replace('/', '-')}-{cell.digest[:8]}"
    attention = cell.method.attention.replace(":", "-")
    return Path(runs) / f"gemma-{cell.kind}" / attention / name / f"seed{cell.seed}"


def fit(tuner: Finetuner, folder: Path, log: RunLog) -> None:
    """Transfer if asked, then all steps, with validations and checkpoints. Raises Diverged or Interrupted."""
    p, o, r = tuner.progress, tuner.optim, tuner.cell.recipe
    every = max(1, math.ceil(o.steps / r["evaluations"]))
    with StopSignals() as stop:
        if not p.step and not p.curve:
            if r["warmstart"] == "transfer":
                transfer(tuner, log, lambda: stop.requested)
            validate(tuner, log)
            save(tuner, folder)
        with tqdm(
            total=o.steps, initial=p.step, desc=tuner.cell.method.attention, unit="step", disable=None
        ) as bar:
            while p.step < o.steps:
                start = time.perf_counter()
                loss, accuracy, norm = tuner.step(p.step)
                p.seconds += time.perf_counter() - start
                p.losses.append(finite(loss))
                p.step += 1
                bar.update()
                if not math.isfinite(loss):
                    raise Diverged(f"loss is not finite at step {p.step}")
                tags = {"train/loss": loss, "train/acc": accuracy, "opt/grad_norm": norm}
                log.scalars(p.step, tags | {"opt/lr": tuner.optimizer.param_groups[1]["lr"]})
                due = p.step % every == 0 or p.step == o.steps
                if due:
                    validate(tuner, log)
                if due or stop.requested or p.step % r["checkpoint_every"] == 0:
                    log.flush()
                    save(tuner, folder)
                if stop.requested and p.step < o.steps:
                    raise Interrupted(
                        f"stopped at step {p.step} of {o.steps}; the same command resumes there"
                    )


def transfer(tuner: Finetuner, log: RunLog, stopped: Callable[[], bool]) -> None:
    """Attention transfer on training blocks, from the first; the finetuning that follows reads them again."""
    r, p = tuner.cell.recipe, tuner.progress
    per_step = r["batch"] * tuner.cell.blocks["train"].tokens.shape[1]
    steps = max(1, r["transfer_tokens"] // per_step)
    optim = Optim(steps=steps, lr=1.0, warmup=max(1, steps // 20))
    try:
        students = Transfer(tuner.model, r["train"], lr=r["lr"], lr_kernel=r["lr_kernel"])
    except ValueError as error:
        raise UsageError(str(error)) from error
    start = time.perf_counter()
    for step in tqdm(range(steps), desc="transfer", unit="step", disable=None):
        if stopped():
            raise Interrupted("stopped during the transfer, which starts again with the same command")
        with autocast(tuner.device, tuner.cell.precision):
            loss = students.step(tuner.batch(step % tuner.optim.steps)[0], step, learning_rate(step, optim))
        p.transfer_losses.append(finite(loss))
        log.writer.add_scalar("transfer/loss", loss, step + 1)
        if not math.isfinite(loss):
            raise Diverged(f"transfer loss is not finite at step {step + 1}")
    students.finish()
    p.transfer_seconds += time.perf_counter() - start


def validate(tuner: Finetuner, log: RunLog) -> None:
    """Count on the validation blocks; nothing is selected by it, the last step is the one that is tested."""
    p, cell = tuner.progress, tuner.cell
    s = evaluate(tuner.model, tuner.head, cell.blocks["val"], cell.precision, tuner.device)
    n = int(s.n.sum())
    loss = float(s.loss.sum() / n)
    p.curve.append([p.step, "val", finite(loss), int(s.correct.sum()), n])
    per_step = cell.blocks["train"].tokens[: cell.recipe["batch"]].size
    tags = {"val/loss": loss, "val/acc": int(s.correct.sum()) / n}
    if p.step:
        tags |= {"perf/steps_per_s": p.step / p.seconds, "perf/tokens_per_s": p.step * per_step / p.seconds}
    log.scalars(p.step, tags | {"perf/peak_mem_mb": (tuner.memory.read() or 0) / 1e6})


def test(tuner: Finetuner) -> dict[str, Any]:
    """The one reading of the test blocks."""
    cell, p = tuner.cell, tuner.progress
    s = evaluate(tuner.model, tuner.head, cell.blocks["test"], cell.precision, tuner.device)
    last = p.curve[-1]
    return s.facts() | {"curve": p.curve, "val_n_correct": last[3], "n_val": last[4]}


def save(tuner: Finetuner, folder: Path) -> None:
    """Everything a bitwise continuation needs; the sampler's position is the step itself."""
    groups = {"model": tuner.tensors(), "optim": checkpoint.optimizer_tensors(tuner.optimizer)}
    tensors = {f"{group}.{name}": t for group, entries in groups.items() for name, t in entries.items()}
    state = {"digest": tuner.cell.digest, "progress": asdict(tuner.progress)}
    checkpoint.save(folder / "checkpoint.safetensors", tensors, state)


def resume(tuner: Finetuner, folder: Path) -> None:
    """Continue from the folder's checkpoint, if there is one. Raises UsageError when it is another run's."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return
    tensors, state = checkpoint.load(path)
    if state["digest"] != tuner.cell.digest:
        raise UsageError(f"{path} was made with other settings: remove it, or give another --runs")
    tuner.model.load_state_dict(checkpoint.under("model", tensors), strict=False)
    checkpoint.restore_optimizer(tuner.optimizer, checkpoint.under("optim", tensors))
    tuner.progress = Progress(**state["progress"])
    tuner.progress.resumed += 1


def save_adapter(tuner: Finetuner, folder: Path) -> None:
    """What was trained, with everything needed to put it back on its base model (adapter.py)."""
    checkpoint.save(folder / "adapter.safetensors", tuner.tensors(), describe(tuner.cell))


def _record(tuner: Finetuner, status, result, started, command) -> dict[str, Any]:
    cell, p = tuner.cell, tuner.progress
    training = {
        "optimizer": "AdamW",
        "n_trainable": sum(x.numel() for g in tuner.groups for x in g),
        "steps": p.step,
        "examples_seen": p.step * cell.recipe["batch"],
        "selected_step": p.step,
        "resumed": p.resumed,
        "losses": p.losses,
        "transfer_losses": p.transfer_losses,
    }
    spent = cost(tuner, p.seconds, p.transfer_seconds)
    return build_record(
        cell, command=command, device=tuner.device, started=started, status=status, result=result,
        training=training, cost=spent,
    )  # fmt: skip


def _hparams(cell: Cell) -> dict[str, Any]:
    options = {"task": f"gemma-{cell.kind}", "model": cell.base.name, "attention": cell.method.attention}
    options |= {"options": str(cell.method.config), "layers": str(cell.method.layers), "seed": cell.seed}
    return options | {k: v for k, v in cell.recipe.items() if isinstance(v, int | float | str)}


def _metrics(result: dict[str, Any] | None) -> dict[str, float]:
    return {"hparam/test_acc": result["n_correct"] / result["n_test"] if result else 0.0}
