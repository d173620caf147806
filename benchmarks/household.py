"""Compare the household engine with ALFWorld's own text engine, word by word; and measure both.

Every game is made by the generator, written as ALFWorld's files, read back, and played in both: the intro, then
after each command the feedback, the admissible commands in order, and `won`. Walks are the oracle's, mixed with
random commands, and go on after the game is won; some commands are inadmissible on purpose.

    pip install alfworld==0.4.2
    python benchmarks/household.py --games 300 --steps 40 --out benchmarks/results/household.json

Speeds: of our engine; of the environment with frames; and of the backends `native` and `textworld`, the same
commands in the same games, without frames, in turns. The last two are in CPU time, which other work on the machine
changes less. The backend parses each text of the grammar once, unlike the unchanged engine that is compared.
`--games 0` needs no ALFWorld and measures only what is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gtr_turbo.envs import make_env
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.files import export, load
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.native import Native
from gtr_turbo.envs.household.oracle import Oracle, solve
from gtr_turbo.envs.household.textworld import TextWorld
from gtr_turbo.envs.household.worker import Limits
from gtr_turbo.envs.household.world import TASKS

ASKING = ("look", "inventory", "help", "examine")
"""Verbs that change nothing."""


class Told(NamedTuple):
    """What an engine shows after a command."""

    feedback: str
    commands: list[str]
    won: bool


class Real:
    """ALFWorld's text engine; one is used again for every game, as each copy stays in memory."""

    def __init__(self) -> None:
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos
        from textworld.envs.pddl import PddlEnv

        wanted = textworld.EnvInfos(admissible_commands=True, won=True)
        self._env = AlfredInfos(AlfredDemangler(PddlEnv(wanted)))

    def reset(self, path: Path) -> Told:
        """Start a game."""
        arguments = sys.argv[:]  # the planner overwrites them
        self._env.load(str(path))
        state = self._env.reset()
        sys.argv[:] = arguments
        return self._told(state)

    def step(self, command: str) -> Told:
        """Play a command."""
        return self._told(self._env.step(command)[0])

    def _told(self, state: Any) -> Told:
        return Told(state.feedback, list(state["admissible_commands"]), bool(state["won"]))


def ours(engine: Engine, feedback: str) -> Told:
    """What our engine shows."""
    return Told(feedback, engine.commands, engine.won)


def next_command(rng: np.random.Generator, engine: Engine, chance: float) -> str:
    """The oracle's command; with probability `chance` one at random: its verb first, then the rest of it.

    One in thirty of these is inadmissible, one in four only asks; knives are taken and used where they can be. So a
    walk meets many states.
    """
    cuts = [c for c, m in engine.moves.items() if m.verb == "slice" or "knife 1 from" in c]
    if cuts and rng.random() < 0.5:
        return sorted(cuts)[rng.integers(len(cuts))]
    if rng.random() >= chance and not engine.won:
        return Oracle(engine).advise().command
    if rng.random() < 0.03:
        return str(rng.choice(["", "Look", "go to  fridge 1", "eat egg 1", "go to loc 1"]))
    moves, asks = engine.moves, rng.random() < 0.25
    kinds = sorted({m.verb for m in moves.values() if (m.verb in ASKING) == asks})
    kind = kinds[rng.integers(len(kinds))]
    some = sorted(command for command, move in moves.items() if move.verb == kind)
    return some[rng.integers(len(some))]


def compare(real: Real, path: Path, rng: np.random.Generator, steps: int) -> dict[str, Any]:
    """Play one game in both engines.

    Returns:
        Counts, and the first differences in words.
    """
    engine = Engine(load(path))
    theirs, mine = real.reset(path), ours(engine, engine.intro())
    verbs: Counter[str] = Counter()
    differences: list[str] = []
    wins = 0
    for turn in range(steps + 1):
        for name, a, b in zip(Told._fields, theirs, mine, strict=True):
            if a != b:
                where = f"{path.parent.parent.name} turn {turn} {name}"
                differences.append(f"{where}: {str(a)[:300]!r} is real, ours is {str(b)[:300]!r}")
        wins += mine.won
        if turn == steps or differences:
            return {"states": turn + 1, "won": wins, "verbs": verbs, "differences": differences}
        command = next_command(rng, engine, chance=0.6)
        move = engine.moves.get(command)
        verbs[move.verb if move else "inadmissible"] += 1
        theirs, mine = real.step(command), ours(engine, engine.step(command))
    raise AssertionError("the last turn returns")


