"""A fake simulator under ALFWorld's own classes: `AlfredThorEnv`, `ThorEnv`, `OracleAgent` and tasks are real.

Replaced are `ai2thor.controller.Controller`, by a room with a few things that answers ALFWorld's actions with
metadata like THOR's, and what cannot be imported here and is not used: OpenCV and the detector. At the shelf it
hangs, at the cart it dies. Runs in the worker: import it there before ALFWorld.
"""

import json
import sys
import time
import types

import numpy as np

from gtr_turbo.envs.household import thor

PLACES = {
    "CounterTop|+00.00|+00.90|+01.00": "CounterTop",
    "Fridge|+01.00|+00.00|+01.00": "Fridge",
    "Microwave|+02.00|+00.90|+01.00": "Microwave",
    "Sink|+03.00|+00.90|+01.00|SinkBasin": "SinkBasin",
    "DiningTable|+04.00|+00.90|+01.00": "DiningTable",
    "Desk|+05.00|+00.90|+01.00": "Desk",
    "Shelf|+06.00|+00.90|+01.00": "Shelf",
    "Cart|+07.00|+00.90|+01.00": "Cart",
}
THINGS = {
    "Apple|+00.10|+00.95|+01.00": "CounterTop",
    "Apple|+00.20|+00.95|+01.00": "CounterTop",
    "Mug|+05.10|+00.95|+01.00": "Desk",
    "DeskLamp|+05.20|+00.95|+01.00": "Desk",
}
OPENABLE = ("Fridge", "Microwave")
FAUCET = "Faucet|+03.00|+01.00|+01.10"


class Controller:
    """Answers actions as THOR does, in one room."""

    def __init__(self, **_):
        self.size = (0, 0)

    def start(self, x_display, player_screen_height, player_screen_width):
        self.size = (player_screen_height, player_screen_width)

    def stop(self):
        pass

    def reset(self, scene):
        self.at = 0
        self.opened, self.on, self.held, self.dead = set(), set(), None, False
        kinds = {kind: name for name, kind in PLACES.items()}
        self.where = {name: kinds[kind] for name, kind in THINGS.items()}
        return self.answer(True)

    @property
    def last_event(self):
        if self.dead:
            raise RuntimeError("the simulator is gone")
        return self.event

    def step(self, action):
        return self.answer(getattr(self, f"do_{action['action']}", lambda **_: True)(**action))

    def do_TeleportFull(self, x, **_):  # noqa: N802 - THOR's names
        self.at = int(x)
        kind = list(PLACES.values())[self.at]
        self.dead = kind == "Cart"
        if kind == "Shelf":
            time.sleep(1000)
        return True

    def do_OpenObject(self, objectId, **_):  # noqa: N802, N803
        self.opened.add(objectId)
        return True

    def do_CloseObject(self, objectId, **_):  # noqa: N802, N803
        self.opened.discard(objectId)
        return True

    def do_PickupObject(self, objectId, **_):  # noqa: N802, N803
        if self.held is not None or not self.visible(objectId):
            return False
        self.held, self.where[objectId] = objectId, None
        return True

    def do_PutObject(self, objectId, receptacleObjectId, **_):  # noqa: N802, N803
        if self.held != objectId or not self.reachable(receptacleObjectId):
            return False
        self.held, self.where[objectId] = None, receptacleObjectId
        return True

    def do_ToggleObjectOn(self, objectId, **_):  # noqa: N802, N803
        self.on.add(objectId)
        return True

    def do_ToggleObjectOff(self, objectId, **_):  # noqa: N802, N803
        self.on.discard(objectId)
        return True

    def reachable(self, place):
        shut = PLACES[place] in OPENABLE and place not in self.opened
        return list(PLACES)[self.at] == place and not shut

    def visible(self, name):
        return self.where[name] is not None and self.reachable(self.where[name])

    def answer(self, success):
        objects = [self.about(name, kind, receptacle=True) for name, kind in PLACES.items()]
        objects += [self.about(name, name.split("|")[0], receptacle=False) for name in self.where]
        objects += [self.about(FAUCET, "Faucet", receptacle=False)]
        colors = {(0, 0, i): name for i, name in enumerate(self.where, 1) if self.visible(name)}
        seen = np.zeros((4, 4, 3), np.uint8)
        for i, color in enumerate(colors):
            seen[i] = color
        frame = np.zeros((*self.size, 3), np.uint8)
        frame[:, :] = (200, 10 * self.at, 30)  # red, as THOR's frames are RGB
        held = [] if self.held is None else [self.held]
        self.event = types.SimpleNamespace(
            metadata={
                "objects": objects,
                "inventoryObjects": [
                    {"objectId": name, "objectType": name.split("|")[0]} for name in held
                ],
                "agent": {"position": {"x": float(self.at), "y": 0.9, "z": 0.0}},
                "lastActionSuccess": success,
                "errorMessage": "" if success else "it cannot be done",
            },
            frame=frame,
            instance_segmentation_frame=seen,
            color_to_object_id=colors,
        )
        return self.event

    def about(self, name, kind, receptacle):
        place = self.where.get(name)
        if receptacle:
            visible = list(PLACES)[self.at] == name
        elif name == FAUCET:
            visible = list(PLACES.values())[self.at] == "SinkBasin"
        else:
            visible = self.visible(name)
        inside = [thing for thing, where in self.where.items() if where == name]
        return {
            "objectId": name,
            "objectType": kind,
            "visible": visible,
            "receptacle": receptacle,
            "receptacleObjectIds": inside if receptacle else None,
            "parentReceptacles": [place] if place else None,
            "pickupable": name in THINGS and kind != "DeskLamp",
            "toggleable": kind in ("DeskLamp", "Microwave", "Faucet"),
            "isToggled": name in self.on,
            "isOpen": name in self.opened,
            "dirtyable": False,
            "isDirty": False,
            "position": dict(zip("xyz", map(float, name.split("|")[1:4]), strict=True)),
        }


