"""Evaluation on fixed episodes: success with its Wilson interval, per type of task, return, validity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from gtr_turbo.collect import EVALUATION, Envs, play, stream
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.policy.engine import Engine
from gtr_turbo.policy.model import Policy


class Played(NamedTuple):
    """What an evaluation counts of a turn."""

    env_index: int
    valid: bool | None
    """The reply was valid; None of a player that writes none."""
    facts: Mapping[str, bool]
    success: bool | None
    """None while the episode goes on; so is `episode_return`."""
    episode_return: float | None


Player = Callable[[Envs, Sequence[int]], list[Played]]
"""Plays one turn in each of the environments with the given numbers."""

Facts = dict[str, list[int]]
"""Of each fact, over turns: how often it held, and how often it could be checked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One evaluated episode."""

    number: int
    seed: int
    success: bool
    episode_return: float
    turns: int
    valid_turns: int | None
    """None of a player that writes no replies."""
    group: str | None
    """Type of the episode's task (`info["task"]`), where the environment tells it."""
    goal_conditions: float | None
    """Fraction of the goal met at the end, where the environment tells it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The result of `evaluate`."""

    records: tuple[Episode, ...]
    facts: dict[str, float]
    """Mean of every fact the environment could check, over the turns where it could."""

    def summary(self) -> dict[str, Any]:
        """What `gtr-turbo eval --json` prints."""
        turns = sum(record.turns for record in self.records)
        valid = [r.valid_turns for r in self.records if r.valid_turns is not None]
        conditions = [r.goal_conditions for r in self.records if r.goal_conditions is not None]
        groups: dict[str, list[Episode]] = {}
        for record in self.records:
            if record.group is not None:
                groups.setdefault(record.group, []).append(record)
        return {
            **_success(self.records),
            "groups": {name: _success(groups[name]) for name in sorted(groups)},
            "goal_conditions": sum(conditions) / len(conditions) if conditions else None,
            "return": sum(record.episode_return for record in self.records) / len(self.records),
            "valid": sum(valid) / turns if valid else None,
            "turns": turns,
            "facts": self.facts,
            "records": [asdict(record) for record in self.records],
        }


def _success(records: Sequence[Episode]) -> dict[str, Any]:
    won, count = sum(record.success for record in records), len(records)
    return {"success": won / count, "interval": list(wilson(won, count)), "episodes": count}


