"""`gtr-turbo play`: watch an agent's episodes in the terminal, or play them by hand."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.color import Color
from rich.columns import Columns
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style
from rich.text import Text

from gtr_turbo.collect import EVALUATION, Envs, play, stream
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.policy.model import Policy
from gtr_turbo.text import printable

MAX_COLUMNS = 160
"""Columns of a frame in the terminal, at most."""


def half_blocks(frame: np.ndarray, columns: int) -> Segments:
    """A frame as coloured characters, each an upper pixel (its foreground) and a lower one.

    Args:
        frame: uint8 (H, W, 3).
        columns: pixels in a row of characters; the height follows, so that pixels are about square.
    """
    height = 2 * max(1, round(columns * frame.shape[0] / frame.shape[1] / 2))
    image = Image.fromarray(frame).resize((columns, height), Image.Resampling.BOX)
    pixels, made = np.asarray(image).tolist(), []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        for above, below in zip(upper, lower, strict=True):
            style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
            made.append(Segment("▀", style))
        made.append(Segment.line())
    return Segments(made)


def _look(console: Console, frame: np.ndarray, *, file: Path | None, show: bool) -> None:
    """Save a frame, draw it, or both."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(frame).save(file)
    if show and console.color_system is None:
        console.print(Text("frame   not shown: this terminal has no colours", style="dim"))
    elif show:
        console.print(half_blocks(frame, min(console.width, MAX_COLUMNS, frame.shape[1])))


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
    show: bool = False,
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
        show: draw them too.
    """
    generator = torch.Generator().manual_seed(stream(seed, EVALUATION))
    with policy.whole(), Envs(env, split, seed, count=1) as envs:
        for number in range(episodes):
            envs.reset(0, number, stream(seed, EVALUATION, number) % 2**31)
            console.rule(f"episode {number}")
            done = False
            while not done:
                ((turn, _),) = play(
                    envs, [0], policy, sampling, RolloutConfig(), generator, greedy=greedy
                )
                done = turn.done
                file = frames / f"{number:04d}-{turn.step:02d}.png" if frames is not None else None
                _look(console, turn.observed.frame, file=file, show=show)
                console.print(Text(f"prompt  {printable(turn.prompt)}", style="dim"))
                console.print(Text(f"reply   {printable(turn.text)}"))
                facts = "  ".join(
                    f"{name}: {'yes' if fact else 'no'}" for name, fact in turn.facts.items()
                )
                style = "green" if turn.reward > 0 else "red" if turn.reward < 0 else ""
                line = f"reward  {turn.reward:+.1f}   {facts}"
                console.print(Text(line, style=style))
            console.print(Text("success" if turn.success else "failed", style="bold"))


def by_hand(
    env: EnvConfig,
    console: Console,
    *,
    episodes: int,
    split: str | None,
    seed: int,
    frames: Path | None,
    show: bool,
) -> None:
    """Let a person play episodes, with what an agent is told: the prompt, the frame, the legal actions.

    Args:
        env: the environment.
        console: where to print; answers are read from standard input.
        episodes: how many.
        split: the environment's `split`, or None.
        seed: the same deals as `gtr-turbo eval` with this seed.
        frames: folder for the frames as PNG; None makes a temporary one, which stays.
        show: draw the frames too.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="backslashreplace")
    frames = frames or Path(tempfile.mkdtemp(prefix="gtr-turbo-"))
    finished = won = 0
    with Envs(env, split, seed, count=1) as envs:
        for number in range(episodes):
            envs.reset(0, number, stream(seed, EVALUATION, number) % 2**31)
            console.rule(f"episode {number}")
            success = None
            while success is None:
                file = frames / f"{number:04d}-{len(envs.actions[0]):02d}.png"
                for line in envs.observations[0]["prompt"].split("\n"):
                    console.print(Text(printable(line)))
                _look(console, envs.observations[0]["image"], file=file, show=show)
                console.print(Text(f"frame   {printable(str(file))}", style="dim"), soft_wrap=True)
                action = _answer(console, envs.infos[0].get("actions"))
                if action is None:
                    console.print(f"stopped: {won} of {finished} finished episodes succeeded")
                    return
                outcome = envs.step(0, action)
                success = outcome.success
                style = "green" if outcome.reward > 0 else "red" if outcome.reward < 0 else ""
                console.print(Text(f"reward  {outcome.reward:+.1f}", style=style))
            finished, won = finished + 1, won + success
            turns = len(envs.actions[0])
            how = "success" if success else "failed"
            line = f"{how} after {turns} turn(s), return {outcome.episode_return:+.1f}"
            console.print(Text(line, style="bold"))
        console.print(f"{won} of {finished} episodes succeeded")


def _answer(console: Console, actions: Sequence[str] | None) -> str | None:
    """The action that a person chooses by its number or its text; None at `quit` or the end of input.

    Actions have no numbers where one of them is a number itself. Where none are listed, any text is one.
    """
    actions = actions or ()
    known, shown = {action.strip(): action for action in actions}, list(actions)
    if not any(action.isdecimal() for action in known):
        known = {str(n): action for n, action in enumerate(actions, 1)} | known
        shown = [f"{n}  {action}" for n, action in enumerate(actions, 1)]
    if shown:
        console.print(Columns([Text(printable(text)) for text in shown], padding=(0, 3)))
    while True:
        try:
            text = console.input(Text("action (or quit): ")).strip()
        except EOFError:
            console.print()
            return None
        if text in known:
            return known[text]
        if text == "quit":
            return None
        if not actions and text:
            return text
        refused = f"not an action: {printable(text)}; give one of those above, or quit"
        console.print(Text(refused, style="red"))
