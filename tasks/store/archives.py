"""Tar archives as they are published, read once from start to end and not trusted.

Of an archive only wanted regular files are written, each under the last parts of its name, so that
`lra_release/lra_release/listops-1000/basic_val.tsv` becomes `basic_val.tsv`. Every member is checked, wanted or
not: one that is absolute, climbs out with `..`, links out, or is a device condemns the archive, and so does
one that unpacks to far more than it holds. Links are never made nor followed.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import posixpath
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import IO

from tasks.base import Data, SourceError
from tasks.store.files import one_line
from tasks.store.sources import ROOTS

MAX_RATIO = 200  # bytes unpacked per byte read: texts and pictures stay below 10, gzipped zeros reach 1,000
FREE_BYTES = 1 << 26  # unpacked before the ratio counts: it says nothing about a small archive
MAX_BYTES = 1 << 36  # of all wanted files together; LRA's texts are 10 GB
MAX_MEMBERS = 10_000_000  # LRA's release has 12 sets of 200,000 pictures
MAX_HEADER = 1 << 20  # bytes between two members: tar keeps long names there, and reads them into memory
BLOCK = 512  # bytes; tar's unit, an archive ends with a block of zeros
UNPACKED = (  # folders that the published archives unpack to, where tasks look for their files
    "",
    "aclImdb/",
    "cifar-10-batches-py/",
    "cifar-10-batches-bin/",
    "listops-1000/",
    "tsv_data/",
)
LRA_RELEASE = ("lra_release.gz", "lra_release.tar.gz", "lra_release.tar")  # names it is known by
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}  # by first bytes


@contextmanager
def opened(
    task: ModuleType, data: Data, data_dir: Path | None, scratch: Path
) -> Iterator[tuple[Path | None, dict[str, str]]]:
    """The folder a task reads, and the hash of the archive it was extracted from, if it was.

    `data_dir` is that folder unless it is an archive, or a folder that holds the task's archive under its
    published name and not the files themselves. What is extracted, into `scratch`, is removed at the end.
    """
    if task.META.generated and data_dir is not None and not Path(data_dir).exists():  # others look there
        raise SourceError(f"--data-dir {data_dir}: no such folder or archive")
    archive = data_dir and _archive(task, data, Path(data_dir))
    if not archive:
        yield data_dir, {}
        return
    try:
        scratch.mkdir()
        digest = extract(archive, scratch, task.members(data))
        yield scratch, {archive.name: digest}
    except SourceError as error:
        raise SourceError(str(error).replace(str(scratch), str(archive))) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _archive(task: ModuleType, data: Data, data_dir: Path) -> Path | None:
    """The archive that stands for the task's raw files, None if there is none or the files are there."""
    if data_dir.is_file():
        if not hasattr(task, "members"):
            raise SourceError(f"--data-dir {data_dir}: {task.META.name} reads no archives; give a folder")
        return data_dir
    present = [data_dir / name for name in getattr(task, "ARCHIVES", ()) if (data_dir / name).is_file()]
    if not present:
        return None
    globs = [root + folder + name for name in task.members(data) for root in ROOTS for folder in UNPACKED]
    return None if any(any(data_dir.glob(pattern)) for pattern in globs) else present[0]


class _Hashed:
    """The bytes of a file, counted and hashed as they are read."""

    def __init__(self, file: IO[bytes]):
        self.file, self.count, self.digest = file, 0, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.count += len(data)
        self.digest.update(data)
        return data


class _Unpacked:
    """The decompressed bytes, which may neither outgrow the compressed ones nor go beyond `allowed`."""

    def __init__(self, archive: Path, raw: _Hashed, file: IO[bytes]):
        self.archive, self.raw, self.file = archive, raw, file
        self.count = self.last = 0  # bytes read; end of the last that is not zero
        self.allowed = MAX_HEADER

    def read(self, size: int) -> bytes:
        try:
            data = self.file.read(size)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise SourceError(
                f"{self.archive}: cannot be read ({one_line(error)}); fetch it again"
            ) from error
        if content := data.rstrip(b"\0"):
            self.last = self.count + len(content)
        self.count += len(data)
        if self.count > max(FREE_BYTES, MAX_RATIO * self.raw.count):
            grown = f"{self.raw.count:,} bytes unpack to over {self.count:,}"
            raise SourceError(f"{self.archive}: {grown}, a decompression bomb; fetch it from its publisher")
        if self.count > self.allowed:
            raise SourceError(f"{self.archive}: a header of over {MAX_HEADER:,} bytes; fetch it again")
        return data


