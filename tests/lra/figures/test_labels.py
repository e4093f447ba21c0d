"""Labels: no two overlap and none leaves its figure."""

import numpy as np
import pytest

from lra.figures import plots, style
from lra.records import measured
from lra.records.cells import build
from tests.conftest import ROOT
from tests.lra.figures.builders import label_boxes, outside, overlapping

REFERENCE = ROOT / "results" / "reference"


@pytest.mark.parametrize("everything", [False, True])
def test_labels_of_the_reference_bubbles_can_be_read(everything):
    table = next(t for t in build(REFERENCE) if t.preset == "small")
    with style.drawing():
        figure = plots.bubble(table, plots.shown_rows(table, everything))
        (axes,) = figure.axes
        boxes = label_boxes(axes)
    assert len(boxes) == min(len(table.rows), style.SERIES) or everything
    assert not overlapping(boxes) and not outside(boxes, figure.bbox)


def test_names_at_the_ends_of_lines_do_not_overlap_and_stay_in_the_figure():
    with style.drawing():
        figure = plots.scaling(measured.attention(REFERENCE))  # all of them: 18 lines
        for axes in figure.axes:
            boxes = label_boxes(axes)
            assert len(boxes) > 15 and not overlapping(boxes) and not outside(boxes, figure.bbox)


@pytest.mark.parametrize("seed", range(5))
def test_heights_are_apart_in_order_within_bounds_and_kept_where_there_is_room(seed):
    wanted = np.random.default_rng(seed).uniform(-0.2, 1.2, 9).tolist()
    heights = style.spread(wanted, 0.1)
    ranked = sorted(heights)
    assert all(b - a > 0.1 - 1e-9 for a, b in zip(ranked, ranked[1:]))
    assert ranked[0] >= 0 and ranked[-1] <= 1 + 1e-9
    assert np.argsort(heights).tolist() == np.argsort(wanted).tolist()
    assert style.spread([0.9, 0.2, 0.5], 0.1) == pytest.approx([0.9, 0.2, 0.5])
    assert style.spread([0.5, 0.5], 0.2) == pytest.approx([0.4, 0.6])
