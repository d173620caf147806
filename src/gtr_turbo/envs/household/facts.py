"""What is known of ALFRED's 120 scenes: `facts.json`, made by benchmarks/household_facts.py."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from gtr_turbo.envs.household.world import Pose


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A room without its objects."""

    number: int
    receptacles: tuple[tuple[str, str, Pose], ...]
    """(kind, id, where one stands to use it) of each."""
    objects: tuple[str, ...]
    """Kinds of objects that can be in it."""
    floor: tuple[tuple[int, int], ...]
    """(x, z) of all points where one can stand, in steps of 0.25 m."""

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds of its receptacles."""
        return frozenset(kind for kind, _, _ in self.receptacles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything in the file."""

    scenes: Mapping[int, Scene]
    held_out: frozenset[int]
    """Scenes that ALFWorld keeps for evaluation in unseen rooms."""
    rooms: Mapping[str, frozenset[str]]
    """Task type -> kinds of rooms it is given in."""
    holds: Mapping[str, frozenset[str]]
    """Kind of receptacle -> kinds of objects it can hold."""
    can: Mapping[str, frozenset[str]]
    """`clean`, `cool`, `heat`, `slice`, `toggle`, `contain` -> kinds of objects."""
    openable: frozenset[str]
    goals: Mapping[str, str]
    """Task type -> its goal in PDDL, with `{obj}`, `{recep}`, `{toggle}` and `#` for `-`."""
    sentences: Mapping[str, tuple[str, ...]]
    """Task type -> the ways to say it."""
    domain: str
    """ALFWorld's PDDL domain."""
    grammar: str
    """ALFWorld's grammar of commands and feedback."""


def kind_of(name: str) -> str:
    """The kind of a receptacle or object by its id, `Egg|+00.12|...`; the last part for a basin."""
    parts = name.split("|")
    return parts[-1] if parts[-1].endswith("Basin") else parts[0]


def _scene(number: int, data: Mapping[str, Any]) -> Scene:
    return Scene(
        number=number,
        receptacles=tuple(
            (kind_of(name), name, Pose(*pose)) for name, *pose in data["receptacles"]
        ),
        objects=tuple(data["objects"]),
        floor=tuple((x, z) for z, *row in data["floor"] for x in row),
    )


@functools.cache
def load() -> Facts:
    """Read the file, once."""
    text = resources.files(__package__).joinpath("facts.json").read_text(encoding="utf-8")
    data = json.loads(text)

    def sets(name: str) -> dict[str, frozenset[str]]:
        return {key: frozenset(values) for key, values in data[name].items()}

    return Facts(
        scenes={int(n): _scene(int(n), scene) for n, scene in data["scenes"].items()},
        held_out=frozenset(data["held_out"]),
        rooms=sets("rooms"),
        holds=sets("holds"),
        can=sets("can"),
        openable=frozenset(data["openable"]),
        goals=data["goals"],
        sentences={task: tuple(ways) for task, ways in data["sentences"].items()},
        domain=data["domain"],
        grammar=data["grammar"],
    )


@functools.cache
def kinds() -> list[str]:
    """Kinds of receptacles that the scenes have, sorted; there are 29."""
    return sorted(set().union(*(scene.kinds for scene in load().scenes.values())))
