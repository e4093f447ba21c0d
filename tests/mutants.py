"""Single faults planted in the source, and the test that notices each: python -m tests.mutants

tests/mutants.txt lists them: `# AREA`, `FILE: TESTS`, and `  WHAT IS WRONG :: OLD TEXT => NEW TEXT ## REASON`, the last
part where no test can notice it. Each is planted alone in a clone of the working tree, and TESTS run until the first
that fails. They must pass without it. An outcome is kept while the fault, its file and its tests stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = multiprocessing.get_context("forkserver")  # each pytest starts with these imported, and with nothing of ours
CONTEXT.set_forkserver_preload(["pytest", "torch._dynamo", "scipy.special", "sklearn.linear_model", "transformers"])


class Fault(NamedTuple):
    """`old` becomes `new` in `file`; `tests` are arguments of pytest."""

    area: str
    file: str
    tests: str
    what: str
    old: str
    new: str
    reason: str

    def key(self, root: Path = ROOT) -> str:
        """sha256 of the fault, its file and its tests."""
        paths = [root / word for word in (self.file, *shlex.split(self.tests)) if (root / word).exists()]
        files = [f for path in paths for f in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
        contents = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
        return hashlib.sha256(json.dumps([*self, *contents]).encode()).hexdigest()

    def planted(self, root: Path = ROOT) -> str:
        """The file with the fault in it. Raises ValueError unless the old text occurs once."""
        text = (root / self.file).read_text("utf-8")
        if (times := text.count(self.old)) != 1:
            raise ValueError(f"{self.file} has {times} times {self.old!r}: mend {self.what!r} in tests/mutants.txt")
        return text.replace(self.old, self.new)


def listed() -> list[Fault]:
    """All faults, in order."""
    faults, area, head = [], "", []
    for line in (ROOT / "tests" / "mutants.txt").read_text("utf-8").splitlines():
        if line.startswith("  "):
            parts = re.fullmatch(r"  (.+?) :: (.+?) =>(.*?)(?: ## (.+))?", line).groups("")
            faults.append(Fault(area, *head, *(part.strip().replace("\\n", "\n") for part in parts)))
        elif line.startswith("# "):
            area = line[2:]
        else:
            head = line.split(": ", 1)
    return faults


@contextlib.contextmanager
def clone() -> Iterator[Path]:
    """A clone of the working tree, with what is not committed."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tree = Path(folder, "tree")
        git("clone", "--quiet", "--shared", ROOT, tree)
        for name in git("ls-files", "-z", "--modified", "--others", "--exclude-standard").split("\0")[:-1]:
            (tree / name).unlink(missing_ok=True)
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        yield tree


