"""`bench encoder`: the training step of the shared encoder with each attention, beside public packages in it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from lra import registry
from lra.bench.base import finish, ratios, serve, take_turns
from lra.bench.peers import PYPI, build_peer, contenders
from lra.machine import PeakMemory, pick_device, set_threads
from lra.options import UsageError
from lra.records.markup import Grid, markdown
from lra.scaling.reports import machine_line
from lra.training.evaluate import autocast
from lra.training.optim import build_optimizer
from models.base import AttentionBase
from models.encoder import Encoder
from models.heads import Classifier, Classify
from models.layers import product
from tasks import base

COMPILED = "compiled"  # behind a name: the model through torch.compile
OWN = "softmax,performer,darkformer,linformer,linear,nystrom,local,reformer,s4d,constant"
DEFAULT = (*OWN.split(","), PYPI + "performer-pytorch", PYPI + "darkformer-pytorch")
VOCAB, CLASSES = 257, 2  # of Text: bytes and padding, two classes
KINDS = {  # of operations: what their names contain; the first kind that fits counts
    "fused softmax attention": ("scaled_dot_product",),
    "matrix products": ("_linear_pointwise", "::mm", "::addmm", "::bmm", "::baddbmm", "convolution", "fft"),
    "random numbers": ("bernoulli", "rand", "normal_", "uniform_"),
    "norms and activations": ("layer_norm", "gelu", "elu"),
    "exponentials and sums": ("softmax", "exp", "sum", "amax", "norm", "cumsum"),
    "optimizer": ("adamw", "Optimizer"),
}
REST = "elementwise, copies, gathers"
CALLS = "calls from Python"  # what is not an operation of a tensor library


class Layout(NamedTuple):
    """A batch of B sequences of N tokens, without padding."""

    B: int
    N: int

    def __str__(self):
        return f"{self.B} x {self.N:,}"


def bench_encoder(args: Namespace) -> None:
    """`bench encoder`: measure, print and write."""
    set_threads(args.threads)
    shapes, names = layouts(args.layouts), contenders(args.attentions, DEFAULT)
    rates = matmul_rates(args.precision)
    points: list[dict[str, Any]] = []
    with tqdm(total=len(shapes) * len(names) * (args.rounds + 1), disable=None, unit="step") as bar:
        for layout in shapes:
            points += measure(names, layout, args, max(rates.values()), bar.update)
    # Generated kernels have no names to sort by.
    eager = [name for name in names if COMPILED not in name.split()]
    shares = {name: profiled(Step(name, shapes[-1], args.features, args.precision).run) for name in eager}
    profile = {"layout": str(shapes[-1]), "shares": shares}
    measured = {"matmul_rates": rates, "points": points, "profile": profile}
    finish(args.results, "encoder", measured, encoder_tables(points, rates, profile, args))


def layouts(text: str) -> list[Layout]:
    """Comma-separated BxN."""
    try:
        shapes = [Layout(*map(int, part.split("x"))) for part in text.split(",")]
    except (ValueError, TypeError):
        raise UsageError(f"--layouts must be comma-separated BxN, such as 32x1024; got {text!r}") from None
    if min(map(min, shapes)) < 1:
        raise UsageError(f"--layouts must be at least 1x1; got {text!r}")
    return shapes


def matmul_rates(precision: str = "fp32", *, size: int = 1024, rounds: int = 20) -> dict[str, float]:
    """Operations per second of a square matrix product on the CPU, the best of `rounds`: as PyTorch multiplies
    (in fp32 MKL, where it is built with it), and as models/layers.py does (oneDNN)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, w = torch.randn(2, size, size).to(dtype)
    ways = {"torch.matmul": torch.matmul, "models.layers": product}
    best = dict.fromkeys(ways, math.inf)
    for _ in range(rounds):
        for name, multiply in ways.items():
            start = time.perf_counter()
            multiply(x, w)
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: 2 * size**3 / seconds for name, seconds in best.items()}


def measure(
    names: list[str], layout: Layout, args: Namespace, peak: float, done: Callable[[], Any]
) -> list[dict[str, Any]]:
    """One point for each attention, taking turns.

    ratio: median over rounds of (seconds of softmax) / (seconds of the attention). peak_bytes: of a step, above a
    process that holds model and batch. matmul_share: operations of the step's matrix products per second, over `peak`.
    """
    common = {"B": layout.B, "N": layout.N, "features": args.features, "precision": args.precision}
    facts = {name: {"name": name, **common} for name in names}
    turns, points = take_turns("lra.bench.encoder", facts, args.rounds, done), []
    for name in names:
        seconds = statistics.median(turns[name].seconds)
        flops = Step(name, layout, args.features, args.precision).flops
        point = {"name": name, "B": layout.B, "N": layout.N, "M": args.features, "seconds": round(seconds, 6)}
        point |= {"ratio": round(statistics.median(ratios(turns, name)), 3)}
        point |= {"tokens_per_second": round(layout.B * layout.N / seconds)}
        point |= {"peak_bytes": turns[name].peak_bytes, "flops": flops}
        points.append(point | {"matmul_share": flops and round(flops / seconds / peak, 4)})
    return points


