"""Every number by hand; where scipy has the same, by scipy too."""

import math
import tracemalloc

import numpy as np
import pytest

from gtr_turbo.compare.measures import Measure
from gtr_turbo.compare.results import VariantResult
from gtr_turbo.compare.show import amount, change, name_of_best
from gtr_turbo.compare.statistics import (
    area,
    bootstrap,
    difference,
    estimate,
    first_reach,
    interquartile_mean,
    mean_of_all,
    probability_of_improvement,
    student_interval,
)
from gtr_turbo.student import student_quantile

NAN = math.nan


def row(*numbers):
    return np.array(numbers, float)


def test_the_quantile_of_student_is_that_of_the_tables():
    # Student 1908; e.g. Abramowitz & Stegun, table 26.10
    for freedom, t in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert student_quantile(freedom) == pytest.approx(t, abs=5e-4)
    assert student_quantile(1, 0.5) == pytest.approx(1.0)  # tan(pi / 4)


def test_the_quantile_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3.7, 11, 150):
        for level in (0.5, 0.9, 0.99):
            expected = stats.t.ppf((1 + level) / 2, freedom)
            assert student_quantile(freedom, level) == pytest.approx(expected, rel=1e-9)


def test_the_interquartile_mean_drops_whole_quarters():
    assert interquartile_mean(row(9, 1, 2, 3, 4, 5, 6, -50)) == 3.5  # 8 scores: 2 at each end
    assert interquartile_mean(row(0, 1, 2, 3, 100)) == 2.0  # 5 scores: 1 at each end
    assert interquartile_mean(row(0, 1, 5)) == 2.0  # too few to drop any


def test_the_interquartile_mean_is_rliables():
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(0).normal(size=(7, 13))
    expected = [stats.trim_mean(one, 0.25) for one in scores]
    np.testing.assert_allclose(interquartile_mean(scores), expected, rtol=1e-12)


def test_the_interval_of_a_mean_is_students():
    # mean 2, deviation 1, standard error 1 / sqrt(3), t(2) = 4.302653
    low, high = student_interval(row(1, 2, 3))
    assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


def test_strata_that_share_their_seeds_have_one_error_of_their_mean():
    # gaps 0.1, 0.1, 0.4 in both strata: each seed's mean is that too, deviation 0.1 sqrt(3), error 0.1, t(2)
    shared = difference(np.array([[0.1, 0.1, 0.4]] * 2), np.zeros((2, 3)))
    assert (shared.seeds, shared.pairs, shared.above) == (3, 6, 6)
    assert shared.mean == pytest.approx(0.2)
    assert shared.t_interval == pytest.approx((0.2 - 0.4302653, 0.2 + 0.4302653))
    # resamples of a seed's pairs reach both ends, as they do for one stratum
    assert shared.bootstrap == pytest.approx((0.1, 0.4))


def test_what_lies_between_strata_is_no_spread_of_seeds():
    # the seeds' means are 51, 52, 53: error 1 / sqrt(3), t(2) = 4.302653
    about = estimate(np.array([[1.0, 2, 3], [101, 102, 103]]))
    assert about.mean == 52
    low, high = about.t_interval
    assert (high - low) / 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)


def test_no_interval_comes_from_one_seed_or_from_seeds_that_are_alike():
    one, alike = estimate(row(0.5)), estimate(row(0.5, 0.5, 0.5))
    for about in (one, alike):
        assert about.mean == about.iqm == 0.5
        assert about.t_interval is about.bootstrap is about.iqm_bootstrap is None
    assert (one.seeds, alike.seeds) == (1, 3)


def test_a_seed_that_lacks_a_run_is_left_out():
    assert estimate(row(1, NAN, 3)).mean == 2
    assert estimate(row(1, NAN, 3)).seeds == 2
    about = estimate(np.array([[0.0, 5.0, 0.0], [1.0, NAN, 3.0]]))
    assert (about.mean, about.seeds, about.runs) == (1.0, 2, 4)
    assert about.iqm == 0.5  # of 0, 0, 1, 3 the lowest and the highest are dropped
    assert estimate(np.array([[1, 3], [NAN, NAN]])) is None
    assert estimate(row(NAN)) is None


def test_the_bootstrap_of_two_scores_is_known():
    # resamples of (0, 1): means 0, 1/2, 1 with 1/4, 1/2, 1/4, so both ends are reached
    assert bootstrap(np.array([row(0, 1)]), mean_of_all) == (0.0, 1.0)
    assert bootstrap(np.array([row(0, 1)]), mean_of_all, level=0.4) == (0.5, 0.5)


def test_the_bootstrap_draws_what_belongs_to_a_seed_together():
    # drawn over all four scores the mean would vary; seed by seed it cannot
    assert bootstrap(np.array([[0.0, 1.0], [1.0, 0.0]]), mean_of_all) is None


