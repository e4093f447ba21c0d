"""Image: the same pictures from every layout, black is not padding, nothing in a pickle is ever run."""

import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tasks import image
from tasks.base import SourceError, Split
from tasks.image import META, RECIPES, cifar, mean_grey, pool

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
COUNTS = {"train": 23, "test": 13}


def half_of(name):
    """Random 32 x 32 RGB pictures, one black and one white, and their labels."""
    rng = np.random.default_rng(len(name))
    n = COUNTS[name]
    rgb = rng.integers(0, 256, (n, 32, 32, 3), np.uint8)
    rgb[0], rgb[1] = 0, 255
    return rgb, np.arange(n) % 10


HALVES = {name: half_of(name) for name in COUNTS}


def encoded(rgb, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, kind)
    return buffer.getvalue()


def planes(rgb):
    return rgb.transpose(0, 3, 1, 2).reshape(len(rgb), -1)


def batches(half, rgb, labels):
    """Train goes into two batches, test into one."""
    cut = 11 if half == "train" else len(rgb)
    names = ["data_batch_1", "data_batch_2"] if half == "train" else ["test_batch"]
    for name, part in zip(names, (slice(0, cut), slice(cut, None)), strict=False):
        yield name, planes(rgb[part]), labels[part]


def write_python(folder, half, rgb, labels, protocol=2):
    folder.mkdir(exist_ok=True)
    for name, data, y in batches(half, rgb, labels):
        batch = {b"batch_label": name.encode(), b"labels": y.tolist(), b"data": data}
        batch[b"filenames"] = [b"a.png"] * len(y)
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))


def write_binary(folder, half, rgb, labels):
    folder.mkdir(exist_ok=True)
    for name, data, y in batches(half, rgb, labels):
        np.concatenate([y[:, None].astype(np.uint8), data], 1).tofile(folder / f"{name}.bin")


def write_hub(folder, half, pictures, labels):
    path = folder / "plain_text" / f"{half}-00000-of-00001.parquet"
    path.parent.mkdir(exist_ok=True)
    img = [{"bytes": picture, "path": None} for picture in pictures]
    pyarrow.parquet.write_table(pyarrow.table({"img": img, "label": labels}), path)


def write_folders(folder, half, rgb, labels, names=cifar.CLASSES, ends=(".png", ".PNG")):
    """Endings by turns; beside the pictures stands what is none."""
    for k, (picture, label) in enumerate(zip(rgb, labels, strict=True)):
        path = folder / half / names[label] / f"{k}{ends[k % len(ends)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture))
        (path.parent / f"._{path.name}").write_bytes(b"Finder")
    (folder / half / ".ipynb_checkpoints").mkdir()
    for name in (".DS_Store", "Thumbs.db"):
        (path.parent / name).write_bytes(b"no picture")


def write_one_parquet(folder, kind):
    columns = {"split": [], "label": [], "image_jpeg": []}
    for half, (rgb, labels) in HALVES.items():
        columns["split"] += [half] * len(rgb)
        columns["label"] += labels.tolist()
        columns["image_jpeg"] += [encoded(picture, kind) for picture in rgb]
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "cifar10.parquet")


WRITERS = {
    "python": lambda d, *half: write_python(d / "cifar-10-batches-py", *half),
    "inside python, protocol 4": lambda d, *half: write_python(d, *half, protocol=4),
    "binary": lambda d, *half: write_binary(d / "cifar-10-batches-bin", *half),
    "inside binary": lambda d, *half: write_binary(d, *half),
    "hub": lambda d, half, rgb, labels: write_hub(d, half, [encoded(x) for x in rgb], labels),
    "folders": write_folders,
    "numbered folders": lambda d, *half: write_folders(d, *half, names="0123456789", ends=(".jpg", ".JPEG")),
}


@pytest.fixture(params=WRITERS)
def layout(request, tmp_path):
    for half, (rgb, labels) in HALVES.items():
        WRITERS[request.param](tmp_path, half, rgb, labels)
    return tmp_path


@pytest.fixture
def folder(tmp_path):
    for half, (rgb, labels) in HALVES.items():
        write_binary(tmp_path, half, rgb, labels)
    return tmp_path


