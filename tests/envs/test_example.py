import sys

import gymnasium
import numpy as np
import pytest

from gtr_turbo.envs import check_env, make_env


@pytest.fixture
def example(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "examples")
    yield "my_env:MyLake-v0"
    gymnasium.registry.pop("MyLake-v0", None)
    sys.modules.pop("my_env", None)


def test_the_example_keeps_the_contract(example):
    check_env(example)


def test_options_of_the_recipe_reach_the_example(example):
    env = make_env(example, size=3)
    assert env.reset(seed=0)[0]["image"].shape == (84, 84, 3)


def test_its_expert_reaches_the_goal_round_the_hole_and_says_what_it_sees(example):
    env, rng = make_env(example), np.random.default_rng(0)
    for seed in range(50):
        _, info = env.reset(seed=seed)
        done = False
        while not done:
            reply = env.unwrapped.demonstrate(rng)
            assert all(env.unwrapped.judge(reply).values())
            lake = env.unwrapped.env
            assert [divmod(cell, 4) for cell in info["shown"]] == [lake.elf, lake.goal, lake.hole]
            _, _, done, _, info = env.step(reply["action"])
        assert info["success"]
    assert not any(env.unwrapped.judge({"thoughts": "I am at 9 9: on", "action": "down"}).values())


def test_walking_to_the_yellow_cell_wins_and_into_the_hole_loses(example):
    env = make_env(example)
    env.reset(seed=0)
    lake = env.unwrapped.env
    lake.elf, lake.goal, lake.hole = (0, 0), (0, 2), (3, 3)
    assert env.step("right")[1:4] == (0.5, False, False)
    assert env.step("left")[1:4] == (-0.5, False, False)
    env.step("right")
    observation, reward, terminated, _, info = env.step("right")
    assert (reward, terminated, info["success"]) == (1.5, True, True)
    assert np.array_equal(observation["image"][5, 2 * 28 + 5], (190, 30, 40))
    lake.elf, lake.hole = (2, 3), (3, 3)
    _, reward, terminated, _, info = env.step("down")
    assert (reward, terminated, info["success"]) == (-1.5, True, False)
