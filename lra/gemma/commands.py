"""What `python -m lra gemma ...` does, with the parsed arguments of options.py."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lra.gemma.data import Blocks, documents, pack, split
from lra.gemma.experiment import Experiment, Method, evaluate, method, plug_in, references, spectra
from lra.gemma.finetune import Finetuner, trainable, with_adapter
from lra.gemma.recall import layout, repeated
from lra.gemma.weights import load as load_base
from lra.machine import PeakMemory, pick_device, set_threads
from lra.options import STOPPED, UsageError
from lra.records.record import read_record, write_record
from lra.registry import attention_class
from lra.scaling.reports import command_of
from lra.training.evaluate import Diverged
from lra.training.train import Interrupted, build_record, carry_out
from models.gemma import bridge
from models.gemma.loss import Head

# What options default to: for tiny, for others.
SIZES = {"length": (128, 512), "calibration": (8, 4), "validation": (16, 4), "eval_blocks": (64, 16)}
SIZES |= {"tokens": (16_384, 40_960), "batch": (8, 2)}
RECALL = {"length": (384, 2048), "eval_blocks": (24, 24), "passage": (32, 64)}
RECALL |= {"distances": ("32,64,128,256", "128,384,640,1024,1408,1792")}
RECIPE = "train batch lr lr_kernel warmstart evaluations checkpoint_every recompute tokens".split()
ELSEWHERE = ("run", "data", "results", "runs", "threads", "device")  # arguments that decide no result


def swap(args: Namespace) -> None:
    """`gemma swap`: every experiment that was asked for, without training."""
    setting = Setting(args)
    setting.score("swap", setting.blocks("test"))


def recall(args: Namespace) -> None:
    """`gemma recall`: the same on passages that stand twice."""
    setting = Setting(args)
    sizes = {"length": args.length, "blocks": args.eval_blocks}
    what = args.kind, args.passage, setting.distances
    setting.score("recall", repeated(setting.base, setting.splits["test"], *what, **sizes))


def finetune(args: Namespace) -> int:
    """`gemma finetune`: every experiment that was asked for. Exit code 85 when stopped with a checkpoint."""
    return Setting(args).train("finetune", [{}])


def stability(args: Namespace) -> int:
    """`gemma stability`: the same at every learning rate."""
    rates = [float(rate) for rate in args.lrs.split(",")]
    return Setting(args).train("stability", [{"lr": rate, "lr_kernel": rate} for rate in rates])


def anisotropy(args: Namespace) -> None:
    """`gemma anisotropy`: one record with the spectra of every layer and head."""
    setting = Setting(args)
    model, blocks = setting.base.model, setting.blocks("calibration")
    tokens_BN = torch.from_numpy(blocks.tokens).long().to(setting.device)
    exact = Method("softmax", {}, tuple(range(len(bridge.text_layers(model)))))
    experiment = Experiment("anisotropy", setting.base, setting.documents, {"test": blocks}, exact, args.precision, 0)
    print(setting.measure(experiment, lambda: {"layers": spectra(model, tokens_BN)}))


def evaluate_adapter(args: Namespace) -> int:
    """`gemma evaluate`: the test blocks with an adapter on its base model. Exit code 1 when a logit is not finite."""
    setting = Setting(args)
    model = with_adapter(args.adapter, setting.base)
    head = Head.of(model.requires_grad_(False), args.precision)
    try:
        scores = evaluate(model, head, "test", setting.blocks("test"), args.precision, setting.device)
    except Diverged as error:
        print(f"failed: {error}: {args.adapter}", file=sys.stderr)
        return 1
    accuracy = 100 * scores["n_correct"] / scores["n_test"]
    print(f"test {accuracy:.2f}%, loss {scores['loss']:.4f}: {args.adapter}")
    return 0


def weights(args: Namespace) -> None:
    """`gemma weights`: make sure a model is there, and describe it."""
    base = load_base(args.model, args.data)
    n, layers = sum(p.numel() for p in base.model.parameters()), len(bridge.text_layers(base.model))
    print(f"{base.name}: {n / 1e6:.1f}M parameters, {layers} layers; {base.source}")
    print(f"  weights sha256 {base.sha256}; BOS {base.bos}")


class Setting:
    """What all commands share: the base model, the text, the device, and the sizes that were not given.

    Raises UsageError for arguments that cannot be meant, before anything is loaded.
    """

    def __init__(self, args: Namespace):
        for name, sizes in (SIZES | (RECALL if hasattr(args, "passage") else {})).items():
            if getattr(args, name, 0) is None:  # an option of this command, and not given
                setattr(args, name, sizes[args.model != "tiny"])
        if hasattr(args, "features"):
            self.features = [int(m) for m in args.features.split(",")]
            for spec, m in product(args.attention, self.features):
                method(spec, m, args.length, layers=())
        self.recipe = recipe(args) if hasattr(args, "train") else {}
        if hasattr(args, "passage"):
            self.distances = [int(d) for d in args.distances.split(",")]
            layout(args.length, args.passage, self.distances)
        words = ["python", "-m", "lra", "gemma", args.run.rpartition(":")[2]]
        self.command = command_of(words, args, ELSEWHERE, eval_blocks="eval")
        self.args, self.device = args, pick_device(args.device)
        set_threads(args.threads)
        self.documents = documents(args.text)
        self.base = load_base(args.model, args.data)
        self.base.model.to(self.device)
        longest = self.base.model.config.max_position_embeddings
        if args.length > longest:
            raise UsageError(f"--length {args.length} exceeds the {longest} tokens of {self.base.name}")
        self.splits = split(self.documents)

    def blocks(self, name: str) -> Blocks:
        """The first blocks of a split, as many as its option says; of train, as many as fill whole steps."""
        a, options = self.args, {"calibration": "calibration", "val": "validation", "test": "eval_blocks"}
        count = getattr(a, options[name]) if name in options else a.tokens // (a.batch * a.length) * a.batch
        return pack(self.splits[name], self.base.encode, self.base.bos, length=a.length, blocks=count, what=name)

    def experiments(self, kind: str, blocks: dict, recipes: Sequence[dict]) -> list[Experiment]:
        """One for each recipe, attention, M and seed; what has no features or draws nothing is not repeated for them.

        Raises UsageError where one does not fit the model, before the first is run.
        """
        a = self.args
        try:
            layers = tuple(bridge.select_layers(self.base.model, a.layers))
        except ValueError as error:
            raise UsageError(str(error)) from error
        where = {"layers": layers, "window": a.window, "ignore_softcap": a.ignore_softcap}
        chosen: dict[tuple[str, int], Experiment] = {}
        for recipe, spec, m in product(recipes, a.attention, self.features):
            parts = self.base, self.documents, blocks, method(spec, m, a.length, **where), a.precision
            random = bool(recipe) or attention_class(spec.split(",")[0]).random
            for seed in range(a.seeds if random else 1):
                experiment = Experiment(kind, *parts, seed, recipe)
                chosen.setdefault((experiment.digest, seed), experiment)
        for e in {str(e.method): e for e in chosen.values()}.values():
            plug_in(self.base, e.method, seed=e.seed, length=e.length)
            if e.recipe:
                trainable(self.base.model, e.recipe["train"])
            bridge.detach(self.base.model)
        return list(chosen.values())

    def score(self, kind: str, test: Blocks) -> None:
        """Every experiment that was asked for, without training; for swap with divergences from the exact model."""
        blocks = {"calibration": self.blocks("calibration"), "test": test}
        experiments = self.experiments(kind, blocks, [{}])
        model, on = self.base.model.requires_grad_(False), (test, self.args.precision, self.device)
        head, known = Head.of(model, self.args.precision), {}
        exact = cache(lambda: references(model, head, *on) if kind == "swap" else None)
        for experiment in tqdm(experiments, desc=kind, unit="experiment", disable=None):
            report(self.measure(experiment, lambda: evaluate(model, head, "test", *on, exact(), known)))

    def train(self, kind: str, changes: Sequence[dict[str, Any]]) -> int:
        """Finetune each experiment from the base model's own weights; `changes` are made to the recipe."""
        a = self.args
        blocks = {name: self.blocks(name) for name in ("calibration", "val", "test", "train")}
        experiments = self.experiments(kind, blocks, [self.recipe | change for change in changes])
        model = self.base.model
        before = {n: t.detach().clone() for n, t in model.state_dict().items() if "embed" not in n}
        for experiment in experiments:
            model.load_state_dict(before, strict=False)
            path, folder = experiment.path(a.results), experiment.folder(a.runs)
            try:
                start = partial(Finetuner, experiment, self.device, self.command)
                carry_out(start, path, folder, lambda record, _: write_record(path, record, None))
            except Interrupted as stopped:
                print(stopped, file=sys.stderr)
                return STOPPED
            finally:
                bridge.detach(model)
            report(path)
        return 0

    def measure(self, experiment: Experiment, result: Callable[[], dict[str, Any]]) -> Path:
        """Write the record of an experiment without training, unless it is there. `result()`: with its kernels in."""
        path = experiment.path(self.args.results)
        if path.exists():
            return path
        clocks, memory = (datetime.now(timezone.utc), time.perf_counter()), PeakMemory(self.device)
        try:
            experiment.plug_in(self.device)
            try:
                measured, status = result(), "ok"
            except Diverged as error:
                measured, status = None, f"failed: {error}"
            cost = {"device": self.device.type}
            if experiment.kind != "anisotropy":
                cost = {"wall_s": round(time.perf_counter() - clocks[1], 3), "peak_bytes": memory.read()} | cost
            facts = {"device": self.device, "command": self.command, "clocks": clocks, "status": status}
            sections = experiment.sections({"optimizer": None, "steps": 0}, cost)
            write_record(path, build_record(sections, measured, **facts), None)
        finally:
            bridge.detach(self.base.model)
        return path


def recipe(args: Namespace) -> dict[str, Any]:
    """Training options, as they go into digest and record. Raises UsageError for one that cannot be meant."""
    if args.tokens < args.batch * args.length:
        raise UsageError(f"--tokens {args.tokens}: less than one step of {args.batch} x {args.length} tokens")
    chosen = {name: getattr(args, name) for name in RECIPE}
    if args.warmstart == "transfer":
        chosen["transfer_tokens"] = args.transfer_tokens or args.tokens // 2
    elif args.transfer_tokens:
        raise UsageError("--transfer-tokens has no effect without --warmstart transfer")
    return chosen


def report(path: Path) -> None:
    """One line on a record."""
    r = read_record(path)
    result, m = r["result"], r["model"]
    config = ",".join(f"{k}={v}" for k, v in m["attention_config"].items())
    name = f"{m['attention']}[{config}] seed {r['training']['seed']}"
    if not result:
        return print(f"{name}: {r['status']}: {path}")
    accuracy = 100 * result["n_correct"] / result["n_test"]
    kl = "" if result.get("kl") is None else f", KL {result['kl']:z.3f}"
    print(f"{name}: {accuracy:.2f}%, loss {result['loss']:.3f}{kl}: {path}", flush=True)
