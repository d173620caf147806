"""Making games: legal and solvable ones, from the facts of ALFRED's scenes."""

from __future__ import annotations

import functools

import numpy as np

from gtr_turbo.envs.household import facts, naming
from gtr_turbo.envs.household.engine import APPLIANCES, TREATMENTS
from gtr_turbo.envs.household.world import (
    LIGHT,
    TASKS,
    TWO,
    Game,
    Item,
    Pose,
    Receptacle,
    Task,
    room_of,
)

LAMP, LAMP_STANDS = "DeskLamp", ("Desk", "Dresser", "Shelf", "SideTable")
"""Lamps stand on something: those on the floor cannot be used in ALFWorld's text games."""
ROOM_FOR_ONE = frozenset(
    {"CoffeeMachine", "HandTowelHolder", "Toaster", "ToiletPaperHanger", "TowelHolder"}
)
"""Receptacles that two objects are never asked to be put in."""
MOST_OF_A_KIND, MOST_WANTED, MOST_INSIDE = 3, 4, 12
"""Objects of one kind, of the kind wanted (as in ALFRED), and in one receptacle."""


SPLITS = ("all", "train", "held-out")


@functools.cache
def scenes(split: str, task: str) -> tuple[int, ...]:
    """Scenes of a split in which a task type is given.

    Args:
        split: `train`, `held-out` (unseen rooms) or `all`.
        task: one of `TASKS`.

    Raises:
        ValueError: another split or task.
    """
    if split not in SPLITS or task not in TASKS:
        raise ValueError(f"split={split!r}, task={task!r}: not of {SPLITS}, {TASKS}")
    known = facts.load()
    return tuple(
        n
        for n in known.scenes
        if room_of(n) in known.rooms[task]
        and (split == "all" or (n in known.held_out) == (split == "held-out"))
        and targets(n, task)
    )


@functools.cache
def targets(scene: int, task: str) -> tuple[Task, ...]:
    """All goals of a task type in a scene: the object can be there, and not only where it is wanted."""
    known, room = facts.load(), facts.load().scenes[scene]
    verb = TREATMENTS.get(task, "")
    appliance = APPLIANCES.get(verb, "")
    lampless = task == LIGHT and not room.kinds & set(LAMP_STANDS)
    if lampless or (verb and appliance not in room.kinds):
        return ()
    found = []
    for kind in room.objects:
        homes = [r for r in sorted(room.kinds) if kind in known.holds.get(r, ())]
        if kind == LAMP or not homes or (verb and kind not in known.can[verb]):
            continue
        if task == LIGHT:
            found.append(Task(type=task, object=kind, lamp=LAMP))
        elif len(homes) > 1:
            unfit = ROOM_FOR_ONE if task == TWO else {appliance}
            found += [Task(type=task, object=kind, receptacle=r) for r in homes if r not in unfit]
    return tuple(found)


def generate(rng: np.random.Generator, *, task: str | None = None, split: str = "all") -> Game:
    """Make a game.

    Args:
        rng: the only source of chance.
        task: one of `TASKS`; one of them by chance if None.
        split: `train`, `held-out` or `all`.

    Raises:
        ValueError: another split or task.
    """
    kind = task or TASKS[rng.integers(len(TASKS))]
    rooms = scenes(split, kind)
    number = rooms[rng.integers(len(rooms))]
    goals = targets(number, kind)
    goal = goals[rng.integers(len(goals))]
    room = facts.load().scenes[number]
    ways = facts.load().sentences[kind]
    sentence = ways[rng.integers(len(ways))].format(
        obj=goal.object.lower(), recep=goal.receptacle.lower(), toggle=goal.lamp.lower()
    )
    placed = _place(rng, room, goal)
    stands = {pose for _, _, pose in room.receptacles}
    while (start := _somewhere(rng, room)) in stands:
        pass
    return build(number, goal, sentence, room, placed, start)


def _somewhere(rng: np.random.Generator, room: facts.Scene) -> Pose:
    x, z = room.floor[rng.integers(len(room.floor))]
    return Pose(x, z, 90 * int(rng.integers(4)), 30)


def _counts(rng: np.random.Generator, room: facts.Scene, goal: Task) -> list[tuple[str, int]]:
    """How many objects of each kind there are, the wanted ones and the lamp first."""
    fewest = 2 if goal.type == TWO else 1
    counts = [(goal.object, int(rng.integers(fewest, MOST_WANTED + 1)))]
    if goal.lamp or LAMP in room.objects:
        counts.append((LAMP, 1))
    for kind in room.objects:
        if kind not in (goal.object, LAMP):
            counts.append((kind, int(rng.integers(1, MOST_OF_A_KIND + 1))))
    return counts


def _place(rng: np.random.Generator, room: facts.Scene, goal: Task) -> list[tuple[str, int]]:
    """(kind, number of its receptacle) of each object; none of those wanted where it is wanted."""
    holds = facts.load().holds
    inside = [0] * len(room.receptacles)
    placed: list[tuple[str, int]] = []
    for kind, count in _counts(rng, room, goal):
        for _ in range(count):
            homes: dict[str, list[int]] = {}
            for i, (home, _, _) in enumerate(room.receptacles):
                fits = home in LAMP_STANDS if kind == LAMP else kind in holds.get(home, ())
                if (
                    fits
                    and inside[i] < MOST_INSIDE
                    and (kind, home) != (goal.object, goal.receptacle)
                ):
                    homes.setdefault(home, []).append(i)
            if homes:
                choice = homes[sorted(homes)[rng.integers(len(homes))]]
                at = choice[rng.integers(len(choice))]
                inside[at] += 1
                placed.append((kind, at))
    return placed


def _ids(room: facts.Scene, placed: list[tuple[str, int]]) -> list[str]:
    """Ids as THOR's, from the place of the receptacle and a number, so that no two are equal."""
    ids: list[str] = []
    for i, (kind, at) in enumerate(placed):
        x, y, z = map(float, room.receptacles[at][1].split("|")[1:4])
        x += i / 100
        while (made := f"{kind}|{x:+06.2f}|{y:+06.2f}|{z:+06.2f}") in ids:
            x += len(placed) / 100  # of a receptacle nearby
        ids.append(made)
    return ids


def build(
    number: int,
    goal: Task,
    sentence: str,
    room: facts.Scene,
    placed: list[tuple[str, int]],
    start: Pose,
) -> Game:
    """The game with these objects, named and in order."""
    known, ids = facts.load(), _ids(room, placed)
    furniture = sorted(
        range(len(room.receptacles)), key=lambda i: naming.order(room.receptacles[i][1])
    )
    named = naming.names([*ids, *(name for _, name, _ in room.receptacles)])
    receptacles = tuple(
        Receptacle(name=named[name], kind=kind, pose=pose, openable=kind in known.openable, id=name)
        for kind, name, pose in (room.receptacles[i] for i in furniture)
    )
    objects = []
    for i in sorted(range(len(ids)), key=lambda i: naming.order(ids[i])):
        kind, at = placed[i]
        can = {verb for verb, kinds in known.can.items() if kind in kinds}
        home = furniture.index(at)
        objects.append(
            Item(
                name=named[ids[i]],
                kind=kind,
                home=home,
                can=frozenset(can if kind == LAMP else can | {"pickup"}),
                spots=frozenset({receptacles[home].pose}),
                id=ids[i],
            )
        )
    return Game(
        scene=number,
        room=room_of(number),
        task=goal,
        sentence=sentence,
        receptacles=receptacles,
        objects=tuple(objects),
        start=start,
        holds=known.holds,
    )
