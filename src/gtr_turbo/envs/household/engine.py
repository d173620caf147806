"""The rules of the household games: legal commands, feedback, the goal. As ALFWorld's text engine, quirks and all.

ALFWorld (arXiv 2010.03768) plays a PDDL domain through TextWorld. What that yields, and what is kept here though
it may surprise:

* only receptacles here and the object in the hand can be examined; no receptacle here can be gone to;
* heating and cooling work with the appliance closed, slicing reaches into closed receptacles;
* a lamp can be used without holding anything, and stays on when it is used again;
* `look` in the middle of the room sees nothing, elsewhere only what was once taken from another receptacle here;
* every receptacle holds any number of objects.

`benchmarks/household.py` compares every word with the real engine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gtr_turbo.envs.household.world import (
    CLEAN,
    COOL,
    HEAT,
    LIGHT,
    TWO,
    Game,
    Pose,
    State,
)

APPLIANCES = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}
"""Verb -> kind of the receptacle it is done with."""
TREATMENTS = {CLEAN: "clean", HEAT: "heat", COOL: "cool"}
"""Task type -> verb."""
KNIVES = ("Knife", "ButterKnife")
NOTHING = "Nothing happens."
WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  {put}  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""


class Move(NamedTuple):
    """What a command does: a verb, and the numbers of an object and of a receptacle, -1 for none.

    `slice` has no receptacle; its knife is the object in the hand.
    """

    verb: str
    object: int = -1
    receptacle: int = -1


def listed(names: Iterable[str]) -> str:
    """Names as the text engine lists them: `a egg 2, a mug 1, and a pan 1`; `nothing` for none."""
    found = list(names)
    if not found:
        return "nothing"
    return ", ".join(found[:-1]) + ", and " + found[-1] if len(found) > 1 else found[0]


def beginning(game: Game) -> State:
    """The state in which a game begins."""
    state = State(
        at=next((i for i, r in enumerate(game.receptacles) if r.pose == game.start), None),
        places=[item.home for item in game.objects],
        opened={i for i, r in enumerate(game.receptacles) if r.open},
    )
    for i, item in enumerate(game.objects):
        state.spots |= {(i, pose) for pose in item.spots}
        for name in item.states:
            getattr(state, name).add(i)
    return state


class Engine:
    """A game that is being played. `step` plays a command; `state` may be read by anyone."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.state = beginning(game)
        self._at: dict[Pose, tuple[int, ...]] = {}
        for number, receptacle in enumerate(game.receptacles):
            self._at[receptacle.pose] = (*self._at.get(receptacle.pose, ()), number)
        self._standing: dict[Pose, dict[str, Move]] = {}
        self._moves: dict[str, Move] | None = None

    # -- what can be done ----------------------------------------------------------------------

    @property
    def pose(self) -> Pose:
        """Where the agent stands."""
        at = self.state.at
        return self.game.start if at is None else self.game.receptacles[at].pose

    @property
    def here(self) -> tuple[int, ...]:
        """Receptacles within reach."""
        return self._at.get(self.pose, ())

    def closed(self, receptacle: int) -> bool:
        """True if it must be opened first."""
        return self.game.receptacles[receptacle].openable and receptacle not in self.state.opened

    @property
    def moves(self) -> dict[str, Move]:
        """The legal commands, and what each does."""
        if self._moves is None:
            moves = dict(self._always(self.pose))
            for receptacle in self.here:
                self._add_at(receptacle, moves)
            if self.state.held is not None:
                self._add_held(self.state.held, moves)
            self._moves = moves
        return self._moves

    @property
    def commands(self) -> list[str]:
        """The legal commands in alphabetical order, as ALFWorld lists them."""
        return sorted(self.moves)

    def _always(self, pose: Pose) -> dict[str, Move]:
        """Commands that depend on nothing but where the agent stands."""
        if pose not in self._standing:
            moves = {verb: Move(verb) for verb in ("look", "inventory", "help")}
            if not self.game.help:
                del moves["help"]
            for number, receptacle in enumerate(self.game.receptacles):
                verb = "examine" if receptacle.pose == pose else "go"
                said = "examine" if verb == "examine" else "go to"
                moves[f"{said} {receptacle.name}"] = Move(verb, receptacle=number)
            self._standing[pose] = moves
        return self._standing[pose]

    def _add_at(self, number: int, moves: dict[str, Move]) -> None:
        game, held = self.game, self.state.held
        receptacle, closed = game.receptacles[number], self.closed(number)
        if receptacle.openable:
            verb = "open" if closed else "close"
            moves[f"{verb} {receptacle.name}"] = Move(verb, receptacle=number)
        for i, place in enumerate(self.state.places):
            if place != number:
                continue
            item = game.objects[i]
            if "toggle" in item.can:
                moves[f"use {item.name}"] = Move("use", i, number)
            if held is None and not closed and "pickup" in item.can:
                moves[f"take {item.name} from {receptacle.name}"] = Move("take", i, number)
        if held is None:
            return
        item = game.objects[held]
        if not closed and item.kind in game.holds.get(receptacle.kind, ()):
            moves[game.put.format(item.name, receptacle.name)] = Move("put", held, number)
        for verb, kind in APPLIANCES.items():
            if receptacle.kind == kind and verb in item.can:
                moves[f"{verb} {item.name} with {receptacle.name}"] = Move(verb, held, number)

    def _add_held(self, held: int, moves: dict[str, Move]) -> None:
        item, pose = self.game.objects[held], self.pose
        moves[f"examine {item.name}"] = Move("examine", held)
        if item.kind in KNIVES:
            for i, spot in self.state.spots:
                other = self.game.objects[i]
                if spot == pose and "slice" in other.can:
                    moves[f"slice {other.name} with {item.name}"] = Move("slice", i)

    # -- playing -------------------------------------------------------------------------------

    def step(self, command: str) -> str:
        """Play a command, exactly as listed, and return the feedback. Any other string changes nothing."""
        move = self.moves.get(command)
        if move is None:
            return NOTHING
        return self.play(move)

    def play(self, move: Move) -> str:
        """Play a legal move and return the feedback."""
        self._apply(move)
        return self._feedback(move)

    def _apply(self, move: Move) -> None:
        state, (verb, item, receptacle) = self.state, move
        if verb == "go":
            state.at = receptacle
        elif verb == "open":
            state.opened.add(receptacle)
        elif verb == "close":
            state.opened.discard(receptacle)
        elif verb == "take":
            state.places[item], state.held = None, item
            state.spots.discard((item, self.pose))
            state.left.add((item, receptacle))
        elif verb == "put":
            state.places[item], state.held = receptacle, None
            state.spots.add((item, self.pose))
            state.left.discard((item, receptacle))
        else:
            self._change(verb, item)
        if verb not in ("look", "inventory", "help", "examine"):
            self._moves = None

    def _change(self, verb: str, item: int) -> None:
        state = self.state
        if verb == "clean":
            state.clean.add(item)
        elif verb == "heat":
            state.hot.add(item)
            state.cool.discard(item)
        elif verb == "cool":
            state.cool.add(item)
            state.hot.discard(item)
        elif verb == "use":
            state.on.add(item)
        elif verb == "slice":
            state.sliced.add(item)

    # -- what is told --------------------------------------------------------------------------

    def intro(self) -> str:
        """What ALFWorld tells when a game begins: the room and the task."""
        room = self.look()
        if self.state.at is None:
            names = listed(f"a {r.name}" for r in self.game.receptacles)
            room = room.removesuffix("nothing.") + f"{names}."
        return f"{WELCOME}\n\n{room}\n\nYour task is to: {self.game.sentence}."

    def look(self) -> str:
        """The feedback of `look`."""
        here, pose = self.here, self.pose
        if not here:
            return "You are in the middle of a room. Looking quickly around you, you see nothing."
        state = self.state
        beside = (
            f"a {self.game.objects[i].name}"
            for i in sorted(i for i, spot in state.spots if spot == pose)
            for r in here
            if (i, r) in state.left
        )
        names = listed(self.game.receptacles[r].name for r in here)
        return f"You are facing the {names}. Next to it, you see {listed(beside)}."

    def _feedback(self, move: Move) -> str:
        verb, i, r = move
        item = self.game.objects[i].name if i >= 0 else ""
        place = self.game.receptacles[r].name if r >= 0 else ""
        if verb == "go":
            arrived = self.game.locations.get(self.pose, place)
            return f"You arrive at {arrived}. {self._examined(r)}"
        if verb == "open":
            return f"You open the {place}. {self._examined(r)}"
        if verb == "examine":
            return self._examined(r) if r >= 0 else self._property(i)
        if verb == "look":
            return self.look()
        if verb == "inventory":
            held = self.state.held
            if held is None:
                return "You are not carrying anything."
            return f"You are carrying: a {self.game.objects[held].name}."
        if verb == "help":
            put = self.game.put.format("(object)", "(receptacle):")
            return HELP.replace("{put}", put)
        if verb == "slice":
            knife = self.game.objects[self.state.held or 0].name
            return f"You sliced the {item} with the {knife}."
        return {
            "close": f"You close the {place}.",
            "take": f"You pick up the {item} from the {place}.",
            "put": f"You {self.game.put.format('the ' + item, 'the ' + place)}.",
            "use": f"You turn on the {item}.",
        }.get(verb) or f"You {verb} the {item} using the {place}."

    def _examined(self, number: int) -> str:
        receptacle = self.game.receptacles[number]
        if self.closed(number):
            return f"The {receptacle.name} is closed."
        inside = listed(
            f"a {self.game.objects[i].name}"
            for i, place in enumerate(self.state.places)
            if place == number
        )
        if receptacle.openable:
            return f"The {receptacle.name} is open. In it, you see {inside}."
        return f"On the {receptacle.name}, you see {inside}."

    def _property(self, number: int) -> str:
        """What examining the object in the hand tells. A vessel never tells its temperature."""
        item, state = self.game.objects[number], self.state
        if "contain" in item.can:
            inside = listed(f"a {self.game.objects[i].name}" for i in item.inside)
            return f"This is a normal {item.name}. In it, you see {inside}."
        warmth = "hot" if number in state.hot else "cool" if number in state.cool else ""
        clean = "clean" if number in state.clean else ""
        cut = "sliced" if number in state.sliced else ""
        if warmth == "cool" and not clean and not cut:
            warmth = "cold"
        states = " and ".join(word for word in (warmth, clean) if word)
        words = " ".join(word for word in (states, cut) if word)
        if words:
            return f"This is a {words} {item.name}."
        if number in state.on:
            return f"This {item.name} is on."
        return f"There's nothing special about {item.name}."

    # -- the goal ------------------------------------------------------------------------------

    @property
    def conditions(self) -> tuple[int, int]:
        """(met, all) goal conditions, counted as ALFRED does; all are met exactly when the game is won.

        Place: 1. Two: the wanted objects in the fullest receptacle, at most 2. Light: the object is held, a lamp
        here is on. Clean, heat, cool: one is in place, one is treated, one is both.
        """
        game, state, task = self.game, self.state, self.game.task
        wanted = [i for i, item in enumerate(game.objects) if item.kind == task.object]
        if task.type == LIGHT:
            lit = any(
                game.objects[i].kind == task.lamp and state.places[i] in self.here for i in state.on
            )
            return (state.held in wanted) + lit, 2
        placed = [
            (i, place)
            for i in wanted
            if (place := state.places[i]) is not None
            and game.receptacles[place].kind == task.receptacle
        ]
        if task.type == TWO:
            rooms = [place for _, place in placed]
            return min(2, max(map(rooms.count, rooms), default=0)), 2
        if task.type not in TREATMENTS:
            return int(bool(placed)), 1
        treated = {CLEAN: state.clean, HEAT: state.hot, COOL: state.cool}[task.type]
        both = any(i in treated for i, _ in placed)
        return bool(placed) + any(i in treated for i in wanted) + both, 3

    @property
    def won(self) -> bool:
        """True while the task is done."""
        met, total = self.conditions
        return met == total
