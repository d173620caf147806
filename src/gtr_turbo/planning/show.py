"""A plan in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gtr_turbo.planning.memory import USED
from gtr_turbo.planning.plan import Plan


def size(number: float) -> str:
    """Bytes in GB or MB (10^9, 10^6)."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e8 else f"{number / 1e6:,.2f} MB"


def show(console: Console, plan: Plan) -> None:
    """Memory by part, time by part, and what to change."""
    on = f"{plan.gpus} GPU(s) of {plan.size_gb:g} GB" if plan.size_gb else "a CPU"
    memory, phases = Table(title=escape(f"{plan.config.name} on {on}")), plan.memory.phases
    memory.title_style = "bold"
    memory.add_column("memory, of each GPU" if plan.size_gb else "memory")
    memory.add_column("", justify="right")
    groups = (
        ("always", plan.memory.always),
        (f"update, {plan.memory.microbatch} turns at once", plan.memory.update),
        ("optimizer step", plan.memory.step),
        ("scoring", plan.memory.scoring),
        ("replies", plan.memory.generation),
    )
    for title, parts in groups:
        memory.add_row(f"[bold]{escape(title)}", size(sum(parts.values())))
        for name, number in parts.items():
            if number:
                memory.add_row(f"  {name}", size(number))
    peak = max(phases, key=lambda name: phases[name])
    verdict = "" if not plan.size_gb else ", fits" if plan.fits else ", DOES NOT FIT"
    room = f" of {USED * plan.size_gb:.1f} GB planned with" if plan.size_gb else ""
    memory.add_row(
        f"[bold]peak (in phase: {peak}{verdict})",
        f"{size(plan.memory.peak)}{room}",
        end_section=True,
    )
    for name, number in plan.memory.host.items():
        memory.add_row(f"host, each process: {name}", size(number))
    memory.add_row("host: history of checkpoints", size(plan.memory.history))
    memory.add_row("[bold]host of a node", size(plan.host_bytes))
    console.print(memory)
    kind = "measured rates" if plan.rates.measured else "ESTIMATES"
    times = Table(title=f"time of an update ({kind})", title_style="bold")
    times.add_column("")
    times.add_column("seconds", justify="right")
    for name, seconds in plan.seconds.items():
        if seconds:
            times.add_row(name, f"{seconds:,.1f}")
    times.add_row("[bold]sum", f"{sum(plan.seconds.values()):,.1f}")
    console.print(times)
    cost = "" if plan.dollars is None else f", {plan.dollars:,.0f} dollars"
    lengths = plan.lengths
    lines = [
        f"{plan.parameters:,} parameters, {plan.trained:,} trained; a turn has {lengths.prompt} tokens of prompt "
        f"({lengths.image} of the image) and {lengths.reply} of reply",
        f"{plan.config.num_updates} updates: {plan.hours:,.1f} hours{cost}",
        *(f"assumed: {text}" for text in plan.assumptions),
        *(f"change: {text}" for text in plan.advice),
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
