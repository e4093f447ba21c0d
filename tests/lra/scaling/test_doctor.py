"""`doctor`: one fact a line, and nothing in it fails."""

import re

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from lra.__main__ import main
from lra.scaling import doctor


def test_doctor_reports_the_machine_and_never_fails(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "reachable", lambda host, port: False)
    assert main(["doctor"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"python", "torch", "numpy", "cpu", "memory", "device", "bf16", "compiler", "disk"} <= facts.keys()
    assert facts["hub"].startswith("not reachable: --source embedded")
    assert "GB free" in facts["memory"] and "threads" in facts["cpu"]
    assert facts["features"] == "fp32 fused, bf16 fused, float64 fused"
    assert re.match(r"products (oneDNN|PyTorch\'s own), softmax attention ", facts["kernels"])


def test_doctor_says_why_random_features_have_no_fused_kernel():
    assert doctor.features("mps").startswith("fp32 plain (PyTorch has no such kernel)")
    with sdpa_kernel(SDPBackend.MATH):
        assert "bf16 plain (fused kernels are switched off)" in doctor.features("cpu")


@pytest.mark.parametrize("compiler, answer", [("false", "fails with OpenMP"), ("no-such-compiler", "works|none")])
def test_doctor_tries_the_compiler(monkeypatch, compiler, answer):
    monkeypatch.setenv("CXX", compiler)
    assert re.search(answer, doctor.compiler())


def test_doctor_says_how_to_get_what_is_missing():
    assert doctor.version("torch")[0].isdigit()
    assert doctor.version("no-such-package") == "missing: pip install no-such-package"
