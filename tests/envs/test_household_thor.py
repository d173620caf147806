"""Contract test with a fake simulator: our adapter and ALFWorld's own classes, over a fake `ai2thor` controller.

It proves what the adapter asks of ALFWorld and makes of its answers; it proves nothing about AI2-THOR.
"""

import importlib.util
import json

import numpy as np
import pytest
from fake_thor import write_task

from gtr_turbo.envs import ContractError, check_env, make_env
from gtr_turbo.envs.household import files, thor
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.worker import Limits
from gtr_turbo.envs.household.world import CLEAN, COOL, HEAT, LIGHT, PLACE, TWO

needs_alfworld = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None,
    reason="ALFWorld's classes need pip install 'gtr-turbo[alfworld]' (make test-alfworld)",
)
TAKE = ["go to countertop 1", "take apple 1 from countertop 1"]
PUT = ["go to diningtable 1", "move apple 1 to diningtable 1"]
SENTENCES = (
    "put a hot apple in diningtable",
    "heat some apple and put it in diningtable",
)
WAYS = {
    PLACE: TAKE + PUT,
    TWO: TAKE + PUT + [s.replace("apple 1", "apple 2") for s in TAKE + PUT],
    LIGHT: ["go to desk 1", "take mug 1 from desk 1", "use desklamp 1"],
    CLEAN: [*TAKE, "go to sinkbasin 1", "clean apple 1 with sinkbasin 1", *PUT],
    HEAT: [*TAKE, "go to microwave 1", "heat apple 1 with microwave 1", *PUT],
    COOL: [*TAKE, "go to fridge 1", "cool apple 1 with fridge 1", *PUT],
}


def write(root, task):
    if task == LIGHT:
        return write_task(root, task, "Mug", lamp="DeskLamp")
    return write_task(root, task, "Apple", parent="DiningTable")


@pytest.fixture
def over_fake(monkeypatch):
    made = []

    def make(games, engine="Real", **options):
        monkeypatch.setattr(thor, "ENGINE", f"fake_thor:{engine}")
        made.append(make_env("Household", backend="thor", games=str(games), **options))
        return made[-1]

    yield make
    for env in made:
        env.close()


@needs_alfworld
def test_all_six_tasks_are_won_with_the_rewards_of_the_native_engine(over_fake, tmp_path):
    third = 1 / 3
    paid = {
        PLACE: [51],
        TWO: [0.5, 50.5],
        LIGHT: [0.5, 50.5],
        # treated; then in place, and both at once
        **{task: [third, 50 + 2 * third] for task in (CLEAN, HEAT, COOL)},
    }
    env = None
    for task, way in WAYS.items():
        folder = tmp_path / task
        write(folder, task)
        # one worker plays all tasks: the simulator starts once
        env = env or over_fake(folder)
        env.unwrapped._backend.given = thor.find_tasks(str(folder), task)
        _, info = env.reset(seed=0)
        assert info["task"] == task
        rewards = []
        for command in way:
            assert command in info["actions"]
            _, reward, terminated, truncated, info = env.step(command)
            rewards += [round(reward, 6)] if reward else []
        assert rewards == [round(value, 6) for value in paid[task]]
        assert (terminated, truncated, info["success"]) == (True, False, True)
        assert json.dumps(info)  # no numpy values
    assert env.unwrapped._backend.worker.pid is not None


