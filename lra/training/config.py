"""From what the user typed to one resolved run: recipe, overrides, attention options, data, and its digest.

And from the run to what its record says of the task, the data and the model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from lra.options import UsageError, construct, unknown
from lra.records.record import MAX_PARAMETER_RATIO, PROTOCOL, Execution, cell_digest, pretraining_steps, read_record
from lra.registry import attention_class, attention_module, budget_options, build_attention, load_task
from lra.training.checkpoint import tensors_sha256
from models.encoder import Encoder
from models.heads import Classifier, Classify, Match
from tasks.base import Meta, Optim, Recipe, Stack
from tasks.store.files import source_sha256
from tasks.store.prepared import data_identity

GROUPS = ("attention", "encoder", "train", "pretrain")
AT_LEAST = {  # smallest value that means something, by name of the option
    "train": {"steps": 1, "batch": 1, "accumulate": 1, "eval_every": 1, "warmup": 0, "weight_decay": 0},
    "encoder": {"layers": 1, "width": 1, "heads": 1, "ffn": 1, "max_len": 0},
}


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Self-pretraining (Amos, Berant and Gupta, arXiv 2310.02980), which no preset has: of the same steps, the first
    reconstruct masked tokens of the training inputs without their labels, each part with a schedule of its own."""

    share: float = 0.0  # of the steps


