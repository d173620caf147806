"""The passes over numbers that make a merge fast, compiled by numba; `arrays.py` is the same in numpy.

All kernels work on one chunk of one tensor, of K checkpoints at once. Letters: K checkpoints, n entries of
the chunk. Numbers arrive as rows of float32, or of uint16 that hold bfloat16; a change is `row - base`, in
float32 (`base` of length 0: the rows are changes already). The magnitude of a change is compared as the
integer pattern of its absolute value, which orders like the value, and makes "equal" exact.

Every kernel walks the chunk in blocks that stay in the first-level cache, and its inner loops vectorise.
None depends on the number of threads; all release the interpreter's lock.
"""

from __future__ import annotations

import numpy as np
from numba import njit

BLOCK = 512
MAGNITUDE = np.uint32(0x7FFFFFFF)

# numpy's division, without Python's exception on zero: that check would keep loops from vectorising
kernel = njit(nogil=True, cache=True, error_model="numpy")


@kernel
def _widen(row, x, bits):
    """X = row, as float32; `bits` is the same memory as x, as uint32."""
    if row.itemsize == 2:
        for i in range(row.size):
            bits[i] = np.uint32(row[i]) << np.uint32(16)
    else:
        for i in range(row.size):
            x[i] = row[i]


@kernel
def _change(row, base, x, bits):
    """X = row - base, as float32."""
    _widen(row, x, bits)
    for i in range(base.size):
        x[i] = x[i] - base[i]


@kernel
def _survey(bits, count, cut, largest):
    """(how many magnitudes are zero, equal to `cut`, larger; the largest of them and `largest`)."""
    zeros = equal = larger = np.uint32(0)
    for i in range(count):
        pattern = np.uint32(bits[i] & MAGNITUDE)
        zeros = np.uint32(zeros + np.uint32(pattern == 0))
        equal = np.uint32(equal + np.uint32(pattern == cut))
        larger = np.uint32(larger + np.uint32(pattern > cut))
        largest = pattern if pattern > largest else largest
    return np.int64(zeros), np.int64(equal), np.int64(larger), largest


