"""The passes over numbers that make a merge fast, compiled by numba; `arrays.py` is the same in numpy.

All kernels work on one chunk of one tensor, of K checkpoints at once. Letters: K checkpoints, n entries of
the chunk. Numbers arrive as rows of float32, or of uint16 that hold bfloat16; a change is `row - base`, in
float32 (`base` of length 0: the rows are changes already). The magnitude of a change is compared as the
integer pattern of its absolute value, which orders like the value, and makes "equal" exact.

Every kernel walks the chunk in blocks that stay in the first-level cache. Loops vectorise: they touch few arrays,
read floats as patterns without a detour through memory, and the sums of a block lie in one array, as compilers
give up on proving that five do not overlap. None depends on the number of threads; all release the
interpreter's lock.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

BLOCK = 512
PIECE = 128
MAGNITUDE = np.uint32(0x7FFFFFFF)
POSITIVE, NEGATIVE, POSITIVE_W, NEGATIVE_W, KEPT = (np.uint64(BLOCK * i) for i in range(5))
"""Where the parts of a block's sums begin: of positive and negative values, of their weights; and what the
trim left of the last checkpoint."""

# numpy's division, without Python's exception on zero: that check would keep loops from vectorising
kernel = njit(nogil=True, cache=True, error_model="numpy")


@intrinsic
def _float(context: Any, number: Any) -> Any:
    """Float32 of a float32, or of uint16 that holds bfloat16."""

    def same(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return arguments[0]

    def shifted(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(number), same if number == types.float32 else shifted


@intrinsic
def _pattern(context: Any, number: Any) -> Any:
    """Bits of a float32, as uint32."""

    def bitcast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), bitcast


@kernel
def _magnitude(x):
    """Pattern of abs(x)."""
    return np.uint32(_pattern(x) & MAGNITUDE)


@kernel
def _widen(row, x):
    """X = row, as float32."""
    for i in range(row.size):
        x[i] = _float(row[i])


@kernel
def upper_histogram(rows, base, counts):
    """Add to counts (K, 32768) int64 how many changes have which upper 15 bits of their magnitude."""
    number, size = rows.shape
    known = np.zeros(BLOCK, np.float32)
    bins = np.empty(BLOCK, np.uint16)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        _widen(base[start : start + count], known)
        for k in range(number):
            row, into = rows[k, start : start + count], counts[k]
            for i in range(count):
                x = _float(row[i]) - known[i]
                bins[i] = np.uint16(_magnitude(x) >> np.uint32(16))
            for i in range(count):
                into[bins[i]] += 1


@kernel
def lower_histogram(rows, base, upper, counts):
    """Add to counts (K, 65536) int64 the lower 16 bits of magnitudes whose upper bits are upper (K,)."""
    number, size = rows.shape
    known = np.zeros(BLOCK, np.float32)
    patterns = np.empty(PIECE, np.uint32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        _widen(base[start : start + count], known)
        for k in range(number):
            into, asked = counts[k], upper[k]
            for at in range(0, count, PIECE):
                piece = min(PIECE, count - at)
                row = rows[k, start + at : start + at + piece]
                own = known[at : at + piece]
                hits = np.uint32(0)
                for i in range(piece):
                    pattern = _magnitude(_float(row[i]) - own[i])
                    patterns[i] = pattern
                    hits = np.uint32(hits + np.uint32(pattern >> np.uint32(16) == asked))
                if hits:
                    found = np.uint64(0)
                    for i in range(piece):
                        patterns[found] = patterns[i]
                        found += np.uint64(patterns[i] >> np.uint32(16) == asked)
                    for i in range(hits):
                        into[patterns[i] & np.uint32(0xFFFF)] += 1


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
def _split(row, known, cut, quota):
    """Where in a block the quota of entries equal to the cut ends.

    Returns:
        (entries before it that are equal to `cut` are kept, those after are not; what is left of the quota).
    """
    if quota == 0:
        return 0, quota
    equal = np.uint32(0)
    for i in range(row.size):
        equal = np.uint32(equal + np.uint32(_magnitude(_float(row[i]) - known[i]) == cut))
    if equal <= quota:
        return row.size, quota - equal
    for i in range(row.size):
        if _magnitude(_float(row[i]) - known[i]) == cut:
            quota -= 1
            if quota == 0:
                return i + 1, quota
    return row.size, quota


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
def _vote(row, known, limit, cut, weight, mass, sums):
    """Add a block's changes to the four sums of TIES; those below the pattern `limit` count as zero.

    Returns:
        (changes equal to zero, magnitudes above `cut`, largest pattern).
    """
    zero = np.float32(0)
    none = more = most = np.uint32(0)
    for j in range(row.size):
        i = np.uint64(j)
        x = _float(row[i]) - known[i]
        pattern = _magnitude(x)
        none = np.uint32(none + np.uint32(pattern == 0))
        more = np.uint32(more + np.uint32(pattern > cut))
        most = pattern if pattern > most else most
        x = x if pattern >= limit else zero
        value = weight * x
        sums[POSITIVE + i] += value if x > zero else zero
        sums[NEGATIVE + i] += value if x < zero else zero
        sums[POSITIVE_W + i] += mass if x > zero else zero
        sums[NEGATIVE_W + i] += mass if x < zero else zero
        sums[KEPT + i] = x
    return np.int64(none), np.int64(more), most


@kernel
def _add(row, known, weight, sums):
    """Add a block's weighted changes to the first of the sums."""
    for i in range(row.size):
        sums[i] += weight * (_float(row[i]) - known[i])


