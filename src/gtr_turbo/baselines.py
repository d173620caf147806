"""What an agent's success is held against: other players of the same episodes.

`random` plays a uniformly drawn action of `info["actions"]`. `blind` is the agent itself, shown a black frame.
`oracle` is the environment's own expert, `demonstrate`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gtr_turbo.checks import ConfigError, suggest
from gtr_turbo.collect import BASELINES, Envs, Outcome, stream
from gtr_turbo.config import EnvConfig, SamplingConfig
from gtr_turbo.evaluate import (
    Evaluation,
    Played,
    Player,
    evaluate,
    paired_difference,
    play_episodes,
)
from gtr_turbo.parsing import parse
from gtr_turbo.policy.model import Policy

NAMES = ("random", "blind", "oracle")


class Blind(Envs):
    """Environments whose frames are black; all else, what `judge` knows included, is as it is."""

    def reset(self, i: int, episode: int, seed: int | None = None) -> None:
        """Begin an episode."""
        super().reset(i, episode, seed)
        self._cover(i)

    def step(self, i: int, action: str) -> Outcome:
        """Act in environment `i`."""
        outcome = super().step(i, action)
        self._cover(i)
        return outcome

    def _cover(self, i: int) -> None:
        shown = self.observations[i]
        self.observations[i] = {**shown, "image": np.zeros_like(shown["image"])}


def read_names(text: str) -> tuple[str, ...]:
    """Baselines from `random,blind`, each once.

    Raises:
        ConfigError: there is no such baseline.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in NAMES:
            raise ConfigError(
                f"--baselines {name!r} is not one of {', '.join(NAMES)}.{suggest(name, list(NAMES))}"
            )
    return names


def random_player(seed: int) -> Player:
    """Plays uniformly drawn legal actions; a draw depends on the seed, the episode and the turn."""

    def player(envs: Envs, rows: Sequence[int]) -> list[Played]:
        made = []
        for i in rows:
            actions = envs.infos[i].get("actions")
            if not actions:
                raise ConfigError(
                    "the environment lists no actions (info['actions']), so there is no random baseline; "
                    "drop random from --baselines"
                )
            at = stream(seed, BASELINES, envs.episodes[i], len(envs.actions[i]))
            action = actions[np.random.default_rng(at).integers(len(actions))]
            outcome = envs.step(i, str(action))
            made.append(Played(i, None, {}, outcome.success, outcome.episode_return))
        return made

    return player


def oracle_player(seed: int) -> Player:
    """Plays what the environment's expert demonstrates, read as a reply of an agent is."""

    def player(envs: Envs, rows: Sequence[int]) -> list[Played]:
        made = []
        for i in rows:
            at = stream(seed, BASELINES, envs.episodes[i], len(envs.actions[i]))
            reply = envs.demonstrate(i, np.random.default_rng(at))
            if reply is None:
                raise ConfigError(
                    "the environment has no demonstrate(rng), so there is no oracle (docs/environments.md); "
                    "drop oracle from --baselines"
                )
            parsed = parse(json.dumps(reply), envs.fields)
            facts = envs.judge(i, parsed.fields)
            outcome = envs.step(i, parsed.action)
            made.append(Played(i, parsed.valid, facts, outcome.success, outcome.episode_return))
        return made

    return player


def measure(
    policy: Policy | None,
    baselines: Sequence[str],
    env: EnvConfig,
    sampling: SamplingConfig,
    *,
    episodes: int,
    split: str | None,
    seed: int,
    greedy: bool = False,
) -> dict[str, Any]:
    """Evaluate an agent, if there is one, and baselines on the same episodes.

    Returns:
        the agent's `Evaluation.summary`, and `baselines`: that of each, with the agent's `difference` to it.

    Raises:
        ConfigError: `blind` without an agent; or the environment does not have what a baseline needs.
    """
    if policy is None and (not baselines or "blind" in baselines):
        raise ConfigError(
            "without an agent there is nothing to evaluate but --baselines random,oracle; give a run or a model"
        )
    results: dict[str, Evaluation] = {}
    players = {"random": random_player(seed), "oracle": oracle_player(seed)}
    for name in players.keys() & set(
        baselines
    ):  # first, as they are quick to find out that they cannot
        with Envs(env, split, seed, count=min(env.num_envs, episodes)) as envs:
            results[name] = play_episodes(players[name], envs, episodes=episodes, seed=seed)
    found: dict[str, Any] = {}
    if policy is not None:
        about: dict[str, Any] = {"episodes": episodes, "split": split, "seed": seed}
        agent = evaluate(policy, env, sampling, greedy=greedy, **about)
        if "blind" in baselines:
            results["blind"] = evaluate(policy, env, sampling, greedy=greedy, envs=Blind, **about)
        found = agent.summary()
    for name in baselines:
        found.setdefault("baselines", {})[name] = results[name].summary()
        if policy is not None:
            found["baselines"][name]["difference"] = difference(agent, results[name])
    return found


def difference(agent: Evaluation, baseline: Evaluation) -> Mapping[str, Any]:
    """Success of an agent minus that of a baseline on the same episodes, with its 95 % interval."""
    pairs = [(a.success, b.success) for a, b in zip(agent.records, baseline.records, strict=True)]
    agent_only = sum(a and not b for a, b in pairs)
    baseline_only = sum(b and not a for a, b in pairs)
    gap, interval = paired_difference(agent_only, baseline_only, len(pairs))
    return {
        "success": gap,
        "interval": list(interval),
        "agent_only": agent_only,
        "baseline_only": baseline_only,
    }
