"""One experiment of the Gemma track: what it is made of, its model, its digest, its part of a record, its results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
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
from lra.training.evaluate import Diverged, autocast
from models.base import AttentionBase
from models.features.projections import balance, inverse
from models.gemma import bridge
from models.gemma.loss import Head, Reference, reference, score

VERSION = 2  # of the track: raised when a number of an old record would come out differently
PAIRS = 4096  # random pairs of a query and a key


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

    kind: str  # swap, recall, finetune, stability or anisotropy
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

    def folder(self, runs: Path) -> Path:
        """Of its training: runs/gemma-<kind>/<attention>/<base>-<digest>/seed<k>."""
        attention, base = self.method.attention.replace(":", "-"), self.base.name.replace("/", "-")
        return Path(runs) / f"gemma-{self.kind}" / attention / f"{base}-{self.digest[:8]}" / f"seed{self.seed}"

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
        splits = {name: {"n": len(b.tokens), "sha256": b.sha256} | b.about for name, b in self.blocks.items()}
        data = {"source": docs.source, "revision": docs.revision, "files": docs.files, "splits": splits}
        model = {"attention": m.attention, "attention_config": m.config}
        model |= {"encoder": encoder | {"layers": list(m.layers), "keeps_window": m.keeps_window}}
        model |= {"exact": attention_class(m.attention).exact, "n_params": n_params}
        how = {"seed": self.seed, "precision": self.precision, "compile": False, "recipe": self.recipe}
        return {
            "task": task | {"seq_len": self.length, "dataset": docs.dataset, "substitute": False},
            "data": data | {"floors": {}, "val_rule": "held-out"},
            "model": model | {"n_params_ratio_to_softmax": n_params / (n_params - own)},
            "training": how | {"overrides": {}, "world_size": 1} | training,
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


def method(spec: str, features: int, length: int, **where: Any) -> Method:
    """`NAME,OPTION=VALUE,...`, its approximation size `features` unless the text says otherwise.

    Raises UsageError for options that no attention over `length` tokens can have, before a model is loaded.
    """
    name, *pairs = spec.split(",")
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--attention {spec}: options are written OPTION=VALUE; got {pair!r}")
        values[key] = value
    options = construct(attention_class(name).Config, budget_options(name, features) | values, where="attention")
    config = stored_options(options)
    try:
        build_attention(name, heads=1, head_dim=256, max_len=length, **config)  # Gemma's width
    except ValueError as error:
        raise UsageError(f"--attention {name}: {error}") from error
    return Method(name, config, **where)


def hidden(model: torch.nn.Module, tokens_BN: torch.Tensor, precision: str) -> torch.Tensor:
    """Last hidden states of all tokens but the last, whose next token is unknown."""
    with autocast(tokens_BN.device, precision):
        return model.model(input_ids=tokens_BN[:, :-1], use_cache=False).last_hidden_state


def scored(model, blocks: Blocks, precision: str, device: torch.device, known: dict | None = None) -> Iterator[tuple]:
    """Of every block, one at a time: hidden states (T, E) of the tokens whose successor counts, these (T), and where in
    `scored` they are (T). `known`: kept over the methods that are put into the same layers of one base model."""
    for i, (row, keep) in enumerate(zip(blocks.tokens, blocks.scored, strict=True)):
        tokens_BN = torch.from_numpy(row).long().to(device)[None]
        place_T = torch.from_numpy(keep.nonzero()[0]).to(device)
        with nullcontext() if known is None else bridge.below_known(model, known, i):
            h_BNE = hidden(model, tokens_BN, precision)
        yield h_BNE[0][place_T], tokens_BN[0, 1:][place_T], place_T


@torch.no_grad()
def evaluate(
    model, head: Head, split: str, blocks: Blocks, precision: str, device, against=None, known: dict | None = None
) -> dict[str, Any]:
    """The `result` of a record: `counts` of all tokens that count, and where blocks have parts, of each of them.
    Divergences are `against` References, if given. `known`: see `scored`.

    The model is left in the mode it was in. Raises Diverged when a logit is not finite, naming the split.
    """
    training = model.training
    model.eval()
    rows, failed = {part: [] for part in ("", *blocks.parts)}, 0
    for i, (h_TE, target_T, place_T) in enumerate(scored(model, blocks, precision, device, known)):
        loss_T, correct_T, kl_T = score(h_TE, head, target_T, against[i] if against else None)
        failed += int((~loss_T.isfinite()).sum())
        for part, part_rows in rows.items():
            start, end = blocks.parts.get(part, (0, blocks.tokens.shape[1]))
            in_T = (place_T >= start) & (place_T < end)
            sums = [x_T[in_T].double().sum().item() for x_T in (loss_T, kl_T) if x_T is not None]
            part_rows.append([int(in_T.sum()), int(correct_T[in_T].sum()), *sums])
    model.train(training)
    if failed:
        raise Diverged(f"logits of {failed} of {blocks.scored.sum()} {split} tokens are not finite")
    result, *parts = (counts(part_rows, blocks.document) for part_rows in rows.values())
    return result | ({"parts": dict(zip(blocks.parts, parts, strict=True))} if parts else {})


def counts(rows: list[list], document: np.ndarray) -> dict[str, Any]:
    """Totals, and of each block [first document, tokens, correct, sum of losses in nats, sum of divergences], which
    intervals are made of. `rows`: without the document."""
    n, correct, *sums = (np.array(column) for column in zip(*rows, strict=True))
    total = int(n.sum())
    loss, kl = ([finite(float(x.sum() / total)) for x in sums] + [None])[:2]
    columns = document.tolist(), n.tolist(), correct.tolist(), *(map(finite, x.round(4).tolist()) for x in sums)
    facts = {"n_correct": int(correct.sum()), "n_test": total, "loss": loss, "kl": kl}
    return facts | {"blocks": list(map(list, zip(*columns, strict=True)))}


@torch.no_grad()
def references(model, head: Head, blocks: Blocks, precision: str, device) -> list[Reference] | None:
    """The exact model's predictions on each block, for divergences; None for a head with a soft cap."""
    if head.softcap is not None:
        return None
    with bridge.exact_attention(model):
        return [reference(h_TE, head) for h_TE, *_ in scored(model, blocks, precision, device)]


