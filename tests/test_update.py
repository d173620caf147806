import copy
import dataclasses
import math

import pytest
import torch

from gtr_turbo.collect import Envs, collect
from gtr_turbo.config import PPOConfig
from gtr_turbo.learning.update import TrainingError, check_gap, cosine, make_optimizer, update
from gtr_turbo.policy.scoring import score
from gtr_turbo.turns.batch import make_batch
from tiny import make_policy, perturb, replies, scripted, settings

PPO = PPOConfig(minibatch_turns=4, microbatch_turns=2, epochs=1, lr=1e-4, lr_final=1e-5)


@pytest.fixture
def made(tiny, monkeypatch):
    """(policy, batch of 4 turns with thoughts and credit)."""
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    policy = make_policy(tiny)
    perturb(policy, scale=0.02)
    torch.manual_seed(0)
    torch.nn.init.normal_(policy.value_head.layers[-1].weight, std=0.1)
    config = settings(tiny)
    envs = Envs(config.env, None, 0)
    envs.start()
    turns = collect(envs, policy, config.sampling, config.rollout, torch.Generator().manual_seed(0))
    batch = make_batch(turns, 2, policy.processor.pad_token_id)
    assert batch.thought_mask.any(1).all()
    return policy, batch.with_(
        advantages=torch.tensor([1.0, -1.0, 0.5, -0.5]), returns=torch.tensor([3.0, -1.0, 0.0, 1.0])
    )


def run(policy, batch, config=PPO, *, gap=0.5, progress=(0.0, 1.0), optimizer=None):
    optimizer = optimizer or make_optimizer(policy, config)
    stats = update(
        policy, optimizer, batch, config, seed=0,
        progress=progress[0], progress_after=progress[1], max_logprob_gap=gap,
    )  # fmt: skip
    return stats, optimizer


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.trained().items()}


