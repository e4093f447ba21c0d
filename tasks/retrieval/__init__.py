"""Retrieval: are two documents related? Each is read byte by byte by the same encoder.

ACL Anthology Network (Radev et al. 2013), as in Long Range Arena (Tay et al. 2021, arXiv:2011.04006, section 2.2.3):
does one paper cite the other? Both texts are bytes as given, id = byte + 1, cut on the right to seq_len; the head sees
the two pooled vectors only. LRA's files are `new_aan_pairs.{train,eval,test}.tsv`: no header, tab separated, nothing
quoted, `label id1 id2 text1 text2`, the label sometimes printed as 1.0. A paper may stand in pairs of two splits, as
published; the report counts how many do.

The embedded substitute asks whether one Python file of the installed packages imports another: see
tasks/retrieval/imports.py, also for why neither text tells the label.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.base import SPLITS, Built, Data, Meta, Optim, Recipe, SourceError, Split, Stack
from tasks.retrieval import imports
from tasks.store.archives import LRA_RELEASE
from tasks.store.files import ENDINGS, label_of, lines, sha256_file
from tasks.store.sources import check_source, find_one, hub_file, seeded_order, taken

META = Meta(
    name="retrieval",
    version=1,
    classes=2,
    vocab=257,
    towers=2,
    reads="bytes",
    description="two documents as bytes: related (citation; import) or not",
    datasets={
        "embedded": r"Python imports \(substitute for AAN(; [\w.-]+ [\w.+-]+)*\)",
        **dict.fromkeys(("hub", "local"), r"AAN( \(local pairs\))?"),
    },
)

ALL = ",".join(imports.PACKAGES)
RECIPES = {
    "smoke": Recipe(
        data=Data(seq_len=256, train=600, val=100, test=200, options={"packages": "pandas,scikit-learn"}),
        train=Optim(steps=30, batch=8, warmup=10, eval_every=15),
        budget=32,
    ),
    "small": Recipe(
        data=Data(seq_len=128, train=0, val=0, test=0, options={"packages": ALL}),
        encoder=Stack(dropout=0.0),
        train=Optim(steps=500, batch=32, lr=2e-3, warmup=100, eval_every=125),
        budget=64,
    ),
    "paper": Recipe(
        data=Data(seq_len=4000, train=0, val=0, test=0, source="hub", options={"packages": ALL}),
        train=Optim(steps=30_000, batch=32, lr=1e-4, warmup=800, weight_decay=0.0, eval_every=1000),
        budget=256,
    ),
}
# Encoder and steps of the original paper (arXiv 2011.04006).
RECIPES["paper-large"] = replace(
    RECIPES["paper"],
    encoder=Stack(layers=4, width=128, heads=4, ffn=512),
    train=replace(RECIPES["paper"].train, steps=5000),
)

SIZES = {"train": 147_086, "val": 18_090, "test": 17_437}  # of LRA's files
FILES = {"train": "train", "val": "eval", "test": "test"}  # LRA's names of the splits
FOLDERS = ("", "retrieval_aan/", "tsv_data/")
ARCHIVES = LRA_RELEASE
HUB_REPO, HUB_REVISION = "OpenNLPLab/lra", "6cb133c44f406da743661488df9e977b87d98775"
FITTED = 10_000  # pairs that floors are fitted on, and baselines of the report measured on

Pairs = tuple[list[bytes], np.ndarray]  # texts, the two of a pair adjacent, and labels


def members(data: Data) -> tuple[str, ...]:
    """The raw files in an archive of the LRA release."""
    return tuple(f"new_aan_pairs.{name}.tsv{end}" for name in FILES.values() for end in ENDINGS)


def build(recipe: Recipe, *, source: str, data_dir: Path | None, workers: int, scratch=None) -> Built:
    """Pairs of byte sequences of at most `recipe.data.seq_len` tokens, from `source`: embedded, hub or local.

    SourceError if a file or package is missing or malformed.
    """
    check_source(source, data_dir)
    embedded, files, report = source == "embedded", {}, {}
    read = _embedded(recipe.data, files, report) if embedded else _aan(recipe.data, data_dir, files, report)
    pairs, dataset, revision = read
    splits = {name: Split.of_bytes(*pairs.pop(name)) for name in SPLITS}
    train, test = splits["train"], splits["test"]
    share_cut = float(np.mean(np.diff(train.offsets) == recipe.data.seq_len))
    return Built(
        splits=splits,
        dataset=dataset,
        substitute=embedded,
        source=source,
        revision=revision,
        licence="BSD licences of the packages" if embedded else "ACL Anthology; research use",
        files=files,
        floors={"byte overlap": byte_overlap(train, test)},
        report=report | {"share of train documents cut to seq_len": share_cut} | _baselines(train, test),
    )


def byte_overlap(train: Split, test: Split) -> float:
    """Test accuracy of a threshold, fitted on train, on the overlap of the two byte histograms."""

    def overlaps(split: Split, n: int) -> np.ndarray:  # of the first n pairs, in [0, 1]
        texts = (split.sequence(i) for i in range(2 * n))
        frequencies = (np.bincount(text, minlength=META.vocab) / len(text) for text in texts)
        return np.array([np.minimum(one, other).sum() for one, other in zip(frequencies, frequencies)])

    return _threshold(overlaps(train, min(FITTED, len(train.labels))), train, overlaps(test, len(test.labels)), test)


def _threshold(train_scores: np.ndarray, train: Split, test_scores: np.ndarray, test: Split) -> float:
    """Test accuracy of `score > t`, with the t of the highest train accuracy."""
    order = np.argsort(train_scores)
    ranked, labels = train_scores[order], train.labels[: len(order)][order].astype(np.int64)
    # with t = ranked[k], the examples up to k are answered 0: right where the label is 0
    right = np.cumsum(1 - labels) + labels.sum() - np.cumsum(labels)
    last_of_ties = np.append(ranked[1:] != ranked[:-1], True)
    t = ranked[np.argmax(np.where(last_of_ties, right, -1))]
    return float(np.mean((test_scores > t) == test.labels[: len(test_scores)]))


def _baselines(train: Split, test: Split) -> dict[str, float]:
    """TF-IDF of words on test: both documents' cosine, and the better of the two documents alone (chance)."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    def towers(split: Split) -> list[list[str]]:
        ids = (split.sequence(i) - 1 for i in range(2 * min(FITTED, len(split.labels))))
        texts = [i.astype(np.uint8).tobytes().decode("latin-1") for i in ids]
        return [texts[0::2], texts[1::2]]

    fit, held_out = towers(train), towers(test)
    vectorizer = TfidfVectorizer(token_pattern=r"[A-Za-z]+", sublinear_tf=True, dtype=np.float32)
    try:
        vectorizer.fit(fit[0] + fit[1])
    except ValueError:  # texts without a single word
        return {}
    x, y = [[vectorizer.transform(texts) for texts in half] for half in (fit, held_out)]
    cosines = [np.asarray(a.multiply(b).sum(1)).ravel() for a, b in (x, y)]
    result = {"tfidf_cosine": _threshold(cosines[0], train, cosines[1], test)}
    labels, answers = train.labels[: len(fit[0])], test.labels[: len(held_out[0])]
    if len(np.unique(labels)) == 2:
        alone = [LogisticRegression().fit(x[k], labels).score(y[k], answers) for k in (0, 1)]
        result["one document"] = float(max(alone))
    return result


