"""Where names stand in a figure, so that none covers another: beside points, and at the ends of lines. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lra.figures.style import GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], radii: Sequence[float], size: float = 8
) -> None:
    """Write each text beside its point: no two texts overlap, none covers a point or a line, none leaves the axes.

    Texts are placed one after another. A text tries places around its point, the near ones first, and takes the
    first that is free and nearer to its own point than to any other; else the least bad. A thin line leads to a
    text that had to go far.
    Radii of the points' markers and the size of the text are in points of 1/72 inch. Lines of the axes count as
    the boxes around them. Limits and scales of the axes must be set before.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.draw_without_rendering()  # settles the layout
    inside, pixels = axes.get_window_extent(), axes.figure.dpi / 72
    middles = list(axes.transData.transform(points))
    taken = [line.get_window_extent().padded(2) for line in axes.lines]
    taken += [Bbox([m - r * pixels, m + r * pixels]) for m, r in zip(middles, radii, strict=True)]
    arrow = {"arrowstyle": "-", "linewidth": 0.6, "color": GREY, "shrinkA": 0, "shrinkB": 0}
    for point, middle, text, radius in zip(points, middles, texts, radii, strict=True):
        label = axes.annotate(text, point, (0, 0), textcoords="offset points", arrowprops=arrow, fontsize=size)
        label.set(horizontalalignment="center", verticalalignment="center")
        extent = Text.get_window_extent(label)
        box = Bbox.from_bounds(*middle - [extent.width / 2, extent.height / 2], extent.width, extent.height)
        best, least = (0, 0.0, 0.0), (math.inf, True)
        for far, x, y in _places(box.width, box.height, (radius + 1) * pixels):
            moved = box.translated(x, y)
            outside = box.width * box.height - _shared(moved, inside)
            covered = round(sum(_shared(moved, other) for other in taken) + 10 * outside)  # square pixels
            foreign = min(middles, key=lambda m: _away(moved, m)) is not middle
            if (covered, foreign) < least:
                best, least = (far, x, y), (covered, foreign)
            if least == (0, False):
                break
        far, x, y = best
        label.set_position((x / pixels, y / pixels))
        label.arrow_patch.set_visible(far > 2 or least[1])
        taken.append(box.translated(x, y).padded(1))


def _away(box: Bbox, point: Sequence[float]) -> float:
    """Pixels from a box to a point."""
    return math.dist(point, (min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)))


def _places(width: float, height: float, near: float) -> Iterator[tuple[int, float, float]]:
    """(number of the ring, x, y) in pixels: where the centre of a box of this size may stand, from its point."""
    steps = (0, 1, -1, 0.5, -0.5)
    for far in range(20):
        for x in (1, -1, 0, 0.5, -0.5):
            for y in steps if abs(x) == 1 else (1, -1):
                away = near + 7 * far
                yield far, x * (away + width / 2), y * (away + height / 2)


def _shared(a: Bbox, b: Bbox) -> float:
    """Square pixels that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return width * height if width > 0 and height > 0 else 0.0


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

    Heights minus their rank times `step` must not fall: isotonic regression, by pooling adjacent violators.
    """
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * step])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    lowest = [fmean(pool) for pool in pools for _ in pool]
    ceiling = max(0.0, 1.0 - (len(order) - 1) * step)
    heights = {i: min(max(low, 0.0), ceiling) + rank * step for rank, (i, low) in enumerate(zip(order, lowest))}
    return [heights[i] for i in range(len(wanted))]
