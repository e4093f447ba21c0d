"""Forgeries, in one table: each is refused with its reason, or stands apart from what it would have changed.

A forgery starts from valid runs: a guest's seeds 3 to 5 of a cell that the owner has with seeds 0 to 2. The forger
knows the rules: hashes and counts are made to fit what was changed, where the row does not say `raw`.
"""

import copy
import functools
import gzip
import hashlib
import json
import operator
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from lra.__main__ import main
from lra.leaderboard.consistency import Places, manifest
from lra.leaderboard.levels import judge, verify
from lra.records.record import LARGEST, labels_path, predictions_path
from lra.records.schema import Rejected, check
from lra.training import checkpoint
from lra.training.trainer import MIDDLE, WEIGHTS
from tasks.store.prepared import data_identity
from tests.conftest import ROOT, Lab
from tests.lra.leaderboard.conftest import same_files

OTHER = "0" * 64
REFERENCE = ROOT / "results" / "reference"


class Forger:
    """Files that a guest submits as `eve`, and what the owner has; `record` and `answers` are those of the first."""

    def __init__(self, owner: Lab, guest: Lab, inbox: Path):
        self.owner, self.inbox = owner, inbox
        inbox.mkdir()
        for path in guest.records():
            shutil.copy(path, inbox)
            shutil.copy(predictions_path(path), inbox)
        self.path = inbox / "seed3.json"
        self.record, self.answers = self.read(self.path)
        sha256 = self.record["data"]["splits"]["test"]["labels_sha256"]
        self.labels = np.frombuffer(gzip.decompress(labels_path(owner.results, sha256).read_bytes()), np.uint8)

    @staticmethod
    def read(path):
        """A record and its answers."""
        content = gzip.decompress(predictions_path(path).read_bytes())
        return json.loads(path.read_text()), np.frombuffer(content, np.uint8).copy()

    def write(self, path=None, record=None, answers=None):
        """Put a record and its answers at `path`: the first file, if nothing else is said."""
        path, record = path or self.path, record or self.record
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
        answers = self.answers if answers is None else answers
        predictions_path(path).write_bytes(gzip.compress(answers.tobytes()))

    def count(self, record=None, answers=None):
        """Make hash and count of a record fit its answers; of groups, which only the data tell, it says nothing."""
        record, answers = record or self.record, self.answers if answers is None else answers
        right = int((answers == self.labels[: len(answers)]).sum())
        record["result"] |= {"n_correct": right, "predictions_sha256": hashlib.sha256(answers.tobytes()).hexdigest()}
        record["result"].pop("groups", None)

    def own(self, seed=0):
        """Path, record and answers of one of the owner's runs."""
        path = self.owner.records()[seed]
        return path, *self.read(path)


def sealed(record):
    """Make the hash of the data fit the rest."""
    record["data"]["manifest_sha256"] = data_identity(manifest(record))


def field(*keys, to):
    """Set a field of the first record; the hash of the data is made to fit."""

    def edit(f):
        inner = f.record
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to(inner[keys[-1]]) if callable(to) else to
        if keys[-1] != "manifest_sha256" and keys[0] in ("data", "task"):
            try:
                sealed(f.record)
            except (KeyError, TypeError, ValueError, UnicodeError):
                pass  # no such task, or no text
        f.write()

    return edit


def text(old, new):
    """Exchange a piece of the file of the first record, which occurs once."""

    def edit(f):
        content = json.dumps(f.record)
        assert content.count(old) == 1
        f.path.write_text(content.replace(old, new))

    return edit


def answered(change):
    """Change the answers of the first record; its hash and count are made to fit."""

    def edit(f):
        f.answers = np.asarray(change(f), np.uint8)
        f.count()
        f.write()

    return edit


def curve(change):
    """Change the curve of the first record in place."""

    def edit(f):
        change(f.record["result"]["curve"])
        f.write()

    return edit