def spectra(model: torch.nn.Module, tokens_BN: torch.Tensor) -> list[dict[str, Any]]:
    """One row per layer of the exact model: norms, spectra and closed forms, per head where it is a list."""
    rows = []

    def tap(layer):
        return lambda q, k, v, mask, scale: rows.append({"layer": layer} | describe(q, k, scale))

    bridge.watch(model, tokens_BN, {layer: tap(layer) for layer in bridge.sockets(model)})
    return rows


def describe(q_BHND: torch.Tensor, k_BHND: torch.Tensor, scale: float) -> dict[str, Any]:
    """The row of one layer: how far its queries and keys are from what random features like, as they are and aligned.

    Aligned: centred and balanced, so that both have one covariance, as attention allows without changing its output.
    With q~ = sqrt(scale) q and k~ alike, positive features of N(0, I) have, for one pair, the relative second moment
    E[Z^2] / E[Z]^2 = exp |q~ + k~|^2. For q~, k~ ~ N(0, Lambda) with eigenvalues t its counterparts in closed form are

        w ~ N(0, I):        prod_t ((1 - 6t)(1 + 2t))^-1/2      finite only below t = 1/6
        w ~ N(0, Sigma*):   prod_t (1 - 2t)^-1                  finite only below t = 1/2

    (arXiv 2603.04127, Theorem 3.2; E[Z^2], not yet divided by E[kappa^2]).
    """
    q, k = ((scale**0.5 * x.double()).transpose(0, 1).flatten(1, 2) for x in (q_BHND, k_BHND))  # (H, T, D)
    row: dict[str, Any] = {"q_norm2": norm2(q), "k_norm2": norm2(k)}
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randint(0, q.shape[1], (PAIRS,), generator=generator) for _ in range(2))
    for prefix in ("", "aligned_"):
        if prefix:  # T^-1 (q - mean q) and T (k - mean k), which have one covariance; T is symmetric
            q, k = (x - x.mean(1, keepdim=True) for x in (q, k))
            T = balance(second_moment(q), second_moment(k))
            q, k = q @ inverse(T), k @ T
        t_HD = torch.linalg.eigvalsh((second_moment(q) + second_moment(k)) / 2).flip(-1).clamp(min=0)
        if not prefix:
            row["condition"] = rounded(t_HD[:, 0] / t_HD[:, -1].clamp(min=1e-12))
        log10s = (q[:, first] + k[:, second]).square().sum(-1).flatten() / math.log(10)  # of exp |q~ + k~|^2
        facts = {"top": rounded(t_HD[:, 0]), "above_half": (t_HD > 0.5).sum(-1).tolist()}
        facts |= {"spectrum": rounded(t_HD[:, :32])}
        facts |= {"log10_pair": {"median": float(log10s.median()), "p90": float(log10s.quantile(0.9))}}
        row |= {prefix + name: value for name, value in facts.items()}
    return row | {
        "aligned_norm2": norm2(q),
        "aligned_log10_isotropic": log10(-0.5 * ((1 - 6 * t_HD).log() + (1 + 2 * t_HD).log()).sum(-1)),
        "aligned_log10_optimal": log10(-(1 - 2 * t_HD).log().sum(-1)),
    }


def second_moment(x_HTD: torch.Tensor) -> torch.Tensor:
    """E[x x^T] per head, (H, D, D)."""
    return x_HTD.transpose(-1, -2) @ x_HTD / x_HTD.shape[1]


def norm2(x_HTD: torch.Tensor) -> float:
    """Mean squared length."""
    return float(x_HTD.square().sum(-1).mean())


def log10(logs_H: torch.Tensor) -> list[float | None]:
    """Natural logarithms of the heads' moments to base 10; null where a moment is infinite."""
    return [value / math.log(10) if math.isfinite(value) else None for value in logs_H.tolist()]


def rounded(x: torch.Tensor) -> list:
    """Four significant digits are enough for a record."""
    return [rounded(row) if row.dim() else float(f"{row.item():.4g}") for row in x]