def wilson(successes: int, count: int, z: float = 1.959963985) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927); `z` = 1.96 is 95 %."""
    p, square = successes / count, z * z
    centre = (p + square / (2 * count)) / (1 + square / count)
    half = z / (1 + square / count) * math.sqrt(p * (1 - p) / count + square / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    first_only: int, second_only: int, count: int, z: float = 1.959963985
) -> tuple[float, tuple[float, float]]:
    """Difference of two proportions over the same episodes, and its interval (Bonett and Price 2012).

    The interval is Wald's after one episode is added to each of the two kinds that differ: it holds with few
    episodes, and has a width even if the two never differ.

    Args:
        first_only: episodes in which only the first succeeded.
        second_only: in which only the second did.
        count: all episodes.
        z: 1.96 is 95 %.
    """
    first, second = (first_only + 1) / (count + 2), (second_only + 1) / (count + 2)
    centre = first - second
    half = z * math.sqrt((first + second - centre**2) / (count + 2))
    interval = max(-1.0, centre - half), min(1.0, centre + half)
    return (first_only - second_only) / count, interval


def evaluate(
    policy: Policy,
    env: EnvConfig,
    sampling: SamplingConfig,
    *,
    episodes: int,
    split: str | None,
    seed: int,
    greedy: bool = False,
    envs: type[Envs] = Envs,
    on_episode: Callable[[int], None] | None = None,
    engine: Engine | None = None,
) -> Evaluation:
    """Play fixed episodes with the weights in place.

    Episode number j has the seed `stream(seed, EVALUATION, j)`: the same deals for every model, whatever
    the number of environments and of ranks. The ranks of a run share the episodes; all get the result.

    Args:
        policy: call inside `policy.as_teacher()` to evaluate the teacher.
        env: the environment; `num_envs` episodes are played side by side, over all ranks.
        sampling: temperature is the policy's own.
        episodes: how many.
        split: the environment's `split`, or None.
        seed: of the episodes and of sampling.
        greedy: take the likeliest token.
        envs: what the environments are played in; a subclass may show them otherwise.
        on_episode: told how many episodes are done.
        engine: writes the replies of the agent's own weights; None decodes in this process.
    """
    ranks = policy.ranks
    own = range(ranks.rank, episodes, ranks.world)
    path = (0, *ranks.own_stream) if ranks.own_stream else ()
    generator = torch.Generator().manual_seed(stream(seed, EVALUATION, *path))

    def player(envs: Envs, rows: Sequence[int]) -> list[Played]:
        turns = play(
            envs, rows, policy, sampling, RolloutConfig(), generator, greedy=greedy, engine=engine
        )
        return [
            Played(t.env_index, t.valid, t.facts, t.success, t.episode_return) for t, _ in turns
        ]

    def told(done: int) -> None:
        if on_episode is not None:
            on_episode(min(episodes, done * ranks.world))

    records: list[Episode] = []
    facts: Facts = {}
    with policy.whole():
        if engine is not None:
            engine.refresh()
        if own:
            count = min(max(1, env.num_envs // ranks.world), len(own))
            with envs(env, split, seed, count=count) as made:
                records, facts = _episodes(player, made, own, seed, told)
    if engine is not None:
        engine.rest()
    if ranks.world > 1:
        parts = ranks.gather([asdict(record) for record in records])
        records = [Episode(**record) for part in parts for record in part]
    return _evaluation(records, ranks.gather(facts))


def play_episodes(
    player: Player,
    envs: Envs,
    *,
    episodes: int,
    seed: int,
    on_episode: Callable[[int], None] | None = None,
) -> Evaluation:
    """`evaluate` for any player, in one process; `envs` are played side by side."""
    records, facts = _episodes(player, envs, range(episodes), seed, on_episode)
    return _evaluation(records, [facts])


def _episodes(
    player: Player,
    envs: Envs,
    numbers: Sequence[int],
    seed: int,
    on_episode: Callable[[int], None] | None,
) -> tuple[list[Episode], Facts]:
    """Play the episodes with these numbers."""
    waiting = list(numbers)[::-1]
    playing: dict[int, list[Played]] = {}
    tasks: dict[int, Any] = {}

    def begin(i: int) -> None:
        number = waiting.pop()
        envs.reset(i, number, stream(seed, EVALUATION, number) % 2**31)
        playing[i], tasks[i] = [], envs.infos[i].get("task")

    for i in range(len(envs)):
        begin(i)
    records: list[Episode] = []
    facts: Facts = {}
    while playing:
        for turn in player(envs, list(playing)):
            i = turn.env_index
            playing[i].append(turn)
            for name, fact in turn.facts.items():
                held, checked = facts.get(name, (0, 0))
                facts[name] = [held + bool(fact), checked + 1]
            if turn.success is None:
                continue
            info = {"task": tasks[i], **envs.infos[i]}
            records.append(_record(envs.episodes[i], seed, playing.pop(i), info))
            if on_episode is not None:
                on_episode(len(records))
            if waiting:
                begin(i)
    return records, facts


def _evaluation(records: Sequence[Episode], parts: Sequence[Facts]) -> Evaluation:
    """The result from the episodes of all ranks, and the facts of each."""
    means = {}
    for name in sorted({name for part in parts for name in part}):
        counts = [part[name] for part in parts if name in part]
        means[name] = sum(held for held, _ in counts) / sum(checked for _, checked in counts)
    return Evaluation(records=tuple(sorted(records, key=lambda r: r.number)), facts=means)


def _record(number: int, seed: int, turns: list[Played], info: Mapping[str, Any]) -> Episode:
    valid = [turn.valid for turn in turns if turn.valid is not None]
    conditions = info.get("goal_conditions")
    return Episode(
        number=number,
        seed=stream(seed, EVALUATION, number) % 2**31,
        success=bool(turns[-1].success),
        episode_return=turns[-1].episode_return or 0.0,
        turns=len(turns),
        valid_turns=sum(valid) if valid else None,
        group=info.get("task"),
        goal_conditions=None if conditions is None else float(conditions),
    )
