"""The comparisons of docs/results.md, each one `gtr-turbo compare`; they go on where they were cut.

    python benchmarks/study.py NAME [--jobs 2] [--folder runs/study] [--summary]

Runs lie in FOLDER/NAME. What `compare` says of them is copied to benchmarks/results/study: NAME.json and NAME.csv;
and to docs/results, as NAME.html. `--summary` does so without starting a run. Settings, metrics and summary of each
finished run are kept in benchmarks/results/study/NAME, with attempts.jsonl, so that a study goes on from there on
another machine. Where a run lies in both places and is not the same, nothing is done: remove one of the two. The
runs of `stress` with `kl` serve the ablations too, those of `points24` with `sft` serve `imitation`, and they are
kept once. While kinds of guidance are compared, the script examples/solver_corrector.py is served for `external`.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).parent.parent
PORTS = {"stress": 8024, "points24": 8025, "ezpoints": 8026}
"""Of the studies that compare kinds of guidance: where the corrector is served."""


def kinds(study: str) -> list[str]:
    """Every kind of guidance; the corrector's settings count for `external` alone."""
    return [
        *("--vary", "guidance=none,static,sft,kl,external", "--seeds", "5"),
        *("--guidance.external.base_url", f"http://127.0.0.1:{PORTS[study]}/v1"),
        *("--guidance.external.model", "exact-solver", "--guidance.external.key_variable", "null"),
        *("--guidance.external.outage", "wait"),
    ]


