"""Retrieval: LRA's files read as they are, and Python pairs in which nothing gives the label away."""

import gzip
import lzma
import re
from collections import Counter
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from tasks import retrieval
from tasks.base import SPLITS, SourceError
from tasks.retrieval import META, RECIPES, byte_overlap, imports

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
IMPORT = re.compile(r"^[^\w\n]*(from\s+\S+\s+import\b|import\s+\w)", re.MULTILINE)


def recipe(preset="small", **data):
    whole = RECIPES[preset]
    return replace(whole, data=replace(whole.data, **data))


def build(folder=None, preset="small", source=None, **data):
    source = source or ("embedded" if folder is None else "local")
    return retrieval.build(recipe(preset, **data), source=source, data_dir=folder, workers=1)


def text_of(split, i):
    return (split.sequence(i) - 1).astype(np.uint8).tobytes()


def row(label, a, b, text1=b"left words", text2=b"right words"):
    return b"\t".join([label, a, b, text1, text2]) + b"\n"


def write_aan(folder, rows=None, *, ending="", opener=open):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "eval", "test"):
        lines = rows or [row(b"%d" % (k % 2), b"%d" % k, b"x", b"left %d" % k) for k in range(7)]
        with opener(folder / f"new_aan_pairs.{name}.tsv{ending}", "wb") as file:
            file.write(b"".join(lines))


# LRA's files


