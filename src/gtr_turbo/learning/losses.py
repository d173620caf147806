"""The objectives of docs/method.md, as pure functions. Losses are elementwise; the caller reduces."""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("clip", "k1", "abs", "k3", "full")


def composite_logprob(
    logprobs: Tensor, thought_mask: Tensor, response_mask: Tensor, *, thought_weight: float
) -> Tensor:
    """Log pi(a) = lambda * sum of thought tokens + sum of the other response tokens (RL4VLM, eq. 3).

    Args:
        logprobs: (B, R).
        thought_mask: (B, R) bool, True on tokens of the thought.
        response_mask: (B, R) bool, True on tokens of the response.
        thought_weight: lambda.

    Returns:
        (B,).
    """
    weights = token_weights(thought_mask, response_mask, thought_weight=thought_weight)
    return (weights * logprobs).sum(1)


def token_weights(thought_mask: Tensor, response_mask: Tensor, *, thought_weight: float) -> Tensor:
    """(B, R) float32: lambda on the thought, 1 on the rest of the response, 0 on padding."""
    return response_mask.float() + (thought_weight - 1.0) * (thought_mask & response_mask).float()


def clipped_surrogate(
    logprob: Tensor, old_logprob: Tensor, advantage: Tensor, *, clip: float
) -> Tensor:
    """-min(r A, clip(r, 1 - c, 1 + c) A) with r = exp(logprob - old_logprob) (Schulman et al. 2017, eq. 7).

    Shapes are broadcast: (B,) for one ratio a turn, (B, R) for one a token.
    """
    # of an infinite ratio the gradient would be no number, where it is clipped too
    ratio = (logprob - old_logprob).clamp(max=80).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), (B,)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def kl_estimate(logprobs: Tensor, teacher_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Reverse KL(agent || teacher) per sampled token, from k1 = log pi - log teacher.

    Args:
        logprobs: (B, R) of the agent, on tokens it sampled itself.
        teacher_logprobs: (B, R) of the teacher on the same tokens.
        estimator: `clip` max(0, k1); `k1`; `abs` |k1|; `k3` exp(-k1) - 1 + k1 (Schulman 2020).

    Raises:
        ValueError: unknown estimator (`full` needs the distributions: `full_kl`).
    """
    k1 = logprobs - teacher_logprobs
    if estimator == "clip":
        return k1.clamp(min=0)
    if estimator == "k1":
        return k1
    if estimator == "abs":
        return k1.abs()
    if estimator == "k3":
        return torch.expm1(-k1) + k1  # exp() - 1 would round to less than 0 near 0
    raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")


def full_kl(distribution: Tensor, teacher_distribution: Tensor) -> Tensor:
    """sum_v pi(v) (log pi(v) - log teacher(v)), (B, R), from log-probabilities (B, R, V).

    Tokens both give probability 0 (-inf) contribute 0.
    """
    difference = torch.where(
        distribution.isneginf(), torch.zeros_like(distribution), distribution - teacher_distribution
    )
    return (distribution.exp() * difference).sum(-1)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `values` where `mask` is True; 0 where nothing is."""
    values = torch.where(mask, values, torch.zeros_like(values))  # 0 * inf would be nan
    if dim is None:
        return values.sum() / mask.sum().clamp(min=1)
    return values.sum(dim) / mask.sum(dim).clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - var(returns - values) / var(returns); 0 if the returns do not vary."""
    variance = returns.var(unbiased=False)
    if variance == 0:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / variance)
