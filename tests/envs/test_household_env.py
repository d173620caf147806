import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from kitchen import kitchen

from gtr_turbo.collect import Envs
from gtr_turbo.config import EnvConfig
from gtr_turbo.envs import ContractError, check_env, make_env
from gtr_turbo.envs.household import files
from gtr_turbo.envs.household.generator import generate, scenes
from gtr_turbo.envs.household.worker import WorkerError
from gtr_turbo.envs.household.world import CLEAN, HEAT, LIGHT, TASKS, Task

WIN = (
    "go to sinkbasin 1",
    "take egg 1 from sinkbasin 1",
    "go to microwave 1",
    "heat egg 1 with microwave 1",
    "go to countertop 1",
    "move egg 1 to countertop 1",
)
HOT = Task(type=HEAT, object="Egg", receptacle="CounterTop")


def household(task=None, seed=0, **options):
    env = make_env("Household", **options)
    observation, info = env.reset(seed=seed, options={"game": kitchen(task)})
    return env, observation, info


def steps(env, *actions):
    """(rewards, (terminated, truncated) of the last step, its info)."""
    rewards = []
    for action in actions:
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(round(reward, 6))
    return rewards, (terminated, truncated), info


def test_there_is_an_id_for_all_tasks_and_one_for_each():
    ids = {key for key in gymnasium.registry if key.startswith("gtr/Household")}
    assert ids == {"gtr/Household-v0"} | {
        f"gtr/Household-{name}-v0" for name in ("Place", "Two", "Light", "Clean", "Heat", "Cool")
    }
    _, info = make_env("Household-Heat").reset(seed=0)
    assert info["task"] == HEAT
    env = make_env("Household")
    assert {env.reset(seed=seed)[1]["task"] for seed in range(40)} == set(TASKS)


def test_the_reward_is_50_and_the_change_of_the_goal_conditions():
    env, _, _ = household(HOT)
    rewards, ends, info = steps(env, *WIN)
    third = round(1 / 3, 6)
    assert rewards == [0, 0, 0, third, 0, round(50 + 2 / 3, 6)]
    assert ends == (True, False)
    assert (info["success"], info["goal_conditions"]) == (True, 1.0)


def test_taking_back_what_was_placed_takes_back_what_was_paid():
    env, _, _ = household(HOT)
    place = ("go to sinkbasin 1", "take egg 1 from sinkbasin 1", "move egg 1 to countertop 1")
    rewards, _, _ = steps(env, *place, "take egg 1 from countertop 1")
    assert rewards == [0, 0, round(1 / 3, 6), round(-1 / 3, 6)]


@pytest.mark.parametrize(
    "action", ["", "go to", "GO TO desk 1", "go to desk 10", "\ud83c", "x" * 900]
)
def test_an_inadmissible_action_pays_minus_1_and_changes_nothing(action):
    env, before, info = household()
    after, reward, terminated, truncated, later = env.step(action)
    assert (reward, terminated, truncated) == (-1.0, False, False)
    assert np.array_equal(before["image"], after["image"])
    assert later["actions"] == info["actions"]
    assert later["feedback"] == "Nothing happens."
    assert len(after["prompt"]) < len(before["prompt"]) + 400


def test_a_longer_name_is_another_receptacle():
    # the published code took the first command that the reply contains: "cabinet 1" in "cabinet 10"
    env, _, _ = household()
    assert env.step("go to desk 1")[1] == 0
    assert env.step("go to fridge 1 please")[1] == -1


def test_blanks_around_a_command_do_not_count():
    env, _, _ = household()
    assert env.step("  go to desk 1\n")[1] == 0


def test_an_inadmissible_action_can_play_a_random_command_as_published():
    env, _, _ = household(illegal="random", seed=3)
    seen = set()
    for _ in range(12):
        reward = env.step("nonsense")[1]
        seen.add(env.unwrapped._past[-1])
        assert reward == -1
    assert "nonsense" not in seen
    assert len(seen) > 3


def test_the_fifth_equal_action_ends_the_episode_as_a_rule_of_the_task():
    env, _, _ = household()
    rewards, ends, info = steps(env, *["look"] * 5)
    assert rewards == [0, 0, 0, 0, -3]
    assert ends == (True, False)
    assert info["success"] is False


def test_the_41st_action_is_cut_off():
    env, _, _ = household()
    rewards, ends, info = steps(env, *["look", "inventory"] * 20, "look")
    assert rewards == [0] * 40 + [-3]
    assert ends == (False, True)
    assert info["success"] is False


