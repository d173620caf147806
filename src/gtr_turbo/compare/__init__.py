"""One recipe with settings varied, over seeds: runs as processes, statistics, tables, one report. No torch."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtr_turbo.checks import ConfigError
from gtr_turbo.compare.plan import (
    Factor,
    Job,
    Variant,
    check_startable,
    idle,
    make_jobs,
    make_variants,
    read_factors,
    read_seeds,
)
from gtr_turbo.compare.results import Comparison, collect, here, rows, to_json
from gtr_turbo.compare.runner import Attempts, Runner
from gtr_turbo.compare.show import page_data
from gtr_turbo.report.page import write_report, write_whole

__all__ = ["Plan", "carry_out", "make_plan", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A checked comparison."""

    name: str
    """Of the recipe."""
    out: Path
    factors: Sequence[Factor]
    variants: Sequence[Variant]
    seeds: Sequence[int]
    jobs: int
    """Runs at once."""
    threads: int
    """CPU threads of each."""

    def runs(self) -> list[Job]:
        """All runs, as their folders are now."""
        return make_jobs(self.variants, self.seeds, self.out)

    def check(self) -> None:
        """Find what would only stop a run that has begun: an environment's options, a key, a tracker.

        Raises:
            ConfigError: a run that is not finished cannot start; its variant is named.
        """
        check_startable(self.runs())

    def notes(self) -> list[str]:
        """What a reader of the plan should know, a line each."""
        return idle(self.variants)


def make_plan(
    source: Path,
    over: Mapping[str, Any],
    *,
    vary: Sequence[str],
    seeds: str,
    jobs: int,
    threads: int | None,
    out: Path | None,
) -> Plan:
    """Check everything that can be checked before a run starts.

    Args:
        source: the config.
        over: settings for all variants, nested.
        vary: `KEY=V1,V2,...`, each.
        seeds: how many, or which.
        jobs: runs at once.
        threads: of each run; by default the CPUs that this process may use, divided by `jobs`.
        out: folder of the comparison; by default `runs/compare-NAME`.

    Raises:
        ConfigError: an argument or a variant cannot work.
    """
    for name, number in (("--jobs", jobs), ("--threads", threads)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} {number} must be at least 1")
    factors = read_factors(vary)
    if threads is None:
        can_ask = hasattr(os, "sched_getaffinity")  # not on macOS
        cpus = len(os.sched_getaffinity(0)) if can_ask else os.cpu_count() or 1
        threads = max(1, cpus // jobs)
    variants = make_variants(source, over, factors, threads)
    name = variants[0].config.name
    return Plan(
        name=name,
        out=out or Path("runs") / f"compare-{source.stem}",
        factors=factors,
        variants=variants,
        seeds=read_seeds(seeds),
        jobs=jobs,
        threads=threads,
    )


def carry_out(plan: Plan, say: Callable[[str], None]) -> dict[Path, str]:
    """Run what is not finished; returns why runs failed, by folder.

    Raises:
        ConfigError: another process does so too, a run folder holds something else, or a run cannot start.
    """
    plan.check()
    with _own(plan.out):
        jobs = plan.runs()
        attempts = Attempts(plan.out / "attempts.jsonl")
        if todo := sum(job.state != "finished" for job in jobs):
            attempts.call(runs=todo, jobs=plan.jobs, threads=plan.threads, **here())
        for note in plan.notes():
            say(f"note: {note}")
        runner = Runner(at_once=plan.jobs, threads=plan.threads, attempts=attempts, say=say)
        runner.run(jobs)
    return runner.failures


@contextmanager
def _own(out: Path) -> Iterator[None]:
    """Hold the comparison's folder for this process."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "compare.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{out} is in use by another compare; wait for it, give another --out, or look at what is "
                "there with --only-summary"
            ) from error
        yield


def summarise(
    plan: Plan, failures: Mapping[Path, str], *, target: float | None, episodes: int
) -> Comparison:
    """Work out the numbers from what is there; write compare.json, compare.csv and, of finished runs, report.html.

    Args:
        plan: what was to be run.
        failures: why runs failed, by folder.
        target: success to be reached, in [0, 1]; None for none.
        episodes: in the replay of the report.

    Raises:
        ConfigError: the folder is not there, a run folder holds something else, or no run is finished and none has
            failed; nothing is written then.
    """
    if not plan.out.is_dir():
        raise ConfigError(
            f"{plan.out} is no folder of a comparison; name one that is there with --out"
        )
    jobs = plan.runs()
    if not failures and all(job.state != "finished" for job in jobs):
        there = sorted({path.parents[1].name for path in plan.out.glob("*/seed*/config.yaml")})
        raise ConfigError(
            f"no run with these --vary and --seeds is finished in {plan.out}, which holds runs of "
            f"{', '.join(there) or 'no variant'}; give those they were made with"
        )
    comparison = collect(
        jobs,
        plan.variants,
        plan.factors,
        plan.out,
        failures=failures,
        target=target,
    )
    done = [result for result in comparison.runs if result.run is not None]
    calls = Attempts(plan.out / "attempts.jsonl").calls()
    made = to_json(comparison, plan.variants, calls)
    write_whole(plan.out / "compare.json", f"{json.dumps(made, indent=1)}\n".encode())
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(rows(comparison))
    write_whole(plan.out / "compare.csv", table.getvalue().encode())
    if not done:
        return comparison
    done.sort(key=lambda r: [v.label for v in plan.variants].index(r.job.variant.label))
    groups = [
        (v.label, [i for i, r in enumerate(done) if r.job.variant.label == v.label])
        for v in plan.variants
    ]
    write_report(
        [result.job.folder for result in done],
        plan.out / "report.html",
        episodes=episodes,
        groups=[group for group in groups if group[1]],
        comparison=page_data(comparison, plan.name),
    )
    return comparison
