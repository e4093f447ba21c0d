"""Options of `bench ...`; answers --help without torch."""

from __future__ import annotations

from lra.options import DATA, DEVICE, PRESET, RUNS, THREADS, Command, at_least, numbers, option, writable

REPORT = option("--results", "folder whose bench/ gets the report", writable, "results")
SIZE = option("--features", "features, landmarks, projected positions or window M", at_least(1), 256)
PRECISION = option("--precision", "bf16: autocast", ("fp32", "bf16"), "fp32")
NAMES = "comma-separated names, softmax among them"
PEERS = f"{NAMES}; pypi:PACKAGE: a public package; behind a name: M64, hybrid, plain, unfused (softmax)"
LAYOUTS = "32x128,32x256,32x1024"


def timing(rounds: int) -> tuple:
    """How steps are timed."""
    how = "interleaved rounds, after one that is not counted"
    return option("--rounds", how, at_least(1), rounds), THREADS, REPORT


ATTENTION = (
    option("--attentions", f"{PEERS}, causal, bf16 (default: all)"),
    option("--lengths", "tokens N, comma-separated", default="64,256,1024,4096"),
    option("--memory", "measure the peak of memory at 16,384 tokens, too", ("yes", "no"), "yes"),
    option("--batch", "sequences B", at_least(1), 2),
    option("--heads", "heads H", at_least(1), 4),
    option("--head-dim", "head width D", at_least(1), 64),
    SIZE,
)
ENCODER = (
    option("--attentions", f"{PEERS}, compiled (default: softmax, performers, constant)"),
    option("--layouts", "batch x tokens, comma-separated", default=LAYOUTS),
    PRECISION,
    SIZE,
)
DECODE = (
    option(
        "--model",
        "shape of the model; with its weights where --data has them",
        ("gemma-3-270m", "tiny"),
        "gemma-3-270m",
    ),
    option("--contexts", "tokens before the one that is timed", numbers(int, 1, True), "256,1024,4096,16384"),
    option("--window", "tokens of the window of each replaced layer", at_least(1), 64),
    option("--sinks", "first tokens that each of them sees", at_least(0), 1),
    option("--features", "random features M", at_least(1), 256),
    DATA,
)
TASKS = (
    PRESET,
    option("--tasks", "comma-separated names", default="all"),
    option("--attentions", f"{NAMES} (default: all)"),
    DATA,
    PRECISION,
    DEVICE,
)
REHEARSAL = option("--device", "cpu: rehearse at tiny sizes", ("cuda", "cpu"), "cuda")
GPU = REHEARSAL, option("--minutes", "after which no new row is begun", at_least(1), 10), DATA, RUNS, REPORT


def bench(action: str, options: tuple, help: str) -> tuple[str, Command]:
    """An action of `bench`: bench_ACTION in lra/bench/ACTION.py."""
    return f"bench {action}", Command(f"lra.bench.{action}:bench_{action}", options, help)


COMMANDS = dict(
    (
        bench("attention", (*ATTENTION, *timing(4)), "time and memory against length, beside packages"),
        bench("decode", (*DECODE, *timing(6)), "time of the next token and bytes of the cache against context"),
        bench("encoder", (*ENCODER, *timing(3)), "training step with each attention, beside packages"),
        bench("gpu", GPU, "check and measure this suite on an NVIDIA GPU, row by row"),
        bench("tasks", (*TASKS, *timing(20)), "training step of each attention on prepared data, for the tables"),
    )
)
