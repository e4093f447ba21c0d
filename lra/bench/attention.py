"""`bench attention`: time and memory of one attention against length, beside fused softmax and public packages."""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from lra import registry
from lra.bench.apart import serve, take_turns
from lra.bench.base import machine_line, markdown_table, write_report
from lra.bench.peers import BASELINE, PEERS, PYPI, build_peer, contenders, version
from lra.machine import PeakMemory, pick_device, set_threads
from lra.options import UsageError
from lra.records.measured import Point, crossover
from models.base import AttentionBase
from models.features.gemm import CACHE
from models.layers import product

UNFUSED = "softmax unfused"
DEFAULT = (
    "softmax", UNFUSED, "softmax bf16", "softmax causal", "performer", "performer bf16", "performer causal",
    "darkformer", "linformer", "linear", "nystrom", "local", "reformer", "s4d", *(PYPI + name for name in PEERS),
)  # fmt: skip
MATRICES = 3  # N x N matrices that UNFUSED holds at once, forward and backward
MEMORY_LIMIT = 6e9  # bytes of them beyond which it is left out


@dataclass(frozen=True)
class Shape:
    """Sizes of a measurement: batch, heads, tokens, head width, features (landmarks, projected positions, window)."""

    B: int
    H: int
    N: int
    D: int
    M: int


class Unfused(AttentionBase):
    """Softmax attention with the N x N matrix in memory, as tables of 2020 measured it."""

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return (scale * q_BHND @ k_BHND.mT).softmax(-1) @ v_BHND


def bench(args: Namespace) -> None:
    """`bench attention`: measure, print and write."""
    set_threads(args.threads)
    shapes = [Shape(args.batch, args.heads, n, args.head_dim, args.features) for n in lengths(args.lengths)]
    names = contenders(args.attentions, DEFAULT)
    for name in names:  # one that cannot be built is an error before anything is measured
        contender(name, short(shapes[0]))
    points, left_out = [], []
    with tqdm(total=len(shapes) * len(names) * (args.rounds + 1), disable=None, unit="run") as bar:
        for shape in shapes:
            fits = [n for n in names if n != UNFUSED or _unfused_bytes(shape) <= MEMORY_LIMIT]
            left_out += [f"{n} at N {shape.N:,}" for n in names if n not in fits]
            points += measure(fits, shape, args.rounds, bar.update)
    command = shlex.join(["python", "-m", "lra", "bench", "attention", *sys.argv[3:]])
    found = {
        "points": points,
        "left_out": left_out,
        "bf16_products": bf16_products(args.features, args.head_dim),
    }
    text = markdown(**found, command=command, rounds=args.rounds)
    paths = write_report(args.results, "attention", command, found, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))


