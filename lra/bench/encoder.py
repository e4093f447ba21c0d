"""`bench encoder`: the training step of the shared encoder with each attention, beside public packages in it."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lra import registry
from lra.bench.apart import serve, take_turns
from lra.bench.base import machine_line, markdown_table, write_report
from lra.bench.peers import BASELINE, PYPI, build_peer, contenders
from lra.bench.profile import profiled
from lra.machine import PeakMemory, matmul_rates, pick_device, set_threads
from lra.options import UsageError
from lra.training.evaluate import autocast
from lra.training.optim import build_optimizer
from models.base import AttentionBase
from models.encoder import Encoder
from models.heads import Classifier, Classify
from tasks import base

COMPILED = "compiled"  # behind a name: the model through torch.compile
DEFAULT = (
    "softmax", "performer", "darkformer", "linformer", "linear", "nystrom", "local", "reformer", "s4d", "constant",
    PYPI + "performer-pytorch", PYPI + "darkformer-pytorch",
)  # fmt: skip
VOCAB, CLASSES = 257, 2  # of Text: bytes and padding, two classes


class Layout(NamedTuple):
    """A batch of B sequences of N tokens, without padding."""

    B: int
    N: int

    def __str__(self):
        return f"{self.B} x {self.N:,}"


def bench(args: Namespace) -> None:
    """`bench encoder`: measure, print and write."""
    set_threads(args.threads)
    found = layouts(args.layouts)
    names = contenders(args.attentions, DEFAULT)
    rates = matmul_rates(args.precision)
    peak = max(rates.values())
    points: list[dict[str, Any]] = []
    with tqdm(total=len(found) * len(names) * (args.rounds + 1), disable=None, unit="step") as bar:
        for layout in found:
            points += measure(names, layout, args.features, args.precision, args.rounds, peak, bar.update)
    # Generated kernels have no names to sort by.
    eager = [name for name in names if COMPILED not in name.split()]
    shares = {name: profiled(Step(name, found[-1], args.features, args.precision).run) for name in eager}
    command = shlex.join(["python", "-m", "lra", "bench", "encoder", *sys.argv[3:]])
    text = markdown(points, command, args, rates) + profile_markdown(shares, found[-1])
    text += f"\n{machine_line(torch.get_num_threads())}\n"
    measured = {
        "matmul_rates": rates,
        "points": points,
        "profile": {"layout": str(found[-1]), "shares": shares},
    }
    paths = write_report(args.results, "encoder", command, measured, text)
    print(text + "\nwritten: " + ", ".join(map(str, paths)))


def layouts(text: str) -> list[Layout]:
    """Comma-separated BxN."""
    try:
        found = [Layout(*map(int, part.split("x"))) for part in text.split(",")]
    except (ValueError, TypeError):
        raise UsageError(f"--layouts must be comma-separated BxN, such as 32x1024; got {text!r}") from None
    if min(min(one) for one in found) < 1:
        raise UsageError(f"--layouts must be at least 1x1; got {text!r}")
    return found


def measure(
    names: list[str],
    layout: Layout,
    features: int,
    precision: str,
    rounds: int,
    peak: float,
    done: Callable[[], Any],
) -> list[dict[str, Any]]:
    """One point for each attention, taking turns. `ratio` is the median over rounds of softmax's time by the
    attention's; `peak_bytes` that of a step above a process that holds model and batch; `matmul_share` the operations
    of the step's matrix products per second, as a share of `peak`."""
    facts = {
        name: {"name": name, "B": layout.B, "N": layout.N, "features": features, "precision": precision}
        for name in names
    }
    found = take_turns("lra.bench.encoder", facts, rounds, done)
    points = []
    for name, turns in found.items():
        ratios = [s / t for s, t in zip(found[BASELINE].seconds, turns.seconds, strict=True)]
        seconds, flops = statistics.median(turns.seconds), Step(name, layout, features, precision).flops
        share = None if flops is None else round(flops / seconds / peak, 4)
        points.append(
            {"name": name, "B": layout.B, "N": layout.N, "M": features, "seconds": round(seconds, 6),
             "ratio": round(statistics.median(ratios), 3), "tokens_per_second": round(layout.B * layout.N / seconds),
             "peak_bytes": turns.peak_bytes, "flops": flops, "matmul_share": share}
        )  # fmt: skip
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
        size = base.Encoder()
        heads, head_dim = size.heads, size.width // size.heads

        attention, *how = name.split()
        if set(how) - {COMPILED}:
            raise UsageError(f"{name!r}: a name, and at most {COMPILED!r} behind it")

        def build(layer: int, max_len: int) -> AttentionBase:
            shape = {"heads": heads, "head_dim": head_dim, "max_len": max_len}
            if attention.startswith(PYPI):
                return build_peer(attention.removeprefix(PYPI), **shape, size=features)
            return registry.build_attention(
                attention, **shape, layer=layer, **registry.budget_options(attention, features)
            )

        torch.manual_seed(0)
        encoder = Encoder(
            build, vocab=VOCAB, max_len=layout.N, layers=size.layers, width=size.width, heads=heads, ffn=size.ffn,
            dropout=size.dropout,
        )  # fmt: skip
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

    def _flops(self, size: base.Encoder, heads: int, head_dim: int) -> int:
        """Of the matrix products: a backward pass counted as twice the forward one, recomputation not counted."""
        B, N = self.layout
        attention = self.model.encoder.attentions[0]
        projections = (4 if attention.reads_qk else 2) * 2 * size.width**2
        per_layer = B * N * (projections + 4 * size.width * size.ffn) + attention.flops(B, heads, N, head_dim)
        return 3 * size.layers * per_layer


