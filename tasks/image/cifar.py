"""CIFAR-10 as it is published: python batches, binary batches, parquet or folders of pictures, read as grey.

The python batches are pickles. They are read by an unpickler that knows the one structure they hold, a dictionary of
strings, integers, lists and one uint8 array, and refuses every other name without importing it.
"""

import pickle
from pathlib import Path

import numpy as np

from tasks.base import SourceError
from tasks.store.files import labels_of, one_line, read_picture, read_table, sha256_file
from tasks.store.sources import find_one, hub_file, in_chunks, listed, read_folder

SIDE = 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PICTURES = (".png", ".jpg", ".jpeg")
HUB_REPO, HUB_REVISION = "uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2"
HUB_SHA256 = {
    "train": "8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
    "test": "841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de",
}
BATCHES = {"train": "data_batch_[1-5]", "test": "test_batch"}
SHARD = "{half}-00000-of-00001.parquet"
LAYOUTS = ("cifar-10-batches-py/{batch}", "{batch}", "cifar-10-batches-bin/{batch}.bin", "{batch}.bin")
LAYOUTS += (f"plain_text/{SHARD}", SHARD, "cifar10.parquet", "{half}/airplane", "{half}/0")  # looked for in this order
# In an archive, whatever folder they are in
MEMBERS = ("data_batch_?", "test_batch", "data_batch_?.bin", "test_batch.bin")
MEMBERS += tuple(f"{half}/*/*{end}" for half in BATCHES for end in PICTURES)


def read_half(half: str, data_dir: Path | None, files: dict, workers: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """The train or test half: grey levels uint8 (n, 32, 32), labels uint8 (n,), and whether any was a JPEG.

    Read from data_dir or else from the hub; the hashes of what is read are added to `files`. SourceError if it
    is not there, unreadable, or holds anything but 32 x 32 pictures of classes 0..9.
    """
    if data_dir is None:
        name = "plain_text/" + SHARD.format(half=half)
        path = hub_file(HUB_REPO, name, revision=HUB_REVISION, sha256=HUB_SHA256[half])
    else:
        names = [name.format(half=half, batch=BATCHES[half]) for name in LAYOUTS]
        path = find_one(data_dir, names, f"the CIFAR-10 {half} half")
    if path.suffix.lower() == ".parquet" or path.is_dir():
        read = _folders if path.is_dir() else _parquet
        pictures, names, labels = read(path, half, files, workers)
        grey, jpeg = np.empty((len(pictures), SIDE, SIDE), np.uint8), np.zeros(len(pictures), bool)

        def decode(start: int, end: int) -> None:
            for i in range(start, end):
                grey[i], kind = read_picture(pictures[i], SIDE, ("PNG", "JPEG"), names[i])
                jpeg[i] = kind == "JPEG"

        in_chunks(decode, len(pictures), workers, "images")
        return grey, labels_of(labels, len(CLASSES), path), bool(jpeg.any())
    batches = listed(path.parent, BATCHES[half] + path.suffix)
    files.update((batch.name, sha256_file(batch)) for batch in batches)
    read = _binary if path.suffix.lower() == ".bin" else _pickled
    planes, labels = zip(*map(read, batches))
    from PIL import Image

    # (n, 3072), all red then all green then all blue
    rgb = np.concatenate(planes).reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1).reshape(-1, SIDE, 3)
    grey = np.asarray(Image.fromarray(rgb).convert("L")).reshape(-1, SIDE, SIDE)
    return grey, np.concatenate(labels), False


def _parquet(path: Path, half: str, files: dict[str, str], workers: int) -> tuple[list[bytes], list[str], list]:
    """PNG or JPEG files, their names for messages, their labels: from the hub's layout (img {bytes, path}, label), or
    from one file of both halves (split, label, image_jpeg)."""
    files[path.name] = sha256_file(path)
    if path.name.lower() == "cifar10.parquet":
        splits, labels, pictures = read_table(path, ["split", "label", "image_jpeg"]).values()
        rows = [k for k, split in enumerate(splits) if split == half]
    else:
        pictures, labels = read_table(path, ["img", "label"]).values()
        rows = range(len(labels))
    if not rows:
        raise SourceError(f"{path}: no images of the {half} half; fetch it again")
    contents = [img.get("bytes") if isinstance(img := pictures[k], dict) else img for k in rows]
    return contents, [f"{path}: row {k}" for k in rows], [labels[k] for k in rows]


def _folders(path: Path, half: str, files: dict[str, str], workers: int) -> tuple[list[bytes], list[str], list]:
    """The same from one folder for each class, named as in CLASSES or 0 to 9; `path` is the first of them."""
    contents, names, labels = [], [], []
    folders = [folder for folder in listed(path.parent, "*") if folder.is_dir()]
    present = tuple(folder.name for folder in folders)
    if present not in (CLASSES, tuple("0123456789")):
        problem = f"the folders are {', '.join(present)[:200]}"
        raise SourceError(f"{path.parent}: {problem}; expected {', '.join(CLASSES)}, or 0 to 9")
    for label, folder in enumerate(folders):
        paths = [path for path in listed(folder, "*") if path.suffix.lower() in PICTURES]
        if not paths:
            raise SourceError(f"{folder}: no pictures ({', '.join(PICTURES)}) of this class; add them")
        pictures, files[f"{half}/{folder.name}"] = read_folder(paths, workers)
        contents += pictures
        names += map(str, paths)
        labels += [label] * len(paths)
    return contents, names, labels


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A binary batch: records of one label byte and 3,072 pixel bytes."""
    record = 1 + 3 * SIDE * SIDE
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % record:
        raise SourceError(f"{path}: {len(data)} bytes, expected a multiple of {record}; fetch it again")
    data = data.reshape(-1, record)
    return data[:, 1:], labels_of(data[:, 0], len(CLASSES), path)


class _Stub:
    """What an array and its dtype unpickle to: what numpy would be given. numpy's unpickling never runs."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: tuple) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Resolves the names a batch contains to stand-ins and refuses all others."""

    _NAMES = {
        ("numpy.core.multiarray", "_reconstruct"): _Stub,
        ("numpy._core.multiarray", "_reconstruct"): _Stub,
        ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
        ("numpy", "dtype"): _Stub,
        ("_codecs", "encode"): lambda text, _: text.encode("latin-1"),  # bytes, as Python 3 writes protocol 2
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._NAMES:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which a batch has no use for")
        return self._NAMES[module, name]


def _pickled(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A python batch: {b"data": uint8 (n, 3072), b"labels": [0..9] * n, ...}."""
    try:
        with open(path, "rb") as file:
            batch = _Unpickler(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        _, shape, dtype, fortran, raw = batch["data"].state
        if (code := dtype.arguments[0]) not in (b"u1", "u1"):
            raise pickle.UnpicklingError(f"an array of type {code!r} is not a batch of pixels")
        planes = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")
        labels = list(batch["labels"])
    except Exception as error:  # a damaged pickle raises almost anything
        raise SourceError(f"{path}: not a CIFAR-10 batch ({one_line(error)}); fetch it again") from error
    if planes.shape != (len(labels), 3 * SIDE * SIDE) or not labels:
        problem = f"data is {planes.shape} with {len(labels)} labels, expected (n, 3072) with n"
        raise SourceError(f"{path}: {problem}; fetch it again")
    return planes, labels_of(labels, len(CLASSES), path)
