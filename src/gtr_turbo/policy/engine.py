"""What writes replies in place of our own decoding (`policy.generation`)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gtr_turbo.config import SamplingConfig
from gtr_turbo.turns.turn import Observed, Reply


class Engine(Protocol):
    """A generation engine beside the trainer, with a copy of the agent's weights that has to be kept fresh."""

    def refresh(self) -> None:
        """Take up the agent's weights as they are now; replies will be asked for. All ranks must call it."""
        ...

    def refresh_teacher(self) -> None:
        """The same of the teacher, as it was cut to `policy.cut`."""
        ...

    def generate(
        self,
        observed: list[Observed],
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        greedy: bool = False,
    ) -> list[Reply]:
        """Write one reply to each observation, with the trainer's own log-probs, values and hidden states."""
        ...

    def write_as_teacher(
        self,
        observed: list[Observed],
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        temperature: float,
    ) -> list[Tensor]:
        """The ids of one reply of the teacher to each observation."""
        ...

    def rest(self) -> None:
        """No replies will be asked for until the next `refresh`."""
        ...

    def metrics(self) -> dict[str, float]:
        """The `engine` group, since the last call, over all ranks, each of which must call it."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...
