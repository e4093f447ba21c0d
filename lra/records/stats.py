"""Statistics of the results: 95% intervals, paired tests, equivalence; for the arena and the Gemma track. No torch.

Two sources of noise are told apart, in every accuracy, gap, share and average (class Uncertain):

* a, the standard error of the test set: the examples (or documents) are a sample. All seeds and methods of a column
  share it, so more seeds do not make it smaller. Of a proportion it is that of Wilson's interval.
* b, the standard error of training: b^2 = sd^2 / m over m seeds, with m - 1 degrees of freedom; of several methods
  sum b_i^2, with the degrees of freedom of Welch and Satterthwaite. One seed shows none: its b is 0.

The interval is that of Cochran and Cox (1950, Experimental Designs, 2nd ed. 1957, section 4.14):

    half = t* sqrt(a^2 + b^2),    t* = (z a^2 + t b^2) / (a^2 + b^2)

z and t: 97.5% quantiles of the two sources. A test inverts the same rule, so p < 0.05 is an interval without 0.

Simulated coverage in percent (tests/lra/records/test_stats.py). Accuracy: binomial test noise, at the sds of the
committed records. Gap: normal noise, sd of seeds 1/4 to 8 times the error of the test set, in one method or in both:

    seeds      2             3             5
    accuracy   94.4 to 97.8  95.4 to 97.2  95.1 to 96.5
    gap        93.9 to 98.2  94.9 to 97.2  95.0 to 96.4

Two seeds miss the range of 94 to 97: too wide where both sources are alike, a little too narrow in a gap where one
method alone scatters far more than the test set. Three seeds pass it by 0.2 where both are alike. Student's t inside
the root (MOVER) covers up to 98.7 at two seeds, Welch and Satterthwaite over both sources 87.5 at the least. Averages
of five columns with two seeds, and paired gaps where the noise of training differs from example to example, cover more
than 98: they are too wide.

The rule also holds far out, which Holm's needs: over the 75 comparisons of equal methods at three seeds and the sds of
the records, some difference is claimed in 2 of 100 tables. Welch and Satterthwaite claim one in 18 of 100.

Two methods that answered the same test examples are compared example by example: that takes out how hard each
example is. Arrays of answers have the shape (seeds, examples), True where the answer was right.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

ALPHA = 0.05  # level of every test
# (task, version, data set) whose test examples share documents, and how many times the binomial variance a share of
# right answers has there: the median over the 27 runs of preset small. Records do not say which examples share.
DESIGN_EFFECTS = {("retrieval", 1, "Python imports (substitute for AAN)"): 1.49}


# A value between the limits of an interval; accuracies are fractions, not percent.
Estimate = NamedTuple("Estimate", [("value", float), ("low", float), ("high", float)])


@dataclass(frozen=True)
class Uncertain:
    """A value and its noise, as standard errors; `low` and `high` are its 95% interval by Cochran and Cox."""

    value: float
    below: float = 0.0  # of the test set, towards smaller values
    above: float = 0.0  # of the test set, towards larger values
    freedom: float = math.inf  # degrees of freedom of these two
    seeds: float = 0.0  # of training
    seeds_freedom: float = math.inf
    limits: tuple[float, float] = (-math.inf, math.inf)  # a proportion is within 0 and 1

    low = property(lambda self: self.interval(ALPHA)[0])
    high = property(lambda self: self.interval(ALPHA)[1])

    def interval(self, level: float) -> tuple[float, float]:
        """The interval of 1 - level."""
        low, high = self.value - self._half(self.below, level), self.value + self._half(self.above, level)
        return max(self.limits[0], low), min(self.limits[1], high)

    def within(self, margin: float) -> bool:
        """Two one-sided tests (Schuirmann 1987): does the 90% interval lie inside +-margin?"""
        low, high = self.interval(2 * ALPHA)
        return -margin <= low and high <= margin

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the value 0: the level at which the interval ends there."""
        side = self.below if self.value > 0 else self.above
        if self.value == 0.0 or side == self.seeds == 0.0:
            return float(self.value == 0.0)
        low, high = -100.0, 0.0  # logarithms of the level; far below, scipy has no quantile
        for _ in range(60):
            middle = (low + high) / 2
            inside = self._half(side, math.exp(middle)) > abs(self.value)
            low, high = (middle, high) if inside else (low, middle)
        return math.exp(high)

    def _half(self, side: float, level: float) -> float:
        a, b = side * side, self.seeds * self.seeds
        if a + b == 0.0:
            return 0.0
        test, training = (quantile(k, level) if v else 0.0 for v, k in ((a, self.freedom), (b, self.seeds_freedom)))
        return (test * a + training * b) / math.sqrt(a + b)


def design_effect(task: str, version: int, dataset: str) -> float:
    """How many times the binomial variance a share of right test answers has: n tell as much as n / effect independent
    ones (Kish 1965, Survey Sampling). 1 where examples share nothing."""
    return DESIGN_EFFECTS.get((task, version, dataset), 1.0)


def quantile(freedom: float = math.inf, level: float = ALPHA) -> float:
    """Two-sided quantile of Student's t, of the normal distribution at infinitely many degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    return -float(ndtri(level / 2) if math.isinf(freedom) else stdtrit(freedom, level / 2))


def welch(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Sum of independent variances, each with its degrees of freedom (Welch 1947, Satterthwaite 1946).
    v = sum v_i, k = v^2 / sum (v_i^2 / k_i)"""
    total = math.fsum(v for v, _ in parts)
    weight = math.fsum(v * v / k for v, k in parts)
    return total, total * total / weight if weight else math.inf


