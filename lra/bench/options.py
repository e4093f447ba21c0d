"""Options of `python -m lra bench ...`; answers --help without torch."""

from __future__ import annotations

from pathlib import Path

from lra.options import at_least


def report_options(add) -> None:
    """Where the report goes."""
    add("--results", type=Path, default=Path("results"), help="folder whose bench/ the report is written to")


def timing_options(rounds: int):
    """How steps are timed."""

    def options(add) -> None:
        how = "interleaved rounds, after one that is not counted"
        add("--rounds", type=at_least(1), default=rounds, help=how)
        add("--threads", type=at_least(0), default=0, help="CPU threads; 0 = PyTorch's choice")

    return options


def size_options(add) -> None:
    """The size of every approximation."""
    size = "features, landmarks, projected positions or window M"
    add("--features", type=at_least(1), default=256, help=size)


def attention_options(add) -> None:
    """Of `bench attention`."""
    names = "comma-separated: NAME or pypi:PACKAGE, and after a space causal or bf16 (default: all)"
    add("--attentions", help=names)
    add("--lengths", default="512,1024,2048,4096,8192,16384", help="tokens N, comma-separated")
    add("--batch", type=at_least(1), default=2, help="sequences B")
    add("--heads", type=at_least(1), default=4, help="heads H")
    add("--head-dim", type=at_least(1), default=64, help="head width D")


def encoder_options(add) -> None:
    """Of `bench encoder`."""
    names = "comma-separated: NAME or pypi:PACKAGE, and after a space compiled (default: linear ones and peers, eager)"
    add("--attentions", help=names)
    layouts = "32x128,32x1024,32x2048,32x3072,32x4096,4x4096"
    add("--layouts", default=layouts, help="batch x tokens, comma-separated")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")


def tasks_options(add) -> None:
    """Of `bench tasks`."""
    add("--tasks", default="all", help="comma-separated names")
    names = "comma-separated names, softmax among them (default: every one of `list attentions`)"
    add("--attentions", help=names)
    add("--data", type=Path, default=Path("data"), help="folder of prepared data")
    add("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    add("--device", default="auto", help="auto, cpu, cuda or mps")


def sweep_options(add) -> None:
    """Of `bench sweep`."""
    add("--tasks", default="all", help="comma-separated names")
    add(
        "--attentions",
        default="softmax,constant,performer,linformer,darkformer",
        help="comma-separated names",
    )
    add("--data", type=Path, default=Path("data"), help="folder of prepared data")
    add("--jobs", type=at_least(0), default=0, help="jobs and cores of the faster sweep; 0 = every core")
    add("--rounds", type=at_least(1), default=3, help="turns of each")


def data_options(add) -> None:
    """Of `bench data`."""
    add("--tasks", default="all", help="comma-separated names of tasks to load batches of")
    add("--data", type=Path, default=Path("data"), help="folder of prepared data")
    add("--threads", type=at_least(0), default=0, help="CPU threads of the model; 0 = PyTorch's choice")


def fidelity_options(add) -> None:
    """Of `bench fidelity`."""
    kept = "folder with listops_reference_1000.tsv.gz and pathfinder32_reference.npz"
    add("--reference", type=Path, required=True, help=f"samples of the published programs: a {kept}")


def commands(preset_options) -> tuple:
    """Name, function, help, groups of options."""
    return (
        ("bench data", "lra.bench.data:bench", "samples/s of the generators, tokens/s of batches, waiting for data",
         preset_options, data_options, report_options),
        ("bench attention", "lra.bench.attention:bench", "time and memory against length, beside packages",
         attention_options, size_options, timing_options(5), report_options),
        ("bench encoder", "lra.bench.encoder:bench", "training step with each attention, beside packages",
         encoder_options, size_options, timing_options(3), report_options),
        ("bench tasks", "lra.bench.tasks:bench", "training step of each attention on prepared data, for the tables",
         preset_options, tasks_options, timing_options(20), report_options),
        ("bench sweep", "lra.bench.sweep:bench", "a grid on several cores beside the same on one",
         preset_options, sweep_options, report_options),
        ("bench fidelity", "lra.bench.fidelity:bench", "are generated data distributed as the published programs'?",
         fidelity_options, report_options),
    )  # fmt: skip
