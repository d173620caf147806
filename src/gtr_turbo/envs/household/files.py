"""ALFWorld's game files: writing a game as one, and reading published ones.

A `game.tw-pddl` is JSON with a PDDL problem and a grammar that holds the task sentence. It is data: what it says
is compared with what the engine knows, and nothing of it is evaluated.
"""

from __future__ import annotations

import functools
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gtr_turbo.envs.household import facts, naming
from gtr_turbo.envs.household.engine import APPLIANCES, TREATMENTS
from gtr_turbo.envs.household.pddl import (
    CAN,
    STATED,
    GameError,
    Tree,
    facts_of,
    kind_of,
    one,
    parse,
    place,
    pose_of,
    section,
)
from gtr_turbo.envs.household.world import (
    TASKS,
    TWO,
    Game,
    Item,
    Pose,
    Receptacle,
    Task,
    room_of,
)

GAME, PROBLEM, TRAJECTORY = "game.tw-pddl", "initial_state.pddl", "traj_data.json"
MAX_BYTES, MAX_THINGS = 4_000_000, 1000
PUT, OLD_PUT = "move {} to {}", "put {} in/on {}"
"""How objects are put down, now and in games compiled before ALFWorld 0.4."""

_TEMPLATE = re.compile(r'action\s+(\w+)\s*\{\s*template\s*::\s*"([^"]*)"')
_SENTENCE = re.compile(r'"Your task is to: ([^"\\\n]{1,300}?)\.?"')
_ARRIVAL = re.compile(r"You arrive at \{(r|lend)\.name\}")
_SCENE = re.compile(r"-(\d{1,3})/trial_[^/]*$")
_SOLVABLE = re.compile(rb'"solvable"\s*:\s*true')

# -- writing -------------------------------------------------------------------------------------


def goal_text(task: Task) -> str:
    """The goal in PDDL, and the bracket that closes the problem."""
    text = (
        facts.load()
        .goals[task.type]
        .format(obj=task.object, recep=task.receptacle, toggle=task.lamp, mrecep="")
    )
    return text.replace("#", "-")


def problem(game: Game, name: str) -> str:
    """The PDDL problem of a game.

    Args:
        game: made by the generator, or read.
        name: of the problem, letters, digits and `_`.
    """
    kinds = sorted({item.kind for item in game.objects} | {"Knife", "ButterKnife"})
    homes = sorted({r.kind for r in game.receptacles} | {"SinkBasin", "Microwave", "Fridge"})
    poses = {r.pose for r in game.receptacles} | {game.start}
    poses |= {pose for item in game.objects for pose in item.spots}
    declared = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in kinds),
        *(f"{kind}Type - rtype" for kind in homes),
        *(f"{naming.escape(item.id)} - object" for item in game.objects),
        *(f"{naming.escape(r.id)} - receptacle" for r in game.receptacles),
        *(f"{place(pose)} - location" for pose in sorted(poses)),
    ]
    init = [f"atLocation agent1 {place(game.start)}"]
    for r in game.receptacles:
        name_r = naming.escape(r.id)
        init += [f"receptacleType {name_r} {r.kind}Type"]
        init += [f"receptacleAtLocation {name_r} {place(r.pose)}"]
        init += [f"openable {name_r}"] * r.openable + [f"opened {name_r}"] * r.open
    for home in homes:
        init += [f"canContain {home}Type {k}Type" for k in kinds if k in game.holds.get(home, ())]
    for item in game.objects:
        name_o = naming.escape(item.id)
        init.append(f"objectType {name_o} {item.kind}Type")
        if item.home is not None:
            init.append(f"inReceptacle {name_o} {naming.escape(game.receptacles[item.home].id)}")
        init += [f"objectAtLocation {name_o} {place(pose)}" for pose in sorted(item.spots)]
        init += [f"{fact} {name_o}" for fact, verb in CAN.items() if verb in item.can]
        init += [f"{fact} {name_o}" for fact, word in STATED.items() if word in item.states]
        init += [
            f"inReceptacleObject {naming.escape(game.objects[i].id)} {name_o}" for i in item.inside
        ]
    lines = [f"(define (problem plan_{name})", "(:domain alfred)", "(:objects", *declared, ")"]
    lines += ["(:init", *(f"({fact})" for fact in init), ")"]
    return "\n".join(lines) + goal_text(game.task)


