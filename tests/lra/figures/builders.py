"""Records for tests of figures and of the page, and what can be read of a figure."""

import json
import xml.etree.ElementTree as ET

import numpy as np
from matplotlib.text import Text

from tests.lra.builders import FIVE, answer, put

HOSTILE = "</td></script><script>hacked=1</script><img src=x onerror=hacked=1>\"'>{{7*7}}\u202e&#60;"
CURVE = [[step, split, 1.0, step, 1000] for step in (100, 200, 300) for split in ("train", "val")]


def give_curve(path):
    """Add a learning curve to a record."""
    record = json.loads(path.read_text())
    record["result"]["curve"] = CURVE
    path.write_text(json.dumps(record))


def fill(results, attentions=("softmax", "performer", "linformer"), seeds=2):
    """Records of five tasks, with curves."""
    for n, task in enumerate(FIVE):
        for k, attention in enumerate(attentions):
            for seed in range(seeds):
                path = put(results, task, attention, seed, speed=1 + k, peak=1000 * (k + 1))
                answer(path, np.arange(4000) < 1500 + 100 * n + 70 * k + 40 * seed)
                give_curve(path)


def texts(path):
    """All text of an SVG, parsed as XML."""
    return ["".join(e.itertext()).strip() for e in ET.parse(path).iter() if e.tag.endswith("}text")]


def label_boxes(axes):
    """Where the labels of an axes stand, in pixels."""
    axes.figure.draw_without_rendering()
    return [Text.get_window_extent(text) for text in axes.texts]


def overlapping(boxes):
    """Pairs of boxes that share more than rounding."""
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    return [(a, b) for a, b in pairs if a.padded(-0.5).overlaps(b.padded(-0.5))]


def outside(boxes, area):
    """Boxes that leave an area."""
    area = area.padded(0.5)
    return [b for b in boxes if b.x0 < area.x0 or b.x1 > area.x1 or b.y0 < area.y0 or b.y1 > area.y1]
