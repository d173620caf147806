import io
import sys

import gymnasium
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from gtr_turbo.cli import main
from gtr_turbo.collect import EVALUATION, Envs, stream
from gtr_turbo.envs import make_env
from gtr_turbo.play import _look, half_blocks

OURS = sorted(key for key in gymnasium.registry if key.startswith("gtr/"))


@pytest.fixture
def by_hand(capsys, monkeypatch, tmp_path):
    """Play with the given answers: what was printed, and the actions that were taken."""
    taken, step = [], Envs.step

    def watched(self, i, action):
        taken.append(action)
        return step(self, i, action)

    monkeypatch.setattr(Envs, "step", watched)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def play(*arguments, answers):
        taken.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{a}\n" for a in answers)))
        assert main(["play", *arguments]) == 0
        return capsys.readouterr().out, list(taken)

    return play


def expert(name, **options):
    """Commands with which the expert wins the first game of `play`, the legal ones at each, the frames."""
    env = make_env(name, **options)
    observation, info = env.reset(seed=stream(0, EVALUATION, 0) % 2**31)
    commands, legal, frames, done = [], [], [], False
    while not done:
        frames.append(observation["image"])
        legal.append(info["actions"])
        commands.append(env.unwrapped.demonstrate(np.random.default_rng(0))["action"])
        observation, _, terminated, truncated, info = env.step(commands[-1])
        done = terminated or truncated
    assert info["success"]
    return commands, legal, frames


def test_a_person_wins_a_household_game_by_numbers_and_by_text(by_hand, tmp_path):
    commands, legal, frames = expert("Household", split="held-out")
    numbers = [str(actions.index(c) + 1) for c, actions in zip(commands, legal, strict=True)]
    assert len(commands) > 2
    for answers in (numbers, commands, [numbers[0], f"  {commands[1]} ", *numbers[2:]]):
        out, taken = by_hand(
            "Household-v0", "--split", "held-out", "--episodes", "1", "--frames", str(tmp_path / "f"),
            answers=answers,
        )  # fmt: skip
        assert taken == commands
        assert f"success after {len(commands)} turn(s), return +51.0" in out
        assert "1 of 1 episodes succeeded" in out
    files = sorted((tmp_path / "f").iterdir())
    assert [file.name for file in files] == [f"0000-{n:02d}.png" for n in range(len(commands))]
    for file, frame in zip(files, frames, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), frame)
    assert str(files[0]) in out
    for part in ("Your task is to", f"1  {legal[0][0]}", f"{len(legal[0])}  {legal[0][-1]}"):
        assert part in out


def test_without_an_agent_the_environment_may_be_an_option_or_a_recipes(by_hand):
    for arguments in (["--env", "NumberLine"], ["NumberLine"], ["--config", "numberline"]):
        out, taken = by_hand(*arguments, "--episodes", "1", answers=["+"])
        assert taken == ["+"]
    assert "numberline" in out  # the recipe's prompt is compact


@pytest.mark.parametrize("name", OURS)
def test_every_environment_can_be_played_and_left(by_hand, name):
    env = make_env(name)
    actions = env.reset(seed=stream(0, EVALUATION, 0) % 2**31)[1]["actions"]
    out, taken = by_hand(name, "--episodes", "2", answers=["", "no such thing", actions[0], "quit"])
    assert taken == [actions[0]]
    assert "not an action: no such thing" in out
    assert "finished episodes succeeded" in out


def test_the_end_of_input_is_an_end(by_hand):
    out, taken = by_hand("Blackjack", answers=["stand", "stand"])
    assert taken == ["stand", "stand"]
    assert out.count("after 1 turn(s)") == 2
    assert out.endswith("of 2 finished episodes succeeded\n")


def test_a_slip_costs_no_turn(by_hand):
    out, taken = by_hand(
        "Household", answers=["0", "999", "9" * 5000, "٣", "-1", "go to nowhere 1", "quit"]
    )
    assert taken == []
    assert out.count("not an action") == 6


