"""What the benches share: contenders in processes of their own, timed in turns, and how a bench ends.

Why processes: in one process all contenders share an allocator. Whether the large tensors of one are at hand, or have
to be asked of the system page by page, then depends on what another left behind: a factor of two, seen on this suite's
own benchmark (LOG.md). Why turns: a ratio within one round survives a machine whose speed drifts.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lra.scaling.reports import write_report

ROOT = Path(__file__).parents[2]
BASELINE = "softmax"  # of every ratio


class Turns(NamedTuple):
    """Seconds of each round, and peak bytes of the first run where the system can tell."""

    seconds: list[float]
    peak_bytes: int | None


class Apart:
    """The process `python -m MODULE FACTS`, with as many threads as this one, ready to be timed.

    A context, at whose end the process ends. The first line of the process is `peak_bytes`. Raises RuntimeError when
    the process fails.
    """

    def __init__(self, module: str, facts: Mapping[str, Any]):
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


def serve(peak_bytes: int | None, run: Callable[[], Any]) -> None:
    """The other side of Apart: prints the peak; then runs, and prints the seconds, for every line of stdin.

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


def take_turns(
    module: str, facts: Mapping[str, Mapping[str, Any]], rounds: int, done: Callable[[], Any]
) -> dict[str, Turns]:
    """All names in `facts` run once in every round. What a process does before it is ready is not counted. `done` is
    called after every run."""
    with contextlib.ExitStack() as stack:
        contenders = {}
        for name, given in facts.items():
            contenders[name] = stack.enter_context(Apart(module, given))
            done()
        turns = {name: Turns([], one.peak_bytes) for name, one in contenders.items()}
        for _ in range(rounds):
            for name, one in contenders.items():
                turns[name].seconds.append(one.seconds())
                done()
    return turns


def ratios(turns: Mapping[str, Turns], name: str) -> list[float]:
    """How many times as fast as BASELINE `name` was in each round."""
    return [base / own for base, own in zip(turns[BASELINE].seconds, turns[name].seconds, strict=True)]


def finish(results: Path, what: str, measured: dict[str, Any], text: str, action: str | None = None) -> None:
    """Write the report of `bench ACTION`, whose text names the command as {command}, and print it."""
    command = shlex.join(["python", "-m", "lra", "bench", action or what, *sys.argv[3:]])
    text = text.replace("{command}", command)
    paths = write_report(results, what, command, measured, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))
