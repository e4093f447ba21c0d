"""`tensorboard`: the mean over the seeds of each cell as a run of its own, and the command that shows everything."""

import math
import os
import shlex
import shutil
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from lra.options import UsageError, unknown
from lra.training.log import LAYOUT, read_log


def tensorboard(args: Namespace) -> None:
    """`tensorboard`: refresh the means, name the tabs to open, print the command; with --start become TensorBoard.
    Raises UsageError when there are no runs, or none of the task."""
    logs = sorted(args.runs.glob("*/*/*/seed*/log.jsonl"))  # <task>/<attention>/<preset>/seed<k>
    tasks = sorted({log.parents[3].name for log in logs})
    if not tasks:
        raise UsageError(f"no runs under {args.runs}: python -m lra train makes one")
    if args.task and args.task not in tasks:
        raise unknown("task of the runs", args.task, tasks)
    cells = sorted({log.parents[1] for log in logs if args.task in (None, log.parents[3].name)})
    several = [cell for cell in cells if write_mean(cell)]
    print(f"mean over seeds: {len(several)} of {len(cells)} cells; the others have one seed")
    print("in TensorBoard, open the tab Custom Scalars for the curves and HPARAMS for a table of the runs")
    folder = args.runs / args.task if args.task else args.runs
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(args.port)]
    print(shlex.join(command), flush=True)
    if args.start:
        os.execv(command[0], command)


def write_mean(cell: Path) -> bool:
    """Write <cell>/mean: each tag's mean at the steps that every seed has reached. Returns whether there is one.
    A single seed has no mean, which would be the same curve twice. Raises UsageError for a log that is not one."""
    seeds = [_values(path) for path in cell.glob("seed*/log.jsonl")]
    if len(seeds) < 2:
        shutil.rmtree(cell / "mean", ignore_errors=True)
        return False
    with tempfile.TemporaryDirectory(prefix=".mean-", dir=cell) as folder:
        with SummaryWriter(f"{folder}/mean") as writer:
            writer.add_custom_scalars(LAYOUT)
            for step, tag in sorted(set.intersection(*map(set, seeds))):
                writer.add_scalar(tag, math.fsum(values[step, tag] for values in seeds) / len(seeds), step)
        shutil.rmtree(cell / "mean", ignore_errors=True)
        Path(folder, "mean").rename(cell / "mean")
    return True


def _values(path: Path) -> dict[tuple[int, str], float]:
    """{(step, tag): value} of one seed."""
    try:
        pairs = [(line["step"], tag, value) for line in read_log(path) for tag, value in line.items()]
        return {(step, tag): float(value) for step, tag, value in pairs if tag != "step"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is damaged: {error}; remove the folder of this run") from None
