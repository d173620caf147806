"""The exact solver of the card games as a tool for a corrector: cards and formula in, a way to the goal out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from gtr_turbo.envs.cards import drawing, formula
from gtr_turbo.envs.cards.completion import complete
from gtr_turbo.envs.cards.formula import Solution
from gtr_turbo.envs.cards.plans import (
    as_formula,
    holds,
    make_steps,
    plans,
    read_claims,
    show,
    trace,
)
from gtr_turbo.envs.contract import Tool, json_object

MAX_TEXT = 200  # characters of a formula


def fitting(
    tokens: Sequence[str], numbers: Sequence[int], goal: int, operators: str
) -> list[Solution]:
    """Solutions that begin with `tokens`, one for each formula, the shortest first."""
    found = {
        solution.formula: solution
        for solution in formula.solutions(numbers, goal, operators)
        if solution.tokens[: len(tokens)] == list(tokens)
    }
    return sorted(found.values(), key=lambda s: (len(s.formula), s.formula))


def after_steps(numbers: Sequence[int], text: str) -> tuple[Fraction, ...]:
    """Numbers left after the steps `a op b = c` of a text, the last result first.

    Raises:
        ValueError: there is text but no step in it, a step is wrong, or it uses a number that is not left.
    """
    left, claims = [Fraction(n) for n in numbers], read_claims(text)
    if text.strip() and not claims:
        raise ValueError(f"no step such as 7+5=12 in {text!r}")
    for a, operator, b, result in claims:
        step = f"{a}{operator}{b}={result}"
        if not holds((a, operator, b, result)):
            raise ValueError(f"the step {step} is wrong")
        for number in (a, b):
            if number not in left:
                raise ValueError(f"the step {step} needs {number}, and left are {show(left)}")
            left.remove(number)
        left.insert(0, result)
    return tuple(left)


def continue_steps(
    numbers: Sequence[int], text: str, goal: int, operators: str
) -> tuple[str, str, str] | None:
    """A way to `goal` from where the steps of `text` have led.

    Returns:
        the way, its first step, and all steps as one formula (empty unless `text` is):
        `("7+5=12 (12 9 8), 12-9=3 (3 8), 3*8=24", "7+5", "(7+5-9)*8")`; None if there is no way.

    Raises:
        ValueError: as `after_steps`.
    """
    left = after_steps(numbers, text)
    ways = plans(left, goal, operators)
    if not ways:
        return None
    if not ways[0]:
        return show(left), "=", ""
    steps = make_steps(left, ways[0])
    first = f"{steps[0].a}{steps[0].operator}{steps[0].b}"
    return trace(steps), first, "" if text else as_formula(numbers, steps)


def _told(found: tuple[str, str] | None) -> dict[str, Any]:
    if found is None:
        return {"reachable": False}
    return {"reachable": True, "plan": found[0], "next_action": found[1]}


def continue_tokens(
    numbers: Sequence[int], tokens: Sequence[str], goal: int, operators: str, most: int
) -> tuple[str, str] | None:
    """A whole formula that begins with `tokens` and has at most `most`, with its next token.

    The shortest without a needless bracket, as the expert writes; if none begins so, the shortest there is.

    Returns:
        `("(7+5-9)*8=24", "-")` after `(7+5`; None if there is none.
    """
    for solution in fitting(tokens, numbers, goal, operators):
        return f"{solution.formula}={goal}", [*solution.tokens, "="][len(tokens)]
    rest = complete(tuple(tokens), tuple(sorted(numbers)), goal, operators, most)
    if rest is None:
        return None
    return f"{''.join([*tokens, *rest])}={goal}", [*rest, "="][0]


def solver(count: int, goal: int, operators: str, granularity: str, most: int) -> Tool:
    """The tool of a game with `count` cards; what it says of a plan is what the agent's thought may say.

    Args:
        count: of cards.
        goal: to reach.
        operators: that the game has.
        granularity: of the game's actions.
        most: tokens that its formula may have.
    """

    def run(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        cards, text = arguments["cards"], arguments["formula"]
        if len(cards) != count:
            raise ValueError(f"{count} cards are due, got {len(cards)}")
        if len(text) > MAX_TEXT:
            raise ValueError(f"the formula has {len(text)} characters; at most {MAX_TEXT} are read")
        numbers = [min(drawing.RANKS.index(card) + 1, 10) for card in cards]
        if granularity == "token":
            tokens = formula.tokenize(text)
            return _told(continue_tokens(numbers, tokens, goal, operators, most))
        way = continue_steps(numbers, text if granularity == "reduction" else "", goal, operators)
        return _told(way and (way[0], way[1] if granularity == "reduction" else way[2]))

    so_far = {
        "token": "the current formula, such as (7+5; empty at the start",
        "reduction": "the current steps, such as 7+5=12, 12-9=3; empty at the start",
        "formula": "an empty text",
    }
    return Tool(
        name="solve",
        description=f"Finds, exactly, how the cards give {goal} from the current formula, or that they "
        "cannot. J, Q and K count as 10.",
        parameters=json_object(
            cards={
                "type": "array",
                "items": {"type": "string", "enum": list(drawing.RANKS)},
                "description": f"the ranks of the {count} cards, from left to right",
            },
            formula={"type": "string", "description": so_far[granularity]},
        ),
        run=run,
    )
