"""Do the generators draw what the published programs draw? `python -m tests.tasks.fidelity FOLDER`.

FOLDER holds samples of the published programs: listops_reference_1000.tsv.gz (ListOps in its file format) and
pathfinder32_reference.npz (images_L uint8 (n, 32, 32) and labels_L for contour length L). The samples are not part of
this repository; the report is: results/reference/bench/fidelity.json and .md.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lra.machine import set_threads
from lra.records.markup import Grid, markdown
from lra.scaling.reports import machine_line, write_report
from tasks import listops, pathfinder
from tasks.base import SourceError
from tasks.listops.expressions import CLOSE, MIN, SYMBOLS, read_tsv
from tasks.pathfinder import locate_discs
from tasks.store.files import one_line

LISTOPS, PATHFINDER = "listops_reference_1000.tsv.gz", "pathfinder32_reference.npz"
OURS = {"ListOps": 5000, "Pathfinder": 8000}  # samples compared with the reference
INKED = 60  # grey level above which a pixel counts as drawn
HASHED = 64  # samples of seed 0 that a hash covers
ALPHA = 0.01  # of all two-sample tests of a generator together
TRAIN, TEST = 40_000, 8_000  # of our images: what the network is trained and tested on
FOLDS = 4  # of the published images, which are few
SHIFT = 2  # pixels that a batch is moved by, at most, where images are few
RESULTS = Path(__file__).parents[2] / "results" / "reference"


def run(folder: Path, results: Path = RESULTS) -> None:
    """Measure and write the report."""
    set_threads(1)
    expressions, images = read_reference(folder)  # before anything is measured
    measured = {"hashes": hashes(), "listops": compare_listops(*expressions)}
    measured["pathfinder"] = {n: compare_pathfinder(int(n), *pair) for n, pair in images.items()}
    measured["shortcuts"] = shortcuts(*images["14"])
    measured["learning"] = learn(*images["14"])
    command = "python -m tests.tasks.fidelity FOLDER"
    write_report(results, "fidelity", command, measured, fidelity_tables(measured, command))


def read_reference(folder: Path) -> tuple[tuple, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """ListOps expressions with labels, and images with labels by contour length. SourceError if one is not there."""
    expressions = read_tsv(Path(folder) / LISTOPS)
    path = Path(folder) / PATHFINDER
    try:
        with np.load(path, allow_pickle=False) as file:
            return expressions, {n: (file[f"images_{n}"], file[f"labels_{n}"]) for n in ("14", "6")}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise SourceError(f"{path}: not the reference images ({one_line(error)})") from None


def hashes() -> dict[str, str]:
    """sha256 of the first samples of seed 0 of every generator and setting: the same on every platform."""
    digests = {"ListOps": hashlib.sha256()}
    for tokens, label in zip(*listops.generate(HASHED, seed=0), strict=True):
        digests["ListOps"].update(tokens.astype("<u2").tobytes() + bytes([label]))
    for size in (32, 64, 128):
        for length in (6, 9, 14):
            images, labels = pathfinder.generate(HASHED, seed=0, size=size, contour_length=length)
            name = f"Pathfinder {size} px, contour {length}"
            digests[name] = hashlib.sha256(images.tobytes() + labels.tobytes())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def tree_statistics(tokens: np.ndarray) -> dict[str, float]:
    """One expression: length, depth, root, mean arity of its operators, share of each kind of operator."""
    parent, arity, deepest = [], [], 1
    kinds = []
    for token in tokens.tolist():
        if token == CLOSE:
            parent.pop()
            continue
        if parent:
            arity[parent[-1]] += 1
        deepest = max(deepest, len(parent) + 1)
        if token >= MIN:
            parent.append(len(arity))
            arity.append(0)
            kinds.append(token - MIN)
    shares = np.bincount(kinds, minlength=4) / len(kinds)
    names = [symbol[1:] for symbol in SYMBOLS[MIN:CLOSE]]
    facts = {"length": len(tokens), "depth": deepest, "operators": len(kinds), "mean arity": np.mean(arity)}
    facts |= {"root operator": kinds[0], "root arity": arity[0]}
    return facts | {f"share of {name}": share for name, share in zip(names, shares, strict=True)}


def compare_listops(sequences: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, Any]:
    """Two-sample tests of ours against the reference. Each tree gives one number, so that samples are independent."""
    ours, theirs = _our_trees(OURS["ListOps"]), _trees(sequences, labels)
    return compare(ours, theirs, categories=("depth", "root operator", "root arity", "label"))


def _trees(sequences: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    facts = list(map(tree_statistics, sequences))
    return {name: np.array([tree[name] for tree in facts]) for name in facts[0]} | {"label": labels}


@functools.cache
def _our_trees(count: int) -> dict[str, np.ndarray]:
    return _trees(*listops.generate(count, seed=0))


def compare(
    ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], categories: Sequence[str] = ()
) -> dict[str, Any]:
    """Means, standard deviations and a p-value of each statistic: chi-square for categories, else Kolmogorov-Smirnov.

    `passed`: the smallest p-value, times the number of tests (Bonferroni), is above ALPHA.
    """
    from scipy import stats

    rows = {}
    for name, a in ours.items():
        b = theirs[name]
        if name in categories:
            kinds = np.union1d(a, b)
            table = np.stack([(x[:, None] == kinds).sum(0) for x in (a, b)])
            rare = table.sum(0) < 20
            if rare.any():
                table = np.column_stack([table[:, ~rare], table[:, rare].sum(1)])
            p = stats.chi2_contingency(table).pvalue
        else:
            p = stats.ks_2samp(a, b).pvalue
        rows[name] = {"ours": _moments(a), "published": _moments(b), "p": round(float(p), 6)}
    smallest = min(row["p"] for row in rows.values())
    return {"samples": [len(a), len(b)], "tests": rows, "passed": bool(smallest * len(rows) > ALPHA)}


def _moments(x: np.ndarray) -> list[float]:
    return [round(float(x.mean()), 4), round(float(x.std(ddof=1)), 4)]


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """Per image: ink, discs, parts, levels, and how straight the ink runs over 5 and 9 pixels.

    Parts are 8-connected regions of drawn pixels: every distractor placed adds its dashes. Straightness is the
    coherence of the structure tensor, averaged over drawn pixels: 1 where all gradients of a window are parallel,
    lower the more the curves bend or cross in it.
    """
    from scipy import ndimage

    flat = images.reshape(len(images), -1)
    y1, x1, y2, x2 = locate_discs(images).T
    drawn = images > INKED
    parts = [ndimage.label(image, np.ones((3, 3)))[1] for image in drawn]
    facts = {
        "ink (mean level)": flat.mean(1), "standard deviation": flat.std(1), "drawn pixels": drawn.sum((1, 2)),
        "separate parts": np.array(parts), "distance of the discs": np.hypot(y1 - y2, x1 - x2),
    }  # fmt: skip
    edges = [1, 64, 128, 170, 192, 224, 256]
    for low, high in zip(edges, edges[1:]):
        facts[f"pixels of level {low}-{high - 1}"] = ((flat >= low) & (flat < high)).sum(1)
    dy, dx = np.gradient(images.astype(np.float32), axis=(1, 2))
    for side in (5, 9):
        yy, xx, xy = (ndimage.uniform_filter(p, (1, side, side)) for p in (dy * dy, dx * dx, dy * dx))
        coherence = np.hypot(yy - xx, 2 * xy) / np.maximum(yy + xx, 1e-6)
        facts[f"straightness over {side} px"] = (coherence * drawn).sum((1, 2)) / drawn.sum((1, 2))
    return {name: np.asarray(values, np.float64) for name, values in facts.items()}


def compare_pathfinder(length: int, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Two-sample tests of our images of a contour length against the reference."""
    ours, theirs = _our_images(OURS["Pathfinder"], length), image_statistics(images) | {"label": labels}
    return compare(ours, theirs, categories=("separate parts", "label"))


