"""A comparison for people: tables in a terminal, and the data of the report's section."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gtr_turbo.compare.measures import COSTS, CURVES, OVER_RUN, Measure
from gtr_turbo.compare.results import Comparison, VariantResult
from gtr_turbo.compare.statistics import TIE, Difference, Estimate
from gtr_turbo.text import printable

if TYPE_CHECKING:
    from gtr_turbo.compare import Plan

MOST_MISSING = 20
"""Missing runs that are listed; the files have all."""


def show_plan(console: Console, plan: Plan) -> None:
    """Which runs there are, and what would be done with each; no line is broken, so names can be copied."""
    what = {"finished": "taken as it is", "new": "starts"}
    jobs, say = plan.runs(), _line(console)
    hows = [what.get(job.state, f"goes on after update {job.update}") for job in jobs]
    say(f"in {plan.out}:")
    for job, how in zip(jobs, hows, strict=True):
        say(f"  {how:<{max(map(len, hows))}}  {job.folder.relative_to(plan.out)}")
    for note in plan.notes():
        say(f"note: {note}")
    left = sum(job.state != "finished" for job in jobs)
    threads = f"{plan.threads} thread{'s' * (plan.threads > 1)} each"
    say(f"{len(jobs)} runs, {left} of them to do; {plan.jobs} at once on {threads}")


def show_comparison(console: Console, comparison: Comparison) -> None:
    """The tables; the best mean of a column is bold and has a star."""
    names = comparison.measures
    splits = dict.fromkeys(
        name.split("/", 1)[1].rpartition("/")[0] for name in names if name.startswith("after/")
    )
    for split in splits:
        columns = [name for name in names if name.split("/", 1)[1].rpartition("/")[0] == split]
        shown = [n for n in columns if n.startswith(("before/", "after/"))]
        where = f" ({printable(split)})" if split != "None" else ""
        _table(console, f"success in the evaluations{where}", comparison, shown)
        wrote = [n for n in names if n.startswith(f"judge/after/{split}/student/")]
        _table(console, f"replies of the student after{where}", comparison, wrote)
    _table(console, f"curves{OVER_RUN}", comparison, [n for n in names if n.startswith("area/")])
    if comparison.target is not None:
        _target(console, comparison, comparison.target)
    _table(console, "cost", comparison, [name for name in names if name in COSTS])
    for key, results in comparison.effects.items():
        main = [n for n in names if n.startswith("after/")][:2]
        _table(console, f"effect of {key}, over the others", comparison, main, results)
    say = _line(console)
    if names:
        say(
            "Mean over seeds, its 95 % interval (Student's t); paired difference to the first row, its interval."
        )
        say(
            "* best mean. A difference whose interval holds 0 is no finding. All numbers: compare.json"
        )
    for result in comparison.missing[:MOST_MISSING]:
        say(f"missing: {result.job.name}: {result.why}")
    if len(comparison.missing) > MOST_MISSING:
        say(f"and {len(comparison.missing) - MOST_MISSING} more are missing")
    for note in comparison.notes:
        say(f"note: {note}")


def _line(console: Console) -> Any:
    return lambda text: console.print(
        printable(text), highlight=False, markup=False, soft_wrap=True
    )


def _table(
    console: Console,
    title: str,
    comparison: Comparison,
    names: Sequence[str],
    results: Sequence[VariantResult] | None = None,
) -> None:
    results = comparison.variants if results is None else results
    names = [name for name in names if any(name in result.estimates for result in results)]
    columns = []
    for name in names:
        measure = comparison.measures[name]
        best = name_of_best(results, name, measure)
        cells = [_cell(result, name, measure, best) for result in results]
        head = printable(measure.title).removesuffix(OVER_RUN).removeprefix("student, ")
        lines = [*head.split(), *(line for cell in cells for line in cell.plain.split("\n"))]
        width = max(map(len, lines))
        columns.append(("\n".join(textwrap.wrap(head, width)), width, cells))
    labels = [f"{result.label}\n{_runs(result, names)}" for result in results]
    while columns:  # numbers are never cut: what does not fit makes another table
        table, left = _new(title, labels), console.width - _label_width(labels) - 2
        shown: list[list[Text]] = []
        while columns and (not shown or columns[0][1] + 3 <= left):
            head, width, cells = columns.pop(0)
            left -= width + 3  # a space at each side, and one between
            shown.append(cells)
            table.add_column(Text(head), justify="right", no_wrap=True)
        for i, label in enumerate(labels):
            table.add_row(Text(label), *(cells[i] for cells in shown))
        console.print(table)


def _label_width(labels: Sequence[str]) -> int:
    lines = [line for label in labels for line in label.split("\n")]
    return min(24, max(map(len, [*lines, "variant"])))


def _new(title: str, labels: Sequence[str]) -> Table:
    table = Table(title=Text(title, "bold"), box=SIMPLE_HEAD, show_lines=True, show_edge=False)
    table.add_column("variant", overflow="fold", min_width=_label_width(labels))
    return table


def _runs(result: VariantResult, names: Sequence[str]) -> str:
    """On how many runs the estimates of a row rest: a seed that lacks one of its runs is in none of them."""
    counts = {result.estimates[name].runs for name in names if name in result.estimates} or {0}
    low, high = min(counts), max(counts)
    if low == result.planned:
        return f"{low} run{'s' * (low > 1)}"
    return f"{low}{f' to {high}' if low < high else ''} of {result.planned} runs"


def name_of_best(results: Sequence[VariantResult], name: str, measure: Measure) -> str | None:
    """Label of the variant with the best mean; None if it is alone or shares it, or neither end is better."""
    means = {r.label: r.estimates[name].mean for r in results if name in r.estimates}
    if measure.better is None or len(means) < 2:
        return None
    best = (max if measure.better == "higher" else min)(means.values())
    first, *others = [
        label for label, mean in means.items() if math.isclose(mean, best, rel_tol=TIE, abs_tol=TIE)
    ]
    return None if others else first


def _cell(result: VariantResult, name: str, measure: Measure, best: str | None) -> Text:
    number = result.estimates.get(name)
    if number is None:
        return Text("-")
    first = result.label == best
    text = Text(f"{'* ' if first else ''}{amount(number.mean, measure.unit)}", style="bold")
    text.append(f"\n{_interval(number, measure)}", style="not bold")
    gap = result.differences.get(name)
    if gap is not None:
        same = gap.above == gap.below == 0
        text.append(f"\n{'the same' if same else change(gap.mean, measure.unit)}", "cyan not bold")
        if gap.pairs < number.runs:
            text.append(f", {gap.pairs} pair{'s' * (gap.pairs > 1)}", "cyan not bold")
        if not same:
            text.append(f"\n{_interval(gap, measure)}", "cyan not bold")
    return text


def _interval(number: Estimate | Difference, measure: Measure) -> str:
    if (ends := _ends(number, measure)) is None:
        return "one seed" if number.seeds == 1 else "no spread"
    write = amount if isinstance(number, Estimate) else change
    low, high = (write(end, measure.unit, short=True) for end in ends)
    return f"{low} to {high}"


def _ends(number: Estimate | Difference, measure: Measure) -> tuple[float, float] | None:
    """Student's interval, cut to what the measure can be."""
    if number.t_interval is None or isinstance(number, Difference) or measure.signed:
        return number.t_interval
    low, high = number.t_interval
    return max(low, 0.0), min(high, 1.0) if measure.unit == "fraction" else high


