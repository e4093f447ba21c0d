"""The bridge into Gemma 1, 2 and 3, on tiny random configs: exact where it must be, causal everywhere."""

import itertools
from pathlib import Path

import pytest
import torch
import transformers

from lra.registry import attention_class, attention_names
from models.gemma import bridge, saved
from tests.models.gemma.builders import WINDOW, gemma, plug, prompt

CAUSAL = [n for n in attention_names() if attention_class(n).causal]


@pytest.mark.parametrize("kind", ["gemma1", "gemma2", "gemma3"])
@torch.no_grad()
def test_softmax_bridge_is_eager_gemma_with_left_padding_windows_and_soft_cap(kind, monkeypatch):
    model = gemma(kind)
    ids, mask = prompt()
    for given in (None, mask):
        model.set_attn_implementation("eager")
        expected = model(ids, attention_mask=given).logits
        real = mask.bool() if given is not None else torch.ones_like(mask).bool()
        for layers, chunk in itertools.product(("all", "full", "0,2"), (bridge.CHUNK, 5)):
            monkeypatch.setattr(bridge, "CHUNK", chunk)
            plug(model, layers=layers)
            found = model(ids, attention_mask=given).logits
            torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=0)
            bridge.detach(model)


@torch.no_grad()
def test_windows_heads_and_the_soft_cap_matter_in_this_test():
    model = gemma("gemma3")
    ids, _ = prompt()
    plug(model)
    kept = model(ids).logits
    bridge.detach(model)
    plug(model, ignore_window=True)
    assert (model(ids).logits - kept)[:, WINDOW:].abs().max() > 1e-2
    bridge.detach(model)
    plug(model, "constant")
    assert (model(ids).logits - kept).abs().max() > 1e-2
    capped, free = gemma("gemma2"), gemma("gemma2")
    plug(capped)
    plug(free, ignore_softcap=True)
    assert (capped(ids).logits - free(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gemma1", "gemma2", "gemma3"])
def test_generate_with_a_cache_is_eager_generate(kind):
    ids, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    model = gemma(kind)
    expected = model.generate(ids, **options)
    plug(model)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize(
    "kind, name",
    [("gemma3", n) for n in CAUSAL] + [(k, n) for k in ("gemma1", "gemma2") for n in ("softmax", "performer")],
)
@torch.no_grad()
def test_later_tokens_change_no_earlier_logit(kind, name):
    model = gemma(kind)
    plug(model, name, ignore_softcap=True)
    ids, _ = prompt()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 17) % 50 + 3
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :9], before[:, :9], atol=1e-5, rtol=0)
    assert (after[:, 9:] - before[:, 9:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in CAUSAL if n != "random"])  # its logits belong to places, not tokens
@torch.no_grad()
def test_left_padding_changes_no_logit_of_a_real_token(name):
    model = gemma("gemma1")
    plug(model, name)
    ids, mask = prompt()
    alone = model(ids[2:, 11:]).logits
    position = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=position).logits[2:, 11:]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=0)


def test_only_kernels_see_gradients_when_the_rest_is_frozen_and_taps_see_the_exact_model():
    model = gemma("gemma3")
    plug(model)
    ids, _ = prompt()
    seen = {}
    bridge.watch(model, ids, {1: lambda q, k, v, mask, scale: seen.update(q=q, k=k, scale=scale)})
    assert seen["q"].shape == seen["k"].shape == (3, 4, 17, 10) and seen["scale"] == 0.25
    assert all(not s.exact and s.tap is None for s in bridge.sockets(model).values())


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("gemma3", dict(layers="1,3"), "layer 3 does not exist: the model has layers 0 to 2"),
        ("gemma3", dict(layers="first"), "give all, full, or indices"),
        ("gemma3", dict(name="linformer"), "no causal form"),
        ("gemma2", dict(name="constant"), "--ignore-softcap"),
        ("gemma3", dict(name="performer", window=65), "window 65 exceeds the 64 positions of the model"),
        ("gemma3", dict(name="performer", window=4, sinks=5), "sinks must be at most the window, 4 tokens; got 5"),
    ],
)
def test_bad_input_is_one_line_with_the_way_out(kind, options, message):
    with pytest.raises(ValueError, match=message):
        plug(gemma(kind), **options)


