"""The one function that turns (observations, responses, weights in place) into log-probs and values.

Rollout checks, the update, the teacher and the tests all come here. Log-softmax is float32, logits are
computed at response positions only, banned tokens have probability 0, and the logits are divided by the
sampling temperature: the policy that is scored is the policy that was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gtr_turbo.policy.model import Policy
from gtr_turbo.turns.batch import Inputs, make_inputs
from gtr_turbo.turns.turn import Observed


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
    """(B, R, V) float32 log-probabilities of all tokens, if asked for."""
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
) -> Scores:
    """Score responses with the weights that are in place.

    Args:
        policy: call inside `policy.as_teacher()` to score with the teacher.
        inputs: B observations and their responses.
        distribution: also return the log-probabilities of the whole vocabulary.
        raw: also return the log-probs of the model itself.
        temperature: if not the policy's own.
    """
    device = policy.device
    ids = torch.cat([inputs.prompt_ids, inputs.response_ids], 1).to(device)
    mask = torch.cat([inputs.prompt_mask, inputs.response_mask], 1).to(device)
    response = inputs.response_ids.shape[1]
    arguments = policy.image_arguments(tuple(inputs.observed))
    positions = position_ids(inputs)
    if positions is None:
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    output, hidden = policy.forward_hidden(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions.to(device),
        logits_to_keep=response + 1,
        use_cache=False,
        **arguments,
    )
    logits = policy.policy_logits(output.logits[:, :-1], temperature)  # (B, R, V)
    everything = logits.log_softmax(-1)
    target = inputs.response_ids.to(device)[..., None]
    real = inputs.response_mask.to(device)
    logprobs = everything.gather(-1, target).squeeze(-1)
    own = None
    if raw:
        own = output.logits[:, :-1].float().log_softmax(-1).gather(-1, target).squeeze(-1)
    # 0 * -inf of banned tokens would be nan
    entropy = -(everything.exp() * everything.masked_fill(policy.banned, 0.0)).sum(-1)
    return Scores(
        logprobs=logprobs.masked_fill(~real, 0.0),
        entropy=entropy.masked_fill(~real, 0.0),
        hidden=hidden[:, 0],
        distribution=everything if distribution else None,
        raw=own.masked_fill(~real, 0.0) if own is not None else None,
    )


@torch.no_grad()
def values(policy: Policy, observed: list[Observed]) -> Tensor:
    """Values of observations, (B,) float32 on the CPU."""
    empty = torch.zeros(0, dtype=torch.long)
    inputs = make_inputs(observed, [empty] * len(observed), policy.processor.pad_token_id)
    found: Tensor = policy.value_head(score(policy, inputs).hidden)
    return found.cpu()
