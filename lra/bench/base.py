"""What the benches share: contenders in processes of their own, timed in turns, twice; points, tables, reports.

Why processes: in one process all contenders share an allocator. Whether the large tensors of one are at hand, or have
to be asked of the system page by page, then depends on what another left behind: a factor of two, seen on this suite's
own benchmark (LOG.md). Why turns: a ratio within one round survives a machine whose speed drifts. Why twice: glibc
gives blocks back to the system at once when they are large. A package with large tensors spends half of its time on
that, and whoever uses the package can switch it off. So all are measured with the allocator tuned, and as found.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import Pipe, get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from lra.bench.peers import PYPI, rivals, version
from lra.machine import PeakMemory, pick_device, set_threads, synchronize
from lra.options import UsageError
from lra.records.markup import MISSING, Bold, Grid, markdown
from lra.records.measured import BASELINE
from lra.scaling.reports import machine_line, write_report
from tasks.store.files import one_line

TUNED = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296"
SETTINGS = {"tuned": TUNED, "as_found": ""}  # GLIBC_TUNABLES of the processes that are measured
LEAST = 0.05  # seconds that the runs of one turn take together, at least
Point = dict[str, Any]
Contender = Callable[..., Mapping[str, Callable[[], Any]]]  # (name, **facts): what is timed, the whole run first


class Column(NamedTuple):
    """Sizes at which `names` are measured: so many rounds; with none, the peak of memory alone."""

    facts: dict[str, Any]
    rounds: int
    names: Sequence[str]


def twice(module: str, columns: Sequence[Column]) -> dict[str, list[Point]]:
    """The points of `interleaved`, of the contender of a module, for each of SETTINGS. Each setting has a process of
    its own: the C library reads its settings when a process starts. Raises UsageError with the message of a contender
    that fails; where one cannot be built, before anything is measured."""
    contender = importlib.import_module(module).contender
    for name, facts in {name: column.facts for column in columns[::-1] for name in column.names}.items():
        contender(name, **facts)
    measured, spawn = {}, get_context("spawn")
    for setting, tunables in SETTINGS.items():
        print(f"allocator {setting.replace('_', ' ')}", file=sys.stderr)
        with mock.patch.dict(os.environ, GLIBC_TUNABLES=tunables), ProcessPoolExecutor(1, spawn) as fresh:
            try:
                measured[setting] = fresh.submit(points_of, module, columns, torch.get_num_threads()).result()
            except BrokenProcessPool:
                raise UsageError("the process that measures was killed") from None
    return measured


def points_of(module: str, columns: Sequence[Column], threads: int) -> list[Point]:
    """`interleaved`, in the process of one setting."""
    return interleaved(importlib.import_module(module).contender, columns, threads)


def interleaved(contender: Contender, columns: Sequence[Column], threads: int) -> list[Point]:
    """One point for each name and column: all names of a column run once in every round. seconds: median over rounds,
    all of them in `rounds`. ratio: the median over rounds of (seconds of softmax) / (seconds of the name). parts:
    medians of what else the contender times. peak_bytes: of one run, above a process that is ready for it; None where
    the system cannot tell."""
    names, points = list(dict.fromkeys(name for column in columns for name in column.names)), []
    ask = {name: apart(contender, name, [c for c in columns if name in c.names], threads) for name in names}
    with tqdm(total=sum(len(c.names) * (1 + c.rounds) for c in columns), disable=None, unit="turn") as bar:

        def turn(name):
            answer = ask[name]()
            bar.update()
            return answer

        for facts, rounds, there in columns:
            peaks = {name: turn(name) for name in there}
            turns = [{name: turn(name) for name in there} for _ in range(rounds)]
            for name in there:
                point = {"name": name, "version": version(name), **facts, "peak_bytes": peaks[name]}
                if turns:
                    softmax = [next(iter(t[BASELINE].values())) for t in turns]
                    whole, *parts = ([t[name][part] for t in turns] for part in turns[0][name])
                    point |= {"seconds": statistics.median(whole), "rounds": whole}
                    point["ratio"] = round(quartiles(softmax, whole)[1], 4)
                    point["parts"] = dict(zip([*turns[0][name]][1:], map(statistics.median, parts), strict=True))
                points.append(point)
    return points


def apart(contender: Contender, name: str, columns: Sequence[Column], threads: int) -> Callable[[], Any]:
    """`answers`, given by a process of its own: a function that returns the next one. It raises UsageError where the
    contender fails. The process ends with this one."""
    ours, theirs = Pipe()

    def serve() -> None:
        ours.close()
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            set_threads(threads)
            given = answers(contender, name, columns)
            for _ in iter(theirs.recv, 0):
                try:
                    theirs.send(next(given))
                except Exception as error:  # whatever a package raises
                    theirs.send(told(error))

    def ask() -> Any:
        try:
            ours.send(None)
            answer = ours.recv()
        except (EOFError, OSError):
            answer = "killed"
        if isinstance(answer, str):
            raise UsageError(f"{name}: {answer}")
        return answer

    # A fork of a process that has loaded its libraries, and computed nothing.
    get_context("fork").Process(target=serve, daemon=True).start()
    theirs.close()
    return ask


def told(error: Exception) -> str:
    """An error in one line, with its type."""
    return f"{type(error).__name__}: {one_line(error)}"


def answers(contender: Contender, name: str, columns: Sequence[Column]) -> Iterator[Any]:
    """What a contender has to tell, in order, each measured when it is asked for: in each column the peak of one run
    in bytes, then in every round the seconds of what it times."""
    first, *_ = contender(name, **columns[0].facts).values()
    first()  # libraries load
    for facts, rounds, _ in columns:
        timed = contender(name, **facts)
        release()
        meter = PeakMemory(pick_device("cpu"))
        next(iter(timed.values()))()
        peak = meter.read()
        release()
        yield peak
        for _ in range(rounds):
            seconds = {part: round(seconds_of(run), 9) for part, run in timed.items()}
            release()
            yield seconds


def seconds_of(run: Callable[[], Any], device: str = "cpu") -> float:
    """Median of as many runs as take LEAST seconds, after one that does not count: others had caches and memory in
    between, and a virtual machine may have given memory back to its host, whose first touch is three times as slow."""
    run()
    seconds: list[float] = []
    while sum(seconds) < LEAST:
        synchronize(torch.device(device))
        start = time.perf_counter()
        run()
        synchronize(torch.device(device))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def release() -> None:
    """Give the memory that the C library holds for later back to the system, where it can (glibc), so that the machine
    needs the memory of one contender and not of all."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def quartiles(above: Sequence[float], below: Sequence[float] | None = None) -> list[float]:
    """Lower quartile, median and upper quartile of numbers, or of ratios, round by round."""
    values = above if below is None else np.divide(above, below)
    return np.quantile(values, (0.25, 0.5, 0.75)).tolist()


