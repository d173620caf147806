"""The comparisons of docs/results.md, each one `gtr-turbo compare`; they go on where they were cut.

    python benchmarks/study.py NAME [--jobs 2] [--folder runs/study] [--summary]

Runs lie in FOLDER/NAME. What `compare` says of them is copied to benchmarks/results/study: NAME.json and NAME.csv;
and to docs/results, as NAME.html. `--summary` does so without starting a run.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDANCE = "guidance=none,static,sft,kl"
STRESS = ["points24-token-stress", "--eval.episodes", "300", "--eval.extra_splits", "[]"]
STUDIES: dict[str, list[str]] = {
    # which guidance, where RL alone loses its thoughts, and where it does not
    "stress": [*STRESS, "--vary", GUIDANCE, "--seeds", "5", "--eval.interval", "10"],
    "points24": ["points24", "--vary", GUIDANCE, "--seeds", "5", "--eval.interval", "10"],
    "ezpoints": ["ezpoints", "--vary", GUIDANCE, "--seeds", "5", "--eval.interval", "5"],
    # the published ablations
    "merge": [
        *STRESS,
        "--vary",
        "teacher=ties,linear",
        "--vary",
        "teacher.weights=sma,ema",
        "--seeds",
        "3",
    ],
    "interval": [*STRESS, "--vary", "teacher.interval=1,5,15", "--seeds", "3"],
    "tokens": [*STRESS, "--vary", "guidance.tokens=thought,response", "--seeds", "3"],
    "estimator": [*STRESS, "--vary", "guidance.estimator=clip,k1,abs,k3,full", "--seeds", "3"],
    "credit": [*STRESS, "--vary", "guidance.credit=advantage,reward", "--seeds", "3"],
    "beta": [
        *STRESS,
        "--vary",
        "guidance.beta=1,5,20",
        "--vary",
        "guidance.center=true,false",
        "--seeds",
        "3",
    ],
}


def main() -> int:
    """Run or summarise one study; the exit code is that of `compare`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--summary", action="store_true", help="of what is there; start nothing")
    options = parser.parse_args()
    out = options.folder / options.name
    more = ["--jobs", str(options.jobs), "--threads", "1", "--out", str(out), "--episodes", "40"]
    more += ["--only-summary"] if options.summary else []
    command = [sys.executable, "-m", "gtr_turbo", "compare", *STUDIES[options.name], *more]
    code = subprocess.run(command, check=False).returncode
    results, pages = ROOT / "benchmarks/results/study", ROOT / "docs/results"
    for folder in (results, pages):
        folder.mkdir(parents=True, exist_ok=True)
    for name, to in (
        ("compare.json", results / f"{options.name}.json"),
        ("compare.csv", results / f"{options.name}.csv"),
        ("report.html", pages / f"{options.name}.html"),
    ):
        if (out / name).exists():
            shutil.copyfile(out / name, to)
    return code


if __name__ == "__main__":
    sys.exit(main())
