"""Estimates of the Gemma track, from the counts of test blocks in its records. No torch.

A test block is a cluster: tokens of one text rise and fall together, so intervals count documents, not tokens.
With c_g correct and n_g tokens in cluster g of G, p = sum c / sum n has the variance

    G / (G - 1) sum (c_g - p n_g)^2 / (sum n)^2,    G - 1 degrees of freedom

and every difference is taken within clusters, on the same tokens. The noise of training is added as in
lra.records.stats, for every method of a gap or a share.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lra.records.stats import ALPHA, Uncertain, combine, holm, training

Record = dict[str, Any]
SPIKE, WINDOW, LEAST = 5.0, 32, 8  # MADs above the median of the last WINDOW losses, once there are LEAST


def ratio(parts: Sequence[tuple[float, float]]) -> Uncertain:
    """sum a / sum b over clusters (a_g, b_g), with the variance above; b need not be a count."""
    total = math.fsum(b for _, b in parts)
    value = math.fsum(a for a, _ in parts) / total
    G = len(parts)
    if G == 1:
        return Uncertain(value, math.inf, math.inf)  # one document shows nothing of the others
    error = math.sqrt(math.fsum((a - value * b) ** 2 for a, b in parts) * G / (G - 1)) / abs(total)
    return Uncertain(value, error, error, G - 1)


def clusters(runs: Sequence[Record]) -> dict[int, tuple[float, float]]:
    """Document to (correct, tokens), the mean over seeds."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for run in runs:
        for document, n, correct, *_ in run["result"]["blocks"]:
            sums[document][0] += correct / len(runs)
            sums[document][1] += n / len(runs)
    return {d: (c, n) for d, (c, n) in sums.items()}


def with_training(text: Uncertain, parts: Sequence[tuple[float, Sequence[Record]]]) -> Uncertain:
    """An estimate with the noise of training of each method's runs; the weights are its derivatives by their means."""
    noise = combine([(weight, training([accuracy(r) for r in runs])) for weight, runs in parts])
    return replace(text, seeds=noise.seeds, seeds_freedom=noise.seeds_freedom)


def accuracy(run: Record) -> float:
    """The share of test tokens that were predicted right."""
    return run["result"]["n_correct"] / run["result"]["n_test"]


def score(runs: Sequence[Record]) -> Uncertain:
    """Mean accuracy of the runs."""
    return replace(with_training(ratio(list(clusters(runs).values())), [(1.0, runs)]), limits=(0.0, 1.0))


def gap(exact: Sequence[Record], runs: Sequence[Record]) -> Uncertain:
    """exact minus method, paired by document."""
    e, m = clusters(exact), clusters(runs)
    return with_training(ratio([(e[d][0] - m[d][0], e[d][1]) for d in sorted(e)]), [(1.0, exact), (-1.0, runs)])


def recovered(exact, floor, runs) -> Uncertain | None:
    """s = (method - floor) / (exact - floor), paired by document; None where the floor does not clearly lose.

    Derivatives of s, which weigh the noise of training: 1, s - 1 and -s by method, floor and exact, each over
    exact - floor.
    """
    distance = gap(exact, floor)
    if distance.low <= 0:
        return None
    e, f, m = clusters(exact), clusters(floor), clusters(runs)
    share = ratio([(m[d][0] - f[d][0], e[d][0] - f[d][0]) for d in sorted(e)])
    if runs == floor or runs == exact:
        return share  # 0 or 1 whatever the runs are
    weights = (1.0, runs), (share.value - 1.0, floor), (-share.value, exact)
    return with_training(share, [(weight / distance.value, method) for weight, method in weights])


def above(floor: Sequence[Record], rows: Sequence[Sequence[Record]]) -> list[bool]:
    """Which rows are significantly above the floor: paired by document, Holm over the rows.

    A row and a trained floor both have several runs, or both have one; else it is not tested. One run beside several
    shows none of its noise. A floor without training has none: it draws nothing.
    """
    still = not floor[0]["training"]["recipe"]
    gaps = [gap(runs, floor) if still or (len(runs) == 1) == (len(floor) == 1) else None for runs in rows]
    adjusted = iter(holm([g.p_value for g in gaps if g]))
    return [g is not None and next(adjusted) < ALPHA and g.value > 0 for g in gaps]


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


def spike_rate(runs: Sequence[Record]) -> float:
    """Spikes per 100 steps."""
    losses = [r["training"]["losses"] for r in runs]
    return 100 * sum(map(spikes, losses)) / max(1, sum(map(len, losses)))


def validation(runs: Sequence[Record]) -> dict[int, list[float]]:
    """Training tokens to the validation accuracy of each run."""
    points: dict[int, list[float]] = defaultdict(list)
    for r in runs:
        for step, _, _, correct, n in r["result"]["curve"]:
            points[step * r["training"]["recipe"]["batch"] * r["task"]["seq_len"]].append(correct / n)
    return points
