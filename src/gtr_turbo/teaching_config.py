"""Settings of the guidance and of the teacher."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gtr_turbo.checks import ConfigError, not_negative, positive


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """Imitation of the teacher's thoughts; what it writes is collected over the run (DAgger)."""

    _prefix = "guidance.imitation."

    weight: float = 1.0
    """Of the cross-entropy per token in the loss."""
    weight_final: float = 1.0
    """Its value at the end of the run; it changes linearly."""
    samples: int = 64
    """Collected turns that join each optimizer step."""
    limit: int = 0
    """Newest turns that are kept; 0 keeps all, as published."""
    temperature: float = 0.2
    """At which the teacher writes."""
    temperature_ramp: float = 1.1
    """Factor of the temperature after an answer that cannot be read."""
    temperature_max: float = 0.9
    """Where the ramp ends."""
    retries: int = 4
    """New tries for answers that cannot be read; what is left after them is skipped, and counted."""

    def __post_init__(self) -> None:
        positive(self, "samples", "temperature", "temperature_ramp", "temperature_max")
        not_negative(self, "weight", "weight_final", "limit", "retries")


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How the teacher guides the agent's thoughts."""

    _prefix = "guidance."

    kind: Literal["none", "static", "kl", "sft"] = "kl"
    """`none` is RL4VLM; `kl` penalises the reverse KL to the merge on the thought's tokens, `static` the KL to
    the starting model; `sft` imitates thoughts that the merge writes for the same observations."""
    tokens: Literal["thought", "response"] = "thought"
    """What is guided; the paper guides thoughts only, as guided actions explore less."""
    estimator: Literal["clip", "k1", "abs", "k3", "full"] = "clip"
    """KL estimate per token; `full` sums over the whole vocabulary."""
    credit: Literal["advantage", "reward", "token"] = "advantage"
    """Where it enters: each turn's advantage (the paper's equation), its reward (the paper's Algorithm 2),
    or each token's advantage (dense; needs `ppo.ratio: token`)."""
    monitor: bool = True
    """With `none`: still measure the KL to the merge, which shows collapse, at the cost of a scoring pass."""
    beta: float = 5.0
    """Weight of the KL; 1 is the paper's."""
    center: bool = True
    """Subtract the KL's mean over the update first: a penalty that is never negative pushes every reply down."""

    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    """Of `sft`."""

    def __post_init__(self) -> None:
        not_negative(self, "beta")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The merge of the run's own checkpoints."""

    _prefix = "teacher."

    method: Literal["ties", "linear"] = "ties"
    """How checkpoints are merged."""
    density: float = 0.8
    """TIES keeps this fraction of each change, the largest by magnitude."""
    weights: Literal["sma", "ema"] = "sma"
    """All checkpoints alike, or exponentially fewer for older ones."""
    alpha: float = 0.5
    """EMA's weight of the newest checkpoint."""
    interval: int = 1
    """Updates between merges."""

    def __post_init__(self) -> None:
        positive(self, "interval")
        for name in ("density", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"teacher.{name}={getattr(self, name)} must be in (0, 1]")