def extract(archive: Path, into: Path, wanted: Sequence[str]) -> str:
    """Write the members whose names end in one of the patterns `wanted` under `into`; the archive's sha256.

    A pattern is a path of one or more parts in which `*` and `?` stand for anything but `/`. SourceError,
    in one line, for an archive that is damaged or not to be trusted; the caller removes what was written.
    """
    from tqdm import tqdm

    match = re.compile("(?:.*/)?(" + "|".join(map(_expression, wanted)) + ")").fullmatch
    with open(archive, "rb") as file:
        start = file.read(6)
        file.seek(0)
        raw = _Hashed(file)
        opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
        stream = _Unpacked(archive, raw, opener(raw) if opener else raw)
        size = archive.stat().st_size
        with tqdm(total=size, desc=archive.name, unit="B", unit_scale=True, delay=2, disable=None) as bar:
            try:
                with tarfile.open(fileobj=stream, mode="r|") as tar:
                    _members(archive, tar, stream, match, into, lambda: bar.update(raw.count - bar.n))
                    end = tar.offset
                stream.allowed = size * MAX_RATIO + FREE_BYTES
                while stream.read(1 << 20):  # the checksum stands at the end
                    pass
            except (tarfile.TarError, ValueError, LookupError) as error:  # of malformed headers
                problem = f"not a whole tar archive ({one_line(error)})"
                raise SourceError(f"{archive}: {problem}; fetch it again") from error
    if stream.last > end or stream.count < end + BLOCK:
        raise SourceError(f"{archive}: damaged or cut short after byte {end:,}; fetch it again")
    return raw.digest.hexdigest()


def _members(
    archive: Path,
    tar: tarfile.TarFile,
    stream: _Unpacked,
    match: Callable[[str], re.Match | None],
    into: Path,
    progress: Callable[[], object],
) -> None:
    """Check every member and write those that match."""
    written = number = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # tarfile would keep all of them
        stream.allowed = tar.offset + MAX_HEADER
        number += 1
        if number > MAX_MEMBERS:
            raise SourceError(f"{archive}: more than {MAX_MEMBERS:,} members; extract it yourself")
        if fault := _fault(member):
            name = ascii(member.name[:80])
            raise SourceError(f"{archive}: member {name} {fault}; fetch it from its publisher")
        found = match(PurePosixPath(member.name).as_posix())
        if found and member.isfile():
            written += member.size
            if written > MAX_BYTES:
                raise SourceError(f"{archive}: more than {MAX_BYTES:,} bytes; extract it yourself")
            _write(archive, tar, member, into / found[1])
        progress()


def _write(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(target, "xb") as file:
            shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)
    except FileExistsError:
        raise SourceError(f"{archive}: {target.name} occurs twice; extract the one to use yourself") from None
    except OSError as error:
        why = f"{member.name} cannot be written ({one_line(error)})"
        raise SourceError(f"{archive}: {why}; free space or give another --data") from error


def _fault(member: tarfile.TarInfo) -> str | None:
    """What is wrong with a member, if anything."""
    if _leaves(member.name):
        return "would be written outside the folder"
    if not member.name.isprintable():
        return "has control characters in its name"
    if member.issym() or member.islnk():
        folder = posixpath.dirname(member.name) if member.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, member.linkname))
        return "links out of the folder" if _leaves(target) else None
    if member.issparse():
        return "is a sparse file"
    return None if member.isfile() or member.isdir() else "is neither a file nor a folder"


def _leaves(name: str) -> bool:
    """Whether a path is absolute or climbs, by the rules of Windows, which contain the others'."""
    path = PureWindowsPath(name)
    return bool(path.drive or path.root) or ".." in path.parts


def _expression(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
