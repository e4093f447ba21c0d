"""Intervals against hand-computed values, published examples and scipy; how often they hold the truth."""

import itertools
import math
from functools import cache

import numpy as np
import pytest

from lra.records.cells import build
from lra.records.stats import (
    Uncertain,
    average,
    combine,
    difference,
    equivalence,
    holm,
    margin,
    mcnemar,
    mean_sd,
    over_seeds,
    paired,
    proportion,
    quantile,
    welch,
    wilson,
)
from tests.conftest import ROOT

scipy_stats = pytest.importorskip("scipy.stats")
scipy_special = pytest.importorskip("scipy.special")


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


def interval(estimate):
    """The ends of an estimate."""
    return estimate.low, estimate.high


def test_one_seed_has_the_wilson_interval():
    assert interval(over_seeds([0.34], 4000)) == pytest.approx(wilson(1360, 4000))


def test_equal_seeds_do_not_enlarge_the_test_set():
    assert interval(over_seeds([0.34, 0.34, 0.34], 4000)) == pytest.approx(wilson(1360, 4000))


def test_quantiles_are_those_of_the_tables():
    assert quantile() == pytest.approx(1.959964, abs=1e-6)
    assert [quantile(k) for k in (1, 2, 4)] == pytest.approx([12.7062, 4.3027, 2.7764], abs=1e-4)
    assert quantile(5, 0.1) == pytest.approx(2.0150, abs=1e-4)


def test_welch_by_hand():
    # 2 of two variances with 2 degrees of freedom each: 4 / (1/2 + 1/2) = 4
    assert welch([(1.0, 2), (1.0, 2)]) == pytest.approx((2.0, 4.0))
    assert welch([(1.0, math.inf)]) == (1.0, math.inf) and welch([]) == (0.0, math.inf)


def test_noise_of_seeds_and_test_set_are_combined_by_cochran_and_cox():
    estimate = over_seeds([0.32, 0.36], 4000)  # sd 0.02 sqrt 2, so sd / sqrt 2 seeds = 0.02
    for side, end in zip(wilson(1360, 4000), interval(estimate), strict=True):
        a2, b2 = ((side - 0.34) / 1.959964) ** 2, 0.02**2
        half = (1.959964 * a2 + 12.7062 * b2) / (a2 + b2) * math.sqrt(a2 + b2)
        assert abs(end - 0.34) == pytest.approx(half, rel=1e-5)


def test_a_p_value_of_one_in_twenty_is_an_interval_that_ends_at_zero():
    estimate = Uncertain(0.0, 0.01, 0.01, 30, 0.02, 2)
    at_the_end = Uncertain(estimate.high, 0.01, 0.01, 30, 0.02, 2)
    assert at_the_end.low == pytest.approx(0.0) and at_the_end.p_value == pytest.approx(0.05)
    halfway = [Uncertain(x, 0.005, 0.005, 11, 0.0007, 2.0000000000000004).p_value for x in (0.01, 0.02, 0.2, 20)]
    assert halfway == sorted(halfway, reverse=True) and 0.05 < halfway[0] < 0.1 and halfway[-1] > 0
    assert (Uncertain(0.0).p_value, Uncertain(0.1).p_value) == (1.0, 0.0)
    assert Uncertain(0.1, 0.05, 0.05).p_value == pytest.approx(2 * scipy_stats.norm.sf(2))
    assert Uncertain(-0.1, seeds=0.05, seeds_freedom=2).p_value == pytest.approx(2 * scipy_stats.t.sf(2, 2))


def test_interval_stays_within_zero_and_one():
    assert over_seeds([0.0, 0.3], 7).low == 0.0
    assert over_seeds([1.0, 0.7], 7).high == 1.0


@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    # Newcombe 1998, table II, method 10
    [(56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (10, 10, 0, 10, 0.6075, 1.0)],
)
def test_difference_of_wilson_intervals_is_newcombes_method_10(a, m, b, n, low, high):
    gap = difference(proportion(a / m, m), proportion(b / n, n))
    assert (gap.value, *interval(gap)) == pytest.approx((a / m - b / n, low, high), abs=6e-5)


def test_difference_changes_sign_with_its_arguments():
    a, b = over_seeds([0.34, 0.36], 997), over_seeds([0.31], 997)
    gap, back = difference(a, b), difference(b, a)
    assert (back.value, back.low, back.high) == pytest.approx((-gap.value, -gap.high, -gap.low))


def test_average_of_independent_estimates_by_hand():
    # errors 3 and 4 below, 6 and 8 above: 5 and 10 together, over two; of training 1 and 2 with 2 degrees of freedom
    parts = [Uncertain(10, 3, 6, seeds=1, seeds_freedom=2), Uncertain(20, 4, 8, seeds=2, seeds_freedom=2)]
    mean = average(parts)
    assert (mean.value, mean.below, mean.above) == pytest.approx((15, 2.5, 5))
    assert mean.seeds == pytest.approx(math.sqrt(5) / 2) and mean.seeds_freedom == pytest.approx(25 / (17 / 2))


