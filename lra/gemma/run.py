"""One cell of the Gemma track: what it is made of, its model, its digest, its scores, its record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lra.gemma.data import Blocks, Documents, pack, split
from lra.gemma.weights import Base
from lra.machine import environment
from lra.options import UsageError, construct
from lra.records.record import SCHEMA, finite, record_path, suite_facts
from lra.registry import attention_class, budget_options, build_attention
from lra.training.config import stored_options
from lra.training.evaluate import autocast
from models.base import AttentionBase
from models.gemma import bridge
from models.gemma.loss import Head, Reference, reference, score

VERSION = 1  # of the track: raised when a number of an old record would come out differently


@dataclass(frozen=True)
class Text:
    """Documents of each split, packed when they are asked for."""

    documents: Documents
    base: Base
    length: int

    @cached_property
    def splits(self) -> dict[str, list[str]]:
        """Texts by split."""
        return split(self.documents.texts)

    def blocks(self, name: str, count: int) -> Blocks:
        """The first `count` blocks of a split."""
        return pack(
            self.splits[name],
            self.base.encode,
            bos=self.base.bos,
            length=self.length,
            blocks=count,
            what=name,
        )


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
class Cell:
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

    def path(self, results: Path) -> Path:
        """Where its record lives: in a folder of the track's own, where no table of the arena looks."""
        return record_path(
            results / "gemma", f"gemma-{self.kind}", self.method.attention, self.digest, self.seed
        )

    def plug_in(self, device: torch.device) -> torch.nn.Module:
        """The base model with this cell's kernels, calibrated. Raises UsageError where they do not fit."""
        length = self.blocks["test"].tokens.shape[1]
        sockets = plug_in(self.base, self.method, seed=self.seed, length=length)
        if any(type(s.kernel).calibrate is not AttentionBase.calibrate for s in sockets):
            tokens = torch.from_numpy(self.blocks["calibration"].tokens).long()
            bridge.calibrate(self.base.model, tokens.to(device))
        return self.base.model


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
        columns = [self.document, self.n, self.correct, self.loss.round(4)]
        columns += [] if self.kl is None else [self.kl.round(4)]
        rows = [
            [finite(float(x)) if x.dtype.kind == "f" else int(x) for x in row]
            for row in zip(*columns, strict=True)
        ]
        return {
            "n_correct": int(self.correct.sum()),
            "n_test": int(self.n.sum()),
            "loss": finite(float(self.loss.sum() / self.n.sum())),
            "kl": None if self.kl is None else finite(float(self.kl.sum() / self.n.sum())),
            "blocks": rows,  # [first document, tokens, correct, sum of losses, sum of divergences]
        }


@torch.no_grad()
def hidden(model: torch.nn.Module, tokens_BN: torch.Tensor, precision: str) -> torch.Tensor:
    """Last hidden states of all tokens but the last, whose next token is unknown."""
    with autocast(tokens_BN.device, precision):
        return model.model(input_ids=tokens_BN[:, :-1], use_cache=False).last_hidden_state


def evaluate(
    model: torch.nn.Module,
    head: Head,
    blocks: Blocks,
    precision: str,
    device: torch.device,
    against: list[Reference] | None = None,
) -> BlockScores:
    """Scores of every block, one at a time; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    sums = []
    for i, (row, keep) in enumerate(zip(blocks.tokens, blocks.scored, strict=True)):
        tokens_BN = torch.from_numpy(row).long().to(device)[None]
        scored_N = torch.from_numpy(keep).to(device)
        h_TE, target_T = hidden(model, tokens_BN, precision)[0][scored_N], tokens_BN[0, 1:][scored_N]
        s = score(h_TE, head, target_T, against[i] if against else None)
        sums.append([len(target_T), int(s.correct_T.sum()), s.loss_T.double().sum().item(),
                     s.kl_T.double().sum().item() if s.kl_T is not None else 0.0])  # fmt: skip
    model.train(training)
    n, correct, loss, kl = (np.array(c) for c in zip(*sums, strict=True))
    return BlockScores(blocks.document, n, correct, loss, kl if against else None)


@torch.no_grad()
def references(model, head: Head, blocks: Blocks, precision: str, device) -> list[Reference] | None:
    """The exact model's predictions on each block, for divergences; None for a head with a soft cap."""
    if head.softcap is not None:
        return None
    found = []
    with bridge.exact_attention(model):
        for row, keep in zip(blocks.tokens, blocks.scored, strict=True):
            h_NE = hidden(model, torch.from_numpy(row).long().to(device)[None], precision)[0]
            found.append(reference(h_NE[torch.from_numpy(keep).to(device)], head))
    return found


def build_record(
    cell: Cell, *, command: str, device: torch.device, started: datetime, status: str,
    result: dict[str, Any] | None, training: dict[str, Any], cost: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The common schema (record.py), with the base model in the place of the encoder."""
    m, base, docs = cell.method, cell.base, cell.documents
    kernels = [s.kernel for s in bridge.sockets(base.model).values()]
    n_params = sum(p.numel() for p in base.model.parameters())
    own = sum(p.numel() for k in kernels for p in k.parameters())
    encoder = {"base": base.name, "weights_source": base.source, "weights_sha256": base.sha256}
    return {
        "schema": SCHEMA,
        "suite": suite_facts(),
        "task": {
            "name": f"gemma-{cell.kind}",
            "version": VERSION,
            "preset": base.name,
            "protocol": "open",
            "seq_len": int(cell.blocks["test"].tokens.shape[1]),
            "dataset": docs.dataset,
            "substitute": False,
        },
        "data": {
            "source": docs.source,
            "revision": docs.revision,
            "files": docs.files,
            "splits": {name: {"n": len(b.tokens), "sha256": b.sha256} for name, b in cell.blocks.items()},
            "floors": {},
            "val_rule": "held-out",
        },
        "model": {
            "attention": m.attention,
            "attention_config": m.config,
            "encoder": encoder | {"layers": list(m.layers), "keeps_window": m.keeps_window},
            "exact": attention_class(m.attention).exact,
            "n_params": n_params,
            "n_params_ratio_to_softmax": n_params / (n_params - own),
        },
        "training": {"seed": cell.seed, "precision": cell.precision, "compile": False, "recipe": cell.recipe,
                     "overrides": {}, "world_size": 1} | training,
        "result": result,
        "cost": cost | {"device": device.type},
        "env": environment(device) | {"transformers": _version("transformers")},
        "status": status,
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)
