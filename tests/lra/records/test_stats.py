"""Intervals against hand-computed values, published examples and scipy."""

import math

import numpy as np
import pytest

from lra.records.stats import (
    Estimate,
    average,
    difference,
    equivalence,
    holm,
    margin,
    mcnemar,
    mean_sd,
    over_seeds,
    paired_bootstrap,
    paired_test,
    wilson,
)

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(("k", "n"), [(0, 7), (7, 7), (1, 13), (1360, 4000), (5, 1_000_003)])
def test_wilson_agrees_with_scipy(k, n):
    theirs = scipy_stats.binomtest(k, n).proportion_ci(method="wilson")
    assert wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-7)


def test_wilson_by_hand():
    # p = 1/2, n = 4, z = 2: centre 1, half 2 sqrt(1/16 + 1/16) = 0.70711, both divided by 1 + 4/4
    assert wilson(2, 4, z=2) == pytest.approx((0.5 - 0.25 * math.sqrt(2), 0.5 + 0.25 * math.sqrt(2)))


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_counts_that_are_no_proportion(k, n):
    with pytest.raises(ValueError, match=f"{k} correct of {n}"):
        wilson(k, n)


def test_mean_and_sample_standard_deviation_by_hand():
    assert mean_sd([2.0, 4.0, 9.0]) == pytest.approx((5.0, math.sqrt((9 + 1 + 16) / 2)))
    assert mean_sd([0.25]) == (0.25, None)


def test_one_seed_has_the_wilson_interval():
    assert over_seeds([0.34], 4000) == (0.34, *wilson(1360, 4000))


def test_equal_seeds_do_not_enlarge_the_test_set():
    assert over_seeds([0.34, 0.34, 0.34], 4000) == pytest.approx((0.34, *wilson(1360, 4000)))


def test_noise_of_seeds_and_test_set_add_in_squares():
    estimate = over_seeds([0.32, 0.36], 4000)  # sd 0.02 sqrt 2, so sd / sqrt 2 seeds = 0.02
    low, high = wilson(1360, 4000)
    assert estimate.low == pytest.approx(0.34 - math.sqrt((0.34 - low) ** 2 + (1.959964 * 0.02) ** 2))
    assert estimate.high == pytest.approx(0.34 + math.sqrt((high - 0.34) ** 2 + (1.959964 * 0.02) ** 2))


def test_interval_stays_within_zero_and_one():
    assert over_seeds([0.0, 0.3], 7).low == 0.0
    assert over_seeds([1.0, 0.7], 7).high == 1.0


@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    # Newcombe 1998, table II, method 10
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 10, 0.6075, 1.0)],
)
def test_difference_of_wilson_intervals_is_newcombes_method_10(a, m, b, n, low, high):
    gap = difference(over_seeds([a / m], m), over_seeds([b / n], n))
    assert gap == pytest.approx((a / m - b / n, low, high), abs=6e-5)


def test_difference_changes_sign_with_its_arguments():
    a, b = over_seeds([0.34, 0.36], 997), over_seeds([0.31], 997)
    value, low, high = difference(a, b)
    assert difference(b, a) == pytest.approx((-value, -high, -low))


def test_average_of_independent_estimates_by_hand():
    # distances 3 and 4 below, 6 and 8 above: 5 and 10 together, over two
    assert average([Estimate(10, 7, 16), Estimate(20, 16, 28)]) == pytest.approx((15, 12.5, 20))


# Tests on stored predictions


def test_mcnemar_by_hand():
    # 2 P(X <= 1), X binomial(6, 1/2): 2 (1 + 6) / 64
    assert mcnemar(1, 5) == mcnemar(5, 1) == pytest.approx(14 / 64)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0


@pytest.mark.parametrize(("b", "c"), [(0, 7), (3, 17), (101, 139), (1000, 1097)])
def test_mcnemar_agrees_with_the_binomial_test_of_scipy(b, c):
    assert mcnemar(b, c) == pytest.approx(scipy_stats.binomtest(b, b + c).pvalue, rel=1e-9)


def answers(seeds, n=997, p=0.6, seed=0):
    """Random right and wrong answers, some examples harder than others."""
    rng = np.random.default_rng(seed)
    return rng.random((seeds, n)) < p + 0.3 * (np.random.default_rng(9).random(n) - 0.5)


def test_paired_test_of_one_seed_each_is_mcnemars_under_the_alternative():
    a, b = answers(1), answers(1, p=0.55, seed=1)
    more, less, n = int((a & ~b).sum()), int((b & ~a).sum()), a.shape[1]
    z = (more - less) / math.sqrt((more + less - (more - less) ** 2 / n) * n / (n - 1))
    gap, p = paired_test(a, b)
    assert gap == pytest.approx((more - less) / n)
    assert p == pytest.approx(2 * scipy_stats.t.sf(abs(z), n - 1))
    assert p == pytest.approx(scipy_stats.ttest_rel(a[0].astype(float), b[0].astype(float)).pvalue)


