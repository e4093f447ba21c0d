"""What a run puts into its record: counts, probe, cost, and everything needed to repeat it."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import torch

from lra.bench.base import PAIRS, step_time_ratio
from lra.machine import environment
from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL, SCHEMA, finite, suite_facts
from lra.training.batches import collate
from lra.training.config import Run
from lra.training.evaluate import Counts, to_device
from lra.training.trainer import Trainer, Where, tensors_sha256
from tasks.store.prepared import Prepared, data_identity

PROBE_STEPS, PROBE_BATCH = 20, 4


def build_record(
    trainer: Trainer,
    status: str,
    result: dict[str, Any] | None,
    cost: dict[str, Any],
    started: datetime,
    seconds: float,
) -> dict[str, Any]:
    """The whole record (see record.py for where it goes). `cost` adds what the trainer itself does not know.

    `seconds` since `started` are of a monotonic clock: the date may be set while a run goes on.
    """
    run = trainer.run
    model = model_facts(run)
    return {
        "schema": SCHEMA,
        "suite": suite_facts(),
        "task": {
            "name": run.meta.name,
            "version": run.meta.version,
            "preset": run.preset,
            "protocol": protocol(run, model["n_params_ratio_to_softmax"]),
            "seq_len": run.recipe.data.seq_len,
            "dataset": run.manifest["dataset"],
            "substitute": run.manifest["substitute"],
            "source_sha256": run.sources["task"],
        },
        "data": {
            **{key: run.manifest[key] for key in ("source", "revision", "splits", "floors")},
            "manifest_sha256": data_identity(run.manifest),
            "val_rule": run.val_rule,
        },
        "model": model | {"source_sha256": run.sources["model"]},
        "training": _training(trainer),
        "result": result,
        "cost": _cost(trainer) | cost,
        "env": environment(trainer.where.device),
        "status": status,
        "command": run.command,
        "started": started.isoformat(timespec="seconds"),
        "ended": (started + timedelta(seconds=seconds)).isoformat(timespec="seconds"),
    }


def protocol(run: Run, parameter_ratio: float) -> str:
    """lra-v1 is the shared recipe at an equal parameter budget, with validation held out; the rest is open."""
    shared = not any(key.split(".")[0] in ("encoder", "train") for key in run.overrides)
    closed = shared and run.val_rule == "held-out" and parameter_ratio <= MAX_PARAMETER_RATIO
    return PROTOCOL if closed else "open"


def outcome(trainer: Trainer, counts: Counts) -> dict[str, Any]:
    """Raw counts of the run; accuracies are computed by whoever reads the record."""
    p = trainer.progress
    selected = next(entry for entry in p.curve if entry[0] == p.best_step and entry[1] == "val")
    return {
        "n_correct": counts.n_correct,
        "n_test": counts.n,
        "val_n_correct": selected[3],
        "n_val": selected[4],
        "curve": p.curve,
        "predictions_sha256": hashlib.sha256(counts.predictions.tobytes()).hexdigest(),
    }


def probe(run: Run, prepared: Prepared) -> dict[str, Any]:
    """The first training losses in fp32 on one CPU thread with a small batch: cheap for anybody to repeat."""
    small = replace(run.recipe.train, batch=PROBE_BATCH, accumulate=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trainer = Trainer(
            replace(run, recipe=replace(run.recipe, train=small)), prepared, Where(torch.device("cpu"))
        )
        losses = [trainer.step(step)[0].item() for step in range(PROBE_STEPS)]
    finally:
        torch.set_num_threads(threads)
    return {"batch": PROBE_BATCH, "losses": [finite(loss) for loss in losses]}


def step_ratio(trainer: Trainer) -> dict[str, Any]:
    """Step time against softmax in this process, on the longest batch; one interleaved measurement."""
    run, where = trainer.run, trainer.where
    softmax = run.build_model("softmax").to(where.device).train()
    model = trainer.model.train()
    lengths = trainer.batches.lengths
    longest = np.argsort(lengths, kind="stable")[-trainer.optim.batch // trainer.optim.accumulate :]
    batch = collate(trainer.prepared.splits["train"], run.meta.towers, longest, trainer.batches.cap)
    ratio = step_time_ratio(model, softmax, to_device(batch, where.device), where=where)
    return {"step_time_ratio": ratio, "pairs": PAIRS}


def model_facts(run: Run) -> dict[str, Any]:
    """The record's model section, from the configuration and the seed alone."""
    model = run.build_model()
    n_params, softmax = (sum(p.numel() for p in m.parameters()) for m in (model, run.build_model("softmax")))
    return {
        "attention": run.attention,
        "attention_config": run.attention_config,
        "encoder": asdict(run.recipe.encoder),
        "exact": model.encoder.attentions[0].exact,
        "n_params": n_params,
        "n_params_ratio_to_softmax": n_params / softmax,
        "init_sha256": tensors_sha256(model.state_dict()),
    }


def _training(trainer: Trainer) -> dict[str, Any]:
    """The record's training section."""
    run, p, where = trainer.run, trainer.progress, trainer.where
    return {
        "seed": run.seed,
        "precision": where.precision,
        "compile": where.compiled,
        "optimizer": "AdamW",
        "recipe": asdict(run.recipe.train),
        "budget": run.recipe.budget,
        "overrides": run.overrides,
        "world_size": where.world.size,
        "steps": p.step,
        "examples_seen": p.step * trainer.optim.batch,
        "selected_step": p.best_step,
        "resumed": p.resumed,
    }


def _cost(trainer: Trainer) -> dict[str, Any]:
    """Seconds are those of training steps, over all processes of a resumed run; validation is excluded."""
    p = trainer.progress
    return {
        "device": trainer.where.device.type,
        "wall_s": round(p.seconds, 3),
        "steps_per_s": round(p.step / p.seconds, 4),
        "tokens_per_s": round(p.tokens / p.seconds, 1),
    }