def export(game: Game, root: Path, trial: str, walkthrough: Sequence[str]) -> Path:
    """Write a game as ALFWorld's three files, which its `AlfredTWEnv` loads.

    Args:
        game: to write.
        root: folder of games; the game gets a folder of its own in it.
        trial: its name, letters, digits and `_`.
        walkthrough: commands that win it.

    Returns:
        The path of its `game.tw-pddl`.
    """
    task, known = game.task, facts.load()
    text = problem(game, trial)
    grammar = known.grammar.replace("UNKNOWN GOAL", game.sentence)
    data = {
        "pddl_domain": known.domain,
        "grammar": grammar,
        "pddl_problem": text,
        "solvable": True,
        "walkthrough": list(walkthrough),
    }
    about = {
        "task_type": task.type,
        "task_id": f"trial_{trial}",
        "pddl_params": {
            "object_target": task.object,
            "parent_target": task.receptacle,
            "toggle_target": task.lamp,
            "mrecep_target": "",
            "object_sliced": False,
        },
        "scene": {"scene_num": game.scene, "floor_plan": f"FloorPlan{game.scene}"},
        "turk_annotations": {"anns": [{"task_desc": game.sentence, "high_descs": []}]},
    }
    where = task.receptacle or task.lamp
    folder = root / f"{task.type}-{task.object}-None-{where}-{game.scene}" / f"trial_{trial}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROBLEM).write_text(text, encoding="utf-8")
    (folder / TRAJECTORY).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    (folder / GAME).write_text(json.dumps(data) + "\n", encoding="utf-8")
    return folder / GAME


# -- reading ---------------------------------------------------------------------------------------


def _leaves(tree: Tree) -> list[list[str]]:
    """All expressions of words only, in order."""
    if all(isinstance(part, str) for part in tree):
        return [tree]
    return [leaf for part in tree if isinstance(part, list) for leaf in _leaves(part)]


def _task(goal: Tree) -> Task:
    """Which of the six task types a goal is.

    Raises:
        GameError: it is none of them.
    """
    kinds = {
        (leaf[0], leaf[1]): kind_of(leaf[2])
        for leaf in _leaves(goal)
        if len(leaf) == 3 and leaf[0] in ("objectType", "receptacleType")
    }
    wanted = kinds.get(("objectType", "?o"), kinds.get(("objectType", "?o1"), ""))
    lamp, home = kinds.get(("objectType", "?ot"), ""), kinds.get(("receptacleType", "?r"), "")
    for task in (Task(type=name, object=wanted, receptacle=home, lamp=lamp) for name in TASKS):
        if section(parse(f"({goal_text(task)}")[0], ":goal") == goal:
            return task
    raise GameError(
        f"its goal is none of the six task types ({', '.join(TASKS)}); sliced objects and movable "
        "receptacles are not among them"
    )


def _check_goal(game: Game) -> None:
    """Whether what the goal asks for is there at all.

    Raises:
        GameError: it is not, so that the game cannot be won.
    """
    task = game.task
    wanted = sum(thing.kind == task.object and "pickup" in thing.can for thing in game.objects)
    lamps = sum(thing.kind == task.lamp and "toggle" in thing.can for thing in game.objects)
    kinds = {home.kind for home in game.receptacles}
    appliance = APPLIANCES.get(TREATMENTS.get(task.type, ""))
    needed = (
        (wanted >= 1 + (task.type == TWO), f"enough of {task.object} that can be taken"),
        (lamps or not task.lamp, f"a {task.lamp} that can be switched on"),
        (task.receptacle in kinds or not task.receptacle, f"a {task.receptacle}"),
        (appliance is None or appliance in kinds, f"a {appliance}"),
    )
    for there, what in needed:
        if not there:
            raise GameError(f"its goal cannot be met: there is not {what}")


class _Wording(NamedTuple):
    """What the grammar of a game says in its own way."""

    sentence: str
    put: str
    help: bool
    arrives_at_locations: bool


def _wording(grammar: str) -> _Wording:
    """The task sentence of a grammar, and which of ALFWorld's commands and words it has.

    Raises:
        GameError: its commands are not those of any ALFWorld.
    """
    ours, theirs = (dict(_TEMPLATE.findall(text)) for text in (facts.load().grammar, grammar))
    put = theirs.get("PutObject", "").replace("{o}", "{}").replace("{r}", "{}")
    sentence, arrival = _SENTENCE.search(grammar), _ARRIVAL.search(grammar)
    for action in ("PutObject", "PutEmptyReceptacleObjectinReceptacle"):
        ours.pop(action)
        theirs.pop(action, None)
    helps = "help" in theirs
    if not helps:
        ours.pop("help")
    if sentence is None or arrival is None or ours != theirs or put not in (PUT, OLD_PUT):
        odd = sorted({name for name, _ in set(ours.items()) ^ set(theirs.items())})
        raise GameError(
            "its grammar is none of ALFWorld's: it needs 'Your task is to: ...', 'You arrive at "
            f"...' and ALFWorld's commands ({', '.join(odd)[:200] or put[:80]} differ)"
        )
    return _Wording(sentence[1], put, helps, arrival[1] == "lend")


