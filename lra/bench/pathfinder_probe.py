"""What a learner gets out of Pathfinder images, ours and published: shortcuts, and a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tasks import pathfinder
from tasks.pathfinder.discs import locate_discs

TRAIN, TEST = 40_000, 8_000  # of our images: what the network is trained and tested on
FOLDS = 4  # of the published images, which are few
SHIFT = 2  # pixels that a batch is moved by, at most, where images are few

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
        rows[name] = {
            who: [round(a, 4), round((a * (1 - a) / n) ** 0.5 * 2, 4)] for who, (a, n) in pairs.items()
        }
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