@pytest.mark.parametrize("below", ["", "retrieval_aan", "tsv_data"])
@pytest.mark.parametrize(("ending", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_lra_files_are_found_in_each_layout_and_compression(tmp_path, below, ending, opener):
    write_aan(tmp_path / below, ending=ending, opener=opener)
    built = build(tmp_path, seq_len=11)
    assert built.dataset == "AAN (local pairs)" and not built.substitute
    assert sorted(built.files) == [f"new_aan_pairs.{name}.tsv{ending}" for name in ("eval", "test", "train")]
    for split in built.splits.values():
        assert len(split.offsets) == META.towers * len(split.labels) + 1
        for k, label in enumerate(split.labels):
            left, right = text_of(split, 2 * k), text_of(split, 2 * k + 1)
            assert int(left.removeprefix(b"left ")) % 2 == label and right == b"right words"


def test_papers_of_test_that_train_or_val_has_too_are_counted(tmp_path):
    write_aan(tmp_path, [row(b"1", b"a", b"b"), row(b"0", b"c", b"d")])
    path = tmp_path / "new_aan_pairs.test.tsv"
    assert build(tmp_path).report["share of test documents that train or val has, too"] == 1
    path.write_bytes(row(b"1", b"a", b"e") + row(b"0", b"f", b"g"))
    assert build(tmp_path).report["share of test documents that train or val has, too"] == 0.25


def test_labels_print_with_or_without_a_decimal(tmp_path):
    labels = [b"0", b"0.0", b"1", b"1.0", b"1.0"]
    write_aan(tmp_path, [row(label, b"%d" % k, b"x") for k, label in enumerate(labels)])
    assert np.bincount(build(tmp_path).splits["test"].labels).tolist() == [2, 3]


def test_quotes_and_odd_bytes_are_text(tmp_path):
    odd = b'"open quote, \xff not UTF-8, \r inside'
    write_aan(tmp_path, [row(b"1", b"a", b"b", odd), row(b"0", b"c", b"d", odd, b"\x00")])
    split = build(tmp_path, seq_len=60).splits["train"]
    assert [text_of(split, 0), text_of(split, 2)] == [odd, odd]
    assert sorted(text_of(split, i) for i in (1, 3)) == [b"\x00", b"right words"]
    assert split.tokens.min() == 1 and split.tokens.max() == 256


def test_texts_are_cut_on_the_right_and_never_empty(tmp_path):
    write_aan(tmp_path, [row(b"1", b"a", b"b", b"abcdef", b""), row(b"0", b"c", b"d", b"abcdef", b"")])
    built = build(tmp_path, seq_len=3)
    assert [text_of(built.splits["val"], i) for i in range(4)] == [b"abc", b" "] * 2
    assert built.report["empty texts"] == 6


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"1\ta\tb\tonly four\n", "line 3: 4 columns, expected 5"),
        (b"1\ta\tb\tone\ttwo\tthree\n", "line 3: 6 columns, expected 5"),
        (b"\n" + row(b"1", b"a", b"b"), "line 3: 1 columns"),
        (row(b"2", b"a", b"b"), "line 3: label is '2', expected 0 to 1"),
        (row(b"label", b"id1", b"id2"), "line 3: label is 'label'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, bad, says):
    write_aan(tmp_path, [row(b"1", b"a", b"b"), row(b"0", b"a", b"c"), bad])
    with pytest.raises(SourceError, match=re.escape(says)) as caught:
        build(tmp_path)
    assert "new_aan_pairs.train.tsv" in str(caught.value) and "\n" not in str(caught.value)


def test_a_truncated_archive_is_an_error(tmp_path):
    write_aan(tmp_path, ending=".gz", opener=gzip.open)
    path = tmp_path / "new_aan_pairs.test.tsv.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SourceError, match="test.tsv.gz: cannot be read"):
        build(tmp_path)


def test_missing_files_are_named_and_sizes_checked(tmp_path):
    with pytest.raises(SourceError, match="looked for new_aan_pairs.train.tsv"):
        build(tmp_path)
    with pytest.raises(SourceError, match="local"):
        build(source="local")
    write_aan(tmp_path)
    with pytest.raises(SourceError, match="data.val=8: .* has 7 examples"):
        build(tmp_path, val=8)
    assert [len(s.labels) for s in build(tmp_path, train=4, val=2, test=7).splits.values()] == [4, 2, 7]


def test_the_hub_is_asked_for_lra_files_at_a_pinned_revision(tmp_path, monkeypatch):
    write_aan(tmp_path)
    asked = []

    def fetch(repo, filename, *, revision):
        asked.append((repo, filename, revision))
        return tmp_path / Path(filename).name

    monkeypatch.setattr(retrieval, "hub_file", fetch)
    monkeypatch.setattr(retrieval, "SIZES", dict.fromkeys(SPLITS, 7))
    built = build(source="hub")
    assert built.dataset == "AAN" and re.fullmatch("[0-9a-f]{40}", built.revision)
    files = [f"data/aan/new_aan_pairs.{name}.tsv" for name in ("train", "eval", "test")]
    assert asked == [("OpenNLPLab/lra", file, built.revision) for file in files]


@pytest.mark.skipif(not (SHARED / "retrieval_aan").is_dir(), reason="no shared/data/retrieval_aan")
def test_real_aan_pairs():
    built = build(SHARED, seq_len=200)
    sizes = {name: np.bincount(split.labels).tolist() for name, split in built.splits.items()}
    assert sizes == {"train": [1838, 1838], "val": [215, 215], "test": [332, 332]}
    assert built.dataset == "AAN (local pairs)"
    assert abs(built.report["one document"] - 0.5) < 3 * 0.5 / 664**0.5
    assert built.report["tfidf_cosine"] > 0.6


def test_byte_overlap_finds_the_best_threshold(tmp_path):
    related = [row(b"1", b"%d" % k, b"x", b"abc" + b"a" * k, b"abcc") for k in range(5)]
    unrelated = [row(b"0", b"%d" % k, b"y", b"xyz", b"abc" + b"b" * k) for k in range(5)]
    write_aan(tmp_path, related + unrelated)
    splits = build(tmp_path).splits
    assert byte_overlap(splits["train"], splits["test"]) == 1.0


# Python files


@pytest.fixture(scope="module")
def corpus():
    return imports.read(["pandas", "scikit-learn"])


@pytest.fixture(scope="module")
def pairs(corpus):
    found = imports.squares(corpus, seed=0)
    return {split: [pair for square in found[split] for pair in square] for split in SPLITS}


def test_no_import_and_no_name_of_a_partner_survives(corpus, pairs):
    texts = {module: text.decode() for module, text in corpus.texts.items()}
    words = {module: set(re.findall(r"\w+", text)) for module, text in texts.items()}
    for a, b, _ in [pair for split in pairs.values() for pair in split]:
        assert not words[a] & set(b.split(".")) and not words[b] & set(a.split("."))
    assert not [module for module, text in texts.items() if IMPORT.search(text)]
    assert all(len(text) >= imports.MIN_BYTES for text in corpus.texts.values())


def test_every_file_is_as_often_in_positive_as_in_negative_pairs_in_each_position(pairs):
    for split, listed in pairs.items():
        assert len(set(listed)) == len(listed) > 0
        for position in (0, 1):
            count = [Counter(pair[position] for pair in listed if pair[2] == label) for label in (0, 1)]
            assert count[0] == count[1], split
            assert max(count[1].values()) <= imports.MAX_PAIRS


def test_no_file_is_in_two_splits_and_no_beginning_occurs_twice(corpus, pairs):
    files = {split: {m for a, b, _ in listed for m in (a, b)} for split, listed in pairs.items()}
    assert sum(map(len, files.values())) == len(set.union(*files.values()))
    beginnings = [text[: imports.PREFIX] for text in corpus.texts.values()]
    assert len(set(beginnings)) == len(beginnings)


def test_labels_agree_with_the_import_statements_of_the_files(corpus, pairs):
    listed = [pair for split in pairs.values() for pair in split]
    assert Counter(label for *_, label in listed)[1] * 2 == len(listed)
    for a, b, label in listed:
        assert (b in corpus.imports[a]) == label and (label or a not in corpus.imports[b])
    assert "sklearn.base" in corpus.imports["sklearn.pipeline"]  # from .base import _fit_context, ...
    assert "sklearn.utils.validation" in corpus.imports["sklearn.svm._base"]  # from ..utils.validation ...


def package(tmp_path, monkeypatch, files, version="1.0"):
    """Install a package "made" from {relative path: source}, known to the corpus at version 1.0."""
    for name, source in files.items():
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.encode())
    info = tmp_path / f"made-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: made\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(imports, "PACKAGES", {"made": ("made", "1.0")})


BODY = "\n".join(f"value_{k} = {k}" for k in range(99))
LEAKY = f'''# Copyright
# Licence

"""About alpha_file, made.inner.beta.

>>> from made.inner.beta import thing
"""
from __future__ import annotations
import os, made.outside
if True:
    from .inner import (
        beta,
        helper as h,
    )
    try: from made import alpha_file
    except ImportError: pass
def use():
    from .inner.gamma import Gamma  # noqa
    return Gamma(beta.thing, "made.alpha_file")  # see inner/beta.py; alphabet stays
{BODY}
'''


def test_imports_of_every_form_are_found_and_removed(tmp_path, monkeypatch):
    names = ("alpha_file.py", "inner/beta.py", "inner/gamma.py", "outside.py")
    files = {name: f"number = {k}\n{BODY}" for k, name in enumerate(names)}
    package(tmp_path, monkeypatch, {**files, "leaky.py": LEAKY, "inner/__init__.py": "from . import beta"})
    made = imports.read(["made"])
    found = {"made.outside", "made.inner.beta", "made.alpha_file", "made.inner.gamma"}
    assert made.imports["made.leaky"] == found
    text = made.texts["made.leaky"].decode()
    assert text.startswith('"""About , ...\n"""\nif True:\n')
    assert 'return Gamma(.thing, ".") # see /.py; alphabet stays\n' in text
    assert not re.search(r"\b(import|made|inner|beta|gamma|alpha_file|helper|Copyright)\b", text)


def test_windows_line_ends_change_nothing(tmp_path, monkeypatch):
    read = []
    for end in ("\n", "\r\n"):
        files = {"leaky.py": LEAKY, "beta.py": BODY}
        package(tmp_path, monkeypatch, {name: text.replace("\n", end) for name, text in files.items()})
        read.append(imports.read(["made"]))
    assert read[0] == read[1]


def test_another_version_of_a_package_is_another_data_set(tmp_path, monkeypatch):
    # files 1, 3, 5, ... each import one of the files 0, 2, 4, ...
    uses = {k: f"from . import m{k - 1}\n" * (k % 2) for k in range(400)}
    files = {f"m{k}.py": f"{use}number = {k}\n{BODY}" for k, use in uses.items()}
    package(tmp_path, monkeypatch, files, version="2.0+cpu")
    built = build(options={"packages": "made"})
    assert built.dataset == "Python imports (substitute for AAN; made 2.0)" and built.revision == "made 2.0"
    assert list(built.files) == ["made==2.0"]


def test_packages_that_cannot_serve_are_named(tmp_path, monkeypatch):
    with pytest.raises(SourceError, match="packages: 'nothing' is not one of torch, "):
        build(options={"packages": "nothing"})
    monkeypatch.setitem(imports.PACKAGES, "surely-not-there", ("x", "1.0"))
    with pytest.raises(SourceError, match="not installed; run: pip install surely-not-there==1.0"):
        build(options={"packages": "surely-not-there"})
    package(tmp_path, monkeypatch, {"broken.py": "def ("})
    with pytest.raises(SourceError, match="made.broken is not valid Python"):
        build(options={"packages": "made"})


def test_the_pinned_versions_are_the_installed_ones():
    for distribution, (_, pinned) in imports.PACKAGES.items():
        assert metadata.version(distribution).partition("+")[0] == pinned


def test_build_is_the_same_for_the_same_seed_alone(corpus, monkeypatch):
    monkeypatch.setattr(imports, "read", lambda names: corpus)
    first, again, other = (build(preset="smoke", train=0, val=20, test=0, seed=seed) for seed in (0, 0, 1))
    for name in SPLITS:
        for part in ("tokens", "offsets", "labels"):
            assert np.array_equal(getattr(first.splits[name], part), getattr(again.splits[name], part))
    assert not np.array_equal(first.splits["test"].tokens, other.splits["test"].tokens)
    with pytest.raises(SourceError, match=r"data.train=99999: the corpus has [\d,]+ examples"):
        build(preset="smoke", train=99_999)


def test_smoke_build_is_balanced_and_one_document_says_nothing(corpus, monkeypatch):
    monkeypatch.setattr(imports, "read", lambda names: corpus if names == ["pandas", "scikit-learn"] else None)
    built = build(preset="smoke")
    assert built.substitute and built.dataset == "Python imports (substitute for AAN)"
    sizes = {name: np.bincount(split.labels).tolist() for name, split in built.splits.items()}
    assert sizes == {"train": [300, 300], "val": [50, 50], "test": [100, 100]}
    for split in built.splits.values():
        assert split.tokens.min() >= 1 and np.diff(split.offsets).max() == 256
    assert abs(built.report["one document"] - 0.5) <= 3 * 0.5 / 200**0.5
