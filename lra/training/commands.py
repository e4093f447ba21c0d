"""`prepare` and `train`, from their options to their output: data, a run's configuration, and what it came to."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lra import registry
from lra.machine import pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import Execution, predictions_path, read_record, record_path
from lra.records.stats import design_effect, wilson
from lra.training import config, distributed
from lra.training.evaluate import Where
from lra.training.train import WEIGHTS, Interrupted, check_unfinished, run_folder
from lra.training.train import train as train_run
from tasks.store.files import sha256_file
from tasks.store.prepare import check_unedited
from tasks.store.prepare import prepare as prepare_task
from tasks.store.prepared import load

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"  # the authors' records


def prepare(args: Namespace) -> None:
    """`prepare`: build or reuse, and say what is there."""
    task = registry.load_task(args.task)
    config.load_preset(task, args.preset)
    if args.export and not hasattr(task, "export"):
        raise UsageError(f"--export {args.export}: {args.task} has no published format to write")
    how = {"workers": args.workers or os.cpu_count() or 1, "again": args.again, "out": args.data}
    prepared, reused = prepare_task(task, args.preset, source=args.source, data_dir=args.data_dir, **how)
    place = args.data / args.task / args.preset
    print(f"{place}: {'reused' if reused else 'prepared'}\n{data(prepared.manifest)}")
    if args.export:
        print("exported: " + ", ".join(map(str, task.export(prepared.splits, args.export))))


def train(args: Namespace) -> int:
    """`train`: resolve, train, record. Exit code 1 when the run failed, 85 when it was stopped with a checkpoint."""
    set_threads(args.threads)
    device, how = pick_device(args.device), Execution(precision(args), args.compile, distributed.world_size())
    overrides = config.overrides(args.sets, args.steps)
    config.load_preset(registry.load_task(args.task), args.preset)
    prepared = load(args.data / args.task / args.preset)
    cell = args.task, args.preset, args.attention, args.seed
    run = config.resolve(*cell, prepared.manifest, overrides, args.val_rule, how)
    path, optim = record_path(args.results, args.task, args.attention, run.digest, args.seed), run.recipe.train
    state, edited = config.standing(run, path)
    if state == "changed" and not args.again:
        raise UsageError(edited)
    if state == "missing" or args.again:
        check_unedited(registry.load_task(args.task), args.data / args.task / args.preset, prepared)
        check_unfinished(args.runs, run)
    with distributed.process_group(device, optim.batch, optim.accumulate) as (world, device):
        if world.is_main:
            print(f"{header(run)}\n  runs on    {device}, {how.precision}, {torch.get_num_threads()} threads")
            if missing := [k for k in range(args.seed) if not path.with_name(f"seed{k}.json").exists()]:
                note = f"note: seed {missing[0]} has no record, and submit takes seeds 0, 1, ... only"
                print(note, file=sys.stderr)
            if args.again:
                set_aside(path)
        world.barrier()
        where = Where(device, how.precision, how.compiled, world)
        try:
            _, new = train_run(run, prepared, results=args.results, runs=args.runs, where=where)
        except Interrupted as stopped:
            if world.is_main:
                print(stopped, file=sys.stderr)
            return STOPPED
    if not world.is_main:
        return 0
    record, done = read_record(path), f"already done: {path}; --again trains the cell anew"
    print(*(report(record, path, run_folder(args.runs, run)) if new else [done]), outcome(record, path), sep="\n")
    return int(record["status"] != "ok")


def set_aside(path: Path) -> None:
    """Rename a record and its predictions to earlier-seed<k>-<first 8 digits of its sha256>: no table reads them."""
    if path.exists():
        earlier = path.with_name(f"earlier-{path.stem}-{sha256_file(path)[:8]}.json")
        path.replace(earlier)
        if predictions_path(path).exists():
            predictions_path(path).replace(predictions_path(earlier))


def precision(args: Namespace) -> str:
    """--precision; auto is bf16 on cuda, else fp32."""
    auto = "bf16" if pick_device(args.device).type == "cuda" else "fp32"
    return auto if args.precision == "auto" else args.precision


# What is printed of data, and before and after a run


def data(m: dict[str, Any]) -> str:
    """A manifest for people."""
    sizes = ", ".join(f"{name} {split['n']:,}" for name, split in m["splits"].items())
    longest = max(split["max_length"] for split in m["splits"].values())
    lines = [f"  {m['dataset']} ({m['source']}, {m['revision']}): {sizes}; up to {longest} tokens"]
    if m["duplicates_removed"]:
        dropped = ", ".join(f"{n} from {name}" for name, n in m["duplicates_removed"].items())
        lines.append(f"  duplicates across splits removed: {dropped}")
    if repeated := m.get("duplicates_within"):  # manifests of before it was counted have none
        lines.append("  repeated within: " + ", ".join(f"{n} in {name}" for name, n in repeated.items()))
    floors = ", ".join(f"{name} {100 * v:.1f}" for name, v in m["floors"].items())
    lines.append(f"  floors, % of test: {floors}")
    facts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in m["report"].items()}
    return "\n".join(lines + ["  " + ", ".join(f"{name} {fact}" for name, fact in facts.items())] * bool(facts))


def header(run: config.Run) -> str:
    """The resolved configuration."""
    shared = {"encoder": asdict(run.recipe.encoder), "train": asdict(run.recipe.train)}
    groups = {"attention": run.attention_config} | shared | {"pretrain": {"steps": run.turn} if run.turn else {}}
    name = f"{run.meta.name} / {run.attention} / {run.preset} / seed {run.seed}  (digest {run.digest[:16]})"
    lines = [name, f"  data       {run.manifest['dataset']}, validation {run.val_rule}"]
    lines += [f"  {g:<10} " + " ".join(f"{k}={v}" for k, v in o.items()) for g, o in groups.items() if o]
    return "\n".join([*lines, f"  model      {sum(p.numel() for p in run.build_model().parameters()):,} parameters"])


def report(record: dict[str, Any], path: Path, folder: Path) -> list[str]:
    """Lines: selected step, time and memory, where the files of a run are, what to do next."""
    training, cost, result = record["training"], record["cost"], record["result"]
    memory = f", peak memory {cost['peak_bytes'] / 1e6:,.0f} MB" if cost["peak_bytes"] is not None else ""
    lines = [
        f"  time       {cost['wall_s']:.1f} s of training, {cost['steps_per_s']:.3g} steps/s{memory}",
        f"  record     {path}",
        f"  curves     {folder}: python -m lra tensorboard --runs {folder.parents[3]} --start",
        f"  next       python -m lra table --results {path.parents[4]}",
    ]
    if result:
        step = f"step {training['selected_step']} of {training['steps']}"
        validation = share(result["val_n_correct"], result["n_val"])
        losses = [loss for _, split, loss, *_ in result["curve"] if split == "train"]
        fell = "training loss" if losses[-1] < losses[0] else "training loss did not fall:"
        between = f"{fell} {losses[0]:.3f} to {losses[-1]:.3f}"
        lines.insert(0, f"  selected   {step}, by validation: {validation}; {between}")
        lines.insert(3, f"  weights    {folder / WEIGHTS}")
    return lines


def outcome(record: dict[str, Any], path: Path) -> str:
    """Test accuracy with its interval beside the floors of the data and the reference's record of the same cell and
    seed; or why the run failed."""
    if not record["result"]:
        return record["status"]
    n_correct, n = record["result"]["n_correct"], record["result"]["n_test"]
    effect = design_effect(*(record["task"][key] for key in ("name", "version", "dataset")))
    low, high = wilson(n_correct / effect, n / effect)
    floors = ", ".join(f"{name} {100 * floor:.1f}" for name, floor in record["data"]["floors"].items())
    line = f"test {share(n_correct, n)}, 95% interval [{100 * low:.1f}, {100 * high:.1f}]; floors: {floors}"
    reference = REFERENCE / path.relative_to(path.parents[4])
    if reference.exists() and (other := read_record(reference)["result"]):
        n_seeds = len(list(reference.parent.glob("seed*.json")))
        authors = f"the authors' run of this seed (results/reference, {n_seeds} seed{'s' if n_seeds > 1 else ''})"
        line += f"; {authors}: {share(other['n_correct'], other['n_test'])}"
    return line


def share(n_correct: int, n: int) -> str:
    """`45.25% (181/400)`."""
    return f"{100 * n_correct / n:.2f}% ({n_correct}/{n})"
