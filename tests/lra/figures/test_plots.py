"""Figures: what is drawn from which records, that nothing is drawn from nothing, and names as text."""

import json
import re
import xml.etree.ElementTree as ET

import pytest

from lra.__main__ import main
from lra.figures import plots, style
from lra.records import measured
from lra.records.cells import build
from tests.lra.builders import FIVE, LINEAR, QUADRATIC, bench, point, put
from tests.lra.leaderboard.test_page import HOSTILE, give_curve


def texts(path):
    """All text of an SVG, parsed as XML."""
    return ["".join(e.itertext()).strip() for e in ET.parse(path).iter() if e.tag.endswith("}text")]


def drawn(results, capsys, code=0):
    """Run `plot`; returns {name: path of its SVG} and what was said about the others."""
    assert main(["plot", f"--results={results}"]) == code
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if line.endswith(".svg")]
    found = {
        line.rsplit("/", 1)[1].removesuffix(".svg"): results / "figures" / line.rsplit("/", 1)[1]
        for line in made
    }
    assert all(p.exists() and p.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" for p in found.values())
    return found, [line for line in lines if line not in made]


def fill(results, attentions=("softmax", "performer", "linformer"), seeds=2):
    """Records of five tasks, with curves."""
    for n, task in enumerate(FIVE):
        for k, attention in enumerate(attentions):
            for seed in range(seeds):
                correct = 1500 + 100 * n + 70 * k + 40 * seed
                give_curve(put(results, task, attention, seed, correct, speed=1 + k, peak=1000 * (k + 1)))


def test_every_figure_is_drawn_with_the_methods_and_tasks_it_compares(tmp_path, capsys):
    fill(tmp_path)
    bench(tmp_path, [*LINEAR, *QUADRATIC])
    points = [{"M": m, "kernel_rms": m**-0.5, "error": m**-0.5} for m in (16, 64, 256)]
    scheme = {"name": "performer-balanced", "attention": "performer", "points": points}
    case = {"name": "skewed", "group": "skewed", "schemes": [scheme | {"closed_form_variance_log10": 1.0}]}
    (tmp_path / "bench" / "variance.json").write_text(json.dumps({"cases": [case]}))
    found, others = drawn(tmp_path, capsys)
    assert (
        set(found) == {"small-bubble", "small-accuracy", "small-curves", "lengths", "variance-features"}
        and not others
    )
    for name in ("small-accuracy", "small-curves"):
        assert set(FIVE) | {"softmax", "performer", "linformer"} <= set(texts(found[name])), name
    # peak memory relative to softmax beside each name
    assert {"softmax 1.00", "performer 2.00", "linformer 3.00"} <= set(texts(found["small-bubble"]))
    assert "performer, from 1,536" in texts(
        found["lengths"]
    )  # the crossover: 3 n = n^2 in units of 512 tokens
    assert "performer-balanced" in texts(found["variance-features"])
    assert style.color("performer") in found["variance-features"].read_text()


def test_one_method_has_one_colour_in_every_figure(tmp_path, capsys):
    fill(tmp_path)
    bench(tmp_path, [*LINEAR, *QUADRATIC])
    found, _ = drawn(tmp_path, capsys)
    for path in found.values():
        used = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", path.read_text()))
        assert style.color("performer") in used
        known = {style.color(m) for m in ("softmax", "performer", "linformer")} | {
            style.INK,
            style.GREY,
            "#ffffff",
        }
        assert used <= known, path.name


def test_interval_seeds_and_floors_of_the_accuracy_figure_are_those_of_the_cells(tmp_path):
    fill(tmp_path, ("softmax",), seeds=3)
    (table,) = build(tmp_path)
    with style.drawing():
        figure = plots.accuracy(table)
    axes = figure.axes[0]
    cell = table.cells[table.rows[0], table.columns[0]]
    dots = next(line for line in axes.lines if line.get_marker() == ".")
    assert sorted(dots.get_xdata()) == pytest.approx(sorted(100 * a for a in cell.accuracies))
    (bar,) = axes.containers
    ((low, _), (high, _)), *_ = bar.lines[2][0].get_segments()
    assert (low, high) == pytest.approx((100 * cell.estimate.low, 100 * cell.estimate.high))
    assert any(
        line.get_xdata()[0] == pytest.approx(16.9) for line in axes.lines if line.get_linestyle() == "--"
    )


def test_curves_are_means_over_seeds_with_the_band_of_their_sd(tmp_path):
    path = [put(tmp_path, seed=seed) for seed in (0, 1)]
    for shift, p in enumerate(path):
        give_curve(p)
        p.write_text(p.read_text().replace(", 300, 1000]", f", {300 + 100 * shift}, 1000]"))
    (table,) = build(tmp_path)
    with style.drawing():
        figure = plots.curves(table)
    (axes,) = figure.axes
    assert list(axes.lines[0].get_xdata()) == [100, 200, 300]
    assert axes.lines[0].get_ydata() == pytest.approx([10, 20, 35])  # percent of 1,000 correct
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((10, 35 + 50**0.5))


def test_nothing_is_drawn_from_nothing_with_a_line_for_each(tmp_path, capsys):
    found, others = drawn(tmp_path, capsys)
    assert not found and others == [
        f"no {name}: nothing to draw it from" for name in ("lengths", "variance-features")
    ]
    put(tmp_path, failed="loss is not finite")
    found, others = drawn(tmp_path, capsys)
    assert "small-bubble" not in found and "no small-curves: nothing to draw it from" in others


def test_bubbles_are_drawn_only_for_methods_that_ran_every_task_with_every_seed(tmp_path, capsys):
    fill(tmp_path, ("softmax", "performer"))
    put(tmp_path, "text", "lfk", speed=2.0, peak=1)
    found, _ = drawn(tmp_path, capsys)
    assert not any("lfk" in text for text in texts(found["small-bubble"]))
    assert "lfk" in texts(found["small-accuracy"])


def test_many_methods_and_long_or_hostile_names_still_make_a_figure(tmp_path, capsys):
    fill(tmp_path, ("softmax", "a" * 120, *(f"method{i:02d}" for i in range(20))), seeds=1)
    bench(tmp_path, [point(HOSTILE, n, 1.0) for n in (2, 4)])
    found, _ = drawn(tmp_path, capsys)
    shown = texts(found["small-accuracy"])
    assert "first 16 of 22 methods" in " ".join(shown) and "a" * (plots.LONGEST - 1) + "…" in shown
    assert "method13" in shown and "method14" not in shown
    assert not [e for e in ET.parse(found["lengths"]).iter() if e.tag.endswith(("}script", "}img"))]
    assert any(
        text.startswith("</td></script>") and len(text) <= plots.LONGEST for text in texts(found["lengths"])
    )


def test_ring_of_the_crossover_lies_on_the_baselines_curve(tmp_path):
    bench(tmp_path, [*LINEAR, *QUADRATIC])
    with style.drawing():
        times = plots.scaling(measured.attention(tmp_path)).axes[0]
    ring = next(line for line in times.lines if line.get_markersize() == 11)
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((1536, 9))
