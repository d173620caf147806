"""Merge methods: ordered changes and numbers in, one change out. No input is modified.

A change is a checkpoint minus the point it started from, as a float32 tensor. K of them, all of one
shape, the oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class MergeMethod(Protocol):
    """K changes and their weights to one change."""

    def __call__(
        self, deltas: Sequence[Tensor], weights: Sequence[float], *, density: float
    ) -> Tensor:
        """Merge."""
        ...


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


def trim(delta: Tensor, density: float) -> Tensor:
    """Keep exactly k = max(1, int(density * numel)) entries, the largest by magnitude; zero the others.

    Equal magnitudes at the threshold: the lowest flat index is kept first.
    """
    count = delta.numel()
    keep = max(1, int(density * count))
    if count == 0 or keep >= count:
        return delta.clone()
    size = delta.abs().flatten()
    threshold = size.kthvalue(count - keep + 1).values
    kept = size > threshold
    equal = (size == threshold).nonzero().squeeze(1)
    kept[equal[: keep - int(kept.sum())]] = True
    return torch.where(kept.view_as(delta), delta, torch.zeros_like(delta))


def linear(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float = 1.0) -> Tensor:
    """Weighted mean (Wortsman et al. 2022); `density` is not used."""
    total = sum(weights)
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        merged += (weight / total) * delta
    return merged


def ties(deltas: Sequence[Tensor], weights: Sequence[float], *, density: float) -> Tensor:
    """TIES (Yadav et al. 2023): trim each, elect a sign per entry, mean of those that agree.

    The sign is that of the weighted sum of the trimmed entries, a sum of zero counting as positive. The
    result is sum(w x) / sum(w) over exactly the trimmed, non-zero entries of the elected sign, and 0 where
    there is none.
    """
    running = RunningTies(deltas[0])
    largest = max(weights)  # only ratios matter; equal weights become exactly 1
    for delta, weight in zip(deltas, weights, strict=True):
        running.add(trim(delta, density), weight / largest)
    return running.merged()


METHODS: dict[str, MergeMethod] = {
    "linear": linear,
    "ties": ties,
}


class RunningTies:
    """TIES of one tensor as sums: the whole history at the cost of one checkpoint.

    Per entry the weighted sum and the total weight of the positive entries, and the same of the negative
    ones; these four are all that election and mean need, so nothing is approximated. For EMA all four are
    decayed before the next checkpoint is added.
    """

    def __init__(self, like: Tensor) -> None:
        zero = torch.zeros(like.shape, dtype=torch.float32)
        self.sums = {
            name: zero.clone() for name in ("positive", "negative", "positive_w", "negative_w")
        }

    def decay(self, factor: float) -> None:
        """Multiply what was added so far."""
        for tensor in self.sums.values():
            tensor *= factor

    def add(self, trimmed: Tensor, weight: float) -> None:
        """Add a trimmed change with a weight."""
        for name, part in (("positive", trimmed.clamp(min=0)), ("negative", trimmed.clamp(max=0))):
            self.sums[name] += weight * part
            self.sums[f"{name}_w"] += weight * (part != 0)

    def merged(self) -> Tensor:
        """The merge of everything added."""
        s = self.sums
        elected = s["positive"] + s["negative"] >= 0
        total = torch.where(elected, s["positive"], s["negative"])
        weight = torch.where(elected, s["positive_w"], s["negative_w"])
        return torch.where(
            weight > 0, total / weight.clamp(min=torch.finfo(torch.float32).tiny), total * 0
        )
