"""Merge methods: ordered numbers in, numbers out. No input is modified.

A method is a row of `METHODS`: how each change is thinned out, and how the changes become one. A change is
a checkpoint minus the point it started from. K checkpoints, the oldest first; everything is float32, and
rounded once, at the end.

    linear           weighted mean of the checkpoints (Wortsman et al. 2022)
    slerp            great-circle interpolation between two (Shoemake 1985)
    task-arithmetic  sum of weighted changes (Ilharco et al. 2022)
    ties             trim, elect a sign per entry, mean of those that agree (Yadav et al. 2023)
    dare-linear      drop entries at random and rescale the others (Yu et al. 2023), weighted mean
    dare-ties        drop and rescale, then elect and mean as in ties

Our TIES trims unweighted changes, keeps exactly max(1, int(density * n)) entries of each tensor (equal
magnitudes: lowest flat index first), votes with weights, a sum of zero counting as positive, and divides by
the weight that agrees. `compat="peft"` is PEFT's: unweighted votes, divided by the number that agree, weights
as factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gtr_turbo.merging import arrays
from gtr_turbo.merging.arrays import Floats, Numbers
from gtr_turbo.merging.trim import Cut, find_cuts, keep_count


@dataclass(frozen=True, slots=True)
class Method:
    """A row of the table."""

    thin: str
    """`none`, `trim` (smallest magnitudes to zero) or `drop` (random entries to zero, the rest rescaled)."""
    combine: str
    """`mean` (weighted), `sum` (weighted), `vote` (TIES), `arc` (slerp)."""
    base: bool
    """True if it works on changes against a base; False if on the checkpoints themselves."""
    count: int | None = None
    """How many checkpoints it takes; None: any number."""


METHODS: dict[str, Method] = {
    "linear": Method(thin="none", combine="mean", base=False),
    "slerp": Method(thin="none", combine="arc", base=False, count=2),
    "task-arithmetic": Method(thin="none", combine="sum", base=True),
    "ties": Method(thin="trim", combine="vote", base=True),
    "dare-linear": Method(thin="drop", combine="mean", base=True),
    "dare-ties": Method(thin="drop", combine="vote", base=True),
}


def sma(count: int) -> list[float]:
    """Weights of the simple moving average: 1 / K each."""
    return [1.0 / count] * count


def ema(count: int, alpha: float) -> list[float]:
    """Weights, oldest first, of merged_k = alpha theta_k + (1 - alpha) merged_{k-1}.

    alpha (1 - alpha)^(K - 1 - i); the oldest keeps the remainder (1 - alpha)^(K - 1), so they sum to 1.
    """
    return [
        (1 - alpha) ** (count - 1),
        *(alpha * (1 - alpha) ** (count - 1 - i) for i in range(1, count)),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A method with its numbers.

    Raises:
        ValueError: a number is out of its range, or the method has no use for it.
    """

    method: str = "ties"
    weights: tuple[float, ...]
    """One per checkpoint, the oldest first."""
    density: float = 1.0
    """Fraction of entries kept by `trim` and `drop`, in (0, 1]."""
    seed: int = 0
    """Of the random drop."""
    compat: str | None = None
    """`peft`: votes and divisor as PEFT has them (ties only)."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        row, count = self.row, len(self.weights)
        if count == 0:
            raise ValueError("there is nothing to merge: no checkpoint was given")
        if row.count not in (None, count):
            raise ValueError(f"{self.method} takes {row.count} checkpoints, given {count}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density} must be in (0, 1]")
        if row.thin == "none" and self.density != 1:
            raise ValueError(f"{self.method} has no density; drop it, or take ties or dare-linear")
        if not all(np.isfinite(w) and w >= 0 for w in self.weights) or sum(self.weights) <= 0:
            raise ValueError(f"weights {list(self.weights)} must be 0 or more, and not all 0")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed} must be 0 or more")
        if self.compat not in (None, "peft"):
            raise ValueError(f"compat {self.compat!r}: expected 'peft' or nothing")
        if self.compat and self.method != "ties":
            raise ValueError(f"compat peft is for ties; {self.method} has one definition")

    @property
    def row(self) -> Method:
        """The method's row of the table."""
        return METHODS[self.method]


