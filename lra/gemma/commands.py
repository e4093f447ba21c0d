"""What `python -m lra gemma ...` does, with the parsed arguments of options.py."""

from __future__ import annotations

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from datetime import datetime, timezone

import torch
from tqdm import tqdm

from lra.gemma import adapter
from lra.gemma.data import documents
from lra.gemma.finetune import finetune as finetune_cell
from lra.gemma.run import Cell, Method, Text, build_record, evaluate, method, references
from lra.gemma.spectra import spectra
from lra.gemma.weights import load as load_base
from lra.machine import PeakMemory, pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import read_record, write_record
from lra.registry import attention_class
from lra.training.train import Interrupted
from models.gemma import bridge
from models.gemma.loss import Head

SIZES = {  # what options default to
    "tiny": {
        "length": 128,
        "calibration": 8,
        "validation": 16,
        "eval_blocks": 64,
        "tokens": 16_384,
        "batch": 8,
    },
    "others": {
        "length": 512,
        "calibration": 4,
        "validation": 4,
        "eval_blocks": 16,
        "tokens": 40_960,
        "batch": 2,
    },
}


def swap(args: Namespace) -> None:
    """`gemma swap`: every asked cell without training."""
    setting = Setting(args)
    model, device = setting.base.model, setting.device
    head = Head.of(model.requires_grad_(False), args.precision)
    blocks = {"calibration": setting.blocks("calibration"), "test": setting.blocks("test")}
    exact = None
    cells = list(setting.cells("swap", blocks, {}))
    for cell in tqdm(cells, desc="swap", unit="cell", disable=None):
        path = cell.path(args.results)
        if not path.exists():
            started, memory = datetime.now(timezone.utc), PeakMemory(device)
            try:
                cell.plug_in(device)
                exact = exact or references(model, head, blocks["test"], args.precision, device)
                scores = evaluate(model, head, blocks["test"], args.precision, device, exact)
                seconds = (datetime.now(timezone.utc) - started).total_seconds()
                record = build_record(
                    cell, command=setting.command, device=device, started=started, status="ok",
                    result=scores.facts(), training={"optimizer": None, "steps": 0},
                    cost={"wall_s": round(seconds, 3), "peak_bytes": memory.read()},
                )  # fmt: skip
                write_record(path, record, None)
            finally:
                bridge.detach(model)
        report(path)


def finetune(args: Namespace) -> int:
    """`gemma finetune`: every asked cell. Exit code 85 when stopped with a checkpoint."""
    setting = Setting(args)
    return setting.train(setting.cells("finetune", setting.splits(), setting.recipe()))


def stability(args: Namespace) -> int:
    """`gemma stability`: the same at every learning rate."""
    setting = Setting(args)
    try:
        rates = [float(x) for x in args.lrs.split(",")]
    except ValueError:
        raise UsageError(f"--lrs {args.lrs}: give numbers such as 1e-4,1e-3") from None
    cells = [
        c for lr in rates
        for c in setting.cells("stability", setting.splits(), setting.recipe() | {"lr": lr, "lr_kernel": lr})
    ]  # fmt: skip
    return setting.train(cells)


def anisotropy(args: Namespace) -> None:
    """`gemma anisotropy`: one record with the spectra of every layer and head."""
    setting = Setting(args)
    blocks = {"test": setting.blocks("calibration")}
    layers = tuple(range(len(bridge.text_layers(setting.base.model))))
    nothing = Method("softmax", {}, layers)
    cell = Cell("anisotropy", setting.base, setting.documents, blocks, nothing, args.precision, 0)
    path = cell.path(args.results)
    if not path.exists():
        started = datetime.now(timezone.utc)
        cell.plug_in(setting.device)
        try:
            result = spectra(
                setting.base.model, torch.from_numpy(blocks["test"].tokens).long().to(setting.device)
            )
            record = build_record(
                cell, command=setting.command, device=setting.device, started=started, status="ok",
                result={"layers": result}, training={"optimizer": None, "steps": 0}, cost={},
            )  # fmt: skip
        finally:
            bridge.detach(setting.base.model)
        write_record(path, record, None)
    for row in read_record(path)["result"]["layers"]:
        print(
            f"layer {row['layer']:2}: mean |q|^2 {row['q_norm2']:.0f}, |k|^2 {row['k_norm2']:.0f}; largest eigenvalue "
            f"{max(row['top']):.3g}; aligned: |q|^2 {row['aligned_norm2']:.1f}, largest {max(row['aligned_top']):.3g}"
        )
    print(path)


def evaluate_adapter(args: Namespace) -> None:
    """`gemma evaluate`: the test blocks with an adapter on its base model."""
    setting = Setting(args)
    model = adapter.load(args.adapter, setting.base)
    head = Head.of(model.requires_grad_(False), args.precision)
    scores = evaluate(model, head, setting.blocks("test"), args.precision, setting.device).facts()
    print(
        f"test {100 * scores['n_correct'] / scores['n_test']:.2f}%, loss {scores['loss']:.4f}: {args.adapter}"
    )


