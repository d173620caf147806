"""The words shown to the model: full prompts as published, and a compact form for tiny models.

A prompt asks for one JSON object. `reply_format` writes the object that is asked for, so that the
fields an environment declares and the fields its prompt asks for cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gtr_turbo.checks import ConfigError

STYLES = ("full", "compact")


def check_style(style: str) -> str:
    """Return `style`.

    Raises:
        ConfigError: `style` is not in `STYLES`.
    """
    if style not in STYLES:
        raise ConfigError(f"prompt={style!r} is not one of {', '.join(STYLES)}")
    return style


def reply_format(fields: Mapping[str, str]) -> str:
    """The sentence that asks for a JSON object, with what belongs into each field."""
    lines = ",\n".join(f'"{name}": {what}' for name, what in fields.items())
    return f"Your response should be a valid json file in the following format:\n{{\n{lines}\n}}"


def choices(actions: Sequence[str]) -> str:
    """The published way to list actions: ['1', '2', ...]."""
    return "[" + ", ".join(f"'{action}'" for action in actions) + "]"


def number_line() -> str:
    """NumberLine, as published."""
    return (
        "You are playing a game called number line. You will see a target number and a current number "
        "in the image. And your goal is to move the current number closer to the target by choosing "
        "either adding or subtracting one to the current number. "
        "You need to first give the thoughts and then you can choose between ['+', '-']. Use '+' to "
        "increase the number, and '-' to decrease the number. "
    ) + reply_format(
        {
            "current number": '"x"',
            "target number": '"x"',
            "thoughts": '"{first read out the current and target number, then think carefully about '
            'which action to choose}"',
            "action": '"-" or "+"',
        }
    )


def blackjack() -> str:
    """Blackjack, as published."""
    return (
        "You are a blackjack player. You are observing the current game state, you can choose between "
        "['stand', 'hit']. "
    ) + reply_format(
        {
            "thoughts": "\"{first describe your total points and the dealer's total points then think "
            'about which action to choose}"',
            "action": '"stand" or "hit"',
        }
    )


_FACES = "Note that 'J', 'Q', and 'K' count as '10'. "
_ONCE = "and each number can only be used once. "


def points(goal: int, cards: Sequence[str], formula: str, actions: Sequence[str]) -> str:
    """EZPoints and Points24 with one token a turn, as published.

    Args:
        goal: 12 or 24.
        cards: a letter for each card, for the format.
        formula: the current formula.
        actions: the tokens that can be appended.
    """
    expert = "an expert 24 points card game player" if goal == 24 else "an expert card game player"
    count = {2: "two", 4: "four"}[len(cards)]
    return (
        f"You are {expert}. You are observing these {count} cards in the image. "
        f"You are observing the current formula: '{formula}'. "
        f"You can choose between {choices(actions)}. "
        "The number or operator you choose will be appended to the current formula. "
        f"{_FACES}"
        f"Your goal is to output a formula that evaluates to {goal}, {_ONCE}"
    ) + reply_format(
        {
            "cards": f"[{', '.join(cards)}]",
            "formula": f'"{formula}"',
            "thoughts": f'"{{First check whether the current formula equals {goal}. If the current '
            f"formula equals {goal}, output '='. Otherwise consider which number or operator should be "
            f'appended to the current formula to make it equal {goal}.}}"',
            "action": '"{number}" or "{operator}"',
        }
    )


def points_reduction(goal: int, cards: Sequence[str], steps: str, left: str) -> str:
    """Points24 with one arithmetic step a turn (ours, in the published manner)."""
    state = f"You are observing the current steps: '{steps}'. "
    state += f"The numbers left are: {left}. " if left else ""
    return (
        f"You are an expert {goal} points card game player. You are observing these four cards in the "
        f"image. {state}Each turn you choose two of the numbers that are left and an operator (+ - * /), "
        "for example '8*3'; the result takes their place. When one number is left, choose '='. "
        f"{_FACES}Your goal is to be left with {goal}, {_ONCE}"
    ) + reply_format(
        {
            "cards": f"[{', '.join(cards)}]",
            "formula": f'"{steps}"',
            "thoughts": f'"{{Work out, step by step, how the numbers left give {goal}.}}"',
            "action": '"{number}{operator}{number}" or "="',
        }
    )


def points_formula(goal: int, cards: Sequence[str]) -> str:
    """Points24 with the whole formula as one action (ours, in the published manner)."""
    return (
        f"You are an expert {goal} points card game player. You are observing these four cards in the "
        f"image. {_FACES}Your goal is to output a formula that evaluates to {goal}, {_ONCE}"
        "You may use + - * / and brackets. "
    ) + reply_format(
        {
            "cards": f"[{', '.join(cards)}]",
            "formula": '""',
            "thoughts": f'"{{Work out, step by step, how the numbers give {goal}.}}"',
            "action": '"{the formula}"',
        }
    )


def household(
    task: str, history: Sequence[str], actions: Sequence[str], description: str = ""
) -> str:
    """The household tasks, as published: the task, the past actions, the admissible ones.

    Args:
        task: what is to be done, without a full stop.
        history: past actions, the oldest first.
        actions: the admissible ones.
        description: what the text engine told; the published prompt has none (visual only).
    """
    scene = (
        f"You are also given the following text description of the current scene: {description!r}. "
        if description
        else ""
    )
    listed = "\n ".join(f"'{action}'" for action in actions)
    return (
        f"You are an expert in the ALFRED Embodied Environment. Your task is to {task}. {scene}"
        f"You are also given the previous actions you have taken: {list(history)}. "
        f"Your admissible actions of the current situation are: [{listed}]. "
    ) + reply_format(
        {
            "thoughts": '"{first describe what do you see in the image, then carefully think about which '
            "action to complete the task based on your observation, action history and admissible "
            'actions.}"',
            "action": '"{an admissible action}"',
        }
    )
