"""Imitation of thoughts (SFT guidance): who writes them, what is trained, and the collection over the run.

A target is the teacher's thought with the agent's own action behind it, for an observation of the agent. The
thought (up to the key `"action"`, which ends it) and the end token are trained; the action is not: it is the
agent's, and PPO explores it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gtr_turbo.config import SamplingConfig
from gtr_turbo.parsing import parse, thought_tokens
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.processing import Processor
from gtr_turbo.policy.scoring import score
from gtr_turbo.teaching_config import GuidanceConfig, ImitationConfig
from gtr_turbo.turns.batch import by_length, make_inputs, pad, select
from gtr_turbo.turns.turn import Observed, Turn

ACTION_KEY = re.compile(r"""["']?action["']?\s*:\s*["']?""")
"""It says nothing of the action, and ends the thought: it is trained with the thought."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One imitated reply."""

    frame: str
    """Name of the frame in the collection."""
    prompt: str
    response_ids: Tensor
    """(R,) int64, end token included."""
    thought_tokens: int
    """The first so many are trained, and the end token."""

    @property
    def mask(self) -> Tensor:
        """(R,) bool, True on tokens that are trained."""
        places = torch.arange(len(self.response_ids))
        return (places < self.thought_tokens) | (places == len(places) - 1)


def splice(
    processor: Processor, teacher: str, agent: str, fields: Sequence[str], *, whole: bool = False
) -> tuple[Tensor, int] | None:
    """The teacher's thought and the agent's action as one reply.

    Args:
        processor: its tokenizer.
        teacher: a reply.
        agent: a valid reply.
        fields: keys a reply must have.
        whole: keep the teacher's action, and train it.

    Returns:
        (ids (R,) with the end token, how many of the first are trained); None if the teacher's reply, or what
        came out, is no valid reply.
    """
    written, acted = parse(teacher, fields), parse(agent, fields)
    if not (written.valid and acted.valid):
        return None
    text = teacher if whole else teacher[: written.action_start] + agent[acted.action_start :]
    if not parse(text, fields).valid:
        return None
    ids = processor.reply_ids(text)
    if whole:
        return ids, len(ids)
    key = ACTION_KEY.match(text, written.action_start)
    begins = key.end() if key else written.action_start
    return ids, thought_tokens(ids[:-1].tolist(), begins, processor.decode)


@dataclass(frozen=True, slots=True)
class Written:
    """What a teacher wrote for an update's turns."""

    texts: list[str | None]
    """One reply per turn; None where there is none."""
    metrics: dict[str, float]


def write_thoughts(
    policy: Policy,
    turns: Sequence[Turn],
    fields: Sequence[str],
    config: ImitationConfig,
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    batch_turns: int,
) -> Written:
    """Replies of the merged teacher to the observations of the valid turns.

    Answers that cannot be read are drawn again, hotter each time.
    """
    texts: list[str | None] = [None] * len(turns)
    open_rows = [i for i, turn in enumerate(turns) if turn.valid]
    asked, temperature, tries = len(open_rows), config.temperature, 0
    plain = replace(sampling, top_k=0, repetition_penalty=1.0)
    with policy.as_teacher():
        for attempt in range(config.retries + 1):
            failed = []
            for at in range(0, len(open_rows), batch_turns):
                rows = open_rows[at : at + batch_turns]
                tries += len(rows)
                replies = generate(
                    policy,
                    [turns[i].observed for i in rows],
                    plain,
                    generator,
                    temperature=temperature,
                )
                for i, reply in zip(rows, replies, strict=True):
                    ids = reply.response_ids.tolist()
                    ended = ids[-1] == policy.processor.end_token_id
                    text = policy.processor.decode(ids[:-1] if ended else ids)
                    if ended and parse(text, fields).valid:
                        texts[i] = text
                    else:
                        failed.append(i)
            open_rows = failed
            if not open_rows or attempt == config.retries:
                break
            temperature = min(temperature * config.temperature_ramp, config.temperature_max)
    return Written(
        texts,
        {
            "imitation/asked": float(asked),
            "imitation/written": (asked - len(open_rows)) / max(1, asked),
            "imitation/tries": tries / max(1, asked),
        },
    )


