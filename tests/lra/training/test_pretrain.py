"""Self-pretraining: the first share of the steps reconstructs masked training inputs, and reads no label."""

import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from lra.leaderboard.consistency import Places
from lra.leaderboard.levels import verify
from lra.records.record import read_predictions, read_record
from lra.scaling.cost import predict
from lra.scaling.count import COLUMNS, count
from lra.training import checkpoint
from lra.training.batches import MASKED, UNASKED, Batches, masked
from lra.training.config import overrides, resolve
from lra.training.trainer import Trainer, Where, learning_rate
from tasks.base import PAD, Batch, Split
from tasks.store.prepared import load
from tests.conftest import timeless
from tests.lra.builders import MACHINE

CPU = Where(torch.device("cpu"))
SHARE = "pretrain.share=0.4"  # of 12 steps 5


def new_run(lab, *sets, attention="softmax", preset="smoke"):
    prepared = load(lab.data / "tiny" / preset)
    return resolve("tiny", preset, attention, 0, prepared.manifest, overrides(list(sets))), prepared


def pairs(*lengths, vocab=11):
    """Examples of two sequences."""
    rng = np.random.default_rng(3)
    sequences = [rng.integers(1, vocab, length) for length in lengths]
    return Split.of(sequences, np.arange(len(lengths) // 2) % 2)


def test_a_share_of_the_real_tokens_of_each_sequence_is_masked_and_asked_for():
    whole = Batches(pairs(13, 7, 1, 31, 31, 2), 2, size=3, seed=0).batch(0)
    for share in (0.1, 0.5):
        batch = masked(whole, share, np.random.default_rng(5))
        changed_BTN = batch.tokens_BTN != whole.tokens_BTN
        real_BT = (whole.tokens_BTN != PAD).sum(-1)
        assert (changed_BTN.sum(-1) == (share * real_BT).round().clamp(min=1)).all()
        assert (batch.tokens_BTN[changed_BTN] == PAD).all() and batch.mask_BTN is whole.mask_BTN
        asked_BTK, answers_BTK = batch.asked_BTK, batch.labels_B.view(batch.asked_BTK.shape)
        counts_BTK = answers_BTK != UNASKED
        there_BTK = whole.tokens_BTN.gather(-1, asked_BTK)
        assert (answers_BTK[counts_BTK] == there_BTK[counts_BTK]).all() and (answers_BTK[counts_BTK] > 0).all()
        assert changed_BTN.gather(-1, asked_BTK).equal(counts_BTK)  # what is asked is masked, and nothing else


def test_every_step_masks_other_places_and_the_same_step_the_same():
    batches = Batches(pairs(*[29] * 6), 2, size=3, seed=0)
    first, again, later = (batches.batch(step, 0.5) for step in (0, 0, 1))
    assert first.tokens_BTN.equal(again.tokens_BTN) and not first.asked_BTK.equal(later.asked_BTK)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_logits_are_those_of_the_masked_places_by_the_embeddings(lab, pooling):
    run, prepared = new_run(lab, SHARE, f"encoder.pooling={pooling}", "encoder.dropout=0")
    model, batch = run.build_model().eval(), Trainer(run, prepared, CPU).batches.batch(0, 0.5)
    seen = []
    model.encoder.norm.register_forward_hook(lambda *call: seen.append(call[2]))
    logits = model(batch.tokens_BTN, batch.mask_BTN, batch.asked_BTK)
    x_BNE = seen[0][:, pooling == "cls" :]
    for b, k in ((0, 0), (3, 1), (7, 0)):
        expected = model.encoder.embed.weight @ x_BNE[b, batch.asked_BTK[b, 0, k]] / x_BNE.shape[-1] ** 0.5
        assert torch.allclose(logits[b, k], expected, atol=1e-5)


def test_an_example_counts_once_however_many_of_its_tokens_are_asked_for(lab):
    """So that micro-batches, and ranks, add up to the batch."""
    from lra.training.evaluate import summed_loss

    logits, labels = torch.randn(3, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [6, *[UNASKED] * 4], [0, 1, *[UNASKED] * 3]])
    loss = torch.nn.functional.cross_entropy
    each = [loss(row[: (of != UNASKED).sum()], of[of != UNASKED]) for row, of in zip(logits, labels, strict=True)]
    assert summed_loss(logits, labels).item() == pytest.approx(sum(each).item(), rel=1e-6)
    (run, prepared), (parts, _) = (
        new_run(lab, SHARE, "encoder.dropout=0", *more) for more in ((), ("train.accumulate=4",))
    )
    whole, split = Trainer(run, prepared, CPU), Trainer(parts, prepared, CPU)
    for step in range(3):
        assert whole.step(step)[0].item() == pytest.approx(split.step(step)[0].item(), abs=1e-5)


def test_no_label_and_no_example_of_another_split_is_read_before_the_turn(lab):
    run, prepared = new_run(lab, SHARE)
    train = prepared.splits["train"]
    others = {name: None for name in ("val", "test")} | {"train": replace(train, labels=1 - train.labels)}
    blind = replace(prepared, splits=others)
    losses = [[t.step(step)[0].item() for step in range(6)] for t in (Trainer(run, p, CPU) for p in (prepared, blind))]
    assert losses[0][:5] == losses[1][:5] and losses[0][5] != losses[1][5]


def test_the_head_is_new_at_the_turn_and_the_optimizer_and_the_schedule_begin_anew(lab):
    run, prepared = new_run(lab, SHARE)
    trainer = Trainer(run, prepared, CPU)
    head = {name: t.clone() for name, t in trainer.model.head.state_dict().items()}
    for step in range(5):
        trainer.step(step)
    assert all(t.equal(head[name]) for name, t in trainer.model.head.state_dict().items())
    for step in range(5, 12):
        trainer.step(step)
    moments = checkpoint.optimizer_tensors(trainer.optimizer)
    assert {t.item() for name, t in moments.items() if name.endswith(".step")} == {7}
    o = run.recipe.train
    rates = [learning_rate(step, o, 5) / o.lr for step in range(12)]
    assert rates[:3] == rates[5:8] == pytest.approx([1 / 3, 2 / 3, 1]) and rates[4] < 1
    assert rates[5:] == [learning_rate(step, replace(o, steps=7)) / o.lr for step in range(7)]


def test_reconstruction_learns_what_neighbours_tell(lab):
    """Sequences that repeat one symbol: its loss falls far below that of a guess."""
    run, prepared = new_run(lab, "pretrain.share=0.9", "train.steps=100", "encoder.dropout=0")
    rows = [np.full(11, 1 + i % 4) for i in range(61)]
    trainer = Trainer(run, replace(prepared, splits={"train": Split.of(rows, [0] * 61)}), CPU)
    losses = [trainer.step(step)[0].item() for step in range(90)]
    assert losses[0] > 1 and np.mean(losses[-5:]) < 0.2


@pytest.mark.parametrize("attention", ["performer", "linformer", "constant", "darkformer"])
def test_a_pretrained_run_is_recorded_as_open_and_reaches_every_level(lab, attention):
    record = lab.train("--set", SHARE, attention=attention)
    assert record["task"]["protocol"] == "open" and record["training"]["overrides"] == {"pretrain.share": "0.4"}
    assert [(step, split, n) for step, split, _, _, n in record["result"]["curve"]] == [
        (8, "train", 24), (8, "val", 13), (12, "train", 32), (12, "val", 13),
    ]  # fmt: skip
    assert [step for step, _ in record["training"]["pretrain"]] == [4, 5]
    assert record["training"]["examples_seen"] == 96 and "--set pretrain.share=0.4" in record["command"]
    (path,) = lab.records()
    found = verify(path, 3, Places(lab.results, lab.data, lab.runs))
    assert found.levels == (0, 1, 2, 3), found.reason


def test_without_a_share_nothing_changes_and_with_one_it_is_another_cell(lab):
    plain, zero, some = (new_run(lab, *sets)[0] for sets in ((), ("pretrain.share=0",), (SHARE,)))
    assert plain.digest == zero.digest != some.digest and zero.overrides == {} and plain.turn == 0
    assert "pretrain" not in lab.train()["training"]


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_stopped_before_at_or_after_the_turn_goes_on_to_the_same_bits(lab, other, at_step, step):
    def outcome(place):
        (path,) = place.records()
        return timeless(record := read_record(path)), read_predictions(path, record)

    other.train("--set", SHARE, attention="performer")
    at_step(step, lambda trainer: signal.raise_signal(signal.SIGTERM))
    assert lab.try_train("--set", SHARE, attention="performer") == 85
    lab.train("--set", SHARE, attention="performer")
    assert outcome(lab) == outcome(other)


def test_a_loss_that_is_no_number_before_the_turn_is_a_failed_run_that_is_consistent(lab):
    record = lab.train("--set", SHARE, "--set", "train.lr=1e30")
    assert record["status"].startswith("failed") and record["failure"]["curve"] == []
    (path,) = lab.records()
    assert verify(path, 2, Places(lab.results, lab.data, lab.runs)).levels == (0, 1, 2)


@pytest.mark.parametrize(
    "share, told",
    [
        ("1", "pretrain.share must be at least 0 and below 1; got 1.0"),
        ("-0.1", "got -0.1"),
        ("nan", "pretrain.share must be float; got 'nan'"),
        ("0.01", "pretrain.share 0.01 makes 0 of 12 steps pretraining"),
        ("0.99", "makes 12 of 12 steps pretraining: both it and the labels need one or more"),
    ],
)
def test_a_share_that_leaves_no_step_of_either_kind_is_one_line(lab, error_line, share, told):
    assert told in error_line(*lab.words("--set", f"pretrain.share={share}"))


def test_an_option_without_its_group_is_shown_where_it_belongs(lab, error_line):
    assert "did you mean pretrain.share=0.4?" in error_line(*lab.words("--set", "share=0.4"))


def test_flops_of_a_step_are_counted_with_the_logits_of_what_is_asked_and_without_the_head(lab):
    run, prepared = new_run(lab, SHARE)
    flops, (B, N, K, E, F, V, C) = COLUMNS.index("flops"), (8, 41, 7, 12, 14, 5, 2)
    asked, labels = (count(run, batch=B, width=N, padded=True, asked=k).counts[flops] for k in (K, 0))
    assert asked - labels == 3 * 2 * B * (K * E * V - (E * F + F * C))
    plain, share = (predict(new_run(lab, *sets)[0], MACHINE, prepared) for sets in ((), (SHARE,)))
    assert plain.seconds != share.seconds and share.seconds == pytest.approx(plain.seconds, rel=0.2)


def test_shares_of_masked_tokens_are_named_for_every_kind_of_task():
    from typing import get_args, get_type_hints

    from tasks.base import Meta

    assert set(MASKED) == set(get_args(get_type_hints(Meta)["reads"])) and Batch.asked_BTK is None
