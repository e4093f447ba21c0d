"""Every command of the command line: its code, its help, its options."""

from __future__ import annotations

from pathlib import Path

import lra.bench.options
import lra.gemma.options
import lra.variance.options
from lra.options import at_least, size

PRESETS_HELP = (
    "smoke (minutes on a CPU, whole grid), small (real learning on a CPU), paper (LRA's lengths, GPU), "
    "paper-large (its encoders of 3 to 6 layers, too); pathfinder also has path-x (128 px, GPU)"
)


def list_options(add) -> None:
    """Of `list`."""
    add("what", choices=("tasks", "attentions", "presets"))
    add("--json", action="store_true", help="as JSON")


def task_options(add) -> None:
    """One task."""
    add("task", help="a name of `list tasks`")


def preset_options(add) -> None:
    """One preset."""
    add("--preset", default="small", help=PRESETS_HELP)


def source_options(add) -> None:
    """Where raw data comes from."""
    add("--source", help="embedded, hub or local (default: local with --data-dir, else the preset's)")
    add("--data-dir", type=Path, help="folder with raw data, or a tar archive of it (.tar, .gz, .bz2, .xz)")


def prepare_options(add) -> None:
    """Of `prepare`."""
    add("--out", type=Path, default=Path("data"), help="folder of prepared data")
    add("--workers", type=at_least(0), default=0, help="threads of generators and readers; 0 = all cores")
    verify = "hash every byte of data that are there, not only those of another size or time"
    add("--verify", action="store_true", help=verify)
    add(
        "--export", type=Path, metavar="FOLDER", help="write the data there, too, as published (listops: TSV)"
    )


def inspect_options(add) -> None:
    """Of `inspect`."""
    add("--data", type=Path, default=Path("data"), help="folder of prepared data")
    add(
        "--out",
        type=Path,
        help="folder to write facts (JSON), lengths (SVG, PNG) and a contact sheet (PNG) to",
    )


def cell_options(add) -> None:
    """One cell of a task."""
    add("--attention", required=True, help="a name of `list attentions`, or package.module:Class")
    add("--seed", type=at_least(0), default=0, help="of initialisation, batches, dropout and projections")


def grid_options(add) -> None:
    """Many cells."""
    add("--tasks", default="all", help="comma-separated names")
    add("--attentions", default="all", help="comma-separated names")
    add("--seeds", type=at_least(1), default=1, help="seeds 0..N-1 of each cell")
    jobs = "runs at a time, sharing the threads; 0 = one per CPU core, 1 on a GPU"
    add("--jobs", type=at_least(0), default=0, help=jobs)
    memory = "bytes all runs together may hold, such as 6G (default: what is free); a run waits until it fits"
    add("--memory", type=size, help=memory)


def executor_options(add) -> None:
    """Where the cells of a sweep run."""
    how = "here: processes of this command; slurm: an array of jobs; local, debug: the same machinery without Slurm"
    add("--executor", choices=("here", "slurm", "local", "debug"), default="here", help=how)
    keys = "of every job, such as partition=gpu, account=me, gpus_per_node=1, mem=8G (may be repeated)"
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help=keys)
    minutes = "time limit of a job; one that reaches it saves its state and is queued again"
    add("--job-minutes", type=at_least(1), default=240, help=minutes)
    limit = (
        "minutes after which runs save their state and the sweep ends with 85 (default: none; executor here)"
    )
    add("--time-limit", type=at_least(1), help=limit)


def cost_options(add) -> None:
    """Of `cost`."""
    calibrate = (
        "measure this machine, one thread, about a minute: results/bench/cost.json; all else is ignored"
    )
    add("--calibrate", action="store_true", help=calibrate)
    add("--gpu", help="predict for GPUs from their data sheets, comma-separated: A100, H100, L4, RTX4090")
    add("--write", type=Path, help="a Markdown file; only what stands between its cost markers changes")


def training_options(add) -> None:
    """How a run differs from its preset, and how it is executed."""
    sets = "override: attention.*, encoder.* or train.* (may be repeated)"
    add("--set", action="append", default=[], metavar="GROUP.OPTION=VALUE", dest="sets", help=sets)
    add("--steps", type=int, help="optimizer steps; the same as --set train.steps=N (default: the preset's)")
    rule = "legacy: select on the test split, as some earlier suites did; named in the record"
    add("--val-rule", choices=("held-out", "legacy"), default="held-out", help=rule)
    precision = "bf16: autocast; auto: bf16 on cuda, else fp32"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    add("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler on a CPU)")
    add(
        "--debug",
        action="store_true",
        help="stop where an attention first gets or gives a value that is not finite",
    )
    add("--threads", type=at_least(0), default=0, help="CPU threads; 0 = PyTorch's choice")


def place_options(add) -> None:
    """Where things are kept, and the device."""
    add("--data", type=Path, default=Path("data"), help="folder of prepared data")
    add("--results", type=Path, default=Path("results"), help="folder of records")
    add("--runs", type=Path, default=Path("runs"), help="folder of TensorBoard logs, checkpoints, weights")
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def record_options(add) -> None:
    """One record."""
    add("record", type=Path, help="its JSON file")


def trust_options(add) -> None:
    """What a record may import."""
    trust = "import an attention package.module:Class that a record names: code of the record's author"
    add("--trust", action="store_true", help=trust)


def submit_options(add) -> None:
    """Of `leaderboard submit`."""
    add("files", type=Path, nargs="+", help="JSON files of records, their predictions beside them")
    add("--by", help="add them as counter-records of this name, to results/counter/BY/")


