"""How every figure looks: one colour and one marker per method, wherever it is drawn. No torch.

The palette was chosen by a search that maximises the smallest OKLab distance between any two of its colours
in normal vision and under simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009), each
colour being readable on white and on near-black. Markers and direct labels say the same a second time.
"""

from __future__ import annotations

import hashlib
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lra.records.markup import flat
from tasks.store.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

INK = "#1f2328"  # text, axes and softmax, the baseline; the page turns this colour light in the dark
GREY = "#8b9098"  # constant attention and floors
METHODS = {  # colour and marker of each; a figure without room for all takes them in this order
    "softmax": (INK, "*"),
    "constant": (GREY, "d"),
    "performer": ("#5484fc", "o"),
    "darkformer": ("#d86018", "s"),
    "linformer": ("#246c54", "D"),
    "linear": ("#30c078", "^"),
    "s4d": ("#cc48cc", "h"),
    "local": ("#906090", "p"),
    "nystrom": ("#7818fc", ">"),
    "reformer": ("#f09018", "<"),
    "optimal": ("#c00c18", "P"),
    "lfk": ("#9c24b4", "v"),
    "random": ("#b49ce4", "X"),
}
PALETTE, MARKERS = zip(*list(METHODS.values())[2:], strict=True)
SERIES = 8  # lines in one panel; more cannot be told apart
LONGEST = 28  # characters of a name in a figure
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # the one font that matplotlib brings along: one layout everywhere
    "font.size": 9,
    "grid.color": GREY,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.35,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "savefig.dpi": 144,
    "svg.fonttype": "none",  # text stays text: searchable, and read out by a screen reader
    "svg.hashsalt": "lra",  # without it, every identifier in an SVG is random
    "text.parse_math": False,  # a name from a record is never markup
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK),
}


def color(name: str) -> str:
    """The colour of a method as #rrggbb; a method without one of its own gets one from the hash of its name."""
    return _color_and_marker(name)[0]


def marker(name: str) -> str:
    """The marker of a method, in matplotlib's letters."""
    return _color_and_marker(name)[1]


def _color_and_marker(name: str) -> tuple[str, str]:
    """Those of the method: "performer bf16" and "pypi:performer-pytorch" are performers."""
    method = name.partition(" ")[0]
    if method.startswith("pypi:"):
        method = next((known for known in METHODS if known in method.removeprefix("pypi:")), method)
    number = int.from_bytes(hashlib.sha256(method.encode()).digest()[:8], "big")
    other = PALETTE[number % len(PALETTE)], MARKERS[number // len(PALETTE) % len(MARKERS)]
    return METHODS.get(method, other)


def look(name: str) -> dict[str, object]:
    """How a line is drawn. Variants and peers of a method keep its colour, and differ in dashes and markers.
    A variant ("softmax causal") has hollow markers and dashes of its own; a peer ("pypi:NAME") is dotted."""
    own = {"bf16": "--", "causal": "-.", "unfused": (0, (6, 1, 1, 1, 1, 1))}
    variant, line = name.partition(" ")[2], ":" if name.startswith("pypi:") else "-"
    line = own.get(variant, (0, (3, 3))) if variant else line
    return {"color": color(name), "marker": marker(name), "linestyle": line, "fillstyle": "none" if variant else "full"}


def selection(names: Sequence[str], everything: bool = False) -> list[str]:
    """The names that a figure shows, in their order: SERIES at most unless `everything` is asked for.
    softmax and constant come first, then methods that are not in METHODS (the reader's own), then the others in the
    order of METHODS, and variants and peers last."""
    order = list(METHODS)

    def rank(name):
        return " " in name or name.startswith("pypi:"), order.index(name) if name in order else 1.5

    first = sorted(names, key=rank)[: None if everything else SERIES]
    return [name for name in names if name in first]


def short(name: str, longest: int = LONGEST) -> str:
    """A name on one line, cut to what fits into a figure."""
    name = flat(name)
    return name if len(name) <= longest else name[: longest - 1] + "…"


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them: "a, b and c"."""
    *others, last = map(short, names)
    return f"{', '.join(others)} and {last}" if others else last


def drawing() -> AbstractContextManager:
    """Within it, figures are made in this style: `with drawing(): fig, axes = subplots(...)`."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def subplots(rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 4.0, **options):
    """A figure of `width` x `height` inches and its axes, as matplotlib's own; no window and no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **options)


def grid(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with panels of `width` x `height` inches, at most three beside each other, and their axes."""
    across = min(3, panels)
    down = -(-panels // across)
    figure, axes = subplots(down, across, width=0.8 + width * across, height=height * down, squeeze=False)
    for spare in axes.flat[panels:]:
        spare.remove()
    return figure, list(axes.flat[:panels])


def message(figure: Figure, text: str) -> None:
    """The title of a figure: the one thing that it says."""
    lines = textwrap.fill(text, int(11.5 * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, horizontalalignment="left", fontsize=10, fontweight="bold")


def log_axes(axes: Axes, base: float = 10, y: str = "log", **labels: str) -> None:
    """Logarithmic x, and y unless it is "linear"; labels as matplotlib's `axes.set` takes them.
    Numbers stand as people write them, 0.5 or 2,048; never powers of ten, which would be markup."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_xscale("log", base=base)
    axes.set(yscale=y, **labels)
    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(plain if high < 20 * low else NullFormatter())  # few decades: name all


def label_ends(axes: Axes, lines: Sequence[Line2D] | None = None, size: float = 7.5) -> None:
    """Name each line at the right of the axes, at the height of its last point or as near as the others allow.
    The name is the label of the line; by default all lines that have one are named. Limits and scales of the axes must
    be set before."""
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
    Heights minus their rank times `step` must not fall: isotonic regression."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(wanted, kind="stable")
    ranks = step * np.arange(len(order))
    lowest = isotonic_regression(np.asarray(wanted, float)[order] - ranks).x
    heights = np.empty(len(order))
    heights[order] = lowest.clip(0.0, max(0.0, 1.0 - step * (len(order) - 1))) + ranks
    return heights.tolist()


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write PATH.svg and PATH.png, each atomically: the same figure gives the same bytes, without a date.
    Returns the two paths."""
    svg, png = Path(f"{path}.svg"), Path(f"{path}.png")
    with drawing(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # another script: boxes in the PNG alone
        with atomic_path(svg) as temporary:
            figure.savefig(temporary, metadata={"Date": None, "Creator": None}, transparent=True)
        with atomic_path(png) as temporary:
            figure.savefig(temporary, metadata={"Software": None}, facecolor="white")
    return svg, png
