"""`bench attention`: time and memory of one attention against length, beside fused softmax and public packages."""

from __future__ import annotations

import dataclasses
import json
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
from lra.bench.base import BASELINE, finish, ratios, serve, take_turns
from lra.bench.peers import PEERS, PYPI, build_peer, contenders, version
from lra.machine import PeakMemory, pick_device, set_threads
from lra.options import UsageError
from lra.records.markup import Grid, markdown
from lra.records.measured import Point, crossover
from lra.scaling.reports import machine_line
from models.base import AttentionBase
from models.features.blocks import CACHE
from models.layers import product

UNFUSED = "softmax unfused"
OWN = "softmax,{},softmax bf16,softmax causal,performer,performer bf16,performer causal,darkformer,linformer,linear"
DEFAULT = (
    *OWN.format(UNFUSED).split(","),
    "nystrom",
    "local",
    "reformer",
    "s4d",
    *(PYPI + name for name in PEERS),
)
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

    @property
    def unfused_bytes(self) -> float:
        """Of the N x N matrices of UNFUSED."""
        return 4.0 * MATRICES * self.B * self.H * self.N**2


class Unfused(AttentionBase):
    """Softmax attention with the N x N matrix in memory, as tables of 2020 measured it."""

    def attend(self, q_BHND, k_BHND, v_BHND, mask_BN, scale, causal):
        return (scale * q_BHND @ k_BHND.mT).softmax(-1) @ v_BHND


def bench_attention(args: Namespace) -> None:
    """`bench attention`: measure, print and write."""
    set_threads(args.threads)
    shapes = [Shape(args.batch, args.heads, n, args.head_dim, args.features) for n in lengths(args.lengths)]
    names = contenders(args.attentions, DEFAULT)
    for name in names:  # one that cannot be built is an error before anything is measured
        contender(name, short(shapes[0]))
    points, left_out = [], []
    with tqdm(total=len(shapes) * len(names) * (args.rounds + 1), disable=None, unit="run") as bar:
        for shape in shapes:
            large = shape.unfused_bytes > MEMORY_LIMIT
            left_out += [f"{UNFUSED} at N {shape.N:,}"] if large and UNFUSED in names else []
            fits = [name for name in names if name != UNFUSED or not large]
            points += measure(fits, shape, args.rounds, bar.update)
    gain = bf16_products(args.features, args.head_dim)
    measured = {"points": points, "left_out": left_out, "bf16_products": gain}
    finish(args.results, "attention", measured, attention_tables(points, left_out, gain, args.rounds))


def lengths(text: str) -> list[int]:
    """Comma-separated numbers of tokens."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--lengths must be comma-separated whole numbers; got {text!r}") from None
    if min(numbers) < 1:
        raise UsageError(f"--lengths must be at least 1; got {min(numbers)}")
    return sorted(set(numbers))


def measure(names: list[str], shape: Shape, rounds: int, done: Callable[[], Any]) -> list[dict[str, Any]]:
    """One point for each contender, taking turns.

    ratio: median over rounds of (seconds of softmax) / (seconds of the contender). peak_bytes: of one forward and
    backward, above a process that holds the inputs; None where the system cannot tell.
    """
    facts = {name: {"name": name, **dataclasses.asdict(shape)} for name in names}
    turns, points = take_turns("lra.bench.attention", facts, rounds, done), []
    for name in names:
        each, package = ratios(turns, name), name.startswith(PYPI)
        point = facts[name] | {
            "seconds": round(statistics.median(turns[name].seconds), 6),
            "ratio": round(statistics.median(each), 3),
            "ratio_range": [round(min(each), 3), round(max(each), 3)],
            "peak_bytes": turns[name].peak_bytes,
            "version": version(name.removeprefix(PYPI)) if package else None,
        }
        points.append(point)
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
    each = []
    for _ in range(rounds):
        seconds = []
        for pair in factors.values():
            product(*pair)  # brings its factors into the cache
            start = time.perf_counter()
            product(*pair)
            seconds.append(time.perf_counter() - start)
        each.append(seconds[0] / seconds[1])
    return round(statistics.median(each), 3)


def attention_tables(points: list[dict[str, Any]], left_out: list[str], gain: float, rounds: int) -> str:
    """Two tables, time and memory: a row for each contender and a column for each length."""
    by = {(p["name"], p["N"]): p for p in points}
    labels = {p["name"]: f"{p['name'].removeprefix(PYPI)} {p['version']} (PyPI)" if p["version"] else p["name"]
              for p in points}  # fmt: skip
    ns = sorted({p["N"] for p in points})

    def rows(cell: Callable[[dict[str, Any]], str]) -> dict[str, list[str]]:
        return {
            n: [label, *(cell(by[n, N]) if (n, N) in by else "–" for N in ns)] for n, label in labels.items()
        }

    header = ["attention", *(f"N {n:,}" for n in ns)]
    times = rows(lambda p: f"{1e3 * p['seconds']:,.1f} ({p['ratio']:.2f})")
    times = [[*cells, faster_from(points, name)] for name, cells in times.items()]
    memory = rows(lambda p: "–" if p["peak_bytes"] is None else f"{p['peak_bytes'] / 1e6:,.0f}")
    p, missing = points[0], ", ".join(left_out)
    # Of the engine's 28 N M D operations, 8 make logits (models/features/bidirectional.py).
    return f"""# Time and memory of one attention

`{{command}}`: forward and backward, B {p["B"]}, H {p["H"]}, D {p["D"]}, and M {p["M"]} features, landmarks, \
projected positions or window tokens; fp32 unless named; no padding. Each in a process of its own, taking turns; \
median of {rounds} rounds.

Milliseconds, and in brackets how many times as fast as fused softmax in the same round (median).

{markdown([Grid([*header, "faster from"], times)])}
Peak memory in MB above an idle process that holds q, k, v and the gradient of the output.

{markdown([Grid(header, list(memory.values()))])}
{f"Left out (its N x N matrices would not fit {MEMORY_LIMIT / 1e9:g} GB): {missing}." if missing else ""}

A product of the random-feature engine is {gain:.2f} times as fast in bf16 here. Its logits stay in fp32, 2 of 7 \
operations, so that bf16 can make its products together {28 / (8 + 20 / gain):.2f} times as fast at most.

{machine_line()}
"""


def faster_from(points: list[dict[str, Any]], name: str) -> str:
    """The length from which a contender is never slower than BASELINE."""

    def curve(of: str) -> list[Point]:
        return [Point(p["N"], p["seconds"], p["peak_bytes"], p["ratio"]) for p in points if p["name"] == of]

    length, shortest = crossover(curve(name), curve(BASELINE)), min(p["N"] for p in points)
    if name == BASELINE or length is None:
        return "–"
    return f"N {shortest:,} or less" if length <= shortest else f"N {length:,.0f}"


if __name__ == "__main__":
    alone(**json.loads(sys.argv[1]))