@kernel
def upper_histogram(rows, base, counts):
    """Add to counts (K, 32768) int64 how many changes have which upper 15 bits of their magnitude."""
    number, size = rows.shape
    wide = np.empty(BLOCK, np.float32)
    wide_bits = wide.view(np.uint32)
    x = np.empty(BLOCK, np.float32)
    bits = x.view(np.uint32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        if base.size:
            _widen(base[start : start + count], wide, wide_bits)
        known = wide[: min(count, base.size)]
        for k in range(number):
            _change(rows[k, start : start + count], known, x, bits)
            into = counts[k]
            for i in range(count):
                into[(bits[i] >> np.uint32(16)) & np.uint32(0x7FFF)] += 1


@kernel
def lower_histogram(rows, base, upper, counts):
    """Add to counts (K, 65536) int64 the lower 16 bits of magnitudes whose upper bits are upper (K,)."""
    number, size = rows.shape
    wide = np.empty(BLOCK, np.float32)
    wide_bits = wide.view(np.uint32)
    x = np.empty(BLOCK, np.float32)
    bits = x.view(np.uint32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        if base.size:
            _widen(base[start : start + count], wide, wide_bits)
        known = wide[: min(count, base.size)]
        for k in range(number):
            _change(rows[k, start : start + count], known, x, bits)
            into, asked = counts[k], upper[k]
            for i in range(count):
                if ((bits[i] >> np.uint32(16)) & np.uint32(0x7FFF)) == asked:
                    into[bits[i] & np.uint32(0xFFFF)] += 1


@kernel
def descend(counts, rank):
    """Find the entry of a rank, the largest is 1, in a histogram.

    Returns:
        (its bin, its rank inside the bin, the bin's count).
    """
    place = counts.size - 1
    while place > 0 and rank > counts[place]:
        rank -= counts[place]
        place -= 1
    return place, rank, counts[place]


@kernel
def _trim(bits, count, cut, equal, quota):
    """Zero the entries of a block below `cut`, and those equal to it when `quota` is used up.

    Args:
        bits: (n,) uint32 of a block.
        count: entries of the block.
        cut: pattern.
        equal: how many are equal to it.
        quota: how many of these may be kept.

    Returns:
        what is left of `quota`.
    """
    limit = cut
    if equal <= quota:
        quota -= equal
    elif quota == 0:
        limit = np.uint32(cut + np.uint32(1))
    else:
        for i in range(count):
            if (bits[i] & MAGNITUDE) == cut:
                if quota > 0:
                    quota -= 1
                else:
                    bits[i] = np.uint32(0)
    for i in range(count):
        bits[i] = bits[i] if np.uint32(bits[i] & MAGNITUDE) >= limit else np.uint32(0)
    return quota


@kernel
def _drop(x, count, key, at, bound, scale):
    """Zero entries by a hash of (key, index), SplitMix64; the others are multiplied by `scale`."""
    for i in range(count):
        z = key + np.uint64(at + i) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        x[i] = x[i] * scale if (z >> np.uint64(40)) < bound else np.float32(0)


@kernel
def _vote(x, count, weight, mass, positive, negative, positive_w, negative_w):
    """Add a block to the four sums of TIES: weighted values and masses, by sign."""
    zero = np.float32(0)  # a loop over few arrays vectorises, one over all of them does not
    for i in range(count):
        value = weight * x[i]
        positive[i] += value if x[i] > zero else zero
    for i in range(count):
        value = weight * x[i]
        negative[i] += value if x[i] < zero else zero
    for i in range(count):
        positive_w[i] += mass if x[i] > zero else zero
    for i in range(count):
        negative_w[i] += mass if x[i] < zero else zero


@kernel
def _elect(count, ballot, positive, negative, positive_w, negative_w, mass, out):
    """The mean of the entries of the elected sign; `ballot` decides, a zero counting as positive."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(count):
        plus, minus = positive[i], negative[i]
        out[i] = plus if ballot[i] >= zero else minus
    for i in range(count):
        plus, minus = positive_w[i], negative_w[i]
        mass[i] = plus if ballot[i] >= zero else minus
    for i in range(count):
        total = mass[i]
        out[i] = out[i] / (total if total > zero else one)


@kernel
def combine(  # noqa: C901 - one fused pass
    rows,
    base,
    weights,
    divisor,
    vote,
    unweighted,
    cuts,
    quotas,
    keys,
    bound,
    scale,
    at,
    zeros,
    larger,
    largest,
    out,
):
    """Merge a chunk.

    Args:
        rows: (K, n) numbers.
        base: (n,) or (0,).
        weights: (K,) float32.
        divisor: float32, of the sum (without a vote).
        vote: True elects a sign and takes the mean of those that agree; False sums `weights * changes`.
        unweighted: True elects on unweighted values and divides by the number that agree, not by their weight.
        cuts: (K,) uint32 pattern of the smallest magnitude kept, or (0,) to keep everything.
        quotas: (K,) int64, how many entries equal to the cut are still to be kept; is counted down.
        keys: (K,) uint64 of the random drop, or (0,) for none.
        bound: of 2**24, the fraction of entries that the drop keeps.
        scale: factor of the entries that the drop keeps.
        at: index of the chunk's first entry in its tensor.
        zeros: (K,) int64, counts changes equal to zero before trimming or dropping; not without either.
        larger: (K,) int64, counts magnitudes above the cut.
        largest: (K,) uint32, the largest magnitude seen, where `zeros` is counted; 0x7F800000 or more is not
            finite.
        out: (n,) float32, the merged change.
    """
    number, size = rows.shape
    wide = np.empty(BLOCK, np.float32)
    wide_bits = wide.view(np.uint32)
    x = np.empty(BLOCK, np.float32)
    bits = x.view(np.uint32)
    sums = np.empty((5, BLOCK), np.float32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        sums[:] = np.float32(0)
        if base.size:
            _widen(base[start : start + count], wide, wide_bits)
        known = wide[: min(count, base.size)]
        for k in range(number):
            _change(rows[k, start : start + count], known, x, bits)
            cut = cuts[k] if cuts.size else np.uint32(0)
            equal = more = 0
            if cuts.size or keys.size:
                none, equal, more, largest[k] = _survey(bits, count, cut, largest[k])
                zeros[k] += none
            if cuts.size:
                quotas[k] = _trim(bits, count, cut, equal, quotas[k])
                larger[k] += more
            if keys.size:
                _drop(x, count, keys[k], at + start, bound, scale)
            weight = weights[k]
            if vote:
                mass = np.float32(1) if unweighted else weight
                _vote(x, count, weight, mass, sums[0], sums[1], sums[2], sums[3])
                if unweighted:
                    for i in range(count):
                        sums[4, i] += x[i]
            else:
                for i in range(count):
                    sums[0, i] += weight * x[i]
        merged = out[start : start + count]
        if vote:
            ballot = sums[4]
            if not unweighted:
                for i in range(count):
                    ballot[i] = sums[0, i] + sums[1, i]
            _elect(count, ballot, sums[0], sums[1], sums[2], sums[3], x, merged)
        else:
            total = sums[0]
            for i in range(count):
                merged[i] = total[i] / divisor


@kernel
def accumulate(change, cut, quota, weight, positive, negative, positive_w, negative_w):
    """Trim a change (n,) and add it to the running sums of TIES, each (n,) float32.

    Returns:
        (changes equal to zero, largest magnitude pattern).
    """
    size = change.size
    x = np.empty(BLOCK, np.float32)
    bits = x.view(np.uint32)
    none, most = 0, np.uint32(0)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        _widen(change[start : start + count], x, bits)
        zeros, equal, _, most = _survey(bits, count, cut, most)
        none += zeros
        quota = _trim(bits, count, cut, equal, quota)
        _vote(
            x,
            count,
            weight,
            weight,
            positive[start : start + count],
            negative[start : start + count],
            positive_w[start : start + count],
            negative_w[start : start + count],
        )
    return none, most


@kernel
def elect(positive, negative, positive_w, negative_w, out):
    """The merge that running sums stand for; all (n,) float32."""
    size = out.size
    ballot, mass = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        stop = start + count
        plus, minus = positive[start:stop], negative[start:stop]
        for i in range(count):
            ballot[i] = plus[i] + minus[i]
        _elect(
            count,
            ballot,
            plus,
            minus,
            positive_w[start:stop],
            negative_w[start:stop],
            mass,
            out[start:stop],
        )


@kernel
def finish(change, base, factor, out):
    """Out = base + factor * change, rounded once; returns the largest magnitude pattern in `out`.

    Args:
        change: (n,) float32.
        base: (n,) float32 or uint16, or (0,) for none.
        factor: float32.
        out: (n,) float32, or uint16 that takes bfloat16, rounded to nearest, ties to even.
    """
    size = change.size
    wide = np.empty(BLOCK, np.float32)
    wide_bits = wide.view(np.uint32)
    x = np.empty(BLOCK, np.float32)
    bits = x.view(np.uint32)
    most = np.uint32(0)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        part, rounded = change[start : start + count], out[start : start + count]
        for i in range(count):
            x[i] = factor * part[i]
        if base.size:
            _widen(base[start : start + count], wide, wide_bits)
            for i in range(count):
                x[i] = wide[i] + x[i]
        if out.itemsize == 2:
            for i in range(count):
                pattern = bits[i]
                up = np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
                number = np.uint32(pattern & MAGNITUDE) <= np.uint32(0x7F800000)
                pattern = np.uint32(pattern + up) if number else pattern | np.uint32(0x400000)
                bits[i] = pattern & np.uint32(0xFFFF0000)
            for i in range(count):
                rounded[i] = bits[i] >> np.uint32(16)
        else:
            for i in range(count):
                rounded[i] = x[i]
        most = _survey(bits, count, np.uint32(0), most)[3]
    return most