def alone(name: str, B: int, N: int, features: int, precision: str, threads: int) -> None:
    """One attention, in this process: a short step, so that libraries are loaded, the peak of a whole one, then
    `serve`."""
    set_threads(threads)
    Step(name, Layout(1, features), features, precision).run()
    step = Step(name, Layout(B, N), features, precision)
    meter = PeakMemory(pick_device("cpu"))
    step.run()
    serve(meter.read(), step.run)


class Step:
    """A training step, as `train` makes it: forward, loss, backward, AdamW; the encoder of the `paper` preset."""

    def __init__(self, name: str, layout: Layout, features: int, precision: str):
        self.precision, self.layout = precision, layout
        size = base.Stack()
        heads, head_dim = size.heads, size.width // size.heads
        attention, *how = name.split()
        if set(how) - {COMPILED}:
            raise UsageError(f"{name!r}: a name, and at most {COMPILED!r} behind it")

        def build(layer: int, max_len: int) -> AttentionBase:
            shape = {"heads": heads, "head_dim": head_dim, "max_len": max_len}
            if attention.startswith(PYPI):
                return build_peer(attention.removeprefix(PYPI), **shape, size=features)
            options = registry.budget_options(attention, features)
            return registry.build_attention(attention, **shape, layer=layer, **options)

        torch.manual_seed(0)
        shape = {"layers": size.layers, "width": size.width, "heads": heads, "ffn": size.ffn}
        encoder = Encoder(build, vocab=VOCAB, max_len=layout.N, dropout=size.dropout, **shape)
        self.model = Classifier(encoder, Classify(size.width, size.ffn, CLASSES)).train()
        self.forward = torch.compile(self.model) if how else self.model
        self.optimizer = build_optimizer(self.model, base.Optim(steps=1, batch=layout.B))
        self.tokens_BTN = torch.randint(1, VOCAB, (layout.B, 1, layout.N))
        self.labels_B = torch.randint(CLASSES, (layout.B,))
        self.flops = None if name.startswith(PYPI) else self._flops(size, heads, head_dim)

    def run(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), self.precision):
            logits_BC = self.forward(self.tokens_BTN)
        F.cross_entropy(logits_BC.float(), self.labels_B).backward()
        self.optimizer.step()

    def _flops(self, size: base.Stack, heads: int, head_dim: int) -> int:
        """Of the matrix products: a backward pass counted as twice the forward one, recomputation not counted."""
        B, N = self.layout
        attention = self.model.encoder.attentions[0]
        projections = (4 if attention.reads_qk else 2) * 2 * size.width**2
        per_layer = B * N * (projections + 4 * size.width * size.ffn) + attention.flops(B, heads, N, head_dim)
        return 3 * size.layers * per_layer


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Kind of operation to its share of a step's time on the CPU (the sum is 1), after one that is not counted."""
    step()
    with _silence(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {name: spent[name] / whole for name in (*KINDS, REST, CALLS)}


def kind(operation: str) -> str:
    """The kind of an operation by its name in the profiler, such as aten::mm."""
    if "::" not in operation or operation.startswith("autograd::"):
        return "optimizer" if "Optimizer" in operation else CALLS
    return next((name for name, parts in KINDS.items() if any(part in operation for part in parts)), REST)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches stderr: the profiler writes lines for its developers there, whatever its log level."""
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def encoder_tables(
    points: list[dict[str, Any]], rates: dict[str, float], profile: dict[str, Any], args: Namespace
) -> str:
    """Four tables: milliseconds with ratios, memory, shares of the matmul peak, and where the time of a step goes."""
    names = list(dict.fromkeys(p["name"] for p in points))
    shapes = list(dict.fromkeys(Layout(p["B"], p["N"]) for p in points))
    by = {(p["name"], p["B"], p["N"]): p for p in points}
    size, shares = base.Stack(), profile["shares"]

    def table(cell: Callable[[dict[str, Any]], str]) -> str:
        rows = [[name.removeprefix(PYPI), *(cell(by[(name, *s)]) for s in shapes)] for name in names]
        return markdown([Grid(["attention", *map(str, shapes)], rows)])

    kinds = list(next(iter(shares.values()), ()))
    profiles = [
        [name.removeprefix(PYPI), *(f"{100 * s[k]:.0f}" for k in kinds)] for name, s in shares.items()
    ]
    return f"""# A training step of the shared encoder

`{{command}}`: {size.layers} layers, width {size.width}, {size.heads} heads, FFN {size.ffn}, dropout {size.dropout}, \
{args.features} features; {args.precision}, no padding. Each in a process of its own, taking turns; median of \
{args.rounds} rounds.

Milliseconds, and in brackets how many times as fast as with fused softmax in the same round (median).

{table(lambda p: f"{1e3 * p['seconds']:,.0f} ({p['ratio']:.2f})")}
Peak memory in MB above a process that holds model and batch.

{table(lambda p: "–" if p["peak_bytes"] is None else f"{p['peak_bytes'] / 1e6:,.0f}")}
Share of the matmul peak of this machine, {max(rates.values()) / 1e9:,.0f} GFLOP/s, measured in the same process \
({", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())}); products that the engine recomputes are \
not counted as work.

{table(lambda p: "–" if p["matmul_share"] is None else f"{100 * p['matmul_share']:.0f}%")}
Where the time of a step goes at {profile["layout"]}, % of the CPU time that PyTorch's profiler sees in one step.

{markdown([Grid(["attention", *kinds], profiles)])}
{machine_line()}
"""


if __name__ == "__main__":
    alone(**json.loads(sys.argv[1]))