def markdown(points: list[dict[str, Any]], command: str, args: Namespace, rates: dict[str, float]) -> str:
    """Two tables: milliseconds with ratios, and shares of the matmul peak."""
    names = list(dict.fromkeys(p["name"] for p in points))
    shapes = list(dict.fromkeys(Layout(p["B"], p["N"]) for p in points))
    by = {(p["name"], p["B"], p["N"]): p for p in points}
    size = base.Encoder()
    lines = [
        "# A training step of the shared encoder",
        "",
        f"`{command}`: {size.layers} layers, width {size.width}, {size.heads} heads, FFN {size.ffn}, "
        f"dropout {size.dropout}, {args.features} features; {args.precision}, no padding. "
        f"Each in a process of its own, taking turns; median of {args.rounds} rounds.",
        "",
        "Milliseconds, and in brackets how many times as fast as with fused softmax in the same round (median).",
        "",
    ]

    def rows(cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
        return [[n.removeprefix(PYPI), *(cell(by[(n, *s)]) for s in shapes)] for n in names]

    header = ["attention", *map(str, shapes)]
    lines += markdown_table(header, rows(lambda p: f"{1e3 * p['seconds']:,.0f} ({p['ratio']:.2f})"))
    lines += ["", "Peak memory in MB above a process that holds model and batch.", ""]
    peaks = rows(lambda p: "–" if p["peak_bytes"] is None else f"{p['peak_bytes'] / 1e6:,.0f}")
    lines += markdown_table(header, peaks)
    lines += [
        "",
        f"Share of the matmul peak of this machine, {max(rates.values()) / 1e9:,.0f} GFLOP/s, measured in the same "
        f"process ({', '.join(f'{name} {rate / 1e9:,.0f}' for name, rate in rates.items())}); products that the engine "
        "recomputes are not counted as work.",
        "",
    ]
    share = rows(lambda p: "–" if p["matmul_share"] is None else f"{100 * p['matmul_share']:.0f}%")
    lines += markdown_table(header, share)
    return "\n".join([*lines, ""])


def profile_markdown(shares: dict[str, dict[str, float]], layout: Layout) -> str:
    """A table of where the time of a step goes, for each attention at one layout."""
    kinds = list(next(iter(shares.values())))
    rows = [[n.removeprefix(PYPI), *(f"{100 * s[k]:.0f}" for k in kinds)] for n, s in shares.items()]
    lines = [
        "",
        f"Where the time of a step goes at {layout}, % of the CPU time that PyTorch's profiler sees in one step.",
        "",
    ]
    return "\n".join([*lines, *markdown_table(["attention", *kinds], rows), ""])


if __name__ == "__main__":
    alone(**json.loads(sys.argv[1]))
