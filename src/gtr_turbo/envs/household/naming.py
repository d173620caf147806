"""Ids and names of what is in a game, as ALFWorld writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

_ESCAPES = {"-": "_minus_", "|": "_bar_", "+": "_plus_", ".": "_dot_", ",": "_comma_"}


def escape(name: str) -> str:
    """THOR's id, `Egg|+00.12|...`, as a PDDL name; a PDDL name stays as it is."""
    for char, word in _ESCAPES.items():
        name = name.replace(char, word)
    return name


def order(name: str) -> str:
    """What ids are sorted by: the planner writes PDDL names in lower case."""
    return escape(name).lower()


def names(ids: Iterable[str]) -> dict[str, str]:
    """A name for each id, "egg 2": of one class, the first id has the highest number.

    Args:
        ids: of all receptacles and objects of a game.
    """
    classes = {}
    for name in sorted(ids, key=order):
        low = order(name)
        classes[name] = low.split("_bar_", 1)[0] + ("basin" if "basin" in low else "")
    left = Counter(classes.values())
    named = {}
    for name, kind in classes.items():
        named[name] = f"{kind} {left[kind]}"
        left[kind] -= 1
    return named
