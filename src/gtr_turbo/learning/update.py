"""The update: several epochs of minibatches over the turns of one rollout, PPO and critic together.

Holds `loss.backward()` and `optimizer.step()`. Guidance arrives inside the batch, as advantages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gtr_turbo.config import PPOConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.distributed.sharding import full
from gtr_turbo.learning import losses
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import Scores, score
from gtr_turbo.turns.batch import Batch, by_length, select


class TrainingError(RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or sampler and scoring disagree."""


Imitation = Callable[[torch.Generator], Iterator[tuple[Tensor, float]]]
"""Yields weighted losses, micro-batch by micro-batch, and their values."""


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
        ranks: who has the other turns of the update; minibatches are drawn from the turns of all ranks, and
            each rank computes the gradient of its own turns among them.

    Raises:
        TrainingError: a gradient is not finite, or the bound is passed. No step is made then.
    """
    assert batch.returns is not None
    torch.manual_seed(seed + ranks.rank)
    generator = torch.Generator().manual_seed(seed)
    sums = Means(ranks)
    turns = len(batch) * ranks.world
    steps_per_epoch = turns // config.minibatch_turns
    total = config.epochs * steps_per_epoch
    policy.model.train()
    try:
        for step in range(total):
            if step % steps_per_epoch == 0:
                order = torch.randperm(turns, generator=generator)
            at = (step % steps_per_epoch) * config.minibatch_turns
            lr = cosine(
                config.lr, config.lr_final, progress + (progress_after - progress) * step / total
            )
            optimizer.param_groups[0]["lr"] = lr
            rows = order[at : at + config.minibatch_turns]
            _minibatch(policy, batch, rows, config, sums, ranks)
            if step == 0:
                first = ranks.largest(next(iter(sums.numbers["ppo/log_ratio_max"]), 0.0))
                gaps = sums.numbers["ppo/log_ratio_abs"]
                _check_gap(ranks.largest(max(gaps, default=0.0)), max_logprob_gap)
            if imitation is not None:
                numbers = []
                for loss, number in imitation(generator):
                    loss.backward()
                    numbers.append(number)
                sums.add("imitation/loss", ranks.total(sum(numbers)))
            _step(policy, optimizer, config, sums, ranks)
    finally:
        policy.model.eval()
    _critic_steps(policy, optimizer, batch, config, generator, ranks)
    with torch.no_grad():
        values = policy.value_head(batch.hidden.to(policy.device)).cpu()
    old_values, returns, values = (
        ranks.gather_rows(x, batch.shape) for x in (batch.old_values, batch.returns, values)
    )
    stats = sums.means()
    stats["ppo/first_log_ratio"] = first
    del stats["ppo/log_ratio_max"], stats["ppo/log_ratio_abs"]
    stats["ppo/lr"] = lr
    stats["critic/explained_variance_before"] = losses.explained_variance(old_values, returns)
    stats["critic/explained_variance"] = losses.explained_variance(values, returns)
    return stats


def cosine(first: float, last: float, fraction: float) -> float:
    """Cosine from `first` at 0 to `last` at 1."""
    return last + 0.5 * (first - last) * (1 + float(torch.cos(torch.tensor(fraction * torch.pi))))


class Means:
    """Numbers of an update, to be averaged: over micro-batches, or with several ranks over turns or tokens."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.numbers: dict[str, list[float]] = defaultdict(list)
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, number: float, weight: float = 1.0) -> None:
        """Add a mean over `weight` turns or tokens."""
        self.numbers[name].append(number)
        self._sums[name][0] += weight * number
        self._sums[name][1] += weight

    def means(self) -> dict[str, float]:
        """The mean of every name."""
        if self._ranks.world == 1:
            return {name: sum(numbers) / len(numbers) for name, numbers in self.numbers.items()}
        parts = self._ranks.gather(self._sums)
        found = {}
        for name in sorted({name for part in parts for name in part}):
            pairs = [part[name] for part in parts if name in part]
            found[name] = sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)
        return found


def _micro_batches(
    policy: Policy, batch: Batch, rows: Tensor, size: int, ranks: Ranks
) -> Iterator[tuple[Tensor, float]]:
    """This rank's rows of a minibatch in parts whose replies have like lengths, and 1 as their factor.

    Sharded weights are gathered in every pass, so all ranks must make equally many: the missing ones are made
    with a row of factor 0.
    """
    own = ranks.own_rows(rows, batch.shape)
    parts = by_length(batch.inputs, own).split(size) if len(own) else ()
    yield from ((part, 1.0) for part in parts)
    if policy.sharded:
        most = ranks.most_rows(rows, batch.shape)
        yield from ((torch.arange(1), 0.0) for _ in range(len(parts), -(-most // size)))


def _minibatch(
    policy: Policy, batch: Batch, rows: Tensor, config: PPOConfig, sums: Means, ranks: Ranks
) -> None:
    """Accumulate the gradients of one minibatch, `rows` of the turns of all ranks."""
    assert batch.returns is not None
    for micro, factor in _micro_batches(policy, batch, rows, config.microbatch_turns, ranks):
        inputs = select(batch.inputs, micro)
        scores = score(policy, inputs)
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
            clipped = ((ratio - 1).abs() > config.clip).float()
            thought = batch.thought_mask[micro, : real.shape[1]].to(real.device)
            if thought.any():
                mean = losses.masked_mean(scores.entropy, thought)
                sums.add("thought/entropy", float(mean), float(thought.sum()))
            turns, tokens = float(len(micro)), float(real.sum())
            for name, number, weight in (
                ("ppo/policy_loss", surrogate.mean(), turns),
                ("ppo/entropy", entropy.mean(), turns),
                ("ppo/approx_kl", losses.masked_mean(ratio - 1 - log_ratio, real), tokens),
                ("ppo/clip_fraction", losses.masked_mean(clipped, real), tokens),
                ("ppo/log_ratio_max", log_ratio.abs().max(), 1.0),
                ("ppo/log_ratio_abs", losses.masked_mean(log_ratio.abs(), real), tokens),
                ("critic/loss", value.mean(), turns),
            ):
                sums.add(name, float(number), weight)


def _check_gap(gap: float, bound: float) -> None:
    if gap > bound:
        raise TrainingError(
            f"before any step, scoring differs from sampling by {gap:.3g} nats per token (bound "
            f"rollout.max_logprob_gap={bound}). The weights that sampled are not those that are trained, or "
            "the type is too coarse: set rollout.rescore: true for bfloat16."
        )


def _step(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    sums: Means,
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
    sums.add("ppo/grad_norm", float(norm))
    sums.add("critic/grad_norm", float(critic_norm))


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
