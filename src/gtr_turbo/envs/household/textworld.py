"""ALFWorld's own text engine as a backend: the real rules and words, in a watched process.

Our engine plays the same game beside it. It draws the frames, counts the goal conditions and gives the expert;
whenever the two differ in a word the game stops with `DifferenceError`. ALFWorld is imported in the worker only.
"""

from __future__ import annotations

import copy
import functools
import shutil
import sys
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gtr_turbo.envs.household.files import export
from gtr_turbo.envs.household.native import Native
from gtr_turbo.envs.household.oracle import solve
from gtr_turbo.envs.household.worker import Limits, UnplayableError, Worker
from gtr_turbo.envs.household.world import Game

ENGINE = f"{__name__}:Real"
INSTALL = "pip install 'gtr-turbo[alfworld]'"
PARSED = 50_000
"""Texts whose parse is kept; a game has some hundred."""


class DifferenceError(RuntimeError):
    """The real engine and ours differ in a game: a mistake in one of them, which no episode may hide."""


class TextWorld(Native):
    """The real engine in a worker, and ours beside it."""

    def __init__(self, task: str | None, split: str, given: Sequence[Path], limits: Limits) -> None:
        super().__init__(task, split, given)
        self.worker = Worker(ENGINE, {}, limits)
        self._folder = Path(tempfile.mkdtemp(prefix="household-"))
        self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def _start(self, game: Game, path: Path | None) -> str:
        """Start a game in both engines; one without a file is written to a temporary folder."""
        intro = super()._start(game, path)
        self._name = str(path or f"generated in scene {game.scene}")
        file = path or export(game, self._folder, "game", solve(game))
        try:
            answer = self.worker.reset(path=str(file.resolve()))
        finally:
            if path is None:
                shutil.rmtree(file.parents[1])
        self._compare("the beginning", answer, intro)
        return intro

    def step(self, command: str) -> str:
        """Play a command in both engines."""
        answer = self.worker.step(command)
        feedback = super().step(command)
        self._compare(repr(command), answer, feedback)
        return feedback

    def _compare(self, after: str, answer: dict[str, Any], feedback: str) -> None:
        ours = {"feedback": feedback, "commands": self.commands, "won": self.won}
        for key, mine in ours.items():
            if answer.get(key) != mine:
                self.worker.close()
                raise DifferenceError(
                    f"Household: after {after} of the game {self._name} the {key} of ALFWorld's engine, "
                    f"{answer.get(key)!r}, is not that of ours, {mine!r}. Please report the game; "
                    "leave it out, or use backend: native."
                )

    def close(self) -> None:
        """End the worker and remove the temporary folder."""
        self.worker.close()
        self._finalizer()


class Real:
    """ALFWorld's text engine; runs in the worker. One is used again for every game, as a new one costs memory."""

    def __init__(self) -> None:
        try:
            import textworld
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
            from textworld.envs.pddl import PddlEnv
        except ImportError as error:
            raise UnplayableError(
                f"backend='textworld' needs ALFWorld's text engine ({error}): {INSTALL}"
            ) from error
        remember_parses()
        wanted = textworld.EnvInfos(admissible_commands=True, won=True)
        self._env = AlfredInfos(AlfredDemangler(PddlEnv(wanted)))

    def reset(self, path: str) -> dict[str, Any]:
        """Start the game of a file."""
        arguments = sys.argv[:]  # the planner overwrites them
        try:
            self._env.load(path)
            return self._told(self._env.reset())
        except (
            KeyError
        ) as error:  # what the planner's output lacks when the goal is trivially false
            raise UnplayableError(
                f"ALFWorld's engine cannot solve {path} (KeyError: {error})"
            ) from error
        finally:
            sys.argv[:] = arguments

    def step(self, command: str) -> dict[str, Any]:
        """Play a command."""
        return self._told(self._env.step(command)[0])

    def _told(self, state: Any) -> dict[str, Any]:
        return {
            "feedback": state.feedback,
            "commands": list(state["admissible_commands"]),
            "won": bool(state["won"]),
        }


def remember_parses() -> None:
    """Let TextWorld parse a text of its grammar once; it spends most of a step on parsing the same ones again."""
    from textworld.envs.pddl import textgen

    parse = functools.lru_cache(maxsize=PARSED)(textgen._parse_and_convert)

    def parse_and_convert(*args: Any, **kwargs: Any) -> Any:
        return copy.deepcopy(parse(*args, **kwargs))  # the symbols are changed while they are used

    textgen._parse_and_convert = parse_and_convert