@kernel
def _survey(x, count, most):
    """(how many numbers are zero, the largest pattern of a magnitude among them and `most`)."""
    none = np.uint32(0)
    for i in range(count):
        pattern = _magnitude(x[i])
        none = np.uint32(none + np.uint32(pattern == 0))
        most = pattern if pattern > most else most
    return np.int64(none), most


@kernel
def _elect(count, ballot, sums, out):
    """The mean of the entries of the elected sign; `ballot` decides, a zero counting as positive."""
    zero, one = np.float32(0), np.float32(1)
    for j in range(count):
        i = np.uint64(j)
        total, other = (
            sums[POSITIVE + i],
            sums[NEGATIVE + i],
        )  # loaded on both ways: a choice, no branch
        mass, less = sums[POSITIVE_W + i], sums[NEGATIVE_W + i]
        plus = ballot[i] >= zero
        total, mass = total if plus else other, mass if plus else less
        out[i] = total / (mass if mass > zero else one)


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
    known, x = np.zeros(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    nothing = np.zeros(BLOCK, np.float32)
    ballot = np.empty(BLOCK, np.float32)
    sums = np.empty(5 * BLOCK, np.float32)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        ballot[:] = np.float32(0)
        sums[:] = np.float32(0)
        _widen(base[start : start + count], known)
        for k in range(number):
            row, weight = rows[k, start : start + count], weights[k]
            mass = np.float32(1) if unweighted else weight
            none, more, most = 0, 0, np.uint32(0)
            if keys.size:
                for i in range(count):
                    x[i] = _float(row[i]) - known[i]
                none, most = _survey(x, count, most)
                _drop(x, count, keys[k], at + start, bound, scale)
                if vote:
                    _vote(x[:count], nothing, np.uint32(0), np.uint32(0), weight, mass, sums)
                else:
                    _add(x[:count], nothing, weight, sums)
            elif not vote:
                _add(row, known, weight, sums)
            elif not cuts.size:
                _vote(row, known, np.uint32(0), np.uint32(0), weight, mass, sums)
            else:
                cut = cuts[k]
                split, quotas[k] = _split(row, known, cut, quotas[k])
                none, more, most = _vote(row[:split], known, cut, cut, weight, mass, sums)
                if split < count:
                    rest, above = row[split:], np.uint32(cut + np.uint32(1))
                    a, b, c = _vote(rest, known[split:], above, cut, weight, mass, sums[split:])
                    none, more, most = none + a, more + b, max(most, c)
            zeros[k] += none
            larger[k] += more
            largest[k] = max(largest[k], most)
            if unweighted:
                for i in range(count):
                    ballot[i] += sums[KEPT + np.uint64(i)]
        merged = out[start : start + count]
        if vote:
            if not unweighted:
                for j in range(count):
                    i = np.uint64(j)
                    ballot[i] = sums[POSITIVE + i] + sums[NEGATIVE + i]
            _elect(count, ballot, sums, merged)
        else:
            for i in range(count):
                merged[i] = sums[i] / divisor


@kernel
def accumulate(change, cut, quota, weight, positive, negative, positive_w, negative_w):
    """Trim a change (n,) and add it to the running sums of TIES, each (n,) float32.

    Returns:
        (changes equal to zero, largest magnitude pattern).
    """
    size = change.size
    nothing = np.zeros(BLOCK, np.float32)
    sums = np.empty(5 * BLOCK, np.float32)
    parts = sums.reshape(5, BLOCK)
    zeros, most = 0, np.uint32(0)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        stop = start + count
        row = change[start:stop]
        parts[0, :count], parts[1, :count] = positive[start:stop], negative[start:stop]
        parts[2, :count], parts[3, :count] = positive_w[start:stop], negative_w[start:stop]
        split, quota = _split(row, nothing, cut, quota)
        none, _, above = _vote(row[:split], nothing, cut, cut, weight, weight, sums)
        zeros, most = zeros + none, max(most, above)
        rest = np.uint32(cut + np.uint32(1))
        none, _, above = _vote(row[split:], nothing, rest, cut, weight, weight, sums[split:])
        zeros, most = zeros + none, max(most, above)
        positive[start:stop], negative[start:stop] = parts[0, :count], parts[1, :count]
        positive_w[start:stop], negative_w[start:stop] = parts[2, :count], parts[3, :count]
    return zeros, most


@kernel
def elect(positive, negative, positive_w, negative_w, out):
    """The merge that running sums stand for; all (n,) float32."""
    zero, one = np.float32(0), np.float32(1)
    for i in range(out.size):
        total, other = positive[i], negative[i]
        mass, less = positive_w[i], negative_w[i]
        plus = total + other >= zero
        total, mass = total if plus else other, mass if plus else less
        out[i] = total / (mass if mass > zero else one)


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
    wide = np.zeros(BLOCK, np.float32)
    x = np.empty(BLOCK, np.float32)
    bits = x.view(np.uint32)
    most = np.uint32(0)
    for start in range(0, size, BLOCK):
        count = min(BLOCK, size - start)
        part, rounded = change[start : start + count], out[start : start + count]
        if base.size:
            _widen(base[start : start + count], wide)
            for i in range(count):
                x[i] = wide[i] + factor * part[i]
        else:
            for i in range(count):
                x[i] = factor * part[i]
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
        most = _survey(x, count, most)[1]
    return most
