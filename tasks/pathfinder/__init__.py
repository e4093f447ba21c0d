"""Pathfinder: are two discs joined by one dashed curve, among others that cross and distract?

Linsley et al. 2018 (arXiv 1805.08315), as in Long Range Arena (arXiv 2011.04006): 32 x 32 pixels, curves of
14 dashes. `generate` draws such images with the published parameters and the statistics of the published
program; `build` reads a folder of the LRA release where there is one. Grey level g is token g + 1.
"""

import math
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import SMOKE, SPLITS, Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack
from tasks.pathfinder import files
from tasks.pathfinder.paddles import GEOMETRIES, tables_of
from tasks.pathfinder.snakes import draw
from tasks.store.archives import LRA_RELEASE
from tasks.store.files import atomic_path
from tasks.store.sources import in_chunks

META = Meta(
    name="pathfinder",
    version=1,
    classes=2,
    vocab=257,
    reads="pixels",
    generated=True,
    description="two discs, one dashed curve or two, from grey pixels in raster order",
    datasets=dict.fromkeys(("generated", "local"), r"Pathfinder( \(contour \d+, \d+ px[\w, ]*\))?|Path-X"),
)

_OPTIONS = dict(size=32, contour_length=14, downsample=1)
_SMOKE = dict(size=32, contour_length=6, downsample=2)
_SMALL = dict(size=32, contour_length=3, downsample=4, levels=4, matched=1)
_PUBLISHED = Recipe(
    data=Data(seq_len=1024, train=160_000, val=20_000, test=20_000, options=_OPTIONS),
    train=Optim(steps=62_400, batch=256, lr=1e-4, warmup=312, weight_decay=0.0, eval_every=1000),
    budget=256,
)
RECIPES = {
    "smoke": Recipe(data=Data(seq_len=256, train=1000, val=200, test=300, options=_SMOKE), train=SMOKE, budget=32),
    "small": Recipe(  # the published images need far more training than a CPU gives: see LOG.md
        data=Data(seq_len=64, train=60_000, val=2000, test=4000, options=_SMALL),
        train=Optim(steps=1200, batch=128, lr=2e-3, warmup=100, weight_decay=0.0, eval_every=200),
        encoder=Stack(dropout=0.0),
        budget=32,
    ),
    "paper": _PUBLISHED,
    "path-x": replace(  # preparing it takes half an hour on a core and 10 GB of memory
        _PUBLISHED,
        data=replace(_PUBLISHED.data, seq_len=16_384, options=_OPTIONS | dict(size=128)),
        train=replace(_PUBLISHED.train, accumulate=16),
    ),
    # The encoder of the original paper (arXiv 2011.04006).
    "paper-large": replace(_PUBLISHED, encoder=Stack(layers=4, width=128, heads=8, ffn=128)),
}

LENGTHS = (3, *files.FOLDERS)  # dashes per curve; 3 is this suite's own: easier, and without distractors
NAMES = {(32, 14, 1, 256, 0): "Pathfinder", (128, 14, 1, 256, 0): "Path-X"}  # by _options: as published
ARCHIVES = LRA_RELEASE


