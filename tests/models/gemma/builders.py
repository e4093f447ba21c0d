"""Tiny random Gemma models, kernels on them, and a prompt."""

import torch
import transformers

from lra.registry import build_attention
from models.gemma import bridge

WINDOW = 7
SHAPE = dict(
    vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)  # fmt: skip
WINDOWS = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"])


def gemma(kind, **changes):
    """A random model whose logits depend strongly on what its attention does."""
    config, model = {
        "gemma1": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
        "gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
    }[kind]
    torch.manual_seed(5)
    cap = {"attn_logit_softcapping": 0.1} if kind == "gemma2" else {}
    shape = SHAPE | ({} if kind == "gemma1" else WINDOWS | {"query_pre_attn_scalar": 16}) | cap | changes
    made = model(config(**shape, attn_implementation="eager")).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.o_proj.weight.mul_(20)
    return made


def plug(model, name="softmax", layers="all", ignore_window=None, ignore_softcap=False, **config):
    def build(**shape):
        return build_attention(name, seed=3, **shape, **config)

    chosen = bridge.select_layers(model, layers)
    return bridge.attach(model, build, chosen, ignore_window=ignore_window, ignore_softcap=ignore_softcap)


def prompt(length=17):
    """Tokens and a left-padded mask."""
    ids = torch.randint(3, 53, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, :11] = 0
    return ids.masked_fill(mask == 0, 0), mask