def test_a_win_at_the_41st_action_is_a_win():
    env, _, _ = household(HOT)
    rewards, ends, info = steps(env, *["look", "inventory"] * 17, "look", *WIN)
    assert len(rewards) == 41
    assert rewards[-1] > 50
    assert ends == (True, False)
    assert info["success"]


def test_without_early_truncation_an_episode_has_50_actions():
    env, _, _ = household(early_truncation=False)
    rewards, ends, info = steps(env, *["look"] * 49)
    assert ends == (False, False)
    rewards, ends, info = steps(env, "look")
    assert (rewards, ends, info["success"]) == ([0], (False, True), False)


# -- what is shown -------------------------------------------------------------------------------


def test_the_prompt_has_the_task_the_past_and_the_commands_and_no_description():
    env, observation, _ = household()
    assert observation["prompt"].startswith(
        "You are an expert in the ALFRED Embodied Environment. Your task is to put a egg in countertop. "
        "You are also given the previous actions you have taken: []. Your admissible actions of the "
        "current situation are: ['go to countertop 1'\n 'go to desk 1'\n"
    )
    env.step("go to sinkbasin 1")
    observation, *_ = env.step("it's 'quoted'\n")
    assert """have taken: ['go to sinkbasin 1', "it's 'quoted'"]. """ in observation["prompt"]
    assert "On the sinkbasin 1" not in observation["prompt"]


def test_the_history_can_be_shortened_and_switched_off():
    for length, shown in ((1, "['look']"), (0, "[]"), (9, "['help', 'look']")):
        env, _, _ = household(history=length)
        env.step("help")
        observation, *_ = env.step("look")
        assert f"you have taken: {shown}. " in observation["prompt"]


def test_a_command_that_a_worker_could_not_play_is_not_in_the_history(monkeypatch):
    env, _, _ = household()
    before, *_ = env.step("help")

    def fail(command):
        raise WorkerError("crash: gone")

    monkeypatch.setattr(env.unwrapped._backend, "step", fail)
    with pytest.warns(UserWarning, match="crash: gone"):
        after, _, _, truncated, _ = env.step("look")
    assert truncated
    assert after["prompt"] == before["prompt"]


@pytest.mark.parametrize("length", [3, 20, 50])
def test_the_history_is_that_of_the_last_actions_whatever_their_number(length):
    env, _, _ = household(history=length, prompt="compact", early_truncation=False)
    played = []
    for step in range(45):
        played.append(("look", "help", "inventory")[step % 3])
        observation, *_ = env.step(played[-1])
        past = observation["prompt"].splitlines()[1]
        assert past == f"past: {', '.join(map(repr, played[-length:]))}"


def test_the_description_is_there_if_asked_for():
    env, observation, _ = household(describe=True)
    assert "description of the current scene: " in observation["prompt"]
    observation, *_ = env.step("go to sinkbasin 1")
    assert (
        "'You arrive at sinkbasin 1. On the sinkbasin 1, you see a butter" in observation["prompt"]
    )


def test_the_compact_prompt_says_the_same_in_fewer_words():
    env, _, _ = household(prompt="compact", history=1)
    env.step("help")
    observation, *_ = env.step("go to desk 1")
    assert observation["prompt"] == (
        "household: put a egg in countertop\npast: 'go to desk 1'\nactions: examine desk 1, go to "
        "countertop 1, go to fridge 1, go to microwave 1, go to sinkbasin 1, help, inventory, look, "
        "use desklamp 1"
    )


# -- splits, files, options ----------------------------------------------------------------------


def test_splits_draw_from_their_rooms():
    for split, unseen in (("train", False), ("held-out", True)):
        env = make_env("Household", split=split)
        for seed in range(20):
            env.reset(seed=seed)
            assert (env.unwrapped.engine.game.scene % 100 <= 6) == unseen


def test_given_game_files_are_played(tmp_path):
    rng = np.random.default_rng(0)
    for i, task in enumerate((CLEAN, LIGHT, LIGHT)):
        files.export(generate(rng, task=task), tmp_path, f"g{i}", [])
    env = make_env("Household", games=str(tmp_path))
    assert {env.reset(seed=seed)[1]["task"] for seed in range(20)} == {CLEAN, LIGHT}
    env = make_env("Household-Light", games=str(tmp_path))
    assert {env.reset(seed=seed)[1]["task"] for seed in range(9)} == {LIGHT}


def test_games_are_left_out_by_their_own_names_not_by_folders_above(tmp_path, monkeypatch):
    folder = tmp_path / "removable"
    files.export(generate(np.random.default_rng(0), task=LIGHT), folder / "games", "g", [])
    monkeypatch.chdir(folder)
    assert make_env("Household", games="games").reset(seed=0)[1]["task"] == LIGHT


