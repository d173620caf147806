"""The searching expert as a tool for a corrector: what was read in picture and prompt in, the next command out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations
from typing import Any

from gtr_turbo.envs.contract import Tool, json_object
from gtr_turbo.envs.household import facts
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.oracle import Oracle
from gtr_turbo.envs.household.world import LIGHT, TYPES, Game, Item, Pose, Receptacle, Task

MOST_NAMES = 200
"""Entries of a list that are read."""
STATE_WORDS = {
    "hot": "hot", "cold": "cool", "cool": "cool", "clean": "clean",
    "sliced": "sliced", "cut": "sliced", "lit": "on", "on": "on",
}  # fmt: skip
"""What an object is called in frames, thoughts and tasks -> the state of `world.STATES`."""
TREATED = {"heat": "hot", "cool": "cool", "clean": "clean"}
"""Verb -> the state of `world.STATES` it leads to."""
_NAME = re.compile(r"[a-z]+ [0-9]{1,3}")
_PAST = re.compile(
    f"(go to|open|close|(?:take|move|put|heat|cool|clean) ({_NAME.pattern}) (?:from|to|in/on|with)) "
    f"({_NAME.pattern})"
)


class _Notes:
    """What a corrector read, with a number for each receptacle, those here first."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.here = [_name(place["receptacle"]) for place in arguments["here"]]
        if len(set(self.here)) < len(self.here):
            raise ValueError(f"a receptacle is named twice in {self.here}")
        actions = arguments["actions"]
        others = [_name(action[6:]) for action in actions if action.startswith("go to ")]
        self.places = {name: i for i, name in enumerate(dict.fromkeys([*self.here, *others]))}
        self.kinds = [_kind(name.split()[0], _receptacles()) for name in self.places]
        self.objects: dict[str, int | None] = {}
        """Name -> number of its receptacle, None in the hand."""
        self.states: dict[str, frozenset[str]] = {}
        self.looked: dict[int, None] = {}
        """Receptacles whose contents were seen, the longest ago first."""
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
        if count:
            self.states[name] = frozenset(STATE_WORDS[word] for word in words[:count])
        return name

    def _find(self, place: int, contents: Sequence[str]) -> None:
        """All that is in a receptacle."""
        self.objects = {name: at for name, at in self.objects.items() if at != place}
        self.objects |= {self._stated(text): place for text in contents}

    def _recall(self, past: Sequence[str]) -> None:
        """What past commands tell of where one has looked, and of what was moved and treated.

        Commands that were refused are among them. They are told by what cannot have been: something done at a
        receptacle that is elsewhere, or with what is not in the hand.
        """
        at, held = "", ""
        opened: set[int] = set()
        for command in past:
            told = _PAST.fullmatch(command.strip())
            if told is None or (name := told[3]) not in self.places:
                continue
            verb, thing, place = told[1].split()[0], told[2], self.places[name]
            if verb == "go":
                at = name
            elif at and not self._together(at, name):
                continue
            elif verb in ("open", "close"):
                (opened.add if verb == "open" else opened.discard)(place)
            elif verb == "take":
                held, self.objects[thing] = thing, None
            elif thing != held:
                continue
            elif verb in TREATED:
                undone = {"hot", "cool"} if verb in ("heat", "cool") else set()
                before = self.states.get(thing, frozenset())
                self.states[thing] = before - undone | {TREATED[verb]}
            else:
                held, self.objects[thing] = "", place
            if place in opened or self.kinds[place] not in facts.load().openable:
                self.looked.pop(place, None)
                self.looked[place] = None

    def _together(self, one: str, other: str) -> bool:
        """Whether two receptacles may be used from one place."""
        if one in self.here and other in self.here:
            return True
        return (
            one == other or _pair(*(self.kinds[self.places[n]] for n in (one, other))) in _beside()
        )


def _pair(one: str, other: str) -> tuple[str, str]:
    return min(one, other), max(one, other)


@cache
def _beside() -> frozenset[tuple[str, str]]:
    """Kinds of receptacles that are used from one place in some room."""
    found = set()
    for scene in facts.load().scenes.values():
        for (one, _, pose), (other, _, there) in combinations(scene.receptacles, 2):
            if pose == there:
                found.add(_pair(one, other))
    return frozenset(found)


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
    if not _NAME.fullmatch(name):
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
    lists = [arguments["actions"], arguments["past_actions"], arguments["here"]]
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
    looked = list(notes.looked)
    for first in range(
        len(looked) + 1
    ):  # if there is nowhere else, look again, the longest ago first
        oracle = Oracle(engine)
        oracle.notice(looked[first:])
        advice = oracle.advise(search=True)
        if advice.command != "look":
            break
    else:
        return {"reachable": False}
    older = re.sub(r"^move (.+) to ", r"put \1 in/on ", advice.command)
    for command in (advice.command, older):
        if command in arguments["actions"]:
            return {"reachable": True, "plan": advice.why, "next_action": command}
    raise ValueError(f"{advice.command!r} would be next, but is none of the actions; read again")


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
                    "words are hot, cold, clean, sliced, on"
                ),
            ),
        ),
        holding={
            "type": "string",
            "description": "what the hand holds, in the same words; an empty text if nothing",
        },
        actions=_list("the admissible actions, as the prompt gives them"),
        past_actions=_list("the previous actions, as the prompt gives them, the oldest first"),
    ),
    run=advise,
)
