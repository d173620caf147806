"""The household tasks as a visual-text environment: generated games, or ALFWorld's own files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from gtr_turbo import prompts
from gtr_turbo.envs.contract import AnyText, ContractError, observation_space
from gtr_turbo.envs.household import drawing, facts, files
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.oracle import Oracle
from gtr_turbo.envs.household.world import (
    CLEAN,
    COOL,
    HEAT,
    LIGHT,
    PLACE,
    TWO,
    Game,
    visible,
)

TYPES = {"place": PLACE, "two": TWO, "light": LIGHT, "clean": CLEAN, "heat": HEAT, "cool": COOL}
"""What the option `task` calls ALFRED's task types."""
SPLITS = ("all", "train", "held-out")
ILLEGAL = ("nothing", "random")
WON, INADMISSIBLE, CUT_SHORT = 50.0, -1.0, -3.0
MAX_ACTIONS, MAX_EQUAL, MAX_STEPS = 40, 5, 50
"""More actions than the first, or so many equal ones, end an episode early; the last ends any."""
MAX_SHOWN = 60
"""Characters of an inadmissible action that the history shows."""
_KINDS = sorted(set().union(*(scene.kinds for scene in facts.load().scenes.values())))
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
        task, the past actions and the admissible commands, and no description of the scene.
    Reward: 50 when the task is done, plus the change of the goal-condition fraction (ALFRED's), minus 1 for an
        inadmissible action.
    Episode end: terminated when the task is done. With `early_truncation`, a step that does not do it ends the
        episode with a reward of -3: it is the fifth equal action in a row (terminated: a rule of the task), or
        beyond 40 actions (truncated). Truncated in any case after 50 actions.
    Info: `actions`, `task` (its type), `feedback` (of the text engine), `goal_conditions` (the fraction met),
        `shown` (four numbers that tell what the frame shows); at the end `success` (the task is done).
    Splits: `train` has games in the 96 rooms that ALFWorld trains in, `held-out` in its 24 unseen rooms.

    Args:
        prompt: `full` (published) or `compact`.
        task: `any`, or `place`, `two`, `light`, `clean`, `heat`, `cool`.
        split: `all`, `train` or `held-out`; of generated games only.
        history: how many past actions the prompt shows, at most.
        describe: add the text engine's feedback to the prompt.
        illegal: an inadmissible action plays `nothing`, or a `random` command (published).
        early_truncation: end an episode that repeats itself, or is long.
        games: a `game.tw-pddl` of ALFWorld or a folder of them, to play instead of generated games.
        names: write the names of objects beside their symbols.
        size: height and width of the frame in pixels.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form
    fields = ("thoughts", "action")

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
        games: str | None = None,
        names: bool = True,
        size: int = drawing.SIZE,
        render_mode: str | None = None,
    ) -> None:
        if history < 0 or size < drawing.SIZE:
            raise ContractError(
                f"Household: history={history} must be at least 0, and size={size} at least "
                f"{drawing.SIZE}"
            )
        self.render_mode = render_mode
        self._compact = prompts.check_style(prompt) == "compact"
        self._type = TYPES.get(_one_of("task", task, ("any", *TYPES)))
        self._split = _one_of("split", split, SPLITS)
        self._history, self._describe = history, describe
        self._illegal = _one_of("illegal", illegal, ILLEGAL)
        self._early_truncation = early_truncation
        self._files = files.find(Path(games), self._type) if games is not None else []
        if games is not None and split != "all":
            raise ContractError(
                f"Household: split={split!r} chooses rooms of generated games; give it or games={games!r}"
            )
        self._names, self._size = names, size
        self.observation_space = observation_space(size, size)
        self.action_space = AnyText()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start a game. `options={"game": Game}` sets it."""
        super().reset(seed=seed)
        self.engine = Engine((options or {}).get("game") or self._draw())
        self._oracle = Oracle(self.engine)
        self._past: list[str] = []
        self._feedback = self.engine.intro()
        self._met = self._fraction()
        return self._observation(), self._info()

    def _draw(self) -> Game:
        if self._files:
            return files.load(self._files[self.np_random.integers(len(self._files))])
        return generate(self.np_random, task=self._type, split=self._split)

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Play a command."""
        command = action.strip()
        reward = 0.0
        if command not in self.engine.moves:
            reward = INADMISSIBLE
            command = command[:MAX_SHOWN]
            if self._illegal == "random":
                some = self.engine.commands
                command = some[self.np_random.integers(len(some))]
        self._feedback = self.engine.step(command)
        self._past.append(command)
        before, self._met = self._met, self._fraction()
        success = self.engine.won
        reward += WON * success + self._met - before
        terminated, truncated = success, not success and len(self._past) >= MAX_STEPS
        if self._early_truncation and not success:
            last = self._past[-MAX_EQUAL:]
            terminated = len(last) == MAX_EQUAL and len(set(last)) == 1
            truncated = not terminated and len(self._past) > MAX_ACTIONS
            reward = CUT_SHORT if terminated or truncated else reward
        info = self._info()
        if terminated or truncated:
            info["success"] = success
        return self._observation(), reward, terminated, truncated, info

    def render(self) -> np.ndarray:
        """The frame, uint8 (size, size, 3)."""
        engine = self.engine
        return drawing.draw(engine.game, engine.state, size=self._size, names=self._names)

    def _fraction(self) -> float:
        met, total = self.engine.conditions
        return met / total

    def _observation(self) -> dict[str, Any]:
        commands, past = self.engine.commands, self._past[len(self._past) - self._history :]
        past = past if self._history else []
        told = self._feedback if self._describe else ""
        sentence = self.engine.game.sentence
        if self._compact:
            parts = [f"household: {sentence}", told, f"past: {', '.join(map(repr, past))}"]
            text = "\n".join([*filter(None, parts), f"actions: {', '.join(commands)}"])
        else:
            text = prompts.household(sentence, past, commands, told)
        return {"image": self.render(), "prompt": text}

    def _info(self) -> dict[str, Any]:
        return {
            "actions": self.engine.commands,
            "task": self.engine.game.task.type,
            "feedback": self._feedback,
            "goal_conditions": self._met,
            "shown": self._shown(),
        }

    def _shown(self) -> tuple[int, int, int, int]:
        """What the frame shows, in numbers below 32: kind of receptacle, is it closed, its objects, is one held."""
        view = visible(self.engine.game, self.engine.state)
        held = int(view.held is not None)
        if not view.here:
            return 0, 0, 0, held
        at = view.here[0]
        kind = self.engine.game.receptacles[at.receptacle].kind
        number = 1 + _KINDS.index(kind) if kind in _KINDS else 31
        return number, int(at.closed), min(len(at.contents), 31), held

    def judge(self, reply: Mapping[str, Any]) -> dict[str, bool]:
        """Facts about a reply in this state.

        Returns:
            `perception`: every object that the thoughts name, "egg 2", is in view; absent if they name none.
            `agreement`: the thoughts name all that the action names; absent if it names nothing.
            `admissible`: the action is a command of this state.
            `expert`: it is the expert's.
        """
        game, view = self.engine.game, visible(self.engine.game, self.engine.state)
        items = {item.name for item in game.objects}
        known = items | {receptacle.name for receptacle in game.receptacles}
        action = str(reply.get("action")).strip()
        thought_of = known & set(_NAMED.findall(str(reply.get("thoughts"))[:4000].lower()))
        acted_on = known & set(_NAMED.findall(action[:200]))
        seen = {game.objects[i].name for place in view.here for i in place.contents}
        if view.held is not None:
            seen.add(game.objects[view.held].name)
        facts = {
            "admissible": action in self.engine.moves,
            "expert": action == self._oracle.advise().command,
        }
        if thought_of & items:
            facts["perception"] = thought_of & items <= seen
        if acted_on:
            facts["agreement"] = acted_on <= thought_of
        return facts

    def demonstrate(self, rng: np.random.Generator) -> dict[str, Any]:
        """The expert's reply. It knows where everything is, but its thoughts claim only what is in view."""
        advice = self._oracle.advise()
        return {
            "thoughts": self._oracle.thoughts(advice, compact=self._compact),
            "action": advice.command,
        }
