import json
from collections import Counter

import gymnasium
import numpy as np
import pytest
import yaml

from gtr_turbo import collect as collecting
from gtr_turbo.baselines import Blind, difference, measure, oracle_player, random_player, read_names
from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.collect import EVALUATION, Envs, stream
from gtr_turbo.config import EnvConfig, SamplingConfig
from gtr_turbo.envs import make_env
from gtr_turbo.envs.contract import AnyText, observation_space
from gtr_turbo.evaluate import paired_difference, play_episodes, wilson
from tiny import make_policy

SAMPLING = SamplingConfig(max_new_tokens=4)


class Errand(gymnasium.Env):
    """One turn; `win` wins. The task is told at the reset, what was met at the end."""

    fields = ("thoughts", "action")

    def __init__(self, actions=("win", "lose")):
        self.observation_space, self.action_space = observation_space(16, 16), AnyText()
        self.told = {} if actions is None else {"actions": list(actions)}

    def observe(self):
        return {"image": np.full((16, 16, 3), 9, np.uint8), "prompt": "\x1b[2Jgo"}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task = ("fetch", "\x1b[31mcarry")[int(self.np_random.integers(2))]
        return self.observe(), {**self.told, "task": self.task}

    def step(self, action):
        won = action == "win"
        met = 1.0 if won else 0.25
        return (
            self.observe(),
            float(won),
            True,
            False,
            {**self.told, "success": won, "goal_conditions": met},
        )


@pytest.fixture(scope="module", autouse=True)
def _errands():
    gymnasium.register("Errand-v0", Errand)
    gymnasium.register("Errand-v1", lambda: Errand(actions=None))
    yield
    for name in ("Errand-v0", "Errand-v1"):
        del gymnasium.registry[name]


@pytest.fixture(scope="module")
def policy(tiny):
    return make_policy(tiny)


def played(player, env, episodes, *, split=None, seed=0):
    envs = Envs(env, split, seed, count=min(env.num_envs, episodes))
    return play_episodes(player(seed), envs, episodes=episodes, seed=seed)


def json_of(capsys, *arguments):
    capsys.readouterr()
    assert main(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("first_only", "second_only", "count", "gap", "low", "high"),
    [
        # p = 4/12 and 2/12: centre 1/6, variance (1/2 - 1/36) / 12 = 17/432, half 1.95996 * 0.198374
        (3, 1, 10, 0.2, 1 / 6 - 0.388806, 1 / 6 + 0.388806),
        (1, 3, 10, -0.2, -1 / 6 - 0.388806, -1 / 6 + 0.388806),
        # they never differ, and still 98 episodes leave room: half 1.95996 * sqrt((1/50) / 100)
        (0, 0, 98, 0.0, -0.027718, 0.027718),
        # p = 11/12 and 1/12: centre 5/6, variance (1 - 25/36) / 12; the upper end is cut at 1
        (10, 0, 10, 1.0, 5 / 6 - 0.312754, 1.0),
    ],
)
def test_the_paired_difference_by_hand(first_only, second_only, count, gap, low, high):
    found, interval = paired_difference(first_only, second_only, count)
    assert found == pytest.approx(gap)
    assert interval == pytest.approx((low, high), abs=1e-5)


def test_the_oracle_wins_every_household_game_in_unseen_rooms_and_chance_hardly_any():
    env = EnvConfig(id="Household", num_envs=8)
    oracle = played(oracle_player, env, 24, split="held-out")
    chance = played(random_player, env, 24, split="held-out")
    summary = oracle.summary()
    assert summary["success"] == 1
    assert chance.summary()["success"] < 0.2
    assert (summary["goal_conditions"], summary["valid"]) == (1, 1)
    assert summary["facts"]["expert"] == 1
    assert chance.summary()["goal_conditions"] < 0.5
    assert chance.summary()["valid"] is None  # it writes no replies

    games = make_env("Household", split="held-out")
    for result in (oracle, chance):
        tasks = [games.reset(seed=record.seed)[1]["task"] for record in result.records]
        assert [record.group for record in result.records] == tasks
        groups = result.summary()["groups"]
        assert {name: group["episodes"] for name, group in groups.items()} == Counter(tasks)
        won = sum(group["success"] * group["episodes"] for group in groups.values())
        assert won == pytest.approx(result.summary()["success"] * 24)
        for name, group in groups.items():
            successes = sum(r.success for r in result.records if r.group == name)
            assert tuple(group["interval"]) == wilson(successes, group["episodes"])


def test_any_environment_may_tell_a_task_and_what_was_met():
    result = played(random_player, EnvConfig(id="Errand-v0", num_envs=3), 40)
    seeds = [stream(0, EVALUATION, n) % 2**31 for n in range(40)]
    env = make_env("Errand-v0")
    assert [r.group for r in result.records] == [env.reset(seed=s)[1]["task"] for s in seeds]
    assert set(result.summary()["groups"]) == {"fetch", "\x1b[31mcarry"}
    won = sum(record.success for record in result.records)
    assert 0 < won < 40
    assert result.summary()["goal_conditions"] == pytest.approx((won + 0.25 * (40 - won)) / 40)


