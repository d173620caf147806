"""Which entries a trim keeps: exactly `keep` of them, the largest by magnitude, found without sorting.

The answer for one tensor is a `Cut`: a magnitude, and how many of the entries equal to it are kept, lowest
flat index first. It depends on one checkpoint only, so it can be kept beside the checkpoint and used again.

Two ways find it, and both are exact:

* a bracket around the wanted magnitude is guessed from a sample; one pass counts what lies above and collects
  what lies inside (a few percent), and a partition there finds the magnitude;
* two histograms, of the upper 15 and the lower 16 bits of the magnitude; two passes, memory that does not
  depend on the tensor. For 16-bit data the first histogram alone is the answer. It steps in where the sample
  was wrong or the bracket holds too much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from gtr_turbo.merging import arrays
from gtr_turbo.merging.arrays import Floats, Numbers

Chunks = Callable[[], Iterator[tuple[Numbers, Numbers]]]
"""Called anew for each pass; yields (rows (K, n), base (n,) or (0,)) of one tensor, chunk by chunk."""

CAPACITY = 1 << 22
"""Entries that all brackets of one tensor may hold together (4 bytes each)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """The threshold of one tensor."""

    magnitude: int
    """Bit pattern of the float32 threshold; larger magnitudes are kept."""
    need: int
    """How many entries equal to the threshold are kept, lowest flat index first."""
    ties: int
    """How many entries are equal to it."""


def backend(name: str = "numba") -> ModuleType:
    """The kernels: `numba`, or the same in `numpy`.

    Raises:
        ValueError: another name.
    """
    if name == "numba":
        from gtr_turbo.merging import kernels

        return kernels
    if name == "numpy":
        return arrays
    raise ValueError(f"backend {name!r}: expected 'numba' or 'numpy'")


def keep_count(size: int, density: float) -> int:
    """max(1, int(density * size)): how many entries a trim keeps; 0 of an empty tensor."""
    return min(size, max(1, int(density * size)))


def find_cuts(
    chunks: Chunks,
    count: int,
    size: int,
    keep: int,
    *,
    sample: Floats | None = None,
    exact16: bool = False,
    kernels: ModuleType,
) -> list[Cut]:
    """The cuts of one tensor in K checkpoints.

    Args:
        chunks: gives the passes over the tensor.
        count: K.
        size: entries of the tensor.
        keep: how many to keep; 1 to size.
        sample: (K, m) float32 changes, spread over the tensor; None goes straight to the histograms.
        exact16: the changes are 16-bit numbers, so the upper bits are all there is.
        kernels: from `backend`.
    """
    if keep >= size:
        return [Cut(0, size, 0)] * count  # zeros are "equal to the cut"
    if sample is not None and not exact16:
        found = _by_bracket(chunks, count, size, keep, sample, kernels)
        if found is not None:
            return found
    return _by_histogram(chunks, count, keep, exact16, kernels)


def _by_bracket(
    chunks: Chunks, count: int, size: int, keep: int, sample: Floats, kernels: ModuleType
) -> list[Cut] | None:
    """None if a bracket missed or did not fit."""
    low, high = _brackets(arrays.magnitudes(sample), keep / size)
    kept = np.empty((count, min(size + 4096, CAPACITY // count)), np.uint32)
    filled, above = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for rows, base in chunks():
        kernels.gather(rows, base, low, high, kept, filled, above)
    cuts = []
    for k in range(count):
        rank = keep - int(above[k])  # of the wanted entry among those collected, the largest is 1
        if filled[k] > kept.shape[1] or not 1 <= rank <= filled[k]:
            return None
        inside = kept[k, : filled[k]]
        inside.partition(len(inside) - rank)
        threshold = inside[len(inside) - rank]
        larger = int(np.count_nonzero(inside > threshold))
        ties = int(np.count_nonzero(inside == threshold))
        cuts.append(Cut(int(threshold), rank - larger, ties))
    return cuts


def _brackets(
    sample: NDArray[np.uint32], density: float
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Bounds that hold the wanted magnitude almost surely: six standard errors of the sample's quantile.

    Neighbours in a tensor are alike, so a quarter of the sample counts as independent.
    """
    size = sample.shape[1]
    margin = 6 * np.sqrt(density * (1 - density) / max(1, size / 4)) + 1 / size
    ranks = size * np.clip([1 - density - margin, 1 - density + margin], 0, 1)
    first, last = int(ranks[0]), min(size - 1, int(np.ceil(ranks[1])))
    parted = np.partition(sample, (first, last), axis=1)
    low = parted[:, first] if density + margin < 1 else np.zeros(len(sample), np.uint32)
    high = parted[:, last] if density > margin else np.full(len(sample), arrays.MAGNITUDE)
    return np.ascontiguousarray(low), np.ascontiguousarray(high)


def _by_histogram(
    chunks: Chunks, count: int, keep: int, exact16: bool, kernels: ModuleType
) -> list[Cut]:
    counts = np.zeros((count, 65536), np.int64)
    for rows, base in chunks():
        kernels.histogram(rows, base, np.full(count, -1), counts)
    found = [_descend(row, keep) for row in counts]
    if exact16:
        return [Cut(upper << 16, need, ties) for upper, need, ties in found]
    counts[:] = 0
    for rows, base in chunks():
        kernels.histogram(rows, base, np.array([upper for upper, _, _ in found]), counts)
    cuts = []
    for (upper, rank, _), row in zip(found, counts, strict=True):
        lower, need, ties = _descend(row, rank)
        cuts.append(Cut(upper << 16 | lower, need, ties))
    return cuts


def _descend(counts: NDArray[np.int64], rank: int) -> tuple[int, int, int]:
    """(bin that holds the entry of this rank from above, its rank inside the bin, the bin's count)."""
    larger = np.cumsum(counts[::-1])
    place = int(np.searchsorted(larger, rank))
    before = int(larger[place - 1]) if place else 0
    chosen = len(counts) - 1 - place
    return chosen, rank - before, int(counts[chosen])


def cut_of(change: Floats, density: float, *, kernels: ModuleType) -> Cut:
    """The cut of one change in memory, (n,) float32."""
    size = change.size
    if size == 0:
        return Cut(0, 0, 0)
    rows = change[None]
    return find_cuts(
        lambda: iter([(rows, change[:0])]),
        1,
        size,
        keep_count(size, density),
        sample=np.ascontiguousarray(change[None, :: stride(size)]),
        kernels=kernels,
    )[0]


def stride(size: int) -> int:
    """Of a sample of a tensor in memory: an eighth of it, at most 65,536 entries."""
    return max(8, -(-size // (1 << 16)))