def members(data: Data) -> tuple[str, ...]:
    """The raw files in an archive of the LRA release."""
    size, contour_length, *_ = _options(data)
    if contour_length not in files.FOLDERS:
        return ()
    folder = f"pathfinder{size}/{files.FOLDERS[contour_length]}"
    return f"{folder}/metadata/*.npy", f"{folder}/imgs/*/*.png"


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch=None) -> Built:
    """All three splits, drawn by `generate` or read from a release folder pathfinder<size> in `data_dir`.

    `source` "embedded" is local if `data_dir` holds images of this size, else generated. Options of the recipe:
    `size`, `contour_length` and `matched` as in `generate`, `downsample` and `levels` as in `reduce`.
    """
    data = recipe.data
    size, contour_length, factor, levels, matched = _options(data)
    if source not in ("embedded", "generated", "local"):
        raise SourceError(f"source {source!r}: Pathfinder is on no hub; use --source generated or local")
    folder = None if source == "generated" or matched else files.find(data_dir, size, contour_length)
    if source == "local" and folder is None:
        raise SourceError(f"--data-dir {data_dir}: no pathfinder{size} there; use --source generated")
    counts = dict(test=data.test, val=data.val, train=data.train)  # more train leaves test as it is
    if min(data.test, data.val, data.train or (0 if folder is None else 1)) < 1:
        raise SourceError(f"Pathfinder sizes {counts}: 1 or more each (train 0: the rest of a folder)")
    if folder is None:
        setting = dict(seed=data.seed, size=size, contour_length=contour_length, matched=bool(matched), scratch=scratch)
        images, labels = generate(sum(counts.values()), workers=workers, **setting)
        hashes = {}
    else:
        images, labels, hashes = files.read(folder, data, size, workers)
    image_of, label_of = (dict(zip(counts, np.split(a, [data.test, data.test + data.val]))) for a in (images, labels))
    splits, tokens = {}, (size // factor) ** 2
    for name in SPLITS:  # a black pixel is not padding
        ids = np.add(reduce(image_of[name], factor, levels).reshape(-1), 1, dtype=np.uint16)
        splits[name] = Split(ids, np.arange(0, len(ids) + 1, tokens), label_of[name])
    notes = [f"contour {contour_length}", f"{size // factor} px"]
    notes += [f"{levels} grey levels"] * (levels < 256) + ["matched discs"] * matched
    name = NAMES.get((size, contour_length, factor, levels, matched), f"Pathfinder ({', '.join(notes)})")
    return Built(
        splits=splits,
        dataset=name,
        source="generated" if folder is None else "local",
        revision=f"generator {META.version}" if folder is None else "local files",
        licence="generated, no third-party data" if folder is None else "that of the local files",
        files=hashes,
        floors={"disc places": disc_places(image_of, label_of, factor)},
        report={"joined": round(float(labels.mean()), 4)},
    )


def generate(
    count: int, *, seed: int, size=32, contour_length=14, matched=False, workers=1, scratch: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images: grey levels, uint8 (count, size, size), and labels, uint8 (count,), 1 = joined.

    size              32, 64 or 128 pixels
    contour_length    dashes per curve: 3, 6, 9 or 14
    matched           discs are equally far apart under both labels, in any orientation: the published images give the
                      label away by where the discs are (see disc_places)
    scratch           a folder in which every piece is kept, so that an interrupted call goes on where it stopped

    Image i depends only on (seed, i, size, contour_length, matched). SourceError for other sizes and lengths.
    """
    _check(size, contour_length)
    images, labels = np.empty((count, size, size), np.uint8), np.empty(count, np.uint8)
    setting = f"v{META.version}-seed{seed}-{size}px-{contour_length}{'-matched' * matched}"

    def fill(start: int, end: int) -> None:
        path = scratch and scratch / setting / f"{start}-{end}.npz"
        try:  # what an earlier process wrote: the checksums of the zip file say whether it is whole
            with open(path or "", "rb") as raw, np.load(raw, allow_pickle=False) as file:
                piece = [file[name] for name in file.files]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
            piece = scenes(seed, start, end - start, size, contour_length, matched)[:2]
            if path:
                with atomic_path(path) as temporary:
                    np.savez(temporary, *piece)
        images[start:end], labels[start:end] = piece

    in_chunks(fill, count, workers, "images")
    return images, labels


def scenes(seed: int, start: int, count: int, size: int, contour_length: int, matched=False) -> tuple[np.ndarray, ...]:
    """Images start .. start + count - 1 of a seed: images, labels, paths, discs as in snakes.draw."""
    images, labels = np.empty((count, size, size), np.uint8), np.empty(count, np.uint8)
    paths, centres = np.empty((count, 2, contour_length, 5), np.int64), np.empty((count, 2, 2), np.int64)
    distractors = GEOMETRIES[size][0].distractor_paddles // (contour_length // 3) if contour_length > 3 else 0
    draw(seed, start, tables_of(size), distractors, matched, images, labels, paths, centres)
    return images, labels, paths, centres


def _check(size: int, contour_length: int) -> None:
    """SourceError for a size or a length that has no parameters."""
    for name, value, known in (("size", size, GEOMETRIES), ("contour_length", contour_length, LENGTHS)):
        if value not in known:
            raise SourceError(f"Pathfinder: {name} {value!r} is not one of {', '.join(map(str, known))}")


def _options(data: Data) -> tuple[int, int, int, int, int]:
    """(size, contour_length, downsample, levels, matched), checked."""
    options = _OPTIONS | dict(levels=256, matched=0)
    if unknown := sorted(data.options.keys() - options):
        raise SourceError(f"data.options.{unknown[0]}: Pathfinder has {', '.join(options)}")
    size, contour_length, factor, levels, matched = chosen = (options | data.options).values()
    if not all(isinstance(value, int) for value in chosen):
        raise SourceError(f"data.options {data.options}: use whole numbers for {', '.join(options)}")
    _check(size, contour_length)
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


def locate_discs(images: np.ndarray) -> np.ndarray:
    """Row and column of the discs as seen in the pixels, the upper one first: int64 (n, 4).

    A disc is taken to be where a whole square is brightest; at 32 px 99% are found to within two pixels.
    """
    n, size, _ = images.shape
    core = math.ceil(1.5 * GEOMETRIES[size][0].marker_radius)
    side = size - core + 1
    solid = np.full((n, side, side), 255, np.uint8)
    for i in range(core):
        for j in range(core):
            np.minimum(solid, images[:, i : i + side, j : j + side], out=solid)
    spots = np.empty((n, 2), np.int64)
    for k in range(2):
        spots[:, k] = solid.reshape(n, -1).argmax(1)
        place = np.stack(np.divmod(spots[:, k], side))[:, :, None]
        near_y, near_x = np.abs(np.arange(side) - place) < core
        solid[near_y[:, :, None] & near_x[:, None, :]] = 0
    return np.stack(np.divmod(np.sort(spots, 1), side), -1).reshape(n, 4)


def disc_places(images: dict[str, np.ndarray], labels: dict[str, np.ndarray], factor: int) -> float:
    """Test accuracy of boosted trees that see where the discs are, to `factor` pixels, and no curve.

    The published images give that much away: the first curve starts in the middle and up to the left, the second at a
    fixed distance from it, so where both ends of one curve lie is not where ends of two do.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    trees = HistGradientBoostingClassifier(early_stopping=False, random_state=0)
    trees.fit(locate_discs(images["train"][:50_000]) // factor, labels["train"][:50_000])
    return float(trees.score(locate_discs(images["test"]) // factor, labels["test"]))
