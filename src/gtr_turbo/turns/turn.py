"""The frozen record that everything passes on: one decision of the agent, exactly as it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What the policy saw, tokenised once; the update reads it again and never rebuilds it."""

    prompt_ids: Tensor
    """(P,) int64, image placeholders expanded."""
    positions: Tensor | None
    """(3, P) int64 multimodal rotary positions of the prompt; None for models with plain positions."""
    frame: np.ndarray
    """uint8 (H, W, 3), as the environment showed it."""
    features: Tensor | None
    """(visual tokens, D) output of a frozen vision tower for `frame`; None if the tower is trained."""
    grid: Tensor | None
    """(1, 3) patches of the image in time, height, width; None for models without such a grid."""
    shown: np.ndarray | None = None
    """uint8 (H, W, 3), `frame` at the size the model sees; pixels are built from it per micro-batch. None if there
    are features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the policy wrote, with what it computed while writing."""

    response_ids: Tensor
    """(R,) int64, end token included unless the length limit cut it."""
    logprobs: Tensor
    """(R,) float32 log-probabilities of the sampled tokens under the policy that sampled them."""
    value: float
    """Value of the observation, from the last hidden state of the last prompt token."""
    hidden: Tensor
    """(D,) that hidden state, for extra steps of the critic."""
    gap: float = 0.0
    """Where scoring replaced the recorded log-probs: their absolute difference, summed over the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One decision: what was seen, what was written, what came of it."""

    observed: Observed
    reply: Reply
    prompt: str
    """The prompt as text, for trajectories."""
    text: str
    """The reply as text, end token removed; data, never evaluated."""
    fields: Mapping[str, Any]
    """The parsed JSON object; empty for an invalid reply."""
    thought_tokens: int
    """The thought is `response_ids[:thought_tokens]`, the action the rest; 0 for an invalid reply."""
    action: str
    """What the environment was given."""
    valid: bool
    """True if the reply is a JSON object with every required key, the action last."""
    legal: bool
    """True if the action is one that `info["actions"]` lists (or nothing is listed)."""
    reward: float
    """The environment's reward."""
    format_reward: float
    """The reward for the form of the reply."""
    terminated: bool
    """The task ended: the future is worth 0."""
    truncated: bool
    """The episode was cut: the future is worth `next_value`, but no credit crosses."""
    next_value: float
    """Value of the observation this turn led to, before any reset; 0 where `terminated`."""
    env_index: int
    """Which of the parallel environments."""
    episode: int
    """Number of the episode in that environment, from 0."""
    step: int
    """Number of the turn in its episode, from 0."""
    success: bool | None = None
    """At the last turn of an episode: did it succeed."""
    episode_return: float | None = None
    """At the last turn of an episode: the sum of its rewards, format rewards left out."""
    facts: Mapping[str, bool] = field(default_factory=dict)
    """What the environment could check about the reply (`judge` of the contract)."""

    @property
    def thought_span(self) -> slice:
        """Tokens of the thought, into `response_ids`."""
        return slice(0, self.thought_tokens)

    @property
    def action_span(self) -> slice:
        """Tokens of the action (and of the whole of an invalid reply), into `response_ids`."""
        return slice(self.thought_tokens, len(self.reply.response_ids))

    @property
    def done(self) -> bool:
        """Terminated or truncated."""
        return self.terminated or self.truncated
