"""One run on several processes (`torchrun -m lra train`): data parallel training.

Each process holds the whole model and takes its shard of every batch; gradients are averaged. A method that adapts to
data is fitted to the shard of rank 0, so the number of processes is part of the cell (`Execution`). With one process
the methods of World do nothing, so the code that calls them has one path.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lra.options import UsageError
from tasks.base import Batch

MEET = 10  # steps between two looks of all ranks at whether one was asked to stop
PATIENCE = timedelta(hours=6)  # of the ranks that wait for rank 0, which takes the probe on one CPU thread


@dataclass(frozen=True)
class World:
    """The processes of a run; this one is `rank` of `size`. Rank 0 alone writes and prints."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def data_parallel(self, model: nn.Module, unused: bool = False) -> nn.Module:
        """The model with gradients averaged over ranks. All ranks make the same weights and projections, and nothing
        is sent but by `broadcast_buffers`: so `check_equal` has something to find. `unused`: some steps leave
        parameters out."""
        apart = {"init_sync": False, "forward_sync_buffers": False, "find_unused_parameters": unused}
        return model if self.size == 1 else DistributedDataParallel(model, **apart)

    def reseed(self, seed: int) -> None:
        """Seed dropout differently on each rank, after models were initialised alike; rank 0 keeps its generator."""
        if self.rank:
            torch.manual_seed(seed + (self.rank << 32))

    def shard(self, batch: Batch) -> Batch:
        """This rank's examples of a batch that all ranks made: every size-th, padded to the batch's width."""
        return Batch(*(part if part is None else part[self.rank :: self.size] for part in vars(batch).values()))

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> list[Any]:
        """The value of every rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def any_stops(self, requested: bool, step: int) -> bool:
        """Whether all ranks stop after this step: a signal may reach one rank a step before the others."""
        return (self.size == 1 or step % MEET == 0) and any(self.all_gather(requested))

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)

    def check_equal(self, what: str, checksum: Callable[[], str]) -> None:
        """Raise RuntimeError unless the checksum is the same on all ranks."""
        if self.size > 1 and len(set(self.all_gather(checksum()))) > 1:
            raise RuntimeError(f"{what} differ between ranks: the run is not what one process would do")


ALONE = World()


def gradient_sync(model: nn.Module, last: bool) -> AbstractContextManager:
    """The context of a micro-batch: ranks average their gradients with the last one of a step only."""
    postponed = isinstance(model, DistributedDataParallel) and not last
    return model.no_sync() if postponed else nullcontext()


def world_size() -> int:
    """Processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group(device: torch.device, batch: int, accumulate: int) -> Iterator[tuple[World, torch.device]]:
    """The world that torchrun started this process in, and its device; alone, without torchrun. Raises UsageError when
    a batch does not split into equal parts."""
    if (size := world_size()) == 1:
        yield ALONE, device
        return
    if batch % (parts := size * accumulate):
        split = f"split over {size} processes x train.accumulate {accumulate}"
        raise UsageError(f"train.batch {batch} does not {split}: give --set train.batch={-(-batch // parts) * parts}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # The functions of this module have the group for a default argument. Imported after the group is made, as by
    # DistributedDataParallel, they keep the group's threads alive until the process exits, and may abort it there.
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield World(dist.get_rank(), size), device
        dist.barrier()  # rank 0 still evaluates and writes when the others are done
    finally:
        dist.destroy_process_group()