def lengths(text: str) -> list[int]:
    """Comma-separated numbers of tokens."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--lengths must be comma-separated whole numbers; got {text!r}") from None
    if min(found) < 1:
        raise UsageError(f"--lengths must be at least 1; got {min(found)}")
    return sorted(set(found))


def measure(names: list[str], shape: Shape, rounds: int, done: Callable[[], Any]) -> list[dict[str, Any]]:
    """One point for each contender, taking turns. `ratio` is the median over rounds of softmax's time by the
    contender's (above 1 = faster than softmax); `peak_bytes` is that of one forward and backward above a process
    that holds the inputs, None where the system cannot tell."""
    facts = {name: {"name": name, **dataclasses.asdict(shape)} for name in names}
    found = take_turns("lra.bench.attention", facts, rounds, done)
    points = []
    for name, turns in found.items():
        ratios = [s / t for s, t in zip(found[BASELINE].seconds, turns.seconds, strict=True)]
        points.append(
            facts[name] |
            {"seconds": round(statistics.median(turns.seconds), 6), "ratio": round(statistics.median(ratios), 3),
             "ratio_range": [round(f(ratios), 3) for f in (min, max)], "peak_bytes": turns.peak_bytes,
             "version": _version(name)}
        )  # fmt: skip
    return points


def alone(name: str, threads: int, **shape: int) -> None:
    """One contender, in this process: a short sequence, so that libraries are loaded, its peak, then `serve`."""
    set_threads(threads)
    whole = Shape(**shape)
    contender(name, short(whole))()
    run = contender(name, whole)
    meter = PeakMemory(pick_device("cpu"))
    run()
    serve(meter.read(), run)


def short(shape: Shape) -> Shape:
    """One head of the shortest sequence that every method takes."""
    return dataclasses.replace(shape, N=shape.M, B=1, H=1)


def contender(name: str, shape: Shape) -> Callable[[], None]:
    """One forward and backward of `name` on standard normal q, k, v (gradients of all, and of its parameters).

    A name is that of an attention, or PYPI and that of a package, followed by "unfused", "causal" or "bf16".
    """
    base, *how = name.split(" ")
    if unknown_words := set(how) - {"unfused", "causal", "bf16"}:
        raise UsageError(f"{name!r}: {', '.join(unknown_words)} is none of unfused, causal, bf16")
    sizes = {"heads": shape.H, "head_dim": shape.D, "max_len": shape.N}
    if name == UNFUSED:
        attention = Unfused(None, **sizes)
    elif base.startswith(PYPI):
        attention = build_peer(base.removeprefix(PYPI), **sizes, size=shape.M)
    else:
        attention = registry.build_attention(base, **sizes, **registry.budget_options(base, shape.M))
    if "causal" in how and not attention.causal:
        raise UsageError(f"{base} has no causal form")
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    generator = torch.Generator().manual_seed(0)
    size = (shape.B, shape.H, shape.N, shape.D)
    q, k, v, g = (torch.randn(size, generator=generator).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run() -> None:
        attention.zero_grad(set_to_none=True)
        for x in leaves:
            x.grad = None
        attention(*leaves, causal="causal" in how).backward(g)

    return run


def bf16_products(M: int, D: int, rounds: int = 200) -> float:
    """How many times as fast a product of the engine is in bf16, one chunk of tokens by M features, D wide: the
    median ratio of `rounds` turns, each of both."""
    x = torch.randn(max(1, CACHE // M), D)
    factors = {dtype: (x.to(dtype), torch.randn(M, D).to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    ratios = []
    for _ in range(rounds):
        seconds = []
        for pair in factors.values():
            product(*pair)  # brings its factors into the cache
            start = time.perf_counter()
            product(*pair)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    return round(statistics.median(ratios), 3)


def _unfused_bytes(shape: Shape) -> float:
    return 4.0 * MATRICES * shape.B * shape.H * shape.N**2


def _version(name: str) -> str | None:
    return version(name.removeprefix(PYPI)) if name.startswith(PYPI) else None


def markdown(
    points: list[dict[str, Any]], left_out: list[str], bf16_products: float, command: str, rounds: int
) -> str:
    """Two tables, time and memory, one row for each contender and one column for each length."""
    names = list(dict.fromkeys(p["name"] for p in points))
    by = {(p["name"], p["N"]): p for p in points}
    ns = sorted({p["N"] for p in points})
    header = ["attention", *(f"N {n:,}" for n in ns)]
    p = points[0]
    lines = [
        "# Time and memory of one attention",
        "",
        f"`{command}`: forward and backward, B {p['B']}, H {p['H']}, D {p['D']}, and M {p['M']} features, landmarks, "
        f"projected positions or window tokens; fp32 unless named; no padding. "
        f"Each in a process of its own, taking turns; median of {rounds} rounds.",
        "",
        "Milliseconds, and in brackets how many times as fast as fused softmax in the same round (median).",
        "",
    ]
    rows = [[_label(n, points), *(_time(by.get((n, N))) for N in ns), _cross(points, n)] for n in names]
    lines += markdown_table([*header, "faster from"], rows)
    lines += [
        "",
        "Peak memory in MB above an idle process that holds q, k, v and the gradient of the output.",
        "",
    ]
    lines += markdown_table(
        header, [[_label(n, points), *(_memory(by.get((n, N))) for N in ns)] for n in names]
    )
    if left_out:
        lines += [
            "",
            f"Left out (its N x N matrices would not fit {MEMORY_LIMIT / 1e9:g} GB): {', '.join(left_out)}.",
        ]
    # Of the engine's 28 N M D operations, 8 make logits (models/features/bidirectional.py).
    bound = 28 / (8 + 20 / bf16_products)
    lines += [
        "",
        f"A product of the random-feature engine is {bf16_products:.2f} times as fast in bf16 here. Its logits stay in "
        f"fp32, 2 of 7 operations, so that bf16 can make its products together {bound:.2f} times as fast at most.",
    ]
    return "\n".join([*lines, "", machine_line(torch.get_num_threads()), ""])


def _label(name: str, points: list[dict[str, Any]]) -> str:
    found = next(p["version"] for p in points if p["name"] == name)
    return f"{name.removeprefix(PYPI)} {found} (PyPI)" if found else name


def _time(point: dict[str, Any] | None) -> str:
    return "–" if point is None else f"{1e3 * point['seconds']:,.1f} ({point['ratio']:.2f})"


def _memory(point: dict[str, Any] | None) -> str:
    return "–" if point is None or point["peak_bytes"] is None else f"{point['peak_bytes'] / 1e6:,.0f}"


def _cross(points: list[dict[str, Any]], name: str) -> str:
    def curve(of: str) -> list[Point]:
        return [Point(p["N"], p["seconds"], p["peak_bytes"], p["ratio"]) for p in points if p["name"] == of]

    found = crossover(curve(name), curve(BASELINE))
    if name == BASELINE or found is None:
        return "–"
    shortest = min(p["N"] for p in points)
    return f"N {shortest:,} or less" if found <= shortest else f"N {found:,.0f}"


if __name__ == "__main__":
    alone(**json.loads(sys.argv[1]))
