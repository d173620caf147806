import json

import numpy as np
import pytest
import torch

from gtr_turbo import collect as collecting
from gtr_turbo.config import EnvConfig, SamplingConfig
from gtr_turbo.envs.cards.points import EZPointsEnv
from gtr_turbo.evaluate import evaluate, wilson
from tiny import make_policy, replies

SAMPLING = SamplingConfig(max_new_tokens=4)


def env(num_envs, **options):
    return EnvConfig(options={"prompt": "compact", **options}, num_envs=num_envs)


@pytest.fixture(scope="module")
def policy(tiny):
    return make_policy(tiny)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),  # z^2 / (n + z^2) = 3.84146 / 13.84146
        (5, 10, 0.23659, 0.76341),
        (10, 10, 0.72247, 1.0),
        (1, 1, 0.20655, 1.0),  # 1 / (1 + z^2)
    ],
)
def test_wilson_intervals_by_hand(successes, count, low, high):
    interval = wilson(successes, count)
    assert interval == pytest.approx((low, high), abs=1e-5)
    assert 0.0 <= interval[0] <= successes / count <= interval[1] <= 1.0


@pytest.mark.parametrize("greedy", [True, False])
def test_the_same_seed_deals_the_same_whatever_the_number_of_environments(
    policy, greedy, monkeypatch
):
    dealt = {}
    for num_envs in (1, 2, 5):
        shown = []
        reset = collecting.Envs.reset

        def watched(self, i, episode, seed=None, *, shown=shown, reset=reset):
            reset(self, i, episode, seed)
            shown.append((episode, self.observations[i]["image"].tobytes()))

        with monkeypatch.context() as patch:
            patch.setattr(collecting.Envs, "reset", watched)
            result = evaluate(
                policy, env(num_envs), SAMPLING, episodes=5, split="held-out", seed=4, greedy=greedy
            )
        dealt[num_envs] = (sorted(shown), [(r.number, r.seed) for r in result.records])
        assert [r.number for r in result.records] == [0, 1, 2, 3, 4]
    assert dealt[1] == dealt[2] == dealt[5]
    assert len(set(dealt[1][0])) == 5
    seeds = [record[1] for record in dealt[1][1]]
    other = evaluate(policy, env(5), SAMPLING, episodes=5, split="held-out", seed=5, greedy=greedy)
    assert [record.seed for record in other.records] != seeds


def test_environments_are_freed_after_an_evaluation(policy, monkeypatch):
    closed = []
    monkeypatch.setattr(EZPointsEnv, "close", lambda self: closed.append(self))
    evaluate(policy, env(3), SAMPLING, episodes=4, split=None, seed=0)
    assert len({id(each) for each in closed}) == 3


def test_a_summary_counts_what_happened(policy, monkeypatch):
    """Episodes of odd number are played by the expert (4 turns, return 10), even ones badly: '=' at
    once (1 turn, return -1), with invalid JSON in episode 0.
    """
    rng, made = np.random.default_rng(0), []
    init = collecting.Envs.__init__

    def remember(self, *arguments, **options):
        init(self, *arguments, **options)
        made.append(self)

    def generate(policy, observed, sampling, generator, *, greedy=False):
        envs, texts = made[-1], []
        for i, shown in enumerate(envs.observations):
            if not any(np.array_equal(shown["image"], o.frame) for o in observed):
                continue
            fields = envs._envs[i].unwrapped.demonstrate(rng)
            if envs.episodes[i] % 2 == 0:
                fields["action"] = "="
            texts.append("=" if envs.episodes[i] == 0 else json.dumps(fields))
        return replies(policy, observed, texts)

    monkeypatch.setattr(collecting.Envs, "__init__", remember)
    monkeypatch.setattr(collecting, "generate", generate)
    done = []
    result = evaluate(
        policy, env(1, early_truncation=True), SAMPLING,
        episodes=4, split=None, seed=0, on_episode=done.append,
    )  # fmt: skip
    assert done == [1, 2, 3, 4]
    assert [r.success for r in result.records] == [False, True, False, True]
    assert [r.turns for r in result.records] == [1, 4, 1, 4]
    assert [r.valid_turns for r in result.records] == [0, 4, 1, 4]
    assert [r.episode_return for r in result.records] == [-1.0, 10.0, -1.0, 10.0]
    summary = result.summary()
    assert summary["success"] == 0.5
    assert summary["interval"] == pytest.approx([0.15004, 0.84996], abs=1e-5)
    assert summary["return"] == 4.5
    assert summary["valid"] == 0.9
    assert (summary["episodes"], summary["turns"]) == (4, 10)
    # of the 9 parsed turns all perceive and plan, and the '=' of episode 2 does not follow its plan
    assert summary["facts"] == pytest.approx({"perception": 1, "plan": 1, "agreement": 8 / 9})
    json.dumps(summary)


def test_inside_as_teacher_the_teacher_is_evaluated(tiny, monkeypatch):
    policy = make_policy(tiny)
    generator = torch.Generator().manual_seed(0)
    policy.load_teacher(
        {n: 0.05 * torch.randn(d.shape, generator=generator) for n, d in policy.deltas()}
    )
    written, generate = [], collecting.generate

    def watched(*arguments, **options):
        made = generate(*arguments, **options)
        written.append([reply.response_ids.tolist() for reply in made])
        return made

    monkeypatch.setattr(collecting, "generate", watched)

    def run():
        written.clear()
        evaluate(policy, env(2), SAMPLING, episodes=2, split=None, seed=0, greedy=True)
        return list(written)

    student = run()
    with policy.as_teacher():
        teacher = run()
    assert teacher != student
    assert run() == student
    with torch.no_grad():
        for name, parameter in policy.trained().items():
            parameter.copy_(policy.teacher_state()[name])
    assert run() == teacher
