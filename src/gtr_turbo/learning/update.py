"""The update: several epochs of minibatches over the turns of one rollout, PPO and critic together.

Holds `loss.backward()` and `optimizer.step()`. Guidance arrives inside the batch, as advantages.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gtr_turbo.config import PPOConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.distributed.sharding import full
from gtr_turbo.learning import losses
from gtr_turbo.policy.memory import Microbatch
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import Scores, score
from gtr_turbo.turns.batch import Batch, by_length, select


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or sampler and scoring disagree."""


LARGEST = "ppo/log_ratio_max"
"""The one number of a minibatch that is not a sum."""

Imitation = Callable[[torch.Generator, int], Iterator[tuple[Tensor, float]]]
"""Yields weighted losses, micro-batch by micro-batch of so many turns, and their values."""


def make_optimizer(policy: Policy, config: PPOConfig) -> torch.optim.AdamW:
    """AdamW with two groups: the model (first), and the critic with its own learning rate."""
    model = {"params": list(policy.trained().values()), "lr": config.lr}
    critic = {
        "params": list(policy.value_head.parameters()),
        "lr": config.value_lr,
        "weight_decay": 0.0,
    }
    return torch.optim.AdamW(
        [model, critic], eps=config.adam_eps, weight_decay=config.weight_decay, foreach=True
    )


