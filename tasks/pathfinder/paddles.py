"""What Pathfinder's kernels (tasks/pathfinder/snakes.py) look up: shapes and steps of dashes for every heading.

All trigonometry happens here, once, so that drawing only adds and compares tabulated numbers and an image does not
depend on the platform. Coordinates are (row, column) in pixels; levels run from 0 to 1. A *paddle* is one dash with a
tail and a head. A *pivot* is the point one margin before the tail, from which the head is chosen on a circle. A
*heading* is a whole degree (0..359, from -180 degrees on), or 360 + k for the k-th point of that circle.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SUPERSAMPLE = 2  # paddles and discs are drawn at twice the size and reduced by a Lanczos filter
DEGREES = 360  # the first paddle of a snake points in a whole number of degrees


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Parameters of one image size, in pixels; contrasts apply before the brightest level becomes 255."""

    size: int
    seed_distance: int  # between the first tails of the two target snakes
    marker_radius: float  # of the discs
    paddle: int  # length of a dash
    thickness: float
    margin: int  # gap around a paddle
    continuity: float  # how fast the weight of a turn falls with its angle
    distractor_paddles: int  # in all distractors together, before any fails to fit
    target_contrast: float
    distractor_contrast: float


# Published parameters (LRA's at 32, 64 and 128 px). Where there are two, each image draws one.
GEOMETRIES = {
    32: [Geometry(size=32, seed_distance=7, marker_radius=1.5, paddle=2, thickness=0.5, margin=1,
                  continuity=1.0, distractor_paddles=20, target_contrast=1.5, distractor_contrast=2.0)],
    64: [Geometry(size=64, seed_distance=12, marker_radius=2.5, paddle=5, thickness=1, margin=1,
                  continuity=1.8, distractor_paddles=22, target_contrast=0.8, distractor_contrast=0.8)],
    128: [Geometry(size=128, seed_distance=20, marker_radius=3, paddle=5, thickness=1.5, margin=margin,
                   continuity=1.8, distractor_paddles=35, target_contrast=0.9, distractor_contrast=0.9)
          for margin in (2, 3)],
}  # fmt: skip


class Tables(NamedTuple):
    """What the kernels read; p and d are odd sides of small squares."""

    target: np.ndarray  # (headings, p, p) float64 levels of a target's paddle, its outer end centred
    distractor: np.ndarray  # the same of a distractor's paddle
    area: np.ndarray  # the same of the space that a paddle and its margin occupy
    reach: np.ndarray  # (headings, 2) from a pivot to the next one,
    slip: np.ndarray  # (headings, 2) and one further if the coordinate is below this
    ahead: np.ndarray  # (360, 2) from a first tail to its head
    behind: np.ndarray  # (360, 2) from that head to the pivot
    candidates: np.ndarray  # (k, 2) from a pivot to each possible next head
    weight: np.ndarray  # (headings, k) float64, of each candidate given the present heading
    ring: np.ndarray  # (360, 2) from the first seed to the second
    near: np.ndarray  # (m, 2) the disc of radius `margin`
    marker: np.ndarray  # (d, d) float64 grey levels of a disc
    size: int
    room: np.ndarray  # (360, 4) top, left, height, width of where the first snake may start
    stencil: np.ndarray  # (360, m, 2) pixels a first paddle needs free, from its tail; the last is repeated
    plantable: np.ndarray  # (360,) bool, headings the published program can start a snake with


def lanczos(image: np.ndarray, n: int) -> np.ndarray:
    """Reduce a square image of 0..255 to n x n: Lanczos-3 by axis, each rounded to 8 bits (as in Pillow)."""
    scale = len(image) / n
    x = (np.arange(len(image)) + 0.5 - (np.arange(n)[:, None] + 0.5) * scale) / scale
    weight = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    weight /= weight.sum(1, keepdims=True)
    for _ in range(2):
        image = np.clip(np.floor(image @ weight.T + 0.5 + 1e-9), 0, 255).T
    return image.astype(np.int64)


def _shift(angle: np.ndarray, distance: float) -> np.ndarray:
    """(row, column) steps of a distance along angles (radians), rounded up as in the published program."""
    return np.ceil(distance * np.stack([np.sin(angle), np.cos(angle)], -1) - 1e-9).astype(np.int64)


def _slip(angle: float, distance: float) -> list[int]:
    """Per axis, the coordinate below which round-off adds one pixel to a step of zero.

    The published program rounds x + distance * cos(90 degrees) up, and that cosine is 6e-17: near the top and left
    edges, where x is a float small enough to feel it, curves along the wall are pushed off it.
    """
    steps = distance * math.sin(angle), distance * math.cos(angle)
    return [next(x for x in range(99) if x + d == x) if 0 < d < 1e-9 else -99 for d in steps]