@dataclass(frozen=True)
class Run:
    """One cell of the benchmark and one seed. `digest` names the cell: no host, no date, no seed."""

    meta: Meta
    preset: str
    attention: str
    attention_config: dict[str, Any]
    recipe: Recipe
    overrides: dict[str, str]  # what differs from the preset: {"train.lr": "0.001"}
    val_rule: str
    seed: int
    manifest: dict[str, Any]  # of the prepared data
    execution: Execution = Execution()

    @property
    def digest(self) -> str:
        """sha256 over task, data, recipe, overrides, validation rule, attention and execution."""
        task = self.meta.name, self.meta.version, data_identity(self.manifest)
        recipe = asdict(self.recipe), self.overrides, self.val_rule
        return cell_digest(*task, *recipe, self.attention, self.attention_config, self.execution)

    @property
    def micro_batch(self) -> int:
        """Examples that a process takes at a time, in training and in evaluation."""
        return self.recipe.train.batch // (self.recipe.train.accumulate * self.execution.processes)

    @property
    def turn(self) -> int:
        """The step at which labels begin, after self-pretraining; 0 without it."""
        return pretraining_steps(self.overrides, self.recipe.train.steps)

    @property
    def sources(self) -> dict[str, str]:
        """sha256 of the task's and the attention's source, by section of the record; not part of the digest. An
        attention's source includes the modules of models/features/ that it is made of."""
        attention = source_sha256(attention_module(self.attention), "models.features")
        return {"task": source_sha256(load_task(self.meta.name)), "model": attention}

    def build_model(self, attention: str | None = None) -> torch.nn.Module:
        """The classifier, initialised from the run's seed; with `attention`, that method at its defaults instead."""
        name = attention or self.attention
        config = default_options(name, self.recipe) if attention else self.attention_config
        shape, stack = asdict(self.recipe.encoder), self.recipe.encoder
        shape["max_len"] = stack.max_len or self.recipe.data.seq_len
        common = {"heads": stack.heads, "head_dim": stack.width // stack.heads, "seed": self.seed} | config

        def build(layer, length):
            return build_attention(name, max_len=length, layer=layer, **common)

        torch.manual_seed(self.seed)
        encoder = Encoder(build, vocab=self.meta.vocab, **shape)
        return Classifier(encoder, (Classify, Match)[self.meta.towers - 1](stack.width, stack.ffn, self.meta.classes))

    @property
    def command(self) -> str:
        """The command that repeats this run."""
        precision, compiled, processes = self.execution
        how = "" if self.val_rule == "held-out" else f" --val-rule {self.val_rule}"
        how += (f" --precision {precision}" if precision != "fp32" else "") + " --compile" * compiled
        start = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
        cell = f"{self.meta.name} --attention {self.attention} --preset {self.preset} --seed {self.seed}"
        return f"{start} -m lra train {cell}{''.join(f' --set {k}={v}' for k, v in self.overrides.items())}{how}"


def overrides(pairs: list[str], steps: int | None = None) -> dict[str, str]:
    """--set and --steps as one mapping: ["train.lr=1e-3"] -> {"train.lr": "1e-3"}. Raises UsageError."""
    sets = {} if steps is None else {"train.steps": str(steps)}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        group, dot, _ = key.partition(".")
        if not (equals and dot):  # what is no option of train or encoder is the attention's
            places = {"train": Optim, "encoder": Stack, "pretrain": Pretrain}
            near = next((name for name, cls in places.items() if key in cls.__annotations__), "attention")
            got = repr(pair) + (f": did you mean {near}.{pair}?" if equals and key.isidentifier() else "")
            raise UsageError(f"--set takes GROUP.OPTION=VALUE with GROUP one of {', '.join(GROUPS)}; got {got}")
        if group == "data":
            raise UsageError(f"--set {pair}: data options are fixed when data are prepared, by the preset")
        if group not in GROUPS:
            raise unknown("group of --set", group, GROUPS)
        if key in sets:
            raise UsageError(f"{key} is given twice, as {sets[key]} and as {value}: leave one out")
        sets[key] = value
    return dict(sorted(sets.items()))


def load_preset(task: ModuleType, preset: str) -> Recipe:
    """The recipe of a preset by name."""
    if preset not in task.RECIPES:
        raise unknown(f"preset of {task.META.name}", preset, task.RECIPES)
    return task.RECIPES[preset]


def default_options(attention: str, recipe: Recipe) -> dict[str, Any]:
    """An attention's options at their defaults, the approximation size taken from the recipe's budget."""
    return asdict(attention_class(attention).Config(**budget_options(attention, recipe.budget)))


def stored_options(config: Any) -> dict[str, Any]:
    """What identifies an attention's options: all but later ones at their defaults (`option` in base.py)."""
    later = {f.name: f.default for f in dataclasses.fields(config) if f.metadata.get("later")}
    return {k: v for k, v in asdict(config).items() if k not in later or v != later[k]}


def resolve(
    task: str,
    preset: str,
    attention: str,
    seed: int,
    manifest: dict,
    overrides: dict,
    val_rule: str = "held-out",
    execution: Execution = Execution(),
) -> Run:
    """Check everything a run needs before it starts. Raises UsageError, one line."""
    module = load_task(task)
    recipe = load_preset(module, preset)
    defaults = attention_class(attention).Config(**default_options(attention, recipe))
    before = {"attention": defaults, "encoder": recipe.encoder, "train": recipe.train, "pretrain": Pretrain()}
    after, changed = {}, {}
    for group, old in before.items():
        values = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith(f"{group}.")}
        after[group] = new = construct(type(old), values, where=group, base=old)
        # What is set to the value it has anyway is no override, and 2e-3 is 0.002: one run has one digest.
        differ = [option for option in sorted(values) if getattr(new, option) != getattr(old, option)]
        changed |= {f"{group}.{option}": str(getattr(new, option)) for option in differ}
    options, pretrain = stored_options(after.pop("attention")), after.pop("pretrain")
    recipe = dataclasses.replace(recipe, **after)
    run = Run(module.META, preset, attention, options, recipe, changed, val_rule, seed, manifest, execution)
    _check(run, pretrain)
    return run