def whole_numbers(option: str, text: str, like: str) -> list[tuple[int, ...]]:
    """`32x128,4x4096` as [(32, 128), (4, 4096)]: as many factors as `like` has, each at least 1."""
    try:
        numbers = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or any(len(n) != len(like.split("x")) or min(n) < 1 for n in numbers):
        raise UsageError(f"{option} takes whole numbers above 0, comma-separated, such as {like}; got {text!r}")
    return list(dict.fromkeys(numbers))


# Tables


def table(points: Sequence[Point], column: Callable[[Point], str], cell: Callable[[Point], str]) -> str:
    """A row for each name, a column for each `column(point)`."""
    cells = {(p["name"], column(p)): cell(p) for p in points}
    versions = {p["name"]: f" {p['version']} (PyPI)" if p.get("version") else "" for p in points}
    columns = list(dict.fromkeys(map(column, points)))
    rows = [[n.removeprefix(PYPI) + v, *(cells.get((n, c), MISSING) for c in columns)] for n, v in versions.items()]
    return markdown([Grid(["attention", *columns], rows)])


def against(points: Sequence[Point], column: Callable[[Point], str]) -> str:
    """How many times as fast each method of ours is as each kind of rival, the strongest in bold."""
    timed = {(p["name"], column(p)): p["rounds"] for p in points if "rounds" in p}
    columns, rows = list(dict.fromkeys(c for _, c in timed)), {}
    for name, c in timed:
        found = {}
        for kind, names in rivals(name, [n for n, there in timed if there == c]).items():
            best = min(names, key=lambda n: statistics.median(timed[n, c]))
            found[kind] = quartiles(timed[best, c], timed[name, c])
        outside = [ratio[1] for kind, ratio in found.items() if not kind.startswith("itself")]
        for kind, (low, ratio, high) in found.items():
            text = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
            strongest = not kind.startswith("itself") and ratio == min(outside)
            rows.setdefault((name, kind), {})[c] = Bold(text) if strongest else text
    grid = [[*row, *(cells.get(c, MISSING) for c in columns)] for row, cells in rows.items()]
    return markdown([Grid(["attention", "times as fast as", *columns], grid)])


def milliseconds(point: Point) -> str:
    """A cell of a table of times: median and quartiles."""
    low, median, high = (f"{1e3 * s:,.1f}" for s in quartiles(point["rounds"]))
    return f"{median} [{low}, {high}]"


def megabytes(point: Point) -> str:
    """A cell of a table of memory."""
    return MISSING if point["peak_bytes"] is None else f"{point['peak_bytes'] / 1e6:,.0f}"


def both(measured: Mapping[str, Sequence[Point]], column: Callable[[Point], str], more: Callable[..., str]) -> str:
    """The tables of each setting, `more(points)` behind them."""
    tuned = f"Allocator tuned for all\n\n`GLIBC_TUNABLES={TUNED}` in the environment of every contender."
    found = "As users find the packages\n\nThe same without a setting of the allocator."
    text, titles = "", {"tuned": tuned, "as_found": found}
    for setting, points in measured.items():
        timed = [p for p in points if "rounds" in p]
        text += f"""
## {titles[setting]}

How many times as fast (median of the ratios within a round, [quartiles]); bold: against the strongest rival.

{against(timed, column)}
Milliseconds (median [quartiles]).

{table(timed, column, milliseconds)}
Peak memory of one run in MB, above a process that is ready for it.

{table(points, column, megabytes)}{more(timed)}"""
    return text


def finish(results: Path, what: str, action: str, measured: dict[str, Any], text: str) -> None:
    """Write the report of `bench ACTION`, whose text names the command as {command}, and print it."""
    command = shlex.join(["python", "-m", "lra", "bench", action, *sys.argv[3:]])
    text = text.replace("{command}", command) + f"\n{machine_line()}\n"
    paths = write_report(results, what, command, measured, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))
