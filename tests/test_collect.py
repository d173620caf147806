import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from gtr_turbo import collect as collecting
from gtr_turbo.collect import Envs, collect, play, rescore, stream
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.envs.cards.drawing import Card
from gtr_turbo.envs.contract import ContractError
from gtr_turbo.policy.scoring import values
from tiny import make_policy, replies

SAMPLING = SamplingConfig(max_new_tokens=6)
EZPOINTS = EnvConfig(id="EZPoints", options={"prompt": "compact"}, num_envs=3)


@pytest.fixture(scope="module")
def policy(tiny):
    made = make_policy(tiny)
    torch.manual_seed(0)
    torch.nn.init.normal_(made.value_head.layers[-1].weight)  # values that differ
    return made


def started(config=EZPOINTS, seed=0):
    envs = Envs(config, None, seed)
    envs.start()
    return envs


def gather(envs, policy, turns, **rollout):
    rollout = RolloutConfig(turns_per_env=turns, **rollout)
    return collect(envs, policy, SAMPLING, rollout, torch.Generator().manual_seed(0))


def expert(envs, monkeypatch, change=None):
    """Let the environments' experts write the replies; `change(fields)` alters them."""
    rng = np.random.default_rng(0)

    def generate(policy, observed, sampling, generator, *, greedy=False):
        assert len(observed) == len(envs)
        texts = []
        for i in range(len(envs)):
            fields = envs._envs[i].unwrapped.demonstrate(rng)
            texts.append(json.dumps(change(fields) if change else fields))
        return replies(policy, observed, texts)

    monkeypatch.setattr(collecting, "generate", generate)


def test_turns_are_ordered_by_time_then_environment(policy):
    turns = gather(started(), policy, 4)
    assert [turn.env_index for turn in turns] == [0, 1, 2] * 4
    for i in range(3):
        own = turns[i::3]
        numbers = [(turn.episode, turn.step) for turn in own]
        assert numbers == sorted(numbers)
        for turn, following in itertools.pairwise(own):
            new = turn.done
            assert following.episode == turn.episode + new
            assert following.step == (0 if new else turn.step + 1)


def test_an_invalid_reply_has_no_thought_and_the_penalty(policy):
    turns = gather(started(), policy, 2, format_invalid=-3.5)
    for turn in turns:
        assert not turn.valid
        assert not turn.legal
        assert turn.thought_tokens == 0
        assert turn.reply.response_ids[turn.thought_span].tolist() == []
        assert torch.equal(turn.reply.response_ids[turn.action_span], turn.reply.response_ids)
        assert turn.format_reward == -3.5
        assert (turn.action, turn.fields, turn.facts) == ("", {}, {})
        assert turn.reward == -1.0  # EZPoints: an illegal token


def test_next_values_chain_within_episodes_and_stop_where_the_task_ended(policy, monkeypatch):
    """The expert needs 4 turns an episode, so 6 turns cross an ending and stop inside an episode."""
    envs = started()
    expert(envs, monkeypatch)
    turns = gather(envs, policy, 6)
    ended = 0
    for i in range(3):
        own = turns[i::3]
        for turn, following in itertools.pairwise(own):
            if turn.terminated:
                assert turn.next_value == 0.0
                ended += 1
            else:
                assert turn.next_value == following.reply.value
                assert turn.next_value != 0.0
        shown = envs.observations[i]
        seen = policy.observe([shown["image"]], [shown["prompt"]])
        assert own[-1].next_value == pytest.approx(float(values(policy, seen)), abs=1e-4)
    assert ended == 3


def test_a_truncated_turn_keeps_the_value_of_what_it_led_to(policy):
    """EZPoints is cut after 5 turns without '='; random replies never end it."""
    envs, last = started(), {}
    step = envs.step

    def watched(i, action):
        outcome = step(i, action)
        if outcome.truncated:
            last[i] = outcome.observation
        return outcome

    envs.step = watched
    turns = gather(envs, policy, 8)
    cut = [turn for turn in turns if turn.truncated]
    assert len(cut) == 3
    for turn in cut:
        assert not turn.terminated
        assert turn.success is False
        before_reset = last[turn.env_index]
        seen = policy.observe([before_reset["image"]], [before_reset["prompt"]])
        expected = float(values(policy, seen))
        assert turn.next_value == pytest.approx(expected, abs=1e-4)
        following = turns[next(n for n, t in enumerate(turns) if t is turn) + 3]
        assert following.episode == turn.episode + 1
        assert abs(following.reply.value - expected) > 1e-6