def combine(parts: Sequence[tuple[float, Uncertain]], value: float | None = None) -> Uncertain:
    """sum w x of independent x, or a `value` whose derivatives by the x are the w."""
    sides = [(w * x.below, w * x.above) if w > 0 else (-w * x.above, -w * x.below) for w, x in parts]
    _, freedom = welch([((w * (x.below + x.above) / 2) ** 2, x.freedom) for w, x in parts])
    variance, seeds_freedom = welch([((w * x.seeds) ** 2, x.seeds_freedom) for w, x in parts])
    below, above = (math.hypot(*(side[i] for side in sides)) for i in (0, 1))
    value = math.fsum(w * x.value for w, x in parts) if value is None else value
    return Uncertain(value, below, above, freedom, math.sqrt(variance), seeds_freedom)


def wilson(k: float, n: int, z: float | None = None) -> tuple[float, float]:
    """Score interval of a proportion k/n (Wilson 1927, JASA 22:209); k may be a mean of counts.

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),    p = k/n

    z: the quantile, of 95% if not given. Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"{k} correct of {n} is not a proportion")
    z = quantile() if z is None else z
    p = k / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def proportion(p: float, n: int) -> Uncertain:
    """A share of n examples with the noise of the test set: its interval is Wilson's."""
    low, high = wilson(p * n, n)
    z = quantile()
    return Uncertain(p, (p - low) / z, (high - p) / z, limits=(0.0, 1.0))


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, sqrt(sum (x - mean)^2 / (m - 1)); None for a single value."""
    m = len(values)
    mean = math.fsum(values) / m
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (m - 1)) if m > 1 else None


def training(values: Sequence[float]) -> Uncertain:
    """Mean over seeds with the noise of training alone; one seed has none that is known."""
    (mean, sd), m = mean_sd(values), len(values)
    return Uncertain(mean, seeds=sd / math.sqrt(m), seeds_freedom=m - 1) if m > 1 else Uncertain(mean)


def over_seeds(accuracies: Sequence[float], n: int) -> Uncertain:
    """Mean accuracy of m seeds on one test set of n examples, with the noise of both; of one seed Wilson's interval."""
    mean = training(accuracies)
    return replace(proportion(mean.value, n), seeds=mean.seeds, seeds_freedom=mean.seeds_freedom)


def difference(a: Uncertain, b: Uncertain) -> Uncertain:
    """a - b, of two test sets or without predictions.
    Of single seeds it is method 10 of Newcombe 1998, Statistics in Medicine 17:873. Two methods that answer the same
    test examples tend to err on the same ones; the interval ignores that and is wider than that of `paired`."""
    return combine([(1.0, a), (-1.0, b)])


def average(estimates: Sequence[Uncertain]) -> Uncertain:
    """Unweighted mean of independent estimates (different test sets)."""
    return combine([(1.0 / len(estimates), e) for e in estimates])


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947, Psychometrika 12:153): two runs on the same examples.
    b examples were answered right by the first run alone, c by the second alone. Were the runs equally good, b would be
    binomial(b + c, 1/2): p = 2 P(X <= min(b, c)), at most 1."""
    from scipy.special import bdtr

    return 1.0 if b == c else min(1.0, 2.0 * float(bdtr(min(b, c), b + c, 0.5)))


def paired(a: np.ndarray, b: np.ndarray, effect: float = 1.0) -> Uncertain:
    """Gap of mean accuracies a - b on the same examples: McNemar's comparison carried over to several seeds.

    With d_j the difference of the two methods' shares of right answers to example j, m seeds of sd s each, and the
    design effect e of the examples,

        a^2 = e var(d) / n,    b^2 = s_a^2 / m_a + s_b^2 / m_b

    With one seed each the p-value is that of the paired t-test. The noise of training that differs from example to
    example is in both terms, which errs on the safe side.
    """
    n = a.shape[1] / effect
    noise = math.sqrt(float((a.mean(0) - b.mean(0)).var(ddof=1)) / n)
    gap = difference(training(a.mean(1)), training(b.mean(1)))
    return replace(gap, value=float(a.mean() - b.mean()), below=noise, above=noise, freedom=n - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979, Scandinavian Journal of Statistics 6:65), in their order.
    adjusted_(i) = max over j <= i of min(1, (k - j + 1) p_(j)), p_(1) <= ... <= p_(k)"""
    p = np.asarray(p_values, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


def margin(p: float, n: int) -> float:
    """Largest gap of accuracies that counts as none: 1 point, or the noise of the test set where that is more.
    The noise is half of Wilson's 95% interval at n examples."""
    low, high = wilson(p * n, n)
    return max(0.01, (high - low) / 2)


def equivalence(ours: Mapping[Any, float], theirs: Mapping[Any, float], within: float) -> tuple[str, Estimate]:
    """Two one-sided tests (Schuirmann 1987, J. Pharmacokinetics 15:657) on accuracies by seed: verdict, theirs - ours.
    The interval is the 90% one of Student's t, by pairs where the seeds are the same, else by Welch. It lies within
    +-`within`: "reproduced"; wholly outside: "disputed"; across an end: "inconclusive"."""
    gap = difference(training([*theirs.values()]), training([*ours.values()]))
    if ours.keys() == theirs.keys():
        gap = training([theirs[seed] - ours[seed] for seed in ours])
    low, high = gap.interval(2 * ALPHA)
    outside = "disputed" if low > within or high < -within else "inconclusive"
    return "reproduced" if gap.within(within) else outside, Estimate(gap.value, low, high)
