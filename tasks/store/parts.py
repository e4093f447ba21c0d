"""Work that survives an interruption: the pieces of a long generation, kept on disk until all of it is there."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from tasks.base import Meta


@contextmanager
def resumable(meta: Meta, folder: Path) -> Iterator[dict[str, Path]]:
    """What `build` of the task takes beside its usual arguments while `folder` is prepared.

    For a resumable task that is `scratch`, a folder beside `folder`: kept if the body fails, else removed.
    """
    scratch = folder.with_name(f".parts.{folder.name}")
    yield {"scratch": scratch} if meta.resumable else {}
    shutil.rmtree(scratch, ignore_errors=True)


def kept(path: Path, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """The arrays of `make()`: read from `path` if an earlier process left them there, else made and left there.

    A piece that was cut short or altered is found by the checksums of its zip file and made again.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return tuple(file[name] for name in file.files)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error):
        arrays = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, *arrays)
    os.replace(temporary, path)  # not synced: what a power cut damages is made again
    return arrays
