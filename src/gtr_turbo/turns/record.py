"""Turns as JSON, for what is measured over the turns of all ranks: all but frames, prompt ids and hidden states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from gtr_turbo.distributed.ranks import Ranks
from gtr_turbo.turns.turn import Observed, Reply, Turn

T = TypeVar("T")

PLAIN = (
    "prompt", "text", "fields", "thought_tokens", "action", "valid", "legal", "reward", "format_reward",
    "terminated", "truncated", "next_value", "env_index", "episode", "step", "success", "episode_return",
    "facts",
)  # fmt: skip
"""Fields of a turn that are JSON."""


def to_json(turn: Turn) -> dict[str, Any]:
    """A turn as a JSON object; equal frames have equal digests."""
    found = {name: getattr(turn, name) for name in PLAIN}
    found["facts"] = {name: bool(fact) for name, fact in turn.facts.items()}
    return found | {
        "frame": hashlib.sha256(turn.observed.frame.tobytes()).hexdigest(),
        "response_ids": turn.reply.response_ids.tolist(),
        "logprobs": turn.reply.logprobs.tolist(),
        "value": turn.reply.value,
    }


def from_json(record: Mapping[str, Any]) -> Turn:
    """A turn from `to_json`; its frame is the digest, its prompt ids and hidden state are empty."""
    digest = np.frombuffer(bytes.fromhex(record["frame"]), np.uint8)
    return Turn(
        observed=Observed(
            prompt_ids=torch.zeros(0, dtype=torch.long),
            positions=None,
            frame=digest,
            features=None,
            grid=None,
        ),
        reply=Reply(
            response_ids=torch.tensor(record["response_ids"], dtype=torch.long),
            logprobs=torch.tensor(record["logprobs"]),
            value=record["value"],
            hidden=torch.zeros(0),
        ),
        **{name: record[name] for name in PLAIN},
    )


def all_turns(turns: Sequence[Turn], ranks: Ranks) -> Sequence[Turn]:
    """The turns of all ranks, ordered by time, then by environment; of one rank the turns themselves."""
    if ranks.world == 1:
        return turns
    parts = ranks.gather([to_json(turn) for turn in turns])
    return [from_json(record) for record in by_time(parts, len({turn.env_index for turn in turns}))]


def by_time(parts: Sequence[Sequence[T]], envs: int) -> Iterator[T]:
    """What each rank has for its turns, ordered by time, then by environment; `envs` are of each rank."""
    for at in range(0, len(parts[0]), envs):
        for part in parts:
            yield from part[at : at + envs]
