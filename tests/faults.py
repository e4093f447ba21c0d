"""Faults put into real runs, and what was lost: python -m tests.faults --kills 50; pytest runs it with 3 kills

Every fault is put into a process of its own, forked from this one, which has imported everything and trained
nothing. A loss is anything that differs from a run nobody disturbed: losses, predictions, weights, logs and the
record, clocks and the count of resumptions aside.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import torch
import torch._dynamo  # seconds that every process forked from this one saves

import lra.scaling.jobs
import lra.scaling.sweep
import lra.training.train
from lra.__main__ import main
from lra.options import BUSY, STOPPED
from lra.records.markup import Grid, markdown
from lra.records.record import read_predictions, read_record
from lra.registry import attention_class
from lra.scaling.jobs import Job
from lra.scaling.reports import machine_line, write_report
from lra.training import checkpoint
from lra.training.train import CHECKPOINTS, WEIGHTS
from tests.conftest import Lab, plug_in, timeless

# Random features, redrawn as it goes, with dropout: whatever a checkpoint forgets shows in the losses.
RUN = ("--threads=1", "--steps=24", "--set=train.eval_every=3", "--set=attention.redraw_every=7")
CELL = {"attention": "performer"}
LIMIT = 60  # seconds a process may take before it is taken for hung


class Unavailable(Exception):
    """This machine or user cannot make the fault; says why."""


@dataclass
class Done:
    """How a process ended: exit code, minus the number of the signal that killed it; stderr; seconds."""

    code: int
    err: str
    seconds: float


@dataclass
class Suite:
    """What all faults share: a folder, prepared data, the undisturbed run, a random generator, the findings."""

    folder: Path
    rng: random.Random
    kills: int
    undisturbed: dict = field(default_factory=dict)
    seconds: float = 0.0  # of the undisturbed run
    counts: dict[str, int] = field(default_factory=dict)  # faults put in, by kind
    losses: list[str] = field(default_factory=list)
    lost: dict[str, list[str]] = field(default_factory=dict)  # the same by kind
    skipped: dict[str, str] = field(default_factory=dict)

    def lab(self, name: str) -> Lab:
        """A laboratory of its own on the shared data."""
        place = self.folder / name
        place.mkdir()
        return Lab(self.folder / "data", place / "results", place / "runs")

    def expect(self, true: bool, what: str) -> None:
        """Note a loss unless `true`."""
        if not true:
            self.losses.append(what)

    def check(self, lab: Lab, name: str) -> None:
        """The laboratory's only run must be what the undisturbed one is."""
        found = facts(lab)
        for part, value in self.undisturbed.items():
            self.expect(found.get(part) == value, f"{name}: {part} differs from the undisturbed run")
        left = [p.name for p in lab.results.rglob(".*")]
        self.expect(not left, f"{name}: left behind: {left}")

    def finish(self, lab: Lab, name: str, code: int = 0) -> None:
        """The same command again must end the run, with nothing lost."""
        done = run(lab)
        self.expect(done.code == code, f"{name}: the same command ended with {done.code}: {done.err[-300:]}")
        self.check(lab, name)


def facts(lab: Lab) -> dict:
    """Everything of a laboratory's only run that may not depend on how it came about."""
    if len(lab.records()) != 1:
        return {"records": len(lab.records())}
    (path,) = lab.records()
    record = read_record(path)
    (log,) = lab.runs.rglob("log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    weights, _ = checkpoint.load(log.with_name(WEIGHTS))
    return {
        "records": 1,
        "record": timeless(record),
        "predictions": read_predictions(path, record),
        "weights": {name: t.numpy().tobytes() for name, t in weights.items()},
        "log": [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines],
    }


def words_of(lab: Lab) -> list[str]:
    """The one command that every fault disturbs."""
    return lab.words(*RUN, **CELL)


def run(
    lab: Lab,
    words: list[str] | None = None,
    *,
    before: Callable[[], None] = lambda: None,
    disturb: Callable[[int], None] = lambda pid: None,
) -> Done:
    """The command in a process of its own: `before` is called in it, `disturb(pid)` while it runs."""
    with tempfile.TemporaryFile() as err:
        begun = time.perf_counter()
        pid = os.fork()
        if not pid:
            child(words or words_of(lab), before, err.fileno())
        disturb(pid)
        status = wait(pid)
        seconds = time.perf_counter() - begun
        err.seek(0)
        return Done(os.waitstatus_to_exitcode(status), err.read().decode(errors="replace"), seconds)


def child(words: list[str], before: Callable[[], None], err: int, out: int | None = None) -> None:
    """Never returns."""
    code = 70
    try:
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY) if out is None else out, 1)
        before()
        code = main(words)
    except SystemExit as refusal:  # of an option, by argparse
        code = refusal.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """The status of a process that ended; one that hangs is killed."""
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def after(seconds: float, number: int) -> Callable[[int], None]:
    """Sends a signal once that time has passed."""

    def disturb(pid: int) -> None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    return disturb


