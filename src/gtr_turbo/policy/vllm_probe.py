"""Whether vLLM's weights follow the trainer's: a fixed reply that both score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gtr_turbo.turns.turn import Observed

NOISE = 4.0
"""A change of the probe counts once it is so many times the gap that was there before it."""
LEAST_CHANGE = 1e-5  # nats per token


@dataclass(frozen=True, slots=True)
class Probe:
    """A reply that both sides score after every change of the weights: did vLLM's change too?"""

    observed: Observed
    ids: Tensor
    """(R,) int64."""
    ours: Tensor
    """(R,) the trainer's log-probs when the two were last seen to agree."""
    theirs: Tensor
    """(R,) vLLM's, then."""


def check_moved(probe: Probe, ours: Tensor, theirs: Tensor) -> bool | None:
    """Whether vLLM's weights changed as the trainer's did, by the log-probs of one reply, (R,) each.

    Returns:
        None if the trainer's change since then is too small to be told from the gap.
    """
    change = float((ours - probe.ours).abs().mean())
    gap = float((probe.theirs - probe.ours).abs().mean())
    if change <= NOISE * gap + LEAST_CHANGE:
        return None
    return bool((theirs - ours).abs().mean() < (theirs - probe.ours).abs().mean())


def mistaken_for(
    theirs: Tensor, ours: Tensor, others: Mapping[str, Tensor], noise: float
) -> str | None:
    """Other weights that vLLM rather writes with than with those it was given; log-probs of one reply, (R,) each.

    Args:
        theirs: vLLM's.
        ours: the trainer's, with the weights that vLLM was given.
        others: the trainer's, with weights that vLLM may confuse them with.
        noise: mean gap between both sides where the weights are known to be the same, nats per token.

    Returns:
        The nearest, or None; others that differ from `ours` by no more than a few times the noise are left out.
    """

    def distance(one: Tensor, two: Tensor) -> float:
        return float((one - two).abs().mean())

    told = [
        n for n, other in others.items() if distance(other, ours) > NOISE * noise + LEAST_CHANGE
    ]
    nearest = min(told, key=lambda name: distance(theirs, others[name]), default=None)
    if nearest is None or distance(theirs, others[nearest]) > distance(theirs, ours):
        return None
    return nearest