def perturbed(record):
    """Another curve and another start: what a forger changes so that no copy is seen."""
    for point in record["result"]["curve"]:
        point[2] *= 1 + 1e-6
    record["started"] = record["started"][:18] + ("1" if record["started"][18] == "0" else "0") + record["started"][19:]


def failure(**changes):
    """Make the first record a failure that nobody saw, with these fields beside it."""

    def edit(f):
        steps = changes.get("steps", 5)
        f.honest = f.record["result"]
        f.record["result"], f.record["status"] = (
            None,
            changes.get("status", f"failed: loss is not finite at step {steps}"),
        )
        f.record["training"] |= {"steps": steps, "examples_seen": 8 * steps, "selected_step": 0}
        f.record["cost"] |= {"steps_per_s": round(steps / f.record["cost"]["wall_s"], 4), "tokens_per_s": 0}
        tokens = 20 * 8 * steps / f.record["cost"]["wall_s"]
        f.record["cost"]["tokens_per_s"] = round(tokens, 1)
        if "failure" in changes:
            f.record["failure"] = changes["failure"](f)
        f.write()
        if not changes.get("answers"):
            predictions_path(f.path).unlink()

    return edit


def evidence(f, entries):
    """Of an invented failure: the begin of an honest curve, and the honest probe."""
    return {"curve": f.honest["curve"][:entries], "probe": f.honest["probe"]}


def swapped(a, b, *keys):
    """Exchange fields of two splits."""

    def edit(f):
        splits = f.record["data"]["splits"]
        for key in keys:
            splits[a][key], splits[b][key] = splits[b][key], splits[a][key]
        sealed(f.record)
        f.write()

    return edit


def copied_by_another(f):
    """The owner's files, byte for byte, as somebody else's (C6 b)."""
    for path in f.inbox.iterdir():
        path.unlink()
    for path in f.owner.records():
        shutil.copy(path, f.inbox)
        shutil.copy(predictions_path(path), f.inbox)


def copied_with_another_start(f):
    """The same, each begun at another time and a little slower."""
    copied_by_another(f)
    for path in sorted(f.inbox.glob("*.json")):
        record, answers = f.read(path)
        record["started"] = record["started"][:17] + "00.000001+00:00"
        f.write(path, record, answers)


def copied_with_another_curve(f):
    """The owner's answers beside the guest's curve: more than a chance, as 12 are wrong, in two classes."""
    answers = f.labels.copy()
    answers[:12] ^= 1
    for path, record, loss in ((*f.own()[:2], 8.0), (f.path, f.record, 9.0)):
        f.count(record, answers)
        for point in record["result"]["curve"]:
            point[2] = loss
        f.write(path, record, answers)


def started_as(f):
    """A run of another seed that began in the same microsecond as the owner's."""
    f.record["started"] = f.own()[1]["started"]
    f.record["ended"] = (
        f.record["ended"][:17].replace(f.record["ended"][:10], f.record["ended"][:10]) + "59.999999+00:00"
    )
    f.write()


def gone(name):
    """Leave a seed out."""

    def edit(f):
        (f.inbox / f"{name}.json").unlink()

    return edit


def linked(f):
    """A link in place of a record."""
    f.path.rename(f.inbox / "elsewhere")
    f.path.symlink_to(f.inbox / "elsewhere")


def linked_answers(f):
    """A link in place of answers."""
    path = predictions_path(f.path)
    path.rename(f.inbox / "elsewhere")
    path.symlink_to(f.inbox / "elsewhere")


def piped(f):
    """A pipe in place of a record: reading it would wait for ever."""
    f.path.unlink()
    os.mkfifo(f.path)


def grown(suffix):
    """A file of a hundred megabytes."""

    def edit(f):
        with open(f.path.with_suffix(suffix), "r+b") as file:
            file.truncate(100 << 20)

    return edit


def bomb(f):
    """Answers that unpack to 64 MB."""
    predictions_path(f.path).write_bytes(gzip.compress(bytes(64 << 20)))


def twice(f):
    """One run under two names of files."""
    shutil.copy(f.path, f.inbox / "zz.json")
    shutil.copy(predictions_path(f.path), f.inbox / "zz.pred.gz")


