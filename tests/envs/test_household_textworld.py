"""ALFWorld's real text engine behind the environment, in its worker."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest

from gtr_turbo.envs import ContractError, make_env
from gtr_turbo.envs.household import files, textworld
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.oracle import solve
from gtr_turbo.envs.household.world import HEAT, PLACE, Task

INSTALLED = importlib.util.find_spec("alfworld") and importlib.util.find_spec("textworld")
needs_textworld = pytest.mark.skipif(
    not INSTALLED,
    reason="the real engine needs pip install 'gtr-turbo[alfworld]' (make test-alfworld)",
)


@pytest.fixture
def real():
    made = []

    def make(**options):
        made.append(make_env("Household", backend="textworld", **options))
        return made[-1]

    yield make
    for env in made:
        env.close()


@needs_textworld
def test_an_agent_sees_the_same_through_the_real_engine_and_through_ours(real, tmp_path):
    for i in range(2):
        game = generate(np.random.default_rng(i), task=(HEAT, PLACE)[i])
        files.export(game, tmp_path, f"g{i}", solve(game))
    rng, pids = np.random.default_rng(0), set()
    theirs, ours = real(describe=True), make_env("Household", describe=True)
    given = {"describe": True, "games": str(tmp_path)}
    for pair, seed in (((theirs, ours), 3), ((theirs, ours), 4), (None, 1)):
        pair = pair or (real(**given), make_env("Household", **given))
        shown = [env.reset(seed=seed) for env in pair]
        assert shown[0][1] == shown[1][1]
        for turn in range(20):
            action = pair[1].unwrapped.demonstrate(rng)["action"]
            if turn < 3:
                action = str(rng.choice(["eat", *shown[0][-1]["actions"]]))
            shown = [env.step(action) for env in pair]
            assert shown[0][1:] == shown[1][1:]
            assert shown[0][0]["prompt"] == shown[1][0]["prompt"]
            assert np.array_equal(shown[0][0]["image"], shown[1][0]["image"])
            if shown[0][2]:
                break
        assert shown[0][-1]["success"]
        pids.add(pair[0].unwrapped._backend.worker.pid)
    assert len(pids) == 2  # a process for each environment, not for each game


@needs_textworld
def test_a_game_that_cannot_be_won_is_told(real):
    game = generate(np.random.default_rng(0), task=PLACE)
    kinds = {item.kind for item in game.objects}
    assert "Knife" not in kinds
    task = Task(type=PLACE, object="Knife", receptacle=game.task.receptacle)
    with pytest.raises(ContractError, match=r"ALFWorld's engine cannot solve .*val1"):
        real().reset(seed=0, options={"game": dataclasses.replace(game, task=task)})


@needs_textworld
@pytest.mark.filterwarnings("ignore")  # of the packages of the real engine
def test_a_text_of_the_grammar_is_parsed_once(monkeypatch, tmp_path):
    engine = textworld.Real()
    game = generate(np.random.default_rng(2), task=PLACE)
    path = files.export(game, tmp_path, "g", solve(game))
    first = engine.reset(str(path))
    looked = engine.step("look")

    from textworld.envs.pddl import textgen

    monkeypatch.setattr(textgen, "_PARSER", None)  # who parses now fails
    assert engine.step("look") == looked
    assert engine.step("look") == looked
    assert json.dumps(first)


@pytest.mark.skipif(bool(INSTALLED), reason="ALFWorld is installed")
def test_without_the_extra_the_error_says_what_to_install(real):
    with pytest.raises(ContractError, match=r"pip install 'gtr-turbo\[alfworld\]'"):
        real().reset(seed=0)
