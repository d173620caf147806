import pytest
import torch

from gtr_turbo.learner import per_turn
from gtr_turbo.learning.advantages import assign_credit, centre, gae, normalise
from gtr_turbo.turns.batch import Batch, Inputs

SETTINGS = {
    "gamma": 0.5,
    "lam": 0.5,
    "normalize": False,
    "eps": 0.0,
    "beta": 2.0,
    "credit": "advantage",
    "center": False,
}


def col(*values):
    """One environment: (T, 1)."""
    return torch.tensor(values)[:, None]


def make_batch(*, shape, thoughts, rewards, values, next_values, done, terminated=None, **more):
    """A batch of replies of four tokens, whose first `thoughts[i]` are the thought."""
    count = len(rewards)
    tokens = torch.ones((count, 4), dtype=torch.bool)
    thought = torch.arange(4)[None] < torch.tensor(thoughts)[:, None]
    if "kl_tokens" in more:
        more.setdefault("kl_mask", thought)
    done = torch.tensor(done)
    return Batch(
        inputs=Inputs(
            observed=(),
            prompt_ids=torch.ones((count, 1), dtype=torch.long),
            prompt_mask=tokens[:, :1],
            response_ids=torch.ones((count, 4), dtype=torch.long),
            response_mask=tokens,
        ),
        thought_mask=thought,
        old_logprobs=torch.full((count, 4), -1.0),
        old_values=torch.tensor(values),
        hidden=torch.zeros((count, 2)),
        rewards=torch.tensor(rewards),
        next_values=torch.tensor(next_values),
        terminated=done if terminated is None else torch.tensor(terminated),
        done=done,
        shape=shape,
        **more,
    )


def two_turns(**more):
    """One environment: a turn without reward, then one that ends with 4. The critic says 0.

    deltas [0, 4]; gamma * lambda = 1/4, so the advantages are [0 + 4 / 4, 4] = [1, 4].
    """
    return make_batch(
        shape=(2, 1),
        thoughts=[2, 3],
        rewards=[0.0, 4.0],
        values=[0.0, 0.0],
        next_values=[0.0, 0.0],
        done=[False, True],
        **more,
    )


