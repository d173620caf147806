"""The household tasks as a visual-text environment: generated games, or ALFWorld's own files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from gtr_turbo import prompts
from gtr_turbo.envs.contract import AnyText, ContractError, Tool, observation_space
from gtr_turbo.envs.household import advisor, drawing, files
from gtr_turbo.envs.household.engine import NOTHING, Engine
from gtr_turbo.envs.household.generator import SPLITS
from gtr_turbo.envs.household.native import Backend, Native
from gtr_turbo.envs.household.textworld import TextWorld
from gtr_turbo.envs.household.thor import Thor, find_tasks
from gtr_turbo.envs.household.worker import Limits, WorkerError
from gtr_turbo.envs.household.world import TYPES, Game

BACKENDS = ("native", "textworld", "thor")
ILLEGAL = ("nothing", "random")
EXPERTS = ("oracle", "search")
WON, INADMISSIBLE, CUT_SHORT = 50.0, -1.0, -3.0
MAX_ACTIONS, MAX_EQUAL, MAX_STEPS = 40, 5, 50
"""More actions than the first, or so many equal ones, end an episode early; the last ends any."""
MAX_SHOWN = 60
"""Characters of an inadmissible action that the history shows."""
_NAMED = re.compile(r"\b[a-z]{2,20} \d{1,3}\b")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ContractError(f"Household: {name}={value!r} is not one of {', '.join(known)}")
    return value


class HouseholdEnv(gymnasium.Env[dict[str, Any], str]):
    """Do a household task by text commands, seeing what is in front of the agent.

    Description: ALFWorld's text games (arXiv 2010.03768) in the 120 rooms of ALFRED. The six task types are:
        put an object somewhere; put two there; examine one under a lamp; clean, heat or cool one and put it
        there. Every generated game can be won within 12 actions by one who knows where everything is.
    Action: one of the admissible commands, letter by letter; blanks around it do not count. Any other string
        changes nothing.
    Observation: a symbolic rendering of the state, not a frame of AI2-THOR: the room in the beginning, later the
        receptacle the agent stands at, with its contents unless it is closed, and the hand. The prompt has the
        task, the past actions and the admissible commands, and no description of the scene. With the backend
        `thor` the image is the simulator's.
    Reward: 50 when the task is done, plus the change of the goal-condition fraction (ALFRED's), minus 1 for an
        inadmissible action.
    Episode end: terminated when the task is done. With `early_truncation`, a step that does not do the task ends
        the episode with a reward of -3: it is the fifth equal action in a row (terminated: a rule of the task), or
        beyond 40 actions (truncated). Truncated in any case after 50 actions. Truncated with a reward of 0 when
        the worker of another backend than `native` failed.
    Info: `actions`, `task` (its type), `feedback` (of the text engine), `goal_conditions` (the fraction met),
        `shown` (numbers that tell what the frame shows); at the end `success` (the task is done), and `fault` (why
        a worker failed) if it was that.
    Splits: `train` has games in the 96 rooms that ALFWorld trains in, `held-out` in its 24 unseen rooms.

    Args:
        prompt: `full` (published) or `compact`.
        task: `any`, or `place`, `two`, `light`, `clean`, `heat`, `cool`.
        split: `all`, `train` or `held-out`; if `games` has splits, one of those.
        history: how many past actions the prompt shows, at most.
        describe: add the text engine's feedback to the prompt.
        illegal: an inadmissible action plays `nothing`, or a `random` command (published).
        early_truncation: end an episode that repeats itself, or is long.
        games: a `game.tw-pddl` of ALFWorld or a folder of them, to play instead of generated games; for `thor`
            a `traj_data.json` or a folder of them. Or such a path for each split, under names of your own:
            `{"train": "json_2.1.1/train", "valid_unseen": "json_2.1.1/valid_unseen"}`.
        backend: `native`: our engine. `textworld`: ALFWorld's text engine. `thor`: AI2-THOR through ALFWorld.
        limits: of the worker of the last two, see `worker.Limits`; `{"step": 30}`.
        names: write the names of objects beside their symbols.
        size: height and width of the frame in pixels.
        expert: who demonstrates: an `oracle` that knows where everything is, or one that has to `search`, looking
            into receptacles that it has not seen: by name, the next after the one here, and first those that need
            not be opened. An agent can imitate the second only.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form
    fields = ("thoughts", "action")
    tools: tuple[Tool, ...] = (advisor.TOOL,)

    def __init__(
        self,
        *,
        prompt: str = "full",
        task: str = "any",
        split: str = "all",
        history: int = MAX_STEPS,
        describe: bool = False,
        illegal: str = "nothing",
        early_truncation: bool = True,
        games: str | Mapping[str, str] | None = None,
        backend: str = "native",
        limits: Mapping[str, float] | None = None,
        names: bool = True,
        size: int = drawing.SIZE,
        expert: str = "oracle",
        render_mode: str | None = None,
    ) -> None:
        for name, value, kind in (
            ("history", history, int),
            ("size", size, int),
            ("describe", describe, bool),
            ("early_truncation", early_truncation, bool),
            ("names", names, bool),
        ):
            if type(value) is not kind:
                raise ContractError(f"Household: {name}={value!r} must be {kind.__name__}")
        if history < 0 or size < drawing.SIZE:
            raise ContractError(
                f"Household: history={history} must be at least 0, and size={size} at least "
                f"{drawing.SIZE}"
            )
        self.render_mode = render_mode
        self._compact = prompts.check_style(prompt) == "compact"
        self._type = TYPES.get(_one_of("task", task, ("any", *TYPES)))
        self._history, self._describe = history, describe
        self._illegal = _one_of("illegal", illegal, ILLEGAL)
        self._early_truncation = early_truncation
        path: Any = games
        if isinstance(games, Mapping) and games:
            path = games[_one_of("split", split, tuple(games))]
        elif games is not None and split != "all":
            raise ContractError(
                f"Household: split={split!r} chooses rooms of generated games; give it or games={games!r}, or "
                "games={SPLIT: PATH, ...}"
            )
        if games is None:
            _one_of("split", split, SPLITS)
        elif not isinstance(path, str):
            raise ContractError(
                f"Household: games={path!r:.80} must be a path, or a path for each split"
            )
        self._split = split
        self._names, self._size = names, size
        self._searches = _one_of("expert", expert, EXPERTS) == "search"
        self.observation_space = observation_space(size, size)
        self.action_space = AnyText()
        self._backend = self._make(_one_of("backend", backend, BACKENDS), path, limits)

    def _make(self, backend: str, games: str | None, limits: Mapping[str, float] | None) -> Backend:
        if backend == "thor":
            tasks = find_tasks(games, self._type)
            return Thor(tasks, self._size, Limits.of(limits or {}))
        given = files.find(Path(games).absolute(), self._type) if games is not None else ()
        if backend == "textworld":
            return TextWorld(self._type, self._split, given, Limits.of(limits or {}))
        if limits is not None:
            raise ContractError(
                f"Household: limits={dict(limits)!r} are of a worker, and backend='native' has none"
            )
        return Native(self._type, self._split, given)

    @property
    def numbered(self) -> int:
        """How many files of games there are; 0 if games are generated."""
        return len(self._backend.given)

    @property
    def same_frames(self) -> bool:
        """False with a simulator, whose frames differ in a pixel here and there."""
        return not isinstance(self._backend, Thor)

    @property
    def engine(self) -> Engine:
        """Our engine in the state of the game.

        Raises:
            ContractError: the backend is `thor`, which plays without it.
        """
        if not isinstance(self._backend, Native):
            raise ContractError("Household: backend='thor' plays without our engine")
        return self._backend.engine

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start a game. `options={"game": Game}` sets it, `{"number": 3}` takes that one of `games`, from 0.

        Raises:
            ContractError: it is no `Game`, or there is none, or it cannot be played.
        """
        super().reset(seed=seed)
        game, number = (options or {}).get("game"), (options or {}).get("number")
        if game is not None and not isinstance(game, Game):
            raise ContractError(f"Household: options['game']={game!r:.80} must be a Game")
        if number is not None and number not in range(self.numbered):
            raise ContractError(
                f"Household: options['number']={number!r:.80} is none of the {self.numbered} files of games"
            )
        self._feedback = self._backend.begin(self.np_random, game, number)
        self._past: list[str] = []
        self._met = self._backend.fraction
        return self._observation(), self._info()

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Play a command."""
        command = action.strip()
        reward = 0.0
        if command not in self._backend.commands:
            reward = INADMISSIBLE
            command = command[:MAX_SHOWN]
            if self._illegal == "random":
                some = self._backend.commands
                command = some[self.np_random.integers(len(some))]
        self._past.append(command)
        self._feedback = NOTHING
        if command in self._backend.commands:
            try:
                self._feedback = self._backend.step(command)
            except WorkerError as fault:
                self._past.pop()  # it was not played
                return self._give_up(fault)
        before, self._met = self._met, self._backend.fraction
        success = self._backend.won
        reward += WON * success + self._met - before
        terminated = success
        truncated = not terminated and len(self._past) >= MAX_STEPS
        if self._early_truncation and not terminated:
            last = self._past[-MAX_EQUAL:]
            terminated = len(last) == MAX_EQUAL and len(set(last)) == 1
            truncated = not terminated and len(self._past) > MAX_ACTIONS
            reward = CUT_SHORT if terminated or truncated else reward
        info = {**self._info(), "success": success}  # every turn: a limit of Gymnasium's may end it
        return self._observation(), reward, terminated, truncated, info

    def _give_up(
        self, fault: WorkerError
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """End an episode whose worker failed, as no fault of the agent's."""
        warnings.warn(f"Household: {fault}; the episode is truncated", stacklevel=3)
        info = {**self._info(), "success": False, "fault": str(fault)}
        return self._observation(), 0.0, False, True, info

    def render(self) -> np.ndarray:
        """The frame, uint8 (size, size, 3)."""
        return self._backend.frame(self._size, self._names)

    def close(self) -> None:
        """End the worker, if there is one."""
        self._backend.close()

    def _observation(self) -> dict[str, Any]:
        commands = self._backend.commands
        past = self._past[-self._history :] if self._history else []
        told = self._feedback if self._describe else ""
        sentence = self._backend.sentence
        if self._compact:
            parts = [f"household: {sentence}", told, f"past: {', '.join(map(repr, past))}"]
            text = "\n".join([*filter(None, parts), f"actions: {', '.join(commands)}"])
        else:
            text = prompts.household(sentence, past, commands, told)
        return {"image": self.render(), "prompt": text}

    def _info(self) -> dict[str, Any]:
        return {
            "actions": self._backend.commands,
            "task": self._backend.task,
            "feedback": self._feedback,
            "goal_conditions": self._met,
            "shown": self._backend.shown(),
        }

    def judge(self, reply: Mapping[str, Any]) -> dict[str, bool]:
        """Facts about a reply in this state.

        Returns:
            `perception`: every object that the thoughts name, "egg 2", is in view; absent if they name none.
            `agreement`: the thoughts name all that the action names; absent if it names nothing.
            `admissible`: the action is a command of this state.
            `expert`: it is the oracle's; absent if the backend has none.
        """
        sight = self._backend.sight()
        known = sight.objects | sight.receptacles
        action = str(reply.get("action")).strip()
        thought_of = known & set(_NAMED.findall(str(reply.get("thoughts"))[:4000].lower()))
        acted_on = known & set(_NAMED.findall(action[:200]))
        facts = {"admissible": action in self._backend.commands}
        if (advised := self._backend.expert(compact=True)) is not None:
            facts["expert"] = action == advised[1]
        if named := thought_of & sight.objects:
            facts["perception"] = named <= sight.seen
        if acted_on:
            facts["agreement"] = acted_on <= thought_of
        return facts

    def demonstrate(self, rng: np.random.Generator) -> dict[str, Any]:
        """The expert's reply; its thoughts claim only what is in view, even the oracle's.

        Raises:
            ContractError: the backend has no expert.
        """
        reply = self._backend.expert(compact=self._compact, search=self._searches)
        if reply is None:
            raise ContractError(
                "Household: backend='thor' has no expert; make demonstrations with backend='native'"
            )
        return dict(zip(self.fields, reply, strict=True))
