"""What a run reports: metrics of an update, its turns, and the files they go to.

Every name is explained in docs/metrics.md; a test compares.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gtr_turbo import signals
from gtr_turbo.checkpoint import write_atomically
from gtr_turbo.turns.turn import Turn


class JsonlWriter:
    """`metrics.jsonl`: a JSON object a line; on the disk after each, so that no checkpoint outlasts its row."""

    def __init__(self, path: Path, keep_until: int) -> None:
        """Append to `path` after dropping rows of updates beyond `keep_until` (those are made again)."""
        if path.exists():
            rows = [
                line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()
            ]
            kept = [line for line in rows if _update_of(line) <= keep_until]
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._path = path

    def write(self, row: Mapping[str, float]) -> None:
        """Append one line."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(dict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _update_of(line: str) -> float:
    try:
        return float(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut by a crash


def rollout_metrics(turns: Sequence[Turn], *, seed: int) -> dict[str, float]:
    """The `rollout`, `thought` and `judge` groups, from the turns of an update.

    Args:
        turns: of the update.
        seed: of the thoughts drawn for `thought/self_bleu`.
    """
    ended = [turn for turn in turns if turn.done]
    valid = [turn for turn in turns if turn.valid]
    metrics = {
        "rollout/episodes": float(len(ended)),
        "rollout/reward": _mean([turn.reward for turn in turns]),
        "rollout/valid": len(valid) / len(turns),
        "rollout/legal": _mean([turn.legal for turn in turns]),
        "rollout/truncated": _mean([turn.truncated for turn in turns]),
        "rollout/response_tokens": _mean([len(turn.reply.response_ids) for turn in turns]),
    }
    if ended:
        metrics["rollout/success"] = _mean([bool(turn.success) for turn in ended])
        metrics["rollout/return"] = _mean([turn.episode_return or 0.0 for turn in ended])
        metrics["rollout/episode_turns"] = _mean([turn.step + 1 for turn in ended])
    if valid:
        metrics |= thought_metrics(valid, seed=seed)
        metrics["thought/tokens"] = _mean([turn.thought_tokens for turn in valid])
        metrics["thought/surprise"] = _mean(
            [
                -float(turn.reply.logprobs[turn.thought_span].mean())
                for turn in valid
                if turn.thought_tokens
            ]
        )
    for name in sorted({name for turn in turns for name in turn.facts}):
        metrics[f"judge/{name}"] = _mean([turn.facts[name] for turn in turns if name in turn.facts])
    return metrics


def thought_metrics(turns: Sequence[Turn], *, seed: int) -> dict[str, float]:
    """How thoughts repeat over states, from valid turns; a state is a prompt with its frame."""
    thoughts = [_thought(turn) for turn in turns]
    states = [(turn.prompt, turn.observed.frame.tobytes()) for turn in turns]
    metrics = {
        "thought/distinct": signals.distinct_share(thoughts, states),
        "thought/template_share": signals.template_share(thoughts, states),
        "thought/top_template": signals.top_template(thoughts, states),
    }
    first = dict(zip(reversed(states), reversed(thoughts), strict=True))  # one thought a state
    if (bleu := signals.self_bleu(list(first.values()), seed=seed)) is not None:
        metrics["thought/self_bleu"] = bleu
    return metrics


def _thought(turn: Turn) -> str:
    """The text under "thoughts"; in an environment without that key, all that comes before the action."""
    if "thoughts" in turn.fields:
        return str(turn.fields["thoughts"])
    return json.dumps({key: value for key, value in turn.fields.items() if key != "action"})


def _mean(values: Sequence[float]) -> float:
    return float(sum(values)) / len(values) if values else 0.0


def peak_rss_mb() -> float:
    """The largest resident set of this process so far, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, Linux KiB


class Spent:
    """What a run has cost: wall-clock seconds, and CPU seconds of this process over all its threads."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def before(self, seconds: float, cpu_seconds: float) -> None:
        """Add what was spent before an interruption."""
        self._wall -= seconds
        self._cpu -= cpu_seconds

    @property
    def seconds(self) -> float:
        """By the clock on the wall."""
        return time.monotonic() - self._wall

    @property
    def cpu_seconds(self) -> float:
        """Of this process, user and system; 2 threads at work for a second are 2."""
        return time.process_time() - self._cpu


class Clock:
    """Seconds spent in each part of an update: the `time` group."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self.seconds[f"time/{name}"] = now - self._last
        self._last = now


class Trajectories:
    """`trajectories/NNNNNN.jsonl` (a turn a line) and `trajectories/frames/*.png`, bounded per update."""

    def __init__(self, folder: Path, episodes: int, keep_until: int) -> None:
        """Store those of `episodes` environments; files of updates beyond `keep_until` are of another course."""
        self._folder, self._episodes = folder, episodes
        for path in folder.glob("[0-9]*.jsonl"):
            if path.stem.isdigit() and int(path.stem) > keep_until:
                path.unlink()

    def write(
        self, update: int, turns: Sequence[Turn], extra: Mapping[str, Sequence[float]]
    ) -> None:
        """Store the turns of the first environments.

        Args:
            update: number of the update.
            turns: of the update, in the order of the batch.
            extra: further numbers for each turn, such as its advantage.
        """
        if not self._episodes:
            return
        lines = []
        for i, turn in enumerate(turns):
            if turn.env_index >= self._episodes:
                continue
            lines.append(
                json.dumps(
                    {
                        "env": turn.env_index,
                        "episode": turn.episode,
                        "step": turn.step,
                        "frame": self._frame(turn),
                        "prompt": turn.prompt,
                        "reply": turn.text,
                        "action": turn.action,
                        "valid": turn.valid,
                        "legal": turn.legal,
                        "reward": turn.reward,
                        "format_reward": turn.format_reward,
                        "value": turn.reply.value,
                        "terminated": turn.terminated,
                        "truncated": turn.truncated,
                        "success": turn.success,
                        "facts": dict(turn.facts),
                        **{name: numbers[i] for name, numbers in extra.items()},
                    }
                )
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self._folder / f"{update:06d}.jsonl", "".join(f"{line}\n" for line in lines)
        )

    def _frame(self, turn: Turn) -> str:
        import hashlib

        from PIL import Image

        name = hashlib.sha256(turn.observed.frame.tobytes()).hexdigest()[:16] + ".png"
        path = self._folder / "frames" / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            Image.fromarray(turn.observed.frame).save(part, format="png")
            os.replace(part, path)
        return f"frames/{name}"


def finite(row: Mapping[str, Any]) -> str | None:
    """Name of the first metric that is not finite, if any."""
    return next((name for name, number in row.items() if not math.isfinite(number)), None)
