"""A kitchen made by hand: a fridge, a sink and a counter that share a pose, a microwave, a lamp on a desk."""

from gtr_turbo.envs.household.world import PLACE, Game, Item, Pose, Receptacle, Task

START, FRIDGE, SINK, MICROWAVE, DESK = (Pose(x, 0, 90, 30) for x in range(5))
FOOD = {"pickup", "clean", "heat", "cool", "slice"}


def item(name, home, pose, can=FOOD, **more):
    kind = {"desklamp": "DeskLamp", "butterknife": "ButterKnife"}.get(
        name.split()[0], name.split()[0].title()
    )
    return Item(
        name=name, kind=kind, home=home, can=frozenset(can), spots=frozenset({pose}), **more
    )


def receptacle(name, kind, pose, openable=False):
    return Receptacle(name=name, kind=kind, pose=pose, openable=openable)


def kitchen(task=None, sentence="put a egg in countertop", **changes):
    """0 countertop and 3 sinkbasin are at one place; the egg is in the closed fridge, a knife in the sink."""
    game = {
        "scene": 1,
        "room": "Kitchen",
        "task": task or Task(type=PLACE, object="Egg", receptacle="CounterTop"),
        "sentence": sentence,
        "receptacles": (
            receptacle("countertop 1", "CounterTop", SINK),
            receptacle("desk 1", "Desk", DESK),
            receptacle("fridge 1", "Fridge", FRIDGE, openable=True),
            receptacle("microwave 1", "Microwave", MICROWAVE, openable=True),
            receptacle("sinkbasin 1", "SinkBasin", SINK),
        ),
        "objects": (
            item("butterknife 1", 4, SINK, {"pickup", "clean"}),
            item("desklamp 1", 1, DESK, {"toggle"}),
            item("egg 2", 2, FRIDGE),
            item("egg 1", 4, SINK),
            item("mug 1", 0, SINK, {"pickup", "clean", "heat", "contain"}, inside=(0,)),
        ),
        "start": START,
        "holds": {
            kind: frozenset({"Egg", "Mug", "ButterKnife"})
            for kind in ("CounterTop", "SinkBasin", "Desk")
        }
        | {"Fridge": frozenset({"Egg"}), "Microwave": frozenset({"Mug"})},
    }
    return Game(**(game | changes))