def test_credit_stops_at_a_truncation_but_the_value_does_not():
    # deltas: 0 + .5*2 - 1 = 0; 1 + .5*6 - 2 = 2 (cut: the future is worth its value); 2 - 4 = -2.
    # running: -2; 2 (no credit crosses the cut); 0 + .25 * 2 = .5
    advantages, returns = gae(
        rewards=col(0.0, 1.0, 2.0),
        values=col(1.0, 2.0, 4.0),
        next_values=col(2.0, 6.0, 0.0),
        terminated=col(False, False, True),
        done=col(False, True, True),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.flatten().tolist() == [0.5, 2.0, -2.0]
    assert returns.flatten().tolist() == [1.5, 4.0, 2.0]


def test_a_termination_is_worth_nothing_beyond_its_reward():
    # as above, but the second turn ends the task: its delta is 1 - 2 = -1, whatever `next_values` says
    advantages, returns = gae(
        rewards=col(0.0, 1.0, 2.0),
        values=col(1.0, 2.0, 4.0),
        next_values=col(2.0, 6.0, 8.0),
        terminated=col(False, True, True),
        done=col(False, True, True),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.flatten().tolist() == [-0.25, -1.0, -2.0]
    assert returns.flatten().tolist() == [0.75, 1.0, 2.0]


def test_the_last_turn_of_an_update_keeps_its_value_when_the_episode_goes_on():
    # delta: 1 + .5*4 - 1 = 2
    advantages, _ = gae(
        rewards=col(1.0),
        values=col(1.0),
        next_values=col(4.0),
        terminated=col(False),
        done=col(False),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.item() == 2.0


def test_environments_do_not_mix():
    # first column as in `two_turns`; the second has nothing but a reward of 8 at its first turn
    advantages, _ = gae(
        rewards=torch.tensor([[0.0, 8.0], [4.0, 0.0]]),
        values=torch.zeros(2, 2),
        next_values=torch.zeros(2, 2),
        terminated=torch.zeros(2, 2, dtype=torch.bool),
        done=torch.zeros(2, 2, dtype=torch.bool),
        gamma=0.5,
        lam=0.5,
    )
    assert advantages.tolist() == [[1.0, 8.0], [4.0, 0.0]]


def test_lambda_one_gives_discounted_returns():
    # rewards 1, 1, 1, gamma .5: returns 1.75, 1.5, 1 whatever the critic says
    _, returns = gae(
        rewards=col(1.0, 1.0, 1.0),
        values=col(5.0, -3.0, 7.0),
        next_values=col(-3.0, 7.0, 0.0),
        terminated=col(False, False, True),
        done=col(False, False, True),
        gamma=0.5,
        lam=1.0,
    )
    assert returns.flatten().tolist() == [1.75, 1.5, 1.0]


def test_normalised_advantages_have_mean_zero_and_deviation_one():
    # mean 2, deviation (n - 1) of [1, 2, 3] is 1
    assert normalise(torch.tensor([1.0, 2.0, 3.0]), eps=0.0).tolist() == [-1.0, 0.0, 1.0]
    # eps 1 halves them; a batch without signal stays 0; so does a single turn
    assert normalise(torch.tensor([1.0, 2.0, 3.0]), eps=1.0).tolist() == [-0.5, 0.0, 0.5]
    assert normalise(torch.tensor([4.0, 4.0]), eps=0.1).tolist() == [0.0, 0.0]
    assert normalise(torch.tensor([4.0]), eps=0.1).tolist() == [0.0]


def test_centre_takes_the_mean_of_what_has_a_thought():
    kl = torch.tensor([1.0, 3.0, 0.0])
    assert centre(kl, torch.tensor([True, True, False])).tolist() == [-1.0, 1.0, 0.0]
    assert centre(kl, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_without_kl_there_is_only_gae():
    done = assign_credit(two_turns(), **SETTINGS)
    assert done.advantages.tolist() == [1.0, 4.0]
    assert done.returns.tolist() == [1.0, 4.0]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("credit", ["advantage", "reward", "token"])
def test_a_weight_of_zero_leaves_ppo_untouched(credit, center):
    batch = two_turns(kl=torch.tensor([7.0, 3.0]), kl_tokens=torch.full((2, 4), 5.0))
    settings = {**SETTINGS, "beta": 0.0, "credit": credit, "center": center}
    done = assign_credit(batch, **settings)
    advantages = done.advantages if credit != "token" else done.advantages[:, 0]
    assert advantages.tolist() == [1.0, 4.0]
    assert done.returns.tolist() == [1.0, 4.0]
    if credit == "token":
        assert torch.equal(done.advantages, done.advantages[:, :1].expand(2, 4))


def test_credit_advantage_takes_beta_kl_from_the_turn_and_not_from_the_returns():
    done = assign_credit(two_turns(kl=torch.tensor([0.5, 1.5])), **SETTINGS)
    assert done.advantages.tolist() == [0.0, 1.0]  # 1 - 2 * .5, 4 - 2 * 1.5
    assert done.returns.tolist() == [1.0, 4.0]


def test_credit_advantage_enters_after_normalisation():
    # [1, 4]: mean 2.5, deviation 3 / sqrt 2, so [-1, 1] / sqrt 2; then the KL as it is
    done = assign_credit(two_turns(kl=torch.tensor([0.5, 1.5])), **{**SETTINGS, "normalize": True})
    assert done.advantages.tolist() == pytest.approx([-(0.5**0.5) - 1.0, 0.5**0.5 - 3.0])


def test_credit_reward_reaches_earlier_turns():
    # rewards [0 - 1, 4 - 3] = [-1, 1]; advantages [-1 + 1 / 4, 1]
    done = assign_credit(two_turns(kl=torch.tensor([0.5, 1.5])), **{**SETTINGS, "credit": "reward"})
    assert done.advantages.tolist() == [-0.75, 1.0]
    assert done.returns.tolist() == [-0.75, 1.0]


def test_credit_token_enters_at_the_tokens_of_the_thought():
    tokens = torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.0, 0.25, 0.5, 0.0]])
    done = assign_credit(
        two_turns(kl=torch.tensor([0.75, 0.25]), kl_tokens=tokens),
        **{**SETTINGS, "credit": "token"},
    )
    assert done.advantages.tolist() == [[0.0, -1.0, 1.0, 1.0], [4.0, 3.5, 3.0, 4.0]]
    assert done.returns.tolist() == [1.0, 4.0]


def test_a_centred_kl_pushes_as_much_up_as_down():
    # mean 1: [-.5, .5], so the sum of the advantages stays 1 + 4
    settings = {**SETTINGS, "center": True}
    done = assign_credit(two_turns(kl=torch.tensor([0.5, 1.5])), **settings)
    assert done.advantages.tolist() == [2.0, 3.0]
    # five thought tokens with mean .5: each becomes kl - .5; the action's tokens stay at the turn's
    tokens = torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0]])
    done = assign_credit(two_turns(kl_tokens=tokens), **{**settings, "credit": "token"})
    assert done.advantages.tolist() == [[1.0, 0.0, 1.0, 1.0], [5.0, 4.0, 4.0, 4.0]]


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("credit", ["advantage", "reward", "token"])
def test_an_invalid_reply_has_no_kl_and_does_not_move_the_others(credit, center):
    # turns of three environments, the last without a thought; the KL of the others has mean 1
    tokens = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.5, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    batch = make_batch(
        shape=(1, 3),
        thoughts=[2, 2, 0],
        rewards=[1.0, 1.0, -2.0],
        values=[0.0, 0.0, 0.0],
        next_values=[0.0, 0.0, 0.0],
        done=[True, True, True],
        kl=torch.tensor([0.5, 1.5, 0.0]),
        kl_tokens=tokens,
    )
    done = assign_credit(batch, **{**SETTINGS, "credit": credit, "center": center})
    advantages = done.advantages if credit != "token" else done.advantages[:, 0]
    assert advantages.tolist() == ([2.0, 0.0, -2.0] if center else [0.0, -2.0, -2.0])
    if credit == "token":
        assert done.advantages[2].tolist() == [-2.0] * 4
        assert done.advantages[0, 2:].tolist() == [1.0, 1.0]


