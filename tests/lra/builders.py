"""Records and benchmarks made for tests of tables, figures and the page."""

import hashlib
import json

import numpy as np

from lra.records.record import SCHEMA, record_path, write_labels, write_record
from lra.scaling.calibration import Machine

FIVE = ("listops", "text", "retrieval", "image", "pathfinder")
MACHINE = Machine({"operations": 1e-5, "flops": 1e-11, "bytes": 1e-10}, 1.0, 10**8, 10**7, 1.5)
DATASETS = {"text": "IMDb", "retrieval": "AAN", "image": "CIFAR-10"}


def put(
    results,
    task="listops",
    attention="softmax",
    seed=0,
    correct=1360,
    n=4000,
    *,
    preset="small",
    dataset=None,
    substitute=False,
    data="a",
    floors=None,
    overrides=None,
    config=None,
    lr=1e-3,
    source="generated",
    val_rule="held-out",
    protocol="lra-v1",
    params=1.0,
    speed=None,
    peak=None,
    threads=2,
    precision="fp32",
    failed=None,
    dirty=False,
):
    """Write one record; `data` stands for the content of the splits, `speed` is what `bench tasks` measured. Returns
    its path."""
    overrides, config = overrides or {}, config or {"num_features": 64}
    splits = {s: {"n": n, "sha256": f"{data}-{s}", "max_length": 100} for s in ("train", "val", "test")}
    record = {
        "schema": SCHEMA,
        "suite": {"version": "0.1.0", "git_commit": "c0ffee", "git_dirty": dirty},
        "task": {"name": task, "version": 1, "preset": preset, "protocol": protocol, "seq_len": 100,
                 "dataset": dataset or DATASETS.get(task, task), "substitute": substitute},
        "data": {"source": source, "revision": "1", "manifest_sha256": data, "splits": splits,
                 "val_rule": val_rule, "floors": floors or {"majority": 0.169}},
        "model": {"attention": attention, "attention_config": config, "encoder": {"width": 64},
                  "n_params": 110474, "n_params_ratio_to_softmax": params},
        "training": {"seed": seed, "precision": precision, "compile": False, "world_size": 1,
                     "recipe": {"lr": lr}, "budget": 64, "overrides": overrides},
        "result": None if failed else {"n_correct": correct, "n_test": n},
        "cost": {"device": "cpu", "peak_bytes": peak, "softmax_same_machine": {"step_time_ratio": 77.0, "pairs": 5}},
        "env": {"cpu": "Some CPU", "gpu": None, "threads": threads},
        "status": f"failed: {failed}" if failed else "ok",
        "command": f"python -m lra train {task} --attention {attention} --seed {seed}",
    }  # fmt: skip
    identity = repr((task, preset, data, source, val_rule, overrides, config, lr, attention, precision))
    digest = hashlib.sha256(identity.encode()).hexdigest()
    path = record_path(results, task, attention, digest, seed)
    write_record(path, record, None)
    if speed:
        report = results / "bench" / f"tasks-{preset}.json"
        report.parent.mkdir(exist_ok=True)
        points = json.loads(report.read_text())["points"] if report.exists() else []
        report.write_text(json.dumps({"points": [*points, {"digest": path.parent.name, "ratio": speed}]}))
    return path


def answer(path, right):
    """Give a record predictions that are right where `right` says so; returns `right`."""
    labels = np.random.default_rng(7).integers(0, 10, len(right)).astype(np.uint8)
    predictions = np.where(right, labels, (labels + 1) % 10).astype(np.uint8).tobytes()
    record = json.loads(path.read_text())
    record["result"] |= {"n_correct": int(sum(right)), "n_test": len(right)}
    record["result"]["predictions_sha256"] = hashlib.sha256(predictions).hexdigest()
    record["data"]["splits"]["test"]["labels_sha256"] = hashlib.sha256(labels.tobytes()).hexdigest()
    write_labels(path.parents[4], labels.tobytes())
    write_record(path, record, predictions)
    return right


def grid(text, nth=0, preset="small"):
    """The nth table of a preset's section as {row name: {column header: cell}}."""
    section = text.split(f"### {preset}")[1].split("\n### ")[0]
    blocks = [b for b in section.split("\n\n") if b.startswith("| ")]
    lines = [[c.strip() for c in line.strip("|").split(" | ")] for line in blocks[nth].splitlines()]
    header, _, *rows = lines
    assert all(len(row) == len(header) for row in rows)
    return {row[0].strip(): dict(zip(header[1:], row[1:], strict=True)) for row in rows}


def only(cells):
    """The single cell of a row."""
    (cell,) = cells.values()
    return cell


def bench(results, points, name="attention"):
    """Write a file of points under results/bench/."""
    path = results / "bench" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"points": points}))
    return path


def point(name, n, seconds, peak=None):
    """One point of attention.json."""
    return {"name": name, "N": n, "seconds": seconds, "peak_bytes": peak}


QUADRATIC = [point("softmax", n, (n / 512) ** 2, n * n) for n in (512, 1024, 2048)]
LINEAR = [point("performer", n, 3 * n / 512, 2048 * n) for n in (512, 1024, 2048)]


def windows(results, task="listops", sizes=(1, 3, 7, 64), default=64, **facts):
    """Records of local with two layers, by window."""
    for window in sizes:
        overrides = {} if window == default else {"attention.window": str(window)}
        path = put(results, task, "local", overrides=overrides, config={"window": window}, correct=900 + 10 * window)
        record = json.loads(path.read_text())
        record["model"]["encoder"]["layers"] = 2
        record["model"]["attention_config"] |= facts
        path.write_text(json.dumps(record))
