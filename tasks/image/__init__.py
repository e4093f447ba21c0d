"""Image: CIFAR-10 read pixel by pixel, in grey.

CIFAR-10 (Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images"), as in Long Range Arena (Tay et al.
2021, arXiv:2011.04006, section 2.2.4): grey by Pillow's "L" (299/587/114 per mille), raster order, id = level + 1: a
black pixel is not padding. The option `downsample=f` averages f x f blocks (rounded half up) of the 32 x 32 pixels.

Splits. Local and hub sources have the official train and test halves: validation is held out of the train half, so
`train=0` means all of it but validation. The embedded substitute is scikit-learn's 1,797 handwritten digits (8 x 8,
levels 0..16), spread to 0..255 and enlarged to 32 x 32 by Pillow's bilinear filter; a seeded 500 are the test half.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import SMOKE, Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack
from tasks.image.cifar import HUB_REVISION, MEMBERS, SIDE, read_half
from tasks.store.files import sha256_file
from tasks.store.sources import check_source, choose, seeded_order

META = Meta(
    name="image",
    version=1,
    classes=10,
    vocab=257,
    description="CIFAR-10 as grey pixels in raster order: ten classes",
    reads="pixels",
    datasets={
        "embedded": r"digits( \d+x\d+)? \(substitute for CIFAR-10\)",
        **dict.fromkeys(("hub", "local"), r"CIFAR-10( \d+x\d+)?( \([\w, :]+\))?"),
    },
)

_HALVED = {"downsample": 2}
RECIPES = {
    "smoke": Recipe(data=Data(seq_len=256, train=600, val=150, test=300, options=_HALVED), train=SMOKE, budget=32),
    "small": Recipe(
        data=Data(seq_len=256, train=0, val=200, test=500, options=_HALVED),
        encoder=Stack(dropout=0.0),
        train=Optim(steps=700, batch=32, lr=2e-3, warmup=30, eval_every=70),
        budget=32,
    ),
    "paper": Recipe(
        data=Data(seq_len=1024, train=45_000, val=5000, test=10_000, source="hub", options={"downsample": 1}),
        train=Optim(steps=35_000, batch=256, lr=1e-4, warmup=175, weight_decay=0.0, eval_every=1000),
        budget=256,
    ),
}
# The encoder of the original paper (arXiv 2011.04006).
RECIPES["paper-large"] = replace(RECIPES["paper"], encoder=Stack(layers=3, width=64, heads=4, ffn=128))

OFFICIAL = [50_000, 10_000]  # images in the train and test halves
HELD_OUT = 500  # digits that stand in for a test half
LICENCE = "CIFAR-10, Krizhevsky 2009; research use"
LICENCE_DIGITS = "UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak 1998; CC BY 4.0"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")


def members(data: Data) -> tuple[str, ...]:
    """The raw files in an archive."""
    return MEMBERS


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch=None) -> Built:
    """Grey images of exactly `recipe.data.seq_len` = (32 / downsample)^2 tokens.

    `source` is embedded (digits), hub or local. `workers` threads decode pictures. SourceError if a file is
    missing or malformed.
    """
    check_source(source, data_dir)
    data, files = recipe.data, {}
    factor = _downsample(data)
    if source == "embedded":
        grey, labels = _digits(files)
        name, notes, revision, sizes = "digits", ["substitute for CIFAR-10"], "scikit-learn digits", []
    else:
        halves = [read_half(half, data_dir, files, workers) for half in ("train", "test")]
        grey, labels = (np.concatenate([half[k] for half in halves]) for k in (0, 1))
        sizes = [len(half[1]) for half in halves]
        name, notes = "CIFAR-10", ["JPEG copy"] if any(half[2] for half in halves) else []
        if sizes != OFFICIAL:
            notes.append("partial copy: {:,} train, {:,} test".format(*sizes))
        revision = HUB_REVISION if source == "hub" else "as found in --data-dir"
    if factor > 1:
        name += f" {SIDE // factor}x{SIDE // factor}"
    contents = [image.tobytes() for image in pool(grey, factor)]
    pools = np.split(np.arange(len(contents)), sizes[:1])
    orders = [seeded_order(contents, labels, data.seed, pool) for pool in pools]
    train, test = orders if sizes else (orders[0][HELD_OUT:], orders[0][:HELD_OUT])
    splits = {
        split: Split.of_bytes([contents[i] for i in indices], labels[indices])
        for split, indices in choose(train, test, data).items()
    }
    return Built(
        splits=splits,
        dataset=name + (f" ({', '.join(notes)})" if notes else ""),
        substitute=source == "embedded",
        source=source,
        revision=revision,
        licence=LICENCE_DIGITS if source == "embedded" else LICENCE,
        files=files,
        floors={"mean grey": mean_grey(splits["train"], splits["test"])},
    )


def pool(grey: np.ndarray, factor: int) -> np.ndarray:
    """Mean of factor x factor blocks, rounded half up: uint8 (n, S, S) to (n, S / factor, S / factor)."""
    n, side, _ = grey.shape
    blocks = grey.reshape(n, side // factor, factor, side // factor, factor).sum((2, 4), dtype=np.int64)
    return ((blocks + factor**2 // 2) // factor**2).astype(np.uint8)


def mean_grey(train: Split, test: Split) -> float:
    """Test accuracy from the mean level alone: a class for each of at most 16 intervals, fitted on train.

    (A decision tree on one number; logistic regression gives as much on CIFAR-10 and less on digits.)
    """
    from sklearn.tree import DecisionTreeClassifier

    def means(split: Split) -> np.ndarray:  # sums, rather: all images are equally large
        return np.add.reduceat(split.tokens, split.offsets[:-1], dtype=np.int64)[:, None]

    tree = DecisionTreeClassifier(max_leaf_nodes=16, random_state=0).fit(means(train), train.labels)
    return float(tree.score(means(test), test.labels))


def _downsample(data: Data) -> int:
    """The option `downsample`, checked against seq_len."""
    factor = data.options.get("downsample", 1)
    if unknown := sorted(data.options.keys() - {"downsample"}):
        raise SourceError(f"data.options.{unknown[0]}: image has one option, downsample")
    if not isinstance(factor, int) or factor < 1 or SIDE % factor:
        raise SourceError(f"data.options.downsample={factor}: expected a divisor of {SIDE}")
    if data.seq_len != (tokens := (SIDE // factor) ** 2):
        raise SourceError(f"data.seq_len={data.seq_len}: downsample={factor} makes {tokens} tokens per image")
    return factor


def _digits(files: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as grey levels, uint8 (1797, 32, 32), and labels; the file's hash goes into `files`."""
    import sklearn.datasets
    from PIL import Image

    path = Path(sklearn.datasets.__file__).parent / "data" / "digits.csv.gz"
    files[path.name] = sha256_file(path)
    digits = sklearn.datasets.load_digits()
    levels = np.round(digits.images * 255 / 16).astype(np.uint8)
    enlarged = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in levels]
    return np.stack([np.asarray(image) for image in enlarged]), digits.target.astype(np.uint8)
