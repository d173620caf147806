"""Turns as padded tensors.

The letters used for shapes everywhere:

    B turns, P prompt tokens (padded left), R response tokens (padded right), V vocabulary,
    T turns in time, N environments, D hidden size, K checkpoints.

Prompts are padded on the left and responses on the right, so the response begins in the same column of
every row and the logits at columns P-1 .. P+R-2 are those of the response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gtr_turbo.turns.turn import Observed, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a forward pass needs: prompts, responses and their masks, still on the CPU."""

    observed: Sequence[Observed]
    """B observations."""
    prompt_ids: Tensor
    """(B, P) int64."""
    prompt_mask: Tensor
    """(B, P) bool, True on tokens, False on padding."""
    response_ids: Tensor
    """(B, R) int64."""
    response_mask: Tensor
    """(B, R) bool, True on tokens of the response, end token included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """All turns of one update. The prefix `old_` says: by the policy that made the turns."""

    inputs: Inputs
    thought_mask: Tensor
    """(B, R) bool, True on tokens of the thought, never on the action; all False for an invalid reply."""
    old_logprobs: Tensor
    """(B, R) float32, 0 on padding."""
    old_values: Tensor
    """(B,) float32."""
    hidden: Tensor
    """(B, D) float32, last hidden state of the last prompt token."""
    rewards: Tensor
    """(B,) float32, environment and format rewards together."""
    next_values: Tensor
    """(B,) float32, value of the observation each turn led to, 0 where the task ended."""
    terminated: Tensor
    """(B,) bool."""
    done: Tensor
    """(B,) bool, True where terminated or truncated."""
    shape: tuple[int, int]
    """(T, N): row t * N + n is turn t of environment n."""
    kl: Tensor | None = None
    """(B,) float32, mean over the thought's tokens of the KL estimate to the teacher; 0 without a thought."""
    kl_tokens: Tensor | None = None
    """(B, R) float32, the KL estimate of each guided token, 0 elsewhere."""
    kl_mask: Tensor | None = None
    """(B, R) bool, True on guided tokens: the thought's, or all of a reply that has one."""
    advantages: Tensor | None = None
    """(B, R) float32 if credit is dense, else (B,)."""
    returns: Tensor | None = None
    """(B,) float32, targets of the critic."""

    def __len__(self) -> int:
        return len(self.old_values)

    def with_(self, **changes: Any) -> Batch:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def pad(rows: Sequence[Tensor], *, left: bool, value: float) -> tuple[Tensor, Tensor]:
    """Stack 1-d tensors; returns ((B, L), (B, L) bool mask, True on real entries)."""
    length = max(len(row) for row in rows)
    padded = torch.full((len(rows), length), value, dtype=rows[0].dtype)
    mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(length - len(row), length) if left else slice(0, len(row))
        padded[i, at], mask[i, at] = row, True
    return padded, mask


def make_inputs(
    observed: Sequence[Observed], responses: Sequence[Tensor], pad_token_id: int
) -> Inputs:
    """Pad prompts left and responses right. Responses may all be empty: then R is 0."""
    prompt_ids, prompt_mask = pad([o.prompt_ids for o in observed], left=True, value=pad_token_id)
    response_ids, response_mask = pad(list(responses), left=False, value=pad_token_id)
    return Inputs(
        observed=tuple(observed),
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
    )


def select(inputs: Inputs, rows: Tensor) -> Inputs:
    """The given rows, cut to the longest prompt and response among them."""
    prompt_mask, response_mask = inputs.prompt_mask[rows], inputs.response_mask[rows]
    prompt, response = int(prompt_mask.sum(1).max()), int(response_mask.sum(1).max())
    first = prompt_mask.shape[1] - prompt
    return Inputs(
        observed=tuple(inputs.observed[int(i)] for i in rows),
        prompt_ids=inputs.prompt_ids[rows, first:],
        prompt_mask=prompt_mask[:, first:],
        response_ids=inputs.response_ids[rows, :response],
        response_mask=response_mask[:, :response],
    )


def by_length(inputs: Inputs, rows: Tensor) -> Tensor:
    """`rows` ordered by the length of prompt and response, so that neighbours need little padding."""
    lengths = inputs.prompt_mask[rows].sum(1) + inputs.response_mask[rows].sum(1)
    return rows[lengths.argsort(stable=True)]


def make_batch(turns: Sequence[Turn], num_envs: int, pad_token_id: int) -> Batch:
    """Stack the turns of one update.

    Args:
        turns: ordered by time, then by environment: turn t of environment n is number t * num_envs + n.
        num_envs: N.
        pad_token_id: fills the padding.
    """
    inputs = make_inputs(
        [turn.observed for turn in turns], [turn.reply.response_ids for turn in turns], pad_token_id
    )
    columns = torch.arange(inputs.response_ids.shape[1])
    thoughts = torch.tensor([turn.thought_tokens for turn in turns])

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return Batch(
        inputs=inputs,
        thought_mask=columns[None] < thoughts[:, None],
        old_logprobs=pad([turn.reply.logprobs for turn in turns], left=False, value=0.0)[0],
        old_values=column([turn.reply.value for turn in turns]),
        hidden=torch.stack([turn.reply.hidden for turn in turns]),
        rewards=column([turn.reward + turn.format_reward for turn in turns]),
        next_values=column([turn.next_value for turn in turns]),
        terminated=torch.tensor([turn.terminated for turn in turns]),
        done=torch.tensor([turn.done for turn in turns]),
        shape=(len(turns) // num_envs, num_envs),
    )
