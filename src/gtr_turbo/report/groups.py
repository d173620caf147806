"""Runs of one recipe: which belong together, and what to call them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gtr_turbo.report.read import Run

OF_A_RUN = ("run", "seed")
"""Settings in which runs of one recipe may differ."""

Groups = Sequence[tuple[str, Sequence[int]]]
"""Runs that are one line with a band: (label, numbers of its runs)."""

MOST_NAMED = 3
"""Settings that a label names, where the recipe's name alone does not tell groups apart; more if these do not."""


def named_groups(runs: Sequence[Run]) -> Groups:
    """The groups that the runs' settings make, with their labels."""
    groups = group_runs(runs)
    return list(zip(group_labels(runs, groups), groups, strict=True))


def group_runs(runs: Sequence[Run]) -> list[list[int]]:
    """Runs that differ in nothing but their seed (and folder), as lists of their numbers.

    A run of a seed that its group has already is a group of its own: it is no further sample for an interval.
    """
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        settings = {k: v for k, v in run.config.items() if k not in OF_A_RUN}
        key = str(sorted(flatten(settings).items())) if settings else f"only {number}"
        if any(runs[other].seed == run.seed for other in groups.get(key, ())):
            key = f"again {number}"
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def group_labels(runs: Sequence[Run], groups: Sequence[Sequence[int]]) -> list[str]:
    """A label for each group: a single run's own; else the recipe's name, and what sets the group apart."""
    several = [runs[members[0]] for members in groups if len(members) > 1]
    labels = []
    for members in groups:
        first = runs[members[0]]
        same = [run for run in several if run.name == first.name]
        if len(members) == 1:
            labels.append(first.label)
        elif len(same) == 1:
            labels.append(first.name)
        else:
            labels.append(f"{first.name} ({_apart(first, same)})")
    return labels


def _apart(run: Run, others: Sequence[Run]) -> str:
    """The settings of `run` that are not the same in all of `others`: the first, as many as tell all apart."""
    tables = [flatten(other.config) for other in others]
    own = flatten(run.config)
    names = [
        name
        for name in dict.fromkeys(name for table in tables for name in table)
        if name not in OF_A_RUN and len({table.get(name) for table in tables}) > 1
    ]
    count = MOST_NAMED
    while count < len(names) and len({_values(table, names[:count]) for table in tables}) < len(
        tables
    ):
        count += 1
    listed = [f"{name} {own.get(name, 'not set')}" for name in names[:count]]
    return ", ".join(listed + ["..."] * (len(names) > count))


def _values(table: Mapping[str, str], names: Sequence[str]) -> tuple[str | None, ...]:
    return tuple(table.get(name) for name in names)


def flatten(group: Mapping[Any, Any], above: str = "") -> dict[str, str]:
    """Settings by their dotted names, values as text."""
    flat: dict[str, str] = {}
    for key, value in group.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = as_text(value)
    return flat


def as_text(value: Any) -> str:
    """A setting's value: text as it is, anything else as JSON."""
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    )
