"""Credit: generalised advantage estimation over turns, and where the KL to the teacher enters."""

from __future__ import annotations

import torch
from torch import Tensor

from gtr_turbo.turns.batch import Batch


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16).

    T turns, N environments; all inputs are (T, N).

    Args:
        rewards: reward of each turn.
        values: value of the observation each turn saw.
        next_values: value of the observation each turn led to, before any reset.
        terminated: True where the task ended, so the future is worth 0.
        done: True where terminated or truncated, so no credit flows into the next episode.
        gamma: discount per turn.
        lam: GAE's lambda.

    Returns:
        (advantages, returns), both (T, N).
    """
    delta = rewards + gamma * next_values * ~terminated - values
    advantages, running = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        running = delta[t] + gamma * lam * ~done[t] * running
        advantages[t] = running
    return advantages, advantages + values


def normalise(advantages: Tensor, *, eps: float) -> Tensor:
    """`(A - mean) / (std + eps)` over all turns of an update; std with Bessel's correction, 0 for one turn."""
    centred = advantages - advantages.mean()
    if advantages.numel() < 2:
        return centred
    return centred / (advantages.std() + eps)


def centre(kl: Tensor, mask: Tensor) -> Tensor:
    """Subtract the mean over the entries where `mask` is True; the other entries become 0.

    A clipped KL is never negative: left uncentred it lowers the mean advantage and pushes down every reply.
    """
    if not mask.any():
        return torch.zeros_like(kl)
    return torch.where(mask, kl - kl[mask].mean(), torch.zeros_like(kl))


def assign_credit(
    batch: Batch,
    *,
    gamma: float,
    lam: float,
    normalize: bool,
    eps: float,
    beta: float,
    credit: str,
    center: bool,
) -> Batch:
    """Add advantages and returns to a batch.

    Args:
        batch: with `kl` and `kl_tokens` if there is guidance.
        gamma: discount per turn.
        lam: GAE's lambda.
        normalize: normalise advantages over the update, before the KL enters.
        eps: added to the deviation.
        beta: weight of the KL.
        credit: `advantage`: A' = A - beta KL (the paper's equation); `reward`: r' = r - beta KL, carried to
            earlier turns by GAE (its Algorithm 2); `token`: A'_t = A - beta KL_t on each guided token.
        center: subtract the KL's mean first, over the turns that have a thought, or the guided tokens.

    Returns:
        the batch with `advantages` (B,), or (B, R) for `token`, and `returns` (B,).
    """
    rewards, kl = batch.rewards, batch.kl
    has_thought = batch.thought_mask.any(1)
    if kl is not None and center:
        kl = centre(kl, has_thought)
    if kl is not None and credit == "reward":
        rewards = rewards - beta * kl
    advantages, returns = gae(
        *(
            x.view(batch.shape)
            for x in (rewards, batch.old_values, batch.next_values, batch.terminated, batch.done)
        ),
        gamma=gamma,
        lam=lam,
    )
    advantages, returns = advantages.flatten(), returns.flatten()
    if normalize:
        advantages = normalise(advantages, eps=eps)
    if kl is not None and credit == "advantage":
        advantages = advantages - beta * kl
    if batch.kl_tokens is not None and credit == "token":
        tokens = batch.kl_tokens
        if center:
            assert batch.kl_mask is not None
            tokens = centre(tokens, batch.kl_mask)
        advantages = advantages[:, None] - beta * tokens
    return batch.with_(advantages=advantages, returns=returns)
