"""An expert: its next command, and the thought behind it. It knows where everything is, or it searches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gtr_turbo.envs.household.engine import APPLIANCES, TREATMENTS, Engine, Move, listed
from gtr_turbo.envs.household.world import CLEAN, COOL, HEAT, LIGHT, TWO, Game, visible

DONE = {"clean": "clean", "heat": "hot", "cool": "cool"}
"""Verb -> the state it leads to."""


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


class Advice(NamedTuple):
    """What to do next."""

    command: str
    why: str
    """One sentence, which claims nothing of a receptacle that is not in view."""


class Oracle:
    """The expert of one game that is being played."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._game = engine.game
        task = engine.game.task
        self._wanted = [
            i
            for i, item in enumerate(engine.game.objects)
            if item.kind == task.object and "pickup" in item.can
        ]
        self._verb = TREATMENTS.get(task.type, "")
        self._word = task.object.lower()
        self._searched: set[int] = set()
        self._searches = False

    def notice(self, others: Iterable[int] = ()) -> None:
        """Remember what is in view now, and in `others`; a search relies on being told after every command."""
        self._searched.update(others)
        self._searched.update(i for i in self._engine.here if not self._engine.closed(i))

    def advise(self, *, search: bool = False) -> Advice:
        """The next command of a short way to the goal from here; `look` if there is no way.

        Args:
            search: use of the objects' places only those that were noticed, and if none will do, look into a
                receptacle that was not: by their names, the next after the one here, around and around; those
                that need not be opened come first.
        """
        self._searches = search
        held = self._engine.state.held
        if held is not None and held not in self._wanted:
            return self._get_rid(held)
        if self._game.task.type == LIGHT:
            return self._shine(held)
        if held is None:
            return self._fetch()
        if self._verb and held not in self._treated():
            kind = APPLIANCES[self._verb]
            name = self._game.objects[held].name
            why = f"The {name} is not {DONE[self._verb]} yet, so I {self._verb} it."
            return self._use(self._nearest(kind), Move(self._verb, held), why)
        place = self._goal()
        why = f"The {self._state(held)} belongs in the {self._game.task.receptacle.lower()}."
        return self._use(place, Move("put", held), why)

    # -- the steps of a way --------------------------------------------------------------------

    def _use(self, receptacle: int | None, move: Move, why: str) -> Advice:
        """Go to a receptacle, open it if it must be, then make the move there."""
        engine = self._engine
        if receptacle is None:
            return Advice("look", f"{why} I see no way to do it.")
        name = self._game.receptacles[receptacle].name
        if receptacle not in engine.here:
            return Advice(f"go to {name}", f"{why} I go to {name}.")
        if engine.closed(receptacle) and move.verb in ("take", "put"):
            return Advice(f"open {name}", f"{why} The {name} is closed, so I open it.")
        wanted = move._replace(receptacle=receptacle)
        command = next((c for c, m in engine.moves.items() if m == wanted), None)
        if command is None:
            return Advice("look", f"{why} I see no way to do it.")
        return Advice(command, why)

    def _fetch(self) -> Advice:
        """Get one of the wanted objects; those treated first, those in place last."""
        engine, goal = self._engine, self._goal()
        places, treated = engine.state.places, self._treated()

        def cost(i: int) -> tuple[bool, bool, bool]:
            return i not in treated, places[i] == goal, places[i] not in engine.here

        free = [i for i in self._wanted if self._knows(i)]
        if self._game.task.type == TWO:
            free = [i for i in free if places[i] != goal]
        item = min(free, key=cost, default=None)
        if item is not None and self._sees(item):
            why = f"I need the {self._game.objects[item].name}, so I take it."
        elif any(map(self._sees, self._wanted)):
            why = f"I need another {self._word}."
        else:
            why = f"I need {_a(self._word)} and see none."
        if item is None:
            return self._search(why)
        return self._use(places[item], Move("take", item), why)

    def _search(self, why: str) -> Advice:
        """Look into a receptacle whose contents were never seen: one here, or the next of a round."""
        receptacles = self._game.receptacles
        left = [i for i in range(len(receptacles)) if i not in self._searched]
        if not left or not self._searches:
            return Advice("look", f"{why} I see no way to do it.")
        for i in self._engine.here:
            if i in left:
                name = receptacles[i].name
                return Advice(f"open {name}", f"{why} The {name} is closed, so I open it.")

        here = max((receptacles[i].name for i in self._engine.here), default="")

        def order(i: int) -> tuple[bool, bool, str]:
            return receptacles[i].openable, receptacles[i].name <= here, receptacles[i].name

        name = receptacles[min(left, key=order)].name
        return Advice(f"go to {name}", f"{why} I go to {name}.")

    def _shine(self, held: int | None) -> Advice:
        if held is None:
            return self._fetch()
        state, task = self._engine.state, self._game.task
        lamps = [
            i
            for i, item in enumerate(self._game.objects)
            if item.kind == task.lamp and "toggle" in item.can and self._knows(i)
        ]
        lamp = min(lamps, key=lambda i: state.places[i] not in self._engine.here, default=None)
        if lamp is None:
            return self._search(f"I need {_a(task.lamp.lower())} and see none.")
        here = state.places[lamp] in self._engine.here
        name = self._game.objects[lamp].name if here else task.lamp.lower()
        why = f"The {name} must be on to look at the {self._game.objects[held].name}."
        return self._use(state.places[lamp], Move("use", lamp), why)

    def _get_rid(self, held: int) -> Advice:
        """Put away what is not wanted, here if that can be."""
        game, engine = self._game, self._engine
        kind = game.objects[held].kind
        fit = [i for i, r in enumerate(game.receptacles) if kind in game.holds.get(r.kind, ())]
        place = min(
            fit, key=lambda i: (i not in engine.here, game.receptacles[i].openable), default=None
        )
        why = f"The {game.objects[held].name} is not what I need, so I put it away."
        return self._use(place, Move("put", held), why)

    # -- what it knows -------------------------------------------------------------------------

    def _sees(self, item: int) -> bool:
        """True if an object is in a receptacle here that is not closed."""
        place = self._engine.state.places[item]
        return place is not None and place in self._engine.here and not self._engine.closed(place)

    def _knows(self, item: int) -> bool:
        """True if an object lies somewhere, and one who searches has seen it there."""
        place = self._engine.state.places[item]
        return place is not None and (not self._searches or place in self._searched)

    def _treated(self) -> set[int]:
        state = self._engine.state
        return {CLEAN: state.clean, HEAT: state.hot, COOL: state.cool}.get(
            self._game.task.type, set()
        )

    def _nearest(self, kind: str) -> int | None:
        """A receptacle of a kind, here if there is one."""
        found = [i for i, r in enumerate(self._game.receptacles) if r.kind == kind]
        return min(found, key=lambda i: i not in self._engine.here, default=None)

    def _goal(self) -> int | None:
        """The receptacle to fill: that which holds most of the wanted objects known, then one here."""
        kind = self._game.task.receptacle
        places = [self._engine.state.places[i] for i in self._wanted if self._knows(i)]
        found = [i for i, r in enumerate(self._game.receptacles) if r.kind == kind]
        return min(
            found, key=lambda i: (-places.count(i), i not in self._engine.here), default=None
        )

    # -- thoughts ------------------------------------------------------------------------------

    def _state(self, number: int) -> str:
        """The object with what was done to it: "cold clean egg 2"."""
        state = self._engine.state
        words = [
            word
            for word, members in (
                ("hot", state.hot),
                ("cold", state.cool),
                ("clean", state.clean),
                ("sliced", state.sliced),
                ("lit", state.on),
            )
            if number in members
        ]
        return " ".join([*words, self._game.objects[number].name])

    def sight(self, *, compact: bool) -> str:
        """What is in view, in words; the compact form leaves out what is in the receptacles."""
        view = visible(self._game, self._engine.state)
        parts = [] if view.here else ["I am in the middle of the room."]
        for seen in view.here:
            name = self._game.receptacles[seen.receptacle].name
            inside = listed(self._state(i) for i in seen.contents)
            state = ", closed" if seen.closed else "" if compact else f", in or on it: {inside}"
            parts.append(f"I am at the {name}{state}.")
        hand = "nothing" if view.held is None else f"the {self._state(view.held)}"
        return " ".join([*parts, f"I hold {hand}."])

    def thoughts(self, advice: Advice, *, compact: bool) -> str:
        """The thought that leads to an advice: what is seen and held, then why."""
        return f"{self.sight(compact=compact)} {advice.why}"


def solve(game: Game, most: int = 50) -> list[str]:
    """The expert's commands from the beginning to the end, at most `most`."""
    engine = Engine(game)
    commands: list[str] = []
    oracle = Oracle(engine)
    while not engine.won and len(commands) < most:
        commands.append(oracle.advise().command)
        engine.step(commands[-1])
    return commands
