"""How long a household frame takes on one core.

    OMP_NUM_THREADS=1 python benchmarks/household_frames.py

Random legal commands are played in generated games of all task types, in one process; the frame of every state is
drawn once and `draw` alone is timed, in CPU time. Each game pays for its two plans, the first games of the first
row for sprites and captions too.
"""

import argparse
import time

import numpy as np

from gtr_turbo.envs.household.drawing import draw
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.generator import generate


def measure(games, steps, size, names):
    """Milliseconds of CPU time of each frame, (games, steps)."""
    rng = np.random.default_rng(0)
    taken = np.zeros((games, steps))
    for game in range(games):
        engine = Engine(generate(rng))
        for step in range(steps):
            began = time.thread_time()
            draw(engine.game, engine.state, size, names)
            taken[game, step] = 1000 * (time.thread_time() - began)
            commands = engine.commands
            engine.step(commands[rng.integers(len(commands))])
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--games", type=int, default=300)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    print("| size | names | mean ms | median | 99 % | first of a game |")
    print("|---|---|---|---|---|---|")
    for size in (300, 448):
        for names in (True, False):
            ms = measure(args.games, args.steps, size, names)
            high = np.percentile(ms, 99)
            print(
                f"| {size} | {'yes' if names else 'no'} | {ms.mean():.2f} | {np.median(ms):.2f} | "
                f"{high:.1f} | {np.median(ms[:, 0]):.1f} |"
            )


if __name__ == "__main__":
    main()