def amount(value: float, unit: str, *, short: bool = False) -> str:
    """A number with its unit; `short` for the ends of an interval."""
    if unit == "fraction":
        return f"{100 * value:z.1f}" + ("" if short else " %")
    if unit == "dollars":
        return f"{value:.2f}" + ("" if short else " $")
    digits = 1 if abs(value) < 100 else 0
    return f"{value:,.{digits}f}" + ("" if short else {"seconds": " s", "MB": " MB"}.get(unit, ""))


def change(value: float, unit: str, *, short: bool = False) -> str:
    """A difference with its sign, if it does not round to 0; of fractions in percentage points."""
    text = amount(abs(value), unit, short=short).replace(" %", "")
    sign = "-" if value < 0 else "+"
    return f"{sign if any(char in '123456789' for char in text) else ''}{text}"


def _target(console: Console, comparison: Comparison, target: float) -> None:
    title = f"reaching {amount(target, 'fraction')} ({_target_on(comparison)})"
    table = _new(title, [result.label for result in comparison.variants])
    table.add_column("seeds that reached it", justify="right")
    table.add_column("steps, median", justify="right")
    for row in _reached(comparison.variants):
        steps = "-" if row["steps"] is None else f"{row['steps']:,.0f}"
        table.add_row(Text(row["label"]), f"{row['reached']} of {row['seeds']}", steps)
    console.print(table)


