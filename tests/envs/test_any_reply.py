"""What a model may write instead of a reply: it is judged, and never stops a run."""

import random

import pytest

from gtr_turbo.envs import make_env

STEPS = ["8/4", "/", "*", "-2", "-0", "=1", "=1/0", ", "]
PIECES = ["0", "1", "3", "10", "24", "00", "/", "-", "+", "*", "=", "(", ")", " ", ", ", "--"]
PIECES += ["x", "½", "٣", "\x00", "hit", "take", "fridge 1"]
FIELDS = ["cards", "formula", "thoughts", "action", "dealer", "player", "current number", "target"]


def anything(rng, depth=0):
    """Text of the pieces, mostly; or some other value that JSON can hold."""
    kind = rng.random()
    if kind < 0.7 or depth == 2:
        return "".join(rng.choices(rng.choice([STEPS, PIECES]), k=rng.randint(0, 30)))
    if kind < 0.8:
        return rng.choice([None, True, -1, 10**30, float("nan"), float("inf")])
    values = [anything(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return values if kind < 0.9 else {str(i): value for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("name", "options", "replies"),
    [
        ("Points24", {"granularity": "token"}, 2000),
        ("Points24", {"granularity": "reduction"}, 2000),
        ("Points24", {"granularity": "formula"}, 2000),
        ("NumberLine", {}, 500),
        ("Blackjack", {}, 500),
        ("Household", {}, 200),
    ],
)
def test_every_reply_is_judged(name, options, replies):
    rng = random.Random(0)
    env = make_env(name, **options)
    env.reset(seed=0)
    for _ in range(replies):
        reply = {field: anything(rng) for field in FIELDS}
        facts = env.unwrapped.judge(reply)
        assert {type(fact) for fact in facts.values()} <= {bool}, reply
        _, _, terminated, truncated, _ = env.step(str(reply["action"]))
        if terminated or truncated:
            env.reset()