@functools.cache
def _our_images(count: int, length: int) -> dict[str, np.ndarray]:
    drawn, values = pathfinder.generate(count, seed=0, contour_length=length)
    return image_statistics(drawn) | {"label": values}


# What a learner gets out of Pathfinder images

Score = Callable[[np.ndarray, np.ndarray], float]  # accuracy of something fitted, on images and their labels


def shortcuts(images: np.ndarray, labels: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Accuracy, and two standard errors, of simple readings of the image that follow no curve."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression, RidgeClassifier

    def ink(x):
        flat = x.reshape(len(x), -1) / 255
        return np.column_stack([flat.mean(1), flat.std(1), (flat > 0.25).mean(1)])

    def distance(x):
        y1, x1, y2, x2 = locate_discs(x).T
        return np.hypot(y1 - y2, x1 - x2)[:, None]

    def trees():
        return HistGradientBoostingClassifier(early_stopping=False, random_state=0)

    readings = {
        "logistic regression on ink": (ink, LogisticRegression),
        "linear classifier of the pixels": (lambda x: x.reshape(len(x), -1) / 255, lambda: RidgeClassifier(100.0)),
        "boosted trees on the discs' distance": (distance, trees),
        "boosted trees on the discs' places": (locate_discs, trees),
    }  # fmt: skip
    ours = pathfinder.generate(4 * TEST, seed=2)
    rows = {}
    for name, (read, make) in readings.items():
        x, y = read(ours[0]), ours[1]
        mine = float(make().fit(x[TEST:], y[TEST:]).score(x[:TEST], y[:TEST]))
        x = read(images)
        right = sum((make().fit(x[f], labels[f]).predict(x[t]) == labels[t]).sum() for f, t in folds(len(x)))
        pairs = {"ours": (mine, TEST), "published": (float(right / len(x)), len(x))}
        rows[name] = {who: [round(a, 4), round((a * (1 - a) / n) ** 0.5 * 2, 4)] for who, (a, n) in pairs.items()}
    return rows


def folds(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) indices of FOLDS-fold cross-validation; samples are in random order already."""
    parts = np.array_split(np.arange(n), FOLDS)
    return [(np.concatenate(parts[:k] + parts[k + 1 :]), parts[k]) for k in range(FOLDS)]


def learn(images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Learners trained on ours and on the published images, each tested on both; and one that tells them apart."""
    x, y = pathfinder.generate(TRAIN + TEST, seed=1)
    right = []
    for train, test in folds(len(images)):
        both = [np.concatenate([images[part], x[part]]) for part in (train, test)]
        source = [np.repeat([0, 1], len(part)) for part in (train, test)]
        right.append(fit(both[0], source[0], epochs=10)(both[1], source[1]))
    transfer = {}
    for name, learner in {"network": fit, "trees on the discs' places": fit_trees}.items():
        score = learner(x[TEST:], y[TEST:], epochs=6)
        transfer[f"{name}, trained on ours"] = (
            (score(x[:TEST], y[:TEST]), TEST), (score(images, labels), len(images))
        )  # fmt: skip
        own, others = [], []
        for train, test in folds(len(images)):
            score = learner(images[train], labels[train], epochs=60, shift=SHIFT)
            own.append(score(images[test], labels[test]))
            others.append(score(x[:TEST], y[:TEST]))
        transfer[f"{name}, trained on published"] = (np.mean(own), len(images)), (np.mean(others), TEST)
    return {"transfer": {k: [[round(float(a), 4), n] for a, n in pairs] for k, pairs in transfer.items()},
            "told apart": [round(float(np.mean(right)), 4), 2 * len(images)]}  # fmt: skip


def fit_trees(images: np.ndarray, labels: np.ndarray, **_: Any) -> Score:
    """Boosted trees that see where the discs are: a learner that needs fewer images than the network."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    trees = HistGradientBoostingClassifier(early_stopping=False, random_state=0, max_leaf_nodes=8)
    trees.fit(locate_discs(images), labels)
    return lambda x, y: float(trees.score(locate_discs(x), y))


def network() -> nn.Module:
    """Three convolutions, whose 8 x 8 map a small perceptron reads: 0.15 million parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, 2, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1),
        nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(2048, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 2),
    )  # fmt: skip


