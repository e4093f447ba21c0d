"""`bench encoder`: the training step of the shared encoder with each attention, beside public packages in it."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lra import registry
from lra.bench.base import alone, compare, finish, megabytes, milliseconds, table, whole_numbers
from lra.bench.peers import PYPI, build_peer, contenders
from lra.machine import set_threads
from lra.options import UsageError
from lra.records.markup import MISSING
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


def bench_encoder(args: Namespace) -> None:
    """`bench encoder`: measure, print and write. A point has the operations of the matrix products of a step, and
    their share of what a large product reaches."""
    set_threads(args.threads)
    layouts = whole_numbers("--layouts", args.layouts, "32x1024")
    names = contenders(args.attentions, DEFAULT)
    peak, points = matmul_rate(args.precision), []
    with tqdm(total=len(layouts) * len(names) * (args.rounds + 1), disable=None, unit="step") as bar:
        for B, N in layouts:
            facts = {"B": B, "N": N, "M": args.features, "precision": args.precision}
            points += compare("lra.bench.encoder", names, facts, args.rounds, bar.update)
    for p in points:
        flops = None if p["name"].startswith(PYPI) else Step(p["name"], p["B"], p["N"], p["M"]).flops()
        p |= {"flops": flops, "matmul_share": flops and round(flops / p["seconds"] / peak, 4)}
    size = base.Stack()

    def column(p: dict[str, Any]) -> str:
        return f"{p['B']} x {p['N']:,}"

    def share(p: dict[str, Any]) -> str:
        return MISSING if p["matmul_share"] is None else f"{100 * p['matmul_share']:.0f}%"

    text = f"""# A training step of the shared encoder

`{{command}}`: {size.layers} layers, width {size.width}, {size.heads} heads, FFN {size.ffn}, dropout {size.dropout}, \
{args.features} features; {args.precision}, no padding. Each in a process of its own, taking turns; median of \
{args.rounds} rounds.

Milliseconds, and in brackets how many times as fast as with fused softmax in the same round (median).

{table(points, column, milliseconds)}
Peak memory in MB above a process that holds model and batch.

{table(points, column, megabytes)}
Share of the matmul peak of this machine, {peak / 1e9:,.0f} GFLOP/s, measured in the same process; products that the \
engine recomputes are not counted as work.

{table(points, column, share)}"""
    finish(args.results, "encoder", "encoder", {"matmul_rate": peak, "points": points}, text)


def matmul_rate(precision: str, *, size: int = 1024, rounds: int = 20) -> float:
    """Operations per second of a square matrix product of models/layers.py, the best of `rounds`."""
    x, w = torch.randn(2, size, size).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        product(x, w)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


class Step:
    """A training step, as `train` makes it: forward, loss, backward, AdamW; the encoder of the `paper` preset."""

    def __init__(self, name: str, B: int, N: int, M: int, precision: str = "fp32"):
        self.precision, self.size = precision, base.Stack()
        attention, *how = name.split()
        if set(how) - {COMPILED}:
            raise UsageError(f"{name!r}: a name, and at most {COMPILED!r} behind it")
        sizes = vars(self.size) | {"max_len": N}

        def build(layer: int, max_len: int) -> AttentionBase:
            shape = {"heads": self.size.heads, "head_dim": self.size.width // self.size.heads, "max_len": max_len}
            if attention.startswith(PYPI):
                return build_peer(attention.removeprefix(PYPI), **shape, size=M)
            return registry.build_attention(attention, **shape, layer=layer, **registry.budget_options(attention, M))

        torch.manual_seed(0)
        head = Classify(self.size.width, self.size.ffn, CLASSES)
        self.model = Classifier(Encoder(build, vocab=VOCAB, **sizes), head).train()
        self.forward = torch.compile(self.model) if how else self.model
        self.optimizer = build_optimizer(self.model, base.Optim(steps=1, batch=B))
        self.tokens_BTN = torch.randint(1, VOCAB, (B, 1, N))
        self.labels_B = torch.randint(CLASSES, (B,))

    def run(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), self.precision):
            logits_BC = self.forward(self.tokens_BTN)
        F.cross_entropy(logits_BC.float(), self.labels_B).backward()
        self.optimizer.step()

    def flops(self) -> int:
        """Of the matrix products: a backward pass counted as twice the forward one, recomputation not counted."""
        (B, _, N), size = self.tokens_BTN.shape, self.size
        attention = self.model.encoder.attentions[0]
        projections = (4 if attention.reads_qk else 2) * 2 * size.width**2
        of_attention = attention.flops(B, size.heads, N, size.width // size.heads)
        return 3 * size.layers * (B * N * (projections + 4 * size.width * size.ffn) + of_attention)


def contender(**facts: Any) -> Callable[[], None]:
    """A step to be timed."""
    return Step(**facts).run


if __name__ == "__main__":
    alone(contender)