def one_error(done: Done) -> bool:
    """Exit code 2 and a single line, `error: ...`."""
    lines = done.err.splitlines()
    return done.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


# The faults: each takes the suite, and counts what it did under its name


def sigkill(suite: Suite) -> int:
    """SIGKILL at random moments of one run, until there were `kills`; then again while it ends."""
    lab, kills, steps = suite.lab("sigkill"), 0, {0}
    short = suite.seconds / 6
    while not lab.records():
        # At first so early that most attempts get no further, and all kills hit one run; afterwards at any moment.
        seconds = suite.rng.uniform(0, short if kills < suite.kills else 1.5 * suite.seconds)
        before = max(steps)
        done = run(lab, disturb=after(seconds, signal.SIGKILL))
        kills += done.code == -signal.SIGKILL
        suite.expect(done.code in (0, -signal.SIGKILL), f"sigkill: ended with {done.code}: {done.err[-300:]}")
        suite.expect("damaged" not in done.err, f"sigkill: {done.err[-300:]}")
        steps |= {checkpoint.load(path)[1]["progress"]["step"] for path in lab.runs.rglob(CHECKPOINTS[0])}
        short *= 0.75 if max(steps) > before else 1.08
        if kills > 4 * suite.kills + 40:
            suite.losses.append(f"sigkill: no progress after {kills} kills: at steps {sorted(steps)}")
            return kills
    suite.finish(lab, "sigkill")
    return kills


