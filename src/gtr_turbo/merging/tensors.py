"""Merging torch tensors in memory: on the CPU by the kernels, elsewhere by torch, to the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gtr_turbo.merging import arrays
from gtr_turbo.merging.arrays import INFINITE, Counts, Floats, Numbers
from gtr_turbo.merging.methods import Recipe, Rows, drop_keys, factors, merge_chunks
from gtr_turbo.merging.trim import Cut, backend, cut_of, keep_count


def merge_tensors(
    deltas: Sequence[Tensor], recipe: Recipe, *, seed: int = 0, engine: str = "numba"
) -> Tensor:
    """Merge whole tensors.

    Args:
        deltas: K float32 tensors of one shape, the oldest first: changes, or weights for `linear` and `slerp`.
        recipe: method and numbers.
        seed: of the tensor, for the random drop.
        engine: `numba` or `numpy`; tensors on another device than the CPU are merged there by torch, to the
            same bits.

    Returns:
        A tensor of its own.

    Raises:
        ValueError: the number of tensors is not that of the weights.
    """
    if len(deltas) != len(recipe.weights):
        raise ValueError(f"{len(deltas)} tensors, but {len(recipe.weights)} weights")
    if deltas[0].device.type != "cpu" or engine == "torch":
        return _merge_on_device(deltas, recipe, seed)
    rows = np.stack([delta.detach().contiguous().view(-1).numpy() for delta in deltas])
    out = np.empty(rows.shape[1], np.float32)

    def sink(at: int, base: Numbers, merged: Floats) -> None:
        out[at : at + len(merged)] = merged

    source = Rows(rows, np.empty(0, np.float32))
    merge_chunks(source, recipe, sink, kernels=backend(engine), seed=seed)
    return torch.from_numpy(out).view(deltas[0].shape)


def trim(delta: Tensor, density: float, *, engine: str = "numba") -> Tensor:
    """Keep exactly k = max(1, int(density * numel)) entries, the largest by magnitude; zero the others.

    Equal magnitudes at the threshold: the lowest flat index is kept first.
    """
    recipe = Recipe(method="ties", weights=(1.0,), density=density)
    return merge_tensors([delta], recipe, engine=engine)


class RunningTies:
    """TIES of one tensor as sums: the whole history at the cost of one checkpoint.

    Per entry the weighted sum and the total weight of the positive entries, and the same of the negative
    ones; these four are all that election and mean need, so nothing is approximated. For EMA all four are
    decayed before the next checkpoint is added.

    Attributes:
        sums: the four, float32, on the device of the tensor they were made for.
        zeros: entries of the newest change that are zero.
        cut: the newest change's threshold.
    """

    def __init__(self, like: Tensor) -> None:
        zero = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        self.sums = {
            name: zero.clone() for name in ("positive", "negative", "positive_w", "negative_w")
        }
        self.zeros = 0
        self.cut = Cut(0, 0, 0)

    def _flat(self) -> list[Floats]:
        return [tensor.view(-1).numpy() for tensor in self.sums.values()]

    def decay(self, factor: float) -> None:
        """Multiply what was added so far."""
        for tensor in self.sums.values():
            tensor *= factor

    def add(
        self,
        delta: Tensor,
        weight: float,
        *,
        density: float,
        cut: Cut | None = None,
        engine: str = "numba",
    ) -> None:
        """Trim a float32 change and add it with a weight.

        Args:
            delta: the change, where the sums are.
            weight: its weight.
            density: fraction of entries kept.
            cut: its threshold, if it was found before.
            engine: as of `merge_tensors`.

        Raises:
            FloatingPointError: the change is not finite.
        """
        if delta.device.type != "cpu" or engine == "torch":
            self.cut = cut or _find_cut(delta, density)
            self.zeros = delta.numel() - int(delta.count_nonzero())
            finite = bool(delta.isfinite().all())
            weight = float(np.float32(weight))
            _vote(list(self.sums.values()), _keep(delta, self.cut), weight, weight)
        else:
            kernels = backend(engine)
            change = delta.detach().contiguous().view(-1).numpy()
            self.cut = cut or cut_of(change, density, kernels=kernels)
            self.zeros, largest = kernels.accumulate(
                change,
                np.uint32(self.cut.magnitude),
                self.cut.need,
                np.float32(weight),
                *self._flat(),
            )
            finite = largest < INFINITE
        if not finite:
            raise FloatingPointError("a checkpoint holds a number that is not finite")

    def merged(self, *, engine: str = "numba") -> Tensor:
        """The merge of everything added."""
        sums = list(self.sums.values())
        if sums[0].device.type != "cpu" or engine == "torch":
            return _elect(sums, sums[0] + sums[1])
        out = torch.empty_like(sums[0])
        backend(engine).elect(*self._flat(), out.view(-1).numpy())
        return out


def low_rank(change: Tensor, rank: int, *, passes: int = 4) -> tuple[Tensor, Tensor]:
    """The best factors of a rank for a matrix, nearly (Halko, Martinsson and Tropp 2011, algorithm 4.4).

    A full SVD of a 7B model's largest layer takes minutes on a CPU; this is 2 + 2 * `passes` products with
    rank + 16 columns. The sketch is always the same, so the result is too.

    Args:
        change: (out, in) float32.
        rank: r.
        passes: power iterations. With 4, of the TIES of 10 drifting adapters it keeps within 0.1 % of the squared
            norm that the best factors keep (`tests/policy/test_cut.py`).

    Returns:
        A (r, in) and B (out, r), zero where the matrix has a smaller side; on its device.
    """
    out, into = change.shape
    width = min(rank + 16, out, into)
    draws = torch.Generator().manual_seed(0)
    sketch = torch.randn(into, width, generator=draws).to(change.device)
    basis = torch.linalg.qr(change @ sketch).Q
    for _ in range(passes):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ change, full_matrices=False)
    kept = min(rank, width)
    root = values[:kept].sqrt()
    a, b = change.new_zeros(rank, into), change.new_zeros(out, rank)
    a[:kept] = root[:, None] * right[:kept]
    b[:, :kept] = basis @ left[:, :kept] * root
    return a, b


def _find_cut(delta: Tensor, density: float) -> Cut:
    """`cut_of` by torch; its `kthvalue` works with one block of a GPU, histograms with all."""
    count = delta.numel()
    keep = keep_count(count, density)
    if keep >= count:
        return Cut(0, count, 0)
    size = delta.abs().flatten().view(torch.int32)
    upper = size >> 16
    place, rank, _ = arrays.descend(_histogram(upper, 15), keep)
    lower, need, ties = arrays.descend(_histogram(size[upper == place] & 0xFFFF, 16), rank)
    return Cut(place << 16 | lower, need, ties)


def _histogram(numbers: Tensor, bits: int) -> Counts:
    """How often each number below 2^`bits` occurs."""
    counts: Counts = torch.bincount(numbers, minlength=1 << bits).cpu().numpy()
    return counts


def _keep(delta: Tensor, cut: Cut) -> Tensor:
    """What a trim leaves."""
    if not cut.magnitude:
        return delta  # only zeros are left out
    size = delta.abs().flatten().view(torch.int32)
    kept = size > cut.magnitude
    equal = (size == cut.magnitude).nonzero().squeeze(1)
    kept[equal[: cut.need]] = True
    return torch.where(kept.view_as(delta), delta, torch.zeros_like(delta))


def _vote(sums: Sequence[Tensor], change: Tensor, weight: float, mass: float) -> None:
    """Add a trimmed change to the four sums of TIES; both weights are float32 numbers."""
    positive, negative, positive_w, negative_w = sums
    positive += (weight * change).clamp(min=0)
    negative += (weight * change).clamp(max=0)
    positive_w += mass * (change > 0)
    negative_w += mass * (change < 0)


def _elect(sums: Sequence[Tensor], ballot: Tensor) -> Tensor:
    """The mean of the entries of the elected sign."""
    positive, negative, positive_w, negative_w = sums
    elected = ballot >= 0
    total = torch.where(elected, positive, negative)
    mass = torch.where(elected, positive_w, negative_w)
    return total / torch.where(mass > 0, mass, torch.ones_like(mass))


def _drop(delta: Tensor, key: int, density: float) -> Tensor:
    """Random entries to zero by SplitMix64 of (key, index), the others divided by `density`."""
    z = _wrap(key) + torch.arange(delta.numel(), device=delta.device) * _wrap(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    kept = _shift(z ^ _shift(z, 31), 40) < round(density * 2**24)
    scale = float(np.float32(1 / density))
    return torch.where(kept.view_as(delta), delta * scale, torch.zeros_like(delta))


def _wrap(number: int) -> int:
    """An unsigned 64-bit number as the signed one of the same bits: torch multiplies those alike."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _shift(z: Tensor, places: int) -> Tensor:
    return (z >> places) & ((1 << (64 - places)) - 1)