def alone(f):
    """The guest's first run as one of seed 7."""
    for path in f.inbox.glob("seed[45]*"):
        path.unlink()
    f.record["training"]["seed"] = 7
    f.write()


def one_curve(f):
    """The curve of seed 3 under seeds 4 and 5, with the selection and answers that go with it."""
    for seed in (4, 5):
        path = f.inbox / f"seed{seed}.json"
        record, _ = f.read(path)
        record["result"] = f.record["result"]
        record["training"]["selected_step"] = f.record["training"]["selected_step"]
        f.write(path, record, f.answers)


# On the committed records, with those of an attention as the owner's


def committed(f, task, attention):
    """Submit the committed `small` runs of a cell; yields (path, record, answers, labels) to be changed and written."""
    for path in f.inbox.iterdir():
        path.unlink()
    shutil.rmtree(f.owner.results)
    shutil.copytree(REFERENCE / "records" / task / attention, f.owner.results / "records" / task / attention)
    shutil.copytree(REFERENCE / "labels", f.owner.results / "labels")
    for path in sorted((REFERENCE / "records" / task / attention).glob("*/seed*.json")):
        record, answers = f.read(path)
        if record["task"]["preset"] == "small":
            sha256 = record["data"]["splits"]["test"]["labels_sha256"]
            labels = gzip.decompress(labels_path(REFERENCE, sha256).read_bytes())
            yield f.inbox / path.name, record, answers, np.frombuffer(labels, np.uint8)


def relabelled(f):
    """C4: three runs on a substitute, sold as runs on the real set of source hub."""
    for path, record, answers, _ in committed(f, "image", "softmax"):
        record["task"].update(dataset="CIFAR-10 16x16", substitute=False)
        record["data"]["source"] = "hub"
        perturbed(record)
        sealed(record)
        f.write(path, record, answers)


def baseline(change, hidden=False):
    """Seeds 3 to 5 of softmax on ListOps, with answers `change(answers, labels)`; `hidden`: curve and start are new."""

    def edit(f):
        for path, record, answers, labels in committed(f, "listops", "softmax"):
            seed = record["training"]["seed"]
            record["training"]["seed"], record["env"]["cpu"] = seed + 3, "Another CPU"  # its initial weights differ
            record["command"] = record["command"].replace(f"--seed {seed}", f"--seed {seed + 3}")
            answers = change(answers, labels)
            record["result"] |= {"n_correct": int((answers == labels).sum())}
            record["result"]["predictions_sha256"] = hashlib.sha256(answers.tobytes()).hexdigest()
            if hidden:
                perturbed(record)
            f.write(path.with_name(f"seed{seed + 3}.json"), record, answers)

    return edit


def lowered(answers, labels):
    """Seven of ten answers are wrong."""
    return np.where(np.arange(len(answers)) % 10 < 3, answers, (labels + 1) % 10).astype(np.uint8)


# In the owner's own folder


def mine(change, *, seeds=(0,), weights=None):
    """Change the owner's runs by `change(f, record, answers) -> answers`, in place; `weights(runs folder)` as well."""

    def edit(f):
        for seed in seeds:
            path, record, answers = f.own(seed)
            answers = change(f, record, answers)
            f.write(path, record, answers)
        if weights:
            shutil.copytree(f.owner.runs, f.inbox.parent / "runs")
            f.owner.runs = f.inbox.parent / "runs"
            weights(f.owner.runs / "tiny" / "performer" / "smoke" / "seed0", f)

    return edit