def stop(suite: Suite, number: signal.Signals) -> int:
    """SIGTERM or SIGINT at random moments: exit code 85, or 0 where the run had ended."""
    lab, times = suite.lab(number.name), max(2, suite.kills // 10)
    for k in range(times):
        seconds = suite.rng.uniform(0.1, 0.5) * suite.seconds
        done = run(lab, disturb=after(seconds, number))
        suite.expect(done.code in (STOPPED, 0), f"{number.name}: ended with {done.code}: {done.err[-300:]}")
        suite.expect(done.code == 0 or len(done.err.splitlines()) == 1, f"{number.name}: said {done.err!r}")
    suite.finish(lab, number.name)
    return times


def disk_full(suite: Suite) -> int:
    """A file system of its own for runs, then for results, filled until writes fail; then freed."""
    times = 0
    for which in ("runs", "results"):
        lab = suite.lab(f"full-{which}")
        place = getattr(lab, which)
        with tmpfs(place, "4m"):
            for kilobytes in suite.rng.sample(range(0, 200, 4), 3) if which == "runs" else (0,):
                ballast = place / "ballast"
                free = shutil.disk_usage(place).free
                with suppress(OSError):
                    ballast.write_bytes(bytes(max(0, free - 1024 * kilobytes)))
                done = run(lab)
                times += done.code != 0
                name = f"disk full ({which}, {kilobytes} KB left)"
                if done.code:
                    suite.expect(one_error(done) and "No space left" in done.err, f"{name}: said {done.err!r}")
                ballast.unlink()
                left = [p for p in place.rglob("checkpoint*.safetensors")]
                for path in left:
                    checkpoint.load(path)
            suite.finish(lab, f"disk full ({which})")
    return times


def no_sync(suite: Suite) -> int:
    """Space that turns out to be missing when the n-th file is synced, as on network file systems."""
    times = 3
    lab = suite.lab("no-sync")
    for k in range(times):
        calls = suite.rng.randrange(1, 15)

        def before(calls=calls):
            original, left = os.fsync, [calls]

            def fsync(number):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                original(number)

            os.fsync = fsync

        done = run(lab, before=before)
        suite.expect(one_error(done) and "No space left" in done.err, f"no sync ({calls}): said {done.err!r}")
    suite.finish(lab, "no sync")
    return times


def read_only(suite: Suite) -> int:
    """Folders that cannot be written to: results and runs are one line before training, data do not matter."""
    for which in ("results", "runs"):
        lab = suite.lab(f"read-only-{which}")
        getattr(lab, which).mkdir()
        with unwritable(getattr(lab, which)):
            done = run(lab)
            suite.expect(one_error(done), f"read-only {which}: {done.code}, said {done.err!r}")
        suite.finish(lab, f"read-only {which}")
    lab = suite.lab("read-only-data")
    with unwritable(lab.data):
        done = run(lab, ["prepare", "tiny", "--preset=smoke", "--workers=1", f"--data={lab.data}"])
        suite.expect(done.code == 0, f"read-only data: prepare ended with {done.code}: {done.err}")
        suite.finish(lab, "read-only data")
    return 3


def damage(suite: Suite) -> int:
    """Checkpoints with a flipped bit, cut short or empty: the newest, which is noticed, or all of them."""
    lab, times, way = suite.lab("damage"), 0, None

    def files() -> set[tuple[int, int]]:
        found = set()
        for path in lab.runs.rglob("checkpoint*.safetensors"):
            with suppress(FileNotFoundError):  # renamed since it was listed
                found.add((path.stat().st_ino, path.stat().st_mtime_ns))
        return found

    def stop_with_two(pid: int) -> None:
        before, end = files(), time.monotonic() + LIMIT
        while len(files() - before) < 2 and not lab.records() and time.monotonic() < end:
            time.sleep(0.002)
        os.kill(pid, signal.SIGTERM)

    for kind in ("flip", "cut", "empty"):
        for names in (CHECKPOINTS[:1], CHECKPOINTS):
            noticed(suite, way, run(lab, disturb=stop_with_two))
            (newest,) = lab.runs.rglob(CHECKPOINTS[0])
            for name in names:
                spoil(newest.with_name(name), kind, suite.rng)
            times += len(names)
            way = "going on from step" if len(names) == 1 else "starting from the first step"
    noticed(suite, way, run(lab, disturb=stop_with_two))
    suite.finish(lab, "damage")
    return times


def noticed(suite: Suite, way: str | None, done: Done) -> None:
    """The damage done before must be said in one line, with the way out."""
    said = [line for line in done.err.splitlines() if "is damaged" in line]
    right = len(said) == 1 and way in said[0] if way else not said
    suite.expect(right and done.code == STOPPED, f"damage ({way}): {done.code}, said {done.err[-500:]!r}")


def spoil(path: Path, kind: str, rng: random.Random) -> None:
    """Damage a file."""
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content if kind == "flip" else content[:at] if kind == "cut" else b"")


def two_processes(suite: Suite) -> int:
    """A second process on a cell leaves it to the first, which never notices."""
    lab, seconds = suite.lab("two"), []

    def disturb(pid: int) -> None:
        time.sleep(0.4 * suite.seconds)
        second = run(lab)
        seconds.append(second)
        lines = second.err.splitlines()
        suite.expect(second.code == BUSY and len(lines) == 1, f"two processes: {second.code}, {second.err!r}")

    first = run(lab, disturb=disturb)
    suite.expect(first.code == 0, f"two processes: the first ended with {first.code}: {first.err}")
    suite.finish(lab, "two processes")
    return 1