def test_paired_test_of_seeds_on_a_test_set_without_noise_is_welchs():
    # Every example answered alike within a seed would be noise of seeds alone; here blocks make it so on average.
    n = 40
    a = np.array([np.arange(n) < k for k in (20, 24, 28)])
    b = np.array([np.arange(n)[::1] < k for k in (20, 21, 22)])
    gap, p = paired_test(a, b)
    d = a.mean(0) - b.mean(0)
    parts = [
        (d.var(ddof=1) / n, n - 1),
        (0.1**2 / 3, 2),
        (0.025**2 / 3, 2),
    ]  # sd of 0.5 0.6 0.7; 0.5 0.525 0.55
    variance = sum(v for v, _ in parts)
    freedom = variance**2 / sum(v * v / k for v, k in parts)
    assert gap == pytest.approx(0.075)
    assert p == pytest.approx(2 * scipy_stats.t.sf(0.075 / math.sqrt(variance), freedom))


def test_paired_test_changes_sign_with_its_arguments_and_finds_nothing_between_equals():
    a, b = answers(3), answers(3, p=0.5, seed=1)
    (gap, p), (back, same) = paired_test(a, b), paired_test(b, a)
    assert (back, same) == pytest.approx((-gap, p)) and p < 1e-3
    assert paired_test(a, a)[0] == 0.0 and paired_test(a, a)[1] == 1.0
    right = np.ones((3, 7), bool)
    assert paired_test(right, right) == (0.0, 1.0)
    assert paired_test(right, ~right) == (1.0, 0.0)


@pytest.mark.parametrize("scatter", [0.0, 0.03, 0.1])
def test_equal_methods_are_called_different_in_at_most_one_case_of_twenty(scatter):
    rng, n, draws = np.random.default_rng(3), 499, 600
    claimed = 0
    for _ in range(draws):
        hard, methods = rng.random(n), []
        for _ in range(2):
            chance = np.clip(hard + rng.normal(0, 0.2, n), 0, 1)  # what is hard differs between methods
            methods.append(np.array([rng.random(n) < chance + rng.normal(0, scatter) for _ in range(3)]))
        claimed += paired_test(*methods)[1] < 0.05
    assert claimed <= draws * 0.05 + 2 * math.sqrt(draws * 0.05 * 0.95)


def test_seeds_that_scatter_make_the_paired_test_doubt():
    steady, wild = answers(3), np.vstack([answers(1, p=p, seed=k) for k, p in enumerate((0.4, 0.5, 0.9))])
    low = answers(3, p=0.5, seed=5)
    assert paired_test(steady, low)[1] < 0.01 < 0.2 < paired_test(wild, low)[1]


def test_paired_bootstrap_agrees_with_that_of_scipy():
    a, b = answers(2)[0], answers(2, p=0.55, seed=1)[1]
    mine = paired_bootstrap(a, b)
    d = a.astype(float) - b
    theirs = scipy_stats.bootstrap(
        (d,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert mine.value == pytest.approx(d.mean())
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert paired_bootstrap(a, b) == mine and paired_bootstrap(a, a) == (0.0, 0.0, 0.0)


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_margin_is_a_point_or_the_noise_of_the_test_set():
    assert margin(0.5, 100_000) == 0.01
    low, high = wilson(180, 360)
    assert margin(0.5, 360) == pytest.approx((high - low) / 2) and margin(0.5, 360) > 0.05


def test_equivalence_by_hand():
    # differences .00 .01 .02: mean .01, sd .01, 90% half width 2.91999 * .01 / sqrt 3 = .016859
    verdict, gap = equivalence([0.50, 0.52, 0.54], [0.50, 0.51, 0.52], 0.03, paired=True)
    assert verdict == "reproduced" and gap == pytest.approx((0.01, -0.006859, 0.026859), abs=1e-6)
    assert equivalence([0.50, 0.52, 0.54], [0.50, 0.51, 0.52], 0.02, paired=True)[0] == "inconclusive"
    assert equivalence([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], 0.01, paired=True) == ("reproduced", (0, 0, 0))
    assert equivalence([0.6, 0.61, 0.62], [0.5, 0.51, 0.52], 0.02, paired=False)[0] == "disputed"


def test_equivalence_without_pairs_has_the_interval_of_welch():
    a, b = [0.51, 0.55, 0.52, 0.53], [0.50, 0.53, 0.49]
    _, gap = equivalence(a, b, 0.02, paired=False)
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert (gap.low, gap.high) == pytest.approx((theirs.low, theirs.high))