STRESS = ["points24-token-stress", "--eval.episodes", "300", "--eval.extra_splits", "[]"]
STRESS += ["--eval.interval", "10"]
STUDIES: dict[str, list[str]] = {
    # which guidance, where RL alone loses its thoughts, and where it does not
    "stress": [*STRESS, *kinds("stress")],
    # whether guidance helps there: other seeds, and three times the episodes to tell
    "stress-more": [
        *("points24-token-stress", "--eval.episodes", "900", "--eval.extra_splits", "[]"),
        *("--vary", "guidance=none,sft,kl", "--seeds", "5,6,7,8,9,10"),
        *("--episodes", "48"),  # long ones, with a frame a turn
    ],
    "points24": ["points24", *kinds("points24"), "--eval.interval", "10"],
    "ezpoints": ["ezpoints", *kinds("ezpoints"), "--eval.interval", "5"],
    # one turn: the thought is the steps, the action the whole formula
    "formula": [
        *("points24", "--env.options.granularity", "formula", "--ppo.lr", "3e-4"),
        *("--env_steps", "15360", "--vary", "guidance=none,kl,static,sft", "--seeds", "1"),
        *("--eval.episodes", "400", "--eval.interval", "10"),
    ],
    "household": [
        *("household-tiny", "--vary", "guidance=none,static,sft,kl", "--seeds", "3"),
        *("--eval.episodes", "200", "--episodes", "16"),  # long ones, with a frame a turn
    ],
    # imitation of the merge, and of a teacher that stays the start: 1000 is more than the updates of a run
    "imitation": [
        *("points24", "--guidance", "sft", "--eval.interval", "10"),
        *("--vary", "teacher.interval=1,1000", "--seeds", "5"),
    ],
    # twice the published steps
    "longer": [
        *("points24", "--env_steps", "61440", "--eval.interval", "10"),
        *("--vary", "guidance=none,sft", "--seeds", "5"),
    ],
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
UNCHANGED = {
    "merge": "teacher=ties,weights=sma",
    "interval": "interval=1",
    "tokens": "tokens=thought",
    "estimator": "estimator=clip",
    "credit": "credit=advantage",
    "beta": "beta=20,center=true",
    "imitation": "interval=1",
}
"""The variant of a study that has the settings of another study's runs."""
THOSE_RUNS = {"imitation": "points24/guidance=sft/seed*"}
"""Where they are kept, if not as `stress/guidance=kl/seed[0-2]`."""
KEPT = ("config.yaml", "metrics.jsonl", "summary.json")
"""Of a run; it is kept once the last of them is."""
ATTEMPTS = "attempts.jsonl"
RESULTS = "benchmarks/results/study"
"""Below ROOT."""


def main() -> int:
    """Run or summarise one study, and copy what that wrote; the exit code is that of `compare`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--folder", type=Path, default=Path("runs/study"))
    parser.add_argument("--summary", action="store_true", help="of what is there; start nothing")
    options = parser.parse_args()
    out = options.folder / options.name
    more = ["--jobs", str(options.jobs), "--threads", "1", "--out", str(out)]
    more += ["--only-summary"] if options.summary else []
    command = [sys.executable, "-m", "gtr_turbo", "compare", *STUDIES[options.name], *more]
    made = {name: out / name for name in ("compare.json", "compare.csv", "report.html")}
    before = {name: _written(path) for name, path in made.items()}
    bring(options.name, out)
    serve = options.name in PORTS and not options.summary
    with solver(PORTS[options.name]) if serve else nullcontext():
        code = run(command)
    results, pages = ROOT / RESULTS, ROOT / "docs/results"
    keep(options.name, out)
    for name, path in made.items():
        if _written(path) != before[name]:
            folder = pages if path.suffix == ".html" else results
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / f"{options.name}{path.suffix}")
    return code


def bring(study: str, out: Path) -> None:
    """Put the kept runs of a study back where there is no run, and what is known of how they came about.

    `compare` refuses runs with other settings.

    Raises:
        SystemExit: there is another run; both are named, and nothing is copied.
    """
    results = ROOT / RESULTS
    kept = {run.relative_to(results / study): run for run in _finished(results / study)}
    if study in UNCHANGED:
        same = _finished(results, THOSE_RUNS.get(study, "stress/guidance=kl/seed[0-2]"))
        kept |= {Path(UNCHANGED[study], run.name): run for run in same}
    _refuse([(out / place, run) for place, run in kept.items() if (out / place).exists()])
    for place, run in kept.items():
        if not (out / place).exists():
            shutil.copytree(run, out / place)
    _add_lines(results / study / ATTEMPTS, out / ATTEMPTS)


def keep(study: str, out: Path) -> None:
    """Copy what is kept of each finished run that is not kept yet, but for those that another study keeps.

    Raises:
        SystemExit: another run is kept; both are named, and the others are copied.
    """
    results = ROOT / RESULTS
    there = []
    for run in _finished(out):
        if run.parent.name == UNCHANGED.get(study):
            continue
        place = results / study / run.relative_to(out)
        if (place / KEPT[-1]).exists():
            there.append((run, place))
        else:
            place.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                shutil.copyfile(run / name, place / name)
    _add_lines(out / ATTEMPTS, results / study / ATTEMPTS)
    _refuse(there)


def _finished(folder: Path, runs: str = "*/seed*") -> list[Path]:
    """The finished runs of a folder."""
    return [summary.parent for summary in sorted(folder.glob(f"{runs}/{KEPT[-1]}"))]


def _refuse(pairs: list[tuple[Path, Path]]) -> None:
    """End if a pair of folders does not hold the same run: no time in them says which is the later one."""
    other = [
        f"{here} and {kept}"
        for here, kept in pairs
        if filecmp.cmpfiles(here, kept, KEPT, shallow=False)[0] != list(KEPT)
    ]
    if other:
        sys.exit(f"not the same run; remove the one that is not wanted: {'; '.join(other)}")


def _add_lines(source: Path, to: Path) -> None:
    """Append the lines of a file that another one lacks."""
    there = to.read_text(encoding="utf-8") if to.exists() else ""
    text = source.read_text(encoding="utf-8") if source.exists() else ""
    new = [line for line in text.splitlines() if line not in there.splitlines()]
    if new:
        to.parent.mkdir(parents=True, exist_ok=True)
        with open(to, "a", encoding="utf-8") as file:
            cut = bool(there) and not there.endswith("\n")  # by a crash
            file.write("\n" * cut + "".join(f"{line}\n" for line in new))


@contextmanager
def solver(port: int) -> Iterator[None]:
    """The local corrector of examples/, while the block runs."""
    # in a session of its own, so that Ctrl-C does not take it from runs that are ending
    script = [sys.executable, str(ROOT / "examples/solver_corrector.py"), "--port", str(port)]
    server = subprocess.Popen(script, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def run(command: list[str]) -> int:
    """A command's exit code. Ctrl-C, SIGTERM and SIGHUP are handed to it, as often as they come; it is awaited."""
    # in a session of its own, so that Ctrl-C reaches it once
    process = subprocess.Popen(command, start_new_session=True)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, lambda received, _: process.send_signal(received))
    return process.wait()


def _written(path: Path) -> int | None:
    """When a file was written, in nanoseconds; None if there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