def test_an_expert_succeeds_and_is_paid_as_the_rules_say(policy, monkeypatch):
    envs = started()
    expert(envs, monkeypatch)
    turns = gather(envs, policy, 4, format_valid=0.25)
    for i in range(3):
        own = turns[i::3]
        assert [turn.reward for turn in own] == [0.0, 0.0, 0.0, 10.0]
        assert [turn.terminated for turn in own] == [False, False, False, True]
        assert [turn.success for turn in own] == [None, None, None, True]
        assert [turn.action for turn in own][-1] == "="
        assert all(turn.valid and turn.legal and turn.format_reward == 0.25 for turn in own)
        assert all(
            turn.facts == {"perception": True, "plan": True, "agreement": True} for turn in own
        )
    assert envs.episodes == [1, 1, 1]  # all reset in the same step
    assert envs.actions == [[], [], []]


def test_rewards_of_known_cards_by_hand(policy, monkeypatch):
    """A five and a seven: '5', '+', '5' (used up: -1, a blank), '=' (wrong: -1)."""
    config = EnvConfig(id="EZPoints", options={"prompt": "compact"}, num_envs=1)
    envs = started(config)
    cards = [Card(rank, suit) for rank, suit in ((4, 0), (6, 1))]
    envs.observations[0], envs.infos[0] = envs._envs[0].reset(options={"cards": cards})
    script = iter(["5", "+", "5", "=", "12"])
    expert(envs, monkeypatch, lambda fields: {**fields, "action": next(script)})
    turns = gather(envs, policy, 5)
    assert envs._envs[0].unwrapped.goal == 12
    assert turns[0].observed is not turns[1].observed
    assert [turn.reward for turn in turns] == [0.0, 0.0, -1.0, -1.0, -1.0]
    assert [turn.done for turn in turns] == [False, False, False, True, False]
    assert turns[3].success is False
    assert [turn.legal for turn in turns] == [
        True,
        True,
        True,
        True,
        False,
    ]  # 12 is no listed action


def test_spans_cover_the_reply_and_the_action_lies_outside_the_thought(policy, monkeypatch):
    envs = started()
    expert(envs, monkeypatch)
    decode = policy.processor.decode
    for turn in gather(envs, policy, 4):
        ids = turn.reply.response_ids
        assert turn.thought_tokens > 0
        assert turn.thought_span.stop == turn.action_span.start
        assert turn.action_span.stop == len(ids) == len(turn.reply.logprobs)
        thought = decode(ids[turn.thought_span].tolist())
        action = decode(ids[turn.action_span].tolist())
        assert json.dumps(turn.fields["thoughts"])[1:-1] in thought
        assert '"action"' not in thought
        assert json.dumps(turn.action) in action
        assert thought + action == turn.text + "<|im_end|>"
        assert ids[-1] == policy.processor.end_token_id


def test_restoring_replays_running_episodes_exactly(policy):
    envs = started(seed=3)
    gather(envs, policy, 7)  # the first episodes are over, the second run
    saved = json.loads(json.dumps(envs.state()))
    assert [entry["episode"] for entry in saved] == [1, 1, 1]
    assert all(entry["actions"] for entry in saved)
    other = Envs(EZPOINTS, None, 3)
    other.restore(saved)
    for a, b in zip(envs.observations, other.observations, strict=True):
        assert a["prompt"] == b["prompt"]
        assert np.array_equal(a["image"], b["image"])
    assert other.state() == saved
    first, second = gather(envs, policy, 6), gather(other, policy, 6)
    for a, b in zip(first, second, strict=True):
        assert a.prompt == b.prompt
        assert (a.reward, a.done, a.episode, a.step) == (b.reward, b.done, b.episode, b.step)
        assert torch.equal(a.reply.response_ids, b.reply.response_ids)


def test_every_episode_of_every_environment_has_its_own_seed():
    seeds = [stream(seed, 0, i, e) for seed in range(2) for i in range(8) for e in range(8)]
    assert len(set(seeds)) == len(seeds)
    envs = started()
    dealt = set()
    for episode in range(6):
        for i in range(3):
            envs.reset(i, episode)
            dealt.add(envs.observations[i]["image"].tobytes())
    assert len(dealt) > 12  # of 18; a few deals may fall together


def test_the_frame_is_kept_as_uint8_and_sampling_is_reproducible(policy):
    first, second = gather(started(), policy, 2), gather(started(), policy, 2)
    assert first[0].observed.frame.dtype == np.uint8
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.reply.response_ids, b.reply.response_ids)
        assert torch.equal(a.reply.logprobs, b.reply.logprobs)


