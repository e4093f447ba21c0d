"""What is printed of data, and before and after a run: its configuration, and what it came to."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lra.records.record import read_record
from lra.records.stats import wilson
from lra.training.config import Run
from lra.training.train import WEIGHTS

REFERENCE = Path(__file__).resolve().parents[2] / "results" / "reference"  # the authors' records


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


def header(run: Run) -> str:
    """The resolved configuration."""
    groups = {"attention": run.attention_config}
    groups |= {"encoder": asdict(run.recipe.encoder), "train": asdict(run.recipe.train)}
    name = f"{run.meta.name} / {run.attention} / {run.preset} / seed {run.seed}  (digest {run.digest[:16]})"
    lines = [name, f"  data       {run.manifest['dataset']}, validation {run.val_rule}"]
    lines += [f"  {g:<10} " + " ".join(f"{k}={v}" for k, v in o.items()) for g, o in groups.items() if o]
    n_params = sum(p.numel() for p in run.build_model().parameters())
    return "\n".join([*lines, f"  model      {n_params:,} parameters"])


def missing_seeds(path: Path, seed: int) -> str | None:
    """A note that `leaderboard submit` takes seeds 0 to n-1, where a smaller seed has no record beside `path`."""
    missing = [k for k in range(seed) if not path.with_name(f"seed{k}.json").exists()]
    note = "note: seed {} has no record, and submit takes seeds 0, 1, ... only"
    return note.format(missing[0]) if missing else None


def report(record: dict[str, Any], path: Path, folder: Path) -> str:
    """Selected step, time and memory, where the files of a run are, what to do next, and its outcome."""
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
    return "\n".join([*lines, outcome(record, path)])


def outcome(record: dict[str, Any], path: Path) -> str:
    """Test accuracy with its interval beside the floors of the data and the reference's record of the same cell and
    seed; or why the run failed."""
    if not record["result"]:
        return record["status"]
    n_correct, n = record["result"]["n_correct"], record["result"]["n_test"]
    low, high = wilson(n_correct, n)
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
