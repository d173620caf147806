"""Playing: environments and the policy, turn by turn, into records.

Environments reset in the same step in which an episode ends, so no reply is written to a finished one.
Every episode of every environment has a seed of its own, `SeedSequence([seed, environment, episode])`:
an episode is a function of its seed and its actions, and resuming replays it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.envs import check_env, make_env
from gtr_turbo.envs.contract import ContractError, Tool, attribute
from gtr_turbo.parsing import parse, thought_tokens
from gtr_turbo.policy.engine import Engine
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import PASS_TOKENS, score, values
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Turn


def stream(*path: int) -> int:
    """A seed for one of the run's streams of randomness, from integers that name it."""
    return int(np.random.SeedSequence(path).generate_state(1, np.uint64)[0] >> 1)


SAMPLING, MINIBATCHES, EVALUATION, TEACHING, SIGNALS, BASELINES = 1, 2, 3, 4, 5, 6
"""Names of streams: `stream(seed, SAMPLING, update)` and so on. Environments use `stream(seed, 0, n, e)`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step of one environment gave, before any reset."""

    observation: Mapping[str, Any]
    reward: float
    terminated: bool
    truncated: bool
    success: bool | None
    episode_return: float | None


class Envs:
    """Environments side by side, in one process; they are known here by their place, from 0.

    Attributes:
        first: number in the run of the first of them.
        fields: JSON keys a reply must have.
        field_schemas: JSON schemas of those that are no strings.
        tools: what a corrector of thoughts may call.
        observations: what each environment shows now.
        infos: its last info.
    """

    def __init__(
        self,
        config: EnvConfig,
        split: str | None,
        seed: int,
        count: int | None = None,
        first: int = 0,
    ) -> None:
        """Make `count` of the run's environments, from number `first` on; without a count all."""
        options = dict(config.options) if split is None else {**config.options, "split": split}
        self._envs = [make_env(config.id, **options) for _ in range(count or config.num_envs)]
        check_env(self._envs[0], episodes=1)
        fields = attribute(self._envs[0], "fields")
        self.fields: Sequence[str] = fields
        self.field_schemas: Mapping[str, Any] = attribute(self._envs[0], "field_schemas") or {}
        self.tools: Sequence[Tool] = attribute(self._envs[0], "tools") or ()
        self._name, self._seed, self.first = config.id, seed, first
        self.episodes = [-1] * len(self._envs)
        self.observations: list[Mapping[str, Any]] = [{}] * len(self._envs)
        self.infos: list[Mapping[str, Any]] = [{}] * len(self._envs)
        self.actions: list[list[str]] = [[] for _ in self._envs]
        self._returns = [0.0] * len(self._envs)

    def __len__(self) -> int:
        return len(self._envs)

    def __enter__(self) -> Envs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the environments hold; the end of a `with` does so too."""
        with ExitStack() as stack:  # all, even if one raises
            for env in self._envs:
                stack.callback(env.close)

    def start(self) -> None:
        """Begin the first episode everywhere."""
        for i in range(len(self)):
            self.reset(i, 0)

    def reset(self, i: int, episode: int, seed: int | None = None) -> None:
        """Begin episode number `episode` of environment `i`; with a `seed` of its own it is an evaluation's."""
        self.episodes[i], self.actions[i], self._returns[i] = episode, [], 0.0
        options = None
        if seed is None:
            seed = stream(self._seed, 0, self.first + i, episode) % 2**31
        elif count := attribute(self._envs[i], "numbered"):
            order = np.random.default_rng(self._seed).permutation(count)
            options = {"number": int(order[episode % count])}
        self.observations[i], self.infos[i] = self._envs[i].reset(seed=seed, options=options)

    def step(self, i: int, action: str) -> Outcome:
        """Act in environment `i`; does not reset.

        Raises:
            ContractError: the reward is not finite, or the episode ends and does not say whether it was a success.
        """
        observation, reward, terminated, truncated, info = self._envs[i].step(action)
        self.observations[i], self.infos[i] = observation, info
        self.actions[i].append(action)
        if not math.isfinite(reward):
            raise ContractError(
                f"{self._name}: step({action!r:.200}) paid {reward}, which is no finite number, so nothing can be "
                "learned from it"
            )
        self._returns[i] += float(reward)
        done = bool(terminated or truncated)
        if done and "success" not in info:
            raise ContractError(
                f"{self._name}: the last info of an episode holds no success; if a step limit of Gymnasium's ends "
                "it (register(..., max_episode_steps=N)), give info['success'] every turn"
            )
        return Outcome(
            observation=observation,
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            success=bool(info["success"]) if done else None,
            episode_return=self._returns[i] if done else None,
        )

    def judge(self, i: int, fields: Mapping[str, Any]) -> Mapping[str, bool]:
        """Facts about a parsed reply in the state that environment `i` is in, if it can check any."""
        judge = attribute(self._envs[i], "judge")
        facts = judge(fields) if judge is not None and fields else {}
        return {name: bool(fact) for name, fact in facts.items()}  # NumPy's are no JSON

    def demonstrate(self, i: int, rng: np.random.Generator) -> Mapping[str, Any] | None:
        """The expert's reply in the state that environment `i` is in; None if it has no expert."""
        expert = attribute(self._envs[i], "demonstrate")
        return expert(rng) if expert is not None else None

    def state(self) -> list[dict[str, Any]]:
        """What `restore` needs: the episode and the actions so far of each environment."""
        return [
            {"episode": e, "actions": a} for e, a in zip(self.episodes, self.actions, strict=True)
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Replay every environment's running episode."""
        for i, saved in enumerate(state):
            self.reset(i, saved["episode"])
            for action in saved["actions"]:
                self.step(i, action)


def play(
    envs: Envs,
    rows: Sequence[int],
    policy: Policy,
    sampling: SamplingConfig,
    rollout: RolloutConfig,
    generator: torch.Generator,
    *,
    greedy: bool = False,
    engine: Engine | None = None,
) -> list[tuple[Turn, Mapping[str, Any]]]:
    """One turn in each of the environments `rows`; finished episodes are left finished.

    Args:
        envs: the environments.
        rows: which of them.
        policy: acts; an `engine`, if there is one, writes for it.
        sampling: how replies are written.
        rollout: rewards of the form.
        generator: of the sampling.
        greedy: take the likeliest token.
        engine: writes the replies; None decodes in this process.

    Returns:
        for each row the turn, with `next_value` still 0, and the observation it led to.
    """
    shown = [envs.observations[i] for i in rows]
    observed = policy.observe([o["image"] for o in shown], [o["prompt"] for o in shown])
    if engine is None:
        replies = generate(policy, observed, sampling, generator, greedy=greedy)
    else:
        replies = engine.generate(observed, sampling, generator, greedy=greedy)
    made = []
    for i, seen, reply, before in zip(rows, observed, replies, shown, strict=True):
        ids = reply.response_ids.tolist()
        ids = ids[:-1] if ids[-1] == policy.processor.end_token_id else ids
        text = policy.processor.decode(ids)
        parsed = parse(text, envs.fields)
        thought = (
            thought_tokens(ids, parsed.action_start, policy.processor.decode) if parsed.valid else 0
        )
        actions = envs.infos[i].get("actions")
        facts = envs.judge(i, parsed.fields)
        step = len(envs.actions[i])
        outcome = envs.step(i, parsed.action)
        turn = Turn(
            observed=seen,
            reply=reply,
            prompt=before["prompt"],
            text=text,
            fields=parsed.fields,
            thought_tokens=thought,
            action=parsed.action,
            valid=parsed.valid,
            # the card games take `8 * 3` for `8*3`; no other game lists an action that only lacks blanks
            legal=parsed.valid
            and (
                actions is None
                or not {parsed.action, parsed.action.replace(" ", "")}.isdisjoint(actions)
            ),
            reward=outcome.reward,
            format_reward=rollout.format_valid if parsed.valid else rollout.format_invalid,
            terminated=outcome.terminated,
            truncated=outcome.truncated,
            next_value=0.0,
            env_index=envs.first + i,
            episode=envs.episodes[i],
            step=step,
            success=outcome.success,
            episode_return=outcome.episode_return,
            facts=facts,
        )
        made.append((turn, outcome.observation))
    return made


def collect(
    envs: Envs,
    policy: Policy,
    sampling: SamplingConfig,
    rollout: RolloutConfig,
    generator: torch.Generator,
    engine: Engine | None = None,
) -> list[Turn]:
    """Play `rollout.turns_per_env` turns in every environment.

    Returns:
        turns ordered by time, then by environment, as `make_batch` wants them.
    """
    rows = range(len(envs))
    steps: list[list[tuple[Turn, Mapping[str, Any]]]] = []
    if engine is not None:
        engine.refresh()
    for _ in range(rollout.turns_per_env):
        steps.append(play(envs, rows, policy, sampling, rollout, generator, engine=engine))
        for i, (turn, _) in enumerate(steps[-1]):
            if turn.done:
                envs.reset(i, turn.episode + 1)
    if engine is not None:
        engine.rest()
    # values of what lies beyond: the last observations, and those at which episodes were cut
    cut = {
        (t, i): after
        for t, step in enumerate(steps)
        for i, (turn, after) in enumerate(step)
        if not turn.terminated and (turn.truncated or t == len(steps) - 1)
    }
    beyond = dict(zip(cut, _values(policy, list(cut.values()), len(envs)), strict=True))
    made = [turn for step in steps for turn, _ in step]
    if rollout.rescore and engine is None:
        made = rescore(made, policy, len(envs))
    turns = []
    for at, turn in enumerate(made):
        following = 0.0
        if (place := divmod(at, len(envs))) in beyond:
            following = beyond[place]
        elif not turn.terminated:
            following = made[at + len(envs)].reply.value
        turns.append(replace(turn, next_value=following))
    return turns


def _values(policy: Policy, observations: list[Mapping[str, Any]], size: int) -> list[float]:
    found: list[float] = []
    for at in range(0, len(observations), size):
        part = observations[at : at + size]
        observed = policy.observe([o["image"] for o in part], [o["prompt"] for o in part])
        found += values(policy, observed).tolist()
    return found


@torch.no_grad()
def rescore(turns: list[Turn], policy: Policy, size: int) -> list[Turn]:
    """Replace recorded log-probs, values and hidden states by those of scoring passes over `size` turns or fewer.

    In bfloat16 decoding and scoring round differently; the ratio of the first minibatch is 1 again then.
    """
    renewed: list[Turn] = []
    longest = max(len(t.observed.prompt_ids) for t in turns)
    longest += max(len(t.reply.response_ids) for t in turns)
    size = min(size, max(1, PASS_TOKENS // longest))
    for at in range(0, len(turns), size):
        part = turns[at : at + size]
        inputs = make_inputs(
            [turn.observed for turn in part],
            [turn.reply.response_ids for turn in part],
            policy.processor.pad_token_id,
        )
        scores = score(policy, inputs)
        value = policy.value_head(scores.hidden)
        for i, turn in enumerate(part):
            again = scores.logprobs[i, : len(turn.reply.response_ids)].cpu()
            reply = replace(
                turn.reply,
                logprobs=again,
                gap=float((again - turn.reply.logprobs).abs().sum()),
                value=float(value[i]),
                hidden=scores.hidden[i].float().cpu(),
            )
            renewed.append(replace(turn, reply=reply))
    return renewed