def test_a_negative_weight_turns_an_estimate_around():
    turned = combine([(-2.0, Uncertain(1, 3, 6))])
    assert (turned.value, turned.below, turned.above) == (-2, 12, 6)


# How often intervals hold the truth


def halves(test, sds, m):
    """The half-widths of lra.records.stats, for arrays: errors `test`, and one array of sds over m seeds per method."""
    parts = [sd**2 / m + 1e-30 for sd in sds]
    b2 = sum(parts)
    freedom = b2**2 / sum(v * v for v in parts) * (m - 1)
    a2 = test**2
    return (quantile() * a2 + scipy_special.stdtrit(freedom, 0.975) * b2) / np.sqrt(a2 + b2)


def test_the_simulated_rule_is_that_of_the_estimates():
    rng = np.random.default_rng(0)
    for m in (2, 3, 5):
        a, b = rng.uniform(0.4, 0.6, (2, m))
        one, two = over_seeds(a, 500), over_seeds(b, 500)
        gap = difference(one, two)
        assert one.high - one.value == pytest.approx(halves(np.array(one.above), [a.std(ddof=1)], m))
        both = halves(np.hypot(one.above, two.below), [a.std(ddof=1), b.std(ddof=1)], m)
        assert gap.high - gap.value == pytest.approx(both)


@cache
def spreads():
    """(mean accuracy, test examples, sd over seeds) of the cells of the committed records with several seeds."""
    cells = [c for table in build(ROOT / "results" / "reference") for c in table.cells.values() if len(c.ok) > 1]
    assert len(cells) >= 45
    return [(c.estimate.value, c.ok[0].n_test, mean_sd(c.accuracies)[1]) for c in cells]


BOUNDS = {2: (0.936, 0.985), 3: (0.946, 0.975), 5: (0.946, 0.968)}  # stats.py says where 94 to 97 is missed