def _items(
    found: Mapping[str, list[list[str]]], furniture: list[str], named: Mapping[str, str]
) -> tuple[Item, ...]:
    kinds = one(found["objectType"], "types")
    homes = one(found["inReceptacle"], "receptacles, which the engine does not play")
    ids = sorted(kinds, key=naming.order)
    if lost := (set(homes.values()) - set(furniture)) | (set(homes) - set(kinds)):
        raise GameError(f"an object is in a receptacle, but {min(lost)[:80]!r} has no type")
    spots: dict[str, set[Pose]] = defaultdict(set)
    for name, where in found["objectAtLocation"]:
        spots[name].add(pose_of(where))

    def words(facts_named: Mapping[str, str], name: str) -> frozenset[str]:
        return frozenset(word for fact, word in facts_named.items() if [name] in found[fact])

    inside: dict[str, list[int]] = defaultdict(list)
    for inner, outer in sorted(found["inReceptacleObject"], key=lambda row: naming.order(row[0])):
        if inner in kinds:
            inside[outer].append(ids.index(inner))
    return tuple(
        Item(
            name=named[name],
            kind=kind_of(kinds[name]),
            home=furniture.index(homes[name]) if name in homes else None,
            can=words(CAN, name),
            states=words(STATED, name),
            spots=frozenset(spots[name]),
            inside=tuple(inside[name]),
            id=name,
        )
        for name in ids
    )


def _locations(found: Mapping[str, list[list[str]]]) -> dict[Pose, str]:
    """The names of all locations, "loc 7"."""
    facts_at = ("atLocation", "receptacleAtLocation", "objectAtLocation")
    ids = {where for fact in facts_at for _, where in found[fact]}
    return {pose_of(where): name for where, name in naming.names(ids).items()}


def read(data: Any, scene: int = 0) -> Game:
    """The game that the contents of a `game.tw-pddl` describe.

    Args:
        data: the JSON value.
        scene: number of its scene, 0 if it is not known.

    Raises:
        GameError: it is damaged, no text game of the six task types, or its goal cannot be met.
    """
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), str) for key in ("grammar", "pddl_problem")
    ):
        raise GameError("it must be a JSON object with the texts 'grammar' and 'pddl_problem'")
    wording = _wording(data["grammar"])
    trees = parse(data["pddl_problem"])
    if len(trees) != 1 or not isinstance(trees[0], list):
        raise GameError("its 'pddl_problem' must be one PDDL definition")
    found = facts_of(section(trees[0], ":init"))
    kinds = one(found["receptacleType"], "types")
    poses = one(found["receptacleAtLocation"], "locations")
    furniture = sorted(kinds, key=naming.order)
    if not furniture or set(poses) != set(kinds) or len(found["atLocation"]) != 1:
        raise GameError("every receptacle must have a type and a location, the agent one location")
    things = {name for fact in ("objectType", "objectAtLocation") for name, _ in found[fact]}
    if len(things) + len(furniture) > MAX_THINGS:
        raise GameError(f"it has more than {MAX_THINGS} receptacles and objects")
    named = naming.names([*furniture, *things])
    openable, opened = ({name for (name,) in found[fact]} for fact in ("openable", "opened"))
    holds: dict[str, set[str]] = defaultdict(set)
    for home, kind in found["canContain"]:
        holds[kind_of(home)].add(kind_of(kind))
    game = Game(
        scene=scene,
        room=room_of(scene),
        task=_task(section(trees[0], ":goal")),
        sentence=wording.sentence,
        receptacles=tuple(
            Receptacle(
                name=named[name],
                kind=kind_of(kinds[name]),
                pose=pose_of(poses[name]),
                openable=name in openable,
                open=name in openable and name in opened,
                id=name,
            )
            for name in furniture
        ),
        objects=_items(found, furniture, named),
        start=pose_of(found["atLocation"][0][1]),
        holds={home: frozenset(kinds) for home, kinds in holds.items()},
        put=wording.put,
        help=wording.help,
        locations=_locations(found) if wording.arrives_at_locations else {},
    )
    _check_goal(game)
    return game


def load(path: Path) -> Game:
    """Read a `game.tw-pddl`; its scene is taken from the name of its folder, as ALFWorld writes it.

    Raises:
        GameError: the file is missing, damaged, or no text game of the six task types.
    """
    match = _SCENE.search(path.resolve().parent.as_posix())
    scene = int(match[1]) if match else 0
    try:
        if path.stat().st_size > MAX_BYTES:
            raise GameError(f"it is larger than {MAX_BYTES} bytes")
        return read(json.loads(path.read_text(encoding="utf-8")), scene)
    except (OSError, ValueError, RecursionError) as error:  # GameError is a ValueError
        raise GameError(f"cannot play {path}: {error}") from error


@functools.cache  # each environment of a run asks again, and thousands of files are read
def find(path: Path, task: str | None = None) -> tuple[Path, ...]:
    """The games at a path, in order: those that ALFWorld would play. Found once in a process.

    Left out are movable receptacles, sliced objects, and games that are not marked as solvable.

    Args:
        path: a `game.tw-pddl`, or a folder of them.
        task: only games of this type of `TASKS`, by the names of their folders.

    Raises:
        GameError: there are none.
    """
    found = [path] if path.is_file() else sorted(path.rglob(GAME))
    playable = tuple(
        file
        for file in found
        if not re.search("movable|Sliced", "/".join(file.parts[-3:]))
        and (task is None or file.parent.parent.name.startswith(f"{task}-"))
        and _SOLVABLE.search(file.read_bytes())
    )
    if not playable:
        raise GameError(
            f"no solvable {GAME}{f' of type {task}' if task else ''} at {path} (of {len(found)} there); "
            "give such a file or a folder of them"
        )
    return playable