def _target_on(comparison: Comparison) -> str:
    judged = any(result.judged for result in comparison.variants)
    return CURVES[comparison.target_curve] if judged else "no run to judge"


def _reached(results: Sequence[VariantResult]) -> list[dict[str, Any]]:
    return [
        {"label": r.label, "reached": r.reached, "seeds": r.judged, "steps": r.median_steps}
        for r in results
        if r.reached is not None
    ]


def page_data(comparison: Comparison, name: str) -> dict[str, Any]:
    """The section of the report.

    Args:
        comparison: the numbers.
        name: of the recipe, for the title.
    """
    shown = [result for result in comparison.variants if result.finished]
    groups = {result.label: number for number, result in enumerate(shown)}
    panels = [
        _panel(comparison, comparison.variants, measure, groups)
        for measure in comparison.measures
        if not measure.startswith("target/")
    ]
    for key, results in comparison.effects.items():
        for measure in [m for m in comparison.measures if m.startswith("after/")][:2]:
            panel = _panel(comparison, results, measure, {})
            about = f"by {key}, over the other settings; differences are to {results[0].label}"
            panels.append(panel | {"main": True, "about": about})
    about = (
        f"({_target_on(comparison)}). Of finished runs; the median counts those that did not reach it as "
        "later than all others."
    )
    rows = _reached(comparison.variants)
    target = {"success": comparison.target, "about": about, "rows": rows} if rows else None
    return {
        "title": f"GTR-Turbo comparison: {name}",
        "base": comparison.variants[0].label,
        "missing": [f"{result.job.name}: {result.why}" for result in comparison.missing],
        "panels": [panel for panel in panels if any(r["mean"] is not None for r in panel["rows"])],
        "target": target,
    }


def _panel(
    comparison: Comparison, results: Sequence[VariantResult], name: str, groups: Mapping[str, int]
) -> dict[str, Any]:
    """A measure: a row for each variant."""
    measure = comparison.measures[name]
    kind, _, rest = name.partition("/")
    split = rest.rpartition("/")[0] if kind in ("before", "after") else ""
    if kind == "judge":
        split = rest.removeprefix("after/").rsplit("/", 2)[0]
    best = name_of_best(results, name, measure)
    return {
        "title": measure.title[:1].upper() + measure.title[1:],
        "about": f"{'of turns' if kind == 'judge' else 'success'} on {split}"
        if split not in ("", "None")
        else "",
        "unit": measure.unit,
        "main": kind == "after" or name == "area/rollout/success",
        "rows": [
            {
                "label": result.label,
                "group": groups.get(result.label),
                "planned": result.planned,
                "best": result.label == best,
                "points": _points(comparison, result.label, name),
                "runs": number.runs if number else 0,
                **_numbers(number, measure),
                "difference": gap
                and {
                    "above": gap.above,
                    "below": gap.below,
                    "pairs": gap.pairs,
                    **_numbers(gap, measure),
                },
            }
            for result in results
            for number, gap in [(result.estimates.get(name), result.differences.get(name))]
        ],
    }


def _points(comparison: Comparison, label: str, name: str) -> list[float]:
    """The single runs of a variant; none for a setting's value over several variants."""
    runs = [r for r in comparison.runs if r.job.variant.label == label]
    return [r.values[name] for r in runs if name in r.values]


def _numbers(number: Estimate | Difference | None, measure: Measure) -> dict[str, float | None]:
    if number is None:
        return {"seeds": 0, "mean": None, "low": None, "high": None}
    low, high = _ends(number, measure) or (None, None)
    return {"seeds": number.seeds, "mean": number.mean, "low": low, "high": high}
