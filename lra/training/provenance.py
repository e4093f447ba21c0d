"""What a record holds beside its counts: everything needed to repeat the run."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import torch

from lra.machine import environment
from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL, SCHEMA, suite_facts
from lra.training.checkpoint import tensors_sha256
from lra.training.config import Run
from tasks.store.prepared import data_identity

PROBE_STEPS, PROBE_BATCH = 20, 4
Clocks = tuple[datetime, float]  # the date and the seconds of time.perf_counter() at which a run started


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


def cell_sections(run: Run) -> dict[str, Any]:
    """The record's task, data and model, from the configuration, the data and the seed alone."""
    model, manifest, sources = model_facts(run), run.manifest, run.sources
    task = {"name": run.meta.name, "version": run.meta.version, "preset": run.preset}
    task |= {"protocol": protocol(run, model["n_params_ratio_to_softmax"]), "seq_len": run.recipe.data.seq_len}
    task |= {"dataset": manifest["dataset"], "substitute": manifest["substitute"], "source_sha256": sources["task"]}
    data = {key: manifest[key] for key in ("source", "revision", "splits", "floors")}
    data |= {"manifest_sha256": data_identity(manifest), "val_rule": run.val_rule}
    return {"task": task, "data": data, "model": model | {"source_sha256": sources["model"]}}


def protocol(run: Run, parameter_ratio: float) -> str:
    """lra-v1 is the shared recipe at an equal parameter budget, with validation held out; the rest is open."""
    shared = all(key.startswith("attention.") for key in run.overrides)
    closed = shared and run.val_rule == "held-out" and parameter_ratio <= MAX_PARAMETER_RATIO
    return PROTOCOL if closed else "open"


def model_facts(run: Run) -> dict[str, Any]:
    """The record's model section, from the configuration and the seed alone."""
    model = run.build_model()
    n_params, softmax = (sum(p.numel() for p in m.parameters()) for m in (model, run.build_model("softmax")))
    facts = {"attention": run.attention, "attention_config": run.attention_config}
    facts |= {"encoder": asdict(run.recipe.encoder), "exact": model.encoder.attentions[0].exact, "n_params": n_params}
    return facts | {"n_params_ratio_to_softmax": n_params / softmax, "init_sha256": tensors_sha256(model.state_dict())}
