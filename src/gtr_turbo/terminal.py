"""What a run looks like in a terminal: a live panel, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gtr_turbo.config import TrainConfig
from gtr_turbo.text import printable

if TYPE_CHECKING:
    from gtr_turbo.merging import Report

BARS = "▁▂▃▄▅▆▇█"
SHOWN = (
    ("success", "rollout/success", "{:.1%}"),
    ("return", "rollout/return", "{:+.2f}"),
    ("valid replies", "rollout/valid", "{:.1%}"),
    ("right plans", "judge/plan", "{:.1%}"),
    ("action follows thought", "judge/agreement", "{:.1%}"),
    ("thought tokens", "thought/tokens", "{:.1f}"),
    ("distinct thoughts", "thought/distinct", "{:.2f}"),
    ("thoughts of other states", "thought/template_share", "{:.1%}"),
    ("self-BLEU of thoughts", "thought/self_bleu", "{:.2f}"),
    ("token entropy", "ppo/entropy", "{:.3f}"),
    ("KL to the teacher", "teacher/kl", "{:.4f}"),
    ("teacher's age", "teacher/age", "{:.0f}"),
    ("distance from the start", "teacher/student_distance", "{:.2f}"),
    ("critic explains", "critic/explained_variance", "{:.1%}"),
    ("turns not corrected", "external/skipped", "{:.0f}"),
    ("dollars so far", "external/dollars", "{:.2f}"),
    ("student, fixed deals", "eval/student_success", "{:.1%}"),
    ("merge, fixed deals", "eval/teacher_success", "{:.1%}"),
)


def sparkline(values: list[float], width: int = 32) -> str:
    """A row of block characters, the newest `width` values, scaled to their range."""
    values = values[-width:]
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(BARS[min(7, int(8 * (value - low) / span))] for value in values)


def percent(value: float | None, interval: Any = None) -> str:
    """`43.2 %`, its interval on a second line, or a dash."""
    if value is None:
        return "-"
    text = f"{100 * value:.1f} %"
    return f"{text}\n{100 * interval[0]:.1f} - {100 * interval[1]:.1f}" if interval else text


class TerminalView:
    """Shows progress, time left and the metrics that tell learning from collapse.

    Use as a context manager around `trainer.train`.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self.live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("starting", total=1)
        self._history: dict[str, list[float]] = {}
        self._title = "GTR-Turbo"
        self._said = 0.0
        self._steps = 1
        self._live = Live(
            self._render(), console=self.console, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> TerminalView:
        if self.live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self._live.stop()

    def _render(self) -> Panel:
        table = Table(box=None, padding=(0, 2), show_header=False)
        for label, name, form in SHOWN:
            values = self._history.get(name)
            if values:
                table.add_row(
                    label,
                    Text(form.format(values[-1]), style="bold"),
                    Text(sparkline(values), "cyan"),
                )
        return Panel(Group(self._progress, table), title=escape(self._title), border_style="green")

    def _show(self) -> None:
        if self.live:
            self._live.update(self._render())

    def started(self, config: TrainConfig, run: Path, update: int) -> None:
        """Name the run; the bar counts environment steps."""
        guidance = (
            "no guidance" if config.guidance.kind == "none" else f"{config.guidance.kind} guidance"
        )
        self._title = f"GTR-Turbo · {config.env.id} · {guidance} · seed {config.seed}"
        self._steps = config.num_updates * config.turns_per_update
        self._progress.reset(self._task)
        self._count_steps(update * config.turns_per_update)
        if not self.live:
            self.console.print(f"{self._title} · {run}", soft_wrap=True, markup=False)
        self._show()

    def _count_steps(self, done: float) -> None:
        self._progress.update(
            self._task, description="environment steps", completed=done, total=self._steps
        )

    def evaluating(self, what: str, done: int, episodes: int) -> None:
        """Show an evaluation's progress."""
        self._progress.update(
            self._task, description=escape(f"evaluating {what}"), completed=done, total=episodes
        )
        if not self.live and (done == episodes or time.monotonic() - self._said > 30):
            self._said = time.monotonic()
            self.console.print(
                f"evaluating {what}: {done}/{episodes} episodes", soft_wrap=True, markup=False
            )
        self._show()

    def updated(self, row: Mapping[str, float]) -> None:
        """Show an update's metrics."""
        for name, number in row.items():
            self._history.setdefault(name, []).append(number)
        self._count_steps(row["env_steps"])
        if not self.live:
            parts = [
                f"{label} {form.format(row[name])}"
                for label, name, form in SHOWN[:5]
                if name in row
            ]
            kl = f"KL {row['teacher/kl']:.4f}" if "teacher/kl" in row else ""
            if "eval/student_success" in row:
                student, merge = row["eval/student_success"], row["eval/teacher_success"]
                kl += f"  student {student:.1%}, merge {merge:.1%} on fixed deals"
            line = f"update {row['update']:>4.0f}  step {row['env_steps']:>6.0f}  " + "  ".join(
                [*parts, kl]
            )
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        self._show()

    def noted(self, text: str) -> None:
        """Print a line on standard error; with a panel, above it."""
        console = self.console if self.live else Console(stderr=True)
        console.print(f"note: {printable(text)}", soft_wrap=True, markup=False, highlight=False)


def _other_number(evaluation: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """On how many episodes an evaluation rests, if not on the summary's: another number was given on resume."""
    number = evaluation.get("episodes", summary["episodes"])
    return "" if number == summary["episodes"] else f" of {number} episodes"


def show_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """The table at the end of a run."""
    title = printable(f"{summary['name']} · seed {summary['seed']}")
    table = Table(title=escape(title), title_style="bold")
    table.add_column("success (95 % interval)")
    table.add_column("before", justify="right")
    table.add_column("student after", justify="right")
    table.add_column("merge after", justify="right")
    evaluations = summary["evaluations"]
    splits = dict.fromkeys(key.partition("/")[2].rpartition("/")[0] for key in evaluations)
    for split in splits:
        cells = [evaluations.get(f"{key}", {}) for key in (
            f"before/{split}/student", f"after/{split}/student", f"after/{split}/teacher"
        )]  # fmt: skip
        shown = [
            percent(cell.get("success"), cell.get("interval")) + _other_number(cell, summary)
            for cell in cells
        ]
        name = f"{split}, " if split != "None" else ""
        table.add_row(escape(printable(f"{name}{summary['episodes']} episodes")), *shown)
    console.print(table)
    student, merge = summary["success_after"], summary["success_merge"]
    if student is not None and merge is not None:
        better = "the merge" if merge > student else "the student" if student > merge else "neither"
        console.print(f"Better by the numbers: {better}. Both are loadable:", highlight=False)
    for which in ("student", "teacher"):
        console.print(f"  {which}  {summary[which]}", soft_wrap=True, highlight=False, markup=False)
    console.print(
        f"{summary['env_steps']} environment steps in {summary['seconds']:.0f} s, "
        f"peak memory {summary['peak_rss_mb']:.0f} MB",
        highlight=False,
    )


def show_evaluation(console: Console, found: Mapping[str, Any]) -> None:
    """The table of `gtr-turbo eval`: a row for each measure, a column for each player.

    Below a success stands its 95 % interval.

    Args:
        console: where to print.
        found: what `--json` prints.
    """
    players = {"agent": found} if "success" in found else {}
    players |= found.get("baselines", {})
    some = next(iter(players.values()))
    how = "greedy" if found["greedy"] else "sampled"
    split = found["split"] or "no split"
    title = f"{found['env']} ({split}), {some['episodes']} episodes"
    title = f"{title}, {how}" if "agent" in players else title
    table = Table(title=escape(printable(title)), title_style="bold")
    table.add_column()
    for name in players:
        table.add_column(name, justify="right")

    def row(label: str, cells: list[str]) -> None:
        if any(cell != "-" for cell in cells):
            table.add_row(escape(printable(label)), *cells)

    def measured(shown: Mapping[str, Any] | None) -> str:
        return percent(shown["success"], shown["interval"]) if shown else "-"

    row("success", [measured(player) for player in players.values()])
    for name, group in some["groups"].items():
        of_group = [measured(player["groups"].get(name)) for player in players.values()]
        row(f"{name} ({group['episodes']})", of_group)
    row("agent minus it", [measured(player.get("difference")) for player in players.values()])
    for key, label in (("goal_conditions", "goal conditions met"), ("valid", "valid replies")):
        row(label, [percent(player[key]) for player in players.values()])
    row("return", [f"{player['return']:.3f}" for player in players.values()])
    for name in dict.fromkeys(name for player in players.values() for name in player["facts"]):
        row(name, [percent(player["facts"].get(name)) for player in players.values()])
    console.print(table)


class MergeView:
    """A bar of bytes and time left, where there is a terminal."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console()
        self._bar = Progress(
            TextColumn("merging"),
            BarColumn(bar_width=None),
            DownloadColumn(binary_units=True),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("merging", total=None)

    def __enter__(self) -> MergeView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def progress(self, done: int, total: int) -> None:
        """Takes bytes read, and bytes to read."""
        self._bar.update(self._task, completed=done, total=total)


def show_merge(console: Console, report: Report) -> None:
    """What a merge did, or, after a dry run, would do."""
    plan, done = report.plan, bool(report.manifest)
    settings = plan.settings
    table = Table(title="merged" if done else "plan (nothing was written)", show_header=False)
    table.title_style = "bold"
    table.add_column()
    table.add_column(overflow="fold")
    method = [settings["method"]]
    if settings["density"] < 1:
        method.append(f"density {settings['density']}")
    if settings["lambda"] != 1:
        method.append(f"lambda {settings['lambda']}")
    if settings["compat"] or plan.form == "factors":
        method.append("as PEFT defines it")
    table.add_row("method", ", ".join(method))
    for number, (name, weight) in enumerate(zip(plan.inputs, settings["weights"], strict=True)):
        table.add_row("" if number else "checkpoints", f"{weight:.4g} x {escape(name)}")
    table.add_row("base", escape(plan.base or "none"))
    rank = f", rank {settings['rank']}" if settings["rank"] else ""
    table.add_row("result", f"{escape(plan.out)} ({plan.kind}, {plan.form}{rank})")
    table.add_row("tensors", f"{plan.tensors}, of which {plan.merged} merged")
    table.add_row("reads", f"{plan.read_bytes / 2**20:,.1f} MiB")
    table.add_row("writes", f"{plan.disk_bytes / 2**20:,.1f} MiB")
    table.add_row("memory", f"at most {plan.memory_bytes / 2**20:,.0f} MiB beside the program")
    if plan.cached:
        table.add_row("thresholds", f"known for {plan.cached} of {len(plan.inputs)} checkpoints")
    tensors = report.manifest.get("tensors", {}).values()
    if lost := [lines["energy_lost"] for lines in tensors if "energy_lost" in lines]:
        table.add_row(
            "squared norm lost", f"{sum(lost) / len(lost):.2%} on average, {max(lost):.2%} at most"
        )
    if done:
        table.add_row("time", f"{report.seconds:.1f} s")
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
