import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.learning.losses import (
    clipped_surrogate,
    composite_logprob,
    explained_variance,
    full_kl,
    kl_estimate,
    masked_mean,
    token_weights,
    value_loss,
)
from gtr_turbo.learning.update import cosine


def tensor(*values):
    return torch.tensor(values)


THOUGHT = tensor([True, True, False, False], [False, False, False, False])
REAL = tensor([True, True, True, False], [True, True, False, False])


def test_lambda_weighs_the_thought_and_nothing_else():
    # row 1: .5 * (-1 - 2) - 4; row 2 has no thought: -1 - 3. The last columns are padding.
    logprobs = tensor([-1.0, -2.0, -4.0, 0.0], [-1.0, -3.0, 0.0, 0.0])
    composite = composite_logprob(logprobs, THOUGHT, REAL, thought_weight=0.5)
    assert composite.tolist() == [-5.5, -4.0]
    whole = composite_logprob(logprobs, THOUGHT, REAL, thought_weight=1.0)
    assert whole.tolist() == [-7.0, -4.0]
    action = composite_logprob(logprobs, THOUGHT, REAL, thought_weight=0.0)
    assert action.tolist() == [-4.0, -4.0]
    weights = token_weights(THOUGHT, REAL, thought_weight=0.5)
    assert weights.tolist() == [[0.5, 0.5, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]


def test_padding_reaches_no_loss():
    logprobs = torch.full((2, 4), -1.0).requires_grad_()
    noise = torch.where(REAL, torch.zeros(2, 4), torch.full((2, 4), 50.0))
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    for thought in (THOUGHT, THOUGHT | ~REAL):  # even if a mask of thoughts were too long
        plain = composite_logprob(logprobs, thought, REAL, thought_weight=0.5)
        noisy = composite_logprob(logprobs + noise, thought, REAL, thought_weight=0.5)
        assert torch.equal(plain, noisy)
        assert plain.tolist() == [-2.0, -2.0]
    (gradient,) = torch.autograd.grad(noisy.sum(), logprobs)
    assert gradient.tolist() == [[0.5, 0.5, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
    # per token, as the update sums it
    surrogate = clipped_surrogate(
        logprobs + noise / 50, torch.full((2, 4), -1.0), tensor([1.0], [2.0]), clip=0.2
    )
    weights = token_weights(THOUGHT, REAL, thought_weight=0.5)
    assert (weights * surrogate).sum(1).tolist() == [-2.0, -4.0]
    (gradient,) = torch.autograd.grad((weights * surrogate).sum(), logprobs)
    assert gradient.tolist() == [[-0.5, -0.5, -1.0, 0.0], [-2.0, -2.0, 0.0, 0.0]]
    assert masked_mean(1.0 + noise, REAL).item() == 1.0
    assert masked_mean(1.0 + noise, everywhere).item() != 1.0
    broken = torch.where(REAL, torch.ones(2, 4), torch.full((2, 4), math.nan))
    assert masked_mean(broken, REAL).item() == 1.0
    assert masked_mean(broken, REAL, dim=1).tolist() == [1.0, 1.0]


# ratio, advantage, loss at clip .2, gradient of the loss by the log-prob (- r A, or 0 where clipped)
SURROGATE = [
    (1.0, 2.0, -2.0, -2.0),
    (1.1, 2.0, -2.2, -2.2),
    (1.5, 2.0, -2.4, 0.0),  # already likelier by 1.2: no more
    (1.5, -2.0, 3.0, 3.0),  # likelier though bad: pushed back
    (0.5, 2.0, -1.0, -1.0),  # less likely though good: pushed up
    (0.5, -2.0, 1.6, 0.0),  # already less likely by .8: no more
    (0.9, -2.0, 1.8, 1.8),
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), SURROGATE)
def test_the_surrogate_is_clipped_only_where_it_would_gain(ratio, advantage, loss, slope):
    logprob = tensor(math.log(ratio) - 3.0).requires_grad_()
    value = clipped_surrogate(logprob, tensor(-3.0), tensor(advantage), clip=0.2)
    assert value.tolist() == pytest.approx([loss], abs=1e-6)
    value.sum().backward()
    assert logprob.grad.tolist() == pytest.approx([slope], abs=1e-6)


def test_one_ratio_a_turn_and_one_a_token_differ():
    # two tokens with log-ratios .1 and -.1: the turn's ratio is 1, the tokens' are e^.1 and e^-.1
    new, old = tensor([-0.9, -1.1]), tensor([-1.0, -1.0])
    turn = clipped_surrogate(new.sum(1), old.sum(1), tensor(1.0), clip=0.05)
    assert turn.tolist() == pytest.approx([-1.0])
    token = clipped_surrogate(new, old, tensor([1.0]), clip=0.05)
    assert token.flatten().tolist() == pytest.approx([-1.05, -math.exp(-0.1)])


def test_the_value_loss_takes_the_worse_of_clipped_and_unclipped():
    # V 1, V_old 0, clip .2: clipped .2. R 2: .5 * max(1, 3.24). R 0: .5 * max(1, .04). V = V_old: plain.
    losses = value_loss(
        tensor(1.0, 1.0, 0.5), tensor(0.0, 0.0, 0.5), tensor(2.0, 0.0, 1.5), clip=0.2
    )
    assert losses.tolist() == pytest.approx([1.62, 0.5, 0.5])


def test_the_value_loss_stops_where_the_value_has_moved_far_enough_towards_the_return():
    values = tensor(1.0, -1.0, 0.1).requires_grad_()
    value_loss(values, torch.zeros(3), torch.full((3,), 2.0), clip=0.2).sum().backward()
    # 1 is beyond the clip: no gradient; -1 moved away: V - R = -3; .1 is inside: -1.9
    assert values.grad.tolist() == pytest.approx([0.0, -3.0, -1.9])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("clip", [math.log(2.0), 0.0, 0.0]),
        ("k1", [math.log(2.0), 0.0, -math.log(4.0)]),
        ("abs", [math.log(2.0), 0.0, math.log(4.0)]),
        # exp(-k1) - 1 + k1: .5 - 1 + ln 2 and 4 - 1 - ln 4
        ("k3", [math.log(2.0) - 0.5, 0.0, 3.0 - math.log(4.0)]),
    ],
)
def test_estimates_of_the_reverse_kl(estimator, expected):
    # the agent gives its tokens 1/2, 1/2, 1/8; the teacher 1/4, 1/2, 1/2
    agent, teacher = tensor(0.5, 0.5, 0.125).log(), tensor(0.25, 0.5, 0.5).log()
    assert kl_estimate(agent, teacher, estimator=estimator).tolist() == pytest.approx(expected)


