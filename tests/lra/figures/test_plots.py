"""Figures: what is drawn from which records, that nothing is drawn from nothing, and names as text."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.text import Text

import lra.leaderboard.page
from lra.__main__ import main
from lra.figures import plots, style
from lra.records import measured
from lra.records.cells import build
from lra.records.stats import over_seeds
from tests.lra.builders import FIVE, LINEAR, QUADRATIC, answer, bench, point, put, windows
from tests.lra.figures.builders import HOSTILE, fill, give_curve, label_boxes, outside, overlapping, texts


@pytest.fixture(autouse=True)
def believed(monkeypatch):
    """`put` writes no whole records: they are taken as they are. Few pixels make a figure as well as many."""
    monkeypatch.setattr(lra.leaderboard.page, "judge", lambda *_: {})
    monkeypatch.setitem(style.STYLE, "savefig.dpi", 20)


def drawn(results, capsys, *words, code=0):
    """Run `plot`; returns {name: path of its SVG} and what was said about the others."""
    assert main(["plot", f"--results={results}", *words]) == code
    lines = capsys.readouterr().out.splitlines()
    made = [line for line in lines if line.endswith(".svg")]
    found = {line.rsplit("/", 1)[1].removesuffix(".svg"): results / "figures" / line.rsplit("/", 1)[1] for line in made}
    assert all(p.exists() and p.with_suffix(".png").read_bytes()[:4] == b"\x89PNG" for p in found.values())
    return found, [line for line in lines if line not in made]


def shown(figure):
    """All text of a figure that is not saved."""
    return {text.get_text() for text in figure.findobj(Text)}


def test_every_figure_has_the_methods_and_tasks_it_compares_and_one_method_has_one_colour(tmp_path, capsys):
    fill(tmp_path)
    bench(tmp_path, [*LINEAR, *QUADRATIC])
    found, others = drawn(tmp_path, capsys)
    assert set(found) == {"small-bubble", "small-accuracy", "small-curves", "lengths"} and not others
    for name in ("small-accuracy", "small-curves"):
        assert set(FIVE) | {"softmax", "performer", "linformer"} <= set(texts(found[name])), name
    # peak memory relative to softmax beside each name
    assert {"softmax, 1.00×", "performer, 2.00×", "linformer, 3.00×"} <= set(texts(found["small-bubble"]))
    assert "performer, from 1,536" in texts(found["lengths"])  # the crossover: 3 n = n^2 in units of 512 tokens
    for path in found.values():
        used = set(re.findall(r"(?:stroke|fill): (#[0-9a-f]{6})", path.read_text()))
        assert style.color("performer") in used
        known = {style.color(m) for m in ("softmax", "performer", "linformer")} | {style.INK, style.GREY, "#ffffff"}
        assert used <= known, path.name


def test_interval_seeds_and_floors_of_the_accuracy_figure_are_those_of_the_cells(tmp_path):
    fill(tmp_path, ("softmax",), seeds=3)
    (table,) = build(tmp_path)
    with style.drawing():
        figure = plots.accuracy(table, plots.shown_rows(table))
    axes = figure.axes[0]
    cell = table.cells[table.rows[0], table.columns[0]]
    dots = next(line for line in axes.lines if line.get_marker() == ".")
    assert sorted(dots.get_xdata()) == pytest.approx(sorted(100 * a for a in cell.accuracies))
    (bar,) = axes.containers
    ((low, _), (high, _)), *_ = bar.lines[2][0].get_segments()
    assert (low, high) == pytest.approx((100 * cell.estimate.low, 100 * cell.estimate.high))
    (floor,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert floor.get_xdata()[0] == pytest.approx(16.9)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["floor: majority", "softmax"], "worst to best"


def test_curves_are_means_over_seeds_with_the_band_of_their_sd(tmp_path):
    path = [put(tmp_path, seed=seed) for seed in (0, 1)]
    for shift, p in enumerate(path):
        give_curve(p)
        p.write_text(p.read_text().replace(", 300, 1000]", f", {300 + 100 * shift}, 1000]"))
    (table,) = build(tmp_path)
    with style.drawing():
        figure = plots.curves(table, plots.shown_rows(table))
    (axes,) = figure.axes
    assert list(axes.lines[0].get_xdata()) == [100, 200, 300]
    assert axes.lines[0].get_ydata() == pytest.approx([10, 20, 35])  # percent of 1,000 correct
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((10, 35 + 50**0.5))


def test_nothing_is_drawn_from_nothing_with_a_line_for_each(tmp_path, capsys):
    found, others = drawn(tmp_path, capsys)
    assert not found and others == ["no lengths: nothing to draw it from"]
    put(tmp_path, failed="loss is not finite")
    found, others = drawn(tmp_path, capsys)
    assert "small-bubble" not in found and "no small-curves: nothing to draw it from" in others


def test_bubbles_are_drawn_only_for_methods_that_ran_every_task_with_every_seed(tmp_path):
    fill(tmp_path, ("softmax", "performer"))
    put(tmp_path, "text", "lfk", speed=2.0, peak=1)
    (table,) = build(tmp_path)
    with style.drawing():
        bubble, accuracy = (shown(make(table, plots.shown_rows(table))) for make in (plots.bubble, plots.accuracy))
    assert any("performer" in text for text in bubble) and not any("lfk" in text for text in bubble)
    assert "lfk" in accuracy


def test_at_most_eight_methods_unless_all_are_asked_for_and_hostile_names_are_text(tmp_path, monkeypatch):
    fill(tmp_path, ("softmax", "constant", "a" * 120, *(f"method{i:02d}" for i in range(8))), seeds=1)
    bench(tmp_path, [point(HOSTILE, n, 1.0) for n in (2, 4)])
    names = {"softmax", "constant", "a" * (style.LONGEST - 1) + "…", *(f"method{i:02d}" for i in range(8))}
    save, made = style.save, {}
    monkeypatch.setattr(style, "save", lambda figure, path: made.update({path.name: figure}) or (path, path))
    assert main(["plot", f"--results={tmp_path}"]) == 0
    for name in ("small-accuracy", "small-curves"):
        few = shown(made[name])
        assert "8 of 11 methods; all of them: plot --all" in " ".join(few)
        assert len(names & few) == 8 and {"softmax", "constant"} < few
    path, _ = save(made["lengths"], tmp_path / "lengths")
    assert not [e for e in ET.parse(path).iter() if e.tag.endswith(("}script", "}img"))]
    assert any(t.startswith("</td></script>") and len(t) <= style.LONGEST for t in texts(path))
    assert main(["plot", f"--results={tmp_path}", "--all"]) == 0
    assert names <= shown(made["small-accuracy"])


def test_the_title_says_which_tasks_tell_softmax_from_averaging(tmp_path):
    for task, constant in (("listops", 1990), ("image", 1000), ("text", 2000)):
        for seed in range(3):
            answer(put(tmp_path, task, "softmax", seed), np.arange(4000) < 2000 + seed)
            answer(put(tmp_path, task, "constant", seed), np.roll(np.arange(4000) < constant + seed, 300))
    (table,) = build(tmp_path)
    with style.drawing():
        title = plots.accuracy(table, plots.shown_rows(table)).get_suptitle()
    assert title == "small: softmax is significantly above averaging (constant) on image; not on listops and text"


def test_the_other_titles_are_computed_from_what_is_shown(tmp_path):
    fill(tmp_path, ("softmax", "constant", "performer"))
    bench(tmp_path, [*LINEAR, *QUADRATIC])
    (table,) = build(tmp_path)
    rows = plots.shown_rows(table)
    with style.drawing():
        bubble, curves = plots.bubble(table, rows).get_suptitle(), plots.curves(table, rows).get_suptitle()
        lengths = plots.scaling(measured.attention(tmp_path)).get_suptitle()
    text = "0 of 1 methods significantly below softmax; the fastest of the others, performer, is"
    assert text in bubble.replace("\n", " ")
    assert "3.00 times as fast" in bubble.replace("\n", " ")
    assert "points between the best and the worst method at the end: 0 on listops" in curves
    assert lengths == "1 of 1 methods overtake softmax: performer from 1,536 tokens"


def test_ring_of_the_crossover_lies_on_the_baselines_curve(tmp_path):
    bench(tmp_path, [*LINEAR, *QUADRATIC])
    with style.drawing():
        times = plots.scaling(measured.attention(tmp_path)).axes[0]
    ring = next(line for line in times.lines if line.get_markersize() == 11)
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((1536, 9))


def grouped(results, attention, seed, shares, by="pairs"):
    """A record of recall whose groups have these shares of 1,000 right."""
    path = put(results, "recall", attention, seed, correct=sum(shares.values()), n=1000 * len(shares))
    record = json.loads(path.read_text())
    counts = [[value, right, 1000] for value, right in shares.items()]
    record["result"]["groups"] = {"by": by, "counts": counts}
    path.write_text(json.dumps(record))


def test_accuracy_by_groups_is_a_line_per_method_of_means_over_seeds_with_their_intervals(tmp_path):
    for seed, more in enumerate((0, 100)):
        grouped(tmp_path, "softmax", seed, {2: 900, 4: 800 + more, 8: 600})
        grouped(tmp_path, "constant", seed, {2: 550, 4: 400, 8: 300})
    put(tmp_path, "listops")  # has no groups, so no panel
    (table,) = build(tmp_path)
    with style.drawing():
        figure = plots.groups(table, plots.shown_rows(table))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert set(lines) == {"softmax", "constant"} and list(lines["softmax"].get_xdata()) == [2, 4, 8]
    assert lines["softmax"].get_ydata() == pytest.approx([90, 85, 60])
    expected = over_seeds([0.8, 0.9], 1000)
    bars = [bar.lines[2][0].get_segments()[1] for bar in axes.containers]  # at 4 pairs, constant's first
    (_, low), (_, high) = bars[1]
    assert (low, high) == pytest.approx((100 * expected.low, 100 * expected.high))
    assert axes.get_xlabel() == "pairs"
    title = figure.get_suptitle().replace("\n", " ")
    assert title == "small: recall, 2 to 8 pairs: constant 55 to 30% and softmax 90 to 60%"
    boxes = label_boxes(axes)
    assert not overlapping(boxes) and not outside(boxes, figure.bbox)


def test_receptive_fields_are_a_line_beside_softmax_and_constant(tmp_path, capsys):
    windows(tmp_path)
    put(tmp_path, attention="softmax", correct=960)
    put(tmp_path, attention="constant", correct=700)
    (table,) = build(tmp_path)
    with style.drawing():
        figure = plots.field(table, ())
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines["local"].get_xdata()) == [5, 13, 29, 100]
    assert lines["local"].get_ydata() == pytest.approx([22.75, 23.25, 24.25, 38.5])
    assert lines["softmax"].get_ydata() == pytest.approx([24.0] * 2)
    title = figure.get_suptitle().replace("\n", " ")
    assert title == "small: fewest tokens with which local is within a point of softmax: listops 13 of 100"
    boxes = label_boxes(axes)
    assert len(boxes) == 3 and not overlapping(boxes) and not outside(boxes, figure.bbox)
    found, _ = drawn(tmp_path, capsys)
    assert "small-field" in found and "small-groups" not in found
