"""One run, read from top to bottom: lock -> resume -> steps, validations, checkpoints -> test -> record."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lra.machine import StopSignals
from lra.options import Held, UsageError
from lra.records.record import predictions_path, record_path, write_labels, write_record
from lra.training import checkpoint
from lra.training.config import Run
from lra.training.distributed import ALONE, World
from lra.training.evaluate import Counts
from lra.training.log import LOG, Display, RunLog
from lra.training.provenance import build_record
from lra.training.trainer import MIDDLE, WEIGHTS, Diverged, Trainer, Training, Where
from tasks.store.files import remove_temporaries
from tasks.store.prepared import Prepared

CHECKPOINTS = ("checkpoint.safetensors", "checkpoint-previous.safetensors")  # the newest, and the one before


class Interrupted(Exception):
    """The run was asked to stop, and a checkpoint is on disk: the same command resumes it."""


def train(run: Run, prepared: Prepared, *, results: Path, runs: Path, where: Where) -> tuple[Path, bool]:
    """One cell and seed of the arena, from its data to its record. Returns (path of the record, newly made).

    Raises what `carry_out` raises.
    """
    path = record_path(results, run.meta.name, run.attention, run.digest, run.seed)

    def publish(record: dict[str, Any], counts: Counts | None) -> None:
        write_labels(results, prepared.splits["test"].labels.tobytes())
        write_record(path, record, None if counts is None else counts.predictions.tobytes())

    folder = run_folder(runs, run)
    return path, carry_out(lambda: Trainer(run, prepared, where), path, folder, publish, where.world)


def carry_out(make: Callable[[], Training], path: Path, folder: Path, publish: Callable, world: World = ALONE) -> bool:
    """Train, read the test split once, and `publish(record, what the test returned)` at `path`. False: it is there.

    Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved, and Held when another process is at this run.
    """
    if any(world.all_gather(path.exists())):
        return False
    if world.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):  # now, not after an hour of training
            raise UsageError(f"results folder is not writable: {path.parent}")
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0) if world.is_main else nullcontext():
            if any(world.all_gather(path.exists())):  # another process finished it meanwhile
                return False
            if world.is_main:  # what a killed process was writing
                own = [folder / name for name in (*CHECKPOINTS, WEIGHTS, MIDDLE, LOG)]
                for file in (path, predictions_path(path), *own):
                    remove_temporaries(file)
            clocks = datetime.now(timezone.utc), time.perf_counter()
            training = make()
            resume(training, folder)
            world.check_equal("checkpoints", lambda: str(training.progress.step))
            tested = failure = None
            step, hparams = training.progress.step, training.hparams()
            with RunLog(folder, hparams, step) if world.is_main else nullcontext() as log:
                try:
                    fit(training, folder, log)
                except Diverged as error:
                    failure = str(error)
                peak = training.memory.read()
                if failure is None:
                    tested = training.test()
                if log:
                    result = training.outcome(tested, folder) if failure is None else None
                    status = "ok" if failure is None else f"failed: {failure}"
                    facts = {"device": training.where.device, "command": training.command, "clocks": clocks}
                    record = build_record(training.sections(peak), result, status=status, **facts)
                    if failure and (remains := training.remains()):
                        record["failure"] = remains
                    log.finish(record)
            if log:
                publish(record, tested)  # last: once the record is there, so is all the rest
                for name in CHECKPOINTS:
                    (folder / name).unlink(missing_ok=True)
    except Timeout:
        raise Held(f"another process is training this cell: {folder / 'lock'} is held") from None
    return True


def run_folder(runs: Path, run: Run) -> Path:
    """runs/<task>/<attention>/<preset>/seed<k>. A run that differs from its preset (overrides, other data than
    the preset's own source) adds its digest to <preset>."""
    own = run.manifest["source"] in ("generated", run.recipe.data.source)
    plain = own and not run.overrides and run.val_rule == "held-out"
    preset = run.preset if plain else f"{run.preset}-{run.digest[:8]}"
    return Path(runs) / run.meta.name / run.attention.replace(":", "-") / preset / f"seed{run.seed}"


def fit(training: Training, folder: Path, log: RunLog | None) -> None:
    """Optimizer steps until done, with validations and checkpoints. Raises Diverged or Interrupted."""
    t, p, world = training, training.progress, training.where.world
    display = Display(t.title, p.step, t.steps, shown=world.is_main)
    pending: list[tuple] = []
    with StopSignals() as stop, display:
        if not p.curve and t.begin(log, stop):
            validate(t, log, display)
            save(t, folder)
        start = time.perf_counter()
        while p.step < t.steps:
            try:
                pending.append(t.step(p.step))
            except Diverged:  # with --debug
                p.seconds += time.perf_counter() - start
                raise
            p.step += 1
            display.step()
            due = p.step % t.eval_every == 0 or p.step == t.steps
            stopping = world.any_stops(stop.requested, p.step)
            saving = due or stopping or p.step % t.save_every == 0
            regular = due or p.step % t.read_every == 0
            if regular or saving:
                try:
                    scalars = flush(t, pending)
                finally:
                    p.seconds += time.perf_counter() - start
                display.trained(scalars["train/loss"])
                if log and regular:  # not where a signal came: a log tells nothing of interruptions
                    log.scalars(p.step, scalars)
                if due:
                    validate(t, log, display)
                if saving:
                    if log:
                        log.flush()
                    save(t, folder)
                if stopping:
                    there = f"stopped at step {p.step} of {t.steps}"
                    raise Interrupted(f"{there}; the same command resumes there")
                start = time.perf_counter()


def flush(training: Training, pending: list[tuple]) -> dict[str, float]:
    """Read the waiting losses back; returns the last step's scalars. Raises Diverged, naming the step, when one is
    not finite."""
    first = training.progress.step - len(pending) + 1
    for step, (loss, correct, norm) in enumerate(pending, first):
        value = float(loss)
        training.count(value, int(correct))
        if not math.isfinite(value):
            raise Diverged(f"loss is not finite at step {step}")
    pending.clear()
    return {
        "train/loss": value,
        "train/acc": int(correct) / training.predictions,
        "opt/grad_norm": float(norm),
        "opt/lr": training.optimizer.param_groups[-1]["lr"],
    }


def validate(training: Training, log: RunLog | None, display: Display) -> None:
    """A validation, its scalars and those of speed."""
    p = training.progress
    scalars = training.validate()
    display.validated(scalars["val/acc"], max(c[3] / c[4] for c in p.curve if c[1] == "val"))
    if p.seconds:
        scalars |= {"perf/steps_per_s": p.step / p.seconds, "perf/tokens_per_s": p.tokens / p.seconds}
    if log:
        log.scalars(p.step, scalars | {"perf/peak_mem_mb": (training.memory.read() or 0) / 1e6})


def save(training: Training, folder: Path) -> None:
    """Everything a bitwise continuation needs; the sampler's position is the step itself."""
    world, device = training.where.world, training.where.device
    groups = {"model": training.tensors(), "best": training.best}
    groups["optim"] = checkpoint.optimizer_tensors(training.optimizer)
    generators = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(device)
    groups |= {f"rng.{rank}": states for rank, states in enumerate(world.all_gather(generators))}
    tensors = {f"{group}.{name}": t for group, entries in groups.items() for name, t in entries.items()}
    if training.progress.step == training.middle > 0:
        kept = {name: t for name, t in tensors.items() if name.startswith(("model.", "optim."))}
        training.progress.middle_sha256 = checkpoint.tensors_sha256(kept)
        if world.is_main:
            checkpoint.save(folder / MIDDLE, kept, {"digest": training.digest, "seed": training.seed})
    state = {"digest": training.digest, "seed": training.seed, "world_size": world.size}
    state["progress"], state["sources"] = asdict(training.progress), training.sources
    newest, previous = (folder / name for name in CHECKPOINTS)
    if world.is_main:
        checkpoint.save(newest, tensors, state, previous)


def resume(training: Training, folder: Path) -> None:
    """Continue from the newest sound checkpoint, if there is one. Raises UsageError when it is another run's.

    A damaged one is set aside, and said to be.
    """
    damaged = []
    for path in (folder / name for name in CHECKPOINTS):
        if path.exists():
            try:
                restore(training, path)
                break
            except checkpoint.Damaged as error:
                path.replace(path.with_suffix(".damaged"))
                damaged.append(str(error))
    if damaged:
        step = training.progress.step
        goes_on = f"going on from step {step}" if step else "starting from the first step"
        print(f"{'; '.join(damaged)}: set aside as *.damaged, {goes_on}", file=sys.stderr)


def restore(training: Training, path: Path) -> None:
    """Put the state of a checkpoint back. Raises Damaged, or UsageError when it is another run's."""
    tensors, state = checkpoint.load(path)
    if state["digest"] != training.digest:
        way_out = "remove it, or give another --runs"
        raise UsageError(f"{path} was made with another recipe or other data: {way_out}")
    if state.get("sources", training.sources) != training.sources:
        raise UsageError(f"{path} was made with another source of the attention or the task: remove it")
    world, processes = training.where.world, state["world_size"]
    if processes != world.size:
        raise UsageError(f"{path} was made by {processes} processes, not {world.size}: go on with as many")
    training.load(checkpoint.under("model", tensors))
    checkpoint.restore_optimizer(training.optimizer, checkpoint.under("optim", tensors))
    training.best = checkpoint.under("best", tensors)
    training.progress = type(training.progress)(**state["progress"])
    training.progress.resumed += 1
    states = checkpoint.under(f"rng.{world.rank}", tensors)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], training.where.device)