def test_the_bootstrap_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(1).normal(size=12)
    expected = stats.bootstrap(
        (scores,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    found = bootstrap(scores[None], mean_of_all)
    assert found == pytest.approx((expected.low, expected.high), abs=0.03)  # Monte Carlo


def test_a_difference_is_that_of_pairs():
    # seeds are 0 to 10 apart, the variant is always about 1 above: unpaired nothing would be seen
    gap = difference(row(1.5, 6, 11.5, NAN), row(0.5, 5, 10, 3))
    assert gap.pairs == 3
    assert gap.mean == pytest.approx(3.5 / 3)
    assert (gap.above, gap.below) == (3, 0)
    low, high = gap.t_interval  # gaps 1, 1, 1.5: deviation 1 / sqrt(12), error 1/6
    assert low == pytest.approx(3.5 / 3 - 4.302653 / 6, abs=1e-6)
    assert high == pytest.approx(3.5 / 3 + 4.302653 / 6, abs=1e-6)
    assert gap.bootstrap == pytest.approx(
        (1.0, 1.5)
    )  # the resamples of three pairs reach both ends


def test_no_common_seed_is_no_difference():
    assert difference(row(1, NAN), row(NAN, 1)) is None
    assert difference(np.array([[1, 2], [1, NAN]]), np.array([[1, 2], [NAN, 1]])) is None


def test_the_probability_of_improvement_counts_pairs_and_half_the_ties():
    # 2 > 1, 2 = 2, 2 < 3; 4 > all: (1 + 1/2 + 0 + 3 + 3) / 9
    x, y = row(2, 4, 4), row(1, 2, 3)
    found, _ = probability_of_improvement(np.array([[x], [y]]))
    assert found == pytest.approx((1.5 + 3 + 3) / 9)
    # with the strata x against y, and y against x: their mean
    assert probability_of_improvement(np.array([[x, y], [y, x]]))[0] == pytest.approx(0.5)
    assert difference(row(1, 2), row(1, 2)).improvement == 0.5


def test_rounding_is_no_win():
    # 0.1 + 0.2 is 4e-17 above 0.3; the third pair is 1e-6 apart, which is one
    gap = difference(row(0.1 + 0.2, 0.3, 0.5), row(0.3, 0.1 + 0.2, 0.5 - 1e-6))
    assert (gap.above, gap.below) == (1, 0)
    # of nine pairs 0.5 is higher in three, 0.3 lower in two, and four are ties
    assert gap.improvement == pytest.approx((3 + 4 / 2) / 9)
    large = difference(row(3e9 + 1, 7e9), row(3e9, 8e9))  # 1 in 3e9 is within 1e-9 of it
    assert (large.above, large.below) == (0, 1)


def test_the_probability_of_improvement_is_mann_whitneys():
    stats = pytest.importorskip("scipy.stats")
    x, y = np.random.default_rng(3).integers(0, 6, size=(2, 9)).astype(float)
    u = stats.mannwhitneyu(x, y).statistic
    assert probability_of_improvement(np.array([[x], [y]]))[0] == pytest.approx(u / 81)


def test_the_interval_of_the_improvement_is_that_of_resampled_seeds():
    pairs = np.random.default_rng(4).integers(0, 4, size=(2, 3, 6)).astype(float)

    def every_pair(drawn):  # (resamples, 2, strata, seeds)
        x, y = drawn[:, 0, :, :, None], drawn[:, 1, :, None, :]
        return (np.sign(x - y).mean(axis=(-3, -2, -1)) + 1) / 2

    _, interval = probability_of_improvement(pairs)
    assert interval == pytest.approx(bootstrap(pairs, every_pair), rel=1e-12)


def test_the_improvement_of_many_seeds_needs_little_memory():
    x, y = np.random.default_rng(6).integers(0, 9, size=(2, 300)).astype(float)
    tracemalloc.start()
    difference(x, y)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6  # bytes; a number for every pair of every resample takes 3.6e9


def test_the_area_is_the_mean_height_over_the_range():
    assert area([0, 10, 20], [0, 1, 1], 0, 20) == pytest.approx(0.75)  # (5 + 10) / 20
    assert area([0, 10, 20], [0, 1, 1], 5, 15) == pytest.approx(0.875)  # (0.75 * 5 + 1 * 5) / 10
    assert area([0, 30], [0, 3], 10, 10) == 1.0
    assert area([5, 10], [1, 1], 0, 10) is None  # it does not reach back to 0
    assert area([], [], 0, 1) is None


@pytest.mark.parametrize(
    ("means", "better", "best"),
    [
        ([0.5, 0.7, 0.6], "higher", 1),
        ([0.5, 0.7, 0.6], "lower", 0),
        ([0.1 + 0.2, 0.3, 0.2], "higher", None),  # 4e-17 apart
        ([0.3, 0.3 - 1e-6], "higher", 0),
        ([0.3], "higher", None),
        ([0.3, 0.5], None, None),
    ],
)
def test_the_best_mean_has_a_star_if_no_other_shares_it(means, better, best):
    results = [
        VariantResult(
            label=str(number),
            planned=1,
            finished=1,
            estimates={"x": estimate(row(mean))},
            differences={},
        )
        for number, mean in enumerate(means)
    ]
    found = name_of_best(results, "x", Measure("x", "fraction", better))
    assert found == (None if best is None else str(best))


def test_a_change_that_rounds_to_nothing_has_no_sign():
    assert [change(v, "fraction") for v in (-0.0004, 0.0004, -0.0006)] == ["0.0", "0.0", "-0.1"]
    assert [change(v, "seconds") for v in (-0.04, 0.06, -1e4)] == ["0.0 s", "+0.1 s", "-10,000 s"]
    assert amount(-0.0004, "fraction") == "0.0 %"


def test_a_target_is_reached_by_a_mean_and_not_by_luck():
    values = [0.9, 0.1, 0.2, 0.6, 0.7, 0.8]
    assert first_reach(values, 0.5, 1) == 0
    assert first_reach(values, 0.5, 3) == 4  # (0.2 + 0.6 + 0.7) / 3 is 0.5
    assert first_reach(values, 0.75, 3) is None
    assert first_reach([1.0, 1.0], 0.5, 3) is None


def test_a_target_that_is_met_exactly_is_reached():
    assert first_reach([0.95] * 6, 0.95, 3) == 2  # (0.95 + 0.95 + 0.95) / 3 is 0.9499999999999998
    assert first_reach([0.95 - 1e-6] * 6, 0.95, 3) is None
