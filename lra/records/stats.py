"""Statistics of the results: 95% intervals from raw counts, and tests on stored predictions. No torch.

Two sources of noise are told apart. The test set is a sample of n examples, shared by all seeds and
methods of a column, so more seeds do not make it larger: its noise is Wilson's interval at n, whatever
the number of seeds. Training is random: its noise is the sample sd over seeds. They are combined by
MOVER (Zou & Donner 2008, Statistics in Medicine 27:1693): for independent estimates with intervals
(l_i, u_i), the sum has the lower limit sum_i p_i - sqrt(sum_i (p_i - l_i)^2), the upper one likewise.

Two methods that answered the same test examples are compared example by example: that takes out how hard each
example is. Arrays of answers have the shape (seeds, examples), True where the answer was right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ALPHA = 0.05  # level of every test
Z = 1.959964  # normal quantile of a two-sided 95% interval


class Estimate(NamedTuple):
    """A value between the limits of its 95% interval; accuracies are fractions, not percent."""

    value: float
    low: float
    high: float


def wilson(k: float, n: int, z: float = Z) -> tuple[float, float]:
    """Score interval of a proportion k/n (Wilson 1927, JASA 22:209); k may be a mean of counts.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),    p = k/n

    Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} correct of {n} is not a proportion")
    p = k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, sqrt(sum (x - mean)^2 / (m - 1)); None for a single value."""
    m = len(values)
    mean = math.fsum(values) / m
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (m - 1)) if m > 1 else None


def over_seeds(accuracies: Sequence[float], n: int) -> Estimate:
    """Mean accuracy of m seeds on one test set of n examples, with the noise of both.

        low = p - sqrt((p - wilson_low(p n, n))^2 + (Z sd)^2 / m),    high likewise

    A single seed gives Wilson's interval: its training noise is unknown and not in it. For few seeds Z is
    short of Student's quantile; by simulation (3 seeds, n 4,000, p 0.34, 100,000 draws) the interval holds
    the truth in 95.0% of cases when the seeds' sd is a third of the test set's standard error, 94.3% when
    they are equal and 89.0% when it is three times as large.
    """
    p, sd = mean_sd(accuracies)
    low, high = wilson(p * n, n)
    seeds = Z * (sd or 0.0) / math.sqrt(len(accuracies))
    return Estimate(p, max(0.0, p - math.hypot(p - low, seeds)), min(1.0, p + math.hypot(high - p, seeds)))


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b with the interval of two independent estimates.

        low = d - sqrt((a - a_low)^2 + (b_high - b)^2),    high = d + sqrt((a_high - a)^2 + (b - b_low)^2)

    For Wilson intervals this is method 10 of Newcombe 1998, Statistics in Medicine 17:873. Two methods
    that answer the same test examples tend to err on the same ones; the interval ignores that and is wider.
    """
    d = a.value - b.value
    low = d - math.hypot(a.value - a.low, b.high - b.value)
    return Estimate(d, low, d + math.hypot(a.high - a.value, b.value - b.low))


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent estimates (different test sets)."""
    m = len(estimates)
    mean = math.fsum(e.value for e in estimates) / m
    low = math.hypot(*(e.value - e.low for e in estimates)) / m
    return Estimate(mean, mean - low, mean + math.hypot(*(e.high - e.value for e in estimates)) / m)


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947, Psychometrika 12:153): two runs on the same examples.

    b examples were answered right by the first run alone, c by the second alone. Were the runs equally good,
    b would be binomial(b + c, 1/2): p = 2 P(X <= min(b, c)), at most 1.
    """
    from scipy.special import bdtr

    return 1.0 if b == c else min(1.0, 2.0 * float(bdtr(min(b, c), b + c, 0.5)))


def paired_test(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """McNemar's test carried over to several seeds of each method: (gap of mean accuracies, two-sided p).

    With d_j the difference of the two methods' shares of right answers to example j, and m seeds of sd s each,

        t = mean(d) / sqrt(var(d)/n + s_a^2/m_a + s_b^2/m_b)

    against Student's t, degrees of freedom by Welch and Satterthwaite (n - 1, m_a - 1, m_b - 1). With one seed
    each, t^2 is McNemar's statistic with its variance under the alternative. The noise of training that differs
    from example to example is in both terms, which errs on the safe side: by simulation (3 seeds each, n 997,
    4,000 draws) equal methods are called different in 2.5% of cases when the seeds' sd is half the test set's
    standard error, 4.8% when it is 1.7 times and 3.9% when it is 5 times as large.
    """
    from scipy.special import stdtr

    gap = float(a.mean() - b.mean())
    parts = [(a.mean(0) - b.mean(0), a.shape[1])] + [(x.mean(1), len(x)) for x in (a, b) if len(x) > 1]
    squares = [(float(x.var(ddof=1)) / n, n - 1) for x, n in parts]
    variance = sum(v for v, _ in squares)
    if variance == 0.0:
        return gap, float(gap == 0.0)
    freedom = variance**2 / sum(v * v / k for v, k in squares)
    return gap, 2.0 * float(stdtr(freedom, -abs(gap) / math.sqrt(variance)))


def paired_bootstrap(a: np.ndarray, b: np.ndarray, draws: int = 10_000) -> Estimate:
    """Gap of the accuracies of two runs, a - b, with the 95% percentile interval over redrawn test examples.

    An example is redrawn for both runs together (Efron & Tibshirani 1993, ch. 8), so what it does to the gap,
    -1, 0 or 1, is all that matters, and how often each is drawn is multinomial. a and b have one answer per
    example. The same arguments give the same interval.
    """
    values, counts = np.unique(a.astype(int) - b.astype(int), return_counts=True)
    n = len(a)
    gaps = np.random.default_rng(0).multinomial(n, counts / n, size=draws) @ values / n
    low, high = np.quantile(gaps, (ALPHA / 2, 1 - ALPHA / 2))
    return Estimate(float(values @ counts / n), float(low), float(high))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6:65), in their order.

    adjusted_(i) = max over j <= i of min(1, (k - j + 1) p_(j)),    p_(1) <= ... <= p_(k)
    """
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def margin(p: float, n: int) -> float:
    """Largest gap of accuracies that counts as none: 1 point, or the noise of the test set where that is more.

    The noise is half of Wilson's 95% interval at n examples.
    """
    low, high = wilson(p * n, n)
    return max(0.01, (high - low) / 2)


def equivalence(a: Sequence[float], b: Sequence[float], within: float, paired: bool) -> tuple[str, Estimate]:
    """Two one-sided tests (Schuirmann 1987, J. Pharmacokinetics 15:657) on accuracies of seeds: a verdict and a - b.

    The interval is the 90% one of Student's t, by pairs of equal seeds where `paired`, else by Welch. It lies
    within +-`within`: "reproduced"; wholly outside: "disputed"; across an end: "inconclusive".
    """
    from scipy.special import stdtrit

    samples = [np.subtract(a, b)] if paired else [np.asarray(a, float), np.asarray(b, float)]
    gap = float(np.mean(a) - np.mean(b))
    squares = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in samples]
    variance = sum(v for v, _ in squares)
    half = 0.0
    if variance > 0.0:
        freedom = variance**2 / sum(v * v / k for v, k in squares)
        half = float(stdtrit(freedom, 1 - ALPHA)) * math.sqrt(variance)
    interval = Estimate(gap, gap - half, gap + half)
    if -within <= interval.low and interval.high <= within:
        return "reproduced", interval
    outside = interval.low > within or interval.high < -within
    return "disputed" if outside else "inconclusive", interval
