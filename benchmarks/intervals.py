"""How often 95 % intervals over few seeds hold the true mean: the reason for what `gtr-turbo compare` shows.

    python benchmarks/intervals.py --out benchmarks/results/intervals.json

Per number of seeds and kind of scores: 2,000 made-up comparisons of paired differences. `normal` is what the
interval assumes; `skewed` is exponential; `collapse` is normal, but one run in five loses four deviations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from gtr_turbo.compare.statistics import bootstrap, mean_of_all, student_interval

DRAWS = 2000
SCORES = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "skewed": (lambda rng, n: rng.exponential(size=n), 1.0),
    "collapse": (lambda rng, n: rng.normal(size=n) - 4.0 * (rng.random(n) < 0.2), -0.8),
}
INTERVALS = {
    "student": student_interval,
    "bootstrap": lambda scores: bootstrap(scores[None], mean_of_all),
}


def coverage(kind: str, seeds: int) -> dict[str, float]:
    """Fraction of intervals of each sort that hold the true mean."""
    draw, truth = SCORES[kind]
    rng = np.random.default_rng(0)
    held = dict.fromkeys(INTERVALS, 0)
    for _ in range(DRAWS):
        scores = draw(rng, seeds)
        for name, interval in INTERVALS.items():
            low, high = interval(scores)
            held[name] += low <= truth <= high
    return {name: count / DRAWS for name, count in held.items()}


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for kind in SCORES:
        for seeds in (3, 5, 10):
            rows.append({"scores": kind, "seeds": seeds, **coverage(kind, seeds)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"draws": DRAWS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
