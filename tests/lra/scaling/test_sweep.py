"""A grid of runs in processes of their own: what is missing is run, what fails stops nothing else."""

import json
import signal
import sys
from types import SimpleNamespace

import pytest

import lra.scaling.jobs
import lra.scaling.sweep
from lra.__main__ import main
from lra.scaling.cost import Prediction
from lra.scaling.jobs import Job, Need, Pool, needs
from tasks.base import Optim
from tests.conftest import ROOT

BROKEN = "tests.plugins.attention.shift:Broken"


@pytest.fixture
def sweep(lab, monkeypatch):
    """`sweep(*options)`: run the command on the tiny task; cells are started with the plugins."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plain = lra.scaling.sweep.command
    monkeypatch.setattr(lra.scaling.sweep, "command", lambda *a: lab.driver() + plain(*a)[3:])

    def run(*options, attentions="softmax"):
        words = ["sweep", "--tasks=tiny", f"--attentions={attentions}", "--preset=smoke", "--device=cpu"]
        return main([*words, *options, *lab.places])

    return run


class Process:
    """Stands for a cell's process: ends after `polls` looks with `returncode`."""

    def __init__(self, returncode=0, polls=2):
        self.returncode, self.polls, self.terminated = returncode, polls, False
        self.pid = 0  # of no process

    def poll(self):
        """None while it runs."""
        self.polls -= 1
        return None if self.polls > 0 else self.returncode

    def terminate(self):
        """Noted."""
        self.terminated = True

    def wait(self):
        """At once."""
        return self.returncode


