"""The one function that turns (observations, responses, weights in place) into log-probs and values.

Rollout checks, the update, the teacher and the tests all come here. Log-softmax is float32, logits are
computed for response tokens only, banned tokens have probability 0, and the logits are divided by the
sampling temperature: the policy that is scored is the policy that was sampled.

Logits are made for some tokens at a time and, where a gradient is wanted, made again in the backward pass:
(B, R, V) at a vocabulary of 152,000 never lies in memory, unless the distribution is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gtr_turbo.policy.model import Policy
from gtr_turbo.turns.batch import Inputs, make_inputs
from gtr_turbo.turns.turn import Observed

PASS_TOKENS = 2**14
"""Tokens of a pass without a gradient, padding included; more rows take several passes."""
LOGITS = 2**24
"""Logits made at a time: 64 MiB in float32, 110 tokens of Qwen's vocabulary. Some eight tensors of this size
are alive at once."""


def parts(rows: int, tokens: int) -> Iterator[slice]:
    """Shares of `rows` rows of `tokens` tokens each, for passes without a gradient."""
    size = max(1, PASS_TOKENS // tokens)
    return (slice(at, at + size) for at in range(0, rows, size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the weights in place say about responses; padding is 0."""

    logprobs: Tensor
    """(B, R) float32, log p(token | image, prompt, earlier tokens)."""
    entropy: Tensor
    """(B, R) float32, nats, of the distribution each token was drawn from."""
    hidden: Tensor
    """(B, D), last hidden state of the last prompt token."""
    distribution: Tensor | None
    """(B, R, V) float32 log-probabilities of all tokens, if asked for; -inf on padding."""
    raw: Tensor | None
    """(B, R) float32 log-probs of the model itself, at temperature 1 and with nothing banned, if asked for."""


def position_ids(inputs: Inputs) -> Tensor | None:
    """(3, B, P + R) multimodal positions; None where the model uses plain ones."""
    first = inputs.observed[0].positions
    if first is None:
        return None
    batch, prompt = inputs.prompt_ids.shape
    response = inputs.response_ids.shape[1]
    positions = torch.zeros((3, batch, prompt + response), dtype=torch.long)
    steps = torch.arange(1, response + 1)
    for i, observed in enumerate(inputs.observed):
        known = observed.positions
        assert known is not None
        positions[:, i, prompt - known.shape[1] : prompt] = known
        positions[:, i, prompt:] = known.max() + steps
    return positions


def score(
    policy: Policy,
    inputs: Inputs,
    *,
    distribution: bool = False,
    raw: bool = False,
    temperature: float | None = None,
    entropy_gradient: bool = False,
) -> Scores:
    """Score responses with the weights that are in place.

    Args:
        policy: call inside `policy.as_teacher()` to score with the teacher.
        inputs: B observations and their responses.
        distribution: also return the log-probabilities of the whole vocabulary.
        raw: also return the log-probs of the model itself.
        temperature: if not the policy's own.
        entropy_gradient: keep the entropy's graph too; without it the entropy is a number.
    """
    device = policy.device
    ids = torch.cat([inputs.prompt_ids, inputs.response_ids], 1).to(device)
    mask = torch.cat([inputs.prompt_mask, inputs.response_mask], 1).to(device)
    response = inputs.response_ids.shape[1]
    arguments = policy.image_arguments(tuple(inputs.observed))
    positions = position_ids(inputs)
    if positions is None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    states, hidden, head = policy.forward_states(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions.to(device),
        logits_to_keep=response + 1,
        use_cache=False,
        **arguments,
    )

    def some(
        states: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Log-probs and entropies (N,) of N tokens; if asked for, the distribution (N, V) and `raw` (N,)."""
        logits = head(states)
        everything = policy.policy_logits(logits, temperature).log_softmax(-1)
        logprobs = everything.gather(-1, targets[:, None]).squeeze(-1)
        with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
            # 0 * -inf of banned tokens would be nan
            entropy = -(everything.exp() * everything.masked_fill(policy.banned, 0.0)).sum(-1)
        own = None
        if raw:
            own = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
        return logprobs, entropy, everything if distribution else None, own

    shape = inputs.response_ids.shape
    where = inputs.response_mask.flatten().nonzero().squeeze(1).to(device)
    tokens = states[:, :-1].flatten(0, 1)[where]  # those that predict response tokens
    targets = inputs.response_ids.to(device).flatten()[where]
    size = max(1, LOGITS // len(policy.banned))
    again = torch.is_grad_enabled() and len(where) > size
    scored = [
        checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False)
        if again
        else some(*part)
        for part in zip(tokens.split(size), targets.split(size), strict=True)
    ]
    logprobs, entropy, everything, own = zip(*scored, strict=True)

    def back(rows: tuple[Tensor, ...], padding: float) -> Tensor:
        """(N, ...) in parts as (B, R, ...)."""
        found = torch.cat(rows)
        whole = found.new_full((shape.numel(), *found.shape[1:]), padding)
        return whole.index_copy(0, where, found).view(*shape, *found.shape[1:])

    return Scores(
        logprobs=back(logprobs, 0.0),
        entropy=back(entropy, 0.0),
        hidden=hidden[:, 0],
        distribution=back(everything, -torch.inf) if distribution else None,
        raw=back(own, 0.0) if raw else None,
    )


@torch.no_grad()
def values(policy: Policy, observed: list[Observed]) -> Tensor:
    """Values of observations, (B,) float32 on the CPU."""
    empty, found = torch.zeros(0, dtype=torch.long), []
    for part in parts(len(observed), max(len(o.prompt_ids) for o in observed)):
        some = observed[part]
        inputs = make_inputs(some, [empty] * len(some), policy.processor.pad_token_id)
        found.append(policy.value_head(score(policy, inputs).hidden).cpu())
    return torch.cat(found)
