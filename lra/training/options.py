"""Options of `prepare` and `train`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import DATA, PRESET, TASK, THREADS, WRITTEN, Command, at_least, option

SOURCE = (
    option("--source", "embedded, hub or local (default: local with --data-dir, else the preset's)"),
    option("--data-dir", "folder with raw data, or a tar archive of it (.tar, .gz, .bz2, .xz)", Path),
)
SETS = (
    "attention.*, encoder.* or train.*; pretrain.share=S: of the steps, the first S (0 to below 1; 0 if not given) "
    "reconstruct masked tokens of the training inputs without labels, and the rest learn the labels"
)
TRAINING = (
    option("--set", SETS, list, [], metavar="GROUP.OPTION=VALUE", dest="sets"),
    option("--steps", "optimizer steps; the same as --set train.steps=N (default: the preset's)", int),
    option("--val-rule", "legacy: select on the test split", ("held-out", "legacy"), "held-out"),
    option("--precision", "bf16: autocast; auto: bf16 on cuda, else fp32", ("auto", "fp32", "bf16"), "auto"),
    option("--compile", "torch.compile the model (needs a C++ compiler on a CPU)", bool),
    THREADS,
)

COMMANDS = {
    "prepare": Command(
        "lra.training.commands:prepare",
        (
            TASK,
            PRESET,
            *SOURCE,
            DATA,
            option("--workers", "threads of generators and readers; 0 = all cores", at_least(0), 0),
            option("--again", "prepare anew in any case; the folder that is there is kept beside", bool),
            option("--export", "write the data there as published, too (listops: TSV)", Path),
        ),
    ),
    "train": Command(
        "lra.training.commands:train",
        (
            TASK,
            option("--attention", "a name of `list attentions`, or package.module:Class", required=True),
            option("--seed", "of initialisation, batches, dropout and projections", at_least(0, 10**6), 0),
            PRESET,
            option("--again", "train anew what has a record; the old record is kept beside it", bool),
            *TRAINING,
            *WRITTEN,
        ),
    ),
}
