"""`bench encoder`: the training step of the shared encoder with each attention, and what it is made of."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lra.bench.base import Column, Point, both, finish, table, twice, whole_numbers
from lra.bench.peers import PEERS, PYPI, build, contenders
from lra.machine import set_threads
from lra.records.markup import MISSING
from lra.training.evaluate import autocast
from lra.training.trainer import build_optimizer
from models.encoder import Encoder
from models.heads import Classifier, Classify
from tasks import base

PACKAGES = [f"{PYPI}{package} M256" for package in PEERS]
DEFAULT = ("softmax", "performer M64", "performer M256", *PACKAGES, "constant")
VOCAB, CLASSES = 257, 2  # of Text: bytes and padding, two classes


def bench_encoder(args: Namespace) -> None:
    """`bench encoder`: measure, print and write."""
    set_threads(args.threads)
    layouts = whole_numbers("--layouts", args.layouts, "32x1024")
    names, facts = contenders(args.attentions, DEFAULT), {"M": args.features, "precision": args.precision}
    measured = twice("lra.bench.encoder", [Column({"B": B, "N": N} | facts, args.rounds, names) for B, N in layouts])
    size = base.Stack()
    text = f"""# A training step of the shared encoder

`{{command}}`: {size.layers} layers, width {size.width}, {size.heads} heads, FFN {size.ffn}, dropout {size.dropout}, \
{args.features} features unless named; {args.precision}, no padding. Each in a process of its own, taking turns; \
{args.rounds} rounds.
{both(measured, column, profile)}"""
    finish(args.results, "encoder", "encoder", {"points": measured["tuned"], "as_found": measured["as_found"]}, text)


def column(point: Point) -> str:
    """The heading of a layout."""
    return f"{point['B']} x {point['N']:,}"


def profile(points: list[Point]) -> str:
    """What a step is made of, as a table."""

    def cell(point: Point) -> str:
        if not point["parts"]:
            return MISSING
        attention, mixer, feed_forward, optimiser = (100 * s / point["seconds"] for s in point["parts"].values())
        shares = attention, mixer - attention, feed_forward, optimiser, 100 - mixer - feed_forward - optimiser
        return " / ".join(f"{share:.0f}" for share in shares)

    return f"""
Where the time of a step goes, in %: attention / projections / feed-forward / optimiser / rest (embeddings, norms, \
dropout, head, loss). Each part is run by itself, forward and backward, on tensors of the step's sizes; projections: \
the mixer less the same without its linear layers.

{table(points, column, cell)}"""


class Step:
    """A training step, as `train` makes it: forward, loss, backward, AdamW; the encoder of the `paper` preset. `name`:
    of a contender, "compiled" among its words for the model through torch.compile."""

    def __init__(self, name: str, B: int, N: int, M: int, precision: str = "fp32", device: str = "cpu"):
        self.precision, self.size, self.device = precision, base.Stack(), torch.device(device)
        shape = {"heads": self.size.heads, "head_dim": self.size.width // self.size.heads}

        def attention(layer: int, max_len: int):
            built, self.words = build(name, M, ("compiled",), **shape, max_len=max_len, layer=layer)
            return built

        torch.manual_seed(0)
        head = Classify(self.size.width, self.size.ffn, CLASSES)
        encoder = Encoder(attention, vocab=VOCAB, **vars(self.size) | {"max_len": N})
        self.model = Classifier(encoder, head).train().to(self.device)
        self.forward = torch.compile(self.model) if "compiled" in self.words else self.model
        self.optimizer = build_optimizer(self.model, base.Optim(steps=1, batch=B))
        self.tokens_BTN = torch.randint(1, VOCAB, (B, 1, N), device=self.device)
        self.labels_B = torch.randint(CLASSES, (B,), device=self.device)

    def run(self) -> None:
        """One step."""
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            logits_BC = self.forward(self.tokens_BTN)
        F.cross_entropy(logits_BC.float(), self.labels_B).backward()
        self.optimizer.step()

    def parts(self) -> dict[str, Callable[[], Any]]:
        """What a step is made of, each by itself: forward and backward of all layers. mixer: attention and projections
        of the first layer; attention: the same without the linear layers."""
        block, (B, _, N) = self.model.encoder.blocks[0], self.tokens_BTN.shape
        bare = copy.deepcopy(block.mixer)
        bare.to_qkv, bare.to_out = Given(B, N, bare.to_qkv.out_features), nn.Identity()
        feed_forward = nn.Sequential(block.norm2, block.up, nn.GELU(), block.dropout, block.down)
        x_BNE, g_BNE = torch.randn(2, B, N, self.size.width)
        x_BNE.requires_grad_()

        def all_layers(layer: nn.Module, *more: None) -> None:
            for _ in range(self.size.layers):
                with autocast(self.device, self.precision):
                    out_BNE = layer(x_BNE, *more)
                out_BNE.backward(g_BNE.to(out_BNE.dtype))

        runs = {"attention": (bare, None), "mixer": (block.mixer, None), "feed-forward": (feed_forward,)}
        return {p: partial(all_layers, *args) for p, args in runs.items()} | {"optimiser": self.optimizer.step}


class Given(nn.Module):
    """A layer whose output is a parameter, whatever it is given."""

    def __init__(self, *shape: int):
        super().__init__()
        self.out = nn.Parameter(torch.randn(shape))

    def forward(self, _):
        """That parameter."""
        return self.out


def contender(name: str, **facts: Any) -> dict[str, Callable[[], Any]]:
    """A step to be timed, and its parts where it is of this suite and not compiled."""
    step = Step(name, **facts)
    return {"step": step.run} | ({} if "compiled" in step.words or name.startswith(PYPI) else step.parts())
