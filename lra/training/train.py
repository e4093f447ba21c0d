"""One run, read from top to bottom: data -> model -> loop -> evaluate -> record."""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from lra.machine import StopSignals
from lra.options import Held, UsageError
from lra.records.record import finite, predictions_path, record_path, write_labels, write_record
from lra.training import checkpoint
from lra.training.batches import collate, example_lengths
from lra.training.config import Run
from lra.training.evaluate import Counts, attention_report, to_device
from lra.training.log import LOG, Display, RunLog
from lra.training.optim import learning_rate
from lra.training.provenance import build_record, outcome, probe, step_ratio
from lra.training.trainer import Diverged, Progress, Trainer, Where
from tasks.store.files import remove_temporaries
from tasks.store.prepared import Prepared

FLUSH = 10  # steps between reading losses back from the device
REPORT = 4  # validation examples the attention report looks at
CHECKPOINTS = ("checkpoint.safetensors", "checkpoint-previous.safetensors")  # the newest, and the one before
WEIGHTS = "model.safetensors"


class Interrupted(Exception):
    """The run was asked to stop, and a checkpoint is on disk: the same command resumes it."""


def train(run: Run, prepared: Prepared, *, results: Path, runs: Path, where: Where) -> tuple[Path, bool]:
    """Train, select on validation, read test once, write the record. Returns (its path, newly made).

    An existing record means the run is done. Raises Interrupted after SIGINT or SIGTERM, with a checkpoint
    saved, and Held when another process is at this run.
    """
    path, world = record_path(results, run.meta.name, run.attention, run.digest, run.seed), where.world
    if any(world.all_gather(path.exists())):
        return path, False
    folder = run_folder(runs, run)
    if world.is_main:
        open_folders(path, folder)
    try:
        with FileLock(folder / "lock", timeout=0) if world.is_main else nullcontext():
            if any(world.all_gather(path.exists())):  # another process finished it meanwhile
                return path, False
            if world.is_main:
                tidy(path, folder)
            clocks = datetime.now(timezone.utc), time.perf_counter()
            trainer = Trainer(run, prepared, where)
            resume(trainer, folder)
            world.check_equal("checkpoints", lambda: str(trainer.progress.step))
            counts = failure = None
            with RunLog(folder, run, trainer.progress.step) if world.is_main else nullcontext() as log:
                try:
                    fit(trainer, folder, log)
                except Diverged as error:
                    failure = str(error)
                peak = trainer.memory.read()
                if failure is None:
                    counts = test(trainer)
                if log:
                    record = conclude(trainer, folder, counts, failure, peak, clocks)
                    log.finish(record)
            if log:
                publish(record, path, folder, results, prepared, counts)
    except Timeout:
        raise Held(f"another process is training this cell: {folder / 'lock'} is held") from None
    return path, True


