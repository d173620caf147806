import re

import pytest

from gtr_turbo import prompts
from gtr_turbo.checks import ConfigError
from gtr_turbo.envs import make_env
from gtr_turbo.envs.cards.drawing import Card

KEY = re.compile(r'^"([^"]+)": ', re.MULTILINE)
FULL = [
    ("NumberLine", {}),
    ("Blackjack", {}),
    ("EZPoints", {}),
    *(("Points24", {"granularity": g}) for g in ("token", "reduction", "formula")),
]
DEAL = {"cards": [Card(7, 0), Card(2, 1), Card(4, 2), Card(11, 3)]}  # 8 3 5 Q


def shown(name, actions=(), **options):
    env = make_env(name, **options)
    observation, _ = env.reset(seed=0, options=DEAL if name == "Points24" else None)
    for action in actions:
        observation = env.step(action)[0]
    return observation["prompt"]


@pytest.mark.parametrize(("name", "options"), FULL)
def test_a_full_prompt_asks_for_exactly_the_fields_the_environment_declares(name, options):
    env = make_env(name, **options)
    assert tuple(KEY.findall(shown(name, **options))) == env.unwrapped.fields


@pytest.mark.parametrize(("name", "options"), FULL)
def test_a_full_prompt_ends_with_the_braces_of_a_json_object(name, options):
    text = shown(name, **options)
    assert "Your response should be a valid json file in the following format:\n{\n" in text
    assert text.endswith("\n}")


def test_reply_format_keeps_the_order_of_the_fields():
    assert prompts.reply_format({"b": "1", "a": "2"}).endswith('{\n"b": 1,\n"a": 2\n}')


def test_choices_are_listed_the_published_way():
    assert prompts.choices(["1", "+"]) == "['1', '+']"


def test_points24_lists_its_tokens_and_shows_the_current_formula_but_not_the_cards():
    text = shown("Points24", ["8", "*"])
    listed = (
        "['1', '2', '3', '4', '5', '6', '7', '8', '9', '10', '+', '-', '*', '/', '(', ')', '=']"
    )
    assert f"You can choose between {listed}." in text
    assert "You are observing the current formula: '8*'." in text
    assert '"formula": "8*"' in text
    assert '"cards": [x, y, z, w]' in text
    assert "evaluates to 24" in text
    assert "Q" not in text.replace("'Q'", "")


def test_ezpoints_asks_for_twelve_with_two_cards_and_two_operators():
    text = shown("EZPoints")
    assert "these two cards" in text
    assert "evaluates to 12" in text
    assert "'10', '+', '*', '=']" in text
    assert '"cards": [x, y]' in text


def test_a_reduction_prompt_shows_steps_and_what_is_left_only_after_a_step():
    first, second = (
        shown("Points24", granularity="reduction"),
        shown("Points24", ["8*3"], granularity="reduction"),
    )
    assert "The numbers left are" not in first
    assert "You are observing the current steps: '8*3=24'. The numbers left are: 24 5 10." in second
    assert '"formula": "8*3=24"' in second


@pytest.mark.parametrize(
    ("name", "options", "actions", "text"),
    [
        ("NumberLine", {}, [], "numberline"),
        ("Blackjack", {}, [], "blackjack"),
        ("EZPoints", {}, ["+"], "ezpoints token +"),
        ("Points24", {}, ["8", "*"], "points24 token 8*"),
        ("Points24", {"granularity": "formula"}, [], "points24 formula"),
        ("Points24", {"granularity": "reduction"}, ["8*3"], "points24 reduction 8*3=24 (24 5 10)"),
    ],
)
def test_compact_prompts(name, options, actions, text):
    assert shown(name, actions, prompt="compact", **options) == text


def test_an_unknown_style_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="prompt='long' is not one of full, compact"):
        make_env("Blackjack", prompt="long")
