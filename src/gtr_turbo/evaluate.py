"""Evaluation on fixed episodes: success with its Wilson interval, return, validity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gtr_turbo.collect import EVALUATION, Envs, play, stream
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.policy.engine import Engine
from gtr_turbo.policy.model import Policy
from gtr_turbo.turns.turn import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One evaluated episode."""

    number: int
    seed: int
    success: bool
    episode_return: float
    turns: int
    valid_turns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`."""

    records: tuple[Episode, ...]
    facts: dict[str, float]
    """Mean of every fact the environment could check, over the turns where it could."""

    @property
    def success(self) -> float:
        """Fraction of episodes that succeeded."""
        return sum(record.success for record in self.records) / len(self.records)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `success`."""
        return wilson(sum(record.success for record in self.records), len(self.records))

    def summary(self) -> dict[str, Any]:
        """What `gtr-turbo eval --json` prints."""
        turns = sum(record.turns for record in self.records)
        return {
            "success": self.success,
            "interval": list(self.interval),
            "episodes": len(self.records),
            "return": sum(record.episode_return for record in self.records) / len(self.records),
            "valid": sum(record.valid_turns for record in self.records) / turns,
            "turns": turns,
            "facts": self.facts,
            "records": [asdict(record) for record in self.records],
        }


def wilson(successes: int, count: int, z: float = 1.959963985) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `z` = 1.96 is 95 %."""
    p, square = successes / count, z * z
    centre = (p + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(p * (1 - p) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def evaluate(
    policy: Policy,
    env: EnvConfig,
    sampling: SamplingConfig,
    *,
    episodes: int,
    split: str | None,
    seed: int,
    greedy: bool = False,
    on_episode: Callable[[int], None] | None = None,
    engine: Engine | None = None,
) -> Evaluation:
    """Play fixed episodes with the weights in place.

    Episode number j has the seed `stream(seed, EVALUATION, j)`: the same deals for every model, whatever
    the number of environments.

    Args:
        policy: call inside `policy.as_teacher()` to evaluate the teacher.
        env: the environment; `num_envs` episodes are played side by side.
        sampling: temperature is the policy's own.
        episodes: how many.
        split: the environment's `split`, or None.
        seed: of the episodes and of sampling.
        greedy: take the likeliest token.
        on_episode: told how many episodes are done.
        engine: writes the replies of the agent's own weights; None decodes in this process.
    """
    if engine is not None:
        engine.refresh()
    rollout = RolloutConfig()
    envs = Envs(env, split, seed, count=min(env.num_envs, episodes))
    generator = torch.Generator().manual_seed(stream(seed, EVALUATION))
    waiting = list(range(episodes))[::-1]
    playing: dict[int, list[Turn]] = {}
    numbers: dict[int, int] = {}

    def begin(i: int) -> None:
        numbers[i] = waiting.pop()
        envs.reset(i, numbers[i], stream(seed, EVALUATION, numbers[i]) % 2**31)
        playing[i] = []

    for i in range(len(envs)):
        begin(i)
    records, facts = [], []
    while playing:
        for turn, _ in play(
            envs, list(playing), policy, sampling, rollout, generator, greedy=greedy, engine=engine
        ):
            i = turn.env_index
            playing[i].append(turn)
            facts.append(turn.facts)
            if not turn.done:
                continue
            records.append(_record(numbers[i], seed, playing.pop(i)))
            if on_episode is not None:
                on_episode(len(records))
            if waiting:
                begin(i)
    names = sorted({name for fact in facts for name in fact})
    means = {}
    for name in names:
        known = [fact[name] for fact in facts if name in fact]
        means[name] = sum(known) / len(known)
    return Evaluation(records=tuple(sorted(records, key=lambda r: r.number)), facts=means)


def _record(number: int, seed: int, turns: list[Turn]) -> Episode:
    return Episode(
        number=number,
        seed=stream(seed, EVALUATION, number) % 2**31,
        success=bool(turns[-1].success),
        episode_return=turns[-1].episode_return or 0.0,
        turns=len(turns),
        valid_turns=sum(turn.valid for turn in turns),
    )
