"""Kernels that draw Pathfinder images: two long dashed curves, short distractors, two discs.

Outline and parameters are those of the published generator (Linsley et al. 2018, arXiv 1805.08315; program
drewlinsley/pathfinder at ab9c130), written anew. Terms are those of tasks/pathfinder/paddles.py. A *snake* is a dashed
curve: rows of (heading, row and column of the paddle's outer end, row and column of its pivot). Odd traits of the
published program are kept where they shape its images, and marked "published".

Arguments that all kernels share:

    t           a paddles.Tables
    mask        occupancy of each pixel, float64 (size, size), 0 to 1
    cumulative  scratch for the weights of the next head, float64 (candidates,)
    rng         the state of a stream (see tasks/store/rng.py)
"""

import numpy as np

from tasks.pathfinder.paddles import DEGREES
from tasks.store.rng import below, kernel, stream, uniform

TRIALS = 3  # attempts at placing one paddle
SNAKE_TRIALS = 5  # attempts at placing one distractor
TAKEN = 0.3  # occupancy above this is not free
CLASH = 1.8  # two occupancies that add up to this overlap


@kernel
def _inside(n, y, x):
    return 0 <= y < n and 0 <= x < n


@kernel
def _stamp(canvas, shape, y, x):
    """Draw `shape` centred on (y, x) where it is brighter than the canvas."""
    n, half = canvas.shape[0], shape.shape[0] // 2
    for i in range(max(0, half - y), min(shape.shape[0], n - y + half)):
        for j in range(max(0, half - x), min(shape.shape[0], n - x + half)):
            canvas[y + i - half, x + j - half] = max(canvas[y + i - half, x + j - half], shape[i, j])


@kernel
def _clashes(mask, shape, y, x):
    """Does `shape` centred on (y, x) overlap what is occupied?"""
    n, half = mask.shape[0], shape.shape[0] // 2
    for i in range(max(0, half - y), min(shape.shape[0], n - y + half)):
        for j in range(max(0, half - x), min(shape.shape[0], n - x + half)):
            if mask[y + i - half, x + j - half] + shape[i, j] >= CLASH:
                return True
    return False


@kernel
def _free(mask, stencil):
    """Pixels from which the stencil, as far as it is inside, meets nothing, by flat index and in order."""
    n, taken, blocked = len(mask), np.empty(mask.shape, np.uint8), np.zeros(mask.shape, np.uint8)
    for y, x in np.ndindex(mask.shape):
        taken[y, x] = mask[y, x] > TAKEN
    for i in range(len(stencil)):  # one step of it over whole rows: that becomes vector instructions
        dy, dx = stencil[i, 0], stencil[i, 1]
        left, right = max(0, -dx), min(n, n - dx)
        for y in range(max(0, -dy), min(n, n - dy)):
            to, of = blocked[y, left:right], taken[y + dy, left + dx : right + dx]
            for x in range(len(to)):
                to[x] |= of[x]
    return np.flatnonzero(blocked == 0)


@kernel
def _plant(snake, t, heading, y, x):
    """Start a snake with a paddle at tail (y, x); False if it would leave the image."""
    head_y, head_x = y + t.ahead[heading, 0], x + t.ahead[heading, 1]
    pivot_y, pivot_x = head_y + t.behind[heading, 0], head_x + t.behind[heading, 1]
    snake[0], snake[1], snake[2], snake[3], snake[4] = heading, y, x, pivot_y, pivot_x
    return _inside(t.size, head_y, head_x) and _inside(t.size, pivot_y, pivot_x)


@kernel
def _second(snake, first, t, rng):
    """Start the second target snake at the seed distance from the first; False if no trial stays inside."""
    for _ in range(TRIALS):
        heading, spoke = below(rng, DEGREES), below(rng, DEGREES)
        if _plant(snake, t, heading, first[1] + t.ring[spoke, 0], first[2] + t.ring[spoke, 1]):
            return True
    return False


@kernel
def _seed(snake, mask, t, alone, rng):
    """Start a snake anywhere free, or the first one of an image, `alone` and off the edge (t.room); False: no place."""
    for _ in range(TRIALS):
        heading = below(rng, DEGREES)
        if not t.plantable[heading]:
            return False
        if alone:
            top, left, height, width = t.room[heading]
            y, x = divmod(below(rng, height * width), width)
            y, x = top + y, left + x
        else:
            spots = _free(mask, t.stencil[heading])
            if len(spots) == 0:
                return False
            y, x = divmod(spots[below(rng, len(spots))], t.size)
        if _plant(snake, t, heading, y, x):
            return True
    return False


@kernel
def _taken(mask, near, y, x):
    """Highest occupancy within a margin of (y, x)."""
    n, highest = mask.shape[0], 0.0
    for i in range(len(near)):
        row, col = y + near[i, 0], x + near[i, 1]
        if _inside(n, row, col):
            highest = max(highest, mask[row, col])
    return highest