def test_a_fault_while_an_environment_is_checked_is_not_its_dynamics(monkeypatch):
    env = make_env("Household")
    plain, calls = env.unwrapped._backend.step, []

    def step(command):
        calls.append(command)
        if len(calls) == 3:
            raise WorkerError("crash: gone")
        return plain(command)

    monkeypatch.setattr(env.unwrapped._backend, "step", step)
    with pytest.warns(match="gone"):
        check_env(env, episodes=1)
    assert len(calls) > 3


def test_an_evaluation_plays_each_given_game_once(tmp_path):
    rng = np.random.default_rng(0)
    made = [generate(rng, task=LIGHT) for _ in range(5)]
    for i, game in enumerate(made):
        files.export(game, tmp_path, f"g{i}", [])
    envs = Envs(EnvConfig(id="Household", options={"games": str(tmp_path)}), None, 3, count=2)
    seen = []
    for number in range(5):
        envs.reset(number % 2, number, seed=number)
        seen.append(envs._envs[number % 2].unwrapped.engine.game.scene)
    assert sorted(seen) == sorted(game.scene for game in made)
    env = make_env("Household", games=str(tmp_path))
    with pytest.raises(ContractError, match=r"options\['number'\]=5 is none of the 5 files"):
        env.reset(options={"number": 5})


def test_a_file_that_cannot_be_played_is_told_and_the_next_is_played(tmp_path):
    rng = np.random.default_rng(0)
    kept = [files.export(generate(rng, task=LIGHT), tmp_path, f"g{i}", []) for i in range(3)]
    kept[1].write_text(kept[1].read_text()[:-9])
    env = make_env("Household", games=str(tmp_path))
    bad = 0
    for seed in range(20):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert env.reset(seed=seed)[1]["task"] == LIGHT
        assert [str(kept[1]) in str(each.message) for each in told] in ([], [True])
        bad += len(told)
    assert 0 < bad < 20
    for path in (kept[0], kept[2]):
        path.write_text(path.read_text()[:-9])
    with pytest.raises(ContractError, match="cannot play"), pytest.warns(match="is played"):
        env.reset(seed=0)


def test_a_run_may_learn_from_some_files_and_be_evaluated_on_others(tmp_path):
    rng = np.random.default_rng(0)
    games = {}
    for split, task in (("train", CLEAN), ("valid_unseen", LIGHT)):
        files.export(generate(rng, task=task), tmp_path / split, "g", [])
        games[split] = str(tmp_path / split)
    for split, task in (("train", CLEAN), ("valid_unseen", LIGHT)):
        env = make_env("Household", games=games, split=split)
        assert env.reset(seed=0)[1]["task"] == task
    with pytest.raises(ContractError, match="split='all' is not one of train, valid_unseen"):
        make_env("Household", games=games)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "cook"}, r"task='cook' is not one of any, place, two, light, clean, heat, cool"),
        ({"split": "held-out-multisets"}, "is not one of all, train, held-out"),
        ({"illegal": "raise"}, "illegal='raise' is not one of nothing, random"),
        ({"history": -1}, "history=-1 must be at least 0"),
        ({"size": 64}, "size=64 at least 300"),
        ({"history": 2.5}, r"history=2\.5 must be int"),
        ({"names": "no"}, "names='no' must be bool"),
        (
            {"backend": "textworld", "limits": {"step": float("inf")}},
            "limits.step=inf must be above 0 and",
        ),
        ({"backend": "textworld", "limits": 5}, "limits=5 must be a mapping"),
        ({"expert": "human"}, "expert='human' is not one of oracle, search"),
        ({"games": {"all": 5}}, "games=5 must be a path"),
        ({"games": {"all": None}}, "games=None must be a path"),
        ({"games": {}}, "games={} must be a path"),
        ({"games": ["a"]}, r"games=\['a'\] must be a path"),
        ({"games": "/nowhere"}, r"no solvable game.tw-pddl at /nowhere"),
    ],
)
def test_a_wrong_option_is_told(options, message):
    with pytest.raises(ContractError, match=message):
        make_env("Household", **options)


@pytest.mark.parametrize("game", ["x", {}])
def test_a_game_that_is_none_is_told(game):
    with pytest.raises(ContractError, match="must be a Game"):
        make_env("Household").reset(options={"game": game})


def test_a_given_game_that_cannot_be_drawn_is_told():
    full = kitchen()
    crowd = tuple(replace(full.receptacles[0], name=f"countertop {i}") for i in range(1, 14))
    with pytest.raises(ContractError, match="13 receptacles used from one place"):
        make_env("Household").reset(options={"game": replace(full, receptacles=crowd)})


