"""Tar archives as they are published, read once from start to end and not trusted.

Of an archive only wanted regular files are written, each under the last parts of its name: of
`lra_release/lra_release/listops-1000/basic_val.tsv`, `basic_val.tsv`. Links are never made nor followed. One bad
member condemns the archive, wanted or not: Python's `data` filter (tarfile.data_filter, PEP 706) names members that
would land outside, link outside or are devices. So does a size: an archive may not unpack to far more than it holds.
"""

import filecmp
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import IO

from tasks.base import Data, SourceError
from tasks.store.files import one_line, open_bytes, sha256_file
from tasks.store.sources import ROOTS, listed

# Bytes that an archive may unpack to: MAX_RATIO for each of its own, but at least FREE_BYTES (the ratio says
# nothing about a small archive) and at most MAX_BYTES. Texts and pictures stay below a ratio of 10, gzipped
# zeros reach 1,000; the texts of LRA's release are 10 GB.
MAX_RATIO, FREE_BYTES, MAX_BYTES = 200, 1 << 26, 1 << 37
BLOCK = 512  # bytes; tar's unit, an archive ends with a block of zeros
# Folders that the published archives unpack to, where tasks look for their files
UNPACKED = ("", "aclImdb/", "cifar-10-batches-py/", "cifar-10-batches-bin/", "listops-1000/", "tsv_data/")
LRA_RELEASE = ("lra_release.gz", "lra_release.tar.gz", "lra_release.tar")  # names it is known by


@contextmanager
def opened(task: ModuleType, data: Data, data_dir: Path | None, scratch: Path) -> Iterator[tuple]:
    """The folder a task reads, and {name: sha256} of the archive it was extracted from, if it was.

    `data_dir` is that folder unless it is an archive, or a folder that holds the task's archive under its
    published name and not the files themselves. What is extracted, into `scratch`, is removed at the end.
    """
    folder = Path(data_dir or ".")
    if not folder.exists():
        raise SourceError(f"--data-dir {folder}: no such folder or archive")
    if folder.is_file() and not hasattr(task, "members"):
        raise SourceError(f"--data-dir {folder}: {task.META.name} reads no archives; give a folder")
    names = getattr(task, "ARCHIVES", ()) if data_dir else ()
    archive = folder if folder.is_file() else next((folder / n for n in names if (folder / n).is_file()), None)
    if archive and archive != folder:
        globs = (root + parent + name for name in task.members(data) for root in ROOTS for parent in UNPACKED)
        archive = None if any(listed(folder, pattern) for pattern in globs) else archive
    if not archive:
        yield data_dir, {}
        return
    try:
        scratch.mkdir()
        extract(archive, scratch, task.members(data))
        yield scratch, {archive.name: sha256_file(archive)}
    except SourceError as error:
        raise SourceError(str(error).replace(str(scratch), str(archive))) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Unpacked:
    """The decompressed bytes of an archive."""

    def __init__(self, archive: Path, file: IO[bytes]):
        self.archive, self.file = archive, file
        self.limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * archive.stat().st_size))
        self.count = self.end = 0  # bytes read; where the last of them that is not zero ends

    def read(self, size: int) -> bytes:
        try:
            data = self.file.read(size)
        except OSError as error:  # `_write` would take it for one of writing
            raise EOFError(one_line(error)) from error
        if content := data.rstrip(b"\0"):
            self.end = self.count + len(content)
        self.count += len(data)
        self.check(self.count)
        return data

    def check(self, size: int) -> None:
        """SourceError if the archive unpacks to `size` bytes and may not."""
        if size > self.limit:
            problem = f"unpacks to more than {self.limit:,} bytes, a decompression bomb"
            raise SourceError(f"{self.archive}: {problem}; fetch it from its publisher")


def extract(archive: Path, into: Path, wanted: Sequence[str]) -> None:
    """Write the members whose names end in one of the patterns `wanted` under `into`.

    A pattern is a path of one or more parts, in upper or lower case, in which `*` and `?` stand for anything but `/`;
    `*` stands for no name with a leading dot (see sources.listed). SourceError, in one line, for an archive that is
    damaged or not to be trusted; the caller removes what was written.
    """
    from tqdm import tqdm

    patterns = (re.escape(name).replace(r"\*", r"(?!\.)[^/]*").replace(r"\?", "[^/]") for name in wanted)
    match, depths = re.compile(f"(?:.*/)?({'|'.join(patterns)})", re.I).fullmatch, {}
    with open_bytes(archive) as file, tqdm(desc=archive.name, unit=" files", delay=2, disable=None) as bar:
        stream = _Unpacked(archive, file)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # tarfile would keep all of them
                    stream.check(tar.offset)  # before anything is unpacked
                    _check(archive, member, into)
                    path = match(PurePosixPath(member.name).as_posix())
                    if path and member.isfile():
                        _write(archive, tar, member, into / path[1], depths)
                    bar.update()
                end = tar.offset
            while stream.read(1 << 20):  # the checksum stands at the end
                pass
        except (tarfile.TarError, ValueError, LookupError) as error:  # of malformed headers
            raise SourceError(f"{archive}: not a whole tar archive ({one_line(error)}); fetch it again") from error
    if stream.end > end or stream.count < end + BLOCK:  # tarfile takes a damaged header for the end
        raise SourceError(f"{archive}: damaged or cut short after byte {end:,}; fetch it again")


def _check(archive: Path, member: tarfile.TarInfo, into: Path) -> None:
    """SourceError for a member that no published archive has."""
    problem = "a sparse file" if member.issparse() else "its name" if not member.name.isprintable() else ""
    try:
        if tarfile.data_filter(member, str(into)).name != member.name:  # the filter strips a leading slash
            problem = "AbsolutePathError"
    except tarfile.FilterError as error:
        problem = type(error).__name__
    if problem:
        problem = f"member {ascii(member.name[:80])} is refused ({problem})"
        raise SourceError(f"{archive}: {problem}; fetch it from its publisher")


def _write(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, depths: dict[Path, int]) -> None:
    """Write one file. Of two that differ, the deeper in lra_release/ stays (see ROOTS); `depths` holds that of each."""
    depth, copy = member.name.split("/").count("lra_release"), target.with_name(f".{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(copy, "wb") as file:
            shutil.copyfileobj(tar.extractfile(member), file, 1 << 20)
        if target in depths and not filecmp.cmp(copy, target, shallow=False):
            if depth == depths[target]:
                raise SourceError(f"{archive}: {target.name} occurs twice; extract the one to use yourself")
            choice = f"of two different {target.name} the one in lra_release/lra_release is read"
            print(f"{archive}: {choice}", file=sys.stderr)
        if depth >= depths.get(target, depth):
            copy.replace(target)
            depths[target] = depth
        copy.unlink(missing_ok=True)
    except OSError as error:
        problem = f"{member.name} cannot be written ({one_line(error)})"
        raise SourceError(f"{archive}: {problem}; free space or give another --data") from error