def test_unknown_estimators_are_named():
    with pytest.raises(ValueError, match="unknown estimator 'k2'; known: clip, k1, abs, k3, full"):
        kl_estimate(tensor(0.0), tensor(0.0), estimator="k2")


logs = st.floats(-20, 0, width=32)


@settings(max_examples=500, deadline=None)
@given(logs, logs, st.floats(-1e-3, 1e-3))
def test_k3_is_never_negative_and_vanishes_at_equality(agent, teacher, near):
    # differences near 0 are where exp(x) - 1 - x loses all its digits
    estimates = kl_estimate(
        tensor(agent, agent, agent), tensor(teacher, agent + near, agent), estimator="k3"
    )
    assert (estimates >= 0).all()
    assert estimates[2] == 0
    if abs(agent - teacher) > 1e-3:
        assert estimates[0] > 0


def test_k3_is_right_for_small_differences():
    # k1^2 / 2 to first order: 5e-9 at 1e-4, where float32 exp(-x) - 1 + x is off by 1e-8
    estimate = kl_estimate(tensor(1e-4), tensor(0.0), estimator="k3").item()
    assert estimate == pytest.approx(5e-9, rel=2e-3)  # one rounding of 1e-4 in float32 is 7e-12


def test_full_kl_of_equal_distributions_is_zero_even_with_banned_tokens():
    logprobs = tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    assert full_kl(logprobs, logprobs.clone()).tolist() == [[0.0, 0.0]]


def test_full_kl_by_hand():
    # 3/4 ln(3/4 / 1/4) + 1/4 ln(1/4 / 3/4) = 1/2 ln 3; the third token is banned in both
    agent, teacher = tensor([[0.75, 0.25, 0.0]]).log(), tensor([[0.25, 0.75, 0.0]]).log()
    assert full_kl(agent, teacher).item() == pytest.approx(0.5 * math.log(3.0))
    # what the agent does and the teacher never does costs infinitely much; the reverse costs nothing
    never = tensor([[0.0, 1.0, 0.0]]).log()
    assert full_kl(agent, never).item() == math.inf
    assert full_kl(never, agent).item() == pytest.approx(math.log(4.0))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10_000))
def test_full_kl_is_the_expectation_of_k1_and_of_k3(size, seed):
    generator = torch.Generator().manual_seed(seed)
    agent, teacher = torch.randn(
        (2, 1, 1, size), generator=generator, dtype=torch.float64
    ).log_softmax(-1)
    exact = full_kl(agent, teacher).item()
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(agent, teacher, estimator=estimator)
        assert (agent.exp() * estimates).sum().item() == pytest.approx(exact, abs=1e-12)
    clipped = kl_estimate(agent, teacher, estimator="clip")
    assert (agent.exp() * clipped).sum().item() >= exact - 1e-12


def test_masked_mean():
    values, mask = tensor([1.0, 3.0], [5.0, 7.0]), tensor([True, True], [False, False])
    assert masked_mean(values, mask).item() == 2.0
    assert masked_mean(values, mask, dim=1).tolist() == [2.0, 0.0]
    assert masked_mean(values, mask, dim=0).tolist() == [1.0, 3.0]
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0


def test_cosine_begins_and_ends_where_it_says():
    assert cosine(1e-4, 1e-9, 0.0) == pytest.approx(1e-4)
    assert cosine(1e-4, 1e-9, 1.0) == pytest.approx(1e-9)
    assert cosine(3.0, 1.0, 0.5) == pytest.approx(2.0)
    # (1 + cos(pi / 3)) / 2 = 3/4
    assert cosine(4.0, 0.0, 1 / 3) == pytest.approx(3.0)


def test_explained_variance():
    returns = tensor(1.0, 2.0, 3.0)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 9.0), returns) == 0.0  # a constant explains nothing
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)  # var(2R) = 4 var(R)
    assert explained_variance(returns, torch.ones(3)) == 0.0


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_all_numbers_has_a_gradient(advantage):
    """Where it is clipped it is 0; the rest of the minibatch must not become NaN with it."""
    new = torch.tensor([96.0, 0.0], requires_grad=True)
    clipped_surrogate(new, torch.zeros(2), torch.tensor(advantage), clip=0.2).sum().backward()
    assert torch.isfinite(new.grad).all()
    assert new.grad[1] == -advantage
    assert new.grad[0] == 0.0