def _policy_loss(
    scores: Scores, batch: Batch, rows: Tensor, config: PPOConfig
) -> tuple[Tensor, Tensor]:
    """((B,) loss, (B, R) log-ratio of each token, 0 on padding)."""
    width = scores.logprobs.shape[1]
    device = scores.logprobs.device
    old = batch.old_logprobs[rows, :width].to(device)
    thought = batch.thought_mask[rows, :width].to(device)
    real = batch.inputs.response_mask[rows, :width].to(device)
    assert batch.advantages is not None
    advantages = batch.advantages[rows].to(device)
    if config.ratio == "sequence":
        weight = config.thought_weight
        new_composite = losses.composite_logprob(
            scores.logprobs, thought, real, thought_weight=weight
        )
        old_composite = losses.composite_logprob(old, thought, real, thought_weight=weight)
        loss = losses.clipped_surrogate(new_composite, old_composite, advantages, clip=config.clip)
        return loss, (scores.logprobs - old) * real
    if advantages.ndim == 1:
        advantages = advantages[:, None]
    surrogate = losses.clipped_surrogate(
        scores.logprobs, old, advantages[:, :width], clip=config.clip
    )
    weights = losses.token_weights(thought, real, thought_weight=config.thought_weight)
    return (weights * surrogate).sum(1) / config.length_scale, (scores.logprobs - old) * real


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: PPOConfig,
    *,
    seed: int,
    progress: float,
    progress_after: float,
    max_logprob_gap: float,
    imitation: Imitation | None = None,
    microbatch: Microbatch | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train on one batch; returns the `ppo` and `critic` groups of docs/metrics.md, and `thought/entropy`.

    Args:
        policy: its weights change.
        optimizer: from `make_optimizer`.
        batch: with advantages and returns.
        config: all settings of the update.
        seed: of the minibatches' order (and of dropout, where there is any).
        progress: fraction of the run done before this update, for the learning rate.
        progress_after: fraction done after it.
        max_logprob_gap: bound on the mean absolute difference between the log-probs recorded at sampling
            and those of the first minibatch, before any step.
        imitation: adds the gradient of its own loss to each step.
        microbatch: turns per forward pass, if not simply those of `config`.
        ranks: who has the other turns of the update; minibatches are drawn from the turns of all ranks, and
            each rank computes the gradient of its own turns among them.

    Raises:
        TrainingError: a gradient is not finite, or the bound is passed. No step is made then.
    """
    assert batch.returns is not None
    torch.manual_seed(seed + ranks.rank)
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, list[float]] = defaultdict(list)
    microbatch = microbatch or Microbatch(
        config, warnings.warn, ranks=ranks, sharded=policy.sharded
    )
    counts = torch.stack([batch.inputs.response_mask.sum(1), batch.thought_mask.sum(1)], 1)
    counts = ranks.gather_rows(counts, batch.shape)
    steps_per_epoch = len(counts) // config.minibatch_turns
    total = config.epochs * steps_per_epoch
    policy.model.train()
    try:
        for step in range(total):
            if step % steps_per_epoch == 0:
                order = torch.randperm(len(counts), generator=generator)
            at = (step % steps_per_epoch) * config.minibatch_turns
            lr = cosine(
                config.lr, config.lr_final, progress + (progress_after - progress) * step / total
            )
            optimizer.param_groups[0]["lr"] = lr
            rows, drawn = order[at : at + config.minibatch_turns], generator.get_state()

            def accumulate(
                turns: int, rows: Tensor = rows, drawn: Tensor = drawn
            ) -> dict[str, float]:
                optimizer.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
                generator.set_state(drawn)
                found = _minibatch(policy, batch, rows, counts, config, turns, ranks)
                if imitation is not None:
                    found["imitation/loss"] = 0.0
                    for loss, number in imitation(generator, turns):
                        loss.backward()
                        found["imitation/loss"] += number
                return found

            for name, number in _over(ranks, microbatch.attempt(accumulate)).items():
                sums[name].append(number)
            if step == 0:
                check_gap(max(sums["ppo/log_ratio_abs"]), max_logprob_gap)
            _step(policy, optimizer, config, sums, ranks)
    finally:
        policy.model.eval()
    _critic_steps(policy, optimizer, batch, config, generator, ranks)
    with torch.no_grad():
        values = policy.value_head(batch.hidden.to(policy.device)).cpu()
    old_values, returns, values = (
        ranks.gather_rows(x, batch.shape) for x in (batch.old_values, batch.returns, values)
    )
    stats = {name: sum(numbers) / len(numbers) for name, numbers in sums.items()}
    stats["ppo/first_log_ratio"] = sums[LARGEST][0]
    del stats[LARGEST], stats["ppo/log_ratio_abs"]
    stats["ppo/lr"] = lr
    stats["system/microbatch_turns"] = float(microbatch.turns)
    stats["critic/explained_variance_before"] = losses.explained_variance(old_values, returns)
    stats["critic/explained_variance"] = losses.explained_variance(values, returns)
    return stats


def cosine(first: float, last: float, fraction: float) -> float:
    """Cosine from `first` at 0 to `last` at 1."""
    return last + 0.5 * (first - last) * (1 + float(torch.cos(torch.tensor(fraction * torch.pi))))


def _micro_batches(
    policy: Policy, batch: Batch, rows: Tensor, turns: int, ranks: Ranks
) -> Iterator[tuple[Tensor, float]]:
    """This rank's turns of a minibatch in parts of like length, and 1 as their factor.

    Sharded weights are gathered in every pass, so all ranks must make equally many: the missing ones are made
    with a turn of factor 0.
    """
    own = ranks.own_rows(rows, batch.shape)
    parts = by_length(batch.inputs, own).split(turns) if len(own) else ()
    yield from ((part, 1.0) for part in parts)
    if policy.sharded:
        most = ranks.most_rows(rows, batch.shape)
        yield from ((torch.arange(1), 0.0) for _ in range(len(parts), -(-most // turns)))


def _minibatch(
    policy: Policy,
    batch: Batch,
    rows: Tensor,
    counts: Tensor,
    config: PPOConfig,
    turns: int,
    ranks: Ranks,
) -> dict[str, float]:
    """Accumulate the gradients of one minibatch; returns this rank's summands of its numbers.

    Micro-batches hold turns of like length. Gradients and numbers do not depend on `turns` of each: means
    are over the turns or tokens of the whole minibatch, on all ranks.

    Args:
        policy: gets the gradients.
        batch: the turns of this rank.
        rows: of the turns of all ranks, those of the minibatch.
        counts: tokens and thought tokens (turns of all ranks, 2).
        config: the losses.
        turns: of a micro-batch.
        ranks: who has the other rows.
    """
    assert batch.returns is not None
    tokens, thoughts = counts[rows].sum(0).tolist()
    tokens = max(1, tokens)
    names = (
        "ppo/policy_loss", "ppo/entropy", "critic/loss", "ppo/approx_kl", "ppo/clip_fraction",
        "ppo/log_ratio_abs", LARGEST, *(["thought/entropy"] if thoughts else []),
    )  # fmt: skip
    found = dict.fromkeys(names, 0.0)
    for micro, factor in _micro_batches(policy, batch, rows, turns, ranks):
        inputs = select(batch.inputs, micro)
        scores = score(policy, inputs, entropy_gradient=config.entropy_coef != 0)
        real = inputs.response_mask.to(scores.logprobs.device)
        surrogate, log_ratio = _policy_loss(scores, batch, micro, config)
        hidden = scores.hidden if config.value_gradient else scores.hidden.detach()
        values = policy.value_head(hidden)
        old_values, returns = (
            x[micro].to(values.device) for x in (batch.old_values, batch.returns)
        )
        value = losses.value_loss(values, old_values, returns, clip=config.clip)
        entropy = losses.masked_mean(scores.entropy, real, dim=1)
        loss = surrogate + config.value_coef * value - config.entropy_coef * entropy
        (factor * loss.sum() / len(rows)).backward()
        if not factor:
            continue
        with torch.no_grad():
            ratio = log_ratio.exp()
            thought = batch.thought_mask[micro, : real.shape[1]].to(real.device)
            for name, number in {
                "ppo/policy_loss": surrogate.sum() / len(rows),
                "ppo/entropy": entropy.sum() / len(rows),
                "critic/loss": value.sum() / len(rows),
                "ppo/approx_kl": (ratio - 1 - log_ratio)[real].sum() / tokens,
                "ppo/clip_fraction": ((ratio - 1).abs() > config.clip)[real].sum() / tokens,
                "ppo/log_ratio_abs": log_ratio.abs()[real].sum() / tokens,
            }.items():
                found[name] += float(number)
            found[LARGEST] = max(found[LARGEST], float(log_ratio.abs().max()))
            if thoughts:
                found["thought/entropy"] += float(scores.entropy[thought].sum()) / thoughts
    return found


def _over(ranks: Ranks, found: dict[str, float]) -> dict[str, float]:
    """The numbers of a minibatch from the summands of all ranks."""
    parts = ranks.gather(found)
    return {name: (max if name == LARGEST else sum)(part[name] for part in parts) for name in found}


def check_gap(gap: float, bound: float) -> None:
    """Refuse to learn from replies whose log-probs, in nats per token, scoring does not find.

    Raises:
        TrainingError: the gap is above the bound, or no number.
    """
    if not gap <= bound:
        raise TrainingError(
            f"before any step, scoring differs from sampling by {gap:.3g} nats per token (bound "
            f"rollout.max_logprob_gap={bound}). The weights that sampled are not those that are trained, or "
            "decoding is wrong for this model; if only the type is too coarse (bfloat16), set rollout.rescore: true"
        )


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    sums: dict[str, list[float]],
    ranks: Ranks,
) -> None:
    ranks.sum_gradients([*policy.trained().values(), *policy.value_head.parameters()])
    norm = full(nn.utils.clip_grad_norm_(policy.trained().values(), config.max_grad_norm))
    critic_norm = nn.utils.clip_grad_norm_(policy.value_head.parameters(), config.max_grad_norm)
    if not (torch.isfinite(norm) and torch.isfinite(critic_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(
            f"the gradient norm is {float(norm)} (critic {float(critic_norm)}): no step was made. Lower "
            "ppo.lr or ppo.value_lr and resume from the last checkpoint."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    sums["ppo/grad_norm"].append(float(norm))
    sums["critic/grad_norm"].append(float(critic_norm))


def _critic_steps(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: PPOConfig,
    generator: torch.Generator,
    ranks: Ranks,
) -> None:
    """Fit the critic further on the stored hidden states; the model has no gradient, so it stays."""
    assert batch.returns is not None
    hidden, returns = batch.hidden.to(policy.device), batch.returns.to(policy.device)
    for _ in range(config.critic_steps):
        rows = torch.randperm(len(batch) * ranks.world, generator=generator)
        rows = rows[: config.minibatch_turns]
        own = ranks.own_rows(rows, batch.shape)
        loss = 0.5 * ((policy.value_head(hidden[own]) - returns[own]) ** 2).sum() / len(rows)
        loss.backward()
        ranks.sum_gradients(policy.value_head.parameters())
        nn.utils.clip_grad_norm_(policy.value_head.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