def run_pytest(tree: Path, words: list[str], kernels: str) -> None:
    """pytest in a clone, in this process, with what it prints in a file; never returns."""
    os.setsid()
    output = os.open(tree.parent / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    os.chdir(tree)
    os.environ |= {"NUMBA_CACHE_DIR": str(tree.parent / kernels), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.exit(pytest.main(words))


def first_failure(tree: Path, tests: str, limit: float, kernels: str = "kernels") -> str:
    """The first of the tests that fails, or how else they ended; empty where all pass.

    `kernels`: the folder of compiled kernels beside the tree. Raises ValueError where pytest was killed or misused.
    """
    words = ["-xq", "-pno:cacheprovider", "-Wignore::pytest.PytestAssertRewriteWarning", *shlex.split(tests)]
    process = CONTEXT.Process(target=run_pytest, args=(tree, words, kernels))
    process.start()
    process.join(limit)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the tests started, too
    if process.exitcode is None:
        return f"time limit of {limit:.0f} s"
    code, said = process.exitcode, (tree.parent / "output").read_text(errors="replace")
    if code in (-signal.SIGTERM, -signal.SIGKILL, 3, 4, 5):
        raise ValueError(f"pytest {tests} ended with {code}: {said[-300:]}")
    named = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, re.MULTILINE)
    return named[1] if named else f"exit code {code}" if code else ""


def outcome(fault: Fault, tree: Path, limit: float, whole: bool) -> dict:
    """A fault in a clone: which test notices it, and after how many seconds."""
    path, text, key, begun = tree / fault.file, fault.planted(tree), fault.key(tree), time.perf_counter()
    before, times = path.read_bytes(), path.stat()
    kernels = hashlib.sha256(text.encode()).hexdigest()[:12] if "@kernel" in text else "kernels"
    path.write_text(text, "utf-8")
    try:
        by = first_failure(tree, fault.tests, limit, kernels)
        by = by or (first_failure(tree, "tests", 3600, kernels) if whole else "")
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    facts = {"by": by, "whole": whole, "seconds": round(time.perf_counter() - begun, 1)}
    return {"key": key} | fault._asdict() | facts


def report(outcomes: dict[str, dict], results: Path) -> str:
    """Write bench/mutants.json and .md; returns the summary."""
    from lra.records.markup import Grid, Heading, markdown
    from lra.scaling.reports import machine_line, write_report

    entries = [outcomes[key] for fault in listed() if (key := fault.key()) in outcomes]
    blocks, counts = [], []
    for area in dict.fromkeys(e["area"] for e in entries):
        group = [e for e in entries if e["area"] == area]
        counts.append(f"{area} {sum(bool(e['by']) for e in group)} of {len(group)}")
        rows = tuple((e["what"], e["by"] or f"nothing: {e['reason'] or 'a test is missing'}") for e in group)
        blocks += [Heading(area), Grid(("what is wrong", "noticed by"), rows)]
    caught, seconds = sum(bool(e["by"]) for e in entries), round(sum(e["seconds"] for e in entries))
    command = f"python -m tests.mutants --results {results}"
    line = f"{caught} of {len(entries)} faults are noticed, in {seconds:,} s: {', '.join(counts)}"
    measured = {"caught": caught, "faults": len(entries), "seconds": seconds, "outcomes": entries}
    write_report(
        results, "mutants", command, measured, f"`{command}`: {line}.\n\n{markdown(blocks)}\n{machine_line()}\n"
    )
    return line


def main(arguments: list[str] | None = None) -> int:
    """Try every fault that has no outcome yet; exit code 1 if one is noticed by nothing and has no reason."""
    top = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    top.add_argument("--only", default="", help="an area, or a part of a file's name or of what is wrong")
    top.add_argument("--jobs", type=int, default=1, help="clones in which tests run at once")
    top.add_argument("--whole", action="store_true", help="run all tests where the nearest notice nothing")
    top.add_argument(
        "--results", type=Path, default=Path("results"), help="outcomes are kept in its bench/mutants.json"
    )
    args, lock, groups = top.parse_args(arguments), threading.Lock(), defaultdict(list)
    kept = args.results / "bench" / "mutants.json"
    entries = json.loads(kept.read_text("utf-8"))["outcomes"] if kept.exists() else []
    outcomes = {e["key"]: e for e in entries if e["by"] or e["whole"] or not args.whole}
    for fault in listed():
        if fault.key() not in outcomes and (args.only == fault.area or args.only in f"{fault.file} {fault.what}"):
            groups[fault.tests].append(fault)

    def run(tests: str) -> None:
        with clone() as tree:
            begun = time.perf_counter()
            if failure := first_failure(tree, tests, 600):
                raise ValueError(f"without a fault, {failure} fails")
            limit = 30 + 5 * (time.perf_counter() - begun)
            for fault in groups[tests]:
                found = outcome(fault, tree, limit, args.whole)
                with lock:
                    outcomes[found["key"]] = found
                    report(outcomes, args.results)
                    print(f"{found['seconds']:5.1f} s  {fault.what}: {found['by'] or 'NOTHING'}", flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            list(pool.map(run, groups))
        except (ValueError, KeyboardInterrupt) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            pool.shutdown(cancel_futures=True)
            print(f"error: {str(error) or 'stopped; the same command goes on'}", file=sys.stderr)
            return 2
    print(report(outcomes, args.results))
    return int(any(not e["by"] and not e["reason"] for e in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
