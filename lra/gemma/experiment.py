"""One experiment of the Gemma track: what it is made of, its model, its digest, its scores, its part of a record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lra.gemma.data import Blocks, Documents
from lra.gemma.weights import Base
from lra.options import UsageError, construct
from lra.records.record import finite, record_path
from lra.registry import attention_class, budget_options, build_attention
from lra.training.config import stored_options
from lra.training.evaluate import autocast
from models.base import AttentionBase
from models.gemma import bridge
from models.gemma.loss import Head, Reference, reference, score

VERSION = 1  # of the track: raised when a number of an old record would come out differently


@dataclass(frozen=True)
class Method:
    """An attention with its options, and the layers it replaces."""

    attention: str
    config: dict[str, Any]
    layers: tuple[int, ...]
    window: str = "auto"  # auto, keep or ignore
    ignore_softcap: bool = False

    @property
    def keeps_window(self) -> bool:
        """What `auto` means: exact attention keeps its windows, the others cannot."""
        return self.window == "keep" or (self.window == "auto" and attention_class(self.attention).exact)


@dataclass(frozen=True)
class Experiment:
    """One record, but for its result. `blocks` are those of the splits it reads."""

    kind: str  # swap, finetune, stability or anisotropy
    base: Base
    documents: Documents
    blocks: dict[str, Blocks]
    method: Method
    precision: str
    seed: int
    recipe: dict[str, Any] = field(default_factory=dict)  # of training; empty without any

    @property
    def digest(self) -> str:
        """sha256 over all that decides the result: no host, no date, no seed."""
        parts = {
            "track": [self.kind, VERSION],
            "base": [self.base.name, self.base.sha256],
            "data": {name: b.sha256 for name, b in self.blocks.items()},
            "method": asdict(self.method),
            "precision": self.precision,
            "recipe": self.recipe,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return int(self.blocks["test"].tokens.shape[1])

    def path(self, results: Path) -> Path:
        """Where its record lives: in a folder of the track's own, where no table of the arena looks."""
        name = f"gemma-{self.kind}"
        return record_path(results / "gemma", name, self.method.attention, self.digest, self.seed)

    def plug_in(self, device: torch.device) -> torch.nn.Module:
        """The base model with this method's kernels, calibrated. Raises UsageError where they do not fit."""
        sockets = plug_in(self.base, self.method, seed=self.seed, length=self.length)
        if any(type(s.kernel).calibrate is not AttentionBase.calibrate for s in sockets):
            tokens = torch.from_numpy(self.blocks["calibration"].tokens).long()
            bridge.calibrate(self.base.model, tokens.to(device))
        return self.base.model

    def sections(self, training: dict[str, Any], cost: dict[str, Any]) -> dict[str, Any]:
        """For train.build_record, with the base model in the place of the encoder; the kernels are plugged in."""
        m, base, docs = self.method, self.base, self.documents
        kernels = [s.kernel for s in bridge.sockets(base.model).values()]
        n_params = sum(p.numel() for p in base.model.parameters())
        own = sum(p.numel() for k in kernels for p in k.parameters())
        encoder = {"base": base.name, "weights_source": base.source, "weights_sha256": base.sha256}
        task = {"name": f"gemma-{self.kind}", "version": VERSION, "preset": base.name, "protocol": "open"}
        task |= {"seq_len": self.length, "dataset": docs.dataset, "substitute": False}
        splits = {name: {"n": len(b.tokens), "sha256": b.sha256} for name, b in self.blocks.items()}
        data = {"source": docs.source, "revision": docs.revision, "files": docs.files, "splits": splits}
        model = {"attention": m.attention, "attention_config": m.config}
        model |= {"encoder": encoder | {"layers": list(m.layers), "keeps_window": m.keeps_window}}
        model |= {"exact": attention_class(m.attention).exact, "n_params": n_params}
        own_training = {"seed": self.seed, "precision": self.precision, "compile": False, "recipe": self.recipe}
        return {
            "task": task,
            "data": data | {"floors": {}, "val_rule": "held-out"},
            "model": model | {"n_params_ratio_to_softmax": n_params / (n_params - own)},
            "training": own_training | {"overrides": {}, "world_size": 1} | training,
            "cost": cost,
            "env": {"transformers": metadata.version("transformers")},
        }


