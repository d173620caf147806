"""Engines for the worker that play our own rules, and fail on command."""

import os
import sys
import time
from pathlib import Path

from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.files import load
from gtr_turbo.envs.household.worker import UnplayableError


class Ours:
    """Stands for the real text engine."""

    def reset(self, path):
        print("a game starts")  # what an engine prints is no answer
        self.engine = Engine(load(Path(path)))
        return self.told(self.engine.intro())

    def told(self, feedback):
        return {"feedback": feedback, "commands": self.engine.commands, "won": self.engine.won}

    def step(self, command):
        return self.told(self.engine.step(command))


class Failing(Ours):
    """`help` kills it, `inventory` hangs it, `look` eats memory, and examining raises."""

    def step(self, command):
        if command == "help":
            print("out of luck", file=sys.stderr, flush=True)
            os.abort()
        if command == "inventory":
            time.sleep(1000)
        if command == "look":
            self.eaten = [bytes([1]) * 10**6 for _ in range(2000)]
            time.sleep(1000)
        if command.startswith("examine"):
            raise ValueError("no such rule")
        return super().step(command)


class Growing(Ours):
    """Takes 60 MB at each command, and answers at once."""

    def step(self, command):
        self.eaten = [*getattr(self, "eaten", []), bytes([1]) * 60_000_000]
        return super().step(command)


class Differing(Ours):
    """Tells something else than we do when a receptacle is gone to."""

    def step(self, command):
        return {**super().step(command), "feedback": "You are lost."}


class Missing:
    """Needs what is not installed."""

    def __init__(self):
        raise UnplayableError("it needs pip install something")


class NeverStarting:
    def reset(self, path):
        raise RuntimeError("the planner is tired")
