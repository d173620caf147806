"""The figures of the README: train a recipe with several seeds, collect the summaries.

    python benchmarks/recipes.py --config ezpoints --seeds 0 1 2 --out benchmarks/results/ezpoints.json

Each run is the plain command `gtr-turbo train --config NAME --seed N`; `--jobs 2 --threads 1` runs two at a
time on one thread each. A failed run does not lose the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def run(config: str, seed: int, folder: Path, rest: list[str]) -> dict[str, object] | None:
    """One run; its summary, or None if it failed."""
    where = folder / f"{config}-seed{seed}"
    command = [sys.executable, "-m", "gtr_turbo", "train", "--config", config, "--seed", str(seed)]
    done = subprocess.run(
        [*command, "--run", str(where), *rest], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        print(f"seed {seed} failed with exit code {done.returncode}", file=sys.stderr)
        return None
    summary = json.loads((where / "summary.json").read_text())
    before, after, merge = (summary[f"success_{when}"] for when in ("before", "after", "merge"))
    print(
        f"seed {seed}: {before:.1%} -> {after:.1%} (merge {merge:.1%}), {summary['seconds']:.0f} s, "
        f"{summary['peak_rss_mb']:.0f} MB",
        flush=True,
    )
    for name in ("student", "teacher"):
        del summary[name]
    return summary


def main() -> None:
    """Run the seeds and write one JSON file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, required=True)
    options, rest = parser.parse_known_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        summaries = pool.map(
            lambda seed: run(options.config, seed, options.folder, rest), options.seeds
        )
    result = {
        "config": options.config,
        "settings": rest,
        "jobs": options.jobs,
        "runs": [summary for summary in summaries if summary],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
