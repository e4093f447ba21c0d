"""The task contract: what a task exports, and the plain data that flows out of it.

A task is one file tasks/<name>.py, or one folder tasks/<name>/ where it needs helpers. It exports

    META       a `Meta`: facts that no preset changes (classes, vocabulary, towers); META.name is the file's name
    RECIPES    {"smoke": Recipe, "small": Recipe, "paper": Recipe}, and more: the same for every attention
    build      build(recipe, *, source, data_dir, workers, scratch) -> Built: reads or draws all three splits
        source      "embedded", "hub", "local" or "generated"; a source that the task does not have is a SourceError
        data_dir    the folder given by --data-dir, else None
        workers     number of threads
        scratch     a folder for the pieces of a long generation: it survives an interrupted call, and is removed
                    when the data are prepared; a task that needs none ignores it

and may export

    ARCHIVES          file names under which the raw files are published, so that --data-dir may be an archive
    members(data)     patterns of the raw files in such an archive: the last parts of their paths
    export(splits, folder) -> list[Path]    writes the files that the task was published as
    decode(tokens) -> str                   spells a sequence of symbols
    longer(data, test, factor) -> Split     test examples of `factor` times the length, of a generated task; `data` and
                    `test` are those of the run that is tested, and none of its train may be among them
    groups(split) -> (name, values)         a whole number for each example, such as how many pairs it has: records
                    hold the accuracy of each

tasks/store/prepared.py checks what `build` returns, and writes it once as memory-mapped arrays with a manifest.
Training reads only those. Token id 0 is padding in every task and never a symbol.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # results are read without torch
    import torch

PAD = 0
SPLITS = ("train", "val", "test")


class SourceError(Exception):
    """Raw data that is missing, malformed or unreachable; one line that names the value and the way out."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Facts of a task that no preset changes."""

    name: str
    version: int  # raised whenever prepared data changes meaning; part of every record's digest
    classes: int
    vocab: int  # number of token ids, padding included
    description: str
    towers: int = 1  # sequences per example: 1 = classify one, 2 = match a pair
    reads: Literal["symbols", "bytes", "pixels"] = "symbols"  # what id - 1 is, for showing an example
    generated: bool = False  # made by the suite: a --data-dir without its files is no error
    # source -> regular expression of the names its data sets have; a substitute says so in its name. Empty: any name
    datasets: dict[str, str] = field(default_factory=dict)

    def declares(self, source: str, dataset: str, substitute: bool) -> bool:
        """Whether data of `source` may have this name, and be a substitute or not."""
        known = not self.datasets or re.fullmatch(self.datasets.get(source, "(?!)"), dataset)
        return bool(known) and substitute == ("substitute" in dataset)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What `prepare` makes. Sizes are examples; 0 means every example the source has."""

    seq_len: int  # tokens; longer sequences are cut on the right
    train: int
    val: int
    test: int
    source: str = "embedded"  # used when neither --source nor --data-dir says otherwise
    seed: int = 0  # of generators and of the split
    options: dict[str, int | float | str] = field(default_factory=dict)  # the task's own


@dataclass(frozen=True, kw_only=True)
class Stack:
    """The shared encoder: a stack of layers; max_len 0 means the data's seq_len."""

    layers: int = 2
    width: int = 64
    heads: int = 2
    ffn: int = 128
    dropout: float = 0.1
    positions: Literal["learned", "sinusoidal", "rotary", "alibi"] = "learned"
    pooling: Literal["mean", "cls"] = "mean"
    max_len: int = 0


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with linear warm-up and cosine decay to zero."""

    steps: int
    batch: int = 32  # examples per optimizer step
    accumulate: int = 1  # micro-batches an optimizer step is split into
    lr: float = 1e-3  # peak
    warmup: int = 100  # steps
    weight_decay: float = 0.01
    beta2: float = 0.999
    clip: float = 1.0  # maximum gradient norm
    eval_every: int = 100  # steps between validations; the last step is always validated


SMOKE = Optim(steps=40, batch=16, warmup=10, eval_every=20)  # for presets that only show that everything runs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One (task, preset): data, encoder and optimisation, identical for all attentions.

    `budget` is the one approximation size shared by all methods that have one: random features M,
    Linformer's projected length k, and so on.
    """

    data: Data
    encoder: Stack = Stack()
    train: Optim
    budget: int = 64


@dataclass(frozen=True)
class Split:
    """Examples as ragged arrays: sequence i is tokens[offsets[i]:offsets[i + 1]].

    An example owns `towers` consecutive sequences, so len(offsets) == towers * len(labels) + 1.
    """

    tokens: np.ndarray  # uint16, all sequences one after the other, ids >= 1
    offsets: np.ndarray  # int64
    labels: np.ndarray  # uint8

    @staticmethod
    def of_bytes(texts: list[bytes], labels: np.ndarray) -> Split:
        """Byte strings as sequences: id = byte + 1. (`of` would hold the 1.4 GB of Retrieval several times.)"""
        tokens = np.add(np.frombuffer(b"".join(texts), np.uint8), 1, dtype=np.uint16)
        return Split(tokens, np.cumsum([0, *map(len, texts)]), labels)

    @staticmethod
    def of(sequences: list[np.ndarray], labels: np.ndarray) -> Split:
        """Pack a list of id arrays (towers of one example adjacent) and their labels.

        Values that do not fit into uint16 and uint8 are kept as they are: `prepare` names and refuses them.
        """
        tokens = np.concatenate(sequences) if sequences else np.zeros(0, np.uint16)
        offsets = np.cumsum([0, *map(len, sequences)])
        return Split(_exactly(tokens, np.uint16), offsets, _exactly(np.asarray(labels), np.uint8))

    def sequence(self, i: int) -> np.ndarray:
        """Token ids of sequence i (a view)."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]


def _exactly(values: np.ndarray, dtype: type) -> np.ndarray:
    """The values as `dtype` if it holds every one of them, else unchanged."""
    with np.errstate(invalid="ignore"):
        converted = values.astype(dtype, copy=False)
    return converted if converted is values or np.array_equal(converted, values) else values


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `build` returns: three splits and where they come from.

    `floors` maps a name to an accuracy in [0, 1] on the test split, reached without reading the input as the
    task intends: the task's shortcut, where one is known. `prepare` adds the floor "majority".
    `report` holds further measured facts, printed and stored, used by nothing.
    """

    splits: dict[str, Split]
    dataset: str  # the table's column: "CIFAR-10", "digits (substitute for CIFAR-10)"
    substitute: bool = False
    source: str  # embedded, hub, local or generated
    revision: str  # package version, hub revision or generator version
    licence: str
    files: dict[str, str] = field(default_factory=dict)  # file name -> sha256 of each raw file read
    floors: dict[str, float] = field(default_factory=dict)
    report: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """One batch as the model sees it. T = towers, N = longest sequence of the batch, rounded up."""

    tokens_BTN: torch.Tensor  # int64, 0 = padding, and a masked token
    mask_BTN: torch.Tensor | None  # bool, True = real token; None when nothing is padded
    labels_B: torch.Tensor  # int64; with places to ask, what stood there, (B, T K), below 0 where nothing is asked
    asked_BTK: torch.Tensor | None = None  # int64, K places of each sequence that were masked; None: classify


def majority(train_labels: np.ndarray, test_labels: np.ndarray) -> float:
    """Accuracy on test of always answering the most frequent train label."""
    return float(np.mean(test_labels == np.bincount(train_labels).argmax()))