def at(*keys, to):
    """For `mine`: set a field of `result`."""

    def change(f, record, answers):
        inner = record["result"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to(inner[keys[-1]]) if callable(to) else to
        return answers

    return change


def moved(counts):
    """One right answer counts in another group."""
    one = next(i for i, (_, right, _) in enumerate(counts) if right)
    other = [i for i, (_, right, n) in enumerate(counts) if right < n][-1]
    assert one != other
    return [[value, right - (i == one) + (i == other), n] for i, (value, right, n) in enumerate(counts)]


def as_first(f, record, answers):
    """For `mine`: curve and selection of seed 0."""
    _, first, _ = f.own()
    record["result"] |= {key: first["result"][key] for key in ("curve", "val_n_correct")}
    record["training"]["selected_step"] = first["training"]["selected_step"]
    return answers


def claimed(f, record, answers):
    """For `mine`: one more right than there are, and a badge that says V3."""
    record["result"]["n_correct"] += 1
    entry = {"levels": [0, 1, 2, 3], "reason": "", "rejected": False, "sha256": OTHER}
    places = [path.relative_to(f.owner.results).as_posix() for path in f.owner.records()]
    text = json.dumps({"schema": "lra-verification/1", "records": dict.fromkeys(places, entry)})
    (f.owner.results / "verification.json").write_text(text)
    return answers


def exchanged(f, record, answers):
    """For `mine`: a right answer and a wrong one change places, so that the count stays."""
    right = list(answers == f.labels)
    for i in (right.index(True), right.index(False)):
        answers[i] ^= 1
    f.count(record, answers)
    return answers


def unchanged(f, record, answers):
    """For `mine`."""
    return answers


def rewritten(name, change, sealed=""):
    """For `mine`: change the tensors of a file of the run's folder. `sealed`: what they are called in the record."""

    def weights(folder, f):
        tensors, state = checkpoint.load(folder / name)
        tensors = change(tensors)
        checkpoint.save(folder / name, tensors, state)
        if sealed:
            path, record, answers = f.own()
            chain = record["result"]["chain"]
            owner, key = (chain, "final_sha256") if sealed == "final" else (chain["middle"], "sha256")
            owner[key] = checkpoint.tensors_sha256(tensors)
            f.write(path, record, answers)

    return weights


def always_one(tensors):
    """Weights that answer class 1 whatever is asked: they stand for any that another recipe made."""
    zero = {name: t * 0 for name, t in tensors.items() if name.endswith("head.out.weight")}
    one = {name: t * 0 + torch.tensor([-1.0, 1.0]) for name, t in tensors.items() if name.endswith("head.out.bias")}
    return tensors | {k: v for k, v in (zero | one).items() if not k.startswith("optim.")}


def their_answers(f, record, answers):
    """For `mine`: the answers of `always_one`."""
    answers = np.ones_like(answers)
    f.count(record, answers)
    return answers


MALFORMED = {  # field: values that no record may have there
    "result.n_correct": (-1, "20"),
    "result.curve": ([[4, "val", -0.5, 1, 13]],),
    "result.probe.losses": ([],),
    "training.seed": (False,),
    "training.optimizer": ("SGD",),
    "task.preset": ("huge",),
    "task.name": ("../../../etc",),
    "task.dataset": ("<script>alert(1)</script>",),
    "model.attention": ("../softmax", "perf\u043ermer"),
    "data.floors": ({"<b>": 0.5, "majority": 0.5},),
    "env.cpu": ("<img src=x onerror=alert(1)>", "CPU \u202etxt.exe", "\x1b[2J"),
    "cost.wall_s": (-1.0,),
    "cost.peak_bytes": (10**15,),
    "started": ("2026-01-01T00:00:00",),
}
# name: (edit, what the reason holds)
FORGERIES = {
    # counts and sizes
    "a count": (field("result", "n_correct", to=lambda v: v + 1), "result.n_correct is"),
    "the test size": (field("result", "n_test", to=24), "result.n_test is 24"),
    "validation count": (field("result", "val_n_correct", to=lambda v: v - 1), "result.val_n_correct is"),
    "validation size": (field("result", "n_val", to=14), "result.n_val is 14"),
    "more test examples than the preset": (field("data", "splits", "test", "n", to=24), "at most 23"),
    "sequences beyond the preset": (field("data", "splits", "test", "max_length", to=42), "max_length"),
    # seeds
    "another seed": (alone, "model.init_sha256 is"),
    "a seed of its own": (field("training", "seed", to=7), "missing 6"),
    "a gap of seeds": (gone("seed4"), "missing 4"),
    "a copy of a file": (twice, "records the same run"),
    # recipe, method, parameters
    "a learning rate": (field("training", "recipe", "lr", to=0.02), "training.recipe is"),
    "an override that was none": (field("training", "overrides", to={"train.lr": "0.01"}), "training.overrides is"),
    "an override that was not used": (
        field("training", "overrides", to={"encoder.width": "99"}), "not what the run used"
    ),
    "a width beyond memory": (field("model", "encoder", "width", to=2**30), "exceed the"),
    "the approximation size": (field("model", "attention_config", "num_features", to=500), "model.attention_config is"),
    "another method": (field("model", "attention", to="softmax"), "model.attention_config is"),
    "parameters": (field("model", "n_params", to=lambda v: v - 1), "model.n_params is"),
    "parameters to softmax": (field("model", "n_params_ratio_to_softmax", to=0.5), "model.n_params_ratio_to_softmax"),
    "exactness": (field("model", "exact", to=True), "model.exact is True"),
    "initial weights": (field("model", "init_sha256", to=OTHER), "model.init_sha256 is"),
    "processes that do not share a batch": (field("training", "world_size", to=3), "training.world_size is 3"),
    "a processor that is no GPU": (field("cost", "device", to="cuda"), "env.gpu is None"),
    "the protocol": (field("task", "protocol", to="open"), "task.protocol is open"),
    "the command": (field("command", to="rm -rf ."), "command is rm -rf ."),
    "pretraining that was none": (
        field("training", "overrides", to={"pretrain.share": "0.4"}), "training.pretrain: its steps"
    ),
    "a share of all steps": (field("training", "overrides", to={"pretrain.share": "1e300"}), "1e300 is no share"),
    "a share that is no number": (field("training", "overrides", to={"pretrain.share": "inf"}), "inf is no share"),
    "losses of no pretraining": (field("training", "pretrain", to=[[4, 1.0]]), "training.pretrain: its steps"),
    # steps and curve
    "fewer steps than the recipe": (field("training", "steps", to=11), "training.steps is 11"),
    "steps beyond the recipe": (field("training", "steps", to=13), "training.steps is 13"),
    "millions of validations": (field("training", "recipe", "steps", to=2**31), "training.steps is 12"),
    "examples": (field("training", "examples_seen", to=97), "training.examples_seen is 97"),
    "a selected step that is not the best": (
        field("training", "selected_step", to=lambda v: 4 if v != 4 else 8), "training.selected_step is"
    ),
    "a selected step that was never validated": (
        field("training", "selected_step", to=5), "training.selected_step is 5"
    ),
    "a curve out of order": (curve(lambda c: c.reverse()), "result.curve: its steps"),
    "a validation left out": (curve(lambda c: c.pop(3)), "result.curve has 5 entries"),
    "a step of the curve": (curve(lambda c: c[2].__setitem__(0, 7)), "result.curve: its steps"),
    "a training size in the curve": (curve(lambda c: c[0].__setitem__(4, 33)), "result.curve: its steps"),
    "a better validation": (curve(lambda c: c[1].__setitem__(3, 13)), "result.val_n_correct is"),
    "more right than there are": (curve(lambda c: c[1].__setitem__(3, 14)), "result.curve: val at step 4"),
    "a loss that so many errors exceed": (curve(lambda c: c[0].__setitem__(2, 0.001)), "result.curve: train at step 4"),
    "no loss": (curve(lambda c: c[1].__setitem__(2, None)), "at loss None"),
    # groups
    "a group that has more right": (
        field("result", "groups", "counts", to=lambda v: [[k, r + (k == 1), n] for k, r, n in v]),
        "the sums of result.groups is",
    ),
    "a group twice": (field("result", "groups", "counts", to=lambda v: [v[0], *v]), "the values of result.groups is"),
    # answers
    "a flipped answer, raw": (
        lambda f: f.write(answers=f.answers ^ (np.arange(23) == 3)), "does not match the sha256 in its record"
    ),
    "answers of a class there is not": (answered(lambda f: [7, *f.answers[1:]]), "a prediction is class 7"),
    "fewer answers": (answered(lambda f: f.answers[:-1]), "the number of predictions is 22"),
    "every answer right": (baseline(lambda answers, labels: labels, hidden=True), "standard errors above validation"),
    "a bomb of answers": (bomb, "does not match the sha256"),
    # data
    "the hash of the data": (field("data", "manifest_sha256", to=OTHER), "data.manifest_sha256 must be"),
    "a foreign data set": (field("task", "dataset", to="CIFAR-10"), "task.dataset is 'CIFAR-10'"),
    "a substitute sold as real, or the reverse": (field("task", "substitute", to=True), "task.substitute true"),
    "a source that the task does not have": (field("data", "source", to="hub"), "for source hub"),
    "the validation rule": (field("data", "val_rule", to="legacy"), "result.curve: its steps"),
    "validation and test exchanged": (swapped("val", "test", "sha256"), "hashes of the splits differ"),
    "test as validation": (
        field("data", "splits", to=lambda v: v | {"val": v["test"]}), "two of them have the same sha256"
    ),
    "labels of another split": (swapped("val", "test", "labels_sha256"), "No such file"),
    "a split's hash": (field("data", "splits", "train", "sha256", to=OTHER), "hashes of the splits differ"),
    "the length": (field("task", "seq_len", to=4096), "task.seq_len is 4096"),
    "the preset": (field("task", "preset", to="paper"), "training.recipe is"),
    "the version": (field("task", "version", to=2), "task.version is 2"),
    "a lower floor": (field("data", "floors", "majority", to=0.01), "the share of no class"),
    "another floor beside it": (
        field("data", "floors", to=lambda v: v | {"shortcut": 0.99}), "floors or revision differ"
    ),
    # clocks and costs
    "speed": (field("cost", "steps_per_s", to=1e6), "cost.steps_per_s"),
    "tokens": (field("cost", "tokens_per_s", to=1e12), "cost.tokens_per_s"),
    "no time at all": (field("cost", "wall_s", to=0.0), "cost.steps_per_s"),
    "a training longer than the run": (
        lambda f: (
            f.record["cost"].update(wall_s=9e4, steps_per_s=round(12 / 9e4, 4), tokens_per_s=0.02), f.write()
        ),
        "cost.wall_s 90000.0 does not fit",
    ),
    "an end before the start": (field("ended", to="2001-01-01T00:00:00+00:00"), "between started and ended"),
    "no such day": (field("started", to="2026-02-31T00:00:00+00:00"), "is no time"),
    # form
    "an added field": (field("suite", "bonus", to=1), "suite.bonus"),
    "a missing field": (text('"torch":', '"tarch":'), "unknown field 'env.tarch'"),
    "another schema": (field("schema", to="lra-record/2"), "not a record of schema"),
    "an added section": (text('"schema":', '"extra": 1, "schema":'), "unknown field 'extra'"),
    "a key twice": (text('"seed": 3', '"seed": 3, "seed": 4'), "twice"),
    "NaN": (text('"lr": 0.01', '"lr": NaN'), "NaN is no finite number"),
    "infinity": (text('"lr": 0.01', '"lr": -Infinity'), "Infinity is no finite number"),
    "a number beyond doubles": (text('"lr": 0.01', '"lr": 1e999'), "1e999"),
    "a huge whole number": (text('"seed": 3', f'"seed": {"9" * 5000}'), "beyond 64 bits"),
    "deep nesting": (text('"seed": 3', f'"seed": {"[" * 100_000}{"]" * 100_000}'), "recursion"),
    "half of a character": (text('"os": "', r'"os": "\ud800'), "not a JSON record"),
    "a record of a hundred megabytes": (grown(".json"), f"the limit is {LARGEST:,}"),
    "answers of a hundred megabytes": (grown(".pred.gz"), f"the limit is {LARGEST:,}"),
    "a link for a record": (linked, "no regular file"),
    "a link for answers": (linked_answers, "no regular file"),
    "a pipe for a record": (piped, "no regular file"),
    "a module of the standard library": (field("task", "name", to="antigravity"), "unknown task 'antigravity'"),
    # runs that are one run
    "the owner's files as somebody else's": (copied_by_another, "its curve is that of records/tiny/performer"),
    "those, begun at another time": (copied_with_another_start, "its curve is that of records/tiny/performer"),
    "the owner's answers under another curve": (
        copied_with_another_curve, "its predictions is that of records/tiny/performer"
    ),
    "the owner's start": (started_as, "its start is that of records/tiny/performer"),
    "one curve under three seeds": (one_curve, "its curve is that of counter/eve/records/tiny/performer"),
    # failures
    "a failure with a result": (field("status", to="failed: no reason"), "result must be there"),
    "a result taken out": (field("result", to=None), "result must be there"),
    "a failure that carries nothing": (failure(), "without its curve and probe"),
    "a failure with answers": (failure(answers=True), "yet there are predictions"),
    "a failure that names a step never reached": (
        failure(failure=lambda f: evidence(f, 0), steps=3, status="failed: loss is not finite at step 90"),
        "status names step 90",
    ),
    "a failure without its validations": (
        failure(failure=lambda f: evidence(f, 0)), "result.curve has 0 entries"
    ),
    # the committed records
    "C4: a substitute under the name of the real set": (relabelled, "task or substitute differ"),
    "C5: a baseline lowered by copies": (baseline(lowered), "its curve is that of records/listops/softmax"),
    # these are well made, are taken in, and change nothing of the owner's
    "C5: a baseline lowered, with a curve of its own": (baseline(lowered, hidden=True), ", by eve</td>", "apart"),
    "C5: a failure that nobody saw": (failure(failure=lambda f: evidence(f, 2)), ", by eve</td>", "apart"),
    # in the owner's folder: rejected at V1, V2 or V3
    "C5: one curve under three of the owner's seeds": (mine(as_first, seeds=(1, 2)), "its curve is that of", 1),
    "C6 c, d: a badge in a file": (mine(claimed), "result.n_correct is", 1),
    "a loss of the probe": (
        mine(at("probe", "losses", 7, to=lambda v: v * 1.01)), "result.probe.losses[7] is", 2
    ),
    "another batch of the probe": (mine(at("probe", "batch", to=5)), "result.probe.batch must be", 2),
    "a loss after the middle": (
        mine(at("chain", "middle", "losses", 2, to=lambda v: v * 1.01)), "result.chain.middle.losses[2] is", 2
    ),
    "a right answer in another group": (mine(at("groups", "counts", to=moved)), "result.groups is", 2),
    "the step of the middle": (mine(at("chain", "middle", "step", to=4)), "result.chain.middle.step is 4", 2),
    "the hash of the middle": (mine(at("chain", "middle", "sha256", to=OTHER)), "result.chain.middle.sha256 is", 2),
    "another checkpoint in the middle": (
        mine(unchanged, weights=rewritten(MIDDLE, always_one)), "result.chain.middle.sha256 is", 2
    ),
    "another checkpoint and its hash": (
        mine(unchanged, weights=rewritten(MIDDLE, always_one, "middle")), "result.chain.middle.losses[0] is", 2
    ),
    "the hash of the final weights": (mine(at("chain", "final_sha256", to=OTHER)), "result.chain.final_sha256 is", 3),
    "other final weights": (mine(unchanged, weights=rewritten(WEIGHTS, always_one)), "result.chain.final_sha256 is", 3),
    "other final weights and their hash": (
        mine(unchanged, weights=rewritten(WEIGHTS, always_one, "final")), "of the stored predictions", 3
    ),
    "C6 a: other final weights, their hash and their answers": (
        mine(their_answers, weights=rewritten(WEIGHTS, always_one, "final")), "the weights of that step get", 3
    ),
    "a right answer for a wrong one": (mine(exchanged), "of the stored predictions", 3),
}  # fmt: skip


@pytest.fixture
def forger(trained, owner, tmp_path):
    """A forger with the guest's three valid runs."""
    return Forger(owner, trained[1], tmp_path / "inbox")


def submitted(forger):
    """`leaderboard submit` of all files of the forger; returns its exit code."""
    files = sorted(map(str, forger.inbox.glob("*.json")))
    return main(["leaderboard", "submit", *files, "--by=eve", *forger.owner.places])


def test_a_value_that_no_record_may_have_is_refused_with_its_field(forger):
    check(forger.record)
    for name, values in MALFORMED.items():
        *keys, last = name.split(".")
        for value in values:
            record = copy.deepcopy(forger.record)
            functools.reduce(operator.getitem, keys, record)[last] = value
            with pytest.raises(Rejected, match=rf"{re.escape(name)}(\[0\])? must be"):
                check(record)


def test_what_the_forger_starts_from_is_valid_and_stands_apart(forger, capsys):
    before = table(forger)
    assert submitted(forger) == 0
    assert capsys.readouterr().out.count(": V1\n") == 3
    assert table(forger) == before


def table(forger):
    """The table of the owner, as CSV."""
    target = forger.owner.results / "t.csv"
    assert main(["table", "--results", str(forger.owner.results), "--format=csv", "--write", str(target)]) == 0
    return target.read_text()


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_refused_or_stands_apart(name, forger, capsys):
    edit, reason, *how = FORGERIES[name]
    edit(forger)
    capsys.readouterr()
    seen = {"apart": stands_apart, "": is_refused}.get(how[0] if how else "", is_rejected)
    said = seen(forger, capsys, *how)
    assert said and all(reason in text for text in said), said


def is_refused(forger, capsys):
    """`submit` says why in one line, which is returned, and leaves nothing behind."""
    before = same_files(forger.owner.results)
    assert submitted(forger) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert " is refused: " in line and len(line) < 1200, line
    assert same_files(forger.owner.results) == before
    return [line]


def stands_apart(forger, capsys, how):
    """`submit` takes it in; the table of the owner stays, and the page has it in a section of its own: returned."""
    before = table(forger)
    assert submitted(forger) == 0
    assert table(forger) == before
    results = forger.owner.results
    assert main(["leaderboard", "build", f"--results={results}", f"--data={forger.owner.data}"]) == 0
    above, below = (results / "index.html").read_text().split('<h2 id="others">')
    assert "counter/eve" in below and "by eve" not in above and "counter/eve" not in above
    return [below]


def is_rejected(forger, capsys, level):
    """`verify` says why and writes nothing; at V1, tables leave it out and say why. Returns what they say."""
    results = forger.owner.results
    before = same_files(results)
    first = [str(forger.owner.records()[0])] * (level > 1)  # beyond V1, the others say nothing of it
    assert main(["leaderboard", "verify", *first, f"--level={level}", *forger.owner.places]) == 1
    said = [capsys.readouterr().out]
    assert "rejected: " in said[0], said
    assert same_files(results) == before
    if level == 1:
        assert main(["table", f"--results={results}", "--format=csv"]) == 1
        shown = capsys.readouterr()
        rejected = sum(v.rejected for v in judge(Places(results)).values())
        assert len(shown.out.splitlines()) == 1 + 3 - rejected
        said.append(shown.err)
    return said


def test_a_checkpoint_that_is_not_at_hand_leaves_v2_to_the_start_and_says_so(owner, tmp_path):
    path = owner.records()[0]
    whole = verify(path, 3, Places(owner.results, owner.data, owner.runs))
    assert (whole.badge, whole.reason) == ("V3", "")
    start = verify(path, 2, Places(owner.results, owner.data, tmp_path / "none"))
    assert start.badge == "V2" and "V2 from the start only: no " in start.reason
