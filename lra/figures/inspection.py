"""`inspect`: what a person would look at, all of it read from the prepared arrays, as the model reads them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lra import registry
from lra.figures import style
from lra.options import unknown
from tasks.base import SPLITS, Split
from tasks.store.files import atomic_path
from tasks.store.prepared import Prepared, load
from tasks.store.splits import disjoint

SCHEMA = "lra-inspect/1"
EXAMPLES = 5  # shown as text, the first of train
CHARACTERS = 400  # of an example that are shown
SHEET = (10, 6)  # columns and rows of a contact sheet, the first pictures of train
TOKENS = ("shortest", "median", "mean", "longest")
BINS = 20  # of a histogram of lengths
GREYS = " .:-=+*#%@"


def inspect(args: Namespace) -> None:
    """`inspect`: print facts and examples; with --out, write facts, figure and contact sheet there."""
    task = registry.load_task(args.task)
    if args.preset not in task.RECIPES:
        raise unknown(f"preset of {args.task}", args.preset, task.RECIPES)
    prepared = load(args.data / args.task / args.preset)
    facts = examine(prepared, args.preset)
    print(describe(facts))
    print(
        "\n".join(["", f"The first {EXAMPLES} training examples:", *examples(task, prepared.splits["train"])])
    )
    if args.out:
        stem = args.out / f"{args.task}-{args.preset}"
        with atomic_path(stem.with_suffix(".json")) as path:
            path.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")
        written = [
            stem.with_suffix(".json"),
            *lengths_figure(prepared, stem.with_name(f"{stem.name}-lengths")),
        ]
        if task.META.reads == "pixels":
            written.append(contact_sheet(prepared.splits["train"], stem.with_name(f"{stem.name}-sheet.png")))
        print("\nwritten: " + ", ".join(map(str, written)))


def examine(prepared: Prepared, preset: str) -> dict[str, Any]:
    """Facts of prepared data as plain values: manifest, label counts, lengths; no path and no host."""
    m = prepared.manifest
    names = ("task", "version", "dataset", "substitute", "source", "revision", "licence", "floors", "report")
    facts = {"schema": SCHEMA, "preset": preset} | {name: m[name] for name in names}
    facts["recipe"] = {k: v for k, v in m["request"].items() if k in ("seq_len", "seed", "options")}
    facts["duplicates_removed"] = m["duplicates_removed"]
    _, _, facts["duplicates_within"] = disjoint(prepared.splits, registry.load_task(m["task"]).META.towers)
    longest = max(int(np.diff(split.offsets).max()) for split in prepared.splits.values())
    edges = np.unique(np.linspace(0, longest, BINS + 1).round().astype(int)) + 1
    facts["splits"] = {
        name: {"n": len(split.labels), "sha256": m["splits"][name]["sha256"]} | _measure(split, edges)
        for name, split in prepared.splits.items()
    }
    return facts


def _measure(split: Split, edges: np.ndarray) -> dict[str, Any]:
    lengths = np.diff(split.offsets)
    counts, _ = np.histogram(lengths, edges)
    tokens = {"shortest": int(lengths.min()), "median": float(np.median(lengths))}
    tokens |= {"mean": round(float(lengths.mean()), 1), "longest": int(lengths.max())}
    bars = [[int(first), int(after) - 1, int(n)] for first, after, n in zip(edges, edges[1:], counts)]
    labels = np.bincount(split.labels)
    return {"labels": labels.tolist(), "tokens": tokens, "histogram": bars}


def describe(facts: dict[str, Any]) -> str:
    """Facts for people."""
    lines = [
        f"{facts['task']}, {facts['preset']}: {facts['dataset']} ({facts['source']}, {facts['revision']})"
    ]
    lines += [
        f"licence: {facts['licence']}",
        "",
        "split  examples  tokens: shortest / median / mean / longest",
    ]
    for name in SPLITS:
        split = facts["splits"][name]
        lengths = " / ".join(f"{split['tokens'][which]:,.6g}" for which in TOKENS)
        lines.append(f"{name:<5} {split['n']:>9,}  {lengths}")
    lines += ["", "share of each label, %"]
    for name in SPLITS:
        split = facts["splits"][name]
        shares = (f"{label}: {100 * n / split['n']:.1f}" for label, n in enumerate(split["labels"]))
        lines.append(f"{name:<5} {'  '.join(shares)}")
    lines += ["", "training sequences by length"]
    bars = facts["splits"]["train"]["histogram"]
    most = max(n for *_, n in bars)
    lines += [f"{a:>6}-{b:<6} {n:>9,} {'#' * round(50 * n / most)}" for a, b, n in bars if n]
    lines += ["", "floors, % of test: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in facts["floors"].items())]
    removed = ", ".join(f"{n:,} from {name}" for name, n in facts["duplicates_removed"].items())
    within = ", ".join(f"{n:,} in {name}" for name, n in facts["duplicates_within"].items())
    lines.append(
        f"duplicates across splits removed: {removed or 'none'}; within a split, kept: {within or 'none'}"
    )
    return "\n".join([*lines, *(f"{k}: {v:g}" if isinstance(v, float) else f"{k}: {v}"
                                for k, v in facts["report"].items())])  # fmt: skip


def examples(task: ModuleType, split: Split) -> list[str]:
    """Lines that show the first examples: text as text, symbols as symbols, pictures side by side."""
    count = min(EXAMPLES, len(split.labels))
    if task.META.reads == "pixels":
        return _pictures_as_text(pictures(split, count), split.labels)
    lines = []
    for i in range(count):
        for t in range(task.META.towers):
            tokens = split.sequence(task.META.towers * i + t)
            text = _spell(task, tokens)
            more = f" ... ({len(text) - CHARACTERS:,} characters more)" if len(text) > CHARACTERS else ""
            which = f", text {t + 1}" if task.META.towers > 1 else ""
            lines.append(
                f"{i}: label {split.labels[i]}, {len(tokens)} tokens{which}: {text[:CHARACTERS]}{more}"
            )
    return lines


def _spell(task: ModuleType, tokens: np.ndarray) -> str:
    """A sequence on one line; control characters are escaped, so that a terminal shows them and obeys none."""
    if task.META.reads == "bytes":
        text = (np.asarray(tokens) - 1).astype(np.uint8).tobytes().decode("utf-8", errors="backslashreplace")
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return task.decode(tokens) if hasattr(task, "decode") else " ".join(map(str, tokens))


def pictures(split: Split, count: int) -> np.ndarray:
    """The first pictures of a split as grey levels, uint8 (count, side, side); its highest level is white."""
    side = round(float(split.offsets[1] - split.offsets[0]) ** 0.5)
    levels = np.asarray(split.tokens[: count * side * side], np.int64).reshape(count, side, side) - 1
    return (levels * 255 // max(1, int(levels.max()))).astype(np.uint8)


def _pictures_as_text(images: np.ndarray, labels: np.ndarray) -> list[str]:
    """Pictures side by side, two characters a pixel at 8 px; larger ones show each block's brightest pixel."""
    n, side, _ = images.shape
    small = min(side, 16)
    block = side // small
    coarse = images[:, : small * block, : small * block].reshape(n, small, block, small, block).max((2, 4))
    wide = 1 if small == 16 else 2
    rows = (
        "  ".join("".join(wide * GREYS[-(-g * 9 // 255)] for g in image[y].tolist()) for image in coarse)
        for y in range(small)
    )
    header = "  ".join(f"{i}: label {label}".ljust(wide * small) for i, label in enumerate(labels[:n]))
    return [header, *rows]


def contact_sheet(split: Split, path: Path) -> Path:
    """Write a PNG of the first pictures, enlarged without smoothing, each above its label."""
    from PIL import Image, ImageDraw, ImageFont

    columns, rows = SHEET
    images = pictures(split, min(columns * rows, len(split.labels)))
    scale = max(1, 96 // images.shape[1])
    side, gap, line = scale * images.shape[1], 8, 16
    rows = -(-len(images) // columns)
    sheet = Image.new("L", (gap + columns * (side + gap), gap + rows * (side + line + gap)), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, image in enumerate(images):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + line + gap)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        draw.text((x, y + side), f"{i}: label {split.labels[i]}", fill=0, font=font)
    with atomic_path(path) as temporary:
        sheet.save(temporary, optimize=True)
    return path


def lengths_figure(prepared: Prepared, path: Path) -> tuple[Path, Path]:
    """Draw how long the sequences of each split are; writes PATH.svg and PATH.png."""
    m = prepared.manifest
    longest = max(int(np.diff(split.offsets).max()) for split in prepared.splits.values())
    bins = np.linspace(0, longest + 1, 51)
    with style.drawing():
        figure, axes = style.subplots(height=2.6)
        for name, colour in zip(SPLITS, style.PALETTE):
            lengths = np.diff(prepared.splits[name].offsets)
            share = np.histogram(lengths, bins)[0] / len(lengths)
            axes.stairs(100 * share, bins, color=colour, label=f"{name} ({len(lengths):,})")
        axes.set(xlabel="tokens of a sequence", ylabel="% of the split", title=f"{m['task']}: {m['dataset']}")
        axes.legend()
        return style.save(figure, path)
