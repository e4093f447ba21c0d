"""Decoding from a cache: as without one, in constant space, for every kind of cache, or refused in one line."""

import copy

import pytest
import torch
import transformers
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS

from lra.registry import attention_class, attention_names
from models.gemma import bridge
from models.gemma.cache import KernelState
from tests.models.gemma.builders import gemma, plug, prompt

CAUSAL = [n for n in attention_names() if attention_class(n).causal]
STEPPING = [n for n in CAUSAL if attention_class(n).recurrent]
ALIGNED = dict(num_features=5, align="balance", init="aligned", target_norm=4.0)
PLUGS = [
    *(("gemma3", "all", name, {}) for name in (*STEPPING, "softmax")),
    ("gemma3", "0", "performer", dict(num_features=5, window=3, sinks=2)),
    ("gemma3", "full", "darkformer", dict(window=2, sinks=1) | ALIGNED),
    ("gemma3", "all", "darkformer", dict(window=3, sinks=2) | ALIGNED),
    ("gemma3", "1,2", "local", dict(window=3, sinks=2)),
    ("gemma2", "0,2", "local", dict(window=2, sinks=1, shape="blocks")),
    ("gemma1", "0,2", "performer", dict(num_features=5, window=2)),
]


def plugged(kind, layers, name, options):
    """In float64, calibrated."""
    model = gemma(kind).double()
    plug(model, name, layers, ignore_softcap=True, **options)
    bridge.calibrate(model, prompt()[0])
    return model


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("kind, layers, name, options", PLUGS)
@torch.no_grad()
def test_a_cache_changes_nothing_by_tokens_by_several_or_with_padding(kind, layers, name, options):
    """A parallel prefix, three tokens at once, then one by one; beyond the window of the model, and several blocks."""
    model, (ids, mask) = plugged(kind, layers, name, options), prompt(23)
    for given in (None, mask):
        real = slice(None) if given is None else given.bool()
        whole = {} if given is None else {"attention_mask": given, "position_ids": positions(given)}
        expected = model(ids, use_cache=False, **whole).logits
        cache, outs, sizes = transformers.DynamicCache(config=model.config), [], set()
        for start, end in ((0, 9), (9, 12), *((i, i + 1) for i in range(12, 23))):
            here = {n: x[:, :end] if n == "attention_mask" else x[:, start:end] for n, x in whole.items()}
            outs.append(model(ids[:, start:end], past_key_values=cache, **here).logits)
            states = [layer.state for layer in cache.layers if type(layer) is KernelState]
            sizes.add(sum(x.numel() for x in tree_leaves(states) if isinstance(x, torch.Tensor)))
        torch.testing.assert_close(torch.cat(outs, 1)[real], expected[real], rtol=1e-8, atol=1e-8)
        assert len(states) == (0 if name == "softmax" else len(bridge.sockets(model))) and len(sizes) == 1
        assert cache.get_seq_length() == 23


@pytest.mark.parametrize("kind, layers, name, options", PLUGS)
def test_generate_with_a_cache_is_generate_without_one_greedy_and_by_beams(kind, layers, name, options):
    model, (ids, mask) = plugged(kind, layers, name, options), prompt()
    for beams in (1, 3):
        how = dict(attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False, num_beams=beams)
        assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))


@torch.no_grad()
def test_rows_of_a_cache_repeat_are_selected_and_copied_and_a_reset_one_is_new():
    model, (ids, _) = plugged("gemma3", "0,1", "performer", dict(num_features=5, window=2, sinks=1)), prompt()
    expected = model(ids, use_cache=False).logits[:, -1]
    common = model(ids[:1, :-2], use_cache=True).past_key_values
    for rows in (1, 3):
        cache = copy.deepcopy(common)
        cache.batch_repeat_interleave(rows)
        for i in (-2, -1):
            out = model(ids[:1, i, None].expand(rows, 1), past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(out, expected[:1].expand(rows, -1))
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(model(ids[[2, 0], -1:], past_key_values=cache).logits[:, -1], expected[[2, 0]])
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits[:, -1], expected)


