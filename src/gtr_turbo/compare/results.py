"""The numbers of a comparison: of each run, of each variant over its seeds, and against the first variant."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from gtr_turbo import __version__
from gtr_turbo.compare import measures
from gtr_turbo.compare.plan import Factor, Job, Variant, text_of
from gtr_turbo.compare.runner import LONGEST_WHY, last_line
from gtr_turbo.compare.statistics import Array, Difference, Estimate, difference, estimate
from gtr_turbo.report.read import ReportError, Run, read_run

PACKAGES = ("numpy", "torch", "transformers", "peft", "gymnasium")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One run of the plan."""

    job: Job
    run: Run | None
    """What its folder holds; None if it did not finish."""
    why: str
    """Why it did not; empty if it did."""
    values: dict[str, float] = field(default_factory=dict)
    """Measures by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VariantResult:
    """A variant, or all runs with one value of a setting, over seeds."""

    label: str
    planned: int
    finished: int
    estimates: Mapping[str, Estimate]
    differences: Mapping[str, Difference]
    """To the first variant (of the same setting), by measure; the first has none."""
    judged: int = 0
    """Finished runs that logged enough to say when the target was reached."""
    reached: int | None = None
    """Those of them that reached it; None without a target, or if none is judged."""
    median_steps: float | None = None
    """Steps to the target, median over the judged runs; None if half or more did not reach it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that is shown and stored."""

    out: Path
    factors: Sequence[Factor]
    seeds: Sequence[int]
    target: float | None
    target_curve: str
    """Metric on which it was reached, or would have been."""
    measures: Mapping[str, measures.Measure]
    """Those that any run has, in the order of tables."""
    runs: Sequence[RunResult]
    variants: Sequence[VariantResult]
    effects: Mapping[str, Sequence[VariantResult]]
    """With several factors: for each its values, over the combinations of the others (the strata)."""
    notes: Sequence[str]

    @property
    def missing(self) -> list[RunResult]:
        """Runs that did not finish."""
        return [result for result in self.runs if result.run is None]


def collect(
    jobs: Sequence[Job],
    variants: Sequence[Variant],
    factors: Sequence[Factor],
    out: Path,
    *,
    failures: Mapping[Path, str],
    target: float | None,
) -> Comparison:
    """Read the runs and work out the numbers.

    Args:
        jobs: all runs of the plan, as they are now.
        variants: in the order of the plan.
        factors: what is varied.
        out: the comparison's folder.
        failures: why runs failed, by folder.
        target: success to be reached; None for none.
    """
    notes: list[str] = []
    results = [_read(job, out, failures.get(job.folder), notes) for job in jobs]
    read = [(result, result.run) for result in results if result.run is not None]
    on = measures.target_curve([run for _, run in read if run.rows])
    for result, run in read:
        result.values.update(measures.evaluations(run) | measures.replies(run))
        result.values.update(measures.costs(run))
        if target is not None:
            result.values.update(measures.reach(run, on, target))
    few = sum(bool(run.rows) and not measures.judged(run, on) for _, run in read)
    if target is not None and few:
        notes.append(
            f"fewer than {measures.WINDOW} values of {on} logged in {few} of {len(read)} runs: "
            "whether these reach the target is not said"
        )
    for name in measures.CURVES:
        curves = [measures.curve(run, name) for _, run in read]
        notes.extend(filter(None, [measures.narrowed(name, curves)]))
        heights = measures.areas(curves)
        for (result, _), height in zip(read, heights, strict=True):
            if height is not None:
                result.values[f"area/{name}"] = height
    values = [result.values for result, _ in read]
    replies = dict.fromkeys(name for one in values for name in one if name.startswith("judge/"))
    known = measures.known_measures(measures.splits(values), replies)
    named = {n: m for n, m in known.items() if any(n in result.values for result, _ in read)}
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    table = _Table(results, list(named), seeds, None if target is None else on)
    one_each = [(variant.label, [variant]) for variant in variants]
    return Comparison(
        out=out,
        factors=factors,
        seeds=seeds,
        target=target,
        target_curve=on,
        measures=named,
        runs=results,
        variants=table.compare(one_each),
        effects=_effects(table, variants, factors),
        notes=notes,
    )


def _read(job: Job, out: Path, failure: str | None, notes: list[str]) -> RunResult:
    """A finished run's folder; what it lacks is noted. If it lacks rows, it has none: curves would be too short."""
    if job.state != "finished":
        if failure is None and job.log.exists():
            failure = f"did not finish: {last_line(job.log)}"
        why = failure or ("not finished" if job.state == "unfinished" else "not started")
        return RunResult(job=job, run=None, why=without_paths(why, out))
    try:
        run = read_run(job.folder, f"{job.variant.label}/seed{job.seed}", turns=False)
    except ReportError as error:
        return RunResult(job=job, run=None, why=without_paths(str(error), out))
    notes.extend(run.warnings)
    if not measures.has_all_rows(run):
        notes.append(
            f"{run.label}/metrics.jsonl lacks rows: the run is in no curve, and no cost that rows hold"
        )
        run = replace(run, rows=())
    return RunResult(job=job, run=run, why="")


