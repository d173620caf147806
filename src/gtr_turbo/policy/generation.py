"""Writing replies: batched sampling over environments, on the model's own key-value cache.

Rows that end leave the batch, so a long reply does not make the others wait at full cost. Log-probs and
the value are recorded as they are computed: of the policy itself (temperature, banned tokens), before
the sampler's own warps (`top_k`, `repetition_penalty`), which scoring does not know. With those switched
off, as in our recipes, sampler and policy are the same distribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtr_turbo.config import SamplingConfig
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import parts, position_ids
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Observed, Reply


def warp(logits: Tensor, seen: Tensor, sampling: SamplingConfig) -> Tensor:
    """The sampler's own changes to the policy's logits.

    Args:
        logits: (B, V) of the policy.
        seen: (B, L) ids of prompt and reply so far; what the repetition penalty (Keskar et al. 2019)
            divides or multiplies.
        sampling: `top_k` and `repetition_penalty`.
    """
    if sampling.repetition_penalty != 1.0:
        values = logits.gather(1, seen)
        penalised = torch.where(
            values < 0, values * sampling.repetition_penalty, values / sampling.repetition_penalty
        )
        logits = logits.scatter(1, seen, penalised)
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits


def _joined(caches: list[Any]) -> Any:
    """One key-value cache of the rows of several; these lose theirs."""
    whole, *others = caches
    for layer, *more in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values") if others else ():
            joined = torch.cat([getattr(one, name) for one in (layer, *more)])
            for one in more:
                setattr(one, name, None)
            setattr(layer, name, joined)
    return whole


def _read(
    policy: Policy, observed: list[Observed], ids: Tensor, mask: Tensor, positions: Tensor
) -> tuple[Any, Tensor, Tensor]:
    """Read prompts (B, P), some at a time: their cache, logits (B, V) and hidden states (B, D) of their ends."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    text = policy.model.config.get_text_config()
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=text).layers)
    caches, logits, read = [], [], []
    for part in parts(*ids.shape) if plain else [slice(len(ids))]:
        caches.append(DynamicCache(config=text))
        output, hidden = policy.forward_hidden(
            input_ids=ids[part],
            attention_mask=mask[part],
            position_ids=positions[..., part, :],
            past_key_values=caches[-1],
            use_cache=True,
            logits_to_keep=1,
            **policy.image_arguments(observed[part]),
        )
        logits.append(output.logits[:, -1])
        read.append(hidden[:, 0].float())
    return _joined(caches), torch.cat(logits), torch.cat(read)


@torch.no_grad()
def generate(
    policy: Policy,
    observed: list[Observed],
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    greedy: bool = False,
    temperature: float | None = None,
) -> list[Reply]:
    """Write one reply to each observation.

    Args:
        policy: in eval mode; inside `policy.as_teacher()` the teacher writes.
        observed: B observations.
        sampling: limits and warps.
        generator: the only source of randomness, on the CPU.
        greedy: take the likeliest token instead of sampling.
        temperature: to draw at, if not the policy's own; the log-probs recorded are the policy's own all the same.
    """
    device, pad_id = policy.device, policy.processor.pad_token_id
    empty = torch.zeros(0, dtype=torch.long)
    inputs = make_inputs(observed, [empty] * len(observed), pad_id)
    positions = position_ids(inputs)
    mask = inputs.prompt_mask.long().to(device)
    if positions is None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
    positions = positions.to(device)
    seen = inputs.prompt_ids.to(device)
    cache, logits, first = _read(policy, observed, seen, mask, positions)
    head = policy.value_head(first).cpu()
    batch = len(observed)
    ids = torch.full((batch, sampling.max_new_tokens), pad_id, dtype=torch.long)
    logprobs = torch.zeros((batch, sampling.max_new_tokens))
    lengths = torch.zeros(batch, dtype=torch.long)
    rows = torch.arange(batch)  # which reply each row of the running batch writes
    seen = torch.where(mask.bool(), seen, seen[:, -1:])  # padding was not: a token that was, twice
    multimodal = positions.ndim == 3
    last = positions.amax(dim=(0, 2)) if multimodal else positions[:, -1]  # (B,)
    for step in range(sampling.max_new_tokens):
        logits = policy.policy_logits(logits)
        drawn = logits if temperature is None else logits * (policy.temperature / temperature)
        token = _choose(warp(drawn, seen, sampling), generator, greedy=greedy)
        ids[rows, step] = token.cpu()
        logprobs[rows, step] = logits.log_softmax(-1).gather(1, token[:, None]).squeeze(1).cpu()
        lengths[rows] = step + 1
        running = token != policy.processor.end_token_id
        if not running.any() or step + 1 == sampling.max_new_tokens:
            break
        seen = torch.cat([seen, token[:, None]], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        last = last + 1
        if not running.all():
            kept: Any = running.nonzero().squeeze(1)
            cache.reorder_cache(kept)  # layers of every kind know it
            rows, token, last = rows[running.cpu()], token[running], last[running]
            seen, mask = seen[running], mask[running]
        output, _ = policy.forward_hidden(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=last[None, :, None].expand(3, -1, 1) if multimodal else last[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]
    return [
        Reply(
            response_ids=ids[i, :n].clone(),
            logprobs=logprobs[i, :n].clone(),
            value=float(head[i]),
            hidden=first[i].cpu().clone(),
        )
        for i, n in enumerate(lengths.tolist())
    ]


def _choose(logits: Tensor, generator: torch.Generator, *, greedy: bool) -> Tensor:
    """A token for each row, by inverting the cumulative distribution; impossible tokens never come out."""
    if greedy:
        return logits.argmax(-1)
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    uniform = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    drawn = torch.searchsorted(cumulative, uniform.to(total.device) * total, right=True)
    last_possible = (cumulative < total).sum(-1, keepdim=True)
    return torch.minimum(drawn, last_possible).squeeze(1)