def plug_in(base: Base, method: Method, *, seed: int, length: int) -> list[bridge.Socket]:
    """Put a method on a base model, for at most `length` tokens. Raises UsageError where it does not fit."""

    def build(*, layer, heads, head_dim, max_len):
        shape = {"heads": heads, "head_dim": head_dim, "max_len": min(length, max_len)}
        return build_attention(method.attention, seed=seed, layer=layer, **shape, **method.config)

    where = {"ignore_window": not method.keeps_window, "ignore_softcap": method.ignore_softcap}
    try:
        sockets = bridge.attach(base.model, build, method.layers, **where)
        for index, socket in zip(method.layers, sockets, strict=True):
            window = getattr(bridge.text_layers(base.model)[index].self_attn, "sliding_window", None)
            bridge.check_window(socket, window, length - 1)
    except ValueError as error:
        raise UsageError(str(error)) from error
    return sockets


def method(spec: str, features: int, **where: Any) -> Method:
    """`NAME,OPTION=VALUE,...`, its approximation size `features` unless the text says otherwise. Raises UsageError."""
    name, *pairs = spec.split(",")
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--attention {spec}: options are written OPTION=VALUE; got {pair!r}")
        values[key] = value
    values = budget_options(name, features) | values
    options = construct(attention_class(name).Config, values, where="attention")
    return Method(name, stored_options(options), **where)


def check_options(method: Method, length: int) -> None:
    """Raises UsageError for options that no model can have, before one is loaded: on a head of Gemma's width."""
    try:
        build_attention(method.attention, heads=1, head_dim=256, max_len=length, **method.config)
    except ValueError as error:
        raise UsageError(f"--attention {method.attention}: {error}") from error


@dataclass(frozen=True)
class BlockScores:
    """Sums over the scored tokens of each block."""

    document: np.ndarray
    n: np.ndarray
    correct: np.ndarray
    loss: np.ndarray
    kl: np.ndarray | None

    def facts(self) -> dict[str, Any]:
        """For a record: totals, and the blocks they come from, which intervals are made of."""
        sums = [self.loss] if self.kl is None else [self.loss, self.kl]
        columns = [c.tolist() for c in (self.document, self.n, self.correct)]
        columns += [list(map(finite, c.round(4).tolist())) for c in sums]
        return {
            "n_correct": int(self.correct.sum()),
            "n_test": int(self.n.sum()),
            "loss": finite(float(self.loss.sum() / self.n.sum())),
            "kl": None if self.kl is None else finite(float(self.kl.sum() / self.n.sum())),
            # of each block [first document, tokens, correct, sum of losses, sum of divergences]
            "blocks": list(map(list, zip(*columns, strict=True))),
        }


def hidden(model: torch.nn.Module, tokens_BN: torch.Tensor, precision: str) -> torch.Tensor:
    """Last hidden states of all tokens but the last, whose next token is unknown."""
    with autocast(tokens_BN.device, precision):
        return model.model(input_ids=tokens_BN[:, :-1], use_cache=False).last_hidden_state


def scored(model, blocks: Blocks, precision: str, device: torch.device) -> Iterator[tuple]:
    """Of every block, one at a time: hidden states (T, E) of the tokens whose successor counts, and these (T)."""
    for row, keep in zip(blocks.tokens, blocks.scored, strict=True):
        tokens_BN = torch.from_numpy(row).long().to(device)[None]
        scored_N = torch.from_numpy(keep).to(device)
        yield hidden(model, tokens_BN, precision)[0][scored_N], tokens_BN[0, 1:][scored_N]


@torch.no_grad()
def evaluate(model, head: Head, blocks: Blocks, precision: str, device, against=None) -> BlockScores:
    """Scores of every block, with divergences `against` these References; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    sums = []
    for i, (h_TE, target_T) in enumerate(scored(model, blocks, precision, device)):
        s = score(h_TE, head, target_T, against[i] if against else None)
        kl = 0.0 if s.kl_T is None else s.kl_T.double().sum().item()
        sums.append([len(target_T), int(s.correct_T.sum()), s.loss_T.double().sum().item(), kl])
    model.train(training)
    n, correct, loss, kl = (np.array(c) for c in zip(*sums, strict=True))
    return BlockScores(blocks.document, n, correct, loss, kl if against else None)


@torch.no_grad()
def references(model, head: Head, blocks: Blocks, precision: str, device) -> list[Reference] | None:
    """The exact model's predictions on each block, for divergences; None for a head with a soft cap."""
    if head.softcap is not None:
        return None
    with bridge.exact_attention(model):
        return [reference(h_TE, head) for h_TE, _ in scored(model, blocks, precision, device)]