@kernel
def _grow(path, i, mask, t, cumulative, rng):
    """Add paddle i to a snake, and occupy the space of paddle i - 1; False if there is no room."""
    old, new, total, n = path[i - 1], path[i], 0.0, mask.shape[0]
    heading = old[0]
    pivot_y = old[3] + t.reach[heading, 0] + (old[3] < t.slip[heading, 0])
    pivot_x = old[4] + t.reach[heading, 1] + (old[4] < t.slip[heading, 1])
    for k in range(len(t.candidates)):
        y, x = pivot_y + t.candidates[k, 0], pivot_x + t.candidates[k, 1]
        if t.weight[heading, k] > 0.0 and _inside(n, y, x) and mask[y, x] < 1.0:
            total += t.weight[heading, k] * (1.0 - _taken(mask, t.near, y, x))
        cumulative[k] = total
    if total < 1e-4:
        return False
    for _ in range(TRIALS):
        draw, k = uniform(rng) * total, 0
        while cumulative[k] <= draw:
            k += 1
        y, x = pivot_y + t.candidates[k, 0], pivot_x + t.candidates[k, 1]
        if not _clashes(mask, t.area[DEGREES + k], y, x):
            _stamp(mask, t.area[heading], old[1], old[2])
            new[0], new[1], new[2], new[3], new[4] = DEGREES + k, y, x, pivot_y, pivot_x
            return True
    return False


@kernel
def _targets(paths, mask, t, cumulative, rng):
    """Grow the two target snakes by turns into an empty image; False to start again."""
    mask[:] = 1.0  # one pixel of padding all around
    mask[1:-1, 1:-1] = 0.0
    if not _seed(paths[0, 0], mask, t, True, rng) or not _second(paths[1, 0], paths[0, 0], t, rng):
        return False
    for i in range(1, paths.shape[1]):
        for s in range(2):
            if not _grow(paths[s], i, mask, t, cumulative, rng):
                return False
    last = paths[1, -1]  # published: the first snake's last paddle is left out
    _stamp(mask, t.area[last[0]], last[1], last[2])
    return True


@kernel
def _distractor(path, mask, t, cumulative, rng):
    """Grow one short snake where there is room; False leaves the mask as it was."""
    before = mask.copy()
    for _ in range(SNAKE_TRIALS):
        if not _seed(path[0], mask, t, False, rng):
            continue
        grown = True
        for i in range(1, len(path)):
            grown = grown and _grow(path, i, mask, t, cumulative, rng)
        if grown:
            _stamp(mask, t.area[path[-1, 0]], path[-1, 1], path[-1, 2])
            return True
        for y, x in np.ndindex(mask.shape):  # numba takes ten seconds to compile mask[:] = before
            mask[y, x] = before[y, x]
    return False


@kernel
def _matched(paths):
    """Whether both snakes end at the same offset from where the first one starts, up to turns and mirrors."""
    y, x = paths[0, 0, 1], paths[0, 0, 2]
    dy0, dx0 = abs(paths[0, -1, 1] - y), abs(paths[0, -1, 2] - x)
    dy1, dx1 = abs(paths[1, -1, 1] - y), abs(paths[1, -1, 2] - x)
    return (dy0 == dy1 and dx0 == dx1) or (dy0 == dx1 and dx0 == dy1)


@kernel
def _turn(image, k, y, x):
    """Apply the k-th of the eight symmetries of the square about pixel (y, x); what leaves the image is lost."""
    before, size = image.copy(), len(image)
    image[:] = 0
    for row, column in np.ndindex(before.shape):
        dy, dx = y - row if k & 1 else row - y, x - column if k & 2 else column - x
        if k & 4:
            dy, dx = dx, dy
        if _inside(size, y + dy, x + dx):
            image[y + dy, x + dx] = before[row, column]


@kernel
def draw(seed, start, tables, distractors, matched, images, labels, paths, discs):
    """Fill the arrays, n long, with images start, start + 1, ... of a seed; each draws one of the `tables`.

    images   grey levels, uint8 (n, size, size)
    labels   uint8 (n,), 1 if one snake joins the discs
    paths    the paddles of either target snake, first to last, int64 (n, 2, contour_length, 5)
    discs    the centre of each disc, int64 (n, 2, 2)
    matched  one disc is where the first snake starts. Both snakes end at the same offset from it, up to the
             symmetries of the square. The image is then turned about that disc by a random one of them
             (labels, paths and discs are not): only the curves tell the label.
    """
    size = images.shape[1]
    mask, path = np.empty((size, size)), np.zeros((paths.shape[2] // 3, 5), np.int64)
    for n in range(len(images)):
        rng, targets = stream(seed, start + n), paths[n]
        label = below(rng, 2)
        t = tables[below(rng, len(tables))]
        cumulative, canvas = np.empty(len(t.candidates)), np.zeros((size, size))
        while not _targets(targets, mask, t, cumulative, rng) or (matched and not _matched(targets)):
            pass
        for s in range(2):
            for i in range(targets.shape[1]):
                _stamp(canvas, t.target[targets[s, i, 0]], targets[s, i, 1], targets[s, i, 2])
        for _ in range(distractors):
            if _distractor(path, mask, t, cumulative, rng):
                for i in range(len(path)):
                    _stamp(canvas, t.distractor[path[i, 0]], path[i, 1], path[i, 2])
        first = 0 if matched else below(rng, 2)
        last = first if label else 1 - first
        labels[n] = label
        for axis in range(2):
            discs[n, 0, axis] = targets[first, 0, 1 + axis]
            discs[n, 1, axis] = targets[last, -1, 1 + axis]
        for k in range(2):
            _stamp(canvas, t.marker, discs[n, k, 0], discs[n, k, 1])
        gain = 255.0 / canvas.max()
        for y, x in np.ndindex(canvas.shape):
            images[n, y, x] = np.uint8(canvas[y, x] * gain + 0.5)
        if matched:
            _turn(images[n], below(rng, 8), discs[n, 0, 0], discs[n, 0, 1])
