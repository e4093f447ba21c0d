"""The smallest model of the Gemma track: Gemma 3 with 0.6M parameters over bytes, pretrained here in a minute."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lra.gemma.data import documents, pack, split
from lra.training.trainer import learning_rate
from tasks.base import Optim

PAD, EOS, BOS, FIRST = 0, 1, 2, 3  # ids; byte b is FIRST + b


@dataclass(frozen=True)
class TinyRecipe:
    """How it is made; a change makes another model, kept beside the old one."""

    width: int = 96
    ffn: int = 256
    layers: int = 6
    heads: int = 4
    head_dim: int = 24
    window: int = 32  # on five layers of six, as in Gemma 3 270M
    max_len: int = 1024
    length: int = 128
    batch: int = 8
    steps: int = 300
    lr: float = 4e-3
    seed: int = 0


RECIPE = TinyRecipe()


def encode(texts: list[str]) -> list[list[int]]:
    """UTF-8 bytes as ids."""
    return [[FIRST + b for b in t.encode()] for t in texts]


def folder(data: Path) -> Path:
    """Where the model is kept: another recipe is another model."""
    digest = hashlib.sha256(json.dumps(asdict(RECIPE), sort_keys=True).encode()).hexdigest()
    return data / "gemma" / f"tiny-{digest[:8]}"


def config(recipe: TinyRecipe):
    """The configuration of transformers."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=FIRST + 256,
        hidden_size=recipe.width,
        intermediate_size=recipe.ffn,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=1,
        head_dim=recipe.head_dim,
        query_pre_attn_scalar=recipe.head_dim,
        sliding_window=recipe.window,
        layer_types=["sliding_attention"] * (recipe.layers - 1) + ["full_attention"],
        max_position_embeddings=recipe.max_len,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )


def pretrain(recipe: TinyRecipe) -> torch.nn.Module:
    """Next-byte prediction on the end of the training documents, which finetuning reads from the start."""
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(recipe.seed)
    model = Gemma3ForCausalLM(config(recipe))
    texts = split(documents(None).texts)["train"][::-1]
    count = recipe.steps * recipe.batch
    blocks = pack(texts, encode, bos=BOS, length=recipe.length, blocks=count, what="pretraining")
    order = np.random.default_rng(recipe.seed).permutation(count)
    optim = Optim(steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, warmup=min(40, recipe.steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(recipe.steps), desc="pretraining tiny", unit="step", disable=None):
        rows = np.sort(order[step * recipe.batch : (step + 1) * recipe.batch])
        tokens_BN = torch.from_numpy(blocks.tokens[rows]).long()
        logits = model(input_ids=tokens_BN[:, :-1], use_cache=False).logits
        targets_BN = tokens_BN[:, 1:].masked_fill(tokens_BN[:, 1:] == BOS, -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BN.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim)
        optimizer.step()
    return model
