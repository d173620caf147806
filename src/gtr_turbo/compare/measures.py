"""What is measured of a run: its evaluations, its learning curves, what it cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gtr_turbo.compare.statistics import area, first_reach
from gtr_turbo.report.read import Run, finite

Better = Literal["higher", "lower"] | None
Curve = tuple[list[float], list[float]]
"""Environment steps and values, where the metric was logged."""

STAGES = (
    ("before", "student", "before"),
    ("after", "student", "student after"),
    ("after", "teacher", "merge after"),
)
CURVES = {
    "rollout/success": "success while training",
    "eval/student_success": "student, fixed deals",
    "eval/teacher_success": "merge, fixed deals",
    "eval/merge_minus_student": "merge - student, fixed deals",
}
"""Curves whose area is taken; the last is the difference of the two before it."""

OVER_RUN = ", mean over the run"
"""Ends the titles of areas."""

WIDE = 0.9
"""Part of the range of all curves that the common one covers at least, or a note says so."""

WINDOW = 3
"""Values of a curve that are averaged before they count as having reached the target."""


@dataclass(frozen=True, slots=True)
class Measure:
    """What a number is."""

    title: str
    unit: Literal["fraction", "steps", "seconds", "MB", "dollars"]
    better: Better = None
    """Which end is better; None where neither is."""
    signed: bool = False
    """Whether it can be negative."""


COSTS = {
    "cost/seconds": Measure("wall time", "seconds", "lower"),
    "cost/cpu_seconds": Measure("CPU time", "seconds", "lower"),
    "cost/peak_rss_mb": Measure("peak memory", "MB", "lower"),
    "cost/dollars": Measure("paid", "dollars", "lower"),
}


def known_measures(splits: Sequence[str], replies: Iterable[str] = ()) -> dict[str, Measure]:
    """Every measure that runs with these splits and names of `replies` can have, in the order of tables."""
    found: dict[str, Measure] = {}
    for split in splits:
        for when, which, title in STAGES:
            better: Better = "higher" if when == "after" else None
            found[f"{when}/{split}/{which}"] = Measure(title, "fraction", better)
        found[f"after/{split}/merge_minus_student"] = Measure(
            "merge - student", "fraction", signed=True
        )
    for name, title in CURVES.items():
        gap = name.endswith("minus_student")
        found[f"area/{name}"] = Measure(
            f"{title}{OVER_RUN}", "fraction", None if gap else "higher", signed=gap
        )
    for name in replies:
        who, fact = _player_and_fact(name)
        found[name] = Measure(f"{who}, {'valid replies' if fact == 'valid' else fact}", "fraction")
    found["target/steps"] = Measure("steps to the target", "steps", "lower")
    found["target/seconds"] = Measure("time to the target", "seconds", "lower")
    return found | COSTS


def _player_and_fact(name: str) -> tuple[str, str]:
    """Of `judge/after/SPLIT/student/FACT` (`teacher`: the merge); split and fact may hold slashes."""
    ends = {which: name.rfind(f"/{which}/") for which in ("student", "teacher")}
    which = max(ends, key=lambda one: ends[one])
    fact = name[ends[which] + len(which) + 2 :]
    return ("merge" if which == "teacher" else which), fact


def evaluations(run: Run) -> dict[str, float]:
    """Success by `when/split/which`, and the merge minus the student."""
    stored = run.summary.get("evaluations")
    found: dict[str, float] = {}
    for key, evaluation in stored.items() if isinstance(stored, Mapping) else ():
        success = finite(evaluation.get("success")) if isinstance(evaluation, Mapping) else None
        if success is not None and str(key).count("/") >= 2:
            found[str(key)] = success
    for key in list(found):
        student = key.removesuffix("teacher") + "student"
        if key.endswith("/teacher") and student in found:
            found[key.removesuffix("teacher") + "merge_minus_student"] = found[key] - found[student]
    return found


def replies(run: Run) -> dict[str, float]:
    """Valid replies and each fact of the evaluations after training, by `judge/after/split/which/fact`."""
    stored = run.summary.get("evaluations")
    found: dict[str, float] = {}
    for key, evaluation in stored.items() if isinstance(stored, Mapping) else ():
        if isinstance(evaluation, Mapping) and str(key).startswith("after/"):
            facts = evaluation.get("facts")
            judged = facts if isinstance(facts, Mapping) else {}
            for name, value in {"valid": evaluation.get("valid"), **judged}.items():
                if (share := finite(value)) is not None:
                    found[f"judge/{key}/{name}"] = share
    return found


def splits(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """The splits that were evaluated, in the order of the runs' own."""
    names = [
        name.partition("/")[2].rpartition("/")[0]
        for values in runs
        for name in values
        if name.startswith(("before/", "after/"))
    ]
    return list(dict.fromkeys(names))


