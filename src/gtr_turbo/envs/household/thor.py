"""AI2-THOR as a backend: ALFWorld's `AlfredThorEnv`, in a watched process.

Tested with ALFWorld's own classes over a fake simulator; it has not been run against the real one. Frames are the
simulator's; commands, feedback and goal conditions are ALFWorld's. Its commands are guessed from its texts, so an
admissible one may do nothing. There is no expert.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gtr_turbo.envs.contract import ContractError
from gtr_turbo.envs.household.native import Sight
from gtr_turbo.envs.household.worker import Limits, UnplayableError, Worker
from gtr_turbo.envs.household.world import Game

ENGINE = f"{__name__}:Real"
TASK = "traj_data.json"
NEEDS = (
    "backend='thor' needs Linux, an X display with OpenGL (or Xvfb), the Unity build that ai2thor downloads at its "
    "first start, the tasks of `alfworld-download`, and `pip install 'alfworld[full]==0.4.2'`"
)
SCENE = (
    "scene_num",
    "floor_plan",
    "object_poses",
    "object_toggles",
    "dirty_and_empty",
    "init_action",
)
"""What the simulator needs to know of a task's scene."""
NO_LIMIT = 10**9
"""Steps that ALFWorld allows; the environment has a limit of its own."""
_MOVE = re.compile(r"move (.+) to (.+)")
_SENTENCE = re.compile(r"Your task is to: (.+?)\.?\s*$")


def find_tasks(games: str | None, task: str | None) -> list[Path]:
    """The tasks at a path, in order: those that ALFWorld would play.

    Args:
        games: a `traj_data.json`, or a folder of them.
        task: only tasks of this type of `TASKS`, by the names of their folders.

    Raises:
        ContractError: there are none, or no path is given.
    """
    if games is None:
        raise ContractError(
            "Household: backend='thor' plays tasks of ALFRED; give games=FOLDER, with their "
            f"{TASK} (they are downloaded by alfworld-download)"
        )
    path = Path(games)
    found = [path] if path.is_file() else sorted(path.rglob(TASK))
    playable = [
        file
        for file in found
        if not re.search("movable|Sliced", "/".join(file.parts[-3:]))
        and (task is None or file.parent.parent.name.startswith(f"{task}-"))
    ]
    if not playable:
        raise ContractError(
            f"Household: no {TASK}{f' of type {task}' if task else ''} at {path} (of {len(found)} "
            "there); give such a file or a folder of them"
        )
    return playable


class Thor:
    """AI2-THOR in a worker.

    Args:
        tasks: paths of `traj_data.json` files.
        size: height and width of the frames.
        limits: of the worker.
    """

    def __init__(self, tasks: Sequence[Path], size: int, limits: Limits) -> None:
        self.given = tasks
        self.worker = Worker(ENGINE, {"size": size}, limits)

    def begin(
        self, rng: np.random.Generator, game: Game | None = None, number: int | None = None
    ) -> str:
        """Start one of the tasks: that number, or any."""
        if game is not None:
            raise ContractError("Household: backend='thor' plays its own tasks, no given game")
        drawn = int(rng.integers(len(self.given)))
        path = self.given[drawn if number is None else number]
        seed = int(rng.integers(2**31))  # of the choice among ways to say the task
        answer = self.worker.reset(path=str(path.resolve()), seed=seed)
        self.task, self.sentence = str(answer["task"]), str(answer["sentence"])
        return self._take(answer)

    def step(self, command: str) -> str:
        """Play a command."""
        return self._take(self.worker.step(command))

    def _take(self, answer: dict[str, Any]) -> str:
        self.commands = [str(command) for command in answer["commands"]]
        self.won, self.fraction = bool(answer["won"]), float(answer["fraction"])
        self._sight = Sight(*(set(answer[k]) for k in ("objects", "receptacles", "seen")))
        pixels = np.frombuffer(base64.b64decode(answer["frame"]), np.uint8)
        self._frame = pixels.reshape(answer["shape"])
        return str(answer["feedback"])

    def frame(self, size: int, names: bool) -> np.ndarray:
        """The simulator's last frame. It was made for a size, and has no names."""
        return self._frame.copy()

    def sight(self) -> Sight:
        """Names; of objects those that were in view so far."""
        return self._sight

    def shown(self) -> tuple[int, ...]:
        """Nothing is known of what a frame shows."""
        return ()

    def expert(self, *, compact: bool, search: bool = False) -> tuple[str, str] | None:
        """None: ALFWorld's expert for THOR does not know its own commands for putting things down."""
        return None

    def close(self) -> None:
        """End the worker, and with it the simulator."""
        self.worker.close()


def understood(command: str, version: str) -> str:
    """A command in the words of ALFWorld's parser for THOR.

    Up to 0.4 it offers `move X to Y` and knows only `put X in/on Y`; later ones know what they offer.

    Args:
        command: as it is offered.
        version: of ALFWorld, "0.4.2".
    """
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return _MOVE.sub(r"put \1 in/on \2", command) if release < (0, 5) else command


