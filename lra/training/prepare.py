"""`prepare`, from its options to its output."""

from __future__ import annotations

import os
from argparse import Namespace

from lra import registry
from lra.options import UsageError
from lra.training import config
from tasks.store.prepare import prepare as prepare_task
from tasks.store.prepared import Prepared


def prepare(args: Namespace) -> None:
    """`prepare`: build or reuse, and say what is there."""
    task = registry.load_task(args.task)
    config.load_preset(task, args.preset)
    if args.export and not hasattr(task, "export"):
        raise UsageError(f"--export {args.export}: {args.task} has no published format to write")
    workers = args.workers or os.cpu_count() or 1
    origin = {"source": args.source, "data_dir": args.data_dir, "out": args.data}
    prepared, reused = prepare_task(task, args.preset, workers=workers, again=args.again, **origin)
    print(f"{args.data / args.task / args.preset}: {'reused' if reused else 'prepared'}")
    print(describe(prepared))
    if args.export:
        print("exported: " + ", ".join(map(str, task.export(prepared.splits, args.export))))


def describe(prepared: Prepared) -> str:
    """A manifest for people."""
    m = prepared.manifest
    sizes = ", ".join(f"{name} {s['n']:,}" for name, s in m["splits"].items())
    longest = max(s["max_length"] for s in m["splits"].values())
    lines = [f"  {m['dataset']} ({m['source']}, {m['revision']}): {sizes}; up to {longest} tokens"]
    if m["duplicates_removed"]:
        dropped = ", ".join(f"{n} from {name}" for name, n in m["duplicates_removed"].items())
        lines.append(f"  duplicates across splits removed: {dropped}")
    if repeated := m.get("duplicates_within"):  # manifests of before it was counted have none
        lines.append("  repeated within: " + ", ".join(f"{n} in {name}" for name, n in repeated.items()))
    floors = ", ".join(f"{name} {100 * v:.1f}" for name, v in m["floors"].items())
    lines.append(f"  floors, % of test: {floors}")
    if m["report"]:
        facts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in m["report"].items()}
        lines.append("  " + ", ".join(f"{name} {fact}" for name, fact in facts.items()))
    return "\n".join(lines)
