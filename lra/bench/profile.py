"""Where the time of a training step goes, by kinds of operations."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile

KINDS = {  # kind to what the names of its operations contain; the first kind that fits counts
    "fused softmax attention": ("scaled_dot_product",),
    "matrix products": ("_linear_pointwise", "::mm", "::addmm", "::bmm", "::baddbmm", "convolution", "fft"),
    "random numbers": ("bernoulli", "rand", "normal_", "uniform_"),
    "norms and activations": ("layer_norm", "gelu", "elu"),
    "exponentials and sums": ("softmax", "exp", "sum", "amax", "norm", "cumsum"),
    "optimizer": ("adamw", "Optimizer"),
}
REST = "elementwise, copies, gathers"
CALLS = "calls from Python"  # what is not an operation of a tensor library


def profiled(step: Callable[[], None]) -> dict[str, float]:
    """Kind to its share of a step's time on the CPU (summing to 1), after one that is not counted; every operation's
    own time counts once."""
    step()
    with _silence(), profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        step()
    spent: dict[str, float] = defaultdict(float)
    for event in found.key_averages():
        spent[kind(event.key)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {name: spent[name] / whole for name in (*KINDS, REST, CALLS)}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing reaches stderr: the profiler writes lines for its developers there, whatever its log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def kind(operation: str) -> str:
    """The kind of an operation by its name in the profiler, such as aten::mm."""
    if "::" not in operation or operation.startswith("autograd::"):
        return "optimizer" if "Optimizer" in operation else CALLS
    for name, parts in KINDS.items():
        if any(part in operation for part in parts):
            return name
    return REST
