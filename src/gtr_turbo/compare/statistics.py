"""Statistics over seeds: pure functions of arrays. What each is good for stands in docs/compare.md.

Scores are arrays (strata, seeds): a stratum is a task or setting that is not compared but averaged over. NaN
is a run that is missing. The bootstraps and the interquartile mean are those of rliable (Agarwal et al. 2021,
arXiv 2108.13264); with few seeds they are too narrow, so means and differences have Student's intervals too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 5000
"""Resamples of a bootstrap."""
SEED = 0
"""Of every bootstrap: the same scores give the same interval."""
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number over seeds. An interval is None where the seeds show no spread, or there is only one."""

    seeds: int
    """Scores it rests on, over all strata."""
    mean: float
    student: Interval | None
    """95 % interval of `mean`, Student's t."""
    bootstrap: Interval | None
    """95 % interval of `mean`, percentiles of the stratified bootstrap."""
    iqm: float
    iqm_bootstrap: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One variant minus another, seed by seed."""

    pairs: int
    mean: float
    student: Interval | None
    """95 % interval of `mean`, Student's t on the pairs."""
    bootstrap: Interval | None
    """95 % interval of `mean`, percentiles of a bootstrap that resamples pairs."""
    above: int
    """Pairs in which the variant is the higher one."""
    below: int
    improvement: float
    """Probability that a run of the variant is higher than a run of the other, ties half."""
    improvement_bootstrap: Interval | None


def interquartile_mean(scores: Array) -> Array:
    """Mean over the last axis without its lowest and highest quarter (each rounded down to whole scores)."""
    ordered = np.sort(scores, axis=-1)
    cut = ordered.shape[-1] // 4
    return np.asarray(ordered[..., cut : ordered.shape[-1] - cut].mean(axis=-1))


def stratified_mean(strata: Sequence[Array]) -> Array:
    """Mean of the strata's means, each over the last axis."""
    return np.asarray(np.mean([stratum.mean(axis=-1) for stratum in strata], axis=0))


def student_quantile(freedom: float, level: float = LEVEL) -> float:
    """The t that a Student variable stays below in absolute value with probability `level`.

    By bisection on Simpson's integral of the density, with the substitution t = sqrt(freedom) tan(u).
    """
    # density in u: c cos(u)^(freedom - 1) on (-pi/2, pi/2)
    log_c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(math.pi)

    def inside(u: float) -> float:
        grid = np.linspace(0.0, u, 2001)
        heights = np.exp(log_c) * np.cos(grid) ** (freedom - 1)
        simpson = heights[0] + heights[-1] + 4 * heights[1::2].sum() + 2 * heights[2:-1:2].sum()
        return float(2 * simpson * u / 6000)

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def student_interval(strata: Sequence[Array], level: float = LEVEL) -> Interval | None:
    """Student's interval of `stratified_mean`; None without spread, or with one score in a stratum.

    The standard error adds the strata's variances of the mean; the degrees of freedom are Welch's and
    Satterthwaite's. For one stratum both are the usual ones.
    """
    if any(len(stratum) < 2 for stratum in strata):
        return None
    parts = np.array([s.var(ddof=1) / len(s) for s in strata]) / len(strata) ** 2
    variance = float(parts.sum())
    centre = float(stratified_mean(strata))
    if math.sqrt(variance) <= 1e-12 * max(1.0, abs(centre)):
        return None
    shares = parts**2 / np.array([len(s) - 1 for s in strata])
    half = student_quantile(variance**2 / float(shares.sum()), level) * math.sqrt(variance)
    return centre - half, centre + half


def bootstrap(
    strata: Sequence[Array], statistic: Callable[[Sequence[Array]], Array], level: float = LEVEL
) -> Interval | None:
    """Percentile interval of `statistic`; seeds are drawn with replacement within each stratum.

    Args:
        strata: each (..., seeds): what belongs to one seed is drawn together.
        statistic: takes strata (resamples, ..., seeds), returns (resamples,).
        level: of the interval.

    Returns:
        The interval; None if no two resamples differ, as with one seed.
    """
    generator = np.random.default_rng(SEED)
    drawn = []
    for stratum in strata:
        chosen = generator.integers(stratum.shape[-1], size=(RESAMPLES, stratum.shape[-1]))
        drawn.append(np.moveaxis(stratum[..., chosen], -2, 0))
    found = statistic(drawn)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if np.ptp(found) > 1e-12 else None


def estimate(scores: Array) -> Estimate | None:
    """Means of scores (strata, seeds) with their intervals; None if a stratum has no score."""
    strata = [row[~np.isnan(row)] for row in np.atleast_2d(scores)]
    if not all(map(len, strata)):
        return None

    def iqm(rows: Sequence[Array]) -> Array:
        return interquartile_mean(np.concatenate(rows, axis=-1))

    return Estimate(
        seeds=sum(map(len, strata)),
        mean=float(stratified_mean(strata)),
        student=student_interval(strata),
        bootstrap=bootstrap(strata, stratified_mean),
        iqm=float(iqm(strata)),
        iqm_bootstrap=bootstrap(strata, iqm),
    )


def probability_of_improvement(strata: Sequence[Array]) -> Array:
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs of a stratum, mean over the strata (Mann-Whitney's U / nm).

    Args:
        strata: each (..., 2, seeds), X and Y.
    """
    signs = [np.sign(s[..., 0, :, None] - s[..., 1, None, :]).mean(axis=(-2, -1)) for s in strata]
    return np.asarray((np.mean(signs, axis=0) + 1) / 2)


def difference(scores: Array, base: Array) -> Difference | None:
    """Scores minus the base's, both (strata, seeds) with the seeds in one order.

    Pairs are runs of one stratum and one seed of which both are there. None if a stratum has no pair.
    """
    both = np.stack([np.atleast_2d(scores), np.atleast_2d(base)], axis=1)  # (strata, 2, seeds)
    pairs = [rows[:, ~np.isnan(rows).any(axis=0)] for rows in both]
    if not all(pair.size for pair in pairs):
        return None
    gaps = [x - y for x, y in pairs]
    every = np.concatenate(gaps)
    return Difference(
        pairs=len(every),
        mean=float(stratified_mean(gaps)),
        student=student_interval(gaps),
        bootstrap=bootstrap(gaps, stratified_mean),
        above=int((every > 0).sum()),
        below=int((every < 0).sum()),
        improvement=float(probability_of_improvement(pairs)),
        improvement_bootstrap=bootstrap(pairs, probability_of_improvement),
    )


def area(x: Sequence[float], y: Sequence[float], low: float, high: float) -> float | None:
    """Mean height of a curve between `low` and `high`: its area by trapezoids, divided by the range.

    Ends that lie between two points are interpolated. None if the curve does not span the range.
    """
    if not x or low > high or x[0] > low or x[-1] < high:
        return None
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if low == high:
        return float(np.interp(low, xs, ys))
    inner = (xs > low) & (xs < high)
    grid = np.concatenate([[low], xs[inner], [high]])
    return float(np.trapezoid(np.interp(grid, xs, ys), grid) / (high - low))


def first_reach(y: Sequence[float], target: float, window: int) -> int | None:
    """Index of the first value at which the mean of the last `window` values is at least `target`.

    Fewer values at the beginning are not averaged: a lucky first value is not enough.
    """
    for end in range(window, len(y) + 1):
        if math.fsum(y[end - window : end]) / window >= target:
            return end - 1
    return None