@needs_alfworld
def test_frames_prompt_history_and_facts(over_fake, tmp_path):
    write(tmp_path, HEAT)
    env = over_fake(tmp_path, describe=True, prompt="compact", size=320)
    observation, info = env.reset(seed=1)
    image = observation["image"]
    assert image.shape == (320, 320, 3)
    assert image[0, 0].tolist() == [200, 0, 30]  # red stays red: get_frames() is BGR
    sentence = env.unwrapped._backend.sentence
    assert sentence in SENTENCES
    assert observation["prompt"].startswith(f"household: {sentence}\n-= Welcome to TextWorld")
    observation, *_ = env.step("go to desk 1")
    assert observation["image"][0, 0].tolist() == [200, 50, 30]
    assert "You arrive at loc 5. On the desk 1, you see a" in observation["prompt"]
    assert "past: 'go to desk 1'" in observation["prompt"]
    judge = env.unwrapped.judge
    assert judge({"thoughts": "mug 1 is on desk 1", "action": "take mug 1 from desk 1"}) == {
        "admissible": True,
        "perception": True,
        "agreement": True,
    }
    env.step("go to countertop 1")
    assert judge({"thoughts": "I see mug 1", "action": "fly"}) == {
        "admissible": False,
        "perception": False,
    }
    # what is no command never reaches ALFWorld's parser, which takes any text with "go to " in it
    observation, reward, _, _, info = env.step("please go to desk 1")
    assert (reward, info["feedback"]) == (-1.0, "Nothing happens.")
    assert observation["image"][0, 0].tolist() == [200, 0, 30]
    with pytest.raises(ContractError, match="'thor' has no expert"):
        env.unwrapped.demonstrate(np.random.default_rng(0))
    with pytest.raises(ContractError, match="plays without our engine"):
        _ = env.unwrapped.engine


@needs_alfworld
def test_the_step_limit_is_ours_and_the_contract_holds(over_fake, tmp_path):
    write(tmp_path, PLACE)
    env = over_fake(tmp_path, early_truncation=False)
    env.reset(seed=0)
    for turn in range(50):
        *_, terminated, truncated, _ = env.step(("look", "inventory")[turn % 2])
        assert (terminated, truncated) == (False, turn == 49)
    env.unwrapped._backend.worker.close()
    # the places where the fake hangs and dies are of the next test
    write_safe(tmp_path)
    check_env(env, episodes=1)


def write_safe(root):
    for path in root.rglob("receps.json"):
        places = json.loads(path.read_text())
        kept = {k: v for k, v in places.items() if v["object_type"] not in ("Shelf", "Cart")}
        path.write_text(json.dumps(kept))


@needs_alfworld
@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("go to shelf 1", "timeout: no answer within 2 s"),
        (
            "go to cart 1",
            "error: RuntimeError: ALFWorld's thread for THOR died of RuntimeError: the sim",
        ),
    ],
)
def test_a_worker_that_hangs_or_whose_thread_dies_is_replaced(over_fake, tmp_path, command, why):
    write(tmp_path, PLACE)
    env = over_fake(tmp_path)
    before, _ = env.reset(seed=0)
    if "shelf" in command:
        env.unwrapped._backend.worker._limits = Limits(step=2)
    with pytest.warns(UserWarning, match="the episode is truncated"):
        observation, reward, terminated, truncated, info = env.step(command)
    assert info["fault"].startswith(why)
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, True, False)
    assert np.array_equal(observation["image"], before["image"])
    env.unwrapped._backend.worker._limits = Limits()
    env.reset(seed=1)
    for command in WAYS[PLACE]:
        *_, terminated, _, info = env.step(command)
    assert terminated
    assert "fault" not in info


@needs_alfworld
def test_without_a_display_the_error_says_what_a_real_run_needs(over_fake, tmp_path):
    write(tmp_path, PLACE)
    with pytest.raises(ContractError, match=r"needs Linux, an X display .*Invalid DISPLAY :0.0"):
        over_fake(tmp_path, "NoDisplay").reset(seed=0)


def test_without_ai2thor_the_error_says_what_to_install(tmp_path):
    write(tmp_path, PLACE)
    env = make_env("Household", backend="thor", games=str(tmp_path))
    with pytest.raises(ContractError, match=r"pip install 'alfworld\[full\]==0.4.2'.*Missing: "):
        env.reset(seed=0)
    env.close()


def test_a_text_game_is_no_task_for_thor(monkeypatch, tmp_path):
    path = files.export(generate(np.random.default_rng(0), task=HEAT), tmp_path, "g", [])
    with pytest.raises(thor.UnplayableError, match=r"no plan, scene.object_poses.*of a text game"):
        thor._read(path.parent / "traj_data.json")
    assert len(thor.find_tasks(str(tmp_path), HEAT)) == 1
    with pytest.raises(
        ContractError, match=r"no traj_data.json of type pick_cool.* \(of 1 there\)"
    ):
        thor.find_tasks(str(tmp_path), COOL)
