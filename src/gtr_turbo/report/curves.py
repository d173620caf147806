"""Curves: rows of metrics as columns, thinned alike for all runs; mean and band over the seeds of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gtr_turbo.report.groups import Groups, named_groups
from gtr_turbo.report.read import Run
from gtr_turbo.student import student_quantile

MOST_POINTS = 1000
"""A curve has no more points than this; longer runs are averaged over blocks of updates."""

TITLES: dict[str, tuple[str, str]] = {
    "rollout/success": ("Success while training", "fraction of episodes"),
    "eval/student_success": ("Student and merge (dotted)", "fraction of the same episodes"),
    "eval/teacher_success": ("Merge", "fraction of the same episodes"),
    "rollout/return": ("Return", "reward per episode"),
    "judge/plan": ("Right plans", "fraction of turns"),
    "judge/agreement": ("Action agrees with plan", "fraction of turns"),
    "judge/perception": ("Right perception", "fraction of turns"),
    "judge/arithmetic": ("Right arithmetic", "fraction of turns"),
    "rollout/valid": ("Valid replies", "fraction of turns"),
    "rollout/legal": ("Legal actions", "fraction of turns"),
    "rollout/episode_turns": ("Episode length", "turns"),
    "teacher/kl": ("KL to the teacher", "nats per thought token"),
    "thought/tokens": ("Thought length", "tokens"),
    "thought/distinct": ("Distinct thoughts", "per different state"),
    "thought/template_share": ("Thoughts of other states", "fraction of (state, thought)"),
    "thought/top_template": ("States with the commonest thought", "fraction of states"),
    "thought/self_bleu": ("Self-BLEU of thoughts", "0 to 1"),
    "thought/entropy": ("Entropy of thoughts", "nats per token"),
    "thought/surprise": ("Surprise of thoughts", "nats per token"),
    "ppo/entropy": ("Entropy", "nats per token"),
    "ppo/clip_fraction": ("Clip fraction", "fraction of tokens"),
    "ppo/approx_kl": ("KL of the update", "nats per token"),
    "critic/explained_variance_before": ("Explained variance at sampling", "fraction"),
    "critic/explained_variance": ("Explained variance after update", "fraction"),
    "teacher/distance": ("Teacher's distance from the start", "Euclidean norm"),
    "teacher/student_distance": ("Agent's distance from the start", "Euclidean norm"),
}
"""Title and unit of metrics that have one; the others go by their name. All are in docs/metrics.md."""

MAIN = (
    "rollout/success",
    "eval/student_success",
    "rollout/return",
    "judge/plan",
    "judge/agreement",
    "teacher/kl",
    "thought/tokens",
    "thought/distinct",
    "thought/template_share",
    "thought/self_bleu",
    "thought/entropy",
    "ppo/entropy",
    "ppo/clip_fraction",
    "critic/explained_variance_before",
    "teacher/distance",
    "teacher/student_distance",
)
"""Shown first, in this order."""

PAIRS = {
    "eval/student_success": (
        ("eval/student_success", "student"),
        ("eval/teacher_success", "merge"),
    ),
}
"""Metrics that one chart shows together, under the name of the first: (metric, what the chart calls it)."""

GROUPS = ("rollout", "eval", "thought", "judge", "teacher", "ppo", "critic", "time", "system")
NOT_PLOTTED = {"update", "env_steps", "system/seconds"}
"""The axes themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The rows of a run, column by column; None where a row lacks the metric."""

    updates: list[float]
    steps: list[float]
    seconds: list[float | None]
    metrics: dict[str, list[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """Mean, smallest and largest over runs, at the places where each of them has a value."""

    steps: list[float]
    seconds: list[float | None]
    mean: list[float]
    low: list[float]
    high: list[float]


def block_width(lengths: Sequence[int], most: int = MOST_POINTS) -> int:
    """Updates per point, the same for all runs, so that none has more than `most` points."""
    return max(1, -(-max(lengths, default=1) // most))


def columns(rows: Sequence[Mapping[str, float]], width: int) -> Columns:
    """Columns of a run's rows, each the mean over a block of `width` updates, placed at the block's end."""
    blocks: dict[int, list[Mapping[str, float]]] = {}
    for row in rows:
        blocks.setdefault(int(row["update"] - 1) // width, []).append(row)
    kept = [blocks[number] for number in sorted(blocks)]
    names = sorted({name for row in rows for name in row} - NOT_PLOTTED)
    return Columns(
        updates=[block[-1]["update"] for block in kept],
        steps=[block[-1]["env_steps"] for block in kept],
        seconds=[block[-1].get("system/seconds") for block in kept],
        metrics={name: [_mean(block, name) for block in kept] for name in names},
    )


def _mean(rows: Sequence[Mapping[str, float]], name: str) -> float | None:
    numbers = [row[name] for row in rows if name in row]
    return sum(numbers) / len(numbers) if numbers else None


def band(runs: Sequence[Columns], name: str) -> Band | None:
    """Mean and range of a metric over runs; None unless two runs have it at one place at least.

    A place is a number of environment steps. Runs that never logged the metric are left out. Wall time is
    the mean of the runs' times at that place.
    """
    having = [run for run in runs if any(v is not None for v in run.metrics.get(name, ()))]
    if len(having) < 2:
        return None
    values = [dict(zip(run.steps, run.metrics[name], strict=True)) for run in having]
    times = [dict(zip(run.steps, run.seconds, strict=True)) for run in having]
    found = Band(steps=[], seconds=[], mean=[], low=[], high=[])
    for step in having[0].steps:
        here = [v for column in values if (v := column.get(step)) is not None]
        if len(here) < len(having):
            continue
        clock = [t for column in times if (t := column.get(step)) is not None]
        found.steps.append(step)
        found.seconds.append(sum(clock) / len(clock) if len(clock) == len(having) else None)
        found.mean.append(sum(here) / len(here))
        found.low.append(min(here))
        found.high.append(max(here))
    return found if found.steps else None


def curves(
    runs: Sequence[Run], most: int = MOST_POINTS, groups: Groups | None = None
) -> dict[str, Any]:
    """The part of the page's data that its charts are drawn from; by default the settings make the groups."""
    groups = named_groups(runs) if groups is None else groups
    width = block_width([round(run.rows[-1]["update"]) for run in runs], most)
    table = [columns(run.rows, width) for run in runs]
    names = {name for run in table for name in run.metrics}
    counts = {
        sum(name in table[i].metrics for i in members) for _, members in groups for name in names
    }
    counts -= {0, 1, 2}  # two runs say next to nothing about an interval
    return {
        "width": width,
        "main": [name for name in MAIN if name in names],
        "names": sorted(names, key=_place),
        "pairs": PAIRS,
        "titles": {name: TITLES[name] for name in sorted(names) if name in TITLES},
        "runs": [
            {
                "updates": run.updates,
                "steps": run.steps,
                "seconds": _short(run.seconds),
                "metrics": {name: _short(column) for name, column in run.metrics.items()},
            }
            for run in table
        ],
        "groups": [
            {"label": label, "runs": list(members), "bands": _bands([table[i] for i in members])}
            for label, members in groups
        ],
        "quantiles": {count: student_quantile(count - 1) for count in sorted(counts)},
    }


def _bands(runs: Sequence[Columns]) -> dict[str, Any]:
    """Bands of every metric that has one."""
    bands = {}
    for name in sorted({name for run in runs for name in run.metrics}):
        if (found := band(runs, name)) is not None:
            bands[name] = {
                "steps": found.steps,
                "seconds": _short(found.seconds),
                "mean": _short(found.mean),
                "low": _short(found.low),
                "high": _short(found.high),
            }
    return bands


def _place(name: str) -> tuple[int, int, str]:
    group = name.split("/")[0]
    known = list(TITLES)
    return (
        GROUPS.index(group) if group in GROUPS else len(GROUPS),
        known.index(name) if name in known else len(known),
        name,
    )


def _short(numbers: Sequence[float | None]) -> list[float | None]:
    """Rounded to 5 digits: what a chart can show."""
    return [None if number is None else float(f"{number:.5g}") for number in numbers]
