"""`bench decode`: one size and one row for each attention, and caches as the model would have filled them."""

import functools
import importlib
import json

import pytest
import torch

from lra.__main__ import main
from lra.bench import base, decode

FACTS = {"contexts": (37, 71), "model": "tiny", "M": 5, "window": 4, "sinks": 1}
WORDS = ["bench", "decode", "--model=tiny", "--features=5", "--window=4", "--rounds=1"]


def test_bench_decode_writes_points_tables_and_a_figure(tmp_path, capsys, monkeypatch):
    def once(module, columns):
        return {"tuned": base.interleaved(importlib.import_module(module).contender, columns, 1)}

    monkeypatch.setattr(base, "LEAST", 1e-9)
    monkeypatch.setattr(base, "apart", lambda *facts: functools.partial(next, base.answers(*facts[:3])))
    monkeypatch.setattr(decode, "twice", once)
    assert main([*WORDS, "--contexts=71,37", f"--data={tmp_path}", f"--results={tmp_path}"]) == 0
    report = json.loads((tmp_path / "bench" / "decode.json").read_text())
    points = {(p["name"], p["N"]): p for p in report["points"]}
    assert set(points) == {(name, N) for name in ("softmax", *decode.ROWS) for N in (37, 71)}
    assert report["weights"] == "random" and all(p["seconds"] > 0 for p in points.values())
    held = {name: [points[name, N]["bytes"] for N in (37, 71)] for name in ("softmax", *decode.ROWS)}
    assert all((one == other) == (name != "softmax") for name, (one, other) in held.items())
    text = (tmp_path / "bench" / "decode.md").read_text()
    assert "| performer hybrid |" in text and "Fewer bytes than softmax: local:" in text
    assert (tmp_path / "figures" / "decode.svg").exists()


@pytest.mark.parametrize("name", ["softmax", "local", "darkformer hybrid"])
@torch.no_grad()
def test_a_cache_has_the_size_that_a_prompt_leaves(name, tmp_path):
    decoding = decode.Decoding(name, data=str(tmp_path), **FACTS)
    for N, cache in decoding.caches.items():
        real = decoding.model(torch.ones(1, N, dtype=torch.int64), use_cache=True).past_key_values
        assert decode.size(cache) == decode.size(real) and cache.get_seq_length() == real.get_seq_length() == N
        assert decoding.token(N).isfinite().all() and cache.get_seq_length() == N + 1


def test_a_context_beyond_the_model_is_refused(capsys):
    assert main([*WORDS, "--contexts=64,1024"]) == 2
    assert "--contexts 1024 is beyond the model: tiny has 1024 positions" in capsys.readouterr().err