@pytest.mark.parametrize("layers", ["all", "full"])
def test_a_saved_model_is_the_changed_one_or_the_exact_one_and_detach_gives_the_exact_one_back(layers, tmp_path):
    model = gemma("gemma3")
    ids, _ = prompt()
    model.save_pretrained(tmp_path)  # which sets dtype and architectures
    config, before = model.config.to_dict(), model(input_ids=ids).logits
    plug(model, "constant", layers)
    plug(model, "darkformer", layers, num_features=5, align="balance")
    bridge.calibrate(model, ids)
    after = model(input_ids=ids).logits
    (description,) = model.config.lra_attention
    assert description["attention"] == "darkformer" and description["options"]["num_features"] == 5
    assert model.config.to_dict() == config | {"lra_attention": [description]}
    model.save_pretrained(tmp_path)
    again = saved.load(tmp_path)
    torch.testing.assert_close(again(input_ids=ids).logits, after, rtol=0, atol=1e-6)
    assert torch.equal(again.generate(ids, max_new_tokens=5), model.generate(ids, max_new_tokens=5))
    exact = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for one in (exact, model, again):
        bridge.detach(one)
        assert torch.equal(one(input_ids=ids).logits, before) or one is again
        assert "lra_attention" not in one.config.to_dict()
    torch.testing.assert_close(again(input_ids=ids).logits, before, rtol=0, atol=1e-4)  # sdpa
    assert model.config.to_dict() == config


def test_a_folder_without_the_kernels_or_with_others_is_refused(tmp_path):
    model = gemma("gemma3")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no folder at"):
        saved.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="no lra_attention"):
        saved.load(tmp_path)
    plug(model, "performer", num_features=5)
    (group,) = model.config.lra_attention
    kernels = {n: t for n, t in model.state_dict().items() if ".socket." in n}
    assert kernels
    bridge.detach(model)
    for change, message in (
        ({}, r"socket\.kernel\.\w+ has no partner"),
        ({"attention": "os"}, "'os' is not in models/attention"),
        ({"options": {"size": 3}}, "cannot be attached: TypeError"),
        ({"layers": [7]}, "cannot be attached: IndexError"),
    ):
        model.config.lra_attention = [group | change]
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            saved.load(tmp_path)


def test_a_model_that_is_no_gemma_is_refused():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(TypeError, match=r"functools.partial\(lra.registry.build_attention, 'darkformer'\)"):
        bridge.attach(None, "darkformer", [1])
    with pytest.raises(ValueError, match="gpt2"):
        plug(transformers.GPT2LMHeadModel(config))


def test_a_kernel_asked_to_keep_a_window_shorter_than_the_text_says_so():
    model = gemma("gemma3")
    plug(model, "constant", ignore_window=False)
    ids, _ = prompt()
    model(ids[:, :WINDOW])
    with pytest.raises(ValueError, match=f"window of {WINDOW} over 17 tokens"):
        model(ids)


# Real weights, where they have been fetched

REAL = Path(__file__).parents[3] / "data" / "gemma" / "gemma-3-270m"


@pytest.mark.skipif(not REAL.is_dir(), reason="no weights here: python -m lra gemma weights fetches them")
@torch.no_grad()
def test_softmax_bridge_is_eager_gemma_on_real_weights_beyond_the_window_with_padding_and_cache():
    model = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    text = "The film begins in a small town by the sea, where nobody has seen a stranger for forty years. "
    ids = transformers.AutoTokenizer.from_pretrained(REAL)(text * 40)["input_ids"]
    length, padding = model.config.sliding_window + 41, 29
    ids = torch.tensor([model.config.bos_token_id, *ids])[:length]
    ids = torch.stack([ids, torch.cat([torch.zeros(padding, dtype=ids.dtype), ids[:-padding]])])
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    options = dict(attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    logits, tokens = [], []
    for plugged in (False, True):
        if plugged:
            plug(model)
        else:
            model.set_attn_implementation("eager")
        logits.append(model(ids, attention_mask=mask, logits_to_keep=64).logits)
        tokens.append(model.generate(ids, **options))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=0)
    assert torch.equal(tokens[1], tokens[0])