class Source(Protocol):
    """One tensor of K checkpoints, in consecutive chunks that can be asked for again."""

    count: int
    """K."""
    size: int
    """Entries of the tensor."""
    exact16: bool
    """True if the changes are 16-bit numbers themselves."""
    origin: Path | None
    """The file the base of the chunks is from."""

    def chunks(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Yield (rows (K, n), base (n,) or (0,)); a chunk is valid until the next."""
        ...


@dataclass
class Tally:
    """What the merge of one tensor met with."""

    cuts: list[Cut]
    """Of every checkpoint; empty if nothing was trimmed."""
    zeros: NDArray[np.int64]
    """(K,) changes equal to zero; counted where entries are trimmed or dropped."""
    largest: NDArray[np.uint32]
    """(K,) largest magnitude, as a bit pattern; known where entries are trimmed or dropped, or not finite."""
    counted: bool
    """True if `zeros` was counted."""
    finite: bool = True
    """False if a change is infinite or not a number."""
    exact: bool = True
    """False if a threshold that was handed in is not that of the data."""


def find_tensor_cuts(source: Source, density: float, kernels: ModuleType) -> list[Cut]:
    """The thresholds of one tensor."""
    if source.size == 0:
        return [Cut(0, 0, 0)] * source.count
    return find_cuts(
        source.chunks,
        source.count,
        source.size,
        keep_count(source.size, density),
        exact16=source.exact16,
        kernels=kernels,
    )


def merge_chunks(
    source: Source,
    recipe: Recipe,
    sink: Callable[[int, Numbers, Floats], None],
    *,
    kernels: ModuleType,
    cuts: list[Cut] | None = None,
    seed: int = 0,
) -> Tally:
    """Merge one tensor, chunk by chunk.

    Args:
        source: the tensor.
        recipe: method and numbers.
        sink: takes (index of the first entry, base of the chunk, merged change (n,) float32); the arrays are
            used again afterwards.
        kernels: from `trim.backend`.
        cuts: the thresholds, if they are known.
        seed: of the tensor, for the random drop.
    """
    row, count = recipe.row, source.count
    if row.thin == "trim" and cuts is None:
        cuts = find_tensor_cuts(source, recipe.density, kernels)
    cuts = cuts or []
    weights, divisor = factors(source, recipe)
    patterns = np.array([cut.magnitude for cut in cuts], np.uint32)
    quotas = np.array([cut.need for cut in cuts], np.int64)
    keys: NDArray[np.uint64] = np.empty(0, np.uint64)
    if row.thin == "drop" and recipe.density < 1:
        keys = drop_keys(recipe, seed)
    counted = bool(cuts) or keys.size > 0
    tally = Tally(cuts, np.zeros(count, np.int64), np.zeros(count, np.uint32), counted)
    larger = np.zeros(count, np.int64)
    at = 0
    for rows, base in source.chunks():
        merged = np.empty(rows.shape[1], np.float32)
        kernels.combine(
            rows,
            base,
            weights,
            divisor,
            row.combine == "vote",
            recipe.compat is not None,
            patterns,
            quotas,
            keys,
            np.uint64(round(recipe.density * 2**24)),
            np.float32(1 / recipe.density),
            at,
            tally.zeros,
            larger,
            tally.largest,
            merged,
        )
        if not counted and (row.combine == "vote" or not np.isfinite(merged).all()):
            # sums carry what is not finite, so only then is it looked for; a vote drops what is no number
            for k, numbers in enumerate(rows):
                change = arrays.widen(numbers) - arrays.widen(base) if base.size else numbers
                bits = arrays.magnitudes(arrays.widen(change))
                tally.largest[k] = max(tally.largest[k], bits.max(initial=0))
        sink(at, base, merged)
        at += len(merged)
    tally.finite = bool((tally.largest < arrays.INFINITE).all())
    if cuts and tally.finite:
        keep = keep_count(source.size, recipe.density)
        kept = larger + np.array([cut.need for cut in cuts]) - quotas
        # what was kept is what a full sort would keep, whoever found the threshold
        tally.exact = bool((kept == keep).all()) and (keep == source.size or not quotas.any())
    return tally


def drop_keys(recipe: Recipe, seed: int) -> NDArray[np.uint64]:
    """(K,) keys of the random drop in one tensor."""
    state = np.random.SeedSequence([recipe.seed, seed]).generate_state(
        len(recipe.weights), np.uint64
    )
    return state.astype(np.uint64)


def factors(source: Source, recipe: Recipe) -> tuple[Floats, np.float32]:
    """((K,) factors of the checkpoints, divisor of their sum); `arc` reads the tensor for them."""
    weights = np.array(recipe.weights)
    combine = recipe.row.combine
    if combine == "arc":
        return _arc(source, weights[1] / weights.sum()).astype(np.float32), np.float32(1)
    if combine == "sum" or recipe.compat:
        return weights.astype(np.float32), np.float32(1)
    weights = weights / weights.max()  # only ratios matter; equal weights become exactly 1
    return weights.astype(np.float32), np.float32(weights.sum())


def _arc(source: Source, t: float) -> NDArray[np.float64]:
    """Factors of slerp between two tensors; nearly parallel ones, or a zero, are interpolated linearly."""
    products = np.zeros(3)
    for rows, base in source.chunks():
        for at in range(0, rows.shape[1], 1 << 16):
            known = arrays.widen(base[at : at + (1 << 16)])
            a, b = (
                (arrays.widen(row) - known if base.size else arrays.widen(row)).astype(np.float64)
                for row in rows[:, at : at + (1 << 16)]
            )
            products += a @ a, b @ b, a @ b
    norms = np.sqrt(products[0] * products[1])
    cosine = products[2] / norms if norms > 0 else 1.0
    if abs(cosine) > 0.9995:
        return np.array([1 - t, t])
    angle = np.arccos(cosine)
    found: NDArray[np.float64] = np.sin(np.array([1 - t, t]) * angle) / np.sin(angle)
    return found


@dataclass
class Rows:
    """A `Source` in memory: rows (K, n), and a base (n,) or (0,)."""

    rows: Numbers
    base: Numbers
    exact16: bool = False
    chunk: int | None = None
    """None: all at once. Pieces of rows are not contiguous, which costs the kernels half their speed."""
    origin: Path | None = None

    def __post_init__(self) -> None:
        self.count, self.size = self.rows.shape

    def chunks(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Slices."""
        step = self.chunk or max(1, self.size)
        for at in range(0, self.size, step):
            yield self.rows[:, at : at + step], self.base[at : at + step]
