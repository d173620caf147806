"""Which entries a trim keeps: exactly `keep` of them, the largest by magnitude, found without sorting.

The answer for one tensor is a `Cut`: a magnitude, and how many of the entries equal to it are kept, lowest
flat index first. It depends on one checkpoint only, so it can be kept beside the checkpoint and used again.

Two histograms find it, of the upper 15 and then of the lower 16 bits of the magnitude: two passes over the
data, exact, and memory that does not depend on the tensor. For 16-bit data the first one is the answer.
(A bracket guessed from a sample saves most of the second pass, but what it collects has to be partitioned and
grows with the tensor: measured, it was no faster.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from gtr_turbo.merging import arrays
from gtr_turbo.merging.arrays import Floats, Numbers

Chunks = Callable[[], Iterator[tuple[Numbers, Numbers]]]
"""Called anew for each pass; yields (rows (K, n), base (n,) or (0,)) of one tensor, chunk by chunk."""


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
    chunks: Chunks, count: int, size: int, keep: int, *, exact16: bool = False, kernels: ModuleType
) -> list[Cut]:
    """The cuts of one tensor in K checkpoints.

    Args:
        chunks: gives the passes over the tensor.
        count: K.
        size: entries of the tensor.
        keep: how many to keep; 1 to size.
        exact16: the changes are 16-bit numbers, so the upper bits are all there is.
        kernels: from `backend`.
    """
    if keep >= size:
        return [Cut(0, size, 0)] * count  # zeros are "equal to the cut"
    counts = np.zeros((count, 1 << 15), np.int64)
    for rows, base in chunks():
        kernels.upper_histogram(rows, base, counts)
    found = [kernels.descend(row, keep) for row in counts]
    if exact16:
        return [Cut(upper << 16, need, ties) for upper, need, ties in found]
    upper = np.array([place for place, _, _ in found], np.uint32)
    counts = np.zeros((count, 1 << 16), np.int64)
    for rows, base in chunks():
        kernels.lower_histogram(rows, base, upper, counts)
    cuts = []
    for (place, rank, _), row in zip(found, counts, strict=True):
        lower, need, ties = kernels.descend(row, rank)
        cuts.append(Cut(place << 16 | lower, need, ties))
    return cuts


def cut_of(change: Floats, density: float, *, kernels: ModuleType) -> Cut:
    """The cut of one change in memory, (n,) float32."""
    size = change.size
    if size == 0:
        return Cut(0, 0, 0)
    rows = change[None]
    return find_cuts(
        lambda: iter([(rows, change[:0])]), 1, size, keep_count(size, density), kernels=kernels
    )[0]
