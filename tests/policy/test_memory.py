import copy
import dataclasses

import pytest
import torch

from gtr_turbo.config import ConfigError, PPOConfig
from gtr_turbo.learning import update as updates
from gtr_turbo.policy.memory import USED, Microbatch, fitting
from gtr_turbo.policy.scoring import score
from test_update import PPO, made, run, weights  # noqa: F401
from tiny import Bytes, inputs_of, make_policy, observations

AUTO = PPOConfig(microbatch_turns="auto", minibatch_turns=12)


@pytest.mark.parametrize(
    ("room", "most", "expected"),
    [
        (100, 130, 10),  # 10 + 10 * 9
        (100, 12, 6),  # two equal parts, not 10 and 2
        (10_000, 12, 12),
        (18, 12, 1),  # not even one, by the estimate: the halving has the last word
    ],
)
def test_what_fits_by_hand(room, most, expected):
    """A pass over one turn took 19, over four 46: 10 fixed and 9 each."""
    assert fitting(one=19, several=46, probe=4, room=room, most=most) == expected


class Counted:
    """Bytes of tensors on the CPU, in a device of `size`."""

    def __init__(self, counter, size):
        self._counter, self._size, self._before = counter, size, 0

    def start(self):
        self._counter.peak = self._before = self._counter.live

    def peak(self):
        return self._counter.peak - self._before

    def free(self):
        return self._size - self._counter.live


def test_auto_fills_the_room_it_measured_and_no_more(tiny):
    """The prediction against passes of the size it chose, and of a larger one."""
    policy = make_policy(tiny, train="lora", lora_rank=4)
    observed = observations(policy, 12)
    moments = 2 * sum(parameter.nbytes for parameter in policy.trained().values())
    with Bytes() as counter:

        def took(turns):
            counter.peak = before = counter.live
            inputs = inputs_of(policy, observed[:turns], [torch.full((20,), 300)] * turns)
            score(policy, inputs).logprobs.sum().backward()
            policy.zero_grad()
            return counter.peak - before

        room = (took(4) + took(6)) / 2
        micro = Microbatch(AUTO, pytest.fail, Counted(counter, (room + moments) / USED))
        assert micro.turns == 12  # for want of better
        micro.measure(policy, observed, 20)
        assert micro.turns == 4
        assert took(4) < room < took(6)
        assert all(p.grad is None for p in policy.trained().values())
        micro.measure(policy, observed, 2000)  # once only
        assert micro.turns == 4
        resumed = Microbatch(AUTO, pytest.fail, Counted(counter, room / USED))
        resumed.measure(policy, observed, 20, moments=True)
        assert resumed.turns == 4
        small = Microbatch(AUTO, pytest.fail, Counted(counter, moments))
        small.measure(policy, observed, 20)
        assert small.turns == 1


def test_without_a_gpu_auto_is_a_number(tiny):
    assert Microbatch(PPOConfig(microbatch_turns="auto"), pytest.fail).turns == 64
    with pytest.raises(ConfigError, match=r"ppo\.microbatch_turns=0 must be a number greater"):
        PPOConfig(microbatch_turns=0)


def test_the_minibatch_that_ran_out_of_memory_is_made_again_in_halves(made, monkeypatch):  # noqa: F811
    """What an attempt had accumulated before it failed does not count, nor do the numbers it had."""
    policy, batch = made
    start = copy.deepcopy(policy.state_dict())
    whole, _ = run(policy, batch, dataclasses.replace(PPO, microbatch_turns=1))
    expected = weights(policy)
    policy.load_state_dict(start)
    score, notes, sizes = updates.score, [], []

    def small(policy, inputs, **options):
        sizes.append(len(inputs.observed))
        if len(inputs.observed) > 1 and len(sizes) > 1:  # the first part still fits
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(policy, inputs, **options)

    monkeypatch.setattr(updates, "score", small)
    monkeypatch.setattr(updates.warnings, "warn", notes.append)
    stats, _ = run(policy, batch, dataclasses.replace(PPO, microbatch_turns=2))
    assert sizes == [2, 2, 1, 1, 1, 1]
    assert notes == ["out of device memory: micro-batches are 1 turns from here on"]
    assert stats["system/microbatch_turns"] == 1
    for name, parameter in weights(policy).items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-7, rtol=1e-6)
    for name, number in whole.items():
        assert stats[name] == pytest.approx(number, rel=1e-5, abs=1e-7), name


def test_where_not_even_one_turn_fits_it_says_so():
    def never(turns):
        raise torch.OutOfMemoryError(f"{turns} turns")

    notes = []
    with pytest.raises(torch.OutOfMemoryError, match="1 turns"):
        Microbatch(PPOConfig(microbatch_turns=4, minibatch_turns=4), notes.append).attempt(never)
    assert len(notes) == 2


def test_a_pass_of_sharded_weights_is_not_made_again():
    """The other ranks are in the middle of it."""
    passes = []

    def never(turns):
        passes.append(turns)
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = PPOConfig(microbatch_turns=4, minibatch_turns=4)
    with pytest.raises(torch.OutOfMemoryError, match=r"4 turns a pass.*set ppo\.microbatch_turns"):
        Microbatch(config, pytest.fail, sharded=True).attempt(never)
    assert passes == [4]