def fit(images: np.ndarray, labels: np.ndarray, *, epochs: int, shift: int = 0, batch: int = 64) -> Score:
    """The network after AdamW with one rise and fall of the learning rate, seeded; batches moved by 0..shift pixels."""
    torch.manual_seed(0)
    model, pixels = network(), scale(images)
    answers = torch.from_numpy(labels.astype(np.int64))
    steps = len(pixels) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps * epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels))[: steps * batch].split(batch):
            moved = torch.randint(-shift, shift + 1, (2,)).tolist()
            loss = F.cross_entropy(model(pixels[chosen].roll(moved, (2, 3))), answers[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()

    @torch.no_grad()
    def score(x: np.ndarray, y: np.ndarray) -> float:
        answers = torch.cat([model(part).argmax(1) for part in scale(x).split(1000)])
        return float((answers.numpy() == y).mean())

    return score


def scale(images: np.ndarray) -> torch.Tensor:
    """Grey levels as (n, 1, side, side) float32 around zero."""
    return torch.from_numpy(images[:, None].astype(np.float32) / 255 - 0.08)


# The report for people


def fidelity_tables(m: dict[str, Any], command: str) -> str:
    """The report for people."""
    titles = {"ListOps": m["listops"]}
    titles |= {f"Pathfinder, 32 px, contour {n}": compared for n, compared in m["pathfinder"].items()}
    shortcuts = [
        [name, *(f"{100 * row[who][0]:.1f} ± {100 * row[who][1]:.1f}" for who in ("ours", "published"))]
        for name, row in m["shortcuts"].items()
    ]
    transfer = [
        [name, *(f"{100 * value:.1f} ± {100 * two_errors(n):.1f}" for value, n in pairs)]
        for name, pairs in m["learning"]["transfer"].items()
    ]
    right, n = m["learning"]["told apart"]
    return f"""Made by `{command}`; FOLDER holds samples of the published programs.

{"".join(compared_table(title, compared) for title, compared in titles.items())}\
### What tells the label without following a curve (contour 14)

{markdown([Grid(["accuracy, %", "ours", "published"], shortcuts)])}
± two standard errors. The published column: cross-validated, on few images. Chance is 50.

### Trained on one, tested on both (contour 14)

{markdown([Grid(["accuracy, %", "on unseen images of its own", "on the others"], transfer)])}
The trees see where the discs are, the network the image. The network trained to tell ours from
published: {100 * right:.1f} ± {100 * two_errors(n):.1f} on unseen images; 50: it cannot.

### sha256 of the first {HASHED} samples of seed 0

{markdown([Grid(["generator", "sha256"], list(m["hashes"].items()))])}
{machine_line()}
"""


def compared_table(title: str, compared: dict[str, Any]) -> str:
    """The tests of one generator."""
    ours, theirs = compared["samples"]
    verdict = "none of them differs" if compared["passed"] else "**they differ**"
    rows = [
        [name, *("{:.4g} ± {:.3g}".format(*row[who]) for who in ("ours", "published")), f"{row['p']:.3f}"]
        for name, row in compared["tests"].items()
    ]
    return f"""### {title}

{ours:,} of ours, {theirs:,} published; at {ALPHA:.0%} over all: {verdict}.

{markdown([Grid(["mean ± sd", "ours", "published", "p"], rows)])}
"""


def two_errors(n: int) -> float:
    """Two standard errors of a share near one half, of n samples."""
    return 2 * (0.25 / n) ** 0.5


if __name__ == "__main__":
    run(Path(sys.argv[1]))