def test_play_leaves_a_finished_episode_finished(policy, monkeypatch):
    envs = started()
    expert(envs, monkeypatch)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        made = play(envs, range(3), policy, SAMPLING, RolloutConfig(), generator)
    assert all(turn.done and turn.step == 3 for turn, _ in made)
    assert envs.episodes == [0, 0, 0]


def test_a_reward_that_is_no_finite_number_is_told_with_its_action(monkeypatch):
    envs = started()
    step = envs._envs[0].unwrapped.step
    monkeypatch.setattr(
        envs._envs[0].unwrapped,
        "step",
        lambda action: (step(action)[0], float("nan"), *step("=")[2:]),
    )
    with pytest.raises(ContractError, match=r"EZPoints: step\('2'\) paid nan, which is no finite"):
        envs.step(0, "2")


def test_rescoring_gives_what_the_sampler_recorded_in_float32(policy):
    turns = gather(started(), policy, 2)
    for turn, again in zip(turns, rescore(turns, policy, 3), strict=True):
        torch.testing.assert_close(again.reply.logprobs, turn.reply.logprobs, atol=1e-4, rtol=0)
        assert again.reply.value == pytest.approx(turn.reply.value, abs=1e-4)
        assert torch.equal(again.reply.response_ids, turn.reply.response_ids)


def test_the_value_of_what_follows_is_the_one_that_scoring_gave_it(policy, monkeypatch):
    envs = started()
    rng = np.random.default_rng(0)

    def generate(policy, observed, sampling, generator, *, greedy=False):
        """Replies whose recorded values a coarser type would have rounded."""
        texts = [json.dumps(env.unwrapped.demonstrate(rng)) for env in envs._envs]
        return [
            replace(reply, value=reply.value + 1.0) for reply in replies(policy, observed, texts)
        ]

    monkeypatch.setattr(collecting, "generate", generate)
    turns = gather(envs, policy, 3, rescore=True)
    for i in range(3):
        for turn, following in itertools.pairwise(turns[i::3]):
            assert turn.next_value == following.reply.value
            seen = policy.observe([following.observed.frame], [following.prompt])
            assert turn.next_value == pytest.approx(float(values(policy, seen)), abs=1e-4)


def test_an_action_is_legal_with_the_blanks_that_the_game_takes(policy, monkeypatch):
    envs = started(EnvConfig(id="Points24", options={"granularity": "reduction"}, num_envs=1))
    first = envs.infos[0]["actions"][0]
    spaced = iter([" ".join(first), first.replace("+", "/")])
    expert(envs, monkeypatch, lambda fields: {**fields, "action": next(spaced)})
    turns = gather(envs, policy, 1)
    assert turns[0].action != first
    assert turns[0].legal
    assert turns[0].reward == 0, "it was played"


def test_judgements_become_plain_truths(monkeypatch):
    envs = started()
    kind = type(envs._envs[0].unwrapped)
    monkeypatch.setattr(kind, "judge", lambda self, reply: {"plan": np.bool_(True)})
    assert json.dumps(envs.judge(0, {"action": "1"})) == '{"plan": true}'


def test_an_episode_that_ends_without_a_word_about_success_is_told(monkeypatch):
    envs = started()
    monkeypatch.setattr(envs._envs[0], "step", lambda action: ({}, 0.0, False, True, {}))
    with pytest.raises(ContractError, match=r"EZPoints: .* holds no success; if a step limit"):
        envs.step(0, "1")


def test_one_environment_that_cannot_be_closed_does_not_keep_the_others_open(monkeypatch):
    envs, closed = started(), []
    for i, env in enumerate(envs._envs):
        monkeypatch.setattr(env, "close", lambda i=i: closed.append(i) or 1 / (i - 1))
    with pytest.raises(ZeroDivisionError):
        envs.close()
    assert sorted(closed) == [0, 1, 2]


def test_an_evaluation_plays_each_numbered_task_once_before_any_again():
    envs = started()
    played = []
    for env in envs._envs:
        env.unwrapped.numbered = 4
        env.reset = lambda seed, options: (played.append(options), ({}, {}))[1]
    for number in range(8):
        envs.reset(number % 3, number, seed=number)
    numbers = [options["number"] for options in played]
    assert sorted(numbers[:4]) == [0, 1, 2, 3]
    assert numbers[:4] == numbers[4:]
    envs.reset(0, 5)
    assert played[-1] is None, "training draws"


def test_an_environment_without_fields_is_refused():
    with pytest.raises(ContractError, match="fields"):
        Envs(EnvConfig(id="CartPole-v1", options={}, num_envs=1), None, 0)
