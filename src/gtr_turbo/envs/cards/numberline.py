"""NumberLine: walk to a number (RL4VLM, arXiv 2405.10292)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from gtr_turbo import prompts
from gtr_turbo.envs.cards import deals, drawing
from gtr_turbo.envs.contract import AnyText, observation_space


class NumberLineEnv(gymnasium.Env[dict[str, Any], str]):
    """Move the current number to the target.

    Description: positions 0..5. Start and goal are uniform and never equal: an equal goal becomes
        (goal + 1) mod 5, as published.
    Action: `"-"` or `"+"`, one step, clipped to the line. Any other string moves nothing.
    Observation: white 300x300 image with "Target: g" and "Current: p"; the numbers are in the image
        only.
    Reward: +1 at the goal, -1 if the distance did not shrink (an unknown action included), else 0.
    Episode end: terminated at the goal; truncated after 10 steps. With `early_truncation` any -1 ends
        the episode (terminated: it is a rule of the task, so nothing is bootstrapped).
    Info: `actions`, `target`, `current`; at the end `success` (the goal was reached).
    Splits: `held-out` is 5 of the 30 (start, goal) pairs, `train` the others; there are no multisets. Episodes walk
        through pairs of the other split: these are splits of starts, not of pictures.

    Args:
        prompt: `full` (published) or `compact`.
        early_truncation: end the episode at the first -1.
        split: `all`, `train` or `held-out`.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form
    fields = ("current number", "target number", "thoughts", "action")
    actions = ("-", "+")
    max_steps = 10

    def __init__(
        self,
        *,
        prompt: str = "full",
        early_truncation: bool = False,
        split: str = "all",
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self._compact = prompts.check_style(prompt) == "compact"
        deals.check_flags("NumberLine", early_truncation=early_truncation)
        self._early_truncation = early_truncation
        self._split = deals.check_split("NumberLine", split, ("all", "train", "held-out"))
        self.observation_space = observation_space(drawing.SIZE, drawing.SIZE)
        self.action_space = AnyText()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw a start and a goal."""
        super().reset(seed=seed)
        while True:
            start, goal = (int(n) for n in self.np_random.integers(0, 6, size=2))
            if goal == start:
                goal = (goal + 1) % 5
            if goal == start:  # 4 -> (4 + 1) % 5 = 0 and 5 -> 1 differ; only kept for certainty
                continue
            if self._split == "all" or (self._split == "held-out") == deals.held_out((start, goal)):
                break
        self.current, self.target, self._steps = start, goal, 0
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move by one."""
        before = abs(self.target - self.current)
        if action in self.actions:
            move = 1 if action == "+" else -1
            self.current = min(5, max(0, self.current + move))
        self._steps += 1
        success = self.current == self.target
        reward = 1.0 if success else (-1.0 if abs(self.target - self.current) >= before else 0.0)
        terminated = success or (self._early_truncation and reward < 0)
        truncated = not terminated and self._steps >= self.max_steps
        info = {**self._info(), "success": success}  # every turn: a limit of Gymnasium's may end it
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The frame, uint8 (300, 300, 3)."""
        return drawing.number_line(self.target, self.current).copy()

    def _observation(self) -> dict[str, Any]:
        text = "numberline" if self._compact else prompts.number_line()
        return {"image": self.render(), "prompt": text}

    def _info(self) -> dict[str, Any]:
        return {"actions": list(self.actions), "target": self.target, "current": self.current}

    def _right_action(self) -> str:
        return "+" if self.target > self.current else "-"

    def judge(self, reply: Mapping[str, Any]) -> dict[str, bool]:
        """Facts about a reply in this state: perception, and whether the action is the right one."""
        seen = (str(reply.get("current number")), str(reply.get("target number")))
        return {
            "perception": seen == (str(self.current), str(self.target)),
            "agreement": reply.get("action") == self._right_action(),
        }

    def demonstrate(self, rng: np.random.Generator) -> dict[str, Any]:
        """The expert's reply in this state."""
        action = self._right_action()
        sign = "<" if action == "+" else ">"
        thoughts = f"{self.current}{sign}{self.target}"
        if not self._compact:
            more = "smaller than" if action == "+" else "larger than"
            thoughts = (
                f"The current number is {self.current} and the target number is {self.target}. "
                f"The current number is {more} the target number, so I choose '{action}'."
            )
        numbers = {"current number": str(self.current), "target number": str(self.target)}
        return {**numbers, "thoughts": thoughts, "action": action}
