"""What Pathfinder's kernels (tasks/pathfinder/snakes.py) do to pixels."""

import numpy as np

from tasks.store.rng import kernel


@kernel
def stamp(canvas, shape, y, x):
    """Draw `shape` centred on (y, x) where it is brighter than the canvas."""
    n, half = canvas.shape[0], shape.shape[0] // 2
    for i in range(max(0, half - y), min(shape.shape[0], n - y + half)):
        for j in range(max(0, half - x), min(shape.shape[0], n - x + half)):
            if shape[i, j] > canvas[y + i - half, x + j - half]:
                canvas[y + i - half, x + j - half] = shape[i, j]


@kernel
def copy(source, target):
    """Copy a square array onto another."""
    for y in range(len(source)):  # numba takes ten seconds to compile target[:] = source
        for x in range(len(source)):
            target[y, x] = source[y, x]


@kernel
def normalise(canvas, image):
    """Scale grey levels so that the brightest is 255."""
    peak = 0.0
    for value in canvas.flat:
        peak = max(peak, value)
    gain = 255.0 / peak
    for y in range(canvas.shape[0]):
        for x in range(canvas.shape[1]):
            image[y, x] = np.uint8(canvas[y, x] * gain + 0.5)


@kernel
def turn(image, k, y, x):
    """Apply the k-th of the eight symmetries of the square about pixel (y, x); what leaves the image is lost."""
    before, size = image.copy(), len(image)
    image[:] = 0
    for row in range(size):
        for column in range(size):
            dy, dx = y - row if k & 1 else row - y, x - column if k & 2 else column - x
            if k & 4:
                dy, dx = dx, dy
            if 0 <= y + dy < size and 0 <= x + dx < size:
                image[y + dy, x + dx] = before[row, column]