def moved(policy, before):
    return math.sqrt(
        sum(float(((p.detach() - before[n]) ** 2).sum()) for n, p in policy.trained().items())
    )


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_ratio_is_one_on_the_first_minibatch(made, ratio):
    """The published code scored every turn under the first prompt (METHOD section 8, number 6)."""
    policy, batch = made
    stats, _ = run(policy, batch, dataclasses.replace(PPO, ratio=ratio))
    assert stats["ppo/first_log_ratio"] <= 1e-4
    assert stats["ppo/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["ppo/clip_fraction"] == 0
    again, _ = run(policy, batch)  # after a step it is not
    assert again["ppo/first_log_ratio"] > 1e-3


def test_the_first_losses_by_hand(made):
    """At ratio 1 the surrogate of a turn is -A times its weighted number of tokens."""
    policy, batch = made
    stats, _ = run(policy, batch)
    thought, real = batch.thought_mask.sum(1), batch.inputs.response_mask.sum(1)
    expected = -(batch.advantages * (0.5 * thought + (real - thought))).mean()
    assert stats["ppo/policy_loss"] == pytest.approx(float(expected), rel=1e-3)
    value = 0.5 * (batch.old_values - batch.returns) ** 2
    assert stats["critic/loss"] == pytest.approx(float(value.mean()), rel=1e-3)
    sequence, _ = run(*made, dataclasses.replace(PPO, ratio="sequence", epochs=2))
    assert set(sequence) == set(stats)


def test_an_update_raises_what_was_good_and_lowers_what_was_bad(made):
    policy, batch = made
    run(policy, batch, dataclasses.replace(PPO, epochs=4, clip=10.0))
    texts = [policy.processor.decode(ids[m][:-1].tolist()) for ids, m in zip(
        batch.inputs.response_ids, batch.inputs.response_mask, strict=True)]  # fmt: skip
    after = replies(policy, list(batch.inputs.observed), texts)
    gain = torch.stack([r.logprobs.sum() for r in after]) - batch.old_logprobs.sum(1)
    assert gain[0] > gain[1]
    assert gain[2] > gain[3]
    assert gain[1] < 0


def test_micro_batches_make_the_gradient_of_the_minibatch(made):
    policy, batch = made
    start, results = copy.deepcopy(policy.state_dict()), []
    for micro in (1, 2, 4):
        policy.load_state_dict(start)
        stats, _ = run(policy, batch, dataclasses.replace(PPO, microbatch_turns=micro))
        results.append(stats)
    for stats in results[1:]:
        assert stats["ppo/grad_norm"] == pytest.approx(results[0]["ppo/grad_norm"], rel=1e-4)
        for name in set(stats) - {"system/microbatch_turns"}:  # nor do the numbers depend on it
            assert stats[name] == pytest.approx(results[0][name], rel=1e-3, abs=1e-5), name


def test_entropy_is_raised_by_its_coefficient(made):
    policy, batch = made
    neutral = batch.with_(advantages=torch.zeros(4))
    start, entropies = weights(policy), {}
    for coefficient in (0.0, 1.0, -0.0):
        with torch.no_grad():
            for name, parameter in policy.trained().items():
                parameter.copy_(start[name])
        config = dataclasses.replace(PPO, entropy_coef=coefficient, epochs=3)
        run(policy, neutral, config)
        if coefficient == 0.0:
            assert moved(policy, start) == 0  # nothing else moves the model
        entropies[coefficient] = run(policy, neutral, PPO)[0]["ppo/entropy"]
    assert entropies[1.0] > entropies[0.0] + 1e-3


def test_the_entropy_of_thoughts_leaves_out_actions_and_replies_without_a_thought(made):
    """With one micro-batch, the mean over its thought tokens before the step."""
    policy, batch = made
    mask = batch.thought_mask.clone()
    mask[0] = False
    whole = dataclasses.replace(PPO, microbatch_turns=4)
    with torch.no_grad():
        entropy = score(policy, batch.inputs).entropy
    stats, _ = run(policy, batch.with_(thought_mask=mask), whole)
    assert stats["thought/entropy"] == pytest.approx(float(entropy[mask].mean()), abs=1e-5)
    assert abs(stats["thought/entropy"] - stats["ppo/entropy"]) > 1e-4  # whole replies
    none, _ = run(policy, batch.with_(thought_mask=torch.zeros_like(mask)), whole)
    assert "thought/entropy" not in none


def test_the_gradient_is_clipped_to_its_norm(made, monkeypatch):
    policy, batch = made
    seen = []
    optimizer = make_optimizer(policy, PPO)
    step = optimizer.step

    def watched():
        grads = [p.grad for p in policy.trained().values() if p.grad is not None]
        if grads:
            seen.append(torch.nn.utils.get_total_norm(grads))
        return step()

    monkeypatch.setattr(optimizer, "step", watched)
    small = dataclasses.replace(PPO, max_grad_norm=1e-3)
    stats, _ = run(policy, batch, small, optimizer=optimizer)
    assert stats["ppo/grad_norm"] > 1e-2  # logged before clipping
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_step(made):
    policy, batch = made
    before = weights(policy)
    critic = {k: v.clone() for k, v in policy.value_head.state_dict().items()}
    bad = batch.with_(advantages=torch.tensor([1.0, math.nan, 1.0, 1.0]))
    with pytest.raises(TrainingError, match="no step was made"):
        run(policy, bad)
    assert moved(policy, before) == 0
    assert all(torch.equal(critic[k], v) for k, v in policy.value_head.state_dict().items())
    assert all(p.grad is None for p in policy.trained().values())
    assert not policy.model.training


def test_a_sampler_that_disagrees_with_scoring_stops_the_run(made):
    policy, batch = made
    before = weights(policy)
    shifted = batch.with_(old_logprobs=batch.old_logprobs - 0.3 * batch.inputs.response_mask)
    with pytest.raises(TrainingError, match=r"0\.3 nats per token .*max_logprob_gap=0\.2"):
        run(policy, shifted, gap=0.2)
    assert moved(policy, before) == 0
    assert not policy.model.training
    run(policy, shifted, gap=0.4)
    check_gap(0.2, 0.2)
    with pytest.raises(TrainingError, match="differs from sampling by nan"):
        check_gap(float("nan"), 0.2)


@pytest.mark.parametrize("through", [False, True])
def test_the_value_loss_trains_the_model_only_if_asked(made, through):
    policy, batch = made
    before = weights(policy)
    critic = policy.value_head.layers[0].weight.detach().clone()
    neutral = batch.with_(advantages=torch.zeros(4))
    run(policy, neutral, dataclasses.replace(PPO, value_gradient=through))
    assert (moved(policy, before) > 0) is through
    assert not torch.equal(critic, policy.value_head.layers[0].weight)


def test_extra_critic_steps_leave_the_model_and_fit_the_returns(made):
    policy, batch = made
    before = weights(policy)
    # each environment shows the same cards in both turns
    neutral = batch.with_(advantages=torch.zeros(4), returns=torch.tensor([3.0, -1.0, 3.0, -1.0]))
    stats, _ = run(policy, neutral, dataclasses.replace(PPO, critic_steps=100, value_lr=1e-2))
    assert moved(policy, before) == 0
    assert stats["critic/explained_variance"] > 0.9 > stats["critic/explained_variance_before"]


def test_the_learning_rate_follows_the_cosine(made):
    assert cosine(1e-3, 1e-4, 0.0) == pytest.approx(1e-3)
    assert cosine(1e-3, 1e-4, 0.5) == pytest.approx(5.5e-4)
    assert cosine(1e-3, 1e-4, 1.0) == pytest.approx(1e-4)
    policy, batch = made
    config = dataclasses.replace(PPO, minibatch_turns=2, epochs=2)  # 4 steps
    stats, optimizer = run(policy, batch, config, progress=(0.5, 1.0))
    # the last step begins at 0.5 + 0.5 * 3/4 of the run: 1e-5 + 4.5e-5 * (1 + cos(0.875 pi))
    assert stats["ppo/lr"] == pytest.approx(1e-5 + 4.5e-5 * (1 + math.cos(0.875 * math.pi)))
    assert optimizer.param_groups[0]["lr"] == stats["ppo/lr"]
    assert optimizer.param_groups[1]["lr"] == config.value_lr


def test_the_policy_is_in_eval_mode_afterwards_and_updates_are_reproducible(made):
    policy, batch = made
    start = weights(policy)
    critic = {k: v.clone() for k, v in policy.value_head.state_dict().items()}
    run(policy, batch)
    first = weights(policy)
    assert not policy.model.training
    assert not any(module.training for module in policy.model.modules())
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            parameter.copy_(start[name])
    policy.value_head.load_state_dict(critic)
    run(policy, batch)
    assert all(torch.equal(first[n], p) for n, p in policy.trained().items())


def test_dense_credit_pushes_each_token_by_its_own_advantage(made):
    """Advantage +1 on the first token and -1 on the second, elsewhere 0."""
    policy, batch = made
    tokens = torch.zeros_like(batch.old_logprobs)
    tokens[:, 0], tokens[:, 1] = 1.0, -1.0
    texts = [policy.processor.decode(ids[m][:-1].tolist()) for ids, m in zip(
        batch.inputs.response_ids, batch.inputs.response_mask, strict=True)]  # fmt: skip
    run(policy, batch.with_(advantages=tokens), dataclasses.replace(PPO, clip=10.0))
    after = replies(policy, list(batch.inputs.observed), texts)
    gain = torch.stack([r.logprobs[:2] for r in after]) - batch.old_logprobs[:, :2]
    assert (gain[:, 0] > 0).all()
    assert (gain[:, 1] < 0).all()
