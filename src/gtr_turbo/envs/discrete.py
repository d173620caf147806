"""A wrapper that makes a visual-text environment of any Gymnasium env with frames and discrete actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from gtr_turbo.envs.contract import (
    AnyText,
    ContractError,
    check_observation,
    observation_space,
)


class DiscreteText(gymnasium.Env[dict[str, Any], str]):
    """A Gymnasium env with RGB frames and discrete actions, seen as a visual-text environment.

    Made by `wrap_discrete`. It is no `gymnasium.Wrapper`: `unwrapped` must end here, where `fields` (and
    a subclass's `judge` and `demonstrate`) are; the env inside is `self.env`.

    An unknown action does not reach that env: nothing moves and the reward is `illegal_reward`; such
    turns count towards `max_turns`.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form
    render_mode = "rgb_array"
    fields = ("thoughts", "action")

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        actions: Sequence[str],
        prompt: str,
        *,
        illegal_reward: float = -1.0,
        max_turns: int = 100,
    ) -> None:
        if env.render_mode != "rgb_array":
            raise ContractError(
                f"{env}: wrap_discrete needs frames; make the env with render_mode='rgb_array' "
                f"(it has {env.render_mode!r})"
            )
        if not isinstance(env.action_space, spaces.Discrete) or env.action_space.n != len(actions):
            raise ContractError(
                f"{env}: {len(actions)} action names were given for {env.action_space}; "
                "wrap_discrete needs a Discrete space and one name per action, in order"
            )
        if len(set(actions)) < len(actions) or any(not a or a != a.strip() for a in actions):
            raise ContractError(
                f"{env}: the action names {list(actions)} must differ and be neither empty nor begin or end with "
                "blanks, which replies are read without"
            )
        self.env = env
        self._index = {name: i + int(env.action_space.start) for i, name in enumerate(actions)}
        self._actions = list(actions)
        self._prompt = prompt
        self._illegal_reward = illegal_reward
        self._max_turns = max_turns
        self.action_space = AnyText()
        env.reset()
        observation = self._observation()
        check_observation(str(env), observation)
        self.observation_space = observation_space(*observation["image"].shape[:2])

    def render(self) -> np.ndarray:
        """The env's frame, copied: some envs draw into one buffer."""
        return np.array(self.env.render())

    def close(self) -> None:
        """Close the env inside."""
        self.env.close()

    def _observation(self) -> dict[str, Any]:
        return {"image": self.render(), "prompt": self._prompt}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        _, info = self.env.reset(seed=seed, options=options)
        self._turns = 0
        return self._observation(), {**info, "actions": self._actions}

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Play the action of that name; an unknown name plays nothing and pays `illegal_reward`."""
        self._turns += 1
        terminated = truncated = False
        reward = self._illegal_reward
        info: dict[str, Any] = {}
        if action in self._index:
            _, paid, terminated, truncated, info = self.env.step(self._index[action])
            reward = float(paid)
        truncated = bool(truncated) or self._turns >= self._max_turns
        # every turn: a limit of gymnasium.make may end the episode outside
        success = bool(info.get("is_success", terminated and reward > 0))
        info = {**info, "actions": self._actions, "success": success}
        return self._observation(), reward, bool(terminated), truncated, info


def wrap_discrete(
    env: gymnasium.Env[Any, Any], *, actions: Sequence[str], prompt: str, **options: Any
) -> DiscreteText:
    """Make a visual-text environment of any Gymnasium env with RGB frames and discrete actions.

    Args:
        env: made with `render_mode="rgb_array"`.
        actions: a name for each action of `env`, in order.
        prompt: the text shown each turn; it should ask for a JSON object with "thoughts" and "action".
        options: `illegal_reward` (default -1) and `max_turns` (default 100).

    Success is `info["is_success"]` where the env gives it, else: it terminated with a positive reward.

    Raises:
        ContractError: no frames, or the names do not fit the action space.
    """
    return DiscreteText(env, actions, prompt, **options)