def test_where_nothing_is_told_there_are_no_groups():
    summary = played(oracle_player, EnvConfig(id="NumberLine"), 4).summary()
    assert (summary["groups"], summary["goal_conditions"]) == ({}, None)
    assert summary["success"] == 1


def test_chance_is_fair_legal_and_the_same_whatever_the_number_of_environments(monkeypatch):
    taken, step = [], Envs.step

    def watched(self, i, action):
        assert action in self.infos[i]["actions"]
        taken.append((self.episodes[i], len(self.actions[i]), action))
        return step(self, i, action)

    monkeypatch.setattr(Envs, "step", watched)
    made = {}
    for num_envs in (1, 7):
        taken.clear()
        played(random_player, EnvConfig(id="Blackjack", num_envs=num_envs), 300)
        made[num_envs] = sorted(taken)
    assert made[1] == made[7]
    first = [action for _, turn, action in made[1] if turn == 0]
    assert len(first) == 300
    assert 120 < first.count("hit") < 180  # 150 +- 3.5 deviations of sqrt(300) / 2
    taken.clear()
    played(random_player, EnvConfig(id="Blackjack", num_envs=7), 300, seed=1)
    assert sorted(taken) != made[1]


def test_the_blind_see_black_and_are_judged_by_what_is_there():
    seeing, blind = (kind(EnvConfig(id="NumberLine"), None, 0, count=1) for kind in (Envs, Blind))
    for envs in (seeing, blind):
        envs.reset(0, 0, 5)
    for _ in range(2):
        shown, black = seeing.observations[0], blind.observations[0]
        assert shown["image"].any()
        assert not black["image"].any()
        assert (black["image"].shape, black["image"].dtype) == (shown["image"].shape, np.uint8)
        assert black["prompt"] == shown["prompt"]
        reply = seeing.demonstrate(0, np.random.default_rng(0))
        assert blind.judge(0, reply) == seeing.judge(0, reply)
        assert blind.judge(0, reply)["perception"]
        assert seeing.step(0, "+").reward == blind.step(0, "+").reward


@pytest.mark.parametrize("ignores_images", [True, False])
def test_blind_equals_seeing_for_a_model_that_ignores_images_and_for_no_other(
    tiny, ignores_images, monkeypatch
):
    policy = make_policy(tiny)
    encode, generate, written = policy._encode_images, collecting.generate, []
    factor = 0 if ignores_images else 1
    monkeypatch.setattr(
        policy, "_encode_images", lambda inputs: [factor * f for f in encode(inputs)]
    )

    def watched(*arguments, **options):
        made = generate(*arguments, **options)
        written.extend(reply.logprobs.tolist() for reply in made)
        return made

    monkeypatch.setattr(collecting, "generate", watched)
    found = measure(
        policy, ("blind",), EnvConfig(options={"prompt": "compact"}, num_envs=2), SAMPLING,
        episodes=2, split="held-out", seed=0,
    )  # fmt: skip
    half = len(written) // 2
    assert half > 0
    assert (written[:half] == written[half:]) is ignores_images
    blind = found["baselines"]["blind"]
    if ignores_images:
        assert blind["records"] == found["records"]
        assert blind["difference"]["success"] == 0


def test_differences_are_counted_episode_by_episode():
    env = EnvConfig(id="Errand-v0")
    one, other = (played(random_player, env, 30, seed=0) for _ in range(2))
    assert difference(one, other)["agent_only"] == difference(one, other)["baseline_only"] == 0
    oracle = played(oracle_player, EnvConfig(id="NumberLine"), 30)
    chance = played(random_player, EnvConfig(id="NumberLine"), 30)
    lost = 30 - sum(record.success for record in chance.records)
    assert lost > 0
    assert difference(oracle, chance) == {
        "success": pytest.approx(lost / 30),
        "interval": pytest.approx(list(paired_difference(lost, 0, 30)[1])),
        "agent_only": lost,
        "baseline_only": 0,
    }
    assert difference(chance, oracle)["success"] == pytest.approx(-lost / 30)


def test_names_of_baselines():
    assert read_names("oracle, random,oracle") == ("oracle", "random")
    with pytest.raises(ConfigError, match=r"'oracel' is not one of .*Did you mean 'oracle'"):
        read_names("random,oracel")
    with pytest.raises(ConfigError, match="'' is not one of"):
        read_names("")


# -- the command -----------------------------------------------------------------------------------


