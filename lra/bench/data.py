"""`bench data`: how fast examples are made and how long training waits for them."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from lra import registry
from lra.bench.base import machine_line, markdown_table, write_report
from lra.machine import set_threads
from lra.records import published
from lra.training import config
from lra.training.batches import Batches
from lra.training.trainer import Trainer, Where
from tasks import listops, pathfinder
from tasks.store.prepared import Prepared, load

SECONDS = 1.0  # CPU time of one timing of a generator, about
REPEATS = 3  # timings, of which the median counts
STEPS = 20  # training steps timed, after three that are not
EPOCH = 1000  # batches timed, at most
SMALLEST = "constant"  # the attention whose step is shortest


def bench(args: Namespace) -> None:
    """`bench data`: measure, print and write."""
    set_threads(args.threads)
    names = registry.choose("task", args.tasks, registry.task_names())
    prepared = {
        name: load(args.data / name / args.preset) for name in names
    }  # all there, before anything is timed
    made = generators()
    loaded = [loading(name, args.preset, data) for name, data in prepared.items()]
    command = f"python -m lra bench data --preset {args.preset} --tasks {args.tasks}".removesuffix(
        " --tasks all"
    )
    text = markdown(made, loaded, command)
    paths = write_report(args.results, "data", command, {"generators": made, "loading": loaded}, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))


def generators() -> list[dict[str, Any]]:
    """Samples per second of CPU time of every generator and setting, beside the published programs'."""

    def images(size: int, length: int) -> Callable[[int], Any]:
        return lambda count: pathfinder.scenes(0, 0, count, size, length)

    makers: dict[str, Callable[[int], Any]] = {"ListOps": lambda count: listops.generate(count, seed=0)}
    for size in (32, 64, 128):
        makers |= {f"Pathfinder {size} px, contour {n}": images(size, n) for n in (6, 9, 14)}
    rows = []
    for name, make in makers.items():
        rate, count = samples_per_second(make)
        theirs = published.GENERATORS.get(name)
        row = {"name": name, "samples": count, "per_second": round(rate, 1), "published_per_second": theirs}
        rows.append(row | {"ratio": theirs and round(rate / theirs, 1)})
    return rows


def samples_per_second(make: Callable[[int], Any]) -> tuple[float, int]:
    """(median rate, samples of a timing) of make(count), by the CPU time of this process: others do not count."""

    def seconds(count: int) -> float:
        start = time.process_time()
        make(count)
        return max(time.process_time() - start, 1e-6)

    count = 1
    make(count)  # compiled or read from the cache
    while (spent := seconds(count)) < SECONDS / 8:
        count *= 2
    count = max(1, round(count * SECONDS / spent))
    return count / statistics.median(seconds(count) for _ in range(REPEATS)), count


def loading(task: str, preset: str, data: Prepared) -> dict[str, Any]:
    """One task: time of a batch over an epoch, shuffling included; its share of a step of the smallest model."""
    run = config.resolve(task, preset, SMALLEST, 0, data.manifest, {})  # names a preset that the task has not
    size = run.recipe.train.batch
    batches = Batches(data.splits["train"], run.meta.towers, size=size, seed=0)
    count, real, whole = min(batches.per_epoch, EPOCH), 0, 0
    start = time.perf_counter()
    for step in range(count):
        batch = batches.batch(step)
        whole += batch.tokens_BTN.numel()
        real += real_tokens(batch)
    spent = time.perf_counter() - start
    trainer = Trainer(run, data, Where(torch.device("cpu")))
    for step in range(3):
        trainer.step(step)
    times = []
    for step in range(3, 3 + STEPS):
        start = time.perf_counter()
        trainer.step(step)
        times.append(time.perf_counter() - start)
    step_seconds = statistics.median(times)
    return {
        "task": task, "preset": preset, "dataset": data.manifest["dataset"], "batch": size,
        "tokens_per_second": round(real / spent), "padding": round(1 - real / whole, 4),
        "batch_ms": round(1e3 * spent / count, 4), "step_ms": round(1e3 * step_seconds, 3), "attention": SMALLEST,
        "waiting": round(spent / count / step_seconds, 5),
    }  # fmt: skip


def real_tokens(batch) -> int:
    """Tokens of a batch that are not padding."""
    return batch.tokens_BTN.numel() if batch.mask_BTN is None else int(batch.mask_BTN.sum())


def markdown(made: list[dict[str, Any]], loaded: list[dict[str, Any]], command: str) -> str:
    """The two tables."""
    rows = [
        [r["name"], f"{r['per_second']:,.0f}", *([f"{r['published_per_second']:g}", f"{r['ratio']:,.0f}"]
         if r["ratio"] else ["–", "–"])]
        for r in made
    ]  # fmt: skip
    rate = {r["name"]: r["per_second"] for r in made}
    lines = [f"Made by `{command}`.", "", "### Generators", ""]
    lines += markdown_table(["samples per second of one core", "here", "published program", "ratio"], rows)
    lines += [
        "",
        "Here: CPU time of one thread. Published program: its own speed on one core, measured for this suite on "
        "another machine and not repeated by this command; –: not measured.",
        f"100,000 ListOps samples: {100_000 / rate['ListOps']:,.0f} s on one core. 200,000 Pathfinder images (32 px, "
        f"contour 14): {200_000 / rate['Pathfinder 32 px, contour 14'] / 120:.1f} minutes on two; Path-X (128 px): "
        f"{200_000 / rate['Pathfinder 128 px, contour 14'] / 120:.0f} minutes on two.",
        "", "### Loading", "",
    ]  # fmt: skip
    header = [
        "task",
        "batch",
        "tokens/s",
        "padding, %",
        "batch, ms",
        f"step ({SMALLEST}), ms",
        "waiting, % of step",
    ]
    lines += markdown_table(header, [
        [f"{r['task']} ({r['preset']})", str(r["batch"]), f"{r['tokens_per_second']:,}", f"{100 * r['padding']:.1f}",
         f"{r['batch_ms']:.2f}", f"{r['step_ms']:.1f}", f"{100 * r['waiting']:.2f}"]
        for r in loaded
    ])  # fmt: skip
    lines += ["", "Tokens are real ones, padding not counted; a step includes its batch.", ""]
    return "\n".join([*lines, machine_line(torch.get_num_threads()), ""])
