"""What the teacher says about the agent's thoughts: the reverse KL on the tokens the agent sampled."""

from __future__ import annotations

import torch

from gtr_turbo.learning import losses
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.teaching_config import GuidanceConfig
from gtr_turbo.turns.batch import Batch, by_length, select


@torch.no_grad()
def guide(batch: Batch, policy: Policy, config: GuidanceConfig, *, microbatch_turns: int) -> Batch:
    """Add `kl` and `kl_tokens` to a batch, or nothing where the KL is not used and not monitored.

    The teacher is the merge, and for `kind: static` the model that the run began with.

    The agent's log-probs are those recorded at sampling, except for `full`, which needs distributions and
    scores the agent again. No gradient flows; an invalid reply has no thought, so its KL is 0.
    """
    if config.kind not in ("kl", "static") and not config.monitor:
        return batch
    as_teacher = policy.as_start if config.kind == "static" else policy.as_teacher
    mask = batch.thought_mask
    if config.tokens == "response":
        mask = batch.inputs.response_mask & mask.any(1, keepdim=True)
    kl = torch.zeros_like(batch.old_logprobs)
    parts = torch.split(by_length(batch.inputs, torch.arange(len(batch))), microbatch_turns)
    if config.estimator == "full":
        # distributions of a whole batch would not fit, so the weights change places often
        for rows in parts:
            inputs = select(batch.inputs, rows)
            agent = score(policy, inputs, distribution=True).distribution
            with as_teacher():
                teacher = score(policy, inputs, distribution=True).distribution
            assert agent is not None
            assert teacher is not None
            kl[rows, : agent.shape[1]] = losses.full_kl(agent, teacher).cpu()
    else:
        with as_teacher():
            for rows in parts:
                teacher_logprobs = score(policy, select(batch.inputs, rows)).logprobs.cpu()
                agent_logprobs = batch.old_logprobs[rows, : teacher_logprobs.shape[1]]
                kl[rows, : teacher_logprobs.shape[1]] = losses.kl_estimate(
                    agent_logprobs, teacher_logprobs, estimator=config.estimator
                )
    kl = kl * mask
    mean = losses.masked_mean(kl, mask, dim=1)
    return batch.with_(kl=mean, kl_tokens=kl, kl_mask=mask)
