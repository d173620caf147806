"""The searching expert as a tool for a corrector: what was read in picture and prompt in, the next command out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from gtr_turbo.envs.contract import Tool, json_object
from gtr_turbo.envs.household import facts
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.oracle import Oracle
from gtr_turbo.envs.household.world import LIGHT, TYPES, Game, Item, Pose, Receptacle, Task

MOST_NAMES = 100
"""Entries of a list that are read."""
STATE_WORDS = {"hot": "hot", "cold": "cool", "clean": "clean", "sliced": "sliced", "lit": "on"}
"""What an object is called in the frames and in thoughts -> the state of `world.STATES`."""
_MOVED = re.compile(r"(?:move (.+) to|put (.+) in/on|take (.+) from) (.+)")


class _Notes:
    """What a corrector read, with a number for each receptacle, those here first."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.here = [_name(place["receptacle"]) for place in arguments["here"]]
        if len(set(self.here)) < len(self.here):
            raise ValueError(f"a receptacle is named twice in {self.here}")
        others = (_name(name) for name in arguments["receptacles"])
        self.places = {name: i for i, name in enumerate(dict.fromkeys([*self.here, *others]))}
        self.kinds = [_kind(name.split()[0], _receptacles()) for name in self.places]
        self.objects: dict[str, int | None] = {}
        """Name -> number of its receptacle, None in the hand."""
        self.states: dict[str, frozenset[str]] = {}
        self.searched: set[int] = set()
        self._recall(arguments["past_actions"])
        for i, place in enumerate(arguments["here"]):
            if not place["closed"]:
                self._find(i, place["contents"])
        self.objects = {name: at for name, at in self.objects.items() if at is not None}
        if (held := arguments["holding"].strip()) not in ("", "nothing"):
            self.objects[self._stated(held)] = None

    def _stated(self, text: str) -> str:
        """The name in "hot egg 2"; its state is noted."""
        words = text.lower().split()
        count = next((i for i, word in enumerate(words) if word not in STATE_WORDS), len(words))
        name = _name(" ".join(words[count:]))
        self.states[name] = frozenset(STATE_WORDS[word] for word in words[:count])
        return name

    def _find(self, place: int, contents: Sequence[str]) -> None:
        """All that is in a receptacle."""
        self.objects = {name: at for name, at in self.objects.items() if at != place}
        self.objects |= {self._stated(text): place for text in contents}

    def _recall(self, past: Sequence[str]) -> None:
        """What past commands tell of where one has looked, and of what was moved."""
        at = ""
        for command in past:
            if command.startswith("go to ") and (name := command[6:]) in self.places:
                at = name
                if self.kinds[self.places[at]] not in facts.load().openable:
                    self.searched.add(self.places[at])
            elif command.startswith("open ") and (name := command[5:]) in (at, *self.here):
                self.searched.add(self.places[name])  # elsewhere it was refused
            elif (moved := _MOVED.fullmatch(command)) and moved[4] in self.places:
                name = next(filter(None, moved.groups()))
                self.objects[name] = None if moved[3] else self.places[moved[4]]


@cache
def _receptacles() -> dict[str, str]:
    """Word -> kind of receptacle."""
    return {kind.lower(): kind for kind in facts.kinds()}


@cache
def _things() -> dict[str, str]:
    """Word -> kind of object."""
    kinds = set().union(*facts.load().holds.values(), facts.load().can["toggle"])
    return {kind.lower(): kind for kind in sorted(kinds)}


def _kind(word: str, known: Mapping[str, str]) -> str:
    """The kind that a word means.

    Raises:
        ValueError: it is not known.
    """
    found = known.get(word.strip().lower())
    if found is None:
        raise ValueError(f"{word!r} is none of {', '.join(known)}")
    return found


def _name(text: str) -> str:
    """A name, "egg 2".

    Raises:
        ValueError: it is none.
    """
    name = " ".join(text.lower().split())
    if not re.fullmatch(r"[a-z]+ [0-9]{1,3}", name):
        raise ValueError(f"{text!r} is no name such as 'egg 2'")
    return name


