import numpy as np
import pytest
from gymnasium.utils.seeding import np_random

from gtr_turbo.envs import make_env


def at(current, target, **options):
    env = make_env("NumberLine", **options)
    env.reset(seed=0)
    env.unwrapped.current, env.unwrapped.target = current, target
    return env


def test_a_goal_equal_to_the_start_becomes_the_next_number_modulo_five():
    env, equal = make_env("NumberLine"), set()
    for seed in range(300):
        start, goal = (int(n) for n in np_random(seed)[0].integers(0, 6, size=2))
        _, info = env.reset(seed=seed)
        assert info["current"] == start
        if start == goal:
            equal.add((start, info["target"]))
        else:
            assert info["target"] == goal
    assert equal == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (5, 1)}


@pytest.mark.parametrize(
    ("current", "target", "action", "reward", "now"),
    [
        (2, 3, "+", 1.0, 3),
        (1, 0, "-", 1.0, 0),
        (2, 5, "+", 0.0, 3),
        (2, 5, "-", -1.0, 1),
        (0, 5, "-", -1.0, 0),  # clipped: the distance did not shrink
        (5, 1, "+", -1.0, 5),
        (2, 5, "++", -1.0, 2),
        (2, 5, "", -1.0, 2),
    ],
)
def test_reward_and_move(current, target, action, reward, now):
    _, paid, terminated, truncated, info = at(current, target).step(action)
    assert (paid, info["current"]) == (reward, now)
    assert (terminated, truncated) == (reward == 1.0, False)


def test_an_episode_is_truncated_after_ten_steps_and_not_terminated():
    env = at(0, 5)
    ends = [env.step("-")[2:4] for _ in range(9)]
    assert ends == [(False, False)] * 9
    _, reward, terminated, truncated, info = env.step("-")
    assert (reward, terminated, truncated, info["success"]) == (-1.0, False, True, False)


def test_reaching_the_goal_at_the_tenth_step_terminates():
    env = at(0, 1)
    for _ in range(9):
        env.step("-")
    _, reward, terminated, truncated, info = env.step("+")
    assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_early_truncation_ends_the_task_at_the_first_minus_one():
    env = at(0, 5, early_truncation=True)
    assert env.step("+")[1:4] == (0.0, False, False)
    _, reward, terminated, truncated, info = env.step("-")
    assert (reward, terminated, truncated, info["success"]) == (-1.0, True, False, False)


def test_the_numbers_are_in_the_image_and_not_in_the_prompt():
    for style in ("full", "compact"):
        env = make_env("NumberLine", prompt=style)
        seen = {}
        for seed in range(200):
            observation, info = env.reset(seed=seed)
            seen[info["current"], info["target"]] = observation
        assert len(seen) == 30
        assert len({o["prompt"] for o in seen.values()}) == 1
        assert len({o["image"].tobytes() for o in seen.values()}) == 30


def test_the_splits_part_the_thirty_pairs():
    pairs = {}
    for split in ("all", "train", "held-out"):
        env = make_env("NumberLine", split=split)
        infos = [env.reset(seed=seed)[1] for seed in range(400)]
        pairs[split] = {(info["current"], info["target"]) for info in infos}
    assert pairs["train"] | pairs["held-out"] == pairs["all"]
    assert not pairs["train"] & pairs["held-out"]
    assert pairs["held-out"] == {(2, 4), (3, 4), (4, 2), (5, 1), (5, 4)}


def test_a_split_it_does_not_have_is_refused():
    with pytest.raises(ValueError, match="split='held-out-multisets' is not one of all, train"):
        make_env("NumberLine", split="held-out-multisets")


def test_the_expert_wins_on_the_shortest_way_and_is_judged_right():
    rng = np.random.default_rng(0)
    for style in ("full", "compact"):
        for current in range(6):
            for target in set(range(6)) - {current}:
                env = at(current, target, prompt=style)
                for left in range(abs(target - current), 0, -1):
                    reply = env.unwrapped.demonstrate(rng)
                    assert tuple(reply) == env.unwrapped.fields
                    assert all(env.unwrapped.judge(reply).values())
                    assert env.step(reply["action"])[1] == (1.0 if left == 1 else 0.0)


def test_judge_tells_wrong_perception_from_a_wrong_action():
    env = at(1, 4).unwrapped
    right = {"current number": "1", "target number": "4", "thoughts": "", "action": "+"}
    assert env.judge(right) == {"perception": True, "agreement": True}
    assert env.judge({**right, "current number": 1}) == {"perception": True, "agreement": True}
    assert env.judge({**right, "target number": "3"}) == {"perception": False, "agreement": True}
    assert env.judge({**right, "action": "-"}) == {"perception": True, "agreement": False}
    assert env.judge({}) == {"perception": False, "agreement": False}
