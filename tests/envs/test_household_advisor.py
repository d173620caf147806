"""The tool `next_command`: it knows what it is told, and that is enough to win."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.envs import make_env
from gtr_turbo.envs.household.advisor import STATE_WORDS, TOOL
from gtr_turbo.envs.household.engine import Engine
from gtr_turbo.envs.household.generator import generate
from gtr_turbo.envs.household.oracle import Oracle
from gtr_turbo.envs.household.world import TYPES, visible
from gtr_turbo.teacher.messages import answer_calls, problem, tool_schemas

FRIDGE = {"receptacle": "fridge 1", "closed": False, "contents": ["hot egg 2", "mug 1"]}
BASE = {
    "task": "place",
    "object": "egg",
    "target": "countertop",
    "here": [FRIDGE],
    "holding": "",
    "actions": [
        *(
            "go to countertop 1",
            "go to microwave 1",
            "take egg 2 from fridge 1",
            "take mug 1 from fridge 1",
        ),
        *("cool egg 2 with fridge 1", "move egg 2 to fridge 1", "close fridge 1", "help", "look"),
    ],
    "past_actions": ["go to fridge 1", "open fridge 1"],
}


def said(**changes: Any) -> dict[str, Any]:
    """What the tool answers to `BASE` with these changes."""
    return dict(TOOL.run({**BASE, **changes}))


def asked(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a corrector is told that calls the tool of the environment."""
    call = {"id": "a", "function": {"name": "next_command", "arguments": json.dumps(arguments)}}
    made, bad = answer_calls(
        {"tool_calls": [call]}, make_env("Household").get_wrapper_attr("tools")
    )
    told: dict[str, Any] = json.loads(made[1]["content"])
    assert bad == ("error" in told)
    return told


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
        "actions": engine.commands,
        "past_actions": past,
    }


def refused(rng: np.random.Generator, engine: Engine) -> str:
    """A command of one who does not look: it is refused, as a rule."""
    thing, place = (
        some[rng.integers(len(some))].name
        for some in (engine.game.objects, engine.game.receptacles)
    )
    verb = ("open {1}", "take {0} from {1}", "move {0} to {1}", "go to {0}", "heat {0} with {1}")
    return verb[rng.integers(5)].format(thing, place)


def play(seed: int, *, by_tool: bool, before: int) -> bool:
    """Whether a game is won by the tool or the expert, after so many commands of chance, half of them refused."""
    rng = np.random.default_rng(seed)
    engine = Engine(generate(rng, split="held-out"))
    expert, past = Oracle(engine), list[str]()
    expert.notice()
    while not engine.won and len(past) < before + 40:
        if len(past) < before:
            some = engine.commands
            command = refused(rng, engine) if rng.random() < 0.5 else some[rng.integers(len(some))]
        elif by_tool:
            told = read(engine, past)
            assert seed > 9 or problem(told, TOOL.parameters) is None
            command = TOOL.run(told)["next_action"]
            assert command in engine.commands
        else:
            command = expert.advise(search=True).command
        engine.step(command)
        expert.notice()
        past.append(command)
    return engine.won


@pytest.mark.parametrize(("before", "won"), [(0, [188, 187]), (10, [184, 190])])
def test_its_commands_win_nearly_as_many_of_200_games_as_the_expert_s(
    before: int, won: list[int]
) -> None:
    tool, expert = (
        sum(play(seed, by_tool=by_tool, before=before) for seed in range(200))
        for by_tool in (True, False)
    )
    assert [tool, expert] == won, "docs/external.md names these"


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


def test_a_treatment_is_known_from_the_picture_or_from_the_past() -> None:
    carried = {"here": [{**FRIDGE, "contents": []}], "holding": "egg 2", "task": "heat"}
    heated = ["go to fridge 1", "open fridge 1", "take egg 2 from fridge 1", "go to microwave 1"]
    heated += ["heat egg 2 with microwave 1", "go to fridge 1"]
    assert said(**carried, past_actions=heated)["next_action"] == "go to countertop 1"
    cooled = [*heated, "cool egg 2 with fridge 1"]
    assert said(**carried, past_actions=cooled)["next_action"] == "go to microwave 1"
    elsewhere = [*heated[:3], "heat egg 2 with microwave 1"]
    assert said(**carried, past_actions=elsewhere)["next_action"] == "go to microwave 1"
    cold = {**carried, "holding": "COLD egg 2"}
    assert said(**cold, past_actions=heated)["next_action"] == "go to microwave 1"


