"""Which prepared arrays need no hashing again: those of the size and time they had when their hashes were right."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tasks.store.files import atomic_path

STAMP = "verified.json"
SETTLED = 2  # seconds; a file changed within the resolution of its time looks unchanged


def _stamp(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What stays as it is while the arrays are the ones the manifest was found to describe."""
    facts = {name: (folder / name).stat() for name in manifest["arrays"]}
    sizes_and_times = {name: [fact.st_size, fact.st_mtime_ns] for name, fact in facts.items()}
    return {"manifest": manifest["sha256"], "arrays": sizes_and_times}


def unchanged(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether the arrays are those whose hashes were found right before."""
    try:
        return json.loads((folder / STAMP).read_text()) == _stamp(folder, manifest)
    except (OSError, ValueError):
        return False


def remember(folder: Path, manifest: dict[str, Any]) -> None:
    """Note that every hash was found right, unless a file is so new that a change could go unseen."""
    with suppress(OSError):  # a folder that cannot be written to is hashed every time
        stamp = _stamp(folder, manifest)
        newest = max(time_ns for _, time_ns in stamp["arrays"].values())
        if time.time() - newest / 1e9 > SETTLED:
            with atomic_path(folder / STAMP) as path:
                path.write_text(json.dumps(stamp))
