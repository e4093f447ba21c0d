"""One run on several processes (`torchrun -m lra train`): who this process is, and what all of them agree on.

Each process holds the whole model and takes its share of every batch; gradients are averaged. With one process
every method here does nothing, so that the code which uses them has one path.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lra.options import UsageError
from tasks.base import Batch

MEET = 10  # steps between two looks of all ranks at whether one was asked to stop


@dataclass(frozen=True)
class World:
    """The processes of a run; this is number `rank` of `size`. Rank 0 alone writes and prints."""

    rank: int = 0
    size: int = 1

    def main_only(self, call: Callable, *args: Any, **options: Any) -> Any:
        """`call(*args)` on rank 0; elsewhere something that can be entered, called upon and does nothing."""
        return call(*args, **options) if self.rank == 0 else _Silent()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over ranks. All ranks make the same weights and projections and nothing
        is exchanged but what `agree` does, so that `check_equal` has something to find."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, init_sync=False, forward_sync_buffers=False)

    def differ(self, seed: int) -> None:
        """Other dropout on each rank, after models were initialised alike; rank 0 goes on as it would alone."""
        if self.rank:
            torch.manual_seed(seed + (self.rank << 32))

    def share(self, batch: Batch) -> Batch:
        """This rank's examples of a batch that all ranks made: every size-th, padded like all of it."""
        mine = slice(self.rank, None, self.size)
        mask = None if batch.mask_BTN is None else batch.mask_BTN[mine]
        return Batch(batch.tokens_BTN[mine], mask, batch.labels_B[mine])

    def take(self, items: Iterable) -> Iterator:
        """This rank's items of a sequence that all ranks go through."""
        return islice(items, self.rank, None, self.size)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def stopping(self, requested: bool, step: int) -> bool:
        """Whether all stop after this step: a signal may reach one rank a step before the others."""
        if self.size > 1 and step % MEET:
            return False
        return any(self.gather(requested))

    def agree(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def check_equal(self, what: str, checksum: Callable[[], str]) -> None:
        """Raise RuntimeError unless the checksum is the same on all ranks."""
        if self.size > 1 and len(set(self.gather(checksum()))) > 1:
            raise RuntimeError(f"{what} differ between ranks: the run is not what one process would do")


ALONE = World()


def not_yet(model: nn.Module, last: bool) -> AbstractContextManager:
    """The context of a micro-batch: gradients are exchanged only with the last one of a step."""
    together = isinstance(model, DistributedDataParallel) and not last
    return model.no_sync() if together else nullcontext()


def processes() -> int:
    """How many torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def join(device: torch.device, batch: int, accumulate: int) -> Iterator[tuple[World, torch.device]]:
    """The world that torchrun started this process in, and its device; alone, without torchrun.

    Raises UsageError when a batch does not split into equal parts.
    """
    if (size := processes()) == 1:
        yield ALONE, device
        return
    if batch % (size * accumulate):
        raise UsageError(
            f"train.batch {batch} does not split over {size} processes x train.accumulate {accumulate}: "
            f"give --set train.batch={-(-batch // (size * accumulate)) * size * accumulate}"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Its functions have the group for a default argument: imported once there is one, as by DistributedDataParallel,
    # they would keep the group's threads alive until the process exits, and one was once aborted there.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size), device
        dist.barrier()  # rank 0 still evaluates and writes when the others are done
    finally:
        dist.destroy_process_group()


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def __getattr__(self, name: str) -> Callable:
        return lambda *_, **__: None