def open_folders(path: Path, folder: Path) -> None:
    """Make the folders of the record and of the run. Raises UsageError where records cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):  # now, not after an hour of training
        raise UsageError(f"results folder is not writable: {path.parent}")
    folder.mkdir(parents=True, exist_ok=True)


def tidy(path: Path, folder: Path) -> None:
    """Remove what a killed process was writing."""
    for file in (path, predictions_path(path), *(folder / n for n in (*CHECKPOINTS, WEIGHTS, LOG))):
        remove_temporaries(file)


def conclude(
    trainer: Trainer,
    folder: Path,
    counts: Counts | None,
    failure: str | None,
    peak: int | None,
    clocks: tuple[datetime, float],
) -> dict[str, Any]:
    """Save the selected weights; returns the record. `counts` of the test are None if the run failed; `clocks` are
    the date and the seconds it started at."""
    run, result, speed = trainer.run, None, None
    if counts is not None:
        speed = step_ratio(trainer)
        result = outcome(trainer, counts) | {"probe": probe(run, trainer.prepared)}
        checkpoint.save(folder / WEIGHTS, trainer.best, {"digest": run.digest, "seed": run.seed})
    status = "ok" if failure is None else f"failed: {failure}"
    cost = {"peak_bytes": peak, "softmax_same_machine": speed}
    started, begun = clocks
    return build_record(trainer, status, result, cost, started, time.perf_counter() - begun)


def publish(
    record: dict[str, Any],
    path: Path,
    folder: Path,
    results: Path,
    prepared: Prepared,
    counts: Counts | None,
) -> None:
    """Write the record last: once it is there, so is all the rest. The checkpoints go."""
    write_labels(results, prepared.splits["test"].labels.tobytes())
    write_record(path, record, None if counts is None else counts.predictions.tobytes())
    for name in CHECKPOINTS:
        (folder / name).unlink(missing_ok=True)


def run_folder(runs: Path, run: Run) -> Path:
    """runs/<task>/<attention>/<preset>/seed<k>. A run that differs from its preset (overrides, other data than
    the preset's own source) adds its digest to <preset>."""
    own = run.manifest["source"] in ("generated", run.recipe.data.source)
    plain = own and not run.overrides and run.val_rule == "held-out"
    preset = run.preset if plain else f"{run.preset}-{run.digest[:8]}"
    return Path(runs) / run.meta.name / run.attention.replace(":", "-") / preset / f"seed{run.seed}"


def fit(trainer: Trainer, folder: Path, log: RunLog | None) -> None:
    """Optimizer steps until done. Every `eval_every` steps: validate, select, checkpoint."""
    p, o, run, world = trainer.progress, trainer.optim, trainer.run, trainer.where.world
    display = Display(f"{run.meta.name} {run.attention}", p.step, o.steps, shown=world.is_main)
    pending: list[tuple[torch.Tensor, ...]] = []
    with StopSignals() as stop, display:
        start = time.perf_counter()
        while p.step < o.steps:
            try:
                pending.append(trainer.step(p.step))
            except Diverged:  # with --debug
                p.seconds += time.perf_counter() - start
                raise
            p.step += 1
            display.step()
            validate = p.step % o.eval_every == 0 or p.step == o.steps
            stopping = world.any_stops(stop.requested, p.step)
            regular = p.step % FLUSH == 0 or validate
            if regular or stopping:
                try:
                    scalars = flush(trainer, pending)
                finally:
                    p.seconds += time.perf_counter() - start
                display.trained(scalars["train/loss"])
                if log and regular:  # not where a signal came: a log tells nothing of interruptions
                    log.scalars(p.step, scalars)
                if validate:
                    select(trainer, log, display)
                if validate or stopping:
                    if log:
                        log.flush()
                    save(trainer, folder)
                if stopping:
                    raise Interrupted(
                        f"stopped at step {p.step} of {o.steps}; the same command resumes there"
                    )
                start = time.perf_counter()


def flush(trainer: Trainer, pending: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Read the waiting losses back; returns the last step's scalars. Raises Diverged, naming the step, when one is
    not finite."""
    p = trainer.progress
    first = p.step - len(pending) + 1
    for step, (loss, correct, norm) in enumerate(pending, first):
        value = loss.item()
        if not math.isfinite(value):
            raise Diverged(f"loss is not finite at step {step}")
        p.window = [p.window[0] + value, p.window[1] + int(correct), p.window[2] + 1]
    pending.clear()
    return {
        "train/loss": value,
        "train/acc": int(correct) / trainer.optim.batch,
        "opt/grad_norm": norm.item(),
        "opt/lr": learning_rate(p.step - 1, trainer.optim),
    }


def select(trainer: Trainer, log: RunLog | None, display: Display) -> None:
    """Validate; keep the weights of the step with most validation examples correct, the earliest on a tie."""
    p, run = trainer.progress, trainer.run
    loss_sum, correct, steps = p.window
    p.curve.append([p.step, "train", loss_sum / steps, correct, steps * trainer.optim.batch])
    p.window = [0.0, 0, 0]
    counts = trainer.evaluate(validation_split(run))
    p.curve.append([p.step, "val", finite(counts.loss), counts.n_correct, counts.n])
    if counts.n_correct > p.best_correct:
        p.best_correct, p.best_step = counts.n_correct, p.step
        trainer.best = {name: t.detach().cpu().clone() for name, t in trainer.model.state_dict().items()}
    accuracy = counts.n_correct / counts.n
    perf = {"perf/steps_per_s": p.step / p.seconds, "perf/tokens_per_s": p.tokens / p.seconds}
    perf["perf/peak_mem_mb"] = (trainer.memory.read() or 0) / 1e6
    val = trainer.prepared.splits["val"]
    longest = int(example_lengths(val, run.meta.towers)[:REPORT].max())
    first = collate(val, run.meta.towers, np.arange(min(REPORT, len(val.labels))), longest)
    report = attention_report(trainer.model, to_device(first, trainer.where.device))
    report = {f"attn/{name}": value for name, value in report.items()}
    if log:
        log.scalars(p.step, {"val/loss": counts.loss, "val/acc": accuracy} | perf | report)
    display.validated(accuracy, p.best_correct / counts.n)


def validation_split(run: Run) -> str:
    """Validation data; the test split takes its place only under the `legacy` rule, which the record names."""
    return "test" if run.val_rule == "legacy" else "val"


def save(trainer: Trainer, folder: Path) -> None:
    """Everything a bitwise continuation needs; the sampler's position is the step itself."""
    world = trainer.where.world
    groups = {
        "model": trainer.model.state_dict(),
        "best": trainer.best,
        "optim": checkpoint.optimizer_tensors(trainer.optimizer),
    }
    for rank, states in enumerate(world.all_gather(_random_states(trainer.where.device))):
        groups[f"rng.{rank}"] = states
    tensors = {f"{group}.{name}": t for group, entries in groups.items() for name, t in entries.items()}
    state = {"digest": trainer.run.digest, "seed": trainer.run.seed, "world_size": world.size}
    state["progress"], state["sources"] = asdict(trainer.progress), trainer.run.sources
    newest, previous = (folder / name for name in CHECKPOINTS)
    if world.is_main:
        checkpoint.save(newest, tensors, state, previous)


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def resume(trainer: Trainer, folder: Path) -> None:
    """Continue from the newest sound checkpoint, if there is one. Raises UsageError when it is another run's.

    A damaged one is set aside, and said to be.
    """
    damaged = []
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            try:
                restore(trainer, path)
                break
            except checkpoint.Damaged as error:
                path.replace(path.with_suffix(".damaged"))
                damaged.append(str(error))
    if damaged:
        step = trainer.progress.step
        goes_on = f"going on from step {step}" if step else "starting from the first step"
        print(f"{'; '.join(damaged)}: set aside as *.damaged, {goes_on}", file=sys.stderr)


def restore(trainer: Trainer, path: Path) -> None:
    """Put the state of a checkpoint back. Raises Damaged, or UsageError when it is another run's."""
    tensors, state = checkpoint.load(path)
    if state["digest"] != trainer.run.digest:
        raise UsageError(
            f"{path} was made with another recipe or other data: remove it, or give another --runs"
        )
    if state.get("sources", trainer.run.sources) != trainer.run.sources:
        raise UsageError(f"{path} was made with another source of the attention or the task: remove it")
    world = trainer.where.world
    if state["world_size"] != world.size:
        raise UsageError(
            f"{path} was made by {state['world_size']} processes, not {world.size}: go on with as many"
        )
    trainer.model.load_state_dict(checkpoint.under("model", tensors))
    checkpoint.restore_optimizer(trainer.optimizer, checkpoint.under("optim", tensors))
    trainer.best = checkpoint.under("best", tensors)
    trainer.progress = Progress(**state["progress"])
    trainer.progress.resumed += 1
    states = checkpoint.under(f"rng.{world.rank}", tensors)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], trainer.where.device)


def test(trainer: Trainer) -> Counts:
    """The one reading of the test split, with the selected weights."""
    trainer.model.load_state_dict(trainer.best)
    return trainer.evaluate("test")