def test_a_centred_kl_of_the_whole_reply_reaches_the_action():
    # seven guided tokens, the fourth of the second turn is not; their mean is 7 / 7 = 1
    tokens = torch.tensor([[0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 0.5, 9.0]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    batch = two_turns(kl_tokens=tokens, kl_mask=mask)
    done = assign_credit(batch, **{**SETTINGS, "center": True, "credit": "token"})
    assert done.advantages.tolist() == [[3.0, 1.0, -1.0, -3.0], [6.0, 5.0, 5.0, 4.0]]


def test_dense_credit_is_stored_as_its_mean_over_the_reply():
    batch = two_turns(advantages=torch.tensor([[1.0, 2.0, 9.0, 9.0], [1.0, 2.0, 3.0, 6.0]]))
    batch.inputs.response_mask[0, 2:] = False  # a reply of two tokens
    assert per_turn(batch, None, 0)["advantage"] == [1.5, 3.0]


def test_the_batch_that_came_in_is_not_changed():
    batch = two_turns(kl=torch.tensor([0.5, 1.5]), kl_tokens=torch.ones(2, 4))
    assign_credit(batch, **{**SETTINGS, "credit": "reward", "center": True})
    assert batch.rewards.tolist() == [0.0, 4.0]
    assert batch.kl.tolist() == [0.5, 1.5]
    assert batch.advantages is None