def recipe(downsample=1, **data):
    small = RECIPES["small"]
    sizes = {"seq_len": (32 // downsample) ** 2, "train": 0, "val": 5, "test": 0, **data}
    return replace(small, data=replace(small.data, options={"downsample": downsample}, **sizes))


def build(folder, **data):
    return image.build(recipe(**data), source="local", data_dir=folder, workers=1)


def embedded(**data):
    return image.build(recipe(**data), source="embedded", data_dir=None, workers=1)


def examples(*splits):
    return sorted((s.sequence(i).tolist(), int(y)) for s in splits for i, y in enumerate(s.labels))


def expected(half):
    rgb, labels = HALVES[half]
    grey = [np.asarray(Image.fromarray(picture).convert("L")).ravel() for picture in rgb]
    return sorted(((g.astype(int) + 1).tolist(), int(y)) for g, y in zip(grey, labels, strict=True))


def same(one: dict[str, Split], other: dict[str, Split]):
    return all(np.array_equal(one[n].tokens, other[n].tokens) for n in one) and all(
        np.array_equal(one[n].labels, other[n].labels) for n in one
    )


def test_every_layout_gives_the_same_grey_pixels_and_keeps_the_halves_apart(layout):
    built = build(layout)
    assert examples(built.splits["test"]) == expected("test")
    assert examples(built.splits["train"], built.splits["val"]) == expected("train")
    assert built.dataset == "CIFAR-10 (partial copy: 23 train, 13 test)"
    assert not built.substitute
    assert built.files
    assert all(len(digest) == 64 for digest in built.files.values())


def test_grey_is_299_587_114_per_mille(tmp_path):
    primaries = np.zeros((23, 32, 32, 3), np.uint8)
    for channel in range(3):
        primaries[channel::3, :, :, channel] = 255
    for half in COUNTS:
        write_binary(tmp_path, half, primaries[: COUNTS[half]], HALVES[half][1])
    tokens = build(tmp_path).splits["train"].tokens
    assert set(np.unique(tokens)) == {76 + 1, 150 + 1, 29 + 1}


def test_a_black_pixel_is_not_padding(layout):
    tokens = build(layout).splits["test"].tokens
    assert (tokens.min(), tokens.max()) == (1, META.vocab - 1)
    assert (tokens.reshape(13, 1024) == 1).all(1).sum() == 1  # the black picture has all its pixels


def test_validation_is_held_out_of_train(folder):
    splits = build(folder).splits
    val, train = ([x for x, _ in examples(splits[name])] for name in ("val", "train"))
    assert len(val) == 5
    assert len(train) == 18
    assert not any(x in train for x in val)


def test_splits_are_seeded_and_independent_of_file_order(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for half, (rgb, labels) in HALVES.items():
        write_binary(other, half, rgb[::-1], labels[::-1])
    assert same(build(folder).splits, build(other).splits)
    assert not same(build(folder).splits, build(folder, seed=1).splits)


@pytest.mark.parametrize(("kind", "note"), [("JPEG", "JPEG copy, partial copy"), ("PNG", "partial copy")])
def test_a_jpeg_copy_says_so(tmp_path, kind, note):
    write_one_parquet(tmp_path, kind)
    built = build(tmp_path)
    assert built.dataset == f"CIFAR-10 ({note}: 23 train, 13 test)"
    assert (examples(built.splits["test"]) == expected("test")) is (kind == "PNG")


def test_downsampling_averages_blocks_and_is_named(folder):
    built = build(folder, downsample=4)
    assert built.dataset.startswith("CIFAR-10 8x8 (")
    assert len(built.splits["test"].sequence(0)) == 64
    image = np.array([[[0, 1, 10, 10], [1, 0, 10, 11], [255, 255, 0, 1], [255, 255, 0, 0]]], np.uint8)
    assert pool(image, 2).tolist() == [[[1, 10], [255, 0]]]  # 0.5, 10.25, 255, 0.25
    assert pool(image, 1).tolist() == image.tolist()


@pytest.mark.parametrize("wrong", [{"downsample": 3}, {"downsample": 0}, {"downsample": 2.0}, {"colour": 1}])
def test_a_wrong_option_is_named(wrong):
    made = recipe()
    made = replace(made, data=replace(made.data, options=wrong))
    with pytest.raises(SourceError, match=f"data.options.{next(iter(wrong))}"):
        image.build(made, source="embedded", data_dir=None, workers=1)


def test_a_length_other_than_the_number_of_pixels_is_an_error():
    with pytest.raises(SourceError, match="data.seq_len=512: downsample=1 makes 1024"):
        embedded(seq_len=512)


@pytest.mark.parametrize("sizes", [{"train": 19}, {"val": 23}, {"test": 14}])
def test_asking_for_more_images_than_there_are_is_an_error(folder, sizes):
    with pytest.raises(SourceError, match=str(next(iter(sizes.values())))):
        build(folder, **sizes)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["alone", "as data", "in filenames"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(tmp_path, where):
    for half, (rgb, labels) in HALVES.items():
        write_python(tmp_path, half, rgb, labels)
    trace = tmp_path / "trace"
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    evil = {
        "alone": Evil(trace),
        "as data": {**batch, b"data": Evil(trace)},
        "in filenames": {**batch, b"filenames": [Evil(trace)]},
    }
    content = pickle.dumps(evil[where], protocol=2)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(SourceError, match=r"test_batch: not a CIFAR-10 batch \(it names \w+\.mkdir"):
        build(tmp_path)
    assert not trace.exists()
    pickle.loads(content)  # the attack works where it is let
    assert trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins\neval", "numpy.core.multiarray\nscalar", "numpy\nload", "_codecs\ndecode", "os\nmkdir"]
)
def test_no_name_beyond_the_format_is_resolved(tmp_path, name):
    (tmp_path / "test_batch").write_bytes(b"c%s\n." % name.encode())
    (tmp_path / "data_batch_1").write_bytes(b"c%s\n." % name.encode())
    with pytest.raises(SourceError, match=f"it names {name}".replace("\n", r"\.")):
        build(tmp_path)


def test_a_batch_as_python_2_wrote_it_is_read(tmp_path):
    """The official files: protocol 2, byte strings, numpy.core.multiarray._reconstruct."""

    def python2(data, labels):
        array = (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
            b"(K\x01M%bM\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T%b%btb"
        ) % (len(data).to_bytes(2, "little"), data.size.to_bytes(4, "little"), data.tobytes())
        numbers = b"".join(b"K%c" % label for label in labels)
        return b"\x80\x02}(U\x04data%bU\x06labels](%beu." % (array, numbers)

    for half, (rgb, labels) in HALVES.items():
        for name, data, y in batches(half, rgb, labels):
            content = python2(data, y.tolist())
            assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], data)
            (tmp_path / name).write_bytes(content)
    splits = build(tmp_path).splits
    assert examples(splits["test"]) == expected("test")
    assert examples(splits["train"], splits["val"]) == expected("train")


def python_batch(**change):
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], **change}
    return pickle.dumps({key.encode(): value for key, value in batch.items()}, protocol=2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (python_batch()[:-40], "not a CIFAR-10 batch"),
        (b"", "not a CIFAR-10 batch"),
        (pickle.dumps([1], protocol=2), "not a CIFAR-10 batch"),
        (python_batch(data=np.zeros((2, 3072))), "type 'f8'"),
        (python_batch(data=[[0] * 3072] * 2), "not a CIFAR-10 batch"),
        (python_batch(data=np.zeros((2, 768), np.uint8)), r"\(2, 768\) with 2 labels"),
        (python_batch(labels=[0]), "with 1 labels"),
        (python_batch(labels=[0, 10]), "row 1: label is '10'"),
    ],
)
def test_a_malformed_python_batch_is_a_one_line_error(tmp_path, content, message):
    for half, (rgb, labels) in HALVES.items():
        write_python(tmp_path, half, rgb, labels)
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(SourceError, match=f"test_batch: .*{message}") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes(3072), "3072 bytes, expected a multiple of 3073"),
        (b"", "0 bytes"),
        (b"\x0a" * 3073, "row 0: label is '10'"),
    ],
)
def test_a_malformed_binary_batch_is_a_one_line_error(folder, content, message):
    (folder / "test_batch.bin").write_bytes(content)
    with pytest.raises(SourceError, match=f"test_batch.bin: {message}"):
        build(folder)


