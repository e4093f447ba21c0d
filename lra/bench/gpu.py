"""`bench gpu`: one command that checks this suite on an NVIDIA GPU and measures it there, within minutes.

A row stands in results/bench/gpu.json and gpu.md as soon as it is finished. What fails is a row, too, and the next one
follows. `--device cpu` goes the same way at tiny sizes.
"""

from __future__ import annotations

import copy
import functools
import os
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lra import registry
from lra.bench import attention, encoder
from lra.bench.base import megabytes, quartiles, seconds_of, told
from lra.bench.peers import build
from lra.machine import PeakMemory, environment, pick_device
from lra.options import STOPPED, UsageError
from lra.records.markup import MISSING, Grid, Heading, markdown
from lra.records.measured import BASELINE
from lra.scaling.reports import write_report
from models.features import flash

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # of the norm; TF32 may be on
HYBRIDS = "performer causal,performer hybrid,performer hybrid causal,darkformer"
METHODS = f"softmax,performer,{HYBRIDS},lfk,optimal,linear,local"
TIMED = f"softmax,softmax bf16,softmax causal,performer,performer bf16,performer plain,{HYBRIDS}"
STEPS = "softmax,performer M64,performer M256,darkformer M256,constant"


class Size(NamedTuple):
    """How much is done on a kind of device."""

    attention: dict[str, int]  # facts of lra/bench/attention.py, but for N
    lengths: tuple[int, ...]
    layouts: tuple[tuple[int, int], ...]  # batch, tokens
    preset: str
    rounds: int


LENGTHS, LAYOUTS = (512, 1024, 4096, 16384, 65536), ((32, 1024), (32, 2048), (32, 4096))
SIZES = {
    "cuda": Size({"B": 2, "H": 4, "D": 64, "M": 256}, LENGTHS, LAYOUTS, "paper", 5),
    "cpu": Size({"B": 1, "H": 2, "D": 8, "M": 16}, (64, 192), ((2, 64),), "smoke", 1),
}
Row = dict[str, str]  # of a table: its first column, and others


def bench_gpu(args: Namespace) -> int:
    """`bench gpu`: check, measure, write as it goes. Exit code 1 when a check fails."""
    if args.device == "cuda" and not torch.cuda.is_available():
        lacks = "bench gpu needs an NVIDIA GPU and PyTorch for CUDA, and this machine lacks one of them"
        raise UsageError(f"{lacks}; --device cpu rehearses it at tiny sizes")
    end, size = time.monotonic() + 60 * args.minutes, SIZES[args.device]
    parts: dict[str, Iterator[Row]] = {
        "Kernels against the definition": kernels(args.device),
        "Methods against their references": methods(args.device),
        "Attention alone, forward and backward": attentions(args.device, size),
        "Training step of the encoder, bf16": steps(args.device, size),
        f"A cell of the {size.preset} preset, stopped and resumed": cell(args, size, end),
    }
    tables: dict[str, list[Row]] = {}
    for title, rows in parts.items():
        while time.monotonic() < end and (row := next(rows, None)):
            tables.setdefault(title, []).append(row)
            print(" | ".join(row.values()))
            write(args, tables, "not finished")
    write(args, tables, f"{'stopped' if time.monotonic() > end else 'finished'}, {args.minutes} minutes allowed")
    return int(any(row.get("holds", "yes") != "yes" for rows in tables.values() for row in rows))


def write(args: Namespace, tables: dict[str, list[Row]], state: str) -> None:
    """Write what there is so far."""
    command = shlex.join(["python", "-m", "lra", "bench", "gpu", *sys.argv[3:]])
    env = environment(pick_device(args.device)) | {"load": round(os.getloadavg()[0], 2)}
    blocks = []
    for title, rows in tables.items():
        blocks += [Heading(title), Grid((*rows[0],), tuple(tuple(row.values()) for row in rows))]
    text = f"# This suite on {env['gpu'] or 'a CPU, rehearsed'}\n\n`{command}`: {state}. torch {env['torch']}.\n\n"
    write_report(args.results, "gpu", command, {"env": env, "state": state, "tables": tables}, text + markdown(blocks))


# Checks


def verdict(what: str, tolerance: float, check: Callable[[], float]) -> Row:
    """The row of a check, which returns an error or raises one."""
    try:
        error = check()
        holds = "yes" if error <= tolerance else "NO"
    except Exception as failure:  # of the device or of a kernel: what this command looks for
        error, holds = float("inf"), told(failure)
    return {"what": what, "error": f"{error:.1e}", "tolerance": f"{tolerance:g}", "holds": holds}


def distance(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """The largest of the norms of the differences, each relative to the norm of what is wanted; infinite for NaN."""
    errors = [float((x.cpu().double() - y).norm() / y.norm()) for x, y in zip(got, want, strict=True)]
    return max(e if e == e else float("inf") for e in errors)


def outcome(run: Callable[..., tuple[torch.Tensor, ...]], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and the gradients of the leaves for fixed gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    outs = run(*leaves)
    source = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=source).to(x) for x in outs]
    gradients = torch.autograd.grad(outs, leaves, weights)
    return [x.detach() for x in (*outs, *gradients)]