def clock_jumps(suite: Suite) -> int:
    """The date jumps by up to a day, either way, whenever it is read."""
    lab, jump = suite.lab("clock"), random.Random(suite.rng.random())

    def before() -> None:
        original = time.time

        class Jumping(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(seconds=jump.uniform(-86400, 86400))

        time.time = lambda: original() + jump.uniform(-86400, 86400)
        lra.training.train.datetime = Jumping

    first = run(lab, before=before, disturb=after(0.5 * suite.seconds, signal.SIGTERM))
    done = run(lab, before=before)
    suite.expect(done.code == 0, f"clock: ended with {done.code}: {done.err}")
    for path in lab.records():
        record = read_record(path)
        started, ended = (datetime.fromisoformat(record[k]) for k in ("started", "ended"))
        lasted = (ended - started).total_seconds()
        suite.expect(0 <= lasted <= first.seconds + done.seconds + 1, f"clock: a run of {lasted} s")
        suite.expect(0 < record["cost"]["wall_s"] < 60, f"clock: {record['cost']['wall_s']} s of training")
    suite.finish(lab, "clock")
    return 2


class Forked:
    """What a sweep needs of a Popen: the process of a cell, forked from the sweep's, which has imported everything."""

    def __init__(self, job: Job, args: argparse.Namespace, threads: int):
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.code, self.pid = None, os.fork()
        if not self.pid:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the sweep has a handler of its own
            log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            child(lra.scaling.sweep.command(job.run, args, threads)[3:], lambda: None, log, log)

    def poll(self, how: int = os.WNOHANG) -> int | None:
        """The exit code once it has ended."""
        if self.code is None and (status := os.waitpid(self.pid, how))[0]:
            self.code = os.waitstatus_to_exitcode(status[1])
        return self.code

    def wait(self) -> int:
        """Until it has ended."""
        return self.poll(0)

    def terminate(self) -> None:
        """SIGTERM."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)


def run_sweep(lab: Lab, *options: str, disturb: Callable[[int], None] = lambda pid: None) -> Done:
    """A sweep whose cells are forks of it."""

    def before() -> None:
        lra.scaling.jobs.foresee = lambda *_: None  # a process in which gradients were computed may not fork
        lra.scaling.sweep.start = Forked

    words = ["sweep", "--tasks=tiny", "--preset=smoke", "--device=cpu", "--threads=1", "--jobs=1"]
    return run(lab, [*words, *options, *lab.places], before=before, disturb=disturb)


def sweep(suite: Suite) -> int:
    """A sweep stopped by SIGTERM, which stops its cell, and one killed, whose cell goes on; then the same again."""
    cells = (f"--attentions={CELL['attention']}", *RUN)
    for number in (signal.SIGTERM, signal.SIGKILL):
        lab = suite.lab(f"sweep-{number.name}")

        def disturb(pid: int, number=number, lab=lab) -> None:
            end = time.monotonic() + LIMIT
            while not list(lab.runs.rglob(CHECKPOINTS[0])) and time.monotonic() < end:
                time.sleep(0.01)
            os.kill(pid, number)

        done = run_sweep(lab, *cells, disturb=disturb)
        expected = STOPPED if number == signal.SIGTERM else -number
        suite.expect(done.code == expected, f"sweep: {number.name} ended it with {done.code}: {done.err!r}")
        while (done := run_sweep(lab, *cells)).code == BUSY:
            pass  # the cell of the killed sweep is still at it
        suite.expect(done.code == 0, f"sweep: after {number.name} {done.code}: {done.err!r}")
        suite.check(lab, f"sweep after {number.name}")
    return 2


def nan_loss(suite: Suite) -> int:
    """A loss that is not finite is a failed record with its step; the sweep goes on, and exits with 1."""
    lab = suite.lab("nan")
    done = run_sweep(lab, "--attentions=constant,softmax", "--set=train.lr=1e30")
    status = [read_record(path)["status"] for path in lab.records()]
    right = len(status) == 2 and all(s.startswith("failed: loss is not finite at step ") for s in status)
    suite.expect(right and done.code == 1, f"NaN: {status}, {done.code}, {done.err!r}")
    return 2


FAULTS: dict[str, Callable[[Suite], int]] = {
    "SIGKILL": sigkill,
    "SIGTERM": lambda suite: stop(suite, signal.SIGTERM),
    "SIGINT": lambda suite: stop(suite, signal.SIGINT),
    "disk full": disk_full,
    "no space at sync": no_sync,
    "read-only folder": read_only,
    "damaged checkpoint": damage,
    "two processes": two_processes,
    "clock jump": clock_jumps,
    "sweep": sweep,
    "NaN loss": nan_loss,
}


@contextmanager
def tmpfs(place: Path, size: str) -> Iterator[None]:
    """A small file system in memory at `place`."""
    place.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


@contextmanager
def unwritable(place: Path) -> Iterator[None]:
    """A folder that cannot be written to: by its mode, or by a read-only mount for those whom no mode binds."""
    if os.geteuid():
        mode = place.stat().st_mode
        place.chmod(0o555)
        try:
            yield
        finally:
            place.chmod(mode)
        return
    mount("--bind", place, place)
    try:
        mount("-o", "remount,ro,bind", place)
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def mount(*words) -> None:
    """Raises Unavailable where this user may not."""
    try:
        done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable("there is no mount command") from error
    if done.returncode:
        raise Unavailable(" ".join(done.stderr.split()))


def run_suite(folder: Path, kills: int, seed: int, only: list[str]) -> Suite:
    """The faults named; a line for each on stdout."""
    suite = Suite(folder, random.Random(seed), kills)
    words = ["prepare", "tiny", "--preset=smoke", "--workers=1", f"--data={folder / 'data'}"]
    prepared = run(Lab(folder, folder, folder), words)
    assert prepared.code == 0, prepared.err
    lab = suite.lab("undisturbed")
    done = run(lab)
    assert done.code == 0, done.err
    suite.undisturbed, suite.seconds = facts(lab), done.seconds
    for name in only:
        before, begun = len(suite.losses), time.perf_counter()
        try:
            suite.counts[name] = FAULTS[name](suite)
        except Unavailable as error:
            suite.skipped[name] = str(error)
        suite.lost[name] = suite.losses[before:]
        skipped = suite.skipped.get(name)
        outcome = f"skipped: {skipped}" if skipped else f"{len(suite.lost[name])} losses"
        seconds = time.perf_counter() - begun
        print(f"{name:<20} {suite.counts.get(name, 0):>3} times, {seconds:5.1f} s, {outcome}", flush=True)
        for loss in suite.lost[name]:
            print(f"  {loss}", flush=True)
    return suite


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    top = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.splitlines()[0])
    top.add_argument("--kills", type=int, default=50, help="SIGKILLs over one run; the rest scales with it")
    top.add_argument("--only", default=",".join(FAULTS), help="comma-separated names (default: all)")
    top.add_argument("--seed", type=int, default=0, help="of the moments and places of the faults")
    top.add_argument("--results", type=Path, help="write the summary there, to bench/faults.json and .md")
    args = top.parse_args(arguments)
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(FAULTS):
        top.error(f"no fault is called {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    return args


def command(arguments: list[str] | None = None) -> int:
    """Run the suite; exit code 1 if anything was lost."""
    args = parse(arguments)
    torch.set_num_threads(1)
    plug_in(pytest.MonkeyPatch())
    attention_class(CELL["attention"])  # imported once, here
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        suite = run_suite(Path(folder), args.kills, args.seed, args.only)
    seconds = round(time.perf_counter() - begun, 1)
    kills = suite.counts.get("SIGKILL", 0)
    others = sum(suite.counts.values()) - kills
    skipped = "".join(f", skipped: {name} ({why})" for name, why in suite.skipped.items())
    line = f"{kills} kills, {others} other faults, losses of data: {len(suite.losses)}{skipped}"
    print(line)
    if args.results:
        words = f"python -m tests.faults --kills {args.kills} --seed {args.seed} --results {args.results}"
        words += "" if args.only == list(FAULTS) else f" --only {shlex.quote(','.join(args.only))}"
        facts = {
            "kills": kills,
            "faults": {name: n for name, n in suite.counts.items() if name != "SIGKILL"},
            "skipped": suite.skipped,
            "losses_of_data": len(suite.losses),
            "losses": {name: lost for name, lost in suite.lost.items() if lost},
            "seconds": seconds,
        }
        table = markdown([Grid(["fault", "times"], [[name, str(n)] for name, n in suite.counts.items()])])
        text = f"`{words}`: {line}.\n\n{table}\n{machine_line()}\n"
        write_report(args.results, "faults", words, facts, text)
    return 1 if suite.losses else 0


if __name__ == "__main__":
    sys.exit(command())