def curve(run: Run, name: str) -> Curve:
    """A metric over environment steps; empty if the run did not log it."""
    if name == "eval/merge_minus_student":
        both = [
            row for row in run.rows if {"eval/student_success", "eval/teacher_success"} <= set(row)
        ]
        gaps = [row["eval/teacher_success"] - row["eval/student_success"] for row in both]
        return [row["env_steps"] for row in both], gaps
    rows = [row for row in run.rows if name in row]
    return [row["env_steps"] for row in rows], [row[name] for row in rows]


def areas(curves: Sequence[Curve]) -> list[float | None]:
    """Mean heights of curves of different runs, over the range of steps that all of them have."""
    logged = [steps for steps, _ in curves if steps]
    if not logged:
        return [None] * len(curves)
    low, high = _common(logged)
    return [area(steps, values, low, high) for steps, values in curves]


def narrowed(name: str, curves: Sequence[Curve]) -> str | None:
    """A note, if the range of steps that all curves of a metric have is less than 90 % of what they span."""
    logged = [steps for steps, _ in curves if steps]
    if not logged:
        return None
    (low, high), first = _common(logged), min(steps[0] for steps in logged)
    last = max(steps[-1] for steps in logged)
    if high - low >= WIDE * (last - first):
        return None
    mean = f"{CURVES[name]}{OVER_RUN}"
    if high < low:
        return f"{mean}: there is none, as no environment steps are common to all runs that log it"
    return (
        f"{mean}: only over environment steps {low:,.0f} to {high:,.0f}, which all runs that log it have, "
        f"of {first:,.0f} to {last:,.0f}"
    )


def _common(logged: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The first and the last step that all curves have."""
    return max(steps[0] for steps in logged), min(steps[-1] for steps in logged)


def target_curve(runs: Sequence[Run]) -> str:
    """On what all runs reach a target: success on fixed deals if each can be judged by it, else while training."""
    name = "eval/student_success"
    return name if all(judged(run, name) for run in runs) else "rollout/success"


def judged(run: Run, name: str) -> bool:
    """Whether a run logged a metric often enough to say when it reached a target."""
    return sum(name in row for row in run.rows) >= WINDOW


def reach(run: Run, name: str, target: float) -> dict[str, float]:
    """Steps and seconds until the metric `name` reaches the target; empty if it did not."""
    rows = [row for row in run.rows if name in row]
    found = first_reach([row[name] for row in rows], target, WINDOW)
    if found is None:
        return {}
    values = {"target/steps": rows[found]["env_steps"]}
    if "system/seconds" in rows[found]:
        values["target/seconds"] = rows[found]["system/seconds"]
    return values


def has_all_rows(run: Run) -> bool:
    """Whether a finished run has the row of each of its updates, up to the steps that its summary names."""
    updates = [row["update"] for row in run.rows]
    whole = updates == list(range(1, len(updates) + 1))
    return whole and run.rows[-1]["env_steps"] == run.summary.get("env_steps")


def costs(run: Run) -> dict[str, float]:
    """What the run took: of its summary, and the last values of what its metrics count over interruptions."""

    def last(name: str) -> float | None:
        return next((row[name] for row in reversed(run.rows) if name in row), None)

    found = {
        "cost/seconds": finite(run.summary.get("seconds")),
        "cost/cpu_seconds": last("system/cpu_seconds"),
        "cost/peak_rss_mb": finite(run.summary.get("peak_rss_mb")),
        "cost/dollars": last("external/dollars"),
    }
    return {name: number for name, number in found.items() if number is not None}