def install():
    """Put the fakes where ALFWorld imports from."""
    for name in ("ai2thor", "ai2thor.controller", "cv2"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["ai2thor.controller"].Controller = Controller
    for name in ("detector.mrcnn", "controller.mrcnn", "controller.mrcnn_astar"):
        sys.modules[f"alfworld.agents.{name}"] = types.ModuleType(name)
    sys.modules["alfworld.agents.detector.mrcnn"].load_pretrained_model = None
    sys.modules["alfworld.agents.controller.mrcnn"].MaskRCNNAgent = None
    sys.modules["alfworld.agents.controller.mrcnn_astar"].MaskRCNNAStarAgent = None


class Real(thor.Real):
    """The adapter, over the fake simulator."""

    def __init__(self, size):
        install()
        super().__init__(size)


class NoDisplay(Real):
    """As ai2thor 2.1.0 starts where there is no X display."""

    def __init__(self, size):
        super().__init__(size)
        Controller.start = self.fail

    def fail(self, **_):
        raise AssertionError("Invalid DISPLAY :0.0 - cannot find X server with xdpyinfo")


def write_task(root, task, target, parent="", lamp=""):
    """A task folder as `alfworld-download` makes them, with the places in it that ALFWorld would else explore."""
    folder = root / f"{task}-{target}-None-{parent or lamp}-1" / "trial_1"
    folder.mkdir(parents=True)
    params = {"object_target": target, "parent_target": parent, "toggle_target": lamp}
    data = {
        "task_type": task,
        "pddl_params": {**params, "mrecep_target": "", "object_sliced": False},
        "plan": {"high_pddl": [{"planner_action": {"action": "End"}}], "low_actions": []},
        "scene": {
            "scene_num": 1,
            "floor_plan": "FloorPlan1",
            "object_poses": [],
            "object_toggles": [],
            "dirty_and_empty": False,
            "init_action": {"action": "Pass"},
        },
    }
    (folder / "traj_data.json").write_text(json.dumps(data))
    places = {
        name: {
            "object_id": name,
            "object_type": kind,
            "locs": {"action": "TeleportFull", "x": float(i), "y": 0.9, "z": 0.0},
            "num_pixels": 1,
            "num_id": f"{kind.lower()} 1",
            "closed": True if kind in OPENABLE else None,
        }
        for i, (name, kind) in enumerate(PLACES.items())
    }
    (folder / "receps.json").write_text(json.dumps(places))
    return folder / "traj_data.json"
