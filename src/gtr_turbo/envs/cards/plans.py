"""Plans on card numbers: ways to the goal step by step, as text and back from text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

from gtr_turbo.envs.cards import formula
from gtr_turbo.envs.cards.formula import Step

_SIGNS = str.maketrans("×·÷−", "**/-")
_FORMULA = re.compile(r"[\d+\-*/() ]+", re.ASCII)
_NUMBER = r"(-?\d+(?:/\d+|\.\d+)?)"
_STEP = re.compile(rf"{_NUMBER}\s*([-+*/])\s*{_NUMBER}\s*=\s*{_NUMBER}", re.ASCII)


Move = tuple[Fraction, str, Fraction]
"""`a operator b`."""
Claim = tuple[Fraction, str, Fraction, Fraction]
"""`a operator b = c` as a text says it, right or wrong."""


@cache
def _moves(
    numbers: tuple[Fraction, ...], goal: int, operators: str
) -> tuple[tuple[Move, ...], ...]:
    """`plans` as moves (a, operator, b) for sorted numbers; there are 715 multisets of four values."""
    if len(numbers) == 1:
        return ((),) if numbers[0] == goal else ()
    natural: dict[tuple[Move, ...], None] = {}
    others: dict[tuple[Move, ...], None] = {}
    for _, _, step in formula.reductions(numbers, operators):
        if step.operator in "+*" and step.a < step.b:
            continue
        for rest in _moves(tuple(sorted(step.left)), goal, operators):
            way = ((step.a, step.operator, step.b), *rest)
            values = [formula.apply(operator, a, b) for a, operator, b in way]
            whole = all(value.denominator == 1 and value >= 0 for value in values)
            (natural if whole else others)[way] = None
    return tuple(natural or others)


def make_steps(numbers: tuple[Fraction, ...], moves: Sequence[Move]) -> tuple[Step, ...]:
    """The moves as steps from `numbers`: what is left keeps its order, the result goes in front."""
    steps = []
    for a, operator, b in moves:
        left = list(numbers)
        left.remove(a)
        left.remove(b)
        result = formula.apply(operator, a, b)
        numbers = (result, *left)
        steps.append(Step(a, operator, b, result, numbers))
    return tuple(steps)


def plans(numbers: tuple[Fraction, ...], goal: int, operators: str) -> tuple[tuple[Move, ...], ...]:
    """Ways from `numbers` to `goal` as a person would write them.

    Larger operand first where it does not matter; only non-negative whole numbers unless no such way
    exists. Equal ways are listed once.
    """
    return _moves(tuple(sorted(numbers)), goal, operators)


def show(numbers: Sequence[Fraction]) -> str:
    """Numbers as text, with blanks between."""
    return " ".join(str(n) for n in numbers)


def show_step(step: Step) -> str:
    """A step as text: `8*3=24`."""
    return f"{step.a}{step.operator}{step.b}={step.result}"


def trace(steps: Sequence[Step]) -> str:
    """The thought that computes: `7+5=12 (12 9 8), 12-9=3 (3 8), 3*8=24`."""
    parts = [show_step(s) + (f" ({show(s.left)})" if len(s.left) > 1 else "") for s in steps]
    return ", ".join(parts)


def holds(claim: Claim) -> bool:
    """True if the arithmetic is right."""
    a, operator, b, result = claim
    return not (operator == "/" and b == 0) and formula.apply(operator, a, b) == result


def read_claims(text: str) -> list[Claim]:
    """Every `a operator b = c` in a text, its numbers whole, decimal or fractions, its signs also × · ÷ −.

    `show_step` writes 8 / (1/3) as `8/1/3=24`; of the two readings the right one is taken. A number over
    zero makes the claim 0/0=0, which is wrong everywhere.
    """
    claims = []
    for a, operator, b, result in _STEP.findall(text.translate(_SIGNS)):
        readings: list[Claim] = []
        try:
            readings.append((Fraction(a), operator, Fraction(b), Fraction(result)))
            if operator == "/" and "/" in a and "/" not in b:
                numerator, _, denominator = a.partition("/")
                below = Fraction(denominator) / Fraction(b)
                readings.append((Fraction(numerator), "/", below, Fraction(result)))
        except ZeroDivisionError:
            readings = readings or [(Fraction(0), "/", Fraction(0), Fraction(0))]
        claims.append(next(filter(holds, readings), readings[0]))
    return claims


def leads_to(numbers: Sequence[Fraction], claims: Sequence[Claim], goal: int) -> bool:
    """True if the claims are right and, one after the other, reduce `numbers` to `goal`."""
    left = list(numbers)
    for claim in claims:
        a, _, b, result = claim
        if a not in left or not holds(claim):
            return False
        left.remove(a)
        if b not in left:
            return False
        left.remove(b)
        left.append(result)
    return left == [goal]


def planned_formula(text: str) -> list[str] | None:
    """The last formula in a text with at least two numbers and an operator, as tokens; None if there is none."""
    for found in reversed(_FORMULA.findall(text.translate(_SIGNS))):
        tokens = formula.tokenize(found)
        if sum(map(str.isdigit, tokens)) >= 2 and not set("+-*/").isdisjoint(tokens):
            return tokens
    return None


def evaluates_to(text: str, value: Fraction) -> bool:
    """True if `text` is a formula of that value."""
    try:
        return formula.evaluate(formula.tokenize(text)) == value
    except formula.FormulaError:
        return False


def as_formula(numbers: Sequence[int], steps: Sequence[Step]) -> str:
    """Steps that reduce `numbers` to one, as one formula."""
    items = [(Fraction(n), "", str(n)) for n in numbers]
    for step in steps:
        a = items.pop(next(i for i, item in enumerate(items) if item[0] == step.a))
        b = items.pop(next(i for i, item in enumerate(items) if item[0] == step.b))
        items.insert(0, formula.combine(a, b, step.operator, step.result))
    return items[0][2]
