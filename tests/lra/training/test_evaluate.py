"""Evaluation: every example once, without dropout, in the micro-batches of training, and never a made-up class."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lra.training.batches import collate
from lra.training.config import overrides, resolve
from lra.training.evaluate import Diverged, Where, evaluate
from lra.training.trainer import Trainer
from tasks.store.prepared import load

CPU = Where(torch.device("cpu"))


@pytest.fixture
def trainer(lab):
    """`trainer(*sets)`: a Trainer on the tiny data, before its first step."""

    def make(*sets, attention="softmax"):
        prepared = load(lab.data / "tiny" / "smoke")
        return Trainer(resolve("tiny", "smoke", attention, 0, prepared.manifest, overrides(list(sets))), prepared, CPU)

    return make


def one_by_one(model, split):
    """(mean loss, predictions) of a model in the mode it is in, each example alone."""
    lengths = np.diff(split.offsets)
    batches = [collate(split, 1, np.array([i]), int(lengths[i])) for i in range(len(lengths))]
    with torch.no_grad():
        logits = torch.cat([model(b.tokens_BTN, b.mask_BTN) for b in batches])
    labels = torch.from_numpy(split.labels.astype(np.int64))
    return F.cross_entropy(logits, labels).item(), logits.argmax(-1).tolist()


@pytest.mark.parametrize("size", [1, 5, 8, 23, 64])
def test_every_example_counts_once_and_dropout_is_off(trainer, size):
    t = trainer("encoder.dropout=0.5")
    split = t.prepared.splits["test"]
    split = replace(split, labels=1 - np.array(one_by_one(t.model.eval(), split)[1], np.uint8))
    loss, predictions = one_by_one(t.model, split)
    counts = evaluate(t.model.train(), split, 1, batch=size, where=CPU)
    assert counts.loss == pytest.approx(loss, rel=1e-5) and counts.predictions.tolist() == predictions
    assert counts.n == 23 and counts.n_correct == 0  # all labels are the other class
    assert t.model.training


def test_evaluation_takes_no_more_examples_at_a_time_than_training(trainer):
    t, sizes = trainer("train.accumulate=4"), {True: set(), False: set()}
    t.model.register_forward_pre_hook(lambda model, inputs: sizes[model.training].add(len(inputs[0])))
    for step in range(4):
        loss, correct, _ = t.step(step)
        t.count(float(loss), int(correct))
        t.progress.step += 1
    t.validate()
    t.test()
    assert sizes == {True: {2}, False: {1, 2}}  # 13 and 23 examples: the last one is alone


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logit_that_is_not_finite_is_no_class(trainer, value):
    t = trainer()
    with torch.no_grad():
        t.model.head.out.bias[0] = value
    with pytest.raises(Diverged, match="logits of 23 of 23 test examples are not finite"):
        t.best = t.model.state_dict()
        t.test()


class Unread(TorchDispatchMode):
    """Raises where a number is read back from a device: on a GPU, everything would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor was read"
        return func(*args, **(kwargs or {}))


def test_step_reads_nothing_back_from_the_device(trainer):
    t = trainer()
    with Unread():
        for step in range(1, 4):
            t.step(step)
    with Unread(), pytest.raises(AssertionError, match="a tensor was read"):
        torch.zeros(()).item()