@pytest.fixture
def processes(monkeypatch):
    """`processes[name]` is what that attention's cell becomes; `started` holds the cells in order."""

    class Table(dict):
        started = []

    table = Table()
    table.started = []

    def start(cell, args, threads):
        table.started.append((cell, threads))
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        cell.log.write_text(f"log of {cell}\n")
        return table.get(cell.run.attention, Process())

    monkeypatch.setattr(lra.scaling.sweep, "start", start)
    monkeypatch.setattr(lra.scaling.jobs.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(lra.scaling.jobs, "foresee", lambda *_: None)  # tests/lra/scaling/test_cost.py predicts
    return table


def test_failing_cell_does_not_stop_the_others_and_only_what_is_missing_runs_again(sweep, lab, capsys, monkeypatch):
    assert sweep(attentions=f"{BROKEN},performer") == 1
    out, err = capsys.readouterr()
    assert "2 cells, 0 done, 2 to run" in out and "[2/2]" in out
    assert f"failed: tiny {BROKEN} seed 0: RuntimeError: broken on purpose" in err and "train.log" in err
    records = [json.loads(path.read_text()) for path in lab.records()]
    assert [r["model"]["attention"] for r in records] == ["performer"]
    assert all(r["status"] == "ok" for r in records)
    before = [path.read_bytes() for path in lab.records()]
    monkeypatch.setattr(lra.scaling.sweep, "start", lambda *_: pytest.fail("ran a cell again"))
    assert sweep(attentions="performer") == 0
    assert "nothing to do: every record is there" in capsys.readouterr().out
    assert [path.read_bytes() for path in lab.records()] == before


def test_cells_are_ordered_by_seed_first_so_that_a_table_fills_early(sweep, processes):
    assert sweep("--seeds=2", "--jobs=1", attentions="softmax,constant") == 0
    assert [(c.run.seed, c.run.attention) for c, _ in processes.started] == [
        (0, "softmax"), (0, "constant"), (1, "softmax"), (1, "constant"),
    ]  # fmt: skip


def test_jobs_share_the_cores(sweep, processes, monkeypatch):
    monkeypatch.setattr(lra.scaling.sweep, "cores", lambda: 8)
    assert sweep("--seeds=3", "--jobs=2") == 0
    assert {threads for _, threads in processes.started} == {4}
    processes.started.clear()
    monkeypatch.setattr(lra.machine, "cores", lambda: 8)
    assert sweep("--seeds=3", "--jobs=2", "--threads=3") == 0
    assert {threads for _, threads in processes.started} == {3}


def test_no_more_than_jobs_run_at_once(sweep, processes, monkeypatch):
    running, most = set(), []

    class Counted(Process):
        def poll(self):
            found = super().poll()
            if found is not None:
                running.discard(self)
            return found

    def start(cell, args, threads):
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        cell.log.write_text("")
        process = Counted(polls=3)
        running.add(process)
        most.append(len(running))
        return process

    monkeypatch.setattr(lra.scaling.sweep, "start", start)
    assert sweep("--seeds=7", "--jobs=3") == 0
    assert max(most) == 3 and len(most) == 7


def test_cell_that_was_stopped_stops_the_sweep_with_85(sweep, processes, capsys):
    processes["softmax"] = Process(returncode=85)
    assert sweep("--jobs=1", attentions="softmax,constant") == 85
    assert len(processes.started) == 1 and "goes on from here" in capsys.readouterr().err


def test_sigterm_stops_the_cells_and_ends_with_85(sweep, processes, monkeypatch):
    long = processes["softmax"] = Process(polls=10**9)
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(lra.scaling.jobs.time, "sleep", sleep)
    assert sweep("--jobs=1", attentions="softmax,constant") == 85
    assert long.terminated and len(processes.started) == 1


def test_time_limit_stops_the_cells_and_ends_with_85(sweep, processes, monkeypatch, capsys):
    long = processes["softmax"] = Process(polls=10**9)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(lra.scaling.jobs.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(lra.scaling.jobs.time, "sleep", lambda _: setattr(clock, "now", clock.now + 50))
    assert sweep("--jobs=1", "--time-limit=2", attentions="softmax,constant") == 85
    assert long.terminated and len(processes.started) == 1 and clock.now == 150
    assert "the same command goes on from here" in capsys.readouterr().err
    assert sweep("--time-limit=2", "--executor=debug") == 2
    assert "--job-minutes limits a job" in capsys.readouterr().err


def test_name_given_twice_is_one_cell(sweep, processes):
    assert sweep(attentions="softmax,softmax") == 0
    assert len(processes.started) == 1


def test_bad_setting_is_refused_before_any_cell_starts(lab, processes, error_line):
    words = ["sweep", "--tasks=tiny", "--attentions=performer,softmax", "--preset=smoke", *lab.places]
    assert "num_features" in error_line(*words, "--set=attention.num_features=0")
    # performer has that option, softmax has not
    assert "known are none" in error_line(*words, "--set=attention.num_features=8")
    assert not processes.started


def test_cell_runs_the_command_a_user_would_type(lab, monkeypatch):
    commands = []

    class Popen(Process):
        def __init__(self, command, **options):
            super().__init__()
            commands.append(command)

    monkeypatch.setattr(lra.scaling.sweep.subprocess, "Popen", Popen)
    monkeypatch.setattr(lra.scaling.jobs.time, "sleep", lambda seconds: None)
    words = ["sweep", "--tasks=tiny", "--attentions=performer", "--preset=smoke", "--device=cpu", "--steps=7"]
    words += ["--set=attention.num_features=3", "--val-rule=legacy", "--precision=fp32", *lab.places]
    assert main(words) == 0
    (command,) = commands
    text = " ".join(command[1:])
    assert text.startswith("-m lra train tiny --attention performer --preset smoke --seed 0")
    options = "--set attention.num_features=3", "--set train.steps=7", "--val-rule legacy", "--precision fp32"
    for part in (*options, f"--data {lab.data}", f"--results {lab.results}", f"--runs {lab.runs}"):
        assert part in text


def test_task_without_data_does_not_stop_the_others(sweep, processes, monkeypatch, capsys):
    """A source that cannot be reached is one line, and the exit code says that something is missing."""
    from tasks.base import SourceError

    original = lra.scaling.sweep.prepare

    def prepare(task, *args, **options):
        if task.META.name == "image":
            raise SourceError("image: the hub cannot be reached; use --source embedded")
        return original(task, *args, **options)

    monkeypatch.setattr(lra.scaling.sweep, "prepare", prepare)
    assert sweep("--tasks=image,tiny") == 1
    assert [cell.run.meta.name for cell, _ in processes.started] == ["tiny"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "failed: image: no data: image: the hub cannot be reached; use --source embedded"


def test_no_task_with_data_is_an_error(lab, processes, monkeypatch, error_line):
    from tasks.base import SourceError

    def prepare(task, *args, **options):
        raise SourceError(f"{task.META.name}: nowhere")

    monkeypatch.setattr(lra.scaling.sweep, "prepare", prepare)
    assert error_line("sweep", "--tasks=tiny,image", "--preset=smoke", *lab.places) == "error: tiny: nowhere"


def test_cell_that_another_process_is_at_is_left_to_it(sweep, processes, capsys):
    processes["softmax"] = Process(returncode=75)
    assert sweep("--jobs=1", attentions="softmax,constant") == 75
    assert len(processes.started) == 2
    assert "left alone: tiny softmax seed 0" in capsys.readouterr().err


def test_log_of_a_cell_has_every_attempt(sweep, lab, monkeypatch, capsys):
    """The same sweep again tries again a cell that another process was at. (tests/faults.py has such a process.)"""
    for says, code in (("held", 75), ("broken", 1)):
        words = ["sh", "-c", f"echo {says}; exit {code}"]
        monkeypatch.setattr(lra.scaling.sweep, "command", lambda *_, words=words: words)
        assert sweep() == code
    (log,) = lab.runs.rglob("train.log")
    assert log.read_text() == "held\nbroken\n" and f"broken (whole log: {log})" in capsys.readouterr().err


def test_nan_loss_is_told_by_the_exit_code_every_time(sweep, lab, capsys):
    """tests/faults.py has the sweep in which it comes about."""
    for attention in ("constant", "softmax"):
        lab.train("--set=train.lr=1e30", attention=attention)
    capsys.readouterr()
    assert sweep("--set=train.lr=1e30", attentions="constant,softmax") == 1
    out, err = capsys.readouterr()
    assert "2 done, 0 to run" in out and err.count("failed: loss is not finite") == 2


def test_processes_do_not_outlive_a_sweep_that_fails(sweep, processes, monkeypatch):
    first = processes["softmax"] = Process(polls=10**9)

    def start(cell, args, threads, original=lra.scaling.sweep.start):
        if cell.run.attention == "constant":
            raise OSError(28, "No space left on device", str(cell.log))
        return original(cell, args, threads)

    monkeypatch.setattr(lra.scaling.sweep, "start", start)
    assert sweep("--jobs=2", attentions="softmax,constant") == 2
    assert first.terminated


# The budget of memory


class Memory:
    """Jobs of made-up sizes on a made-up machine: which run side by side."""

    def __init__(self, lab, sizes, memory, jobs=3):
        self.lab, self.sizes, self.memory, self.at_once, self.side = lab, sizes, memory, jobs, []

    def run(self, known=(), seconds=None):
        """The outcome; `side` holds the names that ran together, one entry for each job started."""

        def job(name):
            log = self.lab.runs / f"{name}.log"
            log.parent.mkdir(exist_ok=True)
            log.write_text("")
            recipe = SimpleNamespace(train=Optim(steps=1, batch=12))
            run = SimpleNamespace(meta=SimpleNamespace(name="tiny"), attention=name, seed=0, recipe=recipe)
            return Job(run, self.lab.results / "records" / "tiny" / name / "digest" / "seed0.json", log)

        jobs, needs = [job(name) for name in self.sizes], {}
        for j in jobs:
            name = j.run.attention
            needs[j.kind] = Need((seconds or {}).get(name, 1.0), self.sizes[name]) if name in known else Need()
        running = []

        class Counted(Process):
            def poll(self):
                code = super().poll()
                if code is not None:
                    running.remove(self.name)
                return code

        def start(job):
            process = Counted(polls=5)
            process.name = job.run.attention
            running.append(process.name)
            self.side.append(tuple(running))
            return process

        return Pool(jobs, self.at_once, self.memory, needs).run(start)


@pytest.fixture
def patient(monkeypatch):
    """No sleeping."""
    monkeypatch.setattr(lra.scaling.jobs.time, "sleep", lambda seconds: None)


def test_jobs_run_side_by_side_only_while_they_fit_in_memory(lab, patient):
    sizes = {"a": 50, "b": 70, "c": 40, "d": 20}
    pool = Memory(lab, sizes, memory=100)
    assert not pool.run(known=sizes).failed
    assert pool.side[:2] == [("a",), ("a", "c")]  # b waits, c fits beside a
    assert {names[-1] for names in pool.side} == set(sizes)
    assert all(sum(sizes[name] for name in names) <= 100 for names in pool.side)


def test_job_that_never_fits_fails_with_its_size_and_the_others_run(lab, patient):
    pool = Memory(lab, {"a": 2 * 10**9, "b": 10**9}, memory=15 * 10**8)
    ((job, why),) = pool.run(known=("a", "b")).failed
    assert job.run.attention == "a" and why.startswith("needs about 2.0 GB, --memory allows 1.5")
    assert why.endswith(": --set train.accumulate=2 needs less")
    assert pool.side == [("b",)]


def test_job_of_unknown_size_is_given_its_share(lab, patient):
    pool = Memory(lab, {"a": 0, "b": 90, "c": 0}, memory=90)
    pool.run(known=("b",), seconds={"b": 0.0})
    assert pool.side[0] == ("a",) and pool.side[1] == ("a", "c") and ("b",) in pool.side


@pytest.mark.parametrize("memory", [None, 10**9])
def test_longest_jobs_start_first(lab, patient, memory):
    pool = Memory(lab, {"a": 20, "b": 20, "c": 20}, memory=memory, jobs=1)
    pool.run(known=("a", "b", "c"), seconds={"a": 2.0, "b": 3.0, "c": 5.0})
    assert pool.side == [("c",), ("b",), ("a",)]


def test_without_a_limit_every_job_runs(lab, patient):
    pool = Memory(lab, {"a": 50, "b": 70, "c": 40}, memory=None)
    pool.run(known=("a", "b", "c"))
    assert pool.side[2] == ("a", "b", "c")


def test_the_sweep_says_first_what_it_will_take(lab, patient, capsys):
    sizes = {"a": 4 * 10**9, "b": 7 * 10**9}
    Memory(lab, sizes, memory=10**10).run(known=sizes, seconds={"a": 60.0, "b": 120.0})
    line = "predicted: 1.0 min with 3 at a time (3.0 min one by one), up to 7.0 GB each"
    assert capsys.readouterr().out.splitlines()[0] == line


def test_need_of_a_job_is_what_is_predicted_for_all_its_seeds(lab, monkeypatch):
    one, other = (Job(None, lab.results / "kind" / f"seed{k}.json", None) for k in range(2))
    assert needs([one, other], None) == {one.kind: Need()}
    monkeypatch.setattr(lra.scaling.jobs, "foresee", lambda *_: Prediction(7.0, 100, 0.1))
    assert needs([one, other], SimpleNamespace(start_bytes=11)) == {one.kind: Need(7.0, 111)}


def test_status_line_is_redrawn_on_a_terminal_and_absent_elsewhere(sweep, processes, monkeypatch, capsys):
    assert sweep("--jobs=1") == 0
    out, err = capsys.readouterr()
    assert "[1/1]" in out and "\r" not in out + err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(lra.scaling.jobs.LINE, "mininterval", 0)
    assert sweep("--jobs=1", "--seeds=2") == 0
    out, err = capsys.readouterr()
    assert "\r[0/2]" in err and "running: tiny softmax seed 0" in err
    assert "[2/2]" in out and "\r" not in out
