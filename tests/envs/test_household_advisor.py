"""The tool `next_command`: it knows what it is told, and that is enough to win."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from gtr_turbo.envs import make_env
from gtr_turbo.envs.household.advisor import STATE_WORDS, TOOL
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.world import TYPES, visible
from gtr_turbo.teacher.messages import answer_calls, problem, tool_schemas

FRIDGE = {"receptacle": "fridge 1", "closed": False, "contents": ["hot egg 2", "mug 1"]}
BASE = {
    "task": "place",
    "object": "egg",
    "target": "countertop",
    "here": [FRIDGE],
    "holding": "",
    "receptacles": ["countertop 1", "microwave 1"],
    "past_actions": ["go to fridge 1", "open fridge 1"],
}


def said(**changes: Any) -> dict[str, Any]:
    """What the tool answers to `BASE` with these changes."""
    return dict(TOOL.run({**BASE, **changes}))


def read(engine: Engine, past: list[str]) -> dict[str, Any]:
    """What one who reads frame and prompt without a mistake tells the tool."""
    game, state = engine.game, engine.state
    view = visible(game, state)

    def name(i: int) -> str:
        words = [word for word, kind in STATE_WORDS.items() if i in getattr(state, kind)]
        return " ".join([*words, game.objects[i].name])

    task = game.task
    return {
        "task": next(word for word, kind in TYPES.items() if kind == task.type),
        "object": task.object.lower(),
        "target": (task.receptacle or task.lamp).lower(),
        "here": [
            {
                "receptacle": game.receptacles[seen.receptacle].name,
                "closed": seen.closed,
                "contents": [name(i) for i in seen.contents],
            }
            for seen in view.here
        ],
        "holding": "" if view.held is None else name(view.held),
        "receptacles": [c[6:] for c in engine.commands if c.startswith("go to ")],
        "past_actions": past,
    }


def test_its_commands_win_nearly_as_many_of_300_games_as_the_expert_s() -> None:
    env = make_env("Household", split="held-out", expert="search")

    def play(seed: int, *, by_tool: bool) -> bool:
        _, info = env.reset(seed=seed)
        past: list[str] = []
        done = False
        while not done:
            command = env.unwrapped.demonstrate(np.random.default_rng(0))["action"]
            if by_tool:
                told = read(env.unwrapped.engine, past)
                assert seed > 9 or problem(told, TOOL.parameters) is None
                command = TOOL.run(told)["next_action"]
            assert command in info["actions"]
            past.append(command)
            _, _, terminated, truncated, info = env.step(command)
            done = terminated or truncated
        return bool(info["success"])

    won = [sum(play(seed, by_tool=by_tool) for seed in range(300)) for by_tool in (True, False)]
    assert won == [281, 285], "docs/external.md names these"


def test_it_goes_the_way_of_the_task() -> None:
    assert said()["next_action"] == "take egg 2 from fridge 1"
    assert said(task="heat")["next_action"] == "take egg 2 from fridge 1"
    carried = {"here": [{**FRIDGE, "contents": ["mug 1"]}], "holding": "egg 2"}
    assert said(**carried)["next_action"] == "go to countertop 1"
    assert said(**carried, task="heat")["next_action"] == "go to microwave 1"
    hot = {**carried, "holding": "hot egg 2"}
    assert said(**hot, task="heat")["next_action"] == "go to countertop 1"
    assert said(**hot, task="cool")["next_action"] == "cool egg 2 with fridge 1"
    assert said(**carried, object="mug")["plan"].startswith("The egg 2 is not what I need")


def test_past_actions_say_where_one_has_looked_unless_they_were_refused() -> None:
    there = {"here": [{**FRIDGE, "contents": []}]}
    assert said(**there)["next_action"] == "go to countertop 1"
    looked = [*BASE["past_actions"], "go to countertop 1", "go to fridge 1"]
    assert said(**there, past_actions=looked)["next_action"] == "go to microwave 1"
    refused = [
        "go to fridge 1",
        "open microwave 1",
        "open fridge 1",
        "go to countertop 1",
        "go to fridge 1",
    ]
    assert said(**there, past_actions=refused)["next_action"] == "go to microwave 1"
    opened = [*looked, "go to microwave 1", "open microwave 1", "go to fridge 1"]
    assert said(**there, past_actions=opened)["next_action"] == "go to countertop 1", "looks again"


def test_past_actions_say_where_an_object_was_put() -> None:
    past = ["take mug 2 from microwave 1", "go to countertop 1", "move mug 2 to countertop 1"]
    answer = said(
        task="two",
        object="mug",
        here=[],
        past_actions=past,
        receptacles=["countertop 1", "fridge 1"],
    )
    assert answer["next_action"] == "go to fridge 1", "the mug in its place is left there"
    old = [past[0], past[1], "put mug 2 in/on countertop 1"]
    answer = said(
        object="mug",
        target="fridge",
        here=[],
        past_actions=old,
        receptacles=["countertop 1", "fridge 1"],
    )
    assert answer["next_action"] == "go to countertop 1"
    assert (
        said(
            object="mug",
            target="fridge",
            here=[],
            past_actions=[*old, "take mug 2 from countertop 1"],
        )["next_action"]
        == "go to microwave 1"
    ), "in the hand it would be told"


def test_what_cannot_be_done_is_said() -> None:
    nowhere = {"here": [{**FRIDGE, "contents": []}], "receptacles": []}
    assert said(**nowhere) == {"reachable": False}
    assert said(holding="mug 1", object="mug", target="bed") == {"reachable": False}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"object": "unicorn"}, "'unicorn' is none of alarmclock, "),
        ({"target": "egg"}, "'egg' is none of armchair, "),
        ({"task": "light", "target": "fridge"}, "'fridge' is none of "),
        ({"receptacles": ["the fridge"]}, "'the fridge' is no name such as 'egg 2'"),
        ({"receptacles": ["throne 1"]}, "'throne' is none of armchair, "),
        ({"holding": "hot"}, "is no name such as"),
        ({"here": [FRIDGE, FRIDGE]}, "named twice"),
        ({"past_actions": ["look"] * 101}, "longer than 100"),
    ],
)
def test_a_misreading_is_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        said(**changes)


def test_a_corrector_of_households_is_offered_it_and_answered() -> None:
    tools = make_env("Household").get_wrapper_attr("tools")
    [schema] = tool_schemas(tools)
    assert schema["function"]["strict"]
    assert set(schema["function"]["parameters"]["required"]) == set(BASE)
    for given, bad in ((BASE, 0), ({**BASE, "holding": None}, 1), ({**BASE, "object": "x"}, 1)):
        call = {"id": "a", "function": {"name": "next_command", "arguments": json.dumps(given)}}
        made, wrong = answer_calls({"tool_calls": [call]}, tools)
        told = json.loads(made[1]["content"])
        assert wrong == bad
        assert ("error" in told) == bool(bad)
        if not bad:
            assert told == {
                "reachable": True,
                "plan": "I need the egg 2, so I take it.",
                "next_action": "take egg 2 from fridge 1",
            }