def test_baselines_stand_beside_the_agent(capsys, tiny, tmp_path):
    config = {
        "env": {"id": "NumberLine", "options": {"prompt": "compact"}, "num_envs": 4},
        "model": {"attention": "eager"},
        "ppo": {"minibatch_turns": 4, "microbatch_turns": 4},
        "sampling": {"max_new_tokens": 4},
        "threads": 1,
    }
    path, records = tmp_path / "small.yaml", tmp_path / "records.jsonl"
    path.write_text(yaml.safe_dump(config))
    arguments = [str(tiny), "--config", str(path), "--split", "held-out", "--episodes", "4",
                 "--baselines", "random,blind,oracle"]  # fmt: skip
    found = json_of(capsys, *arguments, "--records", str(records))
    assert found["which"] == "student"
    assert list(found["baselines"]) == ["random", "blind", "oracle"]
    seeds = [record["seed"] for record in found["records"]]
    for name, baseline in found["baselines"].items():
        assert [record["seed"] for record in baseline["records"]] == seeds, name
    oracle = found["baselines"]["oracle"]
    assert (found["success"], oracle["success"]) == (0, 1)  # random weights write no JSON
    assert oracle["difference"]["success"] == -1
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    players = [player for player in ("agent", "random", "blind", "oracle") for _ in range(4)]
    assert [line["player"] for line in lines] == players

    assert main(["eval", *arguments]) == 0
    table = capsys.readouterr().out
    for part in ("agent", "random", "blind", "oracle", "-100.0 %", "agent minus it"):
        assert part in table


def test_baselines_need_no_agent(capsys, monkeypatch):
    monkeypatch.setattr("gtr_turbo.policy.model.Policy.__init__", None)  # none is loaded
    named = json_of(capsys, "--env", "Errand-v0", "--baselines", "random", "--episodes", "6")
    placed = json_of(capsys, "Errand-v0", "--baselines", "random", "--episodes", "6")
    assert placed == named
    assert "success" not in named
    assert named["which"] is None
    assert named["baselines"]["random"]["episodes"] == 6
    assert "difference" not in named["baselines"]["random"]
    recipe = json_of(capsys, "--config", "points24", "--baselines", "oracle", "--episodes", "3")
    assert (recipe["env"], recipe["split"]) == ("Points24", "held-out")
    assert recipe["baselines"]["oracle"]["success"] == 1  # its recipe deals what can be solved

    assert main(["eval", "Errand-v0", "--baselines", "random", "--episodes", "6"]) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table
    groups = named["baselines"]["random"]["groups"]
    assert f"\\x1b[31mcarry ({groups[chr(27) + '[31mcarry']['episodes']})" in table
    assert "goal conditions met" in table


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "eval needs a run, a model or an environment"),
        (["Household"], "nothing to evaluate but --baselines random,oracle"),
        (["--env", "Household", "--baselines", "blind"], "give a run or a model"),
        (["--env", "Household", "--baselines", "random", "--greedy"], "--greedy and --which"),
        (["--env", "Househol", "--baselines", "random"], "Did you mean 'Household'?"),
        (["nowhere:Lake", "--baselines", "random"], "cannot import module 'nowhere'"),
        (["Errand-v1", "--baselines", "random"], "lists no actions"),
        (["Errand-v0", "--baselines", "random,oracle"], "has no demonstrate(rng)"),
        (["Household", "--baselines", "expert"], "'expert' is not one of random, blind, oracle"),
        (["Household", "--baselines", "random", "--episodes", "0"], "must be at least 1"),
        (["Household", "--baselines", "random", "--seed", "-1"], "--seed -1 must be at least 0"),
        (
            ["Household", "--baselines", "random", "--option", "names=["],
            "'names=[': the value is no",
        ),
        (
            ["Household", "--baselines", "random", "--records", "no/r.jsonl"],
            "--records cannot be written",
        ),
    ],
)
def test_what_cannot_be_played_is_told_in_one_line(capsys, arguments, told):
    assert main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gtr-turbo: ")
    assert told in error
    assert error.count("\n") == 1


def test_a_baseline_that_cannot_play_is_told_before_the_agent_plays(policy, monkeypatch):
    def generate(*_, **__):
        raise AssertionError("the agent played")

    monkeypatch.setattr(collecting, "generate", generate)
    with pytest.raises(ConfigError, match="demonstrate"):
        measure(
            policy, ("oracle", "blind"), EnvConfig(id="Errand-v0"), SAMPLING,
            episodes=2, split=None, seed=0,
        )  # fmt: skip


def test_the_agents_own_episodes_are_those_without_baselines(policy):
    env = EnvConfig(options={"prompt": "compact"}, num_envs=2)
    about = {"episodes": 2, "split": "held-out", "seed": 3}
    alone = measure(policy, (), env, SAMPLING, **about)
    beside = measure(policy, ("random",), env, SAMPLING, **about)
    assert beside.pop("baselines")["random"]["episodes"] == 2
    assert beside == alone
