"""Pathfinder: are two discs joined by one dashed curve, among others that cross and distract?

Linsley et al. 2018 (arXiv 1805.08315), as in Long Range Arena (arXiv 2011.04006): 32 x 32 pixels, curves of
14 dashes. `generate` draws such images with the published parameters and the statistics of the published
program; `Task` reads a folder of the LRA release where there is one. Grey level g is token g + 1.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import SPLITS, Built, Data, Encoder, Meta, Optim, Recipe, SourceError, Split, majority
from tasks.pathfinder import files
from tasks.pathfinder.discs import disc_places
from tasks.pathfinder.files import FOLDERS, find, read
from tasks.pathfinder.paddles import GEOMETRIES, tables_of
from tasks.pathfinder.snakes import draw
from tasks.store.archives import LRA_RELEASE
from tasks.store.parts import kept
from tasks.store.threads import in_chunks

META = Meta(name="pathfinder", version=1, classes=2, vocab=257, towers=1, reads="pixels",
            generated=True, resumable=True,
            description="two discs, one dashed curve or two, from grey pixels in raster order")  # fmt: skip

RECIPES = {
    "smoke": Recipe(
        data=Data(seq_len=256, train=1000, val=200, test=300,
                  options=dict(size=32, contour_length=6, downsample=2)),
        train=Optim(steps=40, batch=16, warmup=10, eval_every=20), encoder=Encoder(), budget=32),
    "small": Recipe(  # the published images need far more training than a CPU gives: see LOG.md
        data=Data(seq_len=64, train=60_000, val=2000, test=4000,
                  options=dict(size=32, contour_length=3, downsample=4, levels=4, matched=1)),
        train=Optim(steps=1200, batch=128, lr=2e-3, warmup=100, weight_decay=0.0, eval_every=200),
        encoder=Encoder(dropout=0.0), budget=32),
    "paper": Recipe(
        data=Data(seq_len=1024, train=160_000, val=20_000, test=20_000,
                  options=dict(size=32, contour_length=14, downsample=1)),
        train=Optim(steps=62_400, batch=256, lr=1e-4, warmup=312, weight_decay=0.0, eval_every=1000),
        encoder=Encoder(), budget=256),
    "path-x": Recipe(  # preparing it takes half an hour on a core and 10 GB of memory
        data=Data(seq_len=16_384, train=160_000, val=20_000, test=20_000,
                  options=dict(size=128, contour_length=14, downsample=1)),
        train=Optim(steps=62_400, batch=256, accumulate=16, lr=1e-4, warmup=312, weight_decay=0.0,
                    eval_every=1000),
        encoder=Encoder(), budget=256),
}  # fmt: skip
# The encoder of the original paper (arXiv 2011.04006).
RECIPES["paper-large"] = replace(RECIPES["paper"], encoder=Encoder(layers=4, width=128, heads=8, ffn=128))

LENGTHS = (3, *FOLDERS)  # dashes per curve; 3 is this suite's own: easier, and without distractors
NAMES = {(32, 14, 1, 256, 0): "Pathfinder", (128, 14, 1, 256, 0): "Path-X"}  # by _options: as published


def _check(size: int, contour_length: int) -> None:
    if size not in GEOMETRIES:
        raise ValueError(f"size {size!r} is not one of {', '.join(map(str, GEOMETRIES))} pixels")
    if contour_length not in LENGTHS:
        raise ValueError(f"contour_length {contour_length!r} is not one of {', '.join(map(str, LENGTHS))}")


def scenes(
    seed: int, start: int, count: int, size: int, contour_length: int, matched: bool = False
) -> tuple[np.ndarray, ...]:
    """Images start .. start + count - 1 of a seed: images, labels, paths, discs as in _snakes.draw."""
    images = np.empty((count, size, size), np.uint8)
    labels = np.empty(count, np.uint8)
    paths = np.empty((count, 2, contour_length, 5), np.int64)
    centres = np.empty((count, 2, 2), np.int64)
    distractors = GEOMETRIES[size][0].distractor_paddles // (contour_length // 3) if contour_length > 3 else 0
    draw(seed, start, tables_of(size), distractors, matched, images, labels, paths, centres)
    return images, labels, paths, centres


def generate(
    count: int,
    *,
    seed: int,
    size: int = 32,
    contour_length: int = 14,
    matched: bool = False,
    workers: int = 1,
    scratch: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images: grey levels, uint8 (count, size, size), and labels, uint8 (count,), 1 = joined.

    Image i depends only on (seed, i, size, contour_length). size is 32, 64 or 128 pixels, contour_length
    (dashes per curve) 3, 6, 9 or 14, anything else is a ValueError. `matched` draws discs that are equally far
    apart under both labels, in any orientation: the published images give the label away by where the discs
    are (see _discs.disc_places). `workers` threads; a progress bar on a terminal after two seconds. What is drawn
    is kept in the folder `scratch`, if given, so that an interrupted call goes on where it was stopped.
    """
    _check(size, contour_length)
    images, labels = np.empty((count, size, size), np.uint8), np.empty(count, np.uint8)
    setting = f"v{META.version}-seed{seed}-{size}px-{contour_length}{'-matched' * matched}"

    def fill(start: int, end: int) -> None:
        def make():
            return scenes(seed, start, end - start, size, contour_length, matched)[:2]

        drawn = kept(scratch / setting / f"{start}-{end}.npz", make) if scratch else make()
        images[start:end], labels[start:end] = drawn

    in_chunks(fill, count, workers, "images")
    return images, labels