def test_past_actions_say_where_one_has_looked_unless_they_were_refused() -> None:
    there = {"here": [{**FRIDGE, "contents": []}]}
    assert said(**there)["next_action"] == "go to countertop 1"
    looked = [*BASE["past_actions"], "go to countertop 1", "go to fridge 1"]
    assert said(**there, past_actions=looked)["next_action"] == "go to microwave 1"
    refused = [looked[0], "open microwave 1", *looked[1:]]
    assert said(**there, past_actions=refused)["next_action"] == "go to microwave 1"
    opened = [*looked[:3], "go to microwave 1", "open microwave 1", "go to fridge 1"]
    assert said(**there, past_actions=opened)["next_action"] == "go to countertop 1", "looks again"
    again = [*opened, "go to countertop 1", "go to fridge 1"]
    assert said(**there, past_actions=again)["next_action"] == "go to microwave 1", (
        "not there twice"
    )
    closed = {"receptacle": "microwave 1", "closed": True, "contents": []}
    before = ["go to countertop 1", "open microwave 1", "go to microwave 1"]
    actions = [*BASE["actions"], "open microwave 1"]
    answer = said(here=[closed], past_actions=before, actions=actions)
    assert answer["next_action"] == "open microwave 1", "it was refused from elsewhere"


def test_past_actions_say_where_an_object_was_put() -> None:
    there = {"object": "mug", "target": "fridge", "here": []}
    there["actions"] = [f"go to {name} 1" for name in ("countertop", "drawer", "fridge")]
    past = ["go to drawer 1", "open drawer 1", "take mug 2 from drawer 1", "go to countertop 1"]
    for words in ("move mug 2 to countertop 1", "put mug 2 in/on countertop 1"):
        put = [*past, words, "go to fridge 1", "open fridge 1"]
        assert said(**there, past_actions=put)["plan"].startswith("I need a mug and see none")
        assert said(**there, past_actions=put)["next_action"] == "go to countertop 1"
        got = [*past, words, "take mug 2 from countertop 1", *put[-2:]]
        assert said(**there, past_actions=got)["next_action"] == "go to drawer 1", "it is lost"
        never = [*past[:2], past[3], words, *put[-2:]]
        assert said(**there, past_actions=never)["next_action"] == "go to drawer 1", (
            "it was refused"
        )
    two = {**there, "task": "two", "target": "countertop"}
    put = [*past, "move mug 2 to countertop 1"]
    assert said(**two, past_actions=put)["next_action"] == "go to fridge 1", (
        "it is left in its place"
    )


def test_games_compiled_before_alfworld_0_4_get_their_words() -> None:
    here = [{"receptacle": "countertop 1", "closed": False, "contents": []}]
    for words in ("move egg 2 to countertop 1", "put egg 2 in/on countertop 1"):
        answer = said(here=here, holding="egg 2", actions=[words, "go to fridge 1"])
        assert answer["next_action"] == words


def test_what_cannot_be_done_is_said() -> None:
    nowhere = {"here": [{**FRIDGE, "contents": []}], "actions": ["look"]}
    assert said(**nowhere) == {"reachable": False}
    assert said(holding="mug 1", object="mug", target="bed") == {"reachable": False}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"object": "unicorn"}, "'unicorn' is none of alarmclock, "),
        ({"target": "egg"}, "'egg' is none of armchair, "),
        ({"task": "light", "target": "fridge"}, "'fridge' is none of "),
        ({"actions": ["go to the fridge"]}, "'the fridge' is no name such as 'egg 2'"),
        ({"actions": ["go to throne 1"]}, "'throne' is none of armchair, "),
        (
            {"actions": ["go to countertop 1"]},
            "'take egg 2 from fridge 1' would be next, but is none",
        ),
        ({"holding": "hot"}, "is no name such as"),
        ({"here": [FRIDGE, FRIDGE]}, "named twice"),
        ({"past_actions": ["look"] * 201}, "longer than 200"),
    ],
)
def test_a_misreading_is_told(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        said(**changes)


@settings(max_examples=200, deadline=None)
@given(
    past=st.lists(
        st.sampled_from(["go to ", "open ", "move  to countertop 1", "take a 1 from fridge 1", "é"])
        | st.text()
    ),
    holding=st.text(),
    contents=st.lists(st.sampled_from(["hot", "egg 1", "on on egg 1", "egg 1 "]) | st.text()),
    actions=st.lists(st.sampled_from(["go to ", "go to fridge 1", "open  "]) | st.text()),
)
def test_whatever_a_model_writes_is_answered_or_refused(
    past: list[str], holding: str, contents: list[str], actions: list[str]
) -> None:
    told = {**BASE, "past_actions": past, "holding": holding, "actions": actions}
    told["here"] = [{**FRIDGE, "contents": contents}]
    answer = asked(told)
    assert "error" in answer or answer == {"reachable": False} or answer["next_action"] in actions


def test_a_corrector_of_households_is_offered_it_and_answered() -> None:
    tools = make_env("Household").get_wrapper_attr("tools")
    [schema] = tool_schemas(tools)
    assert schema["function"]["strict"]
    assert set(schema["function"]["parameters"]["required"]) == set(BASE)
    assert asked(BASE) == {
        "reachable": True,
        "plan": "I need the egg 2, so I take it.",
        "next_action": "take egg 2 from fridge 1",
    }
    for wrong in ({"holding": None}, {"object": "x"}):
        assert "error" in asked({**BASE, **wrong})
