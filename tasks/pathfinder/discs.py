"""Where Pathfinder's discs are, as seen in the pixels, and how much of the label that alone gives away."""

import math

import numpy as np

from tasks.pathfinder.paddles import GEOMETRIES


def locate_discs(images: np.ndarray) -> np.ndarray:
    """Row and column of the discs as seen in the pixels, the upper one first: int64 (n, 4).

    A disc is taken to be where a whole square is brightest; at 32 px 99% are found to within two pixels.
    """
    n, size, _ = images.shape
    core = math.ceil(1.5 * GEOMETRIES[size][0].marker_radius)
    side = size - core + 1
    solid = np.full((n, side, side), 255, np.uint8)
    for i in range(core):
        for j in range(core):
            np.minimum(solid, images[:, i : i + side, j : j + side], out=solid)
    spots = np.empty((n, 2), np.int64)
    for k in range(2):
        spots[:, k] = solid.reshape(n, -1).argmax(1)
        place = np.stack(np.divmod(spots[:, k], side))[:, :, None]
        near_y, near_x = np.abs(np.arange(side) - place) < core
        solid[near_y[:, :, None] & near_x[:, None, :]] = 0
    return np.stack(np.divmod(np.sort(spots, 1), side), -1).reshape(n, 4)


def disc_places(images: dict[str, np.ndarray], labels: dict[str, np.ndarray], factor: int) -> float:
    """Test accuracy of boosted trees that see where the discs are, to `factor` pixels, and no curve.

    The published images give that much away: the first curve starts in the middle and up to the left, the
    second at a fixed distance from it, so where both ends of one curve lie is not where ends of two do.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    trees = HistGradientBoostingClassifier(early_stopping=False, random_state=0)
    trees.fit(locate_discs(images["train"][:50_000]) // factor, labels["train"][:50_000])
    return float(trees.score(locate_discs(images["test"]) // factor, labels["test"]))
