"""Episodes from stored turns: joined over updates, described for the list, and chosen evenly over training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtr_turbo.parsing import parse
from gtr_turbo.report.read import StoredTurn


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """Turns of one episode, in order. They may lie in several files: an update can end in mid-episode."""

    run: int
    env: int
    number: int
    turns: tuple[StoredTurn, ...]
    complete: bool
    """False if a turn is missing before the last, or the last of an episode that was followed by another."""

    @property
    def outcome(self) -> str:
        """`success`, `failed`, or `unfinished` (its end was not stored)."""
        last = self.turns[-1]
        if not (last.terminated or last.truncated):
            return "unfinished"
        return "success" if last.success else "failed"


def join(turns: Sequence[StoredTurn], run: int = 0) -> tuple[list[Episode], int]:
    """Episodes of a run in the order they began, and how many turns were stored twice.

    Turns belong together by (environment, episode). Of a turn stored twice, the later file's is kept.
    """
    found: dict[tuple[int, int], dict[int, StoredTurn]] = {}
    twice = 0
    for turn in turns:
        steps = found.setdefault((turn.env, turn.episode), {})
        twice += turn.step in steps
        steps[turn.step] = turn
    newest: dict[int, int] = {}
    for env, number in found:
        newest[env] = max(number, newest.get(env, 0))
    episodes = []
    for (env, number), steps in found.items():
        order = sorted(steps)
        last = steps[order[-1]]
        ended = last.terminated or last.truncated or number == newest[env]
        episodes.append(
            Episode(
                run=run,
                env=env,
                number=number,
                turns=tuple(steps[step] for step in order),
                complete=ended and order == list(range(len(order))),
            )
        )
    episodes.sort(key=lambda e: (e.turns[0].update, e.env, e.number))
    return episodes, twice


def spread(count: int) -> list[int]:
    """0 to `count` - 1, so ordered that the first n of them are spread over the whole range.

    The ends come first, then middles of what lies between (numbers by their reversed bits, van der Corput
    1935): of any prefix, the widest gap is about twice the narrowest.
    """
    if count < 2:
        return list(range(count))
    bits, order = (count - 1).bit_length(), [0, count - 1]
    for number in range(1 << bits):
        index = int(f"{number:0{bits}b}"[::-1], 2) * count >> bits
        order.append(index)
    return list(dict.fromkeys(order))


def order_of_choice(episodes: Sequence[Sequence[Episode]]) -> list[Episode]:
    """All episodes of all runs, so ordered that any prefix is spread over runs and over training.

    A run's episodes whose end was not stored come after its others.
    """
    ranked = []
    for number, own in enumerate(episodes):
        ended = [episode for episode in own if episode.outcome != "unfinished"]
        cut = [episode for episode in own if episode.outcome == "unfinished"]
        order = [part[index] for part in (ended, cut) for index in spread(len(part))]
        ranked += [((place + 0.5) / len(own), number, e) for place, e in enumerate(order)]
    ranked.sort(key=lambda entry: entry[:2])
    return [episode for _, _, episode in ranked]


def to_page(episode: Episode, prompt_id: Callable[[str], int]) -> dict[str, Any]:
    """An episode as the page reads it, frames still missing.

    Args:
        episode: the episode.
        prompt_id: number of a prompt's text; prompts repeat, so each is written once.
    """
    rewards = [turn.reward for turn in episode.turns if turn.reward is not None]
    return {
        "run": episode.run,
        "env": episode.env,
        "episode": episode.number,
        "outcome": episode.outcome,
        "complete": episode.complete,
        "return": _short(sum(rewards)) if rewards else None,
        "turns": [_turn(turn, prompt_id(turn.prompt)) for turn in episode.turns],
    }


def _turn(turn: StoredTurn, prompt: int) -> dict[str, Any]:
    return {
        "update": turn.update,
        "step": turn.step,
        "frame": None,
        "prompt": prompt,
        "reply": turn.reply,
        "fields": [[str(name), _text(value)] for name, value in _fields(turn).items()],
        "action": turn.action,
        "valid": turn.valid,
        "legal": turn.legal,
        "terminated": turn.terminated,
        "truncated": turn.truncated,
        "success": turn.success,
        "reward": _short(turn.reward),
        "format": _short(turn.format_reward),
        "value": _short(turn.value),
        "advantage": _short(turn.advantage),
        "facts": dict(turn.facts),
        "kl": None if turn.kl is None else [_short(number) for number in turn.kl],
        "tokens": turn.tokens,
    }


def _fields(turn: StoredTurn) -> Mapping[str, Any]:
    """What the reply says, field by field; empty where it is no JSON object with an action."""
    return parse(turn.reply, ("action",)).fields


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.5g}")


class Prompts:
    """Numbers prompts as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._known: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of a prompt's text."""
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]
