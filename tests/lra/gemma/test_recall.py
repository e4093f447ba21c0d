"""Passages that stand twice: where they are, what counts, and who can know it."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lra.gemma import weights
from lra.gemma.data import Documents, pack, split
from lra.gemma.experiment import Experiment, evaluate, method, plug_in
from lra.gemma.recall import SKIPPED, layout, repeated
from lra.options import UsageError
from models.gemma import bridge
from models.gemma.loss import Head

LENGTH, PASSAGE, DISTANCES = 131, 19, (50, 23)
BOS, LETTERS = 2, 300


def encode(texts):
    return [[3 + ord(c) for c in t] for t in texts]


@pytest.fixture(scope="module")
def texts():
    """Documents of which each has letters of its own."""
    rng = np.random.default_rng(5)
    return ["".join(chr(9 * i + k) for k in rng.integers(11, 20, 47)) for i in range(30)]


@pytest.fixture
def blocks(texts):
    """`blocks(kind, distances)`: seven of them."""
    base = weights.Base(None, encode, BOS, "letters", "here", "0" * 64)
    return lambda kind="text", distances=DISTANCES: repeated(
        base, texts, kind, PASSAGE, distances, length=LENGTH, blocks=7
    )


def test_passages_stand_twice_at_their_distances_and_nothing_else_is_touched(blocks, texts):
    first = layout(LENGTH, PASSAGE, DISTANCES)
    assert first == {50: 1, 23: 70}  # the shorter one at the earliest place that is left
    made = blocks()
    plain = pack(texts, encode, BOS, length=LENGTH, blocks=7, what="test", joint="\n\n").tokens
    scored = np.zeros((7, LENGTH - 1), bool)
    for d, a in first.items():
        plain[:, a + d : a + d + PASSAGE] = plain[:, a : a + PASSAGE]
        scored[:, a + d + SKIPPED - 1 : a + d + PASSAGE - 1] = True
    assert (made.tokens == plain).all() and (made.scored == scored).all()
    assert (made.tokens[:, 0] == BOS).all() and not (made.tokens[:, 1:] == BOS).any()


def test_blocks_share_no_document_with_each_other_nor_with_calibration():
    texts = [chr(40 + i) * (300 if i % 2 else 37) for i in range(200)]  # longer than a block, or not
    splits = split(Documents(texts, None, "letters", "local", "", {}))
    base = weights.Base(None, encode, BOS, "letters", "here", "0" * 64)
    test = repeated(base, splits["test"], "text", PASSAGE, (23,), length=LENGTH, blocks=4)
    calibration = pack(splits["calibration"], encode, BOS, length=LENGTH, blocks=1, what="calibration")
    held = [set(row.tolist()) - {BOS, *encode(["\n"])[0]} for row in (*test.tokens, *calibration.tokens)]
    assert sum(map(len, held)) == len(set.union(*held)) and len(set(test.document)) == 4


class Copies(torch.nn.Module):
    """Knows the next token where the last SKIPPED tokens stood `reach` tokens before, or nearer."""

    def __init__(self, reach):
        super().__init__()
        self.reach, self.model = reach, self.decode

    def decode(self, input_ids, use_cache):
        row, said = input_ids[0].tolist(), torch.zeros(1, input_ids.shape[1], 9 * LETTERS)
        for i in range(SKIPPED, len(row)):
            for j in range(max(SKIPPED, i - self.reach), i):
                if row[j - SKIPPED + 1 : j + 1] == row[i - SKIPPED + 1 : i + 1]:
                    said[0, i, row[j + 1]] = 20.0
        return SimpleNamespace(last_hidden_state=said)


@pytest.mark.parametrize("kind", ["text", "random"])
def test_who_sees_the_first_occurrence_knows_every_token_that_counts_and_a_window_does_not(blocks, kind):
    made, head = blocks(kind), Head(torch.eye(9 * LETTERS))
    far, near = (evaluate(Copies(reach), head, "test", made, "fp32", torch.device("cpu")) for reach in (LENGTH, 49))
    parts = {d: [f["parts"][d]["n_correct"] for f in (far, near)] for d in ("50", "23")}
    total = 7 * (PASSAGE - SKIPPED)
    assert parts == {"50": [total, 0], "23": [total, total]}
    assert far["n_test"] == far["n_correct"] == 2 * total == 2 * near["n_correct"]
    assert [row[:3] for row in near["parts"]["23"]["blocks"]] == [[d, 3, 3] for d in made.document]
    assert far["parts"]["50"]["loss"] < 0.01 < near["parts"]["50"]["loss"]


def test_the_identity_of_an_experiment_depends_on_the_distances(blocks):
    base = weights.Base(None, encode, BOS, "letters", "here", "0" * 64)
    exact = method("softmax", 7, LENGTH, layers=(0,))

    def digest(test):
        return Experiment("recall", base, None, {"test": test}, exact, "fp32", 0).digest

    one = blocks(distances=(50,))
    other = dataclasses.replace(one, parts={"51": one.parts["50"]})
    assert len({digest(x) for x in (one, blocks(), blocks("random"), blocks(distances=(23,)), other)}) == 5


@pytest.fixture
def tiny():
    """A model of two layers, not trained."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dataclasses.replace(weights.TINY, width=16, ffn=24, layers=2, heads=2, head_dim=8, max_len=LENGTH)
    model = transformers.Gemma3ForCausalLM(weights.tiny_config(small)).eval().requires_grad_(False)
    return weights.Base(model, weights.encode_bytes, BOS, "tiny", "here", "0" * 64)


