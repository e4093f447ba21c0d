"""One run, read from top to bottom: lock -> resume -> steps, validations, checkpoints -> test -> record."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from lra.machine import StopSignals, environment
from lra.options import Held, UsageError
from lra.records.record import SCHEMA, Execution, predictions_path, record_path, suite_facts, write_labels, write_record
from lra.training import checkpoint
from lra.training.config import Run
from lra.training.distributed import ALONE, World
from lra.training.evaluate import Counts, Diverged, Where
from lra.training.log import LOG, Display, RunLog
from lra.training.trainer import MIDDLE, WEIGHTS, Trainer, Training
from tasks.store.files import remove_temporaries
from tasks.store.prepared import Prepared

CHECKPOINTS = ("checkpoint.safetensors", "checkpoint-previous.safetensors")  # the newest, and the one before
Clocks = tuple[datetime, float]  # the date and the seconds of time.perf_counter() at which a run started
LONGEST = 100  # characters of a folder's name, before its digest


class Interrupted(Exception):
    """The run was asked to stop, and a checkpoint is on disk: the same command resumes it."""


def train(run: Run, prepared: Prepared, *, results: Path, runs: Path, where: Where) -> tuple[Path, bool]:
    """One cell and seed of the arena, from its data to its record. Returns (path of the record, newly made). Raises
    what `carry_out` raises."""
    run = replace(run, execution=where.execution)
    path = record_path(results, run.meta.name, run.attention, run.digest, run.seed)

    def publish(record: dict[str, Any], counts: Counts | None) -> None:
        write_labels(results, prepared.splits["test"].labels.tobytes())
        write_record(path, record, None if counts is None else counts.predictions.tobytes())

    folder = run_folder(runs, run)
    return path, carry_out(lambda: Trainer(run, prepared, where), path, folder, publish, where.world)


def carry_out(make: Callable[[], Training], path: Path, folder: Path, publish: Callable, world: World = ALONE) -> bool:
    """Train, read the test split once, and `publish(record, what the test returned)` at `path`. False: it is there.
    Raises Interrupted after SIGINT or SIGTERM, with a checkpoint saved, and Held when another process is at this
    run."""
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
            tested, status, step, hparams = None, "ok", training.progress.step, training.hparams()
            with RunLog(folder, hparams, step) if world.is_main else nullcontext() as log:
                try:
                    fit(training, folder, log)
                    peak = training.memory.read()
                    tested = training.test()
                except Diverged as error:
                    peak, status = training.memory.read(), f"failed: {error}"
                if log:
                    result = training.outcome(tested, folder) if status == "ok" else None
                    facts = {"device": training.where.device, "command": training.command, "clocks": clocks}
                    record = build_record(training.sections(peak), result, status=status, **facts)
                    if status != "ok" and (remains := training.remains()):
                        record["failure"] = remains
                    log.finish(record)
            if log:
                publish(record, tested)  # last: once the record is there, so is all the rest
                for name in CHECKPOINTS:
                    (folder / name).unlink(missing_ok=True)
    except Timeout:
        raise Held(f"another process is training this cell: {folder / 'lock'} is held") from None
    return True


def build_record(
    sections: dict, result: dict | None, *, status: str, device: torch.device, command: str, clocks: Clocks
) -> dict[str, Any]:
    """The whole record, of the arena and of the Gemma track. `sections`: its task, data, model, training, cost and,
    where there are more packages to name, env. The end is counted from the start by a monotonic clock: the date may be
    set while a run goes on."""
    started, begun = clocks
    ended = started + timedelta(seconds=time.perf_counter() - begun)
    record = {"schema": SCHEMA, "suite": suite_facts()}
    record |= {name: sections[name] for name in ("task", "data", "model", "training")}
    record |= {"result": result, "cost": sections["cost"], "env": environment(device) | sections.get("env", {})}
    record |= {"status": status, "command": command, "started": started.isoformat(timespec="microseconds")}
    return record | {"ended": ended.isoformat(timespec="microseconds")}


def run_folder(runs: Path, run: Run) -> Path:
    """runs/<task>/<attention>/<preset>/seed<k>. A run that differs from its preset adds to <preset> what differs: each
    override, another source of data, the validation rule (`smoke,train.lr=0.1`), and +bf16+compiled+2-processes. The
    digest takes the place of what would be too long for the name of a folder, or is no plain text."""
    source, rule = run.manifest["source"], run.val_rule
    words = [run.preset, *(f"{key}={value}" for key, value in run.overrides.items())]
    words += [] if source in ("generated", run.recipe.data.source) else [f"data={source}"]
    words += [] if rule == "held-out" else [f"val-rule={rule}"]
    name = ",".join(words)
    plain = re.sub(r"[^\w.,=-]", "-", name)[:LONGEST]
    recipe = name if name == plain else f"{plain}-{replace(run, execution=Execution()).digest[:8]}"
    folder = "+".join((recipe, *run.execution.words)).replace(" ", "-")
    return Path(runs) / run.meta.name / run.attention.replace(":", "-") / folder / f"seed{run.seed}"


def check_unfinished(runs: Path, run: Run) -> None:
    """Raise UsageError where this run was stopped in another precision, compiled or not, or with more or fewer
    processes: nothing is resumed in another way."""
    own = run_folder(runs, run)
    recipe = own.parent.name.partition("+")[0]
    for path in sorted(own.parents[1].glob(f"*/{own.name}/{CHECKPOINTS[0]}")):
        if path.parent != own and path.parents[1].name.partition("+")[0] == recipe:
            before = Execution(*checkpoint.load(path)[1].get("execution", ()))
            raise UsageError(f"{path} is of {before}, not of {run.execution}: finish that run, or remove it")


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
            pending.append(t.step(p.step))
            p.step += 1
            display.step()
            due = p.step % t.eval_every == 0 or p.step in (t.turn, t.steps)
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
                    raise Interrupted(f"stopped at step {p.step} of {t.steps}; the same command resumes there")
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
    scalars = {"train/loss": value, "train/acc": int(correct) / training.predictions, "opt/grad_norm": float(norm)}
    return scalars | {"opt/lr": training.optimizer.param_groups[-1]["lr"]}


def validate(training: Training, log: RunLog | None, display: Display) -> None:
    """A validation, its scalars and those of speed."""
    p, scalars = training.progress, training.validate()
    if p.curve:  # else it pretrains
        display.validated(scalars["val/acc"], max(c[3] / c[4] for c in p.curve if c[1] == "val"))
    if p.seconds:
        scalars |= {"perf/steps_per_s": p.step / p.seconds, "perf/tokens_per_s": p.tokens / p.seconds}
    if log:
        log.scalars(p.step, scalars | {"perf/peak_mem_mb": (training.memory.read() or 0) / 1e6})


def save(training: Training, folder: Path) -> None:
    """All that a run needs to go on: on a CPU to the same bits; a GPU adds in an order of its own, up to rounding. The
    sampler's position is the step itself."""
    world = training.where.world
    groups = {"model": training.tensors(), "best": training.best}
    groups["optim"] = checkpoint.optimizer_tensors(training.optimizer)
    states = world.all_gather(random_states(training.where.device))
    groups |= {f"rng.{rank}": generators for rank, generators in enumerate(states)}
    tensors = {f"{group}.{name}": t for group, entries in groups.items() for name, t in entries.items()}
    if training.progress.step == training.middle > 0:
        kept = {name: t for name, t in tensors.items() if name.startswith(("model.", "optim."))}
        training.progress.middle_sha256 = checkpoint.tensors_sha256(kept)
        if world.is_main:
            checkpoint.save(folder / MIDDLE, kept, {"digest": training.digest, "seed": training.seed})
    state = {"digest": training.digest, "seed": training.seed, "execution": training.where.execution}
    state |= {"progress": asdict(training.progress), "sources": training.sources}
    if world.is_main:
        checkpoint.save(folder / CHECKPOINTS[0], tensors, state, folder / CHECKPOINTS[1])


