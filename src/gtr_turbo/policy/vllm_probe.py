"""Whether vLLM's weights follow the trainer's: a fixed reply that both score."""

from __future__ import annotations

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