def speed(seconds: float) -> float:
    """Steps per second of our engine with random commands, the list of commands and `won` included."""
    rng = np.random.default_rng(0)
    games = [generate(rng) for _ in range(50)]
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        engine = Engine(games[done // 40 % len(games)])
        for _ in range(40):
            commands = engine.commands
            engine.step(commands[rng.integers(len(commands))])
            done += engine.won in (True, False)
    return done / (time.perf_counter() - began)


def frames(seconds: float) -> float:
    """Steps of the environment per CPU second with random commands: prompt, reward and a 300x300 frame each."""
    rng, env = np.random.default_rng(0), make_env("Household")
    done, spent = 0, 0.0
    while spent < seconds:
        _, info = env.reset(seed=done)
        over, began = False, time.process_time()
        while not over:
            *_, terminated, truncated, info = env.step(str(rng.choice(info["actions"])))
            over, done = terminated or truncated, done + 1
        spent += time.process_time() - began
    return done / spent


def cpu_seconds(pid: int | None) -> float:
    """What this process and another have computed so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ratio(games: int, steps: int) -> dict[str, float]:
    """Steps of the backends per CPU second without frames, and how often ours is as fast; starts are not counted.

    The two take turns game by game. Ours plays each game's commands twenty times, as once is too short to measure.
    """
    theirs, ours = TextWorld(None, "all", [], Limits()), Native(None, "all", [])
    rng, times, again = np.random.default_rng(1), {"textworld": 0.0, "native": 0.0}, 20
    for _ in range(games):
        game = generate(rng)
        theirs.begin(rng, game)
        commands: list[str] = []
        began = cpu_seconds(theirs.worker.pid)
        for _ in range(steps):
            commands.append(theirs.commands[rng.integers(len(theirs.commands))])
            theirs.step(commands[-1])
        times["textworld"] += cpu_seconds(theirs.worker.pid) - began
        for _ in range(again):
            ours.begin(rng, game)
            began = time.process_time()
            for command in commands:
                ours.step(command)
            times["native"] += (time.process_time() - began) / again
    theirs.close()
    found = {f"{name}_steps_per_cpu_second": games * steps / spent for name, spent in times.items()}
    return {**found, "native_by_textworld": times["textworld"] / times["native"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=300, help="an equal number of each task type")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--given", type=Path, help="compare the game.tw-pddl files below this folder"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    report: dict[str, Any] = {
        "steps_per_second": round(speed(3.0)),
        "frames_per_cpu_second": round(frames(3.0)),
    }
    if args.games or args.given:
        report |= {key: round(value, 1) for key, value in ratio(6, 40).items()}
    counts: Counter[str] = Counter()
    verbs: Counter[str] = Counter()
    differences: list[str] = []
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        paths = sorted(args.given.rglob("game.tw-pddl")) if args.given else []
        for i in range(0 if args.given else args.games):
            game = generate(rng, task=TASKS[i % len(TASKS)])
            paths.append(export(game, Path(folder), f"{i:04d}", solve(game)))
        real = Real() if paths else None
        for path in paths:
            assert real is not None
            found = compare(real, path, rng, args.steps)
            counts.update(games=1, states=found["states"], won=found["won"])
            verbs.update(found["verbs"])
            differences += found["differences"]
            print(f"{path.parent.parent.name}: {found['states']} states", *found["differences"])
    report |= {**counts, "differences": len(differences), "verbs": dict(verbs.most_common())}
    report |= {"seconds": round(time.perf_counter() - began), "examples": differences[:20]}
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(differences))


if __name__ == "__main__":
    main()
