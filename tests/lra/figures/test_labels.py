"""Labels: no two overlap and none leaves its axes or figure, and a placement that does not care is caught."""

import numpy as np
import pytest

from lra.figures import labels, plots, style
from lra.records import measured
from lra.records.cells import build
from tests.conftest import ROOT
from tests.lra.figures.builders import label_boxes, outside, overlapping

REFERENCE = ROOT / "results" / "reference"


def crowd(seed, place):
    """Nine points, six of them in a heap, with labels put there by `place`; returns the axes."""
    rng = np.random.default_rng(seed)
    points = [*rng.normal(0.3, 0.03, (6, 2)), *rng.uniform(0.1, 0.9, (3, 2))]
    with style.drawing():
        _, axes = style.subplots(width=6, height=4)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        names = [f"method {i}, {i / 7:.2f}×" for i in range(9)]
        place(axes, [tuple(p) for p in points], names, [8.0] * 9)
    return axes


@pytest.mark.parametrize("seed", range(8))
def test_labels_of_a_crowd_neither_overlap_nor_leave_the_axes(seed):
    axes = crowd(seed, labels.place_labels)
    boxes = label_boxes(axes)
    assert len(boxes) == 9 and not overlapping(boxes) and not outside(boxes, axes.get_window_extent())
    again = [box.bounds for box in label_boxes(crowd(seed, labels.place_labels))]
    assert again == [box.bounds for box in boxes], "the same places twice"


def test_a_fixed_offset_for_every_label_is_caught():
    def careless(axes, points, names, _):
        for point, name in zip(points, names, strict=True):
            axes.annotate(name, point, (10, 5), textcoords="offset points")

    assert overlapping(label_boxes(crowd(0, careless)))


@pytest.mark.parametrize("everything", [False, True])
def test_labels_of_the_reference_bubbles_can_be_read(everything):
    table = next(t for t in build(REFERENCE) if t.preset == "small")
    with style.drawing():
        figure = plots.bubble(table, plots.shown_rows(table, everything))
        (axes,) = figure.axes
        boxes = label_boxes(axes)
    assert len(boxes) == min(len(table.rows), style.SERIES) or everything
    assert not overlapping(boxes) and not outside(boxes, axes.get_window_extent())


def test_names_at_the_ends_of_lines_do_not_overlap_and_stay_in_the_figure():
    with style.drawing():
        figure = plots.scaling(measured.attention(REFERENCE))  # all of them: 18 lines
        for axes in figure.axes:
            boxes = label_boxes(axes)
            assert len(boxes) > 15 and not overlapping(boxes) and not outside(boxes, figure.bbox)


@pytest.mark.parametrize("seed", range(5))
def test_heights_are_apart_in_order_within_bounds_and_kept_where_there_is_room(seed):
    wanted = np.random.default_rng(seed).uniform(-0.2, 1.2, 9).tolist()
    heights = labels.spread(wanted, 0.1)
    ranked = sorted(heights)
    assert all(b - a > 0.1 - 1e-9 for a, b in zip(ranked, ranked[1:]))
    assert ranked[0] >= 0 and ranked[-1] <= 1 + 1e-9
    assert np.argsort(heights).tolist() == np.argsort(wanted).tolist()
    assert labels.spread([0.9, 0.2, 0.5], 0.1) == pytest.approx([0.9, 0.2, 0.5])
    assert labels.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
