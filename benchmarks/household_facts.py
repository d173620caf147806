"""Write the scene facts of the household games from an installed ALFWorld (MIT).

The layouts name most receptacles of a scene and where to stand for each. What stands in every such scene but
is not in the layouts (stove burners, the coffee machine, holders) is invented here: one of each kind that the
scene has, four burners.

    pip install --no-deps alfworld==0.4.2
    python benchmarks/household_facts.py
"""

from __future__ import annotations

import argparse
import json
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parent.parent / "src" / "gtr_turbo" / "envs" / "household"
STEP = 0.25  # metres between two points of the floor
AT_COUNTER = {"CoffeeMachine": 30, "Toaster": 30, "StoveBurner": 45}
"""Kinds that stand on a counter -> the angle at which the agent looks down at them."""
BASINS = {"Bathtub": "BathtubBasin", "Sink": "SinkBasin"}
BASINS_BACK = {kind: name for name, kind in BASINS.items()}


def kind_and_id(name: str) -> tuple[str, str]:
    """The kind of a receptacle of the layouts and its id; a bathtub's `SinkBasin` is its `BathtubBasin`."""
    parts = name.split("|")
    kind = BASINS.get(parts[0], parts[0])
    return kind, "|".join([*parts[:4], kind] if kind != parts[0] else parts)


def coordinate(value: float) -> str:
    """A coordinate in metres as THOR writes it in ids."""
    return f"{value:+06.2f}"


def invented(kind: str, scene: int, poses: list[list[int]], counter: list[int] | None) -> list[Any]:
    """Receptacles of a kind that the layouts leave out: `[id, x, z, rotation, horizon]` each.

    Args:
        kind: its class.
        scene: number of the scene.
        poses: where one can stand, `[x, z]`.
        counter: the pose of a counter of the scene.
    """
    chance = zlib.crc32(f"{scene}:{kind}".encode())
    x, z = poses[chance % len(poses)]
    pose = [x, z, 90 * (chance // 7 % 4), 45]
    if counter is not None and kind in AT_COUNTER:
        pose = [*counter[:3], AT_COUNTER[kind]]
    count = 4 if kind == "StoveBurner" else 1
    found = []
    for i in range(count):
        place = (pose[0] * STEP + 0.2 * i, 0.95, pose[1] * STEP)
        name = "|".join([BASINS_BACK.get(kind, kind), *map(coordinate, place)])
        found.append([name + (f"|{kind}" if kind in BASINS_BACK else ""), *pose])
    return found


def scene_facts(folder: Path, scene: int, constants: Any) -> dict[str, Any]:
    """One scene: its receptacles with their poses, the object kinds in it, the points of its floor."""
    stem = f"FloorPlan{scene}"
    layout = json.loads((folder / f"{stem}-openable.json").read_text())
    classes = set(json.loads((folder / f"{stem}-objects.json").read_text()))
    points = sorted((np.load(folder / f"{stem}-layout.npy") / STEP).round().astype(int).tolist())
    receptacles, kinds, counter = [], set(), None
    for name, (x, z, rotation, horizon) in sorted(layout.items()):
        kind, new = kind_and_id(name)
        kinds.add(kind)
        pose = [round(x / STEP), round(z / STEP), int(rotation), int(horizon)]
        receptacles.append([new, *pose])
        if kind == "CounterTop" and counter is None:
            counter = pose
    movable = set(constants.MOVABLE_RECEPTACLES)
    for kind in sorted((classes & set(constants.VAL_RECEPTACLE_OBJECTS)) - movable - kinds):
        receptacles += invented(kind, scene, points, counter)
    portable = set().union(*constants.VAL_RECEPTACLE_OBJECTS.values()) | {"DeskLamp"}
    rows: dict[int, list[int]] = {}
    for x, z in points:
        rows.setdefault(z, []).append(x)
    return {
        "receptacles": receptacles,
        "objects": sorted(kind for kind in classes & portable if not kind.endswith("Sliced")),
        "floor": [[z, *xs] for z, xs in sorted(rows.items())],
    }


def derive() -> dict[str, Any]:
    """All facts, as they are written to `facts.json`."""
    from alfworld.gen import constants, goal_library

    names = {"pick_and_place_simple", "pick_two_obj_and_place", "look_at_obj_in_light"}
    names |= {f"pick_{how}_then_place_in_recep" for how in ("clean", "heat", "cool")}
    package = Path(constants.__file__).parent.parent
    folder = package / "gen" / "layouts"
    movable = set(constants.MOVABLE_RECEPTACLES)
    return {
        "source": f"alfworld {metadata.version('alfworld')}",
        "scenes": {n: scene_facts(folder, n, constants) for n in sorted(constants.SCENE_NUMBERS)},
        "held_out": sorted(constants.TEST_SCENE_NUMBERS),
        "rooms": {task: sorted(constants.GOALS_VALID[task]) for task in sorted(names)},
        "holds": {
            kind: sorted(inside)
            for kind, inside in sorted(constants.VAL_RECEPTACLE_OBJECTS.items())
            if kind not in movable
        },
        "can": {
            verb: sorted(constants.VAL_ACTION_OBJECTS[name])
            for verb, name in (
                ("clean", "Cleanable"),
                ("cool", "Coolable"),
                ("heat", "Heatable"),
                ("slice", "Sliceable"),
                ("toggle", "Toggleable"),
            )
        }
        | {"contain": sorted(movable)},
        "openable": sorted(set(constants.OPENABLE_CLASS_LIST) - movable),
        "goals": {task: goal_library.gdict[task]["pddl"] for task in sorted(names)},
        "sentences": {task: goal_library.gdict[task]["templates"] for task in sorted(names)},
        "domain": (package / "data" / "alfred.pddl").read_text(),
        "grammar": (package / "data" / "alfred.twl2").read_text(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT / "facts.json")
    out = parser.parse_args().out
    out.write_text(json.dumps(derive(), separators=(",", ":")) + "\n")
    print(f"{out.name}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