def test_a_window_cannot_know_the_first_occurrence_and_exact_attention_can(tiny):
    model = tiny.model
    made = repeated(tiny, ["abcdefghijklmn " * 30] * 2, "text", PASSAGE, (90,), length=LENGTH, blocks=2)
    changed = dataclasses.replace(made, tokens=made.tokens.copy())
    changed.tokens[:, 1 : 1 + PASSAGE] += 1
    for name, differs in (("local,window=7,sinks=1", False), ("local,window=7", False), ("softmax", True)):
        plug_in(tiny, method(name, 7, LENGTH, layers=(0, 1)), seed=0, length=LENGTH)
        losses = [evaluate(model, Head.of(model, "fp32"), "test", b, "fp32", "cpu")["loss"] for b in (made, changed)]
        assert (losses[0] != losses[1]) == differs, name
        bridge.detach(model)


def test_layers_below_the_first_replaced_one_run_once_and_scores_stay_what_they_are(tiny):
    made = repeated(tiny, ["abcdefghijklmn " * 30] * 2, "text", PASSAGE, (90,), length=LENGTH, blocks=2)
    runs, known, scores = [], {}, []
    tiny.model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    for name in ("constant", "softmax"):
        for kept in (known, None):
            plug_in(tiny, method(name, 7, LENGTH, layers=(1,)), seed=0, length=LENGTH)
            head = Head.of(tiny.model, "fp32")
            scores.append(evaluate(tiny.model, head, "test", made, "fp32", "cpu", known=kept))
            bridge.detach(tiny.model)
    assert len(runs) == 2 + 2 * 2 and scores[0] == scores[1] != scores[2] == scores[3]


@pytest.mark.parametrize(
    "length, passage, distances, message",
    [
        (131, 16, (50,), "--passage 16: it needs more than 16 tokens, and room for two in a block of 131"),
        (131, 66, (66,), "--passage 66"),
        (131, 19, (18,), "--distances 18: passages of 19 in a block of 131 tokens have 19 to 111"),
        (131, 19, (112,), "--distances 112"),
        (131, 19, (50, 20, 21, 22), "--distances 21: no place is left"),
    ],
)
def test_what_does_not_fit_into_a_block_is_named(length, passage, distances, message):
    with pytest.raises(UsageError, match=message):
        layout(length, passage, distances)