@pytest.mark.parametrize("m", BOUNDS)
def test_accuracies_at_the_spreads_of_the_records_are_held_as_often_as_said(m):
    rng, draws = np.random.default_rng(m), 20_000
    z = quantile()
    for p, n, sd in spreads():
        seeds = rng.normal(0, sd, (m, draws))
        seen = np.clip(rng.binomial(n, p, draws) / n + seeds.mean(0), 0, 1)
        edge = z * np.sqrt(seen * (1 - seen) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        middle = (seen + z * z / (2 * n)) / (1 + z * z / n)
        side = np.where(p < seen, seen - (middle - edge), middle + edge - seen) / z
        held = (abs(seen - p) <= halves(side, [seeds.std(0, ddof=1)], m)).mean()
        most = 1 if p + 3 * sd > 1 else BOUNDS[m][1]  # near 100% the noise of seeds has one side: more is held
        assert BOUNDS[m][0] <= held <= most, (p, n, sd, held)


def coverage(m, ratio, other, draws=40_000):
    """How often the interval of a gap holds it; `ratio`, `other`: sd of seeds over the error of the test set."""
    rng = np.random.default_rng([m, int(100 * ratio), int(100 * other)])
    a, b = (rng.normal(0, s, (m, draws)) for s in (ratio, other))
    error = rng.normal(0, 1, draws) + a.mean(0) - b.mean(0)
    sds = [a.std(0, ddof=1), b.std(0, ddof=1)]
    return [(abs(error) <= halves(np.ones(draws), parts, m)).mean() for parts in (sds, sds[:1])]


@pytest.mark.parametrize("m", BOUNDS)
def test_gaps_are_held_as_often_as_said_and_not_without_the_noise_of_one_method(m):
    for ratio, share in itertools.product((0.25, 0.5, 1, 2, 4, 8), (0, 0.5, 1)):
        both, one = coverage(m, ratio, ratio * share)
        assert BOUNDS[m][0] <= both <= BOUNDS[m][1], (ratio, share)
        assert share < 1 or ratio < 4 or m == 2 or one < 0.935, ratio


def test_a_whole_table_of_equal_methods_claims_a_difference_in_at_most_one_case_of_twenty():
    # The bound of Bonferroni for the 75 comparisons of three seeds, at the spreads of the records
    rng, draws, level = np.random.default_rng(5), 60_000, 0.05 / 75
    sizes = []
    for p, n, sd in spreads()[::3]:
        ratio = sd / math.sqrt(p * (1 - p) / n)
        a, b = rng.normal(0, ratio, (2, 3, draws))
        error = abs(rng.normal(0, 1, draws) + a.mean(0) - b.mean(0))
        parts = [x.var(0, ddof=1) / 3 + 1e-30 for x in (a, b)]
        b2 = parts[0] + parts[1]
        freedom = b2**2 / (parts[0] ** 2 + parts[1] ** 2) * 2
        t = scipy_special.stdtrit(freedom, 1 - level / 2)
        sizes.append((error > (quantile(level=level) + t * b2) / np.sqrt(1 + b2)).mean())
    assert 75 * np.mean(sizes) <= 0.05


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
    gap = paired(a, b)
    assert gap.value == pytest.approx((more - less) / n) and gap.seeds == 0.0
    assert gap.p_value == pytest.approx(2 * scipy_stats.t.sf(abs(z), n - 1))
    assert gap.p_value == pytest.approx(scipy_stats.ttest_rel(a[0].astype(float), b[0].astype(float)).pvalue)


def test_a_paired_gap_has_the_noise_of_both_methods_training_and_of_the_examples():
    n = 40
    a = np.array([np.arange(n) < k for k in (20, 24, 28)])  # sd of 0.5 0.6 0.7: 0.1
    b = np.array([np.arange(n) < k for k in (20, 21, 22)])  # of 0.5 0.525 0.55: 0.025
    gap, back = paired(a, b), paired(b, a)
    variances = [(0.1**2 / 3, 2), (0.025**2 / 3, 2)]
    assert gap.value == pytest.approx(0.075)
    assert gap.below == pytest.approx((a.mean(0) - b.mean(0)).std(ddof=1) / math.sqrt(n))
    for one in (gap, back):
        assert (one.seeds**2, one.seeds_freedom) == pytest.approx(welch(variances))


def test_paired_test_changes_sign_with_its_arguments_and_finds_nothing_between_equals():
    a, b = answers(3), answers(3, p=0.5, seed=1)
    gap, back = paired(a, b), paired(b, a)
    assert (back.value, back.p_value) == pytest.approx((-gap.value, gap.p_value)) and gap.p_value < 0.05
    assert (paired(a, a).value, paired(a, a).p_value) == (0.0, 1.0)
    right = np.ones((3, 7), bool)
    assert (paired(right, right).p_value, paired(right, ~right).p_value) == (1.0, 0.0)


@pytest.mark.parametrize("scatter", [0.0, 0.03, 0.1])
def test_equal_methods_are_called_different_in_at_most_one_case_of_twenty(scatter):
    rng, n, draws = np.random.default_rng(3), 499, 600
    claimed = 0
    for _ in range(draws):
        hard, methods = rng.random(n), []
        for _ in range(2):
            chance = np.clip(hard + rng.normal(0, 0.2, n), 0, 1)  # what is hard differs between methods
            methods.append(np.array([rng.random(n) < chance + rng.normal(0, scatter) for _ in range(3)]))
        claimed += paired(*methods).p_value < 0.05
    assert claimed <= draws * 0.05 + 2 * math.sqrt(draws * 0.05 * 0.95)


def test_seeds_that_scatter_make_the_paired_test_doubt():
    steady, wild = answers(3), np.vstack([answers(1, p=p, seed=k) for k, p in enumerate((0.4, 0.5, 0.9))])
    low = answers(3, p=0.5, seed=5)
    assert paired(steady, low).p_value < 0.05 < 0.2 < paired(wild, low).p_value


def test_holm_by_hand():
    # sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and never falling
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.7]) == [1.0, 1.0]


def test_margin_is_a_point_or_the_noise_of_the_test_set():
    assert margin(0.5, 100_000) == 0.01
    low, high = wilson(180, 360)
    assert margin(0.5, 360) == pytest.approx((high - low) / 2) and margin(0.5, 360) > 0.05


def test_equivalence_of_an_estimate_is_its_90_percent_interval_within_the_margin():
    gap = Uncertain(0.002, 0.005, 0.005)  # 0.002 + 1.645 x 0.005 = 0.0102
    assert gap.within(0.0103) and not gap.within(0.0101) and not Uncertain(-0.02).within(0.01)


def test_equivalence_by_hand():
    # differences .00 .01 .02: mean .01, sd .01, 90% half width 2.91999 * .01 / sqrt 3 = .016859
    ours, theirs = {0: 0.50, 1: 0.51, 2: 0.52}, {2: 0.54, 1: 0.52, 0: 0.50}
    verdict, gap = equivalence(ours, theirs, 0.03)
    assert verdict == "reproduced" and gap == pytest.approx((0.01, -0.006859, 0.026859), abs=1e-6)
    assert equivalence(ours, theirs, 0.02)[0] == "inconclusive"
    assert equivalence(ours, ours, 0.01) == ("reproduced", (0, 0, 0))
    assert equivalence(ours, {3: 0.6, 4: 0.61, 5: 0.62}, 0.02)[0] == "disputed"


def test_equivalence_without_pairs_has_the_interval_of_welch():
    a, b = [0.51, 0.55, 0.52, 0.53], [0.50, 0.53, 0.49]
    _, gap = equivalence(dict(enumerate(b)), dict(enumerate(a)), 0.02)
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert (gap.low, gap.high) == pytest.approx((theirs.low, theirs.high))
