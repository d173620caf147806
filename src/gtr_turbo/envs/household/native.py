"""What `Household` needs of an engine behind it, and our own engine as the first of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from gtr_turbo.envs.household import drawing, facts, files
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.oracle import Oracle
from gtr_turbo.envs.household.pddl import GameError
from gtr_turbo.envs.household.world import Game, visible

OTHER, MOST = 31, 31
"""A kind of receptacle that ALFRED's rooms do not have, and the most objects that are counted."""


class Sight(NamedTuple):
    """Names of what is there, and of what can be seen, "egg 2"."""

    objects: set[str]
    """All that are known."""
    receptacles: set[str]
    """All of the room."""
    seen: set[str]
    """Objects in view or in the hand."""


class Backend(Protocol):
    """An engine that plays household games. All but `begin` and `close` speak of the game begun last."""

    sentence: str
    """The task in words, without a full stop."""
    task: str
    """Its type, one of `world.TASKS`."""
    commands: list[str]
    """What is admissible now."""
    won: bool
    """The task is done."""
    fraction: float
    """Share of ALFRED's goal conditions that are met."""

    given: Sequence[Path]
    """Files of games to play; empty if they are generated."""

    def begin(
        self, rng: np.random.Generator, game: Game | None = None, number: int | None = None
    ) -> str:
        """Draw a game, or take the given one or that number of the files; start it; returns the introduction.

        Raises:
            ContractError: the game cannot be played, or its worker failed twice.
        """

    def step(self, command: str) -> str:
        """Play an admissible command and return the feedback.

        Raises:
            WorkerError: a worker failed; the state is that before the command.
        """

    def frame(self, size: int, names: bool) -> np.ndarray:
        """What the agent sees, uint8 (size, size, 3) RGB."""

    def sight(self) -> Sight:
        """What is there."""

    def shown(self) -> tuple[int, ...]:
        """What the frame shows, in numbers below 32; empty if that is not known."""

    def expert(self, *, compact: bool, search: bool = False) -> tuple[str, str] | None:
        """(thoughts, command) of the expert, who knows all or has to search; None if there is none."""

    def close(self) -> None:
        """Free what it holds."""


class Native:
    """Our engine.

    Args:
        task: type of generated games, None for any.
        split: of generated games.
        given: paths of `game.tw-pddl` files to play instead.
    """

    def __init__(self, task: str | None, split: str, given: Sequence[Path]) -> None:
        self._type, self._split, self.given = task, split, given

    def begin(
        self, rng: np.random.Generator, game: Game | None = None, number: int | None = None
    ) -> str:
        """Start a game: the one given, one of the files, or a new one.

        A file that cannot be played is told, and the next one is taken.

        Raises:
            GameError: the game given, or every file, cannot be played.
        """
        if game is not None and (problem := drawing.undrawable(game)):
            raise GameError(f"cannot play the given game: {problem}")
        if game is not None or not self.given:
            return self._start(game or generate(rng, task=self._type, split=self._split), None)
        drawn = int(rng.integers(len(self.given)))
        first = drawn if number is None else number
        for path in (*self.given[first:], *self.given[:first]):
            try:
                game = self._load(path)
            except GameError as error:
                if len(self.given) == 1:
                    raise
                last = error
                warnings.warn(f"Household: {error}; the next game is played", stacklevel=4)
            else:
                return self._start(game, path)
        raise last

    def _load(self, path: Path) -> Game:
        game = files.load(path)
        if problem := drawing.undrawable(game):
            raise GameError(f"cannot play {path}: {problem}")
        met, total = Engine(game).conditions
        if met == total:
            raise GameError(f"cannot play {path}: it is won before the first command")
        return game

    def _start(self, game: Game, path: Path | None) -> str:
        """Start a game, read from `path` if that is given."""
        self.engine = Engine(game)
        self._oracle = Oracle(self.engine)
        self.sentence, self.task = game.sentence, game.task.type
        self._look()
        return self.engine.intro()

    def _look(self) -> None:
        self._oracle.notice()
        met, total = self.engine.conditions
        self.commands, self.won, self.fraction = self.engine.commands, met == total, met / total

    def step(self, command: str) -> str:
        """Play a command."""
        feedback = self.engine.step(command)
        self._look()
        return feedback

    def frame(self, size: int, names: bool) -> np.ndarray:
        """The symbolic frame."""
        return drawing.draw(self.engine.game, self.engine.state, size=size, names=names)

    def sight(self) -> Sight:
        """All names of the game, and what is in view."""
        game, view = self.engine.game, visible(self.engine.game, self.engine.state)
        seen = {game.objects[i].name for place in view.here for i in place.contents}
        if view.held is not None:
            seen.add(game.objects[view.held].name)
        return Sight({item.name for item in game.objects}, {r.name for r in game.receptacles}, seen)

    def shown(self) -> tuple[int, ...]:
        """Kind of the receptacle that is faced (0: none), is it closed, how many objects in it, is one held."""
        view = visible(self.engine.game, self.engine.state)
        held = int(view.held is not None)
        if not view.here:
            return 0, 0, 0, held
        at, kinds = view.here[0], facts.kinds()
        kind = self.engine.game.receptacles[at.receptacle].kind
        number = 1 + kinds.index(kind) if kind in kinds else OTHER
        return number, int(at.closed), min(len(at.contents), MOST), held

    def expert(self, *, compact: bool, search: bool = False) -> tuple[str, str] | None:
        """The expert's reply. Its thoughts claim only what is in view, also if it knows where everything is."""
        advice = self._oracle.advise(search=search)
        return self._oracle.thoughts(advice, compact=compact), advice.command

    def close(self) -> None:
        """Nothing is held."""