def without_paths(text: str, out: Path) -> str:
    """`text` with OUT, `.` and `~` for the comparison's, the working and the home folder, cut to LONGEST_WHY."""
    for folder, name in ((out, "OUT"), (Path.cwd(), "."), (Path(os.path.expanduser("~")), "~")):
        for path in (os.path.abspath(folder), os.path.realpath(folder)):
            if path != "/":
                text = re.sub(rf"(?<![\w.~-]){re.escape(path)}(?![\w-])", name, text)
    return text[:LONGEST_WHY]


class _Table:
    """Values by variant, seed and measure."""

    def __init__(
        self, results: Sequence[RunResult], names: list[str], seeds: list[int], on: str | None
    ) -> None:
        """`on` is the metric on which a target is reached; None without one."""
        self._found = {(r.job.variant.label, r.job.seed): r for r in results}
        self._names, self._seeds, self._on = names, seeds, on

    def _scores(self, variants: Sequence[Variant], name: str) -> Array:
        """(variants, seeds) of a measure; NaN where there is none."""
        return np.array(
            [
                [self._found[v.label, seed].values.get(name, math.nan) for seed in self._seeds]
                for v in variants
            ]
        )

    def compare(self, entries: Sequence[tuple[str, Sequence[Variant]]]) -> list[VariantResult]:
        """Results of entries (label, variants that are its strata); the first entry is the base."""
        found, base = [], entries[0][1]
        for label, variants in entries:
            estimates: dict[str, Estimate] = {}
            differences: dict[str, Difference] = {}
            for name in self._names:
                if name.startswith("target/"):
                    continue  # runs that did not reach it have no number to average
                scores = self._scores(variants, name)
                if (about := estimate(scores)) is not None:
                    estimates[name] = about
                if variants is not base and (gap := difference(scores, self._scores(base, name))):
                    differences[name] = gap
            runs = [self._found[v.label, seed] for v in variants for seed in self._seeds]
            found.append(
                VariantResult(
                    label=label,
                    planned=len(runs),
                    finished=sum(result.run is not None for result in runs),
                    estimates=estimates,
                    differences=differences,
                    **self._reached(runs),
                )
            )
        return found

    def _reached(self, runs: Sequence[RunResult]) -> dict[str, Any]:
        steps = [
            result.values.get("target/steps", math.inf)
            for result in runs
            if self._on and result.run is not None and measures.judged(result.run, self._on)
        ]
        if not steps:
            return {}
        middle = float(np.median(steps))
        return {
            "judged": len(steps),
            "reached": sum(map(math.isfinite, steps)),
            "median_steps": middle if math.isfinite(middle) else None,
        }


def _effects(
    table: _Table, variants: Sequence[Variant], factors: Sequence[Factor]
) -> dict[str, list[VariantResult]]:
    if len(factors) < 2:
        return {}
    return {
        factor.key: table.compare(
            [
                (
                    f"{factor.short}={text_of(value)}",
                    [v for v in variants if text_of(v.values[factor.key]) == text_of(value)],
                )
                for value in factor.values
            ]
        )
        for factor in factors
    }


def to_json(
    comparison: Comparison, variants: Sequence[Variant], calls: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What `compare.json` holds; no path of this machine, but for those that settings name.

    Args:
        comparison: the numbers.
        variants: of the plan, with their configs.
        calls: commands that started runs (`Attempts.calls`).
    """
    configs = {variant.label: (variant.values, asdict(variant.config)) for variant in variants}
    return {
        "format": 2,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "calls": list(calls),
        "vary": {factor.key: list(factor.values) for factor in comparison.factors},
        "seeds": list(comparison.seeds),
        "target": comparison.target,
        "measures": {name: asdict(measure) for name, measure in comparison.measures.items()},
        "variants": [
            {
                **_plain(result),
                "values": dict(configs[result.label][0]),
                "config": configs[result.label][1],
            }
            for result in comparison.variants
        ],
        "effects": {
            key: [_plain(result) for result in results]
            for key, results in comparison.effects.items()
        },
        "runs": [
            {
                "variant": result.job.variant.label,
                "seed": result.job.seed,
                "folder": result.job.folder.relative_to(comparison.out).as_posix(),
                "finished": result.run is not None,
                "why": result.why,
                "values": result.values,
            }
            for result in comparison.runs
        ],
        "notes": list(comparison.notes),
    }


def _plain(result: VariantResult) -> dict[str, Any]:
    estimates = {name: asdict(number) for name, number in result.estimates.items()}
    differences = {name: asdict(number) for name, number in result.differences.items()}
    return asdict(result) | {"estimates": estimates, "differences": differences}


def here() -> dict[str, Any]:
    """Versions of what computes the numbers, and the machine."""
    return {
        "versions": {"gtr-turbo": __version__, "python": platform.python_version(), **_versions()},
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def rows(comparison: Comparison) -> list[list[str]]:
    """`compare.csv`: a head, then a row per run."""
    keys, names = [factor.key for factor in comparison.factors], list(comparison.measures)
    table = [["variant", *keys, "seed", "finished", "why", *names]]
    for result in comparison.runs:
        job = result.job
        numbers = [repr(result.values[name]) if name in result.values else "" for name in names]
        varied = [text_of(job.variant.values[key]) for key in keys]
        done = str(result.run is not None).lower()
        table.append([job.variant.label, *varied, str(job.seed), done, result.why, *numbers])
    return table