def test_rooms_of_an_unknown_split_or_task_are_refused():
    with pytest.raises(ValueError, match="split='heldout'"):
        scenes("heldout", CLEAN)
    with pytest.raises(ValueError, match="task='cook'"):
        generate(np.random.default_rng(0), task="cook")


def test_a_split_of_given_games_without_splits_is_refused(tmp_path):
    path = files.export(generate(np.random.default_rng(0)), tmp_path, "g", [])
    with pytest.raises(ContractError, match="split='train' chooses rooms of generated games"):
        make_env("Household", games=str(path), split="train")


# -- the expert, and facts about replies ---------------------------------------------------------


def test_the_expert_says_what_it_sees_holds_and_wants():
    env, _, _ = household(HOT)
    rng = np.random.default_rng(0)
    assert env.unwrapped.demonstrate(rng) == {
        "thoughts": "I am in the middle of the room. I hold nothing. I need an egg and see none. I go to "
        "fridge 1.",
        "action": "go to fridge 1",
    }
    steps(env, *WIN[:4])
    assert env.unwrapped.demonstrate(rng) == {
        "thoughts": "I am at the microwave 1, closed. I hold the hot egg 1. The hot egg 1 belongs in the "
        "countertop. I go to countertop 1.",
        "action": "go to countertop 1",
    }


def test_an_expert_that_searches_demonstrates_the_next_place_not_seen_yet():
    rng = np.random.default_rng(0)
    env, _, _ = household(HOT, expert="search")
    assert env.unwrapped.demonstrate(rng)["action"] == "go to countertop 1"
    steps(env, "go to desk 1")
    assert env.unwrapped.demonstrate(rng)["action"] == "go to sinkbasin 1"
    steps(env, "go to fridge 1")
    assert env.unwrapped.demonstrate(rng) == {
        "thoughts": "I am at the fridge 1, closed. I hold nothing. I need an egg and see none. "
        "The fridge 1 is closed, so I open it.",
        "action": "open fridge 1",
    }


def test_an_expert_that_searches_wins_nearly_all_games_of_unseen_rooms_in_few_commands():
    env = make_env("Household-Place", split="held-out", prompt="compact", expert="search")
    rng, won, commands = np.random.default_rng(0), 0, 0
    for seed in range(200):
        env.reset(seed=seed)
        ended = False
        while not ended:
            _, _, terminated, truncated, info = env.step(env.unwrapped.demonstrate(rng)["action"])
            ended, commands = terminated or truncated, commands + 1
        won += info["success"]
    assert (won, commands / 200) == (198, pytest.approx(7.07, abs=0.01))


def test_the_expert_puts_away_what_is_not_wanted():
    env, _, _ = household()
    steps(env, "go to countertop 1", "take mug 1 from countertop 1")
    reply = env.unwrapped.demonstrate(np.random.default_rng(0))
    assert reply["action"] == "move mug 1 to countertop 1"
    assert "The mug 1 is not what I need" in reply["thoughts"]


@pytest.mark.parametrize("style", ["full", "compact"])
def test_demonstrations_win_and_name_nothing_that_is_out_of_sight(style):
    for seed in range(30):
        env = make_env("Household", prompt=style)
        env.reset(seed=seed)
        for _ in range(12):
            reply = env.unwrapped.demonstrate(np.random.default_rng(0))
            judged = env.unwrapped.judge(reply)
            assert all(judged.values()), (reply, judged)
            *_, terminated, _, info = env.step(reply["action"])
            if terminated:
                break
        assert info["success"]


def test_judging_tells_seen_from_imagined_objects_and_what_the_thoughts_lead_to():
    env, _, _ = household()
    env.step("go to sinkbasin 1")
    judge = env.unwrapped.judge
    thoughts = "Egg 1 lies in the sinkbasin 1."
    right = {"thoughts": thoughts, "action": "take egg 1 from sinkbasin 1"}
    everything = {"perception": True, "agreement": True, "admissible": True, "expert": True}
    assert judge(right) == everything
    assert judge({**right, "thoughts": f"{thoughts} egg 2 too"}) == {
        **everything,
        "perception": False,
    }
    assert judge({**right, "thoughts": "an egg"}) == {
        "agreement": False,
        "admissible": True,
        "expert": True,
    }
    assert judge({**right, "action": "help"}) == {
        "perception": True,
        "admissible": True,
        "expert": False,
    }
    for ugly in ({}, {"thoughts": 3, "action": None}, {"thoughts": ["egg 2"], "action": {}}):
        assert judge(ugly)["admissible"] is False
