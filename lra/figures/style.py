"""How every figure looks: one colour and one marker per method, wherever it is drawn. No torch.

The palette was chosen by a search that maximises the smallest OKLab distance between any two of its colours
in normal vision and under simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009), each
colour being readable on white and on near-black. Markers and direct labels say the same a second time.
"""

from __future__ import annotations

import hashlib
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.store.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = (
    "#1f2328"  # text, axes and softmax: what everything is compared with; the page turns it light in the dark
)
GREY = "#8b9098"  # constant attention and floors
PALETTE = (
    "#5484fc", "#d86018", "#246c54", "#9c24b4", "#30c078", "#c00c18", "#f09018", "#7818fc", "#906090",
    "#b49ce4", "#cc48cc",
)  # fmt: skip
MARKERS = "osDv^P<>pXh"
NAMED = (
    "performer", "darkformer", "linformer", "lfk", "linear", "optimal", "reformer", "nystrom", "local",
    "random", "s4d",
)  # fmt: skip
HANDLE = 3.5  # length of a line in a legend that has to show a pattern of dashes, in letters
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "font.sans-serif": [
        "DejaVu Sans"
    ],  # the one font that matplotlib brings along: the same layout everywhere
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
    "text.color": INK,
    "text.parse_math": False,  # a name from a record is never markup
    "xtick.color": INK,
    "ytick.color": INK,
}


def color(method: str) -> str:
    """The colour of a method as #rrggbb; a method without one of its own gets one from the hash of its name.

    What stands after a space names a variant ("performer bf16"), which has the colour of its method.
    """
    own = {"softmax": INK, "constant": GREY} | dict(zip(NAMED, PALETTE, strict=True))
    method = method.partition(" ")[0]
    return own.get(method) or PALETTE[_hash(method) % len(PALETTE)]


def marker(method: str) -> str:
    """The marker of a method, in matplotlib's letters."""
    own = {"softmax": "*", "constant": "_"} | dict(zip(NAMED, MARKERS, strict=True))
    method = method.partition(" ")[0]
    return own.get(method) or MARKERS[_hash(method) // len(PALETTE) % len(MARKERS)]


def dashes(method: str) -> str | tuple:
    """The line style of a method: broken for a variant, dotted for another package's ("pypi:NAME")."""
    own = {"bf16": "--", "causal": "-."}
    if variant := method.partition(" ")[2]:
        return own.get(variant, (0, (5, 1, 1, 1, 1, 1)))
    return ":" if ":" in method else "-"


def _hash(method: str) -> int:
    return int.from_bytes(hashlib.sha256(method.encode()).digest()[:8], "big")


def drawing() -> AbstractContextManager:
    """Within it, figures are made in this style: `with drawing(): fig, axes = subplots(...)`."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def subplots(rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 4.0, **options):
    """A figure of `width` x `height` inches and its axes, as matplotlib's own; no window and no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **options)


def plain_ticks(axes: Axes) -> None:
    """Numbers as people write them, 0.5 or 2,048, on both axes; never powers of ten, which would be markup."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,g}")
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(
            plain if high < 20 * low else NullFormatter()
        )  # few decades: name what is between


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write PATH.svg and PATH.png, each atomically: the same figure gives the same bytes, without a date.

    Returns the two paths. A suffix of `path` is dropped.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    svg, png = stem.with_name(stem.name + ".svg"), stem.with_name(stem.name + ".png")
    with drawing(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing"
        )  # a name in another script: boxes in the PNG alone
        with atomic_path(svg) as temporary:
            figure.savefig(temporary, metadata={"Date": None, "Creator": None}, transparent=True)
        with atomic_path(png) as temporary:
            figure.savefig(temporary, metadata={"Software": None}, facecolor="white")
    return svg, png