def definition(q, k, v, key_bias, causal):
    """What `flash` computes, as its module states it."""
    logits = q @ k.mT + key_bias[..., None, :]
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def kernels(device: str) -> Iterator[Row]:
    """`flash` by each backend, values, log-sum-exp and all gradients, beside the definition in float64."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 521, 61, generator=source) for _ in range(3))
    bias = torch.randn(2, 3, 521, generator=source)
    bias[1, :, 300:] = flash.NEVER
    for dtype, tolerance in TOLERANCE.items():
        inputs = [*(x.to(dtype) for x in (q / 4, k, v)), bias]
        for causal in (False, True):
            want = outcome(functools.partial(definition, causal=causal), [x.double() for x in inputs])
            for allowed in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):

                def check() -> float:
                    run = functools.partial(flash.flash, causal=causal)
                    return distance(outcome(run, [x.to(device) for x in inputs]), want)

                with sdpa_kernel(allowed):
                    backend = flash.backend(device, torch.float32 if dtype == torch.float16 else dtype)
                    row = verdict(f"{str(dtype)[6:]}{' causal' * causal}: {backend}", tolerance, check)
                yield row


def methods(device: str) -> Iterator[Row]:
    """Attentions with padding, beside their float64 references: outputs and gradients; and finite at q, k times 30."""
    B, H, N, D, M = 3, 2, 397, 32, 64
    source = torch.Generator().manual_seed(0)
    qkv = [torch.randn(B, H, N, D, generator=source) for _ in range(3)]
    mask_BN = torch.arange(N) < torch.tensor([N, 211, 0])[:, None]
    real = mask_BN[:, None, :, None]
    for name in METHODS.split(","):
        method, words = build(name, M, ("causal",), heads=H, head_dim=D, max_len=N)
        reference = copy.deepcopy(method).double()
        naive = getattr(registry.attention_module(method.name), f"naive_{method.name}")
        how = {"causal": True} if "causal" in words else {}
        for dtype, tolerance in TOLERANCE.items():
            leaves = [(x / s).to(dtype) for x, s in zip(qkv, (2, 2, 1), strict=True)]

            def check() -> float:
                there, mask = copy.deepcopy(method).to(device), mask_BN.to(device)
                want = outcome(lambda *x: (naive(reference, *x, mask_BN, **how) * real,), [x.double() for x in leaves])
                inputs = [x.to(device) for x in leaves]
                got = outcome(lambda *x: (there(*x, mask, **how) * real.to(device),), inputs)
                large = there(30 * inputs[0], 30 * inputs[1], inputs[2], mask, **how)
                return distance(got, want) if large.isfinite().all() else float("inf")

            yield verdict(f"{name}, {str(dtype)[6:]}", tolerance, check)


# Measurements


def attentions(device: str, size: Size) -> Iterator[Row]:
    """Each attention at each length."""
    for N in size.lengths:
        facts = size.attention | {"N": N, "device": device}
        made = {n: lambda n=n: attention.contender(n, **facts)["run"] for n in TIMED.split(",")}
        yield from group(f"N {N:,}", made, device, size.rounds)


def steps(device: str, size: Size) -> Iterator[Row]:
    """A training step with each attention at each layout."""
    for B, N in size.layouts:
        facts = {"B": B, "N": N, "M": size.attention["M"], "precision": "bf16", "device": device}
        made = {n: lambda n=n: encoder.Step(n, **facts).run for n in STEPS.split(",")}
        yield from group(f"{B} x {N:,}", made, device, size.rounds)


def group(where: str, made: dict[str, Callable[[], Callable]], device: str, rounds: int) -> Iterator[Row]:
    """Contenders that take turns, softmax first: a row for each."""
    runs, rows = {}, {}
    for name, make in made.items():
        rows[name] = {"attention": name, "where": where, "ms": MISSING, "times softmax": MISSING, "MB": MISSING}
        try:
            run = make()
            run()
            meter = PeakMemory(torch.device(device))
            run()
            rows[name]["MB"] = megabytes({"peak_bytes": meter.read()})
            runs[name] = run
        except Exception as failure:
            rows[name]["MB"] = told(failure)
    turns = [{name: seconds_of(run, device) for name, run in runs.items()} for _ in range(rounds)]
    for name, row in rows.items():
        if name in runs:
            seconds = [t[name] for t in turns]
            row["ms"] = f"{1e3 * quartiles(seconds)[1]:,.2f}"
            if BASELINE in runs:
                low, ratio, high = quartiles([t[BASELINE] for t in turns], seconds)
                row["times softmax"] = f"{ratio:.2f} [{low:.2f}, {high:.2f}]"
        yield row


# A run


def cell(args: Namespace, size: Size, end: float) -> Iterator[Row]:
    """Performer on ListOps: prepared, trained for half of the time that is left, stopped, and resumed."""
    data = ["listops", "--preset", size.preset, "--data", str(args.data)]
    training = ["--attention", "performer", "--device", args.device, "--results", str(args.results)]
    yield command(["prepare", *data], end)
    half = (time.monotonic() + end) / 2
    for until in (half, end):
        yield command(["train", *data, *training, "--runs", str(args.runs)], until)


def command(words: list[str], until: float) -> Row:
    """Run `python -m lra WORDS`, and stop it as a user would at the time `until`."""
    start = time.monotonic()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, "-m", "lra", *words], **pipes) as process:
        try:
            said, _ = process.communicate(timeout=max(1, until - start))
        except subprocess.TimeoutExpired:
            process.terminate()
            said, _ = process.communicate()
    last = said.replace("\r", "\n").strip().splitlines() or [""]
    seconds, holds = f"{time.monotonic() - start:.0f}", "yes" if process.returncode in (0, STOPPED) else "NO"
    return {"command": " ".join(words[:2]), "seconds": seconds, "last line": last[-1], "holds": holds}
