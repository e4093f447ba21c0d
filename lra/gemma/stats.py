"""Estimates of the Gemma track, from the counts of test blocks in its records. No torch.

A test block is a cluster: tokens of one text rise and fall together, so intervals count documents, not tokens.
With c_g correct and n_g tokens in cluster g of G, p = sum c / sum n has the variance

    G / (G - 1) sum (c_g - p n_g)^2 / (sum n)^2

and every difference is taken within clusters, on the same tokens.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lra.records.stats import Estimate, Z, mean_sd

Record = dict[str, Any]
SPIKE, WINDOW, LEAST = 5.0, 32, 8  # MADs above the median of the last WINDOW losses, once there are LEAST


def student(clusters: int) -> float:
    """Two-sided 95% quantile of Student's t with clusters - 1 degrees of freedom, by a Cornish-Fisher series.

    The series is right to 1% from 9 clusters on. It is too small below: 4.33 for 12.71 with 2 clusters.
    """
    return Z + (Z**3 + Z) / (4 * (clusters - 1)) if clusters > 1 else math.inf


def ratio(parts: Sequence[tuple[float, float]]) -> Estimate:
    """sum a / sum b over clusters (a_g, b_g), with the variance above; b need not be a count."""
    total = math.fsum(b for _, b in parts)
    value = math.fsum(a for a, _ in parts) / total
    G = len(parts)
    spread = math.sqrt(math.fsum((a - value * b) ** 2 for a, b in parts) * G / max(1, G - 1)) / abs(total)
    half = student(G) * spread
    return Estimate(value, value - half, value + half)


def clusters(runs: Sequence[Record]) -> dict[int, tuple[float, float]]:
    """Document to (correct, tokens), the mean over seeds."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for run in runs:
        for document, n, correct, *_ in run["result"]["blocks"]:
            sums[document][0] += correct / len(runs)
            sums[document][1] += n / len(runs)
    return {d: (c, n) for d, (c, n) in sums.items()}


def widened(estimate: Estimate, runs: Sequence[Record], scale: float = 1.0) -> Estimate:
    """The estimate with the noise of training added: `scale` times that of the seeds' mean accuracy.

    The two are independent: half-width^2 = half-width(text)^2 + half-width(seeds)^2. One seed shows no noise.
    """
    _, sd = mean_sd([accuracy(r) for r in runs])
    noise = student(len(runs)) * (sd or 0.0) / math.sqrt(len(runs)) * scale if len(runs) > 1 else 0.0
    low, high = (math.hypot(abs(edge - estimate.value), noise) for edge in estimate[1:])
    return Estimate(estimate.value, estimate.value - low, estimate.value + high)


def accuracy(run: Record) -> float:
    """The share of test tokens that were predicted right."""
    return run["result"]["n_correct"] / run["result"]["n_test"]


def gap(exact: Sequence[Record], runs: Sequence[Record]) -> Estimate:
    """exact minus method, paired by document."""
    e, m = clusters(exact), clusters(runs)
    return widened(ratio([(e[d][0] - m[d][0], e[d][1]) for d in sorted(e)]), runs)


def recovered(exact, constant, runs) -> Estimate | None:
    """(method - constant) / (exact - constant), paired by document; None where constant does not clearly lose."""
    if gap(exact, constant).low <= 0:
        return None
    e, c, m = clusters(exact), clusters(constant), clusters(runs)
    share = ratio([(m[d][0] - c[d][0], e[d][0] - c[d][0]) for d in sorted(e)])
    return widened(share, runs, 1 / gap(exact, constant).value)


def spikes(losses: Sequence[float | None]) -> int:
    """Steps whose loss exceeds the median of the WINDOW before by more than SPIKE median absolute deviations."""
    count = 0
    for i in range(LEAST, len(losses)):
        before = [x for x in losses[max(0, i - WINDOW) : i] if x is not None]
        if losses[i] is None or len(before) < LEAST:
            continue
        middle = statistics.median(before)
        count += losses[i] > middle + SPIKE * statistics.median(abs(x - middle) for x in before)
    return count
