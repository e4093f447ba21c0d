"""`bench gpu`, rehearsed on a CPU."""

import json
import time

import pytest
import torch

from lra.__main__ import main
from lra.bench import base, gpu


@pytest.fixture
def small(monkeypatch):
    """Few rows and no commands."""
    monkeypatch.setattr(base, "LEAST", 1e-9)
    monkeypatch.setattr(gpu, "METHODS", "softmax,performer hybrid causal")
    monkeypatch.setattr(gpu, "TIMED", "softmax,performer bf16,linformer causal")
    monkeypatch.setattr(gpu, "STEPS", "softmax,performer M3")
    monkeypatch.setattr(gpu, "command", lambda words, until: {"command": words[0], "holds": "yes"})


def rehearse(tmp_path):
    """The exit code, and the tables of the report."""
    code = main(["bench", "gpu", "--device=cpu", f"--results={tmp_path}", f"--data={tmp_path}", f"--runs={tmp_path}"])
    return code, list(json.loads((tmp_path / "bench" / "gpu.json").read_text())["tables"].values())


def test_a_rehearsal_checks_and_measures_and_writes_each_row_at_once(tmp_path, small, monkeypatch, capsys):
    sizes, write = [], gpu.write

    def watched(args, tables, state):
        write(args, tables, state)
        text = (args.results / "bench" / "gpu.md").read_text()
        sizes.append(sum(map(len, json.loads((args.results / "bench" / "gpu.json").read_text())["tables"].values())))
        assert state in text and [*tables][-1] in text

    monkeypatch.setattr(gpu, "write", watched)
    code, (kernels, methods, attentions, steps, cell) = rehearse(tmp_path)
    assert code == 0 and sizes == [*range(1, sizes[-1] + 1), sizes[-1]]
    assert {row["what"].split(": ")[1] for row in kernels} == {"fused", "plain"} and len(kernels) == 12
    assert len(methods) == 6 and all(row["holds"] == "yes" for row in kernels + methods)
    rows = {(row["attention"], row["where"]): row for row in attentions}
    assert rows["softmax", "N 64"]["times softmax"] == "1.00 [1.00, 1.00]" and float(
        rows["performer bf16", "N 192"]["ms"]
    )
    assert rows["linformer causal", "N 64"]["MB"] == "UsageError: linformer has no causal form"
    assert [row["where"] for row in steps] == ["2 x 64"] * 2
    assert [row["command"] for row in cell] == ["prepare", "train", "train"]
    assert "performer hybrid causal, float16 | " in capsys.readouterr().out


def test_a_kernel_that_is_wrong_or_fails_is_a_row_and_an_exit_code(tmp_path, small, monkeypatch):
    kernels = gpu.kernels
    flash = gpu.flash.flash

    def wrong(q, k, v, bias, *, causal):
        if v.dtype == torch.float16:
            raise RuntimeError("no kernel\nfor half")
        return flash(q, k, 1.1 * v if v.dtype == torch.bfloat16 else v, bias, causal=causal)

    monkeypatch.setattr(gpu.flash, "flash", wrong)
    rows = list(kernels("cpu"))
    assert [row["holds"][:12] for row in rows] == ["yes"] * 4 + ["NO"] * 4 + ["RuntimeError"] * 4
    code, _ = rehearse(tmp_path)
    assert code == 1


def test_without_a_gpu_one_line_says_what_is_needed(error_line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU" in error_line("bench", "gpu")


def test_the_row_of_a_command_is_its_last_line():
    row = gpu.command(["list", "presets"], time.monotonic() + 60)
    assert row["command"] == "list presets" and row["last line"].startswith("path-x") and row["holds"] == "yes"
