"""Files written whole or not at all, their hashes, and errors on one line: what every other room uses."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


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
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(shared):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                places = [importlib.util.find_spec(name) for name in names if name.count(".") == shared.count(".") + 1]
                files += [Path(place.origin) for place in places if place and Path(place.origin) not in files]
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()