def resume(training: Training, folder: Path) -> None:
    """Continue from the newest sound checkpoint, if there is one. Raises UsageError when it is another run's. A damaged
    one is set aside, and said to be."""
    damaged = []
    for path in filter(Path.exists, (folder / name for name in CHECKPOINTS)):
        try:
            tensors, state = checkpoint.load(path)
        except checkpoint.Damaged as error:
            path.replace(path.with_suffix(".damaged"))
            damaged.append(str(error))
            continue
        if state["digest"] != training.digest:
            why = "was made with another recipe, other data or another execution"
            raise UsageError(f"{path} {why}: remove it, or give another --runs")
        if state.get("sources", training.sources) != training.sources:
            raise UsageError(f"{path} was made with another source of the attention or the task: remove it")
        training.load(checkpoint.under("model", tensors))
        checkpoint.restore_optimizer(training.optimizer, checkpoint.under("optim", tensors))
        training.best = checkpoint.under("best", tensors)
        training.progress = type(training.progress)(**state["progress"])
        training.progress.resumed += 1
        set_random_states(checkpoint.under(f"rng.{training.where.world.rank}", tensors), training.where.device)
        break
    if damaged:
        step = training.progress.step
        goes_on = f"going on from step {step}" if step else "starting from the first step"
        print(f"{'; '.join(damaged)}: set aside as *.damaged, {goes_on}", file=sys.stderr)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the CPU's generator and of the device's own (cuda, mps), by kind of device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_states` gave, as far as this device has such generators."""
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu" and device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])