class Real:
    """ALFWorld's `AlfredThorEnv` with its oracle controller; runs in the worker."""

    def __init__(self, size: int) -> None:
        try:
            from alfworld.agents.environment.alfred_thor_env import AlfredThorEnv
        except ImportError as error:
            raise UnplayableError(f"{NEEDS}. Missing: {error}") from error
        self._class, self._size, self._env = AlfredThorEnv, size, None
        self._version = importlib.metadata.version("alfworld")
        self._raised = ""
        threading.excepthook = self._note

    def _note(self, args: Any) -> None:
        self._raised = f"{args.exc_type.__name__}: {args.exc_value}"

    def _open(self, path: Path) -> Any:
        thor: dict[str, Any] = {
            "screen_height": self._size,
            "screen_width": self._size,
            "smooth_nav": False,
        }
        thor |= {"save_frames_to_disk": False, "save_frames_path": ""}
        config = {
            "dataset": {"eval_ood_data_path": str(path.parent), "num_eval_games": -1},
            "env": {
                "task_types": [1, 2, 3, 4, 5, 6],
                "goal_desc_human_anns_prob": 0.0,
                "thor": thor,
            },
            "controller": {"type": "oracle", "load_receps": True, "debug": False},
            "general": {"training_method": "dqn"},
            "rl": {"training": {"max_nb_steps_per_episode": NO_LIMIT}},
        }
        # of the modes, the one that does not ask ALFWorld's expert at every step
        env = self._class(config, train_eval="eval_out_of_distribution")
        try:
            return env.init_env(batch_size=1)
        except AssertionError as error:  # how ai2thor 2.1.0 says that there is no X display
            raise UnplayableError(f"{NEEDS}. AI2-THOR did not start: {error}") from error

    def reset(self, path: str, seed: int) -> dict[str, Any]:
        """Start the task of a `traj_data.json`."""
        task = _read(Path(path))
        random.seed(seed)
        env = self._env = self._env or self._open(Path(path))
        env.json_file_list = [path]
        answer = self._told(env.reset)
        sentence = _SENTENCE.search(answer["feedback"])
        if sentence is None:
            raise UnplayableError(
                f"ALFWorld tells no task in {path}: {answer['feedback'][-200:]!r}"
            )
        return {**answer, "task": task["task_type"], "sentence": sentence[1]}

    def step(self, command: str) -> dict[str, Any]:
        """Play a command."""
        env = self._env
        assert env is not None
        return self._told(lambda: env.step([understood(command, self._version)]))

    def _told(self, play: Callable[[], Any]) -> dict[str, Any]:
        """Play, and say what the environment then shows.

        Raises:
            RuntimeError: an exception ended the environment's thread. It would return the last result once more,
                and then block for ever.
        """
        assert self._env is not None
        thor = self._env.envs[0]
        before = thor.get_results()
        played = play()
        if thor.get_results() is before:
            thor.join(5.0)
            raise RuntimeError(
                f"ALFWorld's thread for THOR died of {self._raised or 'no exception'}"
            )
        infos, controller = played[-1], thor.controller
        shown = np.ascontiguousarray(self._env.get_frames()[0][:, :, ::-1])  # BGR -> RGB
        if shown.shape != (self._size, self._size, 3) or shown.dtype != np.uint8:
            raise RuntimeError(f"a frame of {shown.dtype} {shown.shape}, not uint8 of {self._size}")
        closed = any(
            r["closed"] and r["num_id"] == controller.curr_recep
            for r in controller.receptacles.values()
        )
        return {
            "feedback": str(played[0][0]),
            "commands": sorted({str(command) for command in infos["admissible_commands"][0]}),
            "won": bool(infos["won"][0]),
            "fraction": float(infos["goal_condition_success_rate"][0]),
            "objects": [o["num_id"] for o in controller.objects.values()],
            "receptacles": [r["num_id"] for r in controller.receptacles.values()],
            "seen": [*controller.inventory, *([] if closed else controller.visible_objects)],
            "frame": base64.b64encode(shown.tobytes()).decode(),
            "shape": shown.shape,
        }


def _read(path: Path) -> Any:
    """A task's description, checked for what the simulator needs."""
    try:
        task = json.loads(path.read_text(encoding="utf-8"))
        missing = sorted({"task_type", "pddl_params", "plan", "scene"} - set(task))
        missing += [f"scene.{key}" for key in SCENE if key not in task.get("scene", {})]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UnplayableError(f"cannot read the task {path}: {error}") from error
    if missing:
        raise UnplayableError(
            f"{path} has no {', '.join(missing)}: it is no task for AI2-THOR but of a text game; "
            "the tasks with scenes are those of alfworld-download"
        )
    return task
