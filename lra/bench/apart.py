"""What is compared, each in a process of its own, taking turns.

In one process all would share an allocator, and whether the large tensors of one are at hand or have to be asked of
the system page by page would depend on what another left behind: a factor of two, seen on this suite's own
benchmark (LOG.md). Apart, each runs as it does for whoever uses nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]


class Turns(NamedTuple):
    """Seconds of each round, and peak bytes of the first run where the system can tell."""

    seconds: list[float]
    peak_bytes: int | None


class Apart:
    """`python -m MODULE FACTS`, with as many threads as here, ready to be timed. `peak_bytes` is what it says first.

    A context, at whose end the process ends. Raises RuntimeError when it fails.
    """

    def __init__(self, module: str, facts: Mapping[str, Any]):
        self.facts = {**facts, "threads": torch.get_num_threads()}
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, json.dumps(self.facts)], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def __enter__(self) -> Apart:
        self.peak_bytes = self._answer()
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        with self.process, self.errors:
            pass

    def seconds(self) -> float:
        """Of one run."""
        with contextlib.suppress(BrokenPipeError):  # the answer tells why
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        self.__exit__()
        raise RuntimeError(f"{' '.join(map(str, self.facts.values()))}: {said[-1] if said else 'killed'}")


def serve(peak_bytes: int | None, run: Callable[[], Any]) -> None:
    """The process's side: say the peak, then run, and say the seconds, for every line that comes in.

    Of two runs the second counts: others had caches and memory in between, and on a virtual machine, which may have
    given memory back to its host, the first touch of it is three times as slow. What the allocator holds is then
    released, so that a machine needs the memory of one contender and not of all.
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
    """Of each name in `facts`: all run once in every round, so that a slow moment hits them all; what each process
    does before it is ready is not counted. `done` is called after every run."""
    with contextlib.ExitStack() as stack:
        each = {}
        for name, given in facts.items():
            each[name] = stack.enter_context(Apart(module, given))
            done()
        found = {name: Turns([], one.peak_bytes) for name, one in each.items()}
        for _ in range(rounds):
            for name, one in each.items():
                found[name].seconds.append(one.seconds())
                done()
    return found
