"""A household game and its state: what there is, where it is, and what the agent sees of it.

Receptacles and objects are numbered by their place in `Game.receptacles` and `Game.objects`; the state holds
these numbers. Classes ("kinds") are ALFRED's: `Fridge`, `CounterTop`, `SoapBar`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

ROOMS = {"Kitchen": 0, "LivingRoom": 200, "Bedroom": 300, "Bathroom": 400}
"""Room kind -> the number below its first scene; there are 30 scenes of each."""

PLACE, TWO, LIGHT, CLEAN, HEAT, COOL = (
    "pick_and_place_simple",
    "pick_two_obj_and_place",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
)
TASKS = (PLACE, TWO, LIGHT, CLEAN, HEAT, COOL)
"""ALFRED's names of the six task types."""
TYPES = {"place": PLACE, "two": TWO, "light": LIGHT, "clean": CLEAN, "heat": HEAT, "cool": COOL}
"""What we call them."""
STATES = ("clean", "hot", "cool", "on", "sliced")
"""States of objects; each is a set of `State`."""


class Pose(NamedTuple):
    """A place to stand: position in steps of 0.25 m, view in degrees (rotation clockwise, horizon down)."""

    x: int
    z: int
    rotation: int
    horizon: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Receptacle:
    """Furniture or an appliance that objects are in or on."""

    name: str
    """As the commands call it, "fridge 1"."""
    kind: str
    """Its class, "Fridge"."""
    pose: Pose
    """Where the agent stands to use it; several receptacles may share one."""
    openable: bool
    """It can be opened and closed."""
    open: bool = False
    """It is open when the game starts."""
    id: str = ""
    """As the game file calls it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An object, as it is when the game starts."""

    name: str
    """As the commands call it, "egg 2"."""
    kind: str
    """Its class, "Egg"."""
    home: int | None
    """Number of the receptacle it starts in or on; None if it is in none."""
    can: frozenset[str]
    """Which of `pickup`, `clean`, `heat`, `cool`, `toggle`, `slice` can be done to it, and `contain`."""
    id: str = ""
    """As the game file calls it."""
    states: frozenset[str] = frozenset()
    """Which of `STATES` it is in at the start."""
    spots: frozenset[Pose] = frozenset()
    """Where it lies within reach at the start: the pose of its home, as a rule."""
    inside: tuple[int, ...] = ()
    """Objects that are told to be in it when it is examined; the engine never changes this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done."""

    type: str
    """One of `TASKS`."""
    object: str
    """Kind of the objects wanted."""
    receptacle: str = ""
    """Kind of the receptacle they belong in; empty for `LIGHT`."""
    lamp: str = ""
    """Kind of the lamp; of `LIGHT` only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """All that does not change while a game is played."""

    scene: int
    """Number of the scene (1-30, 201-230, 301-330, 401-430); 0 if the game file does not say."""
    room: str
    """`Kitchen`, `LivingRoom`, `Bedroom` or `Bathroom`; `Room` if the scene is 0."""
    task: Task
    sentence: str
    """The task in words, "put a clean mug in shelf", without a full stop."""
    receptacles: tuple[Receptacle, ...]
    """In the order in which the room is listed: that of their ids."""
    objects: tuple[Item, ...]
    """In the order of their ids, in which they are listed too."""
    start: Pose
    """Where the agent stands at the beginning."""
    holds: Mapping[str, frozenset[str]]
    """Kind of receptacle -> kinds of objects that may be put there."""
    put: str = "move {} to {}"
    """How an object is put down; games compiled before ALFWorld 0.4 say "put {} in/on {}"."""
    help: bool = True
    """There is a command `help`; older games have none."""
    locations: Mapping[Pose, str] = field(default_factory=dict)
    """What one is told to arrive at, "loc 7", in older games; newer ones name the receptacle."""


@dataclass(slots=True, kw_only=True)
class State:
    """All that changes. Numbers of objects and receptacles, see the module."""

    at: int | None = None
    """The receptacle the agent went to last; None until it goes to one."""
    held: int | None = None
    """The object in the hand."""
    places: list[int | None]
    """For each object the receptacle it is in or on; None in the hand, or if it is in none."""
    opened: set[int] = field(default_factory=set)
    """Receptacles that are open. What is not openable is never in here."""
    clean: set[int] = field(default_factory=set)
    """Objects that were cleaned."""
    hot: set[int] = field(default_factory=set)
    """Objects heated, and not cooled since."""
    cool: set[int] = field(default_factory=set)
    """Objects cooled, and not heated since."""
    on: set[int] = field(default_factory=set)
    """Lamps switched on; using one again leaves it on, as in ALFWorld."""
    sliced: set[int] = field(default_factory=set)
    """Objects that were sliced."""
    spots: set[tuple[int, Pose]] = field(default_factory=set)
    """(object, pose) where it lies within reach; that of a held object may remain."""
    left: set[tuple[int, int]] = field(default_factory=set)
    """(object, receptacle) it was taken from and not put back to; the text engine remembers these."""


class Seen(NamedTuple):
    """A receptacle in view."""

    receptacle: int
    closed: bool
    contents: tuple[int, ...]
    """Objects in or on it; empty if it is closed."""


class View(NamedTuple):
    """What the agent sees."""

    here: tuple[Seen, ...]
    """The receptacles within reach, the one it went to first; empty in the middle of the room."""
    held: int | None
    """The object in the hand."""


def room_of(scene: int) -> str:
    """The kind of room a scene is; `Room` for 0."""
    for room, below in ROOMS.items():
        if below < scene <= below + 30:
            return room
    return "Room"


def visible(game: Game, state: State) -> View:
    """What the agent sees now: the receptacles here, what is in those that are not closed, and its hand.

    In the middle of the room that is the hand only; furniture can be seen from there, its contents cannot.
    """
    if state.at is None:
        return View((), state.held)
    pose = game.receptacles[state.at].pose
    beside = (i for i, r in enumerate(game.receptacles) if r.pose == pose and i != state.at)
    here = []
    for number in (state.at, *beside):
        closed = game.receptacles[number].openable and number not in state.opened
        contents = () if closed else tuple(i for i, p in enumerate(state.places) if p == number)
        here.append(Seen(number, closed, contents))
    return View(tuple(here), state.held)