def weights(args: Namespace) -> None:
    """`gemma weights`: make sure a model is there, and describe it."""
    base = load_base(args.model, args.data)
    n = sum(p.numel() for p in base.model.parameters())
    print(
        f"{base.name}: {n / 1e6:.1f}M parameters, {len(bridge.text_layers(base.model))} layers; {base.source}"
    )
    print(f"  weights sha256 {base.sha256}; BOS {base.bos}")


class Setting:
    """What all commands share: the base model, the text, the device, and the sizes that were not given."""

    def __init__(self, args: Namespace):
        set_threads(args.threads)
        self.args, self.device = args, pick_device(args.device)
        sizes = SIZES["tiny" if args.model == "tiny" else "others"]
        for name, value in sizes.items():
            if getattr(args, name, None) is None:
                setattr(args, name, value)
        for spec in getattr(args, "attention", ()):
            method(spec, 1, layers=())  # a misspelt name costs no loading
        self.documents = documents(args.text)
        self.base = load_base(args.model, args.data)
        self.base.model.to(self.device)
        longest = self.base.model.config.max_position_embeddings
        if args.length > longest:
            raise UsageError(f"--length {args.length} exceeds the {longest} tokens of {self.base.name}")
        self.text = Text(self.documents, self.base, args.length)

    @property
    def command(self) -> str:
        """What was typed, for the record; folders do not belong there."""
        hidden = {"--data", "--results", "--runs", "--threads", "--device"}
        words, skip = [], False
        for word in sys.argv[1:]:
            if not skip and word.partition("=")[0] not in hidden:
                words.append(word)
            skip = word in hidden
        return shlex.join(["python", "-m", "lra", *words])

    def blocks(self, name: str):
        """The blocks of a split that are not trained on."""
        option = {"calibration": "calibration", "val": "validation", "test": "eval_blocks"}[name]
        return self.text.blocks(name, getattr(self.args, option))

    def splits(self):
        """All four splits of a training run."""
        a = self.args
        steps = a.tokens // (a.batch * a.length)
        if not steps:
            raise UsageError(f"--tokens {a.tokens}: less than one step of {a.batch} x {a.length} tokens")
        held_out = {name: self.blocks(name) for name in ("calibration", "val", "test")}
        return held_out | {"train": self.text.blocks("train", steps * a.batch)}

    def recipe(self) -> dict:
        """Training options, as they go into digest and record."""
        a = self.args
        names = (
            "train",
            "batch",
            "lr",
            "lr_kernel",
            "warmstart",
            "evaluations",
            "checkpoint_every",
            "recompute",
        )
        for name in ("lr", "lr_kernel"):
            if not getattr(a, name) > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0; got {getattr(a, name)}")
        chosen = {n: getattr(a, n) for n in names} | {"tokens": a.tokens}
        if a.warmstart == "transfer":
            chosen["transfer_tokens"] = a.transfer_tokens or a.tokens // 2
        elif a.transfer_tokens:
            raise UsageError("--transfer-tokens has no effect without --warmstart transfer")
        return chosen

    def cells(self, kind: str, blocks, recipe) -> Iterator[Cell]:
        """One for each attention, M and seed; what has no features or draws nothing is not repeated for them."""
        a = self.args
        try:
            layers = tuple(bridge.select_layers(self.base.model, a.layers))
            budgets = [int(x) for x in str(a.features).split(",")]
        except ValueError as error:
            raise UsageError(str(error)) from error
        seen = set()
        for spec in a.attention:
            random = bool(recipe) or attention_class(spec.split(",")[0]).random
            for m in budgets:
                for seed in range(a.seeds if random else 1):
                    chosen = method(spec, m, layers=layers, window=a.window, ignore_softcap=a.ignore_softcap)
                    cell = Cell(kind, self.base, self.documents, blocks, chosen, a.precision, seed, recipe)
                    if (cell.digest, seed) not in seen:
                        seen.add((cell.digest, seed))
                        yield cell

    def train(self, cells) -> int:
        """Finetune each cell from the base model's own weights."""
        before = {n: t.detach().clone() for n, t in self.base.model.state_dict().items() if "embed" not in n}
        places = {"results": self.args.results, "runs": self.args.runs, "device": self.device}
        for cell in cells:
            self.base.model.load_state_dict(before, strict=False)
            try:
                path, _ = finetune_cell(cell, command=self.command, **places)
            except Interrupted as stopped:
                print(stopped, file=sys.stderr)
                return STOPPED
            report(path)
        return 0


def report(path) -> None:
    """One line on a record."""
    r = read_record(path)
    done, m = r["result"], r["model"]
    config = ",".join(f"{k}={v}" for k, v in m["attention_config"].items())
    name = f"{m['attention']}[{config}] seed {r['training']['seed']}"
    if not done:
        return print(f"{name}: {r['status']}: {path}")
    kl = "" if done.get("kl") is None else f", KL {done['kl']:z.3f}"
    print(
        f"{name}: {100 * done['n_correct'] / done['n_test']:.2f}%, loss {done['loss']:.3f}{kl}: {path}",
        flush=True,
    )
