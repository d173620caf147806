"""Reading PDDL problems: nested words, the initial facts. It is data, and bounded."""

from __future__ import annotations

import re
from typing import Any

from gtr_turbo.envs.contract import ContractError
from gtr_turbo.envs.household import naming
from gtr_turbo.envs.household.world import Pose

MAX_DEPTH, MAX_WORD, MAX_COORDINATE = 50, 200, 10_000
CAN = {
    "pickupable": "pickup",
    "cleanable": "clean",
    "heatable": "heat",
    "coolable": "cool",
    "toggleable": "toggle",
    "sliceable": "slice",
    "isReceptacleObject": "contain",
}
"""Fact -> what `Item.can` calls it."""
STATED = {
    "isClean": "clean",
    "isHot": "hot",
    "isCool": "cool",
    "isToggled": "on",
    "isSliced": "sliced",
}
"""Fact -> what `Item.states` calls it."""
PAIRS = (
    "atLocation",
    "receptacleType",
    "receptacleAtLocation",
    "objectType",
    "objectAtLocation",
    "inReceptacle",
    "inReceptacleObject",
    "canContain",
)
"""Facts of two arguments."""
IGNORED = ("wasInReceptacle", "checked", "examined", "isOn", "moveable", "full", "=")
"""Facts that no command and no feedback depends on."""
_ARITY = {**dict.fromkeys((*CAN, *STATED, "openable", "opened"), 1), **dict.fromkeys(PAIRS, 2)}
_INTEGER = re.compile(r"-?[0-9]{1,9}")
_TOKEN = re.compile(r"[()]|[^\s()]+")


class GameError(ContractError):
    """A game file is damaged, or no ALFWorld text game of the six task types."""


Tree = list[Any]
"""A PDDL expression: words and lists of them."""


def parse(text: str) -> Tree:
    """Read a PDDL expression.

    Raises:
        GameError: brackets do not match, it is nested too deep, or a word is too long.
    """
    stack: list[Tree] = [[]]
    for token in _TOKEN.findall(re.sub(r";[^\n]*", "", text)):
        if token == "(":
            stack.append([])
            if len(stack) > MAX_DEPTH:
                raise GameError(f"the PDDL problem is nested deeper than {MAX_DEPTH}")
        elif token == ")":
            if len(stack) == 1:
                raise GameError("the PDDL problem closes a bracket that it did not open")
            done = stack.pop()
            stack[-1].append(done)
        elif len(token) > MAX_WORD:
            raise GameError(f"the PDDL problem has a word of more than {MAX_WORD} characters")
        else:
            stack[-1].append(token)
    if len(stack) != 1:
        raise GameError("the PDDL problem ends inside a bracket; is the file complete?")
    return stack[0]


def section(tree: Tree, name: str) -> Tree:
    """What stands in the part of a definition that begins with a name.

    Raises:
        GameError: there is none, or more than one.
    """
    found = [part for part in tree if isinstance(part, list) and part[:1] == [name]]
    if len(found) != 1:
        raise GameError(f"the PDDL problem must have one {name}, it has {len(found)}")
    return list(found[0][1:])


def facts_of(tree: Tree) -> dict[str, list[list[str]]]:
    """The initial facts, by predicate; an empty list for one that is not there.

    Raises:
        GameError: a predicate that no game begins with, or another number of arguments.
    """
    found: dict[str, list[list[str]]] = {predicate: [] for predicate in _ARITY}
    for fact in tree:
        if not isinstance(fact, list) or not fact or fact[0] in IGNORED:
            continue
        count = _ARITY.get(fact[0]) if isinstance(fact[0], str) else None
        if count != len(fact) - 1 or not all(isinstance(word, str) for word in fact):
            raise GameError(
                f"the PDDL problem begins with {str(fact)[:100]}; known are {', '.join(_ARITY)}"
            )
        found[fact[0]].append(fact[1:])
    return found


def place(pose: Pose) -> str:
    """The PDDL name of a pose."""
    return naming.escape(f"loc|{pose.x}|{pose.z}|{pose.rotation // 90}|{pose.horizon}")


def pose_of(name: str) -> Pose:
    """The pose that a PDDL name of a location says."""
    text = name.replace("_minus_", "-").replace("_plus_", "+").replace("_bar_", "|")
    numbers = [int(word) for word in text.split("|")[1:] if _INTEGER.fullmatch(word)]
    if len(numbers) != 4 or not 0 <= numbers[2] <= 3 or max(map(abs, numbers)) > MAX_COORDINATE:
        raise GameError(f"location {name[:80]!r} is not loc|x|z|rotation 0-3|horizon")
    x, z, rotation, horizon = numbers
    return Pose(x, z, 90 * rotation, horizon)


def one(rows: list[list[str]], what: str) -> dict[str, str]:
    """The second arguments of facts by the first.

    Raises:
        GameError: one has two.
    """
    found = dict(rows)
    for first, second in rows:
        if found[first] != second:
            raise GameError(f"{first[:80]!r} has two {what}: {found[first]!r} and {second!r}")
    return {first: str(second) for first, second in found.items()}


def kind_of(name: str) -> str:
    """The kind that a PDDL type is of."""
    return name.removesuffix("Type")
