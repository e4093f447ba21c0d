"""Files: written whole or not at all, hashed, and read whatever program has written them.

Nothing here unpickles or executes what it reads. Raw data that cannot be read are a one-line SourceError.
"""

import ast
import bz2
import codecs
import functools
import gzip
import hashlib
import importlib.util
import io
import lzma
import os
import re
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np

from tasks.base import SourceError

OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by first bytes
ENDINGS = ("", ".gz", ".xz")  # of text files
LABELS = {f"{label}{end}": label for label in range(10) for end in ("", ".0")}
LONGEST_ROW = 1 << 27  # bytes of a row of a csv file


def one_line(error: BaseException) -> str:
    """The message of an exception on one line of at most 200 characters, the same in every run: without addresses."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", " ".join(str(error).split()))[:200] or type(error).__name__


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`: on success synced and renamed onto `path`, on failure removed.

    The temporary name keeps the suffix, because np.save and others append a missing one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:12]}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # a message names what was asked for
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_temporaries(path: Path) -> None:
    """Remove what killed processes left of `atomic_path(path)`. The caller keeps others from writing it."""
    for left in path.parent.glob(f".{path.stem}-{12 * '[0-9a-f]'}{path.suffix}"):
        left.unlink(missing_ok=True)


def source_sha256(module: ModuleType, shared: str = "") -> str:
    """Hex sha256 of a plug-in's own source: its file, or every .py file of its folder in order of name.

    With `shared`, such as `models.features`, the modules of that package that the source imports, directly or through
    one another, are part of it. Other shared code is not. Two checkouts of the same source give the same hash.
    """
    file = Path(module.__file__)
    files = sorted(file.parent.glob("*.py")) if file.name == "__init__.py" else [file]
    for path in files if shared else ():  # the list grows while it is read
        names = [name for name in imported(path.read_bytes()) if name.startswith(shared)]
        places = [importlib.util.find_spec(name) for name in names if name.count(".") == shared.count(".") + 1]
        files += [Path(place.origin) for place in places if place and Path(place.origin) not in files]
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


@functools.cache
def imported(source: bytes) -> list[str]:
    """What `from a import b` names in a source: a and a.b, of each."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.module]
    return [f"{n.module}{name}" for n in nodes for name in ("", *(f".{alias.name}" for alias in n.names))]


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, plain or compressed by gzip, bzip2 or xz, for reading; its first bytes tell which.

    Whatever goes wrong while reading inside the `with` block (truncated, not UTF-8) becomes a SourceError.
    """
    try:
        with open(path, "rb") as raw:
            start = raw.read(6)
            raw.seek(0)
            opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), nullcontext)
            with opener(raw) as file:
                yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read ({one_line(error)}); fetch it again") from error


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line of a text file, plain or compressed, whatever program has written it.

    Left out are a byte order mark at its start, the ends of lines (LF or CR LF) and empty lines at its end.
    """
    from tqdm import tqdm

    with open_bytes(path) as file:
        last = 0  # line that is not empty
        for number, line in enumerate(tqdm(file, Path(path).name, unit=" lines", delay=2, disable=None), 1):
            line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").rstrip(b"\r\n")
            if line:
                yield from ((empty, b"") for empty in range(last + 1, number))
                yield number, line
                last = number


def label_of(value: object, classes: int, where: str) -> int:
    """A label as any writer prints it: 1, 1.0, "1", "1.0", b"1". SourceError for others, among them True."""
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    label = LABELS.get(text, classes)
    if label >= classes:
        raise SourceError(f"{where}: label is {text[:40]!r}, expected 0 to {classes - 1}")
    return label


def labels_of(values: Sequence, classes: int, path: Path) -> np.ndarray:
    """The labels of a table, uint8 (n,)."""
    return np.array([label_of(value, classes, f"{path}: row {k}") for k, value in enumerate(values)], np.uint8)


def read_picture(raw: bytes, side: int, formats: Sequence[str], where: str) -> tuple[np.ndarray, str]:
    """Grey levels, uint8 (side, side), of an image file by Pillow's "L" (299/587/114 per mille), and its format.

    SourceError for one that cannot be read, of another size, transparent, or of levels that are not of 8 bits: Pillow
    would make every level of a 16-bit image above 255 white.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(raw), formats=formats) as image:
            fits = image.size == (side, side) and image.mode in ("1", "L", "P", "RGB")
            if fits and not image.has_transparency_data:
                return np.asarray(image.convert("L")), image.format
            kind = "{} x {} {}{}".format(*image.size, image.mode, ", transparent" * image.has_transparency_data)
    except Exception as error:  # Pillow's errors for malformed files are of many kinds
        problem = f"not readable {' or '.join(formats)} ({one_line(error)})"
        raise SourceError(f"{where}: {problem}; fetch it again") from error
    raise SourceError(f"{where}: the image is {kind}, expected {side} x {side} RGB, L, P or 1")


def read_table(path: Path, columns: Sequence[str]) -> dict[str, list]:
    """Some columns of a parquet file, or of a csv file (plain or .gz) with a header line, which are strings."""
    import pyarrow.csv
    import pyarrow.parquet

    kind = "parquet" if path.suffix.lower() == ".parquet" else "csv"
    try:
        if kind == "parquet":
            file = pyarrow.parquet.ParquetFile(path)
            names = file.schema_arrow.names
        else:
            blocks = pyarrow.csv.ReadOptions(block_size=LONGEST_ROW)
            newlines = pyarrow.csv.ParseOptions(newlines_in_values=True)
            strings = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pyarrow.string()))
            table = pyarrow.csv.read_csv(path, blocks, newlines, strings)
            names = table.column_names
        if missing := [name for name in columns if name not in names]:
            raise SourceError(f"{path}: no column {', '.join(missing)}; it has {', '.join(names) or 'none'}")
        return (table if kind == "csv" else file.read(columns)).select(columns).to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not readable {kind} ({one_line(error)}); fetch it again") from error
