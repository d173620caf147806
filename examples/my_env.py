"""An environment of your own in one file: a frozen lake with frames. docs/environments.md trains on it."""

from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from gtr_turbo.envs.discrete import DiscreteText

CELL = 28
ICE, HOLE, GOAL, ELF = (200, 225, 245), (20, 40, 90), (240, 190, 40), (190, 30, 40)
MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
PROMPT = (
    "You are the red square on a frozen lake. Reach the yellow one, not the dark hole. "
    'Answer {"thoughts": "...", "action": "left" or "down" or "right" or "up"}'
)


class Lake(gymnasium.Env[int, int]):
    """An ordinary Gymnasium environment: it knows nothing of text.

    It pays 1 at the goal, -1 in the hole, and 0.5 for each move nearer to the goal (-0.5 for one away).
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form

    def __init__(self, size: int = 4) -> None:
        self.size, self.render_mode = size, "rgb_array"
        self.observation_space = spaces.Discrete(size * size)
        self.action_space = spaces.Discrete(len(MOVES))

    def reset(self, *, seed=None, options=None):
        """Place elf, hole and goal on three different cells."""
        super().reset(seed=seed)
        cells = self.np_random.choice(self.size * self.size, 3, replace=False)
        self.elf, self.hole, self.goal = (divmod(int(cell), self.size) for cell in cells)
        return self._cell(), self._info()

    def step(self, action):
        """Move one cell; the border stops you."""
        before = self.distance(self.elf)
        row, column = (
            min(self.size - 1, max(0, place + move))
            for place, move in zip(self.elf, list(MOVES.values())[action], strict=True)
        )
        self.elf = (row, column)
        won = self.elf == self.goal
        lost = self.elf == self.hole
        reward = won - lost + 0.5 * (before - self.distance(self.elf))
        return self._cell(), reward, won or lost, False, self._info() | {"is_success": won}

    def render(self):
        """The lake from above, uint8 (28 * size, 28 * size, 3)."""
        cells = np.full((self.size, self.size, 3), ICE, np.uint8)
        for place, colour in ((self.hole, HOLE), (self.goal, GOAL), (self.elf, ELF)):
            cells[place] = colour
        return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)

    def _cell(self) -> int:
        return self.elf[0] * self.size + self.elf[1]

    def distance(self, cell: tuple[int, int]) -> int:
        """From the goal, in moves."""
        return abs(cell[0] - self.goal[0]) + abs(cell[1] - self.goal[1])

    def _info(self) -> dict[str, list[int]]:
        """Where elf, goal and hole are: what the frame shows, for the `vision_steps` of `gtr-turbo sft`."""
        cells = (self.elf, self.goal, self.hole)
        return {"shown": [row * self.size + column for row, column in cells]}


class LakeText(DiscreteText):
    """The lake as a visual-text environment, with an expert to imitate and a judge; both are optional."""

    def demonstrate(self, rng: np.random.Generator) -> dict[str, str]:
        """A reply that sees everything and goes towards the goal, round the hole; of equal ways any."""
        far = {name: (cells, rng.random()) for name, cells in self._ways().items()}
        action = min(far, key=far.__getitem__)
        return {"thoughts": f"{self._seen()}: {action}", "action": action}

    def judge(self, reply: Mapping[str, Any]) -> dict[str, bool]:
        """Whether the thought names the places as they are, says a way that is good, and is followed."""
        seen, _, way = str(reply.get("thoughts")).partition(": ")
        ways = self._ways()
        return {
            "perception": seen == self._seen(),
            "plan": ways.get(way) == min(ways.values()),
            "agreement": way == reply.get("action"),
        }

    def _seen(self) -> str:
        places = (("I am", self.env.elf), ("goal", self.env.goal), ("hole", self.env.hole))
        return ", ".join(f"{what} at {row} {column}" for what, (row, column) in places)

    def _ways(self) -> dict[str, int]:
        """The moves that stay on the lake, each with how far from the goal it ends."""
        lake, found = self.env, {}
        for name, (down, right) in MOVES.items():
            place = (lake.elf[0] + down, lake.elf[1] + right)
            if place != lake.hole and all(0 <= part < lake.size for part in place):
                found[name] = lake.distance(place)
        return found


def make_lake(size: int = 4) -> LakeText:
    """The lake in text. `env.options: {size: 4}` of a recipe arrives here."""
    return LakeText(Lake(size), actions=list(MOVES), prompt=PROMPT, max_turns=12)


gymnasium.register(id="MyLake-v0", entry_point=make_lake)