def _options(data: Data) -> tuple[int, int, int, int, int]:
    """(size, contour_length, downsample, levels, matched), checked."""
    options = dict(size=32, contour_length=14, downsample=1, levels=256, matched=0)
    if unknown := sorted(data.options.keys() - options):
        raise SourceError(f"data.options.{unknown[0]}: Pathfinder has {', '.join(options)}")
    size, contour_length, factor, levels, matched = chosen = (options | data.options).values()
    if not all(isinstance(value, int) for value in chosen):
        raise SourceError(f"data.options {data.options}: use whole numbers for {', '.join(options)}")
    try:
        _check(size, contour_length)
    except ValueError as error:
        raise SourceError(f"data.options: {error}") from None
    if factor not in (1, 2, 4, 8):
        raise SourceError(f"data.options.downsample={factor}: expected 1, 2, 4 or 8")
    if matched not in (0, 1):
        raise SourceError(f"data.options.matched={matched}: expected 0 or 1")
    if not 2 <= levels <= 256:
        raise SourceError(f"data.options.levels={levels}: expected 2 to 256")
    if data.seq_len != (tokens := (size // factor) ** 2):
        raise SourceError(f"data.seq_len={data.seq_len}: {size} px, downsample={factor} make {tokens} tokens")
    return size, contour_length, factor, levels, matched


def reduce(images: np.ndarray, factor: int, levels: int) -> np.ndarray:
    """Smaller, coarser images: uint8 (n, size // factor, size // factor), levels 0..levels - 1.

    A block keeps its brightest pixel, so that thin dashes stay. Grey level g becomes ceil(g (levels - 1) / 255):
    black stays black, and 256 levels change nothing.
    """
    n, size, _ = images.shape
    if factor > 1:
        images = images.reshape(n, size // factor, factor, size // factor, factor).max((2, 4))
    if levels == 256:
        return images
    return (-(-np.arange(256) * (levels - 1) // 255)).astype(np.uint8)[images]


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    tokens = np.add(images.reshape(-1), 1, dtype=np.uint16)  # a black pixel is not padding
    return Split(tokens, np.arange(len(images) + 1, dtype=np.int64) * images[0].size, labels)


def _name(size: int, contour_length: int, factor: int, levels: int, matched: int) -> str:
    if name := NAMES.get((size, contour_length, factor, levels, matched)):
        return name
    parts = [f"contour {contour_length}", f"{size // factor} px"]
    parts += [f"{levels} grey levels"] * (levels < 256) + ["matched discs"] * matched
    return f"Pathfinder ({', '.join(parts)})"


ARCHIVES = LRA_RELEASE


def members(data: Data) -> tuple[str, ...]:
    """The raw files in an archive of the LRA release."""
    size, contour_length, *_ = _options(data)
    return files.members(size, contour_length)


class Task:
    """Pathfinder images, drawn by `generate` or read from a release folder pathfinder<size> in `data_dir`."""

    def build(
        self,
        recipe: Recipe,
        *,
        source: str,
        data_dir: Path | None,
        workers: int,
        scratch: Path | None = None,
    ) -> Built:
        """All three splits; "embedded" is local if `data_dir` holds images of this size, else generated.

        Options: `size`, `contour_length` and `matched` as in `generate`; `downsample` and `levels` as in
        `reduce`.
        """
        data = recipe.data
        size, contour_length, factor, levels, matched = _options(data)
        if source not in ("embedded", "generated", "local"):
            raise SourceError(f"source {source!r}: Pathfinder is on no hub; use --source generated or local")
        folder = None if source == "generated" or matched else find(data_dir, size, contour_length)
        if source == "local" and folder is None:
            raise SourceError(f"--data-dir {data_dir}: no pathfinder{size} there; use --source generated")
        counts = dict(test=data.test, val=data.val, train=data.train)  # more train leaves test as it is
        if min(data.test, data.val, data.train or (0 if folder is None else 1)) < 1:
            raise SourceError(f"Pathfinder sizes {counts}: 1 or more each (train 0: the rest of a folder)")
        if folder is None:
            total, files = sum(counts.values()), {}
            images, labels = generate(
                total,
                seed=data.seed,
                size=size,
                contour_length=contour_length,
                matched=bool(matched),
                workers=workers,
                scratch=scratch,
            )
        else:
            images, labels, files = read(folder, data, size, workers)
        bounds = np.cumsum([data.test, data.val])
        image_of = dict(zip(counts, np.split(images, bounds), strict=True))
        label_of = dict(zip(counts, np.split(labels, bounds), strict=True))
        splits = {split: _split(reduce(image_of[split], factor, levels), label_of[split]) for split in SPLITS}
        return Built(
            splits=splits,
            dataset=_name(size, contour_length, factor, levels, matched),
            substitute=False,
            source="generated" if folder is None else "local",
            revision=f"generator {META.version}" if folder is None else "local files",
            licence="generated, no third-party data" if folder is None else "that of the local files",
            files=files,
            floors={
                "majority": majority(label_of["train"], label_of["test"]),
                "disc places": disc_places(image_of, label_of, factor),
            },
            report={"joined": round(float(labels.mean()), 4)},
        )