def _embedded(data: Data, files: dict, report: dict) -> tuple[dict[str, Pairs], str, str]:
    """Pairs of Python files, with dataset name and revision; other package versions get another name."""
    corpus = imports.read(str(data.options.get("packages", ALL)).split(","))
    files |= corpus.files
    squares = imports.squares(corpus, data.seed)
    result, same_package = {}, []
    for name in SPLITS:
        size = taken(data, name, 4 * len(squares[name]), "the corpus")
        whole = squares[name][: -(-size // 4)]  # whole squares, so that files stay balanced
        pairs = [pair for square in whole for pair in square][:size]
        names, labels = [f"{a} {b}".encode() for a, b, _ in pairs], np.array([p[2] for p in pairs])
        pairs = [pairs[i] for i in seeded_order(names, labels, data.seed)]
        texts = [corpus.texts[module][: data.seq_len] for a, b, _ in pairs for module in (a, b)]
        result[name] = texts, np.array([label for *_, label in pairs], np.uint8)
        report[f"{name} files"] = len({module for a, b, _ in pairs for module in (a, b)})
        same_package = [(a.split(".")[0] == b.split(".")[0]) == label for a, b, label in pairs]
    report["same package (an oracle, names are not in the text)"] = float(np.mean(same_package))
    other = [f"{k} {v}" for k, v in corpus.versions.items() if v != imports.PACKAGES[k][1]]
    dataset = f"Python imports (substitute for AAN{''.join(f'; {o}' for o in other)})"
    return result, dataset, ", ".join(f"{k} {v}" for k, v in corpus.versions.items())


def _aan(data: Data, data_dir: Path | None, files: dict, report: dict) -> tuple[dict[str, Pairs], str, str]:
    """Pairs of LRA's files, from data_dir or else from the hub, with dataset name and revision."""
    result, documents, whole, empty = {}, {}, True, 0
    for name in SPLITS:
        file = f"new_aan_pairs.{FILES[name]}.tsv"
        if data_dir is None:
            path = hub_file(HUB_REPO, f"data/aan/{file}", revision=HUB_REVISION)
        else:
            path = find_one(data_dir, [f + file + end for f in FOLDERS for end in ENDINGS], f"the AAN {name} file")
        files[path.name] = sha256_file(path)
        rows = list(_rows(path, data.seq_len))
        labels = np.array([row[0] for row in rows], np.uint8)
        whole &= len(rows) == SIZES[name]
        order = seeded_order([row[1] for row in rows], labels, data.seed)[: taken(data, name, len(rows), path)]
        texts = [text for i in order for text in rows[i][2:]]
        documents[name] = {document for i in order for document in rows[i][1].split(b" ")}
        empty += sum(not text for text in texts)
        result[name] = [text or b" " for text in texts], labels[order]  # a sequence has at least one token
    report["empty texts"] = empty
    known = documents["test"] & (documents["train"] | documents["val"])
    report["share of test documents that train or val has, too"] = len(known) / len(documents["test"])
    revision = HUB_REVISION if data_dir is None else "as found in --data-dir"
    return result, "AAN" if whole else "AAN (local pairs)", revision


def _rows(path: Path, seq_len: int) -> Iterator[tuple[int, bytes, bytes, bytes]]:
    """(label, ids, text1, text2) of each line; texts are bytes, never decoded, cut to seq_len."""
    for number, line in lines(path):
        cells = line.split(b"\t")
        if len(cells) != 5:
            wrong = f"{len(cells)} columns, expected 5 (label id1 id2 text1 text2)"
            raise SourceError(f"{path}: line {number}: {wrong}, tab separated; fetch it again")
        label = label_of(cells[0], META.classes, f"{path}: line {number}")
        yield label, b" ".join(cells[1:3]), cells[3][:seq_len], cells[4][:seq_len]