@torch.no_grad()
def test_layers_without_a_kernel_keep_their_windows_beside_states_and_every_key_where_one_sees_beyond():
    ids, _ = prompt()
    for name, kinds in (("performer", {KernelState, DynamicSlidingWindowLayer}), ("softmax", {DynamicLayer})):
        model = gemma("gemma3")
        plug(model, name, "0,1", ignore_window=True)
        assert {type(layer) for layer in model(ids).past_key_values.layers} == kinds


@torch.no_grad()
def test_a_state_takes_no_token_back_and_serves_its_own_kernel_alone():
    ids, _ = prompt()
    model = gemma("gemma3")
    filled = model(ids, use_cache=True).past_key_values
    plug(model, "performer", "1", num_features=5)
    with pytest.raises(ValueError, match="what another attention left"):
        model(ids[:, -1:], past_key_values=filled)
    with pytest.raises(ValueError, match="state of performer cannot take tokens back"):
        model.generate(ids[:1, :5].repeat(1, 3), prompt_lookup_num_tokens=3, max_new_tokens=9)
    cache = model(ids).past_key_values
    cache.layers[1].crop(0)
    with pytest.raises(ValueError, match="cannot take tokens back: no assisted decoding"):
        cache.layers[1].crop(-1)
    with bridge.exact_attention(model), pytest.raises(ValueError, match="what another attention left"):
        model(ids[:, -1:], past_key_values=cache)
    plug(model, "performer", "1", num_features=5)
    with pytest.raises(ValueError, match="what another attention left"):
        model(ids[:, -1:], past_key_values=cache)
    bridge.detach(model)
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        with pytest.raises(ValueError, match="a kernel that is no longer there: start with an empty one"):
            model(ids[:, -1:], past_key_values=cache)


@pytest.mark.parametrize("name", sorted({*CAUSAL} - {*STEPPING, "softmax"}))
def test_what_needs_earlier_queries_refuses_to_decode_from_a_cache(name):
    ids, mask = prompt()
    model = gemma("gemma3")
    plug(model, name)
    options = dict(attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, **options)
    assert model.generate(ids, use_cache=False, **options).shape == (3, 20)


@pytest.mark.parametrize("name", ["softmax", "performer", "local"])
def test_every_kind_of_cache_that_transformers_offers_is_right_or_refused(name):
    ids, mask = prompt()
    options = dict(attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    model = gemma("gemma3")
    plug(model, name, ignore_window=True)
    expected, outcomes = model.generate(ids, use_cache=False, **options), {}
    for kind in ALL_CACHE_IMPLEMENTATIONS:
        try:
            outcomes[kind] = torch.equal(model.generate(ids, cache_implementation=kind, **options), expected)
        except (ValueError, AssertionError, ImportError) as error:  # AssertionError: offloading wants CUDA
            outcomes[kind] = str(error)
    assert outcomes["dynamic"] is True and False not in outcomes.values()
    assert all("use_cache=False; got Static" in outcomes[kind] for kind in ("static", "offloaded_static"))


@torch.no_grad()
def test_a_cache_given_by_hand_is_right_or_refused():
    ids, _ = prompt()
    model = gemma("gemma3")
    filled = model(ids, use_cache=True).past_key_values
    plug(model, ignore_window=True)
    with pytest.raises(ValueError, match="dropped keys"):
        model(ids[:, -1:], past_key_values=filled)
    plug(model, "performer")
    expected = model(ids, use_cache=False).logits[:, -1]
    for cache in (None, transformers.DynamicCache(), transformers.DynamicCache(config=model.config)):
        cache = model(ids[:, :-3], past_key_values=cache, use_cache=True).past_key_values
        found = model(ids[:, -3:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    offloaded, quantized = transformers.DynamicCache(), transformers.DynamicCache()
    offloaded.offloading, quantized.layers = True, [type("Quantized", (DynamicLayer,), {})()]
    wrong = {"got one that is offloaded": offloaded, "got Quantized": quantized}
    for message, cache in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(ids[:, -1:], past_key_values=cache)
