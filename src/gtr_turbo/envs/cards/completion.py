"""The shortest way to end a formula that was begun, by an exact search over what may come next."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from gtr_turbo.envs.cards.formula import FormulaError, apply, solvable


class _Level(NamedTuple):
    """What was read of a formula, or of a bracket that is open: `total plus product times ...`."""

    total: Fraction | None = None
    plus: str = ""
    product: Fraction | None = None
    times: str = ""

    @property
    def value(self) -> Fraction:
        """What it is worth, once its last number was read."""
        assert self.product is not None
        return self.product if self.total is None else apply(self.plus, self.total, self.product)

    def take(self, number: Fraction) -> _Level:
        """With one more number."""
        if self.product is None:
            return self._replace(product=number)
        return self._replace(product=apply(self.times, self.product, number))


class _State(NamedTuple):
    """A formula that was begun."""

    levels: tuple[_Level, ...]
    """The formula, and the brackets that are open in it."""
    left: tuple[int, ...]
    """Numbers that were not used."""
    due: bool
    """A number or a bracket is due; else an operator or the end."""

    def after(self, token: str) -> _State | None:
        """With one more token; None if it cannot follow."""
        *outer, level = self.levels
        if self.due and token == "(":
            return self._replace(levels=(*self.levels, _Level()))
        if self.due:
            names = list(map(str, self.left))
            if token not in names:
                return None
            at = names.index(token)
            level, left = level.take(Fraction(token)), self.left[:at] + self.left[at + 1 :]
            return _State((*outer, level), left, False)
        if token == ")" and outer:
            return self._replace(levels=(*outer[:-1], outer[-1].take(level.value)))
        if token in ("*", "/"):
            return self._replace(levels=(*outer, level._replace(times=token)), due=True)
        if token in ("+", "-"):
            return self._replace(levels=(*outer, _Level(level.value, token)), due=True)
        return None

    def choices(self, operators: str) -> Iterator[str]:
        """What may come next and can be of use."""
        if not self.due:
            yield from [")"] * (len(self.levels) > 1)
            yield from operators * bool(self.left)
            return
        yield from sorted({str(number) for number in self.left})
        opened = sum(level == _Level() for level in self.levels[1:])
        if opened < len(self.left) - 1:
            yield "("


def _after(state: _State, token: str) -> _State | None:
    try:
        return state.after(token)
    except FormulaError:  # a division by zero
        return None


@lru_cache(maxsize=1024)
def complete(
    tokens: tuple[str, ...], numbers: tuple[int, ...], goal: int, operators: str, most: int
) -> tuple[str, ...] | None:
    """The fewest tokens that make `tokens` a formula of `numbers`, each once, that equals `goal`.

    Args:
        tokens: what was written.
        numbers: of the cards, sorted.
        goal: the value.
        operators: that may follow.
        most: tokens of the whole formula.

    Returns:
        The tokens that are to follow; None if there is no way.
    """
    begun: _State | None = _State((_Level(),), numbers, True)
    for token in tokens:
        begun = begun and _after(begun, token)
    if begun is None or not solvable(numbers, goal, operators):
        return None
    waiting: list[tuple[_State, tuple[str, ...]]] = [(begun, ())]
    seen = {begun}
    for state, rest in waiting:
        ended = not state.due and not state.left and len(state.levels) == 1
        if ended and state.levels[0].value == goal:
            return rest
        if len(tokens) + len(rest) < most:
            for token in state.choices(operators):
                following = _after(state, token)
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append((following, (*rest, token)))
    return None
