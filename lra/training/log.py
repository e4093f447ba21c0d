"""What a run writes and shows while it runs: a JSONL file, TensorBoard events, a bar or lines on the terminal.

Every attention has the same tags.

The JSONL file is what is kept; events are made from it again whenever a run is resumed, so that they hold every
point once, in order, however often the process died and wherever its clock jumped.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from lra.options import UsageError
from tasks.store.files import atomic_path, one_line

LOG = "log.jsonl"
INTERVAL = 10.0  # seconds between two lines of a run without a terminal
CHARTS = {
    "learning": {"validation accuracy": "val/acc", "validation loss": "val/loss", "training loss": "train/loss"}
    | {"gradient norm": "opt/grad_norm"},
    "attention": {"error against exact softmax": "attn/approx_err", "effective rank": "attn/eff_rank"}
    | {"redraws": "attn/redraws"},
    "cost": {"steps per second": "perf/steps_per_s", "peak memory, MB": "perf/peak_mem_mb"},
}
# One tag a chart, so that each line is a run: TensorBoard lays the attentions over one another.
LAYOUT = {part: {title: ["Multiline", [tag]] for title, tag in tags.items()} for part, tags in CHARTS.items()}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; without its last one where a killed run ended in its middle. Empty when absent."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class RunLog:
    """Scalars of one run, in `folder`. A run that starts at `step` drops what an earlier process wrote after it. A
    context manager: however the run ends, what it wrote reaches the disk."""

    def __init__(self, folder: Path, hparams: dict[str, Any], step: int):
        self.hparams, self.folder, self.step = hparams, folder, step
        self.path = folder / LOG

    def __enter__(self) -> RunLog:
        try:
            kept = [line for line in read_log(self.path) if line["step"] <= self.step]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{self.path} is damaged ({one_line(error)}): remove it") from None
        with atomic_path(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.file: TextIO = open(self.path, "a", buffering=1, encoding="utf-8")
        self._hook, threading.excepthook = threading.excepthook, self._quiet
        self.writer = SummaryWriter(str(self.folder))
        self.writer.add_custom_scalars(LAYOUT)
        for line in kept:
            self._events(**line)
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.writer.close()
            self.file.close()
        except OSError:
            if kind is None:  # else what ended the run is the error to report
                raise
        finally:
            threading.excepthook = self._hook

    def _quiet(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread; an error there is raised again here by the next flush."""
        if not isinstance(failure.exc_value, OSError):
            self._hook(failure)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values under their tags at `step`."""
        self._events(step, **values)
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def _events(self, step: int, **values: float) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def flush(self) -> None:
        """Bring everything to the disk, before a checkpoint says that it is there."""
        self.writer.flush()
        os.fsync(self.file.fileno())

    def finish(self, record: dict[str, Any]) -> None:
        """Write the run's hyper-parameters and final metrics, the same keys in every run of a task."""
        result = record["result"] or {"n_correct": 0, "n_test": 1, "val_n_correct": 0, "n_val": 1}
        accuracy, val_acc = result["n_correct"] / result["n_test"], result["val_n_correct"] / result["n_val"]
        hparams = {"accuracy": accuracy} | self.hparams  # shown by name: accuracy comes first
        self.writer.add_hparams(hparams, {"hparam/test_acc": accuracy, "hparam/val_acc": val_acc}, run_name=".")
        self.flush()


class Display:
    """What a run shows while it trains: a bar on a terminal; elsewhere a line at a validation, at most one in 10 s."""

    def __init__(self, title: str, step: int, steps: int, *, shown: bool):
        self.bar = tqdm(total=steps, initial=step, desc=title, unit="step", disable=None if shown else True)
        self.shown, self.title, self.first, self.now, self.steps = shown, title, step, step, steps
        self.begun, self.printed = time.monotonic(), float("-inf")
        self.facts: dict[str, str] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def step(self) -> None:
        """One optimizer step is done."""
        self.now += 1
        self.bar.update()

    def trained(self, loss: float) -> None:
        """The training loss of the newest step that was read back."""
        self.facts["loss"] = f"{loss:.3f}"
        self.bar.set_postfix(self.facts, refresh=False)

    def validated(self, accuracy: float, best: float) -> None:
        """The validation accuracy of this step, and of the step selected so far."""
        self.facts |= {"val_acc": f"{accuracy:.3f}", "best": f"{best:.3f}"}
        self.bar.set_postfix(self.facts)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.printed >= INTERVAL:
            self.printed = now
            left = (self.steps - self.now) * (now - self.begun) / max(1, self.now - self.first) / 60
            facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
            print(f"{self.title}: step {self.now} of {self.steps}, {facts}, {left:.1f} min left", flush=True)
