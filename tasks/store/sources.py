"""Raw data: finding it, fetching it, checking it, and splitting it the same way everywhere.

Whatever is missing, unreachable, corrupt or of an unexpected shape becomes a one-line SourceError that
names the value and the way out. Nothing here unpickles or executes what it reads.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np

from tasks.base import Data, SourceError
from tasks.store.files import one_line, sha256_file

# Folders below --data-dir that are looked into, in this order. The published archive holds ListOps and Pathfinder-128
# twice; the inner copy is the one that the published dataset_setup.sh takes.
ROOTS = ("", "lra_release/lra_release/", "lra_release/")
CHUNK = 64  # items per unit of work of a thread


def check_source(source: str, data_dir: Path | None, accepted: Sequence[str] = ("embedded", "hub", "local")) -> None:
    """Raise SourceError for a source the task does not have, or a data_dir that would be ignored."""
    if source not in accepted:
        raise SourceError(f"source {source!r} is not one of {', '.join(accepted)}")
    if (source == "local") != (data_dir is not None):
        given = "no --data-dir" if data_dir is None else f"--data-dir {data_dir}"
        raise SourceError(f"--source {source} with {given}: it goes with --source local alone")


def in_chunks(work: Callable[[int, int], None], count: int, workers: int, what: str) -> None:
    """Call work(start, end) on chunks of 0..count; the bar, in units of `what`, appears after two seconds."""
    from tqdm import tqdm

    bounds = [*range(0, count, CHUNK), count]
    bar = tqdm(total=count, unit=f" {what}", delay=2, disable=None, leave=False)  # None: not a terminal
    with bar, ThreadPoolExecutor(workers) as pool:
        for (start, end), _ in zip(pairwise(bounds), pool.map(work, bounds, bounds[1:])):
            bar.update(end - start)


def read_folder(paths: Sequence[Path], workers: int) -> tuple[list[bytes], str]:
    """Contents of many small files of one folder, and one hex sha256: over the sorted `name sha256` lines."""
    contents = [b""] * len(paths)

    def read(start: int, end: int) -> None:
        contents[start:end] = [path.read_bytes() for path in paths[start:end]]

    in_chunks(read, len(paths), workers, "files")
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    lines = sorted(f"{path.name} {digest}\n" for path, digest in zip(paths, digests, strict=True))
    return contents, hashlib.sha256("".join(lines).encode()).hexdigest()


def hub_file(repo: str, name: str, *, revision: str, sha256: str | None = None) -> Path:
    """Path of one file of a Hugging Face dataset repository at a pinned revision, in the hub's cache.

    SourceError if the file cannot be had or if its sha256 is not the expected one. Without `sha256` that is the one
    that the commit names: the hub's cache stores a large file under it.
    """
    import huggingface_hub

    try:
        path = Path(huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=revision))
    except Exception as error:  # offline, absent, refused: the HTTP library's errors differ by hub version
        problem = f"{repo}/{name} at {revision[:12]}: cannot be fetched ({one_line(error)})"
        ways_out = "--data-dir DIR with a copy of it, or --source embedded, or a connection with HF_HUB_OFFLINE unset"
        raise SourceError(f"{problem}; use {ways_out}") from error
    blob = path.resolve().name
    expected = sha256 or (blob if re.fullmatch("[0-9a-f]{64}", blob) else None)
    if expected and (digest := sha256_file(path)) != expected:
        raise SourceError(f"{path}: sha256 is {digest}, expected {expected}; delete it and fetch it again")
    return path


def listed(folder: Path, pattern: str) -> list[Path]:
    """What matches a glob pattern below a folder, in order. Upper and lower case are alike: `0.PNG` is a `*.png`.

    Names with a leading dot are no data: macOS writes `._0.png` beside `0.png`.
    """
    either = re.sub("[A-Za-z]", lambda letter: f"[{letter[0].lower()}{letter[0].upper()}]", pattern)
    found = Path(folder).glob(either)
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def find_one(data_dir: Path, names: Sequence[str], what: str) -> Path:
    """The first of several names or glob patterns that exists in data_dir (file or folder)."""
    if found := next(filter(None, (listed(data_dir, root + name) for name in names for root in ROOTS)), None):
        return found[0]
    raise SourceError(f"--data-dir {data_dir}: {what} not found; looked for {', '.join(names)}")


def distribution(package: str, version: str) -> metadata.Distribution:
    """An installed PyPI package, which is not imported; `version` is the one that SourceError says to install."""
    try:
        return metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise SourceError(f"package {package} is not installed; run: pip install {package}=={version}") from error


def package_file(package: str, version: str, relative: str) -> Path:
    """Path of a file of an installed PyPI package of this very version (`relative` to site-packages)."""
    installed, way_out = distribution(package, version), f"run: pip install {package}=={version}"
    if installed.version != version:
        raise SourceError(f"package {package} is {installed.version}, expected {version}; {way_out}")
    if not (path := Path(str(installed.locate_file(relative)))).is_file():
        raise SourceError(f"{path}: missing from package {package}; {way_out} --force-reinstall")
    return path


def seeded_order(
    contents: Sequence[bytes], labels: np.ndarray, seed: int, pool: np.ndarray | None = None
) -> np.ndarray:
    """Indices 0..n-1, or those in `pool`, in a random order given by the seed and by the examples, not by their places.

    An example's place is the sha256 of (seed, label, content), so the order needs no random generator, is the same on
    every platform, and identical examples stand next to each other. Classes are then interleaved: any prefix holds
    each in its overall proportion, to within an example or so.
    """
    salt = f"split {seed}".encode()
    pool = range(len(contents)) if pool is None else pool
    keys = {i: hashlib.sha256(salt + b"%d " % labels[i] + contents[i]).digest() for i in pool}
    order = np.array(sorted(keys, key=keys.__getitem__), np.int64)
    quantile = np.empty(len(order))
    for label in np.unique(labels[order]):
        members = labels[order] == label
        quantile[members] = (np.arange(members.sum()) + 0.5) / members.sum()
    return order[np.argsort(quantile, kind="stable")]


def taken(data: Data, split: str, present: int, where: object) -> int:
    """How many of the `present` examples a split takes: what `data` asks for, 0 = all. SourceError if too few."""
    wanted = getattr(data, split)
    if max(wanted, 1) > present:
        way_out = "give all of them, or use a smaller preset"
        raise SourceError(f"data.{split}={wanted}: {where} has {present:,} examples; {way_out}")
    return wanted or present


def stretches(labels: np.ndarray, sizes: dict[str, int], seed: int, gap: int) -> dict[str, np.ndarray]:
    """Indices 0..n-1 by split, of a source in which examples that are alike stand together: no shuffling parts them.

    Of each label, a split is one stretch of consecutive examples, the last continued at the start of the source.
    `sizes` are examples of all labels together, and "train" has the rest. The seed says where the first stretch
    starts. The `gap` examples between two stretches are in no split, because they may be like those on both sides.
    """
    start = int.from_bytes(hashlib.sha256(f"stretches {seed}".encode()).digest()[:8], "big") / 2**64
    parts: dict[str, list] = {name: [] for name in (*sizes, "train")}
    ends = np.cumsum(np.bincount(labels)).tolist()
    for label, (before, after) in enumerate(pairwise([0, *ends])):
        places = np.roll(np.flatnonzero(labels == label), -int(start * (after - before)))
        for name, size in sizes.items():  # of every label its share, rounded so that all of them make `size`
            share = round(size * after / len(labels)) - round(size * before / len(labels))
            parts[name].append(places[:share])
            places = places[share + gap :]
        parts["train"].append(places[: max(0, len(places) - gap)])
    return {name: np.concatenate(part) for name, part in parts.items()}


def choose(train: np.ndarray, test: np.ndarray, data: Data) -> dict[str, np.ndarray]:
    """Indices of the three splits out of the orders of two disjoint pools; validation is held out of `train`.

    `data.val` come first, then `data.train` (0 = all the rest); `data.test` are of `test` (0 = all).
    """
    if data.val < 1:
        raise SourceError(f"data.val={data.val}: validation is held out of train, at least 1 example")
    if (asked := data.val + max(data.train, 1)) > len(train):
        problem = f"data.train={data.train} and data.val={data.val} need {asked} examples, there are {len(train)}"
        raise SourceError(f"{problem}; lower them (data.train=0: all that validation leaves) or use another source")
    val, rest = np.split(train, [data.val])
    return {"train": rest[: data.train or None], "val": val, "test": test[: taken(data, "test", len(test), "test")]}