def verify_options(add) -> None:
    """Of `leaderboard verify`."""
    add("files", type=Path, nargs="*", help="JSON files of records (default: all of --results)")
    levels = (
        "0 form and identity, 1 agrees with itself, 2 first losses repeated (needs --data), "
        "3 saved weights evaluated (needs --data and --runs), 4 equivalent to somebody else's runs"
    )
    add("--level", type=int, choices=range(5), default=1, help=levels)


def reproduce_options(add) -> None:
    """Of `reproduce`."""
    add("--by", default="rerun", help="whose counter-record it becomes: results/counter/BY/")
    threads = "CPU threads, e.g. 1,2: one run each, compared; the first becomes the counter-record"
    add("--threads", metavar="N[,N...]", help=f"{threads} (default: the record's)")
    add("--data-dir", type=Path, help="folder with raw data, where the record's are local")


def table_options(add) -> None:
    """Of `table`."""
    add("--results", type=Path, default=Path("results"), help="folder of records")
    forms = "Markdown, LaTeX (a document with booktabs), HTML (a page), or CSV (one line per record)"
    add("--format", choices=("md", "tex", "html", "csv"), default="md", help=forms)
    add("--preset", action="append", help="only this preset (may be repeated; default all)")
    add(
        "--write",
        type=Path,
        help="a file; in a Markdown file only what stands between its results markers changes",
    )


def cards_options(add) -> None:
    """Of `cards`."""
    add("--results", type=Path, default=Path("results"), help="its data/ holds what `inspect --out` wrote")
    markers = "a file with markers, such as tasks/DATA.md: only what is between them changes"
    add("--write", type=Path, help=markers)


def results_options(add) -> None:
    """What reads records and writes below the same folder."""
    add("--results", type=Path, default=Path("results"), help="folder of records; figures go to its figures/")


def serve_options(add) -> None:
    """Of `leaderboard serve`."""
    add("--port", type=at_least(0), default=8000, help="on 127.0.0.1; 0 = any that is free")


def tensorboard_options(add) -> None:
    """Of `tensorboard`."""
    add("--runs", type=Path, default=Path("runs"), help="folder of TensorBoard logs")
    add("--task", help="only this task, so that its attentions overlay one another (default: all tasks)")
    add("--port", type=at_least(1), default=6006, help="on 127.0.0.1")
    add("--start", action="store_true", help="start TensorBoard, instead of only printing the command")


FAMILIES = {  # commands of two words
    "bench": "measure this machine, and write results/bench/ACTION.json and ACTION.md",
    "gemma": "exchange the attention of a pretrained Gemma, finetune it, and measure what comes back",
    "leaderboard": "take records in, verify them, make the page of all results",
}
COMMANDS = (  # name, function, help, groups of options
    ("list", "lra.records.show:list_names", "names of tasks, attentions or presets", list_options),
    ("prepare", "lra.training.commands:prepare", "build a task's data once, as memory-mapped arrays with a manifest",
     task_options, preset_options, source_options, prepare_options),
    ("inspect", "lra.figures.inspection:inspect", "look at prepared data: sizes, labels, lengths, floors, examples",
     task_options, preset_options, inspect_options),
    ("cards", "lra.figures.cards:cards",
     "the numbers of tasks/DATA.md, from what `inspect --out` wrote", cards_options),
    ("train", "lra.training.commands:train", "train one task with one attention and one seed, and write its record",
     task_options, cell_options, preset_options, training_options, place_options),
    ("sweep", "lra.scaling.sweep:sweep", "train every missing (task, attention, seed) of a grid",
     grid_options, executor_options, preset_options, source_options, training_options, place_options),
    ("cost", "lra.scaling.cost:cost", "predict seconds and memory of what `sweep` would run with the same options",
     grid_options, preset_options, cost_options, training_options, place_options),
    ("evaluate", "lra.training.commands:evaluate", "repeat the test evaluation of a record from its saved weights",
     record_options, trust_options, place_options),
    ("reproduce", "lra.leaderboard.reproduce:reproduce", "run a record again and compare; adds a counter-record",
     record_options, reproduce_options, trust_options, place_options),
    ("leaderboard submit", "lra.leaderboard.submit:submit", "verify records from elsewhere at V1 and add them",
     submit_options, trust_options, place_options),
    ("leaderboard verify", "lra.leaderboard.submit:verify_all", "check records, and keep how far each was verified",
     verify_options, trust_options, place_options),
    ("table", "lra.records.show:show_table", "make the results tables from the records alone", table_options),
    *lra.bench.options.commands(preset_options),
    ("variance", "lra.variance.commands:variance",
     "bias and variance of random features, measured beside closed forms",
     lra.variance.options.source_options, lra.variance.options.measure_options, trust_options),
    ("plot", "lra.figures.plots:plot",
     "draw the figures of the records and benchmarks, as SVG and PNG", results_options),
    ("leaderboard build", "lra.leaderboard.page:build",
     "make the page RESULTS/index.html, with its figures", results_options),
    ("leaderboard serve", "lra.leaderboard.page:serve", "show the results folder to a browser on this machine alone",
     results_options, serve_options),
    ("tensorboard", "lra.figures.tensorboard:tensorboard",
     "average the seeds of each cell, and show all learning curves",
     tensorboard_options),
    ("doctor", "lra.training.commands:doctor", "versions, device, compiler, reachable sources and disk space"),
    *lra.gemma.options.COMMANDS,
)  # fmt: skip