def _disc(radius: int) -> np.ndarray:
    """Lattice points (row, column) within a radius of the origin."""
    side = np.arange(-radius, radius + 1)
    points = np.stack(np.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
    return points[(points**2).sum(1) <= radius**2]


def _paddle(angle: float, g: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels and occupancy of a paddle that starts at the centre of a square and runs along `angle`."""
    half = g.paddle + math.ceil(g.thickness) + g.margin
    centre, n, width = half * SUPERSAMPLE, 2 * half + 1, round(g.thickness * SUPERSAMPLE)
    end = _shift(np.array(angle), g.paddle * SUPERSAMPLE)
    y, x = np.mgrid[: 2 * centre + 1, : 2 * centre + 1] - centre
    if width == 1:
        points = np.abs(end) * np.arange(np.abs(end).max() + 1)[:, None] / np.abs(end).max()
        drawn = np.zeros(y.shape, bool)
        drawn[tuple((np.sign(end) * np.floor(points + 0.5).astype(int) + centre).T)] = True
    else:
        length = math.hypot(*end)
        along = (y * end[0] + x * end[1]) / length + 1e-6
        across = (x * end[0] - y * end[1]) / length + 1e-6  # half open: an even width has no middle row
        drawn = (0 <= along) & (along <= length + 2e-6) & (-width / 2 <= across) & (across < width / 2)
    spread = np.zeros(np.add(drawn.shape, 2 * g.margin * SUPERSAMPLE), bool)
    for dy, dx in _disc(g.margin * SUPERSAMPLE) + g.margin * SUPERSAMPLE:
        spread[dy : dy + len(drawn), dx : dx + len(drawn)] |= drawn
    inner = slice(g.margin * SUPERSAMPLE, g.margin * SUPERSAMPLE + len(drawn))
    return lanczos(255.0 * drawn, n), lanczos(255.0 * spread[inner, inner], n)


def _stencils(area: np.ndarray, reach: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels a first paddle needs free, and the headings that can be planted.

    Published: it looks one pixel below and right of where it then draws, and finds no free pixel at all if from some
    pixel the whole stencil falls outside the image, which at 32 px leaves only headings up and to the left.
    """
    half = area.shape[1] // 2
    window = area[:DEGREES, half - reach - 1 : half + reach, half - reach - 1 : half + reach] == 255
    points = [np.argwhere(solid) - reach for solid in window]
    corners = (size - 1) * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    targets = [corners[:, None] + p for p in points]
    plantable = [((0 <= t) & (t < size)).all(-1).any(-1).all() for t in targets]
    longest = max(map(len, points))
    return np.array([np.pad(p, ((0, longest - len(p)), (0, 0)), "edge") for p in points]), np.array(plantable)


def tables(g: Geometry) -> Tables:
    """Tabulate every angle, distance and shape the kernels need."""
    degrees = np.deg2rad(np.arange(DEGREES) - 180)
    step = g.paddle + g.margin
    angles = np.arange(0, 2 * np.pi, 1 / step)  # one pixel of arc apart
    circle = np.floor(step * np.stack([np.sin(angles), np.cos(angles)], -1) + 1e-9).astype(np.int64)
    candidates = np.unique(circle, axis=0)
    headings = np.concatenate([degrees, np.arctan2(candidates[:, 0], candidates[:, 1])])
    turn = np.abs(headings[:, None] - headings[None, DEGREES:])
    turn = np.minimum(turn, 2 * np.pi - turn)
    weight = np.where(g.continuity * turn < np.pi / 2 - 1e-9, np.cos(g.continuity * turn) ** 2, 0)
    drawn = np.concatenate([degrees, headings[DEGREES:] + np.pi])  # from the head back
    line, area = (np.stack(shapes) for shapes in zip(*(_paddle(angle, g) for angle in drawn), strict=True))
    stencil, plantable = _stencils(area, step, g.size)
    border = 2 * g.seed_distance  # the first paddle keeps this far from the edge: its spots are a rectangle
    corner, extent = border - stencil.min(1), g.size - 2 * border - np.ptp(stencil, axis=1)

    def level(shape: np.ndarray, contrast: float) -> np.ndarray:  # published: kept in single precision
        return (shape / 255 * contrast).astype(np.float32).astype(np.float64)

    half = math.ceil(g.marker_radius) + 3  # published: a disc is centred on the top left sub-pixel of the middle one
    y, x = np.mgrid[: (2 * half + 1) * SUPERSAMPLE, : (2 * half + 1) * SUPERSAMPLE] - half * SUPERSAMPLE
    disc = y**2 + x**2 <= (g.marker_radius * SUPERSAMPLE) ** 2
    ring = np.stack([np.sin(degrees), np.cos(degrees)], -1) * g.seed_distance
    return Tables(
        target=level(line, g.target_contrast),
        distractor=level(line, g.distractor_contrast),
        area=level(area, 1),
        reach=_shift(headings, g.paddle + 2 * g.margin),
        slip=np.array([_slip(angle, g.paddle + 2 * g.margin) for angle in headings]),
        ahead=_shift(degrees, g.paddle),
        behind=_shift(degrees + np.pi, step),
        candidates=candidates,
        weight=weight,
        ring=np.floor(ring + 0.5 + 1e-9).astype(np.int64),
        near=_disc(g.margin),
        marker=lanczos(255.0 * disc, 2 * half + 1) / 255,
        size=g.size,
        room=np.concatenate([corner, extent], 1),
        stencil=stencil,
        plantable=plantable,
    )


@functools.cache
def tables_of(size: int) -> tuple[Tables, Tables]:
    """The tables of both geometries of an image size: always two, so that the kernels are compiled once."""
    each = [tables(geometry) for geometry in GEOMETRIES[size]]
    return each[0], each[-1]
