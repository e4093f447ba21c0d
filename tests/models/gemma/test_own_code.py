"""A changed model in a user's own code: attach, calibrate, generate, transformers' Trainer, save, load, detach."""

from functools import partial

import pytest
import torch
import transformers

from lra.registry import build_attention
from models.gemma import bridge, saved
from tests.models.gemma.builders import gemma, prompt

OPTIONS = dict(num_features=16, window=4, sinks=1, align="balance", init="aligned", target_norm=4.0, redraw_every=0)


@pytest.mark.parametrize("everything", [True, False])
def test_a_model_is_changed_trained_saved_loaded_and_exact_again(everything, tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate (requirements.txt)")
    gemma("gemma3").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    ids, _ = prompt(24)
    before = model(ids).logits
    bridge.attach(model, partial(build_attention, "darkformer", **OPTIONS), [0, 2])
    bridge.calibrate(model, ids)
    changed = model(ids).logits
    assert (changed - before).abs().max() > 1e-2 and model.generate(ids, max_new_tokens=5).shape[1] > 24
    if not everything:
        model.requires_grad_(False)
        for socket in bridge.sockets(model).values():
            socket.kernel.requires_grad_(True)
    geometry, embedding = model.model.layers[2].self_attn.socket.kernel.G_HDD, model.model.embed_tokens.weight
    first = geometry.detach().clone(), embedding.detach().clone()
    quiet = dict(report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no")
    options = dict(max_steps=3, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True, **quiet)
    arguments = transformers.TrainingArguments(tmp_path / "run", dataloader_pin_memory=False, **options)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    untrained = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < untrained
    moved = [not torch.equal(old, new) for old, new in zip(first, (geometry, embedding), strict=True)]
    assert moved == [True, everything]
    trainer.save_model(tmp_path / "changed")
    again, trained = saved.load(tmp_path / "changed"), model.eval()(ids).logits
    torch.testing.assert_close(again(ids).logits, trained, rtol=0, atol=1e-6)
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "changed").eval()
    bridge.detach(model)
    for exact in (plain, model):
        assert torch.equal(exact(ids).logits, before) != everything
    assert torch.equal(plain(ids).logits, model(ids).logits)
