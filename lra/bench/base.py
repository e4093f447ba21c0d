"""What the benches share: contenders in processes of their own, timed in turns, their points, tables and reports.

Why processes: in one process all contenders share an allocator. Whether the large tensors of one are at hand, or have
to be asked of the system page by page, then depends on what another left behind: a factor of two, seen on this suite's
own benchmark (LOG.md). Why turns: a ratio within one round survives a machine whose speed drifts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lra.bench.peers import PYPI, version
from lra.machine import PeakMemory, pick_device, set_threads
from lra.options import UsageError
from lra.records.markup import MISSING, Grid, markdown
from lra.records.measured import BASELINE
from lra.scaling.reports import machine_line, write_report

ROOT = Path(__file__).parents[2]
Facts = Mapping[str, Any]  # what a contender is: name, B sequences of N tokens, M features ...


class Apart:
    """The process `python -m MODULE FACTS`, with as many threads as this one, ready to be timed.

    A context, at whose end the process ends. The first line of the process is `peak_bytes`. Raises RuntimeError when
    the process fails.
    """

    def __init__(self, module: str, facts: Facts):
        self.facts = {**facts, "threads": torch.get_num_threads()}
        self.errors = tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        command = [sys.executable, "-m", module, json.dumps(self.facts)]
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)

    def __enter__(self) -> Apart:
        self.peak_bytes = self._answer()
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        with self.process, self.errors:
            pass

    def seconds(self) -> float:
        """Of one run."""
        with contextlib.suppress(BrokenPipeError):  # `_answer` says why
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        self.__exit__()
        raise RuntimeError(f"{' '.join(map(str, self.facts.values()))}: {lines[-1] if lines else 'killed'}")


def alone(contender: Callable[..., Callable[[], Any]]) -> None:
    """The other side of Apart, for a module whose `contender(**facts)` is a function to be timed: a short run, so
    that libraries are loaded, the peak of a whole one, then `serve`."""
    facts = json.loads(sys.argv[1])
    set_threads(facts.pop("threads"))
    contender(**short(facts))()
    run = contender(**facts)
    meter = PeakMemory(pick_device("cpu"))
    run()
    serve(meter.read(), run)


def short(facts: Facts) -> dict[str, Any]:
    """One sequence, the shortest that every method takes."""
    return {**facts, "B": 1, "N": facts["M"]}


def serve(peak_bytes: int | None, run: Callable[[], Any]) -> None:
    """Print the peak; then run, and print the seconds, for every line of stdin.

    Of two runs the second counts: others had caches and memory in between, and a virtual machine may have given memory
    back to its host, whose first touch is three times as slow. What the allocator holds is then released, so that the
    machine needs the memory of one contender and not of all.
    """
    print(json.dumps(peak_bytes), flush=True)
    for _ in sys.stdin:
        run()
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        release()
        print(json.dumps(seconds), flush=True)


def release() -> None:
    """Give the memory that the C library holds for later back to the system, where it can (glibc)."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def compare(
    module: str, names: Sequence[str], facts: Facts, rounds: int, done: Callable[[], Any]
) -> list[dict[str, Any]]:
    """One point for each name: all run once in every round. `done` is called after every run.

    ratio, ratio_range: median, least and greatest over rounds of (seconds of softmax) / (seconds of the name).
    peak_bytes: of one run, above a process that is ready for it; None where the system cannot tell.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name in names:
            contenders[name] = stack.enter_context(Apart(module, {"name": name, **facts}))
            done()
        for _ in range(rounds):
            for name, contender in contenders.items():
                seconds[name].append(contender.seconds())
                done()
    points = []
    for name, own in seconds.items():
        each = [base / s for base, s in zip(seconds[BASELINE], own, strict=True)]
        low, ratio, high = (round(pick(each), 3) for pick in (min, statistics.median, max))
        point = {"name": name, **facts, "seconds": round(statistics.median(own), 6), "ratio": ratio}
        point |= {"ratio_range": [low, high], "peak_bytes": contenders[name].peak_bytes}
        points.append(point | {"version": version(name[len(PYPI) :]) if name.startswith(PYPI) else None})
    return points


def whole_numbers(option: str, text: str, like: str) -> list[tuple[int, ...]]:
    """`32x128,4x4096` as [(32, 128), (4, 4096)]: as many factors as `like` has, each at least 1."""
    try:
        numbers = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or any(len(n) != len(like.split("x")) or min(n) < 1 for n in numbers):
        raise UsageError(f"{option} takes whole numbers above 0, comma-separated, such as {like}; got {text!r}")
    return list(dict.fromkeys(numbers))


def table(points: list[dict[str, Any]], column: Callable[[dict], str], cell: Callable[[dict], str]) -> str:
    """A row for each name, a column for each `column(point)`."""
    cells = {(p["name"], column(p)): cell(p) for p in points}
    versions = {p["name"]: f" {p['version']} (PyPI)" if p.get("version") else "" for p in points}
    columns = list(dict.fromkeys(map(column, points)))
    rows = [
        [name.removeprefix(PYPI) + version, *(cells.get((name, c), MISSING) for c in columns)]
        for name, version in versions.items()
    ]
    return markdown([Grid(["attention", *columns], rows)])


def milliseconds(point: dict[str, Any]) -> str:
    """A cell of a table of times."""
    return f"{1e3 * point['seconds']:,.1f} ({point['ratio']:.2f})"


def megabytes(point: dict[str, Any]) -> str:
    """A cell of a table of memory."""
    return MISSING if point["peak_bytes"] is None else f"{point['peak_bytes'] / 1e6:,.0f}"


def finish(results: Path, what: str, action: str, measured: dict[str, Any], text: str) -> None:
    """Write the report of `bench ACTION`, whose text names the command as {command}, and print it."""
    command = shlex.join(["python", "-m", "lra", "bench", action, *sys.argv[3:]])
    text = text.replace("{command}", command) + f"\n{machine_line()}\n"
    paths = write_report(results, what, command, measured, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))
