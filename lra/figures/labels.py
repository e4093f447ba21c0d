"""Where names stand in a figure, so that none covers another: at the right of the axes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D


def label_ends(axes: Axes, lines: Sequence[Line2D] | None = None, size: float = 7.5) -> None:
    """Name each line at the right of the axes, at the height of its last point or as near as the others allow.

    The name is the label of the line; by default all lines that have one are named. Limits and scales of the axes
    must be set before.
    """
    lines = lines or [line for line in axes.lines if not line.get_label().startswith("_")]
    axes.figure.draw_without_rendering()
    step = 1.35 * size / 72 * axes.figure.dpi / axes.get_window_extent().height  # of the height of the axes
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    wanted = [float(to_axes.transform(end)[1]) for end in ends]
    arrow = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (0, 0.5), "shrinkA": 1}
    text = {"textcoords": "axes fraction", "va": "center", "fontsize": size, "annotation_clip": False}
    for line, end, height in zip(lines, ends, spread(wanted, step), strict=True):
        color = line.get_color()
        axes.annotate(line.get_label(), end, (1.05, height), color=color, arrowprops=arrow | {"color": color}, **text)


def spread(wanted: Sequence[float], step: float) -> list[float]:
    """Heights in [0, 1] at least `step` apart, as near to the wanted ones as that allows (least squares).

    Heights minus their rank times `step` must not fall: isotonic regression.
    """
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    ranks = step * np.arange(len(order))
    lowest = isotonic_regression(np.asarray(wanted, float)[order] - ranks).x
    heights = np.empty(len(order))
    heights[order] = lowest.clip(0.0, max(0.0, 1.0 - step * (len(order) - 1))) + ranks
    return heights.tolist()
