"""One run = one JSON file; its path is its identity, so an existing file means the run is done.

results/records/<task>/<attention>/<digest>/seed<k>.json, the predictions beside it as seed<k>.pred.gz (one
byte per test example, in the order of the split). Records hold raw counts; accuracies are computed later.
results/labels/<sha256>.gz holds the labels of a test set, so that counts can be made again without the data,
and results/counter/<by>/ the repetitions of runs, laid out as records/ is.

Records come from anybody: files are read within limits, as strict JSON, and nothing in them is executed.
"""

import gzip
import hashlib
import io
import json
import math
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lra import __version__
from lra.options import UsageError
from tasks.store.files import atomic_path, remove_temporaries

SCHEMA = "lra-record/1"
PROTOCOL = "lra-v1"  # the closed protocol; everything else is "open"
MAX_PARAMETER_RATIO = 1.10  # to softmax; beyond it, a run is outside lra-v1's equal parameter budget
LARGEST = 4 << 20  # bytes of a record or of packed predictions; committed ones have a few thousand
Report = Callable[[str], None]  # takes a line on what was left out
SECTIONS = ("schema", "suite", "task", "data", "model", "training", "result", "cost", "env", "status")


class Execution(NamedTuple):
    """What else a cell is: its rounding and, of a method that adapts to data, the data that rank 0 sees."""

    precision: str = "fp32"
    compiled: bool = False
    processes: int = 1

    @property
    def words(self) -> tuple[str, ...]:
        """What differs from one eager fp32 process, such as ("bf16", "2 processes")."""
        parts = {self.precision: self.precision != "fp32", "compiled": self.compiled}
        parts[f"{self.processes} processes"] = self.processes > 1
        return tuple(word for word, differs in parts.items() if differs)

    def __str__(self) -> str:
        return f"{self.precision}, {'compiled' if self.compiled else 'eager'}, processes: {self.processes}"

    @staticmethod
    def of(training: dict[str, Any]) -> "Execution":
        """From the training section of a record."""
        return Execution(training["precision"], training["compile"], training["world_size"])


def cell_digest(
    task: str,
    version: int,
    data: str,
    recipe: dict[str, Any],
    overrides: dict[str, str],
    val_rule: str,
    attention: str,
    config: dict[str, Any],
    execution: Execution,
) -> str:
    """sha256 that names a cell: task, data, recipe, overrides, validation rule, attention, execution.
    The default execution adds nothing, so that records of before it counted keep their digest."""
    parts = {"task": [task, version], "data": data, "recipe": recipe, "overrides": overrides}
    parts |= {"val_rule": val_rule, "attention": [attention, config]}
    if execution != Execution():
        parts["execution"] = execution
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pretraining_steps(overrides: dict[str, str], steps: int) -> int:
    """How many of a run's steps come before its labels: self-pretraining takes `pretrain.share` of them."""
    return round(float(overrides.get("pretrain.share", 0)) * steps)


def record_path(results: Path, task: str, attention: str, digest: str, seed: int) -> Path:
    """Where the record of a run lives. An outside attention `package.module:Class` becomes `package.module-Class`."""
    return Path(results) / "records" / task / attention.replace(":", "-") / digest[:16] / f"seed{seed}.json"


def predictions_path(record: Path) -> Path:
    """Where the predictions of a record live."""
    return record.with_name(record.stem + ".pred.gz")


def labels_path(results: Path, sha256: str) -> Path:
    """Where the labels of a test set live."""
    return Path(results) / "labels" / f"{sha256}.gz"


def write_record(path: Path, record: dict[str, Any], predictions: bytes | None) -> None:
    """Write predictions, then the record, each atomically: a record never exists without its predictions."""
    if predictions is not None:
        _pack(predictions_path(path), predictions)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")


def write_labels(results: Path, labels: bytes) -> None:
    """Keep the labels of a test set, one byte per example, unless they are there."""
    path = labels_path(results, hashlib.sha256(labels).hexdigest())
    if not path.exists():
        try:
            _pack(path, labels)
        except FileNotFoundError:  # another process wrote them first, and cleared this one's temporary away
            if not path.exists():
                raise
    remove_temporaries(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read one record. Raises UsageError when it is missing, too large, not strict JSON or not of this schema.
    Strict: no NaN or infinity, no number beyond 64 bits, no key twice, no text that UTF-8 cannot hold."""
    try:
        text = read_limited(path).decode()
        record = json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_int, object_pairs_hook=_once)
        json.dumps(record, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise UsageError(f"no record at {path}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UsageError(f"{path} is not a JSON record: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise UsageError(f"{path} is not a record of schema {SCHEMA!r}: found {str(schema)[:60]!r}")
    if missing := [s for s in SECTIONS if s not in record]:
        raise UsageError(f"{path} lacks {', '.join(missing)}")
    return record


def read_limited(path: Path) -> bytes:
    """The bytes of a regular file of at most LARGEST; ValueError for a link, a device or a larger one."""
    facts = Path(path).lstat()
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError("it is no regular file")
    if facts.st_size > LARGEST:
        raise ValueError(f"it has {facts.st_size:,} bytes, and the limit is {LARGEST:,}")
    return Path(path).read_bytes()


def read_predictions(path: Path, record: dict[str, Any]) -> bytes:
    """Predicted classes of a record, one byte per test example; checked against the record's hash."""
    n, sha256 = record["result"]["n_test"], record["result"]["predictions_sha256"]
    return _unpack(predictions_path(path), n, sha256, "the sha256 in its record")


def read_labels(results: Path, sha256: str, n: int) -> bytes:
    """The n labels of a test set. Raises UsageError when they are not kept, or not those of the hash."""
    return _unpack(labels_path(results, sha256), n, sha256, "its name")


def report_skipped(line: str) -> None:
    """Say on stderr what was left out, and why."""
    print(f"skipped: {line}", file=sys.stderr)


def iterate_records(results: Path, report: Report = report_skipped) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All records under a results folder, in order of path; a file that is none is reported and left out."""
    for path in sorted((Path(results) / "records").glob("*/*/*/seed*.json")):
        try:
            yield path, read_record(path)
        except UsageError as error:
            report(str(error))


def report_all(skipped: Sequence[str]) -> int:
    """Name the files that were left out, after what was shown all the same; the exit code."""
    for line in skipped:
        report_skipped(line)
    return 1 if skipped else 0


def suite_facts() -> dict[str, Any]:
    """Version of the code that runs; commit None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words):
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    # A new file is an edit, as of an attention that is being developed; records, data and tables are none.
    outputs = [f":!{name}" for name in ("results", "data", "runs", "README.md")]
    dirty = git("status", "--porcelain", "--untracked-files=normal", "--", ".", *outputs)
    return {"version": __version__, "git_commit": commit, "git_dirty": bool(dirty) if commit else None}


def finite(value: float) -> float | None:
    """JSON has no NaN: a loss that is not finite is stored as null."""
    return value if math.isfinite(value) else None


def _pack(path: Path, content: bytes) -> None:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:  # no time stamp: same run, same bytes
        file.write(content)
    with atomic_path(path) as temporary:
        temporary.write_bytes(packed.getvalue())


def _unpack(path: Path, n: int, sha256: str, what: str) -> bytes:
    """n bytes of a gzip file; never unpacks more than n + 1, whatever the file claims."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(read_limited(path))) as file:
            content = file.read(n + 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UsageError(f"{path} does not match {what}")
    return content


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is no finite number")
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"the whole number {text[:20]}... is beyond 64 bits")
    return int(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError(f"a key stands twice among {repr(sorted(k for k, _ in pairs))[:200]}")
    return unique