def test_where_actions_are_numbers_an_answer_is_the_action(by_hand):
    env = make_env("EZPoints")
    actions = env.reset(seed=stream(0, EVALUATION, 0) % 2**31)[1]["actions"]
    number = next(action for action in actions if action.isdecimal())
    out, taken = by_hand("EZPoints", answers=[number, "quit"])
    assert taken == [number]
    assert f"1  {actions[0]}" not in out


class Free(gymnasium.Env):
    """Lists no actions, and shows control characters."""

    fields = ("thoughts", "action")

    def __init__(self):
        made = make_env("Blackjack")
        self.observation_space, self.action_space = made.observation_space, made.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"image": np.zeros((8, 8, 3), np.uint8), "prompt": "\x1b[2Jsay\nhello [bold]"}, {}

    def step(self, action):
        won = action == "hello \x1b]0;x\x07"
        return self.reset()[0], float(won), True, False, {"success": won}


def test_control_characters_are_shown_and_any_text_is_an_action_where_none_is_listed(by_hand):
    gymnasium.register("Free-v0", Free)
    try:
        out, taken = by_hand("Free-v0", "--episodes", "1", answers=["", "hello \x1b]0;x\x07"])
        refused, _ = by_hand("Blackjack", answers=["\x1b[31mred\ud83c"])
    finally:
        del gymnasium.registry["Free-v0"]
    assert taken == ["hello \x1b]0;x\x07"]
    assert "\x1b" not in out + refused
    assert "\\x1b[2Jsay\nhello [bold]\n" in out
    assert "1 of 1 episodes succeeded" in out
    assert "\\x1b[31mred\\ud83c" in refused


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "play needs a run, a model or an environment"),
        (["--env", "Househol"], "Did you mean 'Household'?"),
        (["Household", "--which", "teacher"], "--greedy and --which are of an agent"),
        (["Household", "--split", "odd"], "split='odd'"),
        (["Household", "--episodes", "-1"], "--episodes -1 must be at least 1"),
    ],
)
def test_what_cannot_be_played_is_told_in_one_line(capsys, arguments, told):
    assert main(["play", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gtr-turbo: ")
    assert told in error


# -- frames in the terminal ------------------------------------------------------------------------

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def colours(segment):
    style = segment.style
    return tuple(style.color.triplet), tuple(style.bgcolor.triplet)


def test_a_character_holds_an_upper_and_a_lower_pixel():
    frame = np.array([[RED, GREEN], [BLUE, WHITE]], np.uint8)
    left, right, end = half_blocks(frame, 2).segments
    assert (left.text, right.text, end.text) == ("▀", "▀", "\n")
    assert (colours(left), colours(right)) == ((RED, BLUE), (GREEN, WHITE))


def test_a_large_frame_is_made_smaller_by_means_and_keeps_its_shape():
    frame = np.array([[RED, RED], [BLUE, BLUE]], np.uint8).repeat(60, axis=0).repeat(90, axis=1)
    rows = "".join(segment.text for segment in half_blocks(frame, 12).segments).splitlines()
    assert rows == ["▀" * 12] * 4  # 12 x 8 pixels of 180 x 120
    (segment, _) = half_blocks(frame, 1).segments
    assert colours(segment) == (RED, BLUE)


@pytest.mark.parametrize("system", ["truecolor", "256", None])
def test_frames_are_drawn_where_there_are_colours(system, tmp_path):
    console = Console(
        file=io.StringIO(), force_terminal=system is not None, color_system=system, width=60
    )
    frame = np.full((40, 40, 3), 255, np.uint8)
    _look(console, frame, file=tmp_path / "new" / "frame.png", show=True)
    text = console.file.getvalue()
    assert (text.count("▀") == 40 * 20) is (system is not None)
    assert ("no colours" in text) is (system is None)
    assert ("38;2;255;255;255" in text) is (system == "truecolor")
    assert (tmp_path / "new" / "frame.png").exists()
