"""Blackjack with the rules of Gymnasium's toy-text environment (RL4VLM, arXiv 2405.10292)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from gtr_turbo import prompts
from gtr_turbo.envs.cards import deals, drawing
from gtr_turbo.envs.cards.drawing import Card
from gtr_turbo.envs.contract import AnyText, observation_space


def total(cards: Sequence[Card]) -> tuple[int, bool]:
    """Best total of a hand, and whether an ace counts as 11 in it."""
    points = sum(card.value for card in cards)
    usable = any(card.value == 1 for card in cards) and points + 10 <= 21
    return points + 10 * usable, usable


class BlackjackEnv(gymnasium.Env[dict[str, Any], str]):
    """Beat the dealer without going over 21.

    Description: infinite deck; the dealer shows one card and draws until 17 (any 17 stands).
    Action: `"stand"` or `"hit"`. Any other string pays -1 and changes nothing.
    Observation: green table: the dealer's cards on top (one hidden), the player's below.
    Reward: +1 won, 0 drawn, -1 lost; at the end of the episode.
    Episode end: terminated when the player stands or goes over 21; truncated after 20 turns (only
        unknown actions get there). With `early_truncation` an unknown action ends it too.
    Info: `actions`, `player` and `dealer` (totals of what is visible), `usable_ace`; at the end
        `success` (won).
    Splits: `held-out` is one in five of the first deals (two cards and the dealer's, ranks and suits).

    Args:
        prompt: `full` (published) or `compact`.
        early_truncation: end the episode at the first -1.
        split: `all`, `train` or `held-out`.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form
    fields = ("thoughts", "action")
    actions = ("stand", "hit")
    max_turns = 20

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
        deals.check_flags("Blackjack", early_truncation=early_truncation)
        self._early_truncation = early_truncation
        self._split = deals.check_split("Blackjack", split, ("all", "train", "held-out"))
        self.observation_space = observation_space(drawing.SIZE, drawing.SIZE)
        self.action_space = AnyText()

    def _draw(self) -> Card:
        return Card(int(self.np_random.integers(13)), int(self.np_random.integers(4)))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Deal two cards each."""
        super().reset(seed=seed)
        while True:
            cards = [self._draw() for _ in range(4)]
            if self._split in ("all", deals.split_of_cards(cards[:3], by_multiset=False)):
                break
        self.player, self.dealer = cards[:2], cards[2:]
        self._turns, self._over = 0, False
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Stand, or take a card."""
        self._turns += 1
        reward, success = 0.0, False
        if action == "hit":
            self.player.append(self._draw())
            self._over = total(self.player)[0] > 21
            reward = -1.0 if self._over else 0.0
        elif action == "stand":
            while total(self.dealer)[0] < 17:
                self.dealer.append(self._draw())
            dealer, player = total(self.dealer)[0], total(self.player)[0]
            reward = float(np.sign(player - (dealer if dealer <= 21 else 0)))
            self._over, success = True, reward > 0
        else:
            reward, self._over = -1.0, self._early_truncation
        terminated = self._over
        truncated = not terminated and self._turns >= self.max_turns
        info = {**self._info(), "success": success}  # every turn: a limit of Gymnasium's may end it
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The frame, uint8 (300, 300, 3)."""
        hidden: list[Card | None] = list(self.dealer) if self._over else [self.dealer[0], None]
        return drawing.table(
            [(24, hidden), (172, list(self.player))], [(4, "Dealer", 16), (280, "Player", 16)]
        )

    def _observation(self) -> dict[str, Any]:
        text = "blackjack" if self._compact else prompts.blackjack()
        return {"image": self.render(), "prompt": text}

    def _info(self) -> dict[str, Any]:
        points, usable = total(self.player)
        return {
            "actions": list(self.actions),
            "player": points,
            "dealer": total(self.dealer[:1])[0],
            "usable_ace": usable,
        }

    def _right_action(self) -> str:
        points, usable = total(self.player)
        dealer = self.dealer[0].value
        if usable:
            stand = points >= 19 or (points == 18 and dealer not in (1, 9, 10))
        else:
            stand = (
                points >= 17
                or (points >= 13 and 2 <= dealer <= 6)
                or (points == 12 and 4 <= dealer <= 6)
            )
        return "stand" if stand else "hit"

    def judge(self, reply: Mapping[str, Any]) -> dict[str, bool]:
        """Facts about a reply: perception if its first two numbers are the totals; basic strategy."""
        numbers = [int(n) for n in re.findall(r"\d{1,4}", str(reply.get("thoughts")))[:2]]
        return {
            "perception": numbers == [total(self.player)[0], total(self.dealer[:1])[0]],
            "agreement": reply.get("action") == self._right_action(),
        }

    def demonstrate(self, rng: np.random.Generator) -> dict[str, Any]:
        """The reply of basic strategy."""
        points, usable = total(self.player)
        dealer, action = total(self.dealer[:1])[0], self._right_action()
        thoughts = f"{points}{' soft' if usable else ''} against {dealer}"
        if not self._compact:
            soft = " with a usable ace" if usable else ""
            thoughts = f"My total is {points}{soft} and the dealer shows {dealer}. I {action}."
        return {"thoughts": thoughts, "action": action}