def _game(task: Task, notes: _Notes, here: Sequence[Mapping[str, Any]]) -> Game:
    """A game of what is known: the receptacles, and the objects that were seen."""
    known = facts.load()
    receptacles = tuple(
        Receptacle(
            name=name,
            kind=notes.kinds[i],
            pose=Pose(0 if i < len(here) else i, 0, 0, 0),
            openable=notes.kinds[i] in known.openable,
            open=i < len(here) and not here[i]["closed"],
        )
        for name, i in notes.places.items()
    )

    def items() -> Iterator[Item]:
        for name, home in notes.objects.items():
            word = name.split()[0]
            kind = _things().get(word, word)
            can = {verb for verb, kinds in known.can.items() if kind in kinds}
            yield Item(
                name=name,
                kind=kind,
                home=home,
                can=frozenset(can if "toggle" in can else can | {"pickup"}),
                states=notes.states.get(name, frozenset()),
            )

    return Game(
        scene=0,
        room="Room",
        task=task,
        sentence="",
        receptacles=receptacles,
        objects=tuple(items()),
        start=Pose(0 if here else -1, 0, 0, 0),
        holds=known.holds,
    )


def advise(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the expert that has to search does next, who knows what the arguments say and no more.

    Args:
        arguments: keep the schema of `TOOL`.

    Returns:
        `reachable`; if that is true also `plan`, a sentence, and `next_action`, a command.

    Raises:
        ValueError: something is named that cannot be; the message says what.
    """
    lists = [arguments["receptacles"], arguments["past_actions"], arguments["here"]]
    lists += [place["contents"] for place in arguments["here"]]
    if max(map(len, lists)) > MOST_NAMES:
        raise ValueError(f"a list is longer than {MOST_NAMES}")
    notes, kind = _Notes(arguments), TYPES[arguments["task"]]
    wanted, light = _kind(arguments["object"], _things()), kind == LIGHT
    target = _kind(arguments["target"], _things() if light else _receptacles())
    ends = {"lamp": target} if light else {"receptacle": target}
    task = Task(type=kind, object=wanted, **ends)
    engine = Engine(_game(task, notes, arguments["here"]))
    held = [i for i, at in enumerate(notes.objects.values()) if at is None]
    engine.state.held = held[0] if held else None
    moved = {at for at in notes.objects.values() if at is not None}
    for searched in (notes.searched, moved):  # where it was seen may have been forgotten
        oracle = Oracle(engine)
        oracle.notice(searched)
        advice = oracle.advise(search=True)
        if advice.command != "look":
            return {"reachable": True, "plan": advice.why, "next_action": advice.command}
    return {"reachable": False}


def _list(description: str, items: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items or {"type": "string"}, "description": description}


TOOL = Tool(
    name="next_command",
    description="Says what an expert would do next in a household task: where to look for an object, when to "
    "open, take, clean, heat, cool or put it. It knows only what you tell it.",
    parameters=json_object(
        task={
            "type": "string",
            "enum": list(TYPES),
            "description": "place: put one object somewhere; two: put two there; light: look at one under a "
            "lamp; clean, heat, cool: do that to one, then put it somewhere",
        },
        object={"type": "string", "description": "the kind of object wanted, such as egg"},
        target={
            "type": "string",
            "description": "the kind of receptacle it belongs in, such as fridge; of light: desklamp",
        },
        here=_list(
            "what the picture shows at the agent's place, the receptacle it went to first; empty in the "
            "middle of the room",
            json_object(
                receptacle={"type": "string", "description": "its name, such as fridge 1"},
                closed={"type": "boolean"},
                contents=_list(
                    "names of the objects in or on it, with what the picture shows of each: hot egg 2; the "
                    "words are hot, cold, clean, sliced, lit"
                ),
            ),
        ),
        holding={
            "type": "string",
            "description": "what the hand holds, in the same words; an empty text if nothing",
        },
        receptacles=_list("names of all other receptacles: those of the actions go to"),
        past_actions=_list("the previous actions, as the prompt gives them, the oldest first"),
    ),
    run=advise,
)
