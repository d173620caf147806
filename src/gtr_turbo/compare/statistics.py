"""Statistics over seeds: pure functions of arrays. What each is good for stands in docs/compare.md.

Scores are arrays (strata, seeds): a stratum is a setting that is not compared but averaged over. NaN is a run
that is missing. Runs of one seed share their deals over all strata, so what is independent is a seed: intervals
are over seeds, and bootstraps draw a seed's runs together. Interquartile mean and probability of improvement are
those of rliable (Agarwal et al. 2021, arXiv 2108.13264). With few seeds bootstraps are too narrow, so means and
differences have Student's intervals too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gtr_turbo.student import LEVEL, student_quantile

Array = NDArray[np.float64]
Interval = tuple[float, float]

RESAMPLES = 5000
"""Resamples of a bootstrap."""
SEED = 0
"""Of every bootstrap: the same scores give the same interval."""
TIE = 1e-9
"""Numbers closer than this (times the larger one, if that is above 1) are the same: float noise is no win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number over seeds. An interval is None where the seeds show no spread, or there is only one."""

    seeds: int
    """Seeds with a score in every stratum; the others are left out."""
    runs: int
    """Scores it rests on: those seeds', over all strata."""
    mean: float
    t_interval: Interval | None
    """95 % interval of `mean`, Student's t."""
    bootstrap: Interval | None
    """95 % interval of `mean`, percentiles of a bootstrap that resamples seeds."""
    iqm: float
    iqm_bootstrap: Interval | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One variant minus another, seed by seed."""

    seeds: int
    """Seeds with a pair in every stratum; the others are left out."""
    pairs: int
    """Pairs it rests on: those seeds', over all strata."""
    mean: float
    t_interval: Interval | None
    """95 % interval of `mean`, Student's t on the seeds' gaps."""
    bootstrap: Interval | None
    """95 % interval of `mean`, percentiles of a bootstrap that resamples seeds with their pairs."""
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


def student_interval(scores: Array, level: float = LEVEL) -> Interval | None:
    """Student's interval of the mean of scores (seeds,); None without spread, or with one score."""
    if len(scores) < 2:
        return None
    centre, error = float(scores.mean()), float(scores.std(ddof=1)) / math.sqrt(len(scores))
    if error <= 1e-12 * max(1.0, abs(centre)):
        return None
    half = student_quantile(len(scores) - 1, level) * error
    return centre - half, centre + half


def bootstrap(
    scores: Array, statistic: Callable[[Array], Array], level: float = LEVEL
) -> Interval | None:
    """Percentile interval of `statistic`; seeds are drawn with replacement.

    Args:
        scores: (..., seeds); what belongs to one seed is drawn together.
        statistic: takes (resamples, ..., seeds), returns (resamples,).
        level: of the interval.

    Returns:
        The interval; None if no two resamples differ, as with one seed.
    """
    chosen = _resamples(scores.shape[-1])
    return _percentiles(statistic(np.moveaxis(scores[..., chosen], -2, 0)), level)


def _resamples(seeds: int) -> NDArray[np.int64]:
    """(RESAMPLES, seeds), each a draw of all seeds with replacement; the same in every call."""
    return np.random.default_rng(SEED).integers(seeds, size=(RESAMPLES, seeds))


def _percentiles(found: Array, level: float = LEVEL) -> Interval | None:
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return (float(low), float(high)) if np.ptp(found) > 1e-12 else None


def mean_of_all(scores: Array) -> Array:
    """Mean over the last two axes, (strata, seeds)."""
    return np.asarray(scores.mean(axis=(-2, -1)))


def iqm_of_all(scores: Array) -> Array:
    """Interquartile mean over the last two axes, (strata, seeds)."""
    return interquartile_mean(scores.reshape(*scores.shape[:-2], -1))


def estimate(scores: Array) -> Estimate | None:
    """Means of scores (strata, seeds) with their intervals; None if no seed has a score in every stratum."""
    whole = np.atleast_2d(scores)
    whole = whole[:, ~np.isnan(whole).any(axis=0)]
    if not whole.size:
        return None
    return Estimate(
        seeds=whole.shape[1],
        runs=whole.size,
        mean=float(mean_of_all(whole)),
        t_interval=student_interval(whole.mean(axis=0)),
        bootstrap=bootstrap(whole, mean_of_all),
        iqm=float(iqm_of_all(whole)),
        iqm_bootstrap=bootstrap(whole, iqm_of_all),
    )


def probability_of_improvement(pairs: Array) -> tuple[float, Interval | None]:
    """P(X > Y) + P(X = Y) / 2 over all pairs of runs of a stratum, mean over the strata (Mann-Whitney's U / nm).

    Args:
        pairs: (2, strata, seeds), X and Y.

    Returns:
        The probability, and its interval by the bootstrap of seeds. All pairs of every resample would not fit into
        memory; how often it has each seed, (resamples, seeds), is enough.
    """
    (_, strata, seeds), chosen = pairs.shape, _resamples(pairs.shape[-1])
    wins = sum(signs(x[:, None], y) for x, y in zip(*pairs, strict=True))  # (seeds, seeds)
    times = np.ones((1 + RESAMPLES, seeds))  # the first is all seeds once
    cells = chosen + seeds * np.arange(RESAMPLES)[:, None]
    times[1:] = np.bincount(cells.ravel(), minlength=RESAMPLES * seeds).reshape(RESAMPLES, seeds)
    found = ((times @ wins * times).sum(axis=1) / (strata * seeds**2) + 1) / 2
    return float(found[0]), _percentiles(found[1:])


def signs(x: Array, y: Array) -> Array:
    """1 where x is higher, -1 where y is, 0 where they are the same but for rounding."""
    gap = x - y
    near = TIE * np.maximum(1.0, np.maximum(np.abs(x), np.abs(y)))
    return np.where(np.abs(gap) < near, 0.0, np.sign(gap))


def difference(scores: Array, base: Array) -> Difference | None:
    """Scores minus the base's, both (strata, seeds) with strata and seeds in one order.

    None if no seed has both in every stratum.
    """
    pairs = np.stack([np.atleast_2d(scores), np.atleast_2d(base)])  # (2, strata, seeds)
    pairs = pairs[..., ~np.isnan(pairs).any(axis=(0, 1))]
    if not pairs.size:
        return None
    gaps, higher = pairs[0] - pairs[1], signs(pairs[0], pairs[1])
    improvement, interval = probability_of_improvement(pairs)
    return Difference(
        seeds=gaps.shape[1],
        pairs=gaps.size,
        mean=float(mean_of_all(gaps)),
        t_interval=student_interval(gaps.mean(axis=0)),
        bootstrap=bootstrap(gaps, mean_of_all),
        above=int((higher > 0).sum()),
        below=int((higher < 0).sum()),
        improvement=improvement,
        improvement_bootstrap=interval,
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

    Fewer values at the beginning are not averaged: a lucky first value is not enough. A mean that rounding puts
    below the target has reached it.
    """
    for end in range(window, len(y) + 1):
        if math.fsum(y[end - window : end]) / window >= target - TIE:
            return end - 1
    return None
