"""Every published layout, through `prepare`: folder and archive are the same data, and bad input is one line."""

import gzip
import io
import os
import pickle
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from tasks import image, listops, pathfinder, retrieval, text
from tasks.base import SPLITS, SourceError
from tasks.image import cifar as cifar_module
from tasks.image.cifar import CLASSES
from tasks.listops.expressions import write_tsv
from tasks.store import archives
from tasks.store.prepare import prepare
from tasks.store.prepared import data_identity, disjoint

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"


def lra_texts(folder, rows):
    """AAN's files in the release's folder for them."""
    folder.mkdir(parents=True)
    for name in ("train", "eval", "test"):
        lines = [f'{k % 2}.0\t{name}{k}\tx\t"left {name} {k}\tright {k}\n' for k in range(rows)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))


def lra_expressions(folder, rows):
    """ListOps' files."""
    folder.mkdir(parents=True)
    tokens, labels = listops.generate(3 * rows, seed=7, min_length=5, max_length=40)
    for k, name in enumerate(SPLITS):
        write_tsv(folder / f"basic_{name}.tsv", tokens[k::3], labels[k::3])


def lra_pictures(folder, rows):
    """Pathfinder's pictures of the smoke preset, metadata of both kinds, and the file that is empty."""
    images, labels = pathfinder.generate(rows, seed=3, contour_length=6)
    table = []
    for k, (picture, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / "imgs" / "0" / f"sample_{k + 165}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
        table.append(["imgs/0", path.name, str(k), str(label), "1"])
    (folder / "imgs" / "0" / "sample_172.png").write_bytes(b"")
    (folder / "metadata").mkdir()
    half = rows // 2
    (folder / "metadata" / "0.npy").write_text("".join(" ".join(row) + "\n" for row in table[:half]))
    np.save(folder / "metadata" / "1.npy", np.array(table[half:]))


def acl_imdb(folder, rows):
    """The folder of aclImdb_v1.tar.gz; its unsupervised reviews are not wanted."""
    for half, count in (("train", rows), ("test", rows // 2)):
        for k in range(count):
            path = folder / half / ("neg", "pos")[k % 2] / f"{k}_7.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"{half} <br /> review \u00e9 {k}".encode())
        (folder / half / "unsup").mkdir()
        (folder / half / "unsup" / "0_0.txt").write_text("unlabelled")


def pictures(folder, rows):
    """CIFAR's pictures in a folder for each class."""
    rng = np.random.default_rng(rows)
    for half in ("train", "test"):
        for k in range(rows):
            path = folder / half / CLASSES[k % 10] / f"{k}.{('png', 'JPG')[k % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(path)


def cifar(folder, rows, kind):
    """CIFAR's batches, of which there may be fewer."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(rows)
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        planes, labels = rng.integers(0, 256, (rows, 3072), np.uint8), np.arange(rows, dtype=np.uint8) % 10
        if kind == "bin":
            np.concatenate([labels[:, None], planes], 1).tofile(folder / f"{name}.bin")
        else:
            batch = {b"data": planes, b"labels": labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))


LAYOUTS = {  # name: (task, archive, folder in it, writer)
    "listops": (listops, "lra_release.gz", "lra_release/lra_release/listops-1000", lra_expressions),
    "retrieval": (retrieval, "lra_release.tar.gz", "lra_release/tsv_data", lra_texts),
    "pathfinder": (pathfinder, "lra_release.tar", "lra_release/pathfinder32/curv_baseline", lra_pictures),
    "text": (text, "aclImdb_v1.tar.gz", "aclImdb", acl_imdb),
    "python": (image, "cifar-10-python.tar.gz", "cifar-10-batches-py", lambda f, n: cifar(f, n, "py")),
    "binary": (image, "cifar-10-binary.tar.gz", "cifar-10-batches-bin", lambda f, n: cifar(f, n, "bin")),
    "pictures": (image, "cifar-10-python.tar.gz", "", pictures),
}


def small(task, monkeypatch, **sizes):
    """The smoke preset with a few examples."""
    recipe = task.RECIPES["smoke"]
    sizes = {"train": 0, "val": 5, "test": 0 if task is not pathfinder else 7, **sizes}
    monkeypatch.setitem(task.RECIPES, "smoke", replace(recipe, data=replace(recipe.data, **sizes)))
    return task


def archive_of(folder, path, inside):
    """A tar archive of a folder, compressed as its name says; returns its path."""
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as tar:
        tar.add(folder, inside)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_folder_archive_and_folder_with_the_archive_are_the_same_data(tmp_path, monkeypatch, name):
    task, archive, inside, write = LAYOUTS[name]
    small(task, monkeypatch)
    write(tmp_path / "raw" / inside, 47)
    (tmp_path / "packed").mkdir()
    packed = archive_of(tmp_path / "raw", tmp_path / "packed" / archive, ".")
    made = []
    for k, data_dir in enumerate((tmp_path / "raw", packed, packed.parent)):
        found, reused = prepare(task, "smoke", out=tmp_path / str(k), data_dir=data_dir, workers=2)
        assert not reused and found.manifest["source"] == "local"
        made.append(found.manifest)
        beside = {path.name for path in (tmp_path / str(k) / task.META.name).iterdir()}
        assert beside == {"smoke", "smoke.lock"}
    assert len(set(map(data_identity, made))) == 1
    assert made[1]["files"] == made[2]["files"]
    extra = made[1]["files"].keys() - made[0]["files"].keys()
    assert extra == {archive} and len(made[1]["files"][archive]) == 64
    assert prepare(task, "smoke", out=tmp_path / "1", data_dir=packed)[1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_archive_beside_its_unpacked_files_is_not_read(tmp_path, monkeypatch, name):
    task, archive, inside, write = LAYOUTS[name]
    write(tmp_path / inside, 47)
    (tmp_path / archive).write_bytes(b"half a download")
    assert (
        archive
        not in prepare(small(task, monkeypatch), "smoke", out=tmp_path / "out", data_dir=tmp_path)[0].manifest["files"]
    )


def test_files_deep_in_other_folders_do_not_hide_an_archive(tmp_path, monkeypatch):
    acl_imdb(tmp_path / "raw" / "aclImdb", 47)
    archive_of(tmp_path / "raw", tmp_path / "aclImdb_v1.tar.gz", ".")
    made, _ = prepare(small(text, monkeypatch), "smoke", out=tmp_path / "out", data_dir=tmp_path)
    assert "aclImdb_v1.tar.gz" in made.manifest["files"]


def test_an_archive_without_the_files_says_what_was_looked_for(tmp_path, error_line):
    lra_texts(tmp_path / "raw", 5)
    packed = archive_of(tmp_path / "raw", tmp_path / "lra_release.gz", "tsv_data")
    line = error_line("prepare", "text", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", packed)
    assert str(packed) in line and "IMDb train half not found" in line and ".smoke." not in line


def test_a_task_without_archives_says_so(tmp_path, plugins, error_line):
    (tmp_path / "a.tar").write_bytes(b"")
    words = ("prepare", "tiny", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", tmp_path / "a.tar")
    assert "tiny reads no archives; give a folder" in error_line(*words)


def test_raw_data_may_go_once_they_are_prepared(tmp_path, monkeypatch):
    small(text, monkeypatch)
    acl_imdb(tmp_path / "raw", 47)
    prepare(text, "smoke", out=tmp_path / "out", data_dir=tmp_path / "raw")
    shutil.rmtree(tmp_path / "raw")
    assert prepare(text, "smoke", out=tmp_path / "out", data_dir=tmp_path / "raw")[1]


def hostile(tmp_path, damage):
    """An archive of reviews with one bad thing about it, and what the error must say."""
    acl_imdb(tmp_path / "raw", 11)
    path = tmp_path / "aclImdb_v1.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / "raw", "aclImdb")
        info = tarfile.TarInfo("/absolute" if damage == "absolute path" else "aclImdb/../../up")
        if damage == "link out":
            info = tarfile.TarInfo("aclImdb/train/pos")
            info.type, info.linkname = tarfile.SYMTYPE, "../../../elsewhere"
        if damage == "bomb":
            info = tarfile.TarInfo("aclImdb/train/pos/9_9.txt")
            info.size = 1 << 24
        if damage not in ("truncated", "nothing"):
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ("absolute path", "'/absolute' is refused (AbsolutePathError)"),
        ("..", "'aclImdb/../../up' is refused (OutsideDestinationError)"),
        ("link out", "'aclImdb/train/pos' is refused (LinkOutsideDestinationError)"),
        ("bomb", "decompression bomb"),
        ("truncated", "cannot be read"),
    ],
)
def test_a_bad_archive_is_one_line_and_leaves_nothing(tmp_path, error_line, monkeypatch, damage, says):
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 20)
    path = hostile(tmp_path, damage)
    line = error_line("prepare", "text", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", path)
    assert says in line and "aclImdb_v1.tar.gz" in line
    assert [p.name for p in (tmp_path / "out" / "text").iterdir()] == []
    assert {p.name for p in tmp_path.iterdir()} == {"raw", "out", "aclImdb_v1.tar.gz"}


@pytest.mark.parametrize("name", ["listops", "retrieval"])
def test_a_malformed_row_in_an_archive_is_named_by_its_line(tmp_path, error_line, name):
    task, archive, inside, write = LAYOUTS[name]
    write(tmp_path / "raw" / inside, 9)
    path = next((tmp_path / "raw").rglob("*train*.tsv"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], "1\tnonsense\n", *lines[4:]]))
    packed = archive_of(tmp_path / "raw", tmp_path / archive, ".")
    words = ("prepare", name, "--preset=smoke", "--data", tmp_path / "out", "--data-dir", packed)
    line = error_line(*words)
    assert f"{packed}/{path.name}" in line and "line 5" in line


def test_a_pickle_that_is_not_cifar_s_is_one_line_and_nothing_runs(tmp_path, error_line):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trace"),)

    cifar(tmp_path / "raw", 5, "py")
    (tmp_path / "raw" / "test_batch").write_bytes(pickle.dumps(Evil(), protocol=2))
    packed = archive_of(tmp_path / "raw", tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py")
    line = error_line("prepare", "image", "--preset=smoke", "--data", tmp_path / "out", "--data-dir", packed)
    assert "test_batch: not a CIFAR-10 batch (it names" in line and not (tmp_path / "trace").exists()


# What other programs make of the same files


def rewrite(folder, names, change):
    """Change the contents of the text files of a layout."""
    for path in (path for path in folder.rglob("*") if path.is_file() and re.search(names, str(path))):
        if not (content := path.read_bytes()).startswith(b"\x93NUMPY"):
            path.write_bytes(change(content))


def companions(folder):
    """What macOS, Windows and Jupyter leave beside files."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7 Finder")
            for name in (".DS_Store", "Thumbs.db"):
                (path.parent / name).write_bytes(b"no data")
            (path.parent / ".ipynb_checkpoints").mkdir(exist_ok=True)
            (path.parent / ".ipynb_checkpoints" / path.name).write_bytes(b"an older copy")


def upper(folder):
    """Names of files in upper case."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        path.rename(path.with_name(path.name.upper()))


def packed(folder):
    """Tables compressed."""
    for path in list(folder.rglob("*.tsv")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def labelled(content):
    """Labels of rows as 1.0."""
    return re.sub(rb"(?m)(^\d|\t\d|(?<=png \d ).|(?<=png \d\d ).)(?=\t|$| 1)", rb"\1.0", content)


TEXTS = r"\.tsv$|metadata"
WRITTEN = {
    "CRLF": lambda folder: rewrite(folder, TEXTS, lambda content: content.replace(b"\n", b"\r\n")),
    "byte order mark": lambda folder: rewrite(folder, TEXTS, lambda content: b"\xef\xbb\xbf" + content),
    "blank last lines": lambda folder: rewrite(folder, TEXTS, lambda content: content + b"\n\r\n"),
    "no last line end": lambda folder: rewrite(folder, TEXTS, bytes.rstrip),
    "labels with a decimal": lambda folder: rewrite(folder, TEXTS, labelled),
    "companions": companions,
    "upper case": upper,
    "compressed": packed,
}
KINDS = {
    "listops": {*WRITTEN},
    "retrieval": {*WRITTEN},
    "pathfinder": {*WRITTEN} - {"upper case", "compressed"},
    **dict.fromkeys(["text", "pictures", "python", "binary"], {"companions", "upper case"}),
}


def splits_of(name, folder, monkeypatch):
    """The arrays of the splits, and the data set's name."""
    task = small(LAYOUTS[name][0], monkeypatch)
    built = task.build(task.RECIPES["smoke"], source="local", data_dir=folder, workers=1)
    return [built.dataset, *(a.tolist() for split in SPLITS for a in vars(built.splits[split]).values())]


@pytest.mark.parametrize("name", KINDS)
def test_the_writer_of_the_files_makes_no_difference(tmp_path, monkeypatch, name):
    _, _, inside, write = LAYOUTS[name]
    write(tmp_path / "plain" / inside, 47)
    expected = splits_of(name, tmp_path / "plain", monkeypatch)
    for kind in sorted(KINDS[name]):
        shutil.copytree(tmp_path / "plain", tmp_path / kind)
        WRITTEN[kind](tmp_path / kind)
        assert splits_of(name, tmp_path / kind, monkeypatch) == expected, kind


@pytest.mark.parametrize("differ", [False, True])
@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_the_release_holds_a_task_twice(tmp_path, monkeypatch, capsys, name, differ):
    task, archive, inside, write = LAYOUTS[name]
    inner, last = tmp_path / "raw" / "lra_release" / "lra_release", Path(inside).parts[-(name == "pathfinder") - 1 :]
    write(inner.joinpath(*last), 47)
    shutil.copytree(inner.joinpath(*last), inner.parent.joinpath(*last))
    one = archive_of(tmp_path / "raw" / "lra_release" / "lra_release", tmp_path / archive, "lra_release/lra_release")
    if differ:
        outer = inner.parent.joinpath(*last)
        shutil.rmtree(outer)
        write(outer, 53)
    (tmp_path / "packed").mkdir()
    two = archive_of(tmp_path / "raw", tmp_path / "packed" / archive, ".")
    small(task, monkeypatch)
    made = [prepare(task, "smoke", out=tmp_path / str(k), data_dir=path)[0] for k, path in enumerate((one, two))]
    assert len({data_identity(m.manifest) for m in made}) == 1
    assert ("of two different" in capsys.readouterr().err) == differ
    assert splits_of(name, tmp_path / "raw", monkeypatch) == splits_of(name, inner, monkeypatch)


@pytest.mark.parametrize("name", ["pathfinder", "pictures"])
@pytest.mark.parametrize("mode", ["I;16", "RGBA", "LA", "CMYK"])
def test_pictures_that_eight_bits_do_not_hold_are_refused(tmp_path, monkeypatch, name, mode):
    LAYOUTS[name][3](tmp_path / LAYOUTS[name][2], 47)
    path = next(path for path in sorted(tmp_path.rglob("*.png")) if path.stat().st_size)
    Image.new(mode, (32, 32)).save(path, "JPEG" if mode == "CMYK" else "PNG")
    with pytest.raises(SourceError, match=f"the image is 32 x 32 {mode}|not readable PNG"):
        splits_of(name, tmp_path, monkeypatch)


@pytest.mark.parametrize("label", [True, "true", 1.5, None, "1.00"])
@pytest.mark.parametrize("task", [image, text])
def test_a_label_is_a_whole_number_in_every_table(tmp_path, monkeypatch, task, label):
    rows = [label] if label is not None else [None, 0]
    columns = {"label": pyarrow.array(rows)} | ({"text": ["a"] * len(rows)} if task is text else {})
    columns |= {"img": [{"bytes": b"", "path": ""}] * len(rows)} if task is image else {}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train-00000-of-00001.parquet")
    monkeypatch.setattr(cifar_module, "read_picture", lambda *_: (np.zeros((32, 32), np.uint8), "PNG"))
    with pytest.raises(SourceError, match=re.escape(f"row 0: label is {str(label)!r}, expected 0 to")):
        task.build(small(task, monkeypatch).RECIPES["smoke"], source="local", data_dir=tmp_path, workers=1)


@pytest.mark.parametrize("name", ["listops", "pathfinder"])
def test_a_folder_without_the_files_of_a_generated_task_is_said(tmp_path, monkeypatch, capsys, name):
    task = small(LAYOUTS[name][0], monkeypatch, train=20, test=9)
    (tmp_path / "raw").mkdir()
    prepare(task, "smoke", out=tmp_path / "out", data_dir=tmp_path / "raw")
    err = capsys.readouterr().err
    assert f"the data are generated: --data-dir {tmp_path / 'raw'} was searched for" in err
    assert ("basic_train.tsv" if name == "listops" else "pathfinder32/curv_baseline/metadata/*.npy") in err


def test_a_link_to_itself_is_one_line(tmp_path, error_line):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for task in ("text", "listops"):
        line = error_line("prepare", task, "--preset=smoke", "--data", tmp_path, "--data-dir", tmp_path / "loop")
        assert f"--data-dir {tmp_path / 'loop'}: no such folder or archive" in line
    assert str(tmp_path / "loop") in error_line("prepare", "listops", "--preset=smoke", "--data", tmp_path / "loop")


# The official files


@pytest.mark.skipif(not (SHARED / "imdb_test.parquet").exists(), reason="no shared/data beside the checkout")
def test_the_official_imdb_halves_have_25_000_reviews_each_and_123_in_both(monkeypatch):
    small(text, monkeypatch, seq_len=20_000, val=2500)
    monkeypatch.setattr(text, "bag_of_bytes", lambda train, test: 0.5)  # takes half a minute
    built = text.build(text.RECIPES["smoke"], source="local", data_dir=SHARED, workers=2)
    counts = {name: np.bincount(split.labels).tolist() for name, split in built.splits.items()}
    assert counts == {"train": [11_250, 11_250], "val": [1250, 1250], "test": [12_500, 12_500]}
    assert built.dataset == "IMDb"
    texts = {
        name: {split.sequence(i).tobytes() for i in range(len(split.labels))} for name, split in built.splits.items()
    }
    assert len((texts["train"] | texts["val"]) & texts["test"]) == 123
    kept, removed, _ = disjoint(built.splits, 1)
    assert removed["train"] + removed.get("val", 0) >= 123
    assert [len(kept[name].labels) + removed.get(name, 0) for name in SPLITS] == [22_500, 2500, 25_000]


@pytest.mark.skipif(not (SHARED / "cifar10.parquet").exists(), reason="no shared/data beside the checkout")
def test_the_cifar_parquet_has_50_000_and_10_000_pictures(monkeypatch):
    small(image, monkeypatch, val=5000)
    built = image.build(image.RECIPES["smoke"], source="local", data_dir=SHARED, workers=2)
    assert {name: len(split.labels) for name, split in built.splits.items()} == {
        "train": 45_000,
        "val": 5000,
        "test": 10_000,
    }
    assert all(set(np.bincount(split.labels)) == {len(split.labels) // 10} for split in built.splits.values())
    assert built.dataset == "CIFAR-10 16x16 (JPEG copy)"


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the checkout")
def test_published_listops_files_survive_preparing_byte_for_byte(tmp_path, monkeypatch):
    with gzip.open(SHARED / "listops_reference_1000.tsv.gz") as file:
        header, *rows = file.read().splitlines(keepends=True)
    for k, name in enumerate(SPLITS):
        (tmp_path / f"basic_{name}.tsv").write_bytes(b"".join([header, *rows[k::3]]))
    small(listops, monkeypatch, seq_len=2000, val=0)
    found, _ = prepare(listops, "smoke", out=tmp_path / "out", data_dir=tmp_path)
    for name, split in found.splits.items():
        tokens = [split.sequence(i) for i in range(len(split.labels))]
        write_tsv(tmp_path / "ours.tsv", tokens, split.labels)
        assert (tmp_path / "ours.tsv").read_bytes() == (tmp_path / f"basic_{name}.tsv").read_bytes()
