"""`inspect` and `cards`: facts of prepared data, examples as the model reads them, the tables of tasks/DATA.md.

`inspect TASK --out FOLDER` writes TASK-PRESET.json (the facts), TASK-PRESET-lengths (a figure) and, for pictures,
TASK-PRESET-sheet.png. `cards` reads these files.
"""

import itertools
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from lra import registry
from lra.figures import style
from lra.options import PRESETS, UsageError, unknown
from lra.records.markup import Grid, markdown, refresh_block
from tasks.base import SPLITS, Split
from tasks.store.files import atomic_path
from tasks.store.prepared import Prepared, disjoint, load

SCHEMA = "lra-inspect/1"
EXAMPLES = 5  # shown as text, the first of train
CHARACTERS = 400  # shown of one example
SHEET = (10, 6)  # columns and rows of a contact sheet, the first pictures of train
TOKENS = ("shortest", "median", "mean", "longest")
GREYS = " .:-=+*#%@"
FROM_CARDS = "../results/reference/data"  # the folder of the figures as tasks/DATA.md links to it


def show(args: Namespace) -> None:
    """`inspect`: print facts and examples; with --out, write facts, figure and contact sheet there."""
    task = registry.load_task(args.task)
    if args.preset not in task.RECIPES:
        raise unknown(f"preset of {args.task}", args.preset, task.RECIPES)
    prepared = load(args.data / args.task / args.preset)
    facts = examine(prepared, args.preset)
    print(f"{describe(facts)}\n\nThe first {EXAMPLES} training examples:")
    print("\n".join(examples(task, prepared.splits["train"])))
    if args.out:
        stem = args.out / f"{args.task}-{args.preset}"
        with atomic_path(stem.with_suffix(".json")) as path:
            path.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", "utf-8")
        lengths = lengths_figure(prepared, stem.with_name(f"{stem.name}-lengths"))
        written = [stem.with_suffix(".json"), *lengths]
        if task.META.reads == "pixels":
            written.append(contact_sheet(prepared.splits["train"], stem.with_name(f"{stem.name}-sheet.png")))
        print("\nwritten: " + ", ".join(map(str, written)))


def cards(args: Namespace) -> None:
    """`cards`: print the table of each task, or put it between the markers of a file."""
    folder = args.results / "data"
    tables = {task: card(list(presets.values()), folder) for task, presets in read_facts(folder).items()}
    if not args.write:
        print("\n\n".join(f"## {task}\n\n{table}" for task, table in tables.items()))
        return
    text = args.write.read_text("utf-8")
    for task, table in tables.items():
        text = refresh_block(text, task, table)
    with atomic_path(args.write) as path:
        path.write_text(text, "utf-8")


def examine(prepared: Prepared, preset: str) -> dict[str, Any]:
    """Facts of prepared data as plain values: manifest, label counts, lengths; no path and no host."""
    m = prepared.manifest
    names = ("task", "version", "dataset", "substitute", "source", "revision", "licence", "floors", "report")
    facts = {"schema": SCHEMA, "preset": preset} | {name: m[name] for name in names}
    facts["recipe"] = {k: v for k, v in m["request"].items() if k in ("seq_len", "seed", "options")}
    facts["duplicates_removed"] = m["duplicates_removed"]
    _, _, facts["duplicates_within"] = disjoint(prepared.splits, registry.load_task(m["task"]).META.towers)
    facts["splits"] = {}
    for name, split in prepared.splits.items():
        lengths, sha256 = np.diff(split.offsets), m["splits"][name]["sha256"]
        tokens = {"shortest": int(lengths.min()), "median": float(np.median(lengths))}
        tokens |= {"mean": round(float(lengths.mean()), 1), "longest": int(lengths.max())}
        counts = {"n": len(split.labels), "labels": np.bincount(split.labels).tolist()}
        facts["splits"][name] = counts | {"sha256": sha256, "tokens": tokens}
    return facts