class Memory:
    """The collected targets: each update adds a file, every frame is stored once, as PNG.

    Attributes:
        targets: what is kept, the oldest first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self.targets: list[Target] = []
        self._frames: dict[str, bytes] = {}
        self._seen: dict[tuple[str, str], Observed] = {}
        self._features: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.targets)

    def add(self, update: int, targets: Sequence[tuple[Turn, Tensor, int]]) -> None:
        """Keep targets and write them to `NNNNNN.jsonl`.

        Args:
            update: number of the update.
            targets: (turn, ids, trained tokens) of each.
        """
        lines = []
        self._folder.mkdir(parents=True, exist_ok=True)
        for turn, ids, count in targets:
            name = self._keep_frame(turn.observed.frame)
            target = Target(frame=name, prompt=turn.prompt, response_ids=ids, thought_tokens=count)
            self.targets.append(target)
            self._remember(name, turn.prompt, turn.observed)
            lines.append(
                json.dumps(
                    {
                        "frame": name,
                        "prompt": turn.prompt,
                        "response_ids": ids.tolist(),
                        "thought_tokens": count,
                    }
                )
            )
        _write(
            self._folder / f"{update:06d}.jsonl", "".join(f"{line}\n" for line in lines).encode()
        )
        self._forget()

    def _keep_frame(self, frame: np.ndarray) -> str:
        name = hashlib.sha256(frame.tobytes()).hexdigest()[:16]
        if name not in self._frames:
            stream = io.BytesIO()
            Image.fromarray(frame).save(stream, format="png")
            self._frames[name] = stream.getvalue()
            path = self._folder / "frames" / f"{name}.png"
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                _write(path, stream.getvalue())
        return name

    def _remember(self, name: str, prompt: str, observed: Observed) -> None:
        """Keep an observation without its frame; turns with one frame share its features."""
        if _small(observed):
            assert observed.features is not None
            features = self._features.setdefault(name, observed.features)
            self._seen[name, prompt] = replace(
                observed, frame=observed.frame[:0].copy(), features=features
            )

    def _forget(self) -> None:
        """Drop the oldest targets beyond the limit, and frames that nothing shows any more."""
        if not self._limit or len(self.targets) <= self._limit:
            return
        del self.targets[: len(self.targets) - self._limit]
        shown = {target.frame for target in self.targets}
        self._frames = {name: png for name, png in self._frames.items() if name in shown}
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in shown}
        self._features = {name: kept for name, kept in self._features.items() if name in shown}

    def restore(self, update: int) -> None:
        """Take up the files of the updates up to `update`; later ones are removed.

        Raises:
            OSError: a file is missing.
            ValueError: a file is damaged.
        """
        for file in sorted(self._folder.glob("[0-9]*.jsonl")):
            if int(file.stem) > update:
                file.unlink()
                continue
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row: dict[str, Any] = json.loads(line)
                    target = Target(
                        frame=row["frame"],
                        prompt=row["prompt"],
                        response_ids=torch.tensor(row["response_ids"]),
                        thought_tokens=int(row["thought_tokens"]),
                    )
                    if target.frame not in self._frames:
                        path = self._folder / "frames" / f"{target.frame}.png"
                        self._frames[target.frame] = path.read_bytes()
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{file}, line {number}, is damaged: {error}") from error
                self.targets.append(target)
        self._forget()

    def draw(
        self, count: int, generator: torch.Generator, policy: Policy
    ) -> tuple[list[Observed], list[Target]]:
        """Random targets and their observations; fewer than `count` only if there are fewer."""
        rows = torch.randperm(len(self.targets), generator=generator)[:count].tolist()
        chosen = [self.targets[row] for row in rows]
        missing = list(
            dict.fromkeys(
                (t.frame, t.prompt) for t in chosen if (t.frame, t.prompt) not in self._seen
            )
        )
        fresh: dict[tuple[str, str], Observed] = {}
        if missing:
            frames = [np.asarray(Image.open(io.BytesIO(self._frames[f]))) for f, _ in missing]
            observed = policy.observe(frames, [prompt for _, prompt in missing])
            fresh = dict(zip(missing, observed, strict=True))
            for (name, prompt), seen in fresh.items():
                self._remember(name, prompt, seen)
        keys = [(target.frame, target.prompt) for target in chosen]
        return [fresh[key] if key in fresh else self._seen[key] for key in keys], chosen


def teach(
    policy: Policy,
    turns: Sequence[Turn],
    fields: Sequence[str],
    memory: Memory,
    guidance: GuidanceConfig,
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    update: int,
) -> dict[str, float]:
    """Let the merge write thoughts for an update's turns, and collect them; returns the `imitation` group."""
    config = guidance.imitation
    written = write_thoughts(
        policy, turns, fields, config, sampling, generator, batch_turns=config.samples
    )
    made = []
    for turn, text in zip(turns, written.texts, strict=True):
        if text is None:
            continue
        spliced = splice(
            policy.processor, text, turn.text, fields, whole=guidance.tokens == "response"
        )
        if spliced is not None:
            made.append((turn, *spliced))
    memory.add(update, made)
    return written.metrics | {"imitation/collected": float(len(memory))}


def imitation_loss(
    policy: Policy, memory: Memory, count: int, generator: torch.Generator, *, microbatch: int
) -> Iterator[tuple[Tensor, float]]:
    """Cross-entropy on random targets, a part for each micro-batch.

    Yields:
        (sum of the micro-batch's -log p over its trained tokens, divided by the number of trained tokens of all
        drawn targets; the weights' own temperature 1), its value.
    """
    observed, targets = memory.draw(count, generator, policy)
    inputs = make_inputs(observed, [t.response_ids for t in targets], policy.processor.pad_token_id)
    masks, _ = pad([target.mask for target in targets], left=False, value=0)
    total = int(masks.sum())
    rows = by_length(inputs, torch.arange(len(targets)))
    for part in rows.split(microbatch):
        scores = score(policy, select(inputs, part), temperature=1.0)
        mask = masks[part, : scores.logprobs.shape[1]].to(scores.logprobs.device)
        loss = -(scores.logprobs * mask).sum() / total
        yield loss, float(loss.detach())


def _small(observed: Observed) -> bool:
    """True if keeping the features costs no more than keeping the frame would."""
    features = observed.features
    return features is not None and features.nbytes <= observed.frame.nbytes


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)