def _check(run: Run, pretrain: Pretrain) -> None:
    train, encoder = run.recipe.train, run.recipe.encoder
    for group, bounds in AT_LEAST.items():
        for name, least in bounds.items():
            if (value := getattr(getattr(run.recipe, group), name)) < least:
                raise UsageError(f"{group}.{name} must be at least {least}; got {value}")
    for name in ("lr", "clip"):
        if (value := getattr(train, name)) <= 0:
            raise UsageError(f"train.{name} must be above 0; got {value}")
    n, batch, parts = run.manifest["splits"]["train"]["n"], train.batch, train.accumulate
    longest = max(s["max_length"] for s in run.manifest["splits"].values())
    max_len = encoder.max_len or run.recipe.data.seq_len
    longer = f"sequences of {longest} tokens, beyond the model's maximum {max_len}"
    share, turn = pretrain.share, round(pretrain.share * train.steps)
    phases = f"pretrain.share {share} makes {turn} of {train.steps} steps pretraining"
    problems = {
        f"pretrain.share must be at least 0 and below 1; got {share}": not 0 <= share < 1,
        f"{phases}: both it and the labels need one or more": share and not 0 < turn < train.steps,
        f"train.beta2 must be at least 0 and below 1; got {train.beta2}": not 0 <= train.beta2 < 1,
        f"--seed must be at least 0; got {run.seed}": run.seed < 0,
        f"train.accumulate {parts} does not divide train.batch {batch}": batch % parts,
        f"train.batch {batch} exceeds the {n} training examples": batch > n,
        f"prepared {run.meta.name} data has {longer}: set encoder.max_len={longest}": longest > max_len,
    }
    for problem in (text for text, there in problems.items() if there):
        raise UsageError(problem)
    try:
        run.build_model()
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error).splitlines()[0]) from error


def standing(run: Run, path: Path) -> tuple[Literal["missing", "done", "failed", "changed"], str]:
    """Whether the run's record at `path` is missing, done, of a run that failed, or of a source that was edited since;
    and why it failed, or what was edited. A record without the hash of a source counts as unchanged. So does a file
    that is no record: whoever reads it says what is wrong with it."""
    if not path.exists():
        return "missing", ""
    sources, names = run.sources, {"task": f"task {run.meta.name}", "model": f"attention {run.attention}"}
    try:
        record = read_record(path)
        edited = [names[k] for k, new in sources.items() if record[k].get("source_sha256", new) not in (None, new)]
    except (UsageError, AttributeError):
        return "done", ""
    if not edited:
        return ("done", "") if record["status"] == "ok" else ("failed", str(record["status"]))
    what = f"the source of {' and of '.join(edited)} has changed since {path}"
    return "changed", f"{what}: --again trains the cell anew and keeps the old record beside it"


def cell_sections(run: Run) -> dict[str, Any]:
    """The record's task, data and model, from the configuration, the data and the seed alone."""
    model, manifest, sources = model_facts(run), run.manifest, run.sources
    task = {"name": run.meta.name, "version": run.meta.version, "preset": run.preset}
    task |= {"protocol": protocol(run, model["n_params_ratio_to_softmax"]), "seq_len": run.recipe.data.seq_len}
    task |= {"dataset": manifest["dataset"], "substitute": manifest["substitute"], "source_sha256": sources["task"]}
    data = {key: manifest[key] for key in ("source", "revision", "splits", "floors")}
    data |= {"manifest_sha256": data_identity(manifest), "val_rule": run.val_rule}
    return {"task": task, "data": data, "model": model | {"source_sha256": sources["model"]}}


def protocol(run: Run, parameter_ratio: float) -> str:
    """lra-v1 is the shared recipe at an equal parameter budget, with validation held out; the rest is open."""
    shared = all(key.startswith("attention.") for key in run.overrides)
    closed = shared and run.val_rule == "held-out" and parameter_ratio <= MAX_PARAMETER_RATIO
    return PROTOCOL if closed else "open"


def model_facts(run: Run) -> dict[str, Any]:
    """The record's model section, from the configuration and the seed alone."""
    model = run.build_model()
    n_params, softmax = (sum(p.numel() for p in m.parameters()) for m in (model, run.build_model("softmax")))
    facts = {"attention": run.attention, "attention_config": run.attention_config}
    facts |= {"encoder": asdict(run.recipe.encoder), "exact": model.encoder.attentions[0].exact, "n_params": n_params}
    return facts | {"n_params_ratio_to_softmax": n_params / softmax, "init_sha256": tensors_sha256(model.state_dict())}