def _merge_on_device(deltas: Sequence[Tensor], recipe: Recipe, seed: int) -> Tensor:
    row = recipe.row
    read = deltas if row.combine == "arc" else [delta.new_empty(0) for delta in deltas]
    rows = np.stack([delta.detach().cpu().flatten().numpy() for delta in read])
    numbers, divisor = factors(Rows(rows, rows[0, :0]), recipe)
    weights = [float(number) for number in numbers]
    changes = list(deltas)
    if row.thin == "trim":
        changes = [_keep(delta, _find_cut(delta, recipe.density)) for delta in deltas]
    elif row.thin == "drop" and recipe.density < 1:
        keys = drop_keys(recipe, seed)
        changes = [_drop(d, int(k), recipe.density) for d, k in zip(deltas, keys, strict=True)]
    zero = torch.zeros_like(deltas[0])
    if row.combine != "vote":
        for weight, change in zip(weights, changes, strict=True):
            zero += weight * change
        # a tensor: torch on a GPU multiplies by the reciprocal of a plain number
        return zero / torch.tensor(float(divisor), device=zero.device)
    sums, ballot = [zero.clone() for _ in range(4)], zero
    for weight, change in zip(weights, changes, strict=True):
        _vote(sums, change, weight, 1.0 if recipe.compat else weight)
        ballot += change
    return _elect(sums, ballot if recipe.compat else sums[0] + sums[1])
