"""Reading Pathfinder from the layout of the LRA release.

    pathfinder32/curv_contour_length_14/imgs/K/sample_I.png
    pathfinder32/curv_contour_length_14/metadata/K.npy

The metadata are text in the release and numpy arrays of strings as the published program writes them; a row
starts with folder, file, index and label. Nothing is unpickled, and names must be of this very form.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from tasks.base import Data, SourceError
from tasks.store.files import label_of, lines, one_line, open_bytes, read_picture, sha256_file
from tasks.store.sources import ROOTS, in_chunks, listed, seeded_order

# By dashes per curve
FOLDERS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
EMPTY = {("curv_baseline", "imgs/0", "sample_172.png")}  # files the release is known to hold empty


def find(data_dir: Path | None, size: int, contour_length: int) -> Path | None:
    """The folder of the LRA release that holds these images, None if data_dir has nothing of this size."""
    if data_dir is None or contour_length not in FOLDERS:
        return None
    present = [path for root in ROOTS for path in listed(data_dir, f"{root}pathfinder{size}") if path.is_dir()]
    if not present:
        return None
    folder = present[0] / FOLDERS[contour_length]
    if not listed(folder, "metadata/*.npy"):
        raise SourceError(f"{folder}/metadata: no .npy files; add them, or leave out --data-dir to generate")
    return folder


def _rows(path: Path) -> list[tuple[str, str, int]]:
    """(folder, file, label) of each row of a metadata file: text, or a numpy array of strings."""
    try:
        with open(path, "rb") as file:
            is_array = file.read(6) == b"\x93NUMPY"
        if is_array:
            table = np.load(path, allow_pickle=False).astype(str).tolist()
        else:
            table = [line.decode("ascii").split() for _, line in lines(path)]
    except (OSError, ValueError, EOFError, MemoryError) as error:
        raise SourceError(f"{path}: not readable metadata ({one_line(error)}); fetch it again") from error
    form, rows = re.compile(r"imgs/\d+ sample_\d+\.png \d+ \S+", re.ASCII), []
    for number, row in enumerate(table, 1):
        if not isinstance(row, list) or not form.fullmatch(" ".join(row[:4])):
            raise SourceError(f"{path}, row {number}: {str(row)[:60]} is not `imgs/K sample_I.png I 0|1 ...`")
        rows.append((row[0], row[1], label_of(row[3], 2, f"{path}, row {number}")))
    return rows


def read(folder: Path, data: Data, size: int, workers: int) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Images, labels and hashes of as many files of a release folder as `data` asks for, in seeded order."""
    metadata = listed(folder, "metadata/*.npy")
    rows = sorted({row for path in metadata for row in _rows(path) if (folder.name, *row[:2]) not in EMPTY})
    asked = data.test + data.val + max(data.train, 1)
    if asked > len(rows):
        way_out = "give all of them, or use a smaller preset"
        raise SourceError(f"{folder}: {len(rows)} images, but the preset takes {asked}; {way_out}")
    names = [f"{imgs}/{file}".encode() for imgs, file, _ in rows]
    order = seeded_order(names, np.array([label for _, _, label in rows]), data.seed)
    rows = [rows[i] for i in order[: asked if data.train else None]]
    images, digests = np.empty((len(rows), size, size), np.uint8), [b""] * len(rows)

    def fill(start: int, end: int) -> None:
        for i in range(start, end):
            path = folder / rows[i][0] / rows[i][1]
            with open_bytes(path) as file:
                raw = file.read()
            images[i], digests[i] = read_picture(raw, size, ["PNG"], str(path))[0], hashlib.sha256(raw).digest()

    in_chunks(fill, len(rows), workers, "images")
    files = {f"{folder.name}/metadata/{path.name}": sha256_file(path) for path in metadata}
    files[f"{folder.name}/imgs ({len(rows)} read)"] = hashlib.sha256(b"".join(digests)).hexdigest()
    return images, np.array([row[2] for row in rows], np.uint8), files
