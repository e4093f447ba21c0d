"""What a run writes while it runs: TensorBoard events and a JSONL file, with the same tags for every attention."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from lra.config import Run

LAYOUT = {  # one tag a chart, so that each line is a run: TensorBoard lays the attentions over one another
    "learning": {
        "validation accuracy": ["Multiline", ["val/acc"]],
        "validation loss": ["Multiline", ["val/loss"]],
        "training loss": ["Multiline", ["train/loss"]],
        "gradient norm": ["Multiline", ["opt/grad_norm"]],
    },
    "attention": {
        "error against exact softmax": ["Multiline", ["attn/approx_err"]],
        "effective rank": ["Multiline", ["attn/eff_rank"]],
        "redraws": ["Multiline", ["attn/redraws"]],
    },
    "cost": {
        "steps per second": ["Multiline", ["perf/steps_per_s"]],
        "peak memory, MB": ["Multiline", ["perf/peak_mem_mb"]],
    },
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl; without its last one where a killed run ended in its middle. Empty when absent."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class RunLog:
    """Scalars of one run, in `folder`. A run that starts at `step` drops what an earlier process wrote after it.

    A context manager: however the run ends, what it wrote reaches the disk.
    """

    def __init__(self, folder: Path, run: Run, step: int):
        self.run = run
        self.path = folder / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        self.file = open(self.path, "w", buffering=1)
        self.file.writelines(json.dumps(line) + "\n" for line in kept)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1)
        if not step:
            self.writer.add_custom_scalars(LAYOUT)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_) -> None:
        self.writer.close()
        self.file.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write values under their tags at `step`."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)
        self.file.write(json.dumps({"step": step, **values}) + "\n")

    def flush(self) -> None:
        """Bring everything to the disk, before a checkpoint says that it is there."""
        self.writer.flush()

    def finish(self, record: dict[str, Any]) -> None:
        """Write the run's hyper-parameters and final metrics, the same keys in every run."""
        run, result = self.run, record["result"] or {}
        recipe = run.recipe
        hparams = {
            "task": run.meta.name,
            "dataset": run.manifest["dataset"],
            "preset": run.preset,
            "attention": run.attention,
            "options": json.dumps(run.attention_config),
            "overrides": json.dumps(run.overrides),
            "seed": run.seed,
            "seq_len": recipe.data.seq_len,
            "layers": recipe.encoder.layers,
            "width": recipe.encoder.width,
            "heads": recipe.encoder.heads,
            "lr": recipe.train.lr,
            "batch": recipe.train.batch,
            "steps": recipe.train.steps,
        }
        metrics = {
            "hparam/test_acc": result["n_correct"] / result["n_test"] if result else 0.0,
            "hparam/val_acc": result["val_n_correct"] / result["n_val"] if result else 0.0,
        }
        self.writer.add_hparams(hparams, metrics, run_name=".")