BLACK = np.zeros((32, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (encoded(HALVES["test"][0][2], "JPEG")[:300], "not readable PNG or JPEG"),
        (encoded(HALVES["test"][0][2])[:300], "not readable PNG or JPEG"),
        (b"", "not readable PNG or JPEG"),
        (None, "not readable PNG or JPEG"),
        (encoded(BLACK, "BMP"), "not readable PNG or JPEG"),
        (encoded(BLACK[:, :31]), "the image is 31 x 32 RGB"),
        (encoded(np.zeros((64, 64, 3), np.uint8), "JPEG"), "the image is 64 x 64 RGB"),
        (encoded(np.zeros((32, 32, 4), np.uint8)), "the image is 32 x 32 RGBA"),
    ],
)
def test_a_corrupt_or_wrong_image_is_named_by_its_row(tmp_path, picture, message):
    for half, (rgb, labels) in HALVES.items():
        pictures = [encoded(x) for x in rgb]
        pictures[7] = picture if half == "test" else pictures[7]
        write_hub(tmp_path, half, pictures, labels)
    with pytest.raises(SourceError, match=f"test-00000-of-00001.parquet: row 7: {message}") as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda half: (half / "cat" / "3.PNG").write_bytes(b"cut"), "test.cat.3.PNG: not readable PNG or JPEG"),
        (lambda half: (half / "zebra").mkdir(), "test: the folders are .*zebra; expected airplane"),
        (lambda half: shutil.rmtree(half / "ship"), "test: the folders are .*horse, truck; expected airplane"),
        (lambda half: shutil.rmtree(half / "airplane"), "test half not found; .*test/airplane"),
        (lambda half: (half / "frog" / "6.png").rename(half / "frog" / "6.gif"), "test.frog: no pictures"),
    ],
)
def test_folders_of_pictures_hold_every_class(tmp_path, break_it, message):
    for half, (rgb, labels) in HALVES.items():
        write_folders(tmp_path, half, rgb, labels)
    break_it(tmp_path / "test")
    with pytest.raises(SourceError, match=message):
        build(tmp_path)


