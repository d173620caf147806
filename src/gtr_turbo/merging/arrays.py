"""The kernels of `kernels.py` in plain numpy: the same names, arguments and bits, and no compiler.

A test holds the two equal. This is the readable form; arguments are documented there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.generic]
Floats = NDArray[np.float32]
Patterns = NDArray[np.uint32]
Counts = NDArray[np.int64]

MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITE = np.uint32(0x7F800000)
"""Magnitudes from here on are infinite or not a number."""


def widen(row: Numbers) -> Floats:
    """Float32 of float32, or of uint16 that holds bfloat16."""
    if row.dtype == np.uint16:
        return (row.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return row.astype(np.float32, copy=False)


def _change(row: Numbers, base: Numbers) -> Floats:
    return widen(row) - widen(base) if base.size else widen(row)


def magnitudes(x: Floats) -> Patterns:
    """Bit patterns of |x|, which order as |x| does."""
    return x.view(np.uint32) & MAGNITUDE


def upper_histogram(rows: Numbers, base: Numbers, counts: Counts) -> None:
    """Add to counts (K, 32768) how many changes have which upper 15 bits of their magnitude."""
    for k, row in enumerate(rows):
        upper = magnitudes(_change(row, base)) >> np.uint32(16)
        counts[k] += np.bincount(upper, minlength=1 << 15)


def lower_histogram(rows: Numbers, base: Numbers, upper: Patterns, counts: Counts) -> None:
    """Add to counts (K, 65536) the lower 16 bits of magnitudes whose upper bits are upper (K,)."""
    for k, row in enumerate(rows):
        bits = magnitudes(_change(row, base))
        lower = bits[bits >> np.uint32(16) == upper[k]] & np.uint32(0xFFFF)
        counts[k] += np.bincount(lower, minlength=1 << 16)


def descend(counts: Counts, rank: int) -> tuple[int, int, int]:
    """Find the entry of a rank in a histogram: (its bin, its rank inside the bin, the bin's count)."""
    larger = np.cumsum(counts[::-1])
    place = int(np.searchsorted(larger, rank))
    before = int(larger[place - 1]) if place else 0
    chosen = len(counts) - 1 - place
    return chosen, rank - before, int(counts[chosen])


def _trim(x: Floats, cut: np.uint32, quota: int) -> tuple[Floats, int]:
    bits = magnitudes(x)
    keep = bits > cut
    equal = np.flatnonzero(bits == cut)[:quota]
    keep[equal] = True
    return np.where(keep, x, np.float32(0)), quota - len(equal)


def _drop(x: Floats, key: np.uint64, at: int, bound: np.uint64, scale: np.float32) -> Floats:
    z = key + np.arange(at, at + x.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.where((z >> np.uint64(40)) < bound, x * scale, np.float32(0))


def _vote(x: Floats, weight: np.float32, mass: np.float32, sums: tuple[Floats, ...]) -> None:
    zero = np.float32(0)
    for positive, sign, amount in (
        (sums[0], x > 0, weight * x),
        (sums[1], x < 0, weight * x),
        (sums[2], x > 0, mass),
        (sums[3], x < 0, mass),
    ):
        positive += np.where(sign, amount, zero)


def _elect(ballot: Floats, sums: tuple[Floats, ...]) -> Floats:
    plus = ballot >= 0
    total, mass = np.where(plus, sums[0], sums[1]), np.where(plus, sums[2], sums[3])
    merged: Floats = (total / np.where(mass > 0, mass, np.float32(1))).astype(
        np.float32, copy=False
    )
    return merged


def combine(
    rows: Numbers,
    base: Numbers,
    weights: Floats,
    divisor: np.float32,
    vote: bool,
    unweighted: bool,
    cuts: Patterns,
    quotas: Counts,
    keys: NDArray[np.uint64],
    bound: np.uint64,
    scale: np.float32,
    at: int,
    zeros: Counts,
    larger: Counts,
    largest: Patterns,
    out: Floats,
) -> None:
    """Merge a chunk."""
    sums = tuple(np.zeros((5, rows.shape[1]), np.float32))
    for k, row in enumerate(rows):
        x = _change(row, base)
        bits = magnitudes(x)
        if cuts.size or keys.size:
            zeros[k] += np.count_nonzero(bits == 0)
            largest[k] = max(largest[k], bits.max(initial=0))
        if cuts.size:
            larger[k] += np.count_nonzero(bits > cuts[k])
            x, quotas[k] = _trim(x, cuts[k], int(quotas[k]))
        if keys.size:
            x = _drop(x, keys[k], at, bound, scale)
        if vote:
            _vote(x, weights[k], np.float32(1) if unweighted else weights[k], sums)
            sums[4][:] += x
        else:
            sums[0][:] += weights[k] * x
    if vote:
        out[:] = _elect(sums[4] if unweighted else sums[0] + sums[1], sums)
    else:
        out[:] = sums[0] / divisor


def accumulate(
    change: Floats,
    cut: np.uint32,
    quota: int,
    weight: np.float32,
    positive: Floats,
    negative: Floats,
    positive_w: Floats,
    negative_w: Floats,
) -> tuple[int, np.uint32]:
    """Trim a change and add it to the running sums of TIES."""
    bits = magnitudes(change)
    x, _ = _trim(change, cut, quota)
    _vote(x, weight, weight, (positive, negative, positive_w, negative_w))
    return int(np.count_nonzero(bits == 0)), bits.max(initial=0)


def elect(
    positive: Floats, negative: Floats, positive_w: Floats, negative_w: Floats, out: Floats
) -> None:
    """The merge that running sums stand for."""
    out[:] = _elect(positive + negative, (positive, negative, positive_w, negative_w))


def finish(change: Floats, base: Numbers, factor: np.float32, out: Numbers) -> np.uint32:
    """Out = base + factor * change, rounded once; returns the largest magnitude pattern in `out`."""
    x = factor * change
    if base.size:
        x = widen(base) + x
    if out.dtype == np.uint16:
        bits = x.view(np.uint32)
        up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        number = (bits & MAGNITUDE) <= INFINITE
        bits = np.where(number, bits + up, bits | np.uint32(0x400000))
        out[:] = bits >> np.uint32(16)
        x = (bits & np.uint32(0xFFFF0000)).view(np.float32)
    else:
        out[:] = x
    return np.uint32(magnitudes(x).max(initial=0))
