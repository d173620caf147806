"""Exact arithmetic on card formulas: a token grammar, a parser to fractions, and a solver.

Grammar (no unary minus, no powers, no floor division, no joining of digits):

    expression = term (("+" | "-") term)*
    term       = factor (("*" | "/") factor)*
    factor     = number | "(" expression ")"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from typing import NamedTuple

OPERATORS = "+-*/"
MAX_BRACKETS = 100
_TOKEN = re.compile(r"\d+|[-+*/()=]|\s+|.", re.DOTALL)


class FormulaError(ValueError):
    """A token list that is no formula, or divides by zero."""


def tokenize(text: str) -> list[str]:
    """Split text into numbers and symbols; blanks are dropped, other characters are kept as they are."""
    return [token for token in _TOKEN.findall(text) if not token.isspace()]


def evaluate(tokens: Sequence[str]) -> Fraction:
    """Value of a formula given as tokens; blanks ("") are skipped.

    Raises:
        FormulaError: not a formula of the grammar, a division by zero, or more than `MAX_BRACKETS`
            brackets (the parser is recursive, and the text may be a model's).
    """
    rest = [token for token in tokens if token.strip()][::-1]
    if rest.count("(") > MAX_BRACKETS:
        raise FormulaError(f"{rest.count('(')} brackets; at most {MAX_BRACKETS} are read")
    value = _expression(rest)
    if rest:
        raise FormulaError(f"unexpected {rest[-1]!r} after a complete formula")
    return value


def _expression(rest: list[str]) -> Fraction:
    value = _term(rest)
    while rest and rest[-1] in "+-":
        value = apply(rest.pop(), value, _term(rest))
    return value


def _term(rest: list[str]) -> Fraction:
    value = _factor(rest)
    while rest and rest[-1] in "*/":
        value = apply(rest.pop(), value, _factor(rest))
    return value


def _factor(rest: list[str]) -> Fraction:
    if not rest:
        raise FormulaError("the formula ends where a number is due")
    token = rest.pop()
    if token.isascii() and token.isdigit():
        return Fraction(int(token))
    if token != "(":
        raise FormulaError(f"a number is due, got {token!r}")
    value = _expression(rest)
    if not rest or rest.pop() != ")":
        raise FormulaError("a bracket is not closed")
    return value


def apply(operator: str, a: Fraction, b: Fraction) -> Fraction:
    """`a operator b`, exactly.

    Raises:
        FormulaError: a division by zero.
    """
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    if b == 0:
        raise FormulaError("division by zero")
    return a / b


def uses_exactly(tokens: Sequence[str], numbers: Sequence[int]) -> bool:
    """True if the numbers in `tokens` are `numbers`, each as often as it is given."""
    used = sorted(int(t) for t in tokens if t.isascii() and t.isdigit())
    return used == sorted(numbers)


def solves(tokens: Sequence[str], numbers: Sequence[int], goal: int) -> bool:
    """True if `tokens` are a formula that equals `goal` and uses exactly `numbers`."""
    if not uses_exactly(tokens, numbers):
        return False
    try:
        return evaluate(tokens) == goal
    except FormulaError:
        return False


class Step(NamedTuple):
    """One reduction: `a operator b = result`; `left` are the numbers after it, result first."""

    a: Fraction
    operator: str
    b: Fraction
    result: Fraction
    left: tuple[Fraction, ...]


class Solution(NamedTuple):
    """A way to the goal: the reductions one by one, and the same as one formula."""

    steps: tuple[Step, ...]
    formula: str

    @property
    def tokens(self) -> list[str]:
        """The formula as tokens."""
        return tokenize(self.formula)


def reductions(
    numbers: Sequence[Fraction], operators: str = OPERATORS
) -> Iterator[tuple[int, int, Step]]:
    """All single steps from `numbers`: (index of a, index of b, step); order is by index and operator."""
    for i, operator, j in pairings(numbers, operators):
        yield i, j, make_step(numbers, i, operator, j)


def pairings(
    numbers: Sequence[Fraction], operators: str = OPERATORS
) -> Iterator[tuple[int, str, int]]:
    """`reductions` before any arithmetic: (index of a, operator, index of b)."""
    for i in range(len(numbers)):
        for j, b in enumerate(numbers):
            if i != j:
                yield from ((i, op, j) for op in operators if op != "/" or b != 0)


def make_step(numbers: Sequence[Fraction], i: int, operator: str, j: int) -> Step:
    """The step that combines numbers `i` and `j`."""
    a, b = numbers[i], numbers[j]
    result = apply(operator, a, b)
    others = (n for k, n in enumerate(numbers) if k not in (i, j))
    return Step(a, operator, b, result, (result, *others))


def _wrap(operator: str, text: str, outer: str, *, right: bool) -> str:
    """`text`, whose top operator is `operator` ("" for a number), as an operand of `outer`."""
    loose = operator in ("+", "-")
    if operator == "" or (outer == "+" or (outer == "-" and not right)):
        return text
    if loose or (right and outer == "/"):
        return f"({text})"
    return text


_Item = tuple[Fraction, str, str]
"""A value, the top operator of its formula ("" for a number), and the formula."""


def combine(a: _Item, b: _Item, operator: str, result: Fraction) -> _Item:
    """`a operator b` with no more brackets than needed."""
    left = _wrap(a[1], a[2], operator, right=False)
    return result, operator, left + operator + _wrap(b[1], b[2], operator, right=True)


def _search(items: tuple[_Item, ...], goal: Fraction, operators: str) -> Iterator[Solution]:
    if len(items) == 1:
        if items[0][0] == goal:
            yield Solution((), items[0][2])
        return
    seen = set()
    for i, j, step in reductions([item[0] for item in items], operators):
        a, b = items[i], items[j]
        key = (a[2], step.operator, b[2])
        if key in seen:
            continue
        seen.add(key)
        others = tuple(item for k, item in enumerate(items) if k not in (i, j))
        merged = combine(a, b, step.operator, step.result)
        for solution in _search((merged, *others), goal, operators):
            yield Solution((step, *solution.steps), solution.formula)


@lru_cache(maxsize=1024)
def _solutions(numbers: tuple[int, ...], goal: int, operators: str) -> tuple[Solution, ...]:
    items = tuple((Fraction(n), "", str(n)) for n in numbers)
    return tuple(_search(items, Fraction(goal), operators))


def solutions(
    numbers: Sequence[int], goal: int, operators: str = OPERATORS
) -> tuple[Solution, ...]:
    """Every way to reduce `numbers` to `goal`, exact; the order of `numbers` does not matter.

    Ways that differ only in the order of independent steps are listed apart; their formulas agree.
    """
    return _solutions(tuple(sorted(numbers)), goal, operators)


@cache
def _solvable(numbers: tuple[Fraction, ...], goal: Fraction, operators: str) -> bool:
    if len(numbers) == 1:
        return numbers[0] == goal
    return any(
        _solvable(tuple(sorted(step.left)), goal, operators)
        for _, _, step in reductions(numbers, operators)
    )


def solvable(numbers: Sequence[int | Fraction], goal: int, operators: str = OPERATORS) -> bool:
    """True if some formula over exactly `numbers` equals `goal`."""
    return _solvable(tuple(sorted(Fraction(n) for n in numbers)), Fraction(goal), operators)