def test_truncated_parquet_names_the_file(tmp_path):
    write_one_parquet(tmp_path, "PNG")
    path = tmp_path / "cifar10.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match=r"cifar10\.parquet: not readable"):
        build(tmp_path)


def test_missing_data_lists_every_name_looked_for(tmp_path):
    looked_for = r"train half.*cifar-10-batches-py.*cifar10\.parquet.*train/airplane"
    with pytest.raises(SourceError, match=looked_for):
        build(tmp_path)


def test_hub_is_asked_for_the_pinned_files(monkeypatch, tmp_path):
    for half, (rgb, labels) in HALVES.items():
        write_hub(tmp_path, half, [encoded(x) for x in rgb], labels)

    def download(repo, filename, *, repo_type, revision):
        assert (repo, revision) == ("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(SourceError, match="sha256 is .*expected 8428b53a"):
        image.build(recipe(), source="hub", data_dir=None, workers=1)
    paths = {half: tmp_path / "plain_text" / f"{half}-00000-of-00001.parquet" for half in HALVES}
    hashes = {half: cifar.sha256_file(path) for half, path in paths.items()}
    monkeypatch.setattr(cifar, "HUB_SHA256", hashes)
    built = image.build(recipe(), source="hub", data_dir=None, workers=1)
    assert (built.source, built.revision) == ("hub", cifar.HUB_REVISION)
    assert examples(built.splits["test"]) == expected("test")


def test_no_connection_lists_the_ways_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(SourceError, match="--data-dir.*--source embedded.*HF_HUB_OFFLINE"):
        image.build(RECIPES["paper"], source="hub", data_dir=None, workers=1)


@pytest.mark.parametrize(("preset", "sizes"), [("smoke", [600, 150, 300]), ("small", [1097, 200, 500])])
def test_embedded_digits_are_a_named_substitute(preset, sizes):
    built = image.build(RECIPES[preset], source="embedded", data_dir=None, workers=1)
    assert [len(built.splits[name].labels) for name in ("train", "val", "test")] == sizes
    assert built.dataset == "digits 16x16 (substitute for CIFAR-10)"
    assert built.substitute
    assert {len(s.sequence(0)) for s in built.splits.values()} == {RECIPES[preset].data.seq_len}
    assert set(built.splits["train"].labels) == set(range(10))
    assert list(built.files) == ["digits.csv.gz"]
    assert 0.1 < built.floors["mean grey"] < 0.2


def test_embedded_digits_at_full_size_span_all_levels():
    built = embedded()
    assert built.dataset == "digits (substitute for CIFAR-10)"
    tokens = np.concatenate([split.tokens for split in built.splits.values()])
    assert (tokens.min(), tokens.max(), len(tokens)) == (1, 256, 1797 * 1024)


def test_the_digits_of_the_test_split_do_not_depend_on_the_other_sizes():
    one, other = embedded(train=300, val=100, test=99), embedded(val=200, test=99)
    assert np.array_equal(one.splits["test"].tokens, other.splits["test"].tokens)


def test_mean_grey_reads_the_level_alone():
    def split(levels, labels):
        rng = np.random.default_rng(0)  # the pixels of an image in any order
        return Split.of([rng.permutation(np.array([n, 1, 1], np.uint16)) for n in levels], labels)

    levels = np.arange(2, 42)
    assert mean_grey(split(levels, levels // 15), split(levels, levels // 15)) == 1.0
    assert mean_grey(split(levels * 0 + 9, levels % 2), split(levels * 0 + 9, levels % 2)) == 0.5


@pytest.mark.skipif(not (SHARED / "cifar10.parquet").exists(), reason="no shared/data beside the checkout")
def test_a_twentieth_of_the_shared_jpeg_copy(tmp_path):
    table = pyarrow.parquet.read_table(SHARED / "cifar10.parquet")
    assert len(table) == 60_000
    pyarrow.parquet.write_table(table.take(list(range(0, 60_000, 20))), tmp_path / "cifar10.parquet")
    built = image.build(RECIPES["small"], source="local", data_dir=tmp_path, workers=1)
    assert [len(built.splits[name].labels) for name in ("train", "val", "test")] == [2300, 200, 500]
    assert built.dataset == "CIFAR-10 16x16 (JPEG copy, partial copy: 2,500 train, 500 test)"
    assert 0.1 < built.floors["mean grey"] < 0.2
