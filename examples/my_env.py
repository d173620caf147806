"""An environment of your own in one file: a frozen lake with frames. docs/environments.md trains on it."""

import gymnasium
import numpy as np
from gymnasium import spaces

from gtr_turbo.envs import wrap_discrete
from gtr_turbo.envs.discrete import DiscreteText

CELL = 28
ICE, HOLE, GOAL, ELF = (200, 225, 245), (20, 40, 90), (240, 190, 40), (190, 30, 40)
MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
PROMPT = (
    "You are the red square on a frozen lake. Reach the yellow one, not the dark hole. "
    'Answer {"thoughts": "...", "action": "left" or "down" or "right" or "up"}'
)


class Lake(gymnasium.Env[int, int]):
    """An ordinary Gymnasium environment: it knows nothing of text. +1 at the goal, 0 elsewhere."""

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
        return self._cell(), {}

    def step(self, action):
        """Move one cell; the border stops you."""
        row, column = (
            min(self.size - 1, max(0, place + move))
            for place, move in zip(self.elf, list(MOVES.values())[action], strict=True)
        )
        self.elf = (row, column)
        won = self.elf == self.goal
        return self._cell(), float(won), won or self.elf == self.hole, False, {}

    def render(self):
        """The lake from above, uint8 (28 * size, 28 * size, 3)."""
        cells = np.full((self.size, self.size, 3), ICE, np.uint8)
        for place, colour in ((self.hole, HOLE), (self.goal, GOAL), (self.elf, ELF)):
            cells[place] = colour
        return cells.repeat(CELL, axis=0).repeat(CELL, axis=1)

    def _cell(self) -> int:
        return self.elf[0] * self.size + self.elf[1]


def make_lake(size: int = 4) -> DiscreteText:
    """The lake as a visual-text environment. `env.options: {size: 3}` of a recipe arrives here."""
    return wrap_discrete(Lake(size), actions=list(MOVES), prompt=PROMPT, max_turns=12)


gymnasium.register(id="MyLake-v0", entry_point=make_lake)