def read_facts(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Facts by task and preset, presets in the usual order. Raises UsageError for a file that holds none."""
    files = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            facts = json.loads(path.read_text("utf-8"))
            if facts["schema"] != SCHEMA:
                raise ValueError(f"schema {facts['schema']!r}")
            preset = facts["preset"]
            files.append((facts["task"], [*PRESETS, preset].index(preset), preset, facts))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no facts of `inspect` ({error}): write it again") from None
    if not files:
        raise UsageError(f"no facts in {folder}: run `python -m lra inspect TASK --out {folder}` first")
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for task, _, preset, facts in sorted(files, key=lambda file: file[:3]):
        tasks.setdefault(task, {})[preset] = facts
    return tasks


def describe(facts: dict[str, Any]) -> str:
    """Facts for a terminal."""
    lines = [
        f"{facts['task']}, {facts['preset']}: {facts['dataset']} ({facts['source']}, {facts['revision']})",
        f"licence: {facts['licence']}\n",
        f"split  examples  tokens: {' / '.join(TOKENS)}; share of each label, %",
    ]
    for name in SPLITS:
        split = facts["splits"][name]
        shares = "  ".join(f"{label}: {100 * n / split['n']:.1f}" for label, n in enumerate(split["labels"]))
        lines.append(f"{name:<5} {split['n']:>9,}  {_tokens(split)}; {shares}")
    return "\n".join([*lines, "", *(f"{name}: {value}" for name, value in _checks(facts).items())])


def card(presets: list[dict[str, Any]], folder: Path) -> str:
    """One table as Markdown, a column for each preset, and links to the figures in `folder`."""
    columns, links = [], []
    for facts in presets:
        splits, test = facts["splits"], facts["splits"]["test"]
        shares = (f"{100 * pick(test['labels']) / test['n']:.1f}" for pick in (min, max))
        column = {"data set": facts["dataset"], "revision": facts["revision"]}
        column["train / val / test"] = " / ".join(f"{splits[name]['n']:,}" for name in SPLITS)
        column[f"training tokens: {' / '.join(TOKENS)}"] = _tokens(splits["train"])
        columns.append(column | {"labels of test, %": "–".join(shares)} | _checks(facts))
        for end, what in (("lengths.svg", "lengths"), ("sheet.png", "examples")):
            name = f"{facts['task']}-{facts['preset']}-{end}"
            if (folder / name).is_file():
                links.append(f"[{what}, {facts['preset']}]({FROM_CARDS}/{name})")
    names = dict.fromkeys(name for column in columns for name in column)
    rows = tuple((name, *(column.get(name, "") for column in columns)) for name in names)
    table = markdown([Grid(("", *(facts["preset"] for facts in presets)), rows)])
    return table + (f"\nFigures: {', '.join(links)}.\n" if links else "")


def _tokens(split: dict[str, Any]) -> str:
    return " / ".join(f"{split['tokens'][which]:,.6g}" for which in TOKENS)


def _checks(facts: dict[str, Any]) -> dict[str, str]:
    """Duplicates, floors and what the task reports of its own data."""
    removed = ", ".join(f"{n:,} from {name}" for name, n in facts["duplicates_removed"].items())
    within = ", ".join(f"{n:,} in {name}" for name, n in facts["duplicates_within"].items())
    rows = {"duplicates across splits removed": removed or "none", "duplicates within a split, kept": within or "none"}
    rows |= {f"floor: {name}, % of test": f"{100 * value:.1f}" for name, value in facts["floors"].items()}
    return rows | {k: f"{v:.4g}" if isinstance(v, float) else str(v) for k, v in facts["report"].items()}


def examples(task: ModuleType, split: Split) -> list[str]:
    """Lines that show the first examples: text as text, symbols as symbols, pictures side by side."""
    count, towers = min(EXAMPLES, len(split.labels)), task.META.towers
    if task.META.reads == "pixels":
        return _pictures_as_text(pictures(split, count), split.labels)
    lines = []
    for i, t in itertools.product(range(count), range(towers)):
        tokens = split.sequence(towers * i + t)
        text, which = _spell(task, tokens), f", text {t + 1}" if towers > 1 else ""
        more = f" ... ({len(text) - CHARACTERS:,} characters more)" if len(text) > CHARACTERS else ""
        lines.append(f"{i}: label {split.labels[i]}, {len(tokens)} tokens{which}: {text[:CHARACTERS]}{more}")
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
    small, wide = (16, 1) if side >= 16 else (side, 2)
    block = side // small
    coarse = images[:, : small * block, : small * block].reshape(n, small, block, small, block).max((2, 4))
    lines = ["  ".join(f"{i}: label {label}".ljust(wide * small) for i, label in enumerate(labels[:n]))]
    for row in coarse.swapaxes(0, 1).tolist():
        lines.append("  ".join("".join(wide * GREYS[-(-grey * 9 // 255)] for grey in part) for part in row))
    return lines


def contact_sheet(split: Split, path: Path) -> Path:
    """Write a PNG of the first pictures, enlarged without smoothing, each above its label."""
    from PIL import Image, ImageDraw, ImageFont

    columns, most = SHEET
    images = pictures(split, min(columns * most, len(split.labels)))
    side, gap, line = max(1, 96 // images.shape[1]) * images.shape[1], 8, 16
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
    lengths = {name: np.diff(prepared.splits[name].offsets) for name in SPLITS}
    bins = np.linspace(0, max(int(each.max()) for each in lengths.values()) + 1, 51)
    with style.drawing():
        figure, axes = style.subplots(height=2.6)
        for (name, each), colour in zip(lengths.items(), style.PALETTE):
            share = np.histogram(each, bins)[0] / len(each)
            axes.stairs(100 * share, bins, color=colour, label=f"{name} ({len(each):,})")
        axes.set(xlabel="tokens of a sequence", ylabel="% of the split", title=f"{m['task']}: {m['dataset']}")
        axes.legend()
        return style.save(figure, path)
