"""`gtr-turbo play`: watch an agent's episodes in the terminal, or save their frames."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.text import Text

from gtr_turbo.collect import EVALUATION, Envs, play, stream
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.policy.model import Policy

PRINTABLE = {"\n": " ", "\t": " "}


def printable(text: str) -> str:
    """Text safe for a terminal: control characters are shown as escapes, never obeyed."""
    return "".join(
        PRINTABLE.get(c, c) if c.isprintable() or c in PRINTABLE else repr(c)[1:-1] for c in text
    )


def watch(
    policy: Policy,
    env: EnvConfig,
    sampling: SamplingConfig,
    console: Console,
    *,
    episodes: int,
    split: str | None,
    seed: int,
    greedy: bool,
    frames: Path | None,
) -> None:
    """Play episodes one after the other, printing each turn.

    Args:
        policy: the agent.
        env: the environment.
        sampling: how replies are written.
        console: where to print.
        episodes: how many.
        split: the environment's `split`, or None.
        seed: the same deals as `gtr-turbo eval` with this seed.
        greedy: take the likeliest token.
        frames: folder for the frames as PNG; None keeps none.
    """
    envs = Envs(env, split, seed, count=1)
    generator = torch.Generator().manual_seed(stream(seed, EVALUATION))
    for number in range(episodes):
        envs.reset(0, number, stream(seed, EVALUATION, number) % 2**31)
        console.rule(f"episode {number}")
        done = False
        while not done:
            ((turn, _),) = play(
                envs, [0], policy, sampling, RolloutConfig(), generator, greedy=greedy
            )
            done = turn.done
            if frames is not None:
                frames.mkdir(parents=True, exist_ok=True)
                Image.fromarray(turn.observed.frame).save(
                    frames / f"{number:04d}-{turn.step:02d}.png"
                )
            console.print(Text(f"prompt  {printable(turn.prompt)}", style="dim"))
            console.print(Text(f"reply   {printable(turn.text)}"))
            facts = "  ".join(
                f"{name}: {'yes' if fact else 'no'}" for name, fact in turn.facts.items()
            )
            style = "green" if turn.reward > 0 else "red" if turn.reward < 0 else ""
            line = f"reward  {turn.reward:+.1f}   {facts}"
            console.print(Text(line, style=style))
        console.print(Text("success" if turn.success else "failed", style="bold"))
