"""Settings from files and the command line: what meets what, and what is refused."""

import pytest

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import TrainConfig
from gtr_turbo.envs.contract import ContractError
from gtr_turbo.settings import (
    SFT_CONFIGS,
    build_config,
    config_file,
    read_config,
    read_overrides,
    with_overrides,
)


def test_a_group_and_single_settings_of_it_meet_in_any_order():
    one, group = ["--ppo.lr", "3e-5"], ["--ppo", "{epochs: 3, lr_final: 0}"]
    for arguments in (one + group, group + one):
        assert read_overrides(arguments) == {"ppo": {"lr": "3e-5", "epochs": 3, "lr_final": 0}}
    found = read_overrides(["--env", "Blackjack", "--env", "{num_envs: 16}"])
    assert found == {"env": {"id": "Blackjack", "num_envs": 16}}
    assert read_overrides(["--seed", "1", "--seed", "2"]) == {"seed": 2}


def test_a_key_given_twice_is_told_with_its_line(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("ppo: {lr: 3.0e-5}\nmodel:\n  path: a\n  path: b\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml, line 4: model\.path is given twice"):
        read_config(file)
    file.write_text("ppo: {lr: 3.0e-5}\nppo: {epochs: 4}\n")
    with pytest.raises(ConfigError, match="line 2: ppo is given twice"):
        read_config(file)


def test_a_base_is_looked_for_beside_the_file_first(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "common.yaml").write_text("seed: 1\n")
    (tmp_path / "common.yaml").write_text("seed: 2\n")
    (tmp_path / "sub" / "mine.yaml").write_text("base: common.yaml\nenv_steps: 7\n")
    monkeypatch.chdir(tmp_path)
    assert read_config(tmp_path / "sub" / "mine.yaml") == {"seed": 1, "env_steps": 7}
    (tmp_path / "sub" / "common.yaml").unlink()
    assert read_config(tmp_path / "sub" / "mine.yaml")["seed"] == 2, "then from where we are"


def test_a_base_is_one_of_the_commands_own_recipes(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: points24-qwen2.5-vl-7b\nsteps: 9\n")
    made = read_config(mine, SFT_CONFIGS)
    assert made["steps"] == 9
    shipped = read_config(config_file("points24-qwen2.5-vl-7b", SFT_CONFIGS))
    assert made["demonstrations"] == shipped["demonstrations"]
    assert "env" in read_config(mine)  # of the same name, but of `train`


@pytest.mark.parametrize("name", ["EZPoints", "gtr/Household-v0"])
def test_another_environment_in_a_file_drops_what_it_drops_on_the_command_line(tmp_path, name):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        f"base: points24-qwen2.5-vl-7b\nenv: {{id: {name}, options: {{prompt: compact}}}}\n"
    )
    line = env_of("--env", name, "--env.options.prompt", "compact", recipe="points24-qwen2.5-vl-7b")
    made = read_config(mine)
    assert made["env"] == line["env"]
    assert "early_truncation" not in made["env"]["options"]
    assert "extra_splits" not in made["eval"]
    assert "name" not in made  # that is the file's


def env_of(*arguments, recipe="ezpoints"):
    settings = read_config(config_file(recipe)) | {"name": recipe}
    return with_overrides(settings, read_overrides(arguments))


def test_one_environment_under_two_names_keeps_its_options():
    plain = env_of()
    for name in ("EZPoints", "gtr/EZPoints-v0"):
        found = env_of("--env", name)
        assert found["env"] == plain["env"] | {"id": name}
        assert found["name"] == "ezpoints"


def test_another_environment_is_asked_as_the_model_knows_it():
    found = env_of("--env", "Points24", "--env.options", "{granularity: token}")
    assert found["env"] == {
        "id": "Points24",
        "num_envs": env_of()["env"]["num_envs"],
        "options": {"prompt": "compact", "granularity": "token"},
        "train_split": "train",
        "eval_split": "held-out",
    }
    assert found["name"] == "points24"
    assert env_of("--env", "CartPole-v1")["env"] == {
        "id": "CartPole-v1",
        "num_envs": env_of()["env"]["num_envs"],
    }
    bare = with_overrides(
        {"env": {"id": "Acrobot-v1"}, "name": "a"}, {"env": {"id": "CartPole-v1"}}
    )
    assert bare["name"] == "cartpole-v1", "though no setting of the other one is left out"
    other = env_of("--env", "EZPoints", recipe="points24")
    assert "extra_splits" not in other["eval"], "they are splits of the other environment's"
    given = env_of("--env", "EZPoints", "--eval.extra_splits", "[all]", recipe="points24")
    assert given["eval"]["extra_splits"] == ["all"]
    with pytest.raises(ContractError, match="Did you mean 'Blackjack'"):
        env_of("--env", "Blackjak")
    over = {"env": {"id": "CartPole-v1"}}
    for plain in (None, "Acrobot-v1"):
        assert with_overrides({"env": plain}, over)["env"] == over["env"]
    assert with_overrides({"eval": None}, over)["eval"] is None, (
        "it is told when settings are built"
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"seed": 2**63}, "seed=9223372036854775808 must be .* below 2 to the 63rd"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"run": ""}, "run is empty"),
        ({"guidance": {"kind": False}}, "kind=False must be one of none.*YAML reads on, off"),
    ],
)
def test_values_that_cannot_be_are_told(settings, told):
    with pytest.raises(ConfigError, match=told):
        build_config(TrainConfig, settings)


def test_a_recipe_in_the_place_of_a_setting_is_told():
    with pytest.raises(ConfigError, match="the recipe is given as --config points24"):
        read_overrides(["points24"])
