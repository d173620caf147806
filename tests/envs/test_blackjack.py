import numpy as np
import pytest

from gtr_turbo.envs import make_env
from gtr_turbo.envs.cards.blackjack import total
from gtr_turbo.envs.cards.drawing import RANKS, Card


def hand(text):
    return [Card(RANKS.index(rank), i % 4) for i, rank in enumerate(text.split())]


def table(player, dealer, draws="", **options):
    """A game in which the cards to come are known."""
    env = make_env("Blackjack", **options)
    env.reset(seed=0)
    game, rest = env.unwrapped, hand(draws)
    game.player, game.dealer = hand(player), hand(dealer)
    game._draw = lambda: rest.pop(0)
    return env


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ("10 7", (17, False)),
        ("A K", (21, True)),
        ("A 6", (17, True)),
        ("A A", (12, True)),
        ("A 6 10", (17, False)),
        ("A A 9", (21, True)),
        ("A A 10", (12, False)),
        ("J Q K", (30, False)),
        ("10 A A", (12, False)),
    ],
)
def test_totals(cards, expected):
    assert total(hand(cards)) == expected


@pytest.mark.parametrize(
    ("player", "dealer", "draws", "reward", "final"),
    [
        ("10 9", "10 8", "", 1.0, 18),
        ("10 8", "10 8", "", 0.0, 18),
        ("10 7", "10 8", "", -1.0, 18),
        ("10 7", "10 6", "5", -1.0, 21),  # 16 draws
        ("10 2", "10 6", "6", 1.0, 22),  # the dealer goes over: even 12 wins
        ("10 8", "A 6", "", 1.0, 17),  # a soft 17 stands
        ("10 8", "A 5", "10 2", 0.0, 18),  # soft 16 -> hard 16 -> 18
        ("10 10", "2 2", "2 2 2 2 5", 1.0, 17),
        ("A K", "A K", "", 0.0, 21),
    ],
)
def test_standing(player, dealer, draws, reward, final):
    env = table(player, dealer, draws)
    _, paid, terminated, truncated, info = env.step("stand")
    assert (paid, terminated, truncated) == (reward, True, False)
    assert info["success"] is (reward > 0)
    assert total(env.unwrapped.dealer)[0] == final


def test_hitting_adds_a_card_and_going_over_loses():
    env = table("10 5", "10 7", "6 A")
    _, reward, terminated, _, info = env.step("hit")
    assert (reward, terminated, info["player"]) == (0.0, False, 21)
    _, reward, terminated, _, info = env.step("hit")
    assert (reward, terminated, info["player"], info["success"]) == (-1.0, True, 22, False)


def test_an_ace_becomes_one_when_eleven_is_too_much():
    env = table("A 6", "10 7", "9")
    assert env.unwrapped._info()["usable_ace"] is True
    _, _, terminated, _, info = env.step("hit")
    assert (terminated, info["player"], info["usable_ace"]) == (False, 16, False)


@pytest.mark.parametrize("action", ["", "HIT", "hit hit", "double"])
def test_an_unknown_action_pays_minus_one_and_changes_nothing(action):
    env = table("10 5", "10 7")
    before = env.unwrapped._observation()["image"]
    observation, reward, terminated, truncated, info = env.step(action)
    assert (reward, terminated, truncated) == (-1.0, False, False)
    assert (info["player"], info["dealer"]) == (15, 10)
    assert np.array_equal(before, observation["image"])


def test_early_truncation_ends_the_game_at_an_unknown_action():
    _, reward, terminated, truncated, info = table("10 5", "9 7", early_truncation=True).step("?")
    assert (reward, terminated, truncated, info["success"]) == (-1.0, True, False, False)


def test_twenty_unknown_actions_truncate():
    env = table("10 5", "10 7")
    ends = [env.step("?")[2:4] for _ in range(20)]
    assert ends == [(False, False)] * 19 + [(False, True)]


def test_the_dealers_second_card_is_hidden_until_the_game_is_over():
    shown = {}
    for second in ("2", "7"):
        env = table("10 9", f"10 {second}", "K")
        observation = env.unwrapped._observation()
        assert env.unwrapped._info()["dealer"] == 10
        shown[second] = observation["image"].tobytes(), env.step("stand")[0]["image"].tobytes()
    assert shown["2"][0] == shown["7"][0]
    assert shown["2"][1] != shown["7"][1]


@pytest.mark.parametrize(
    ("player", "dealer", "action"),
    [
        ("10 7", "A 5", "stand"),
        ("10 6", "7 5", "hit"),
        ("10 3", "2 5", "stand"),
        ("10 3", "7 5", "hit"),
        ("10 2", "4 5", "stand"),
        ("10 2", "3 5", "hit"),
        ("A 7", "2 5", "stand"),
        ("A 7", "9 5", "hit"),
        ("A 8", "10 5", "stand"),
        ("A 6", "6 5", "hit"),
    ],
)
def test_the_expert_plays_basic_strategy_and_is_judged_right(player, dealer, action):
    for style in ("full", "compact"):
        game = table(player, dealer, prompt=style).unwrapped
        reply = game.demonstrate(np.random.default_rng(0))
        assert reply["action"] == action
        assert game.judge(reply) == {"perception": True, "agreement": True}


def test_judge_reads_the_two_totals_from_the_thoughts():
    game = table("10 5", "9 7").unwrapped
    assert game.judge({"thoughts": "15 against 9", "action": "hit"}) == {
        "perception": True,
        "agreement": True,
    }
    assert game.judge({"thoughts": "9 against 15", "action": "stand"}) == {
        "perception": False,
        "agreement": False,
    }
    assert game.judge({}) == {"perception": False, "agreement": False}


def test_every_first_deal_is_in_exactly_one_split():
    def first_deal(env, seed):
        env.reset(seed=seed)
        return env.unwrapped.player + env.unwrapped.dealer[:1]

    plain, train, held_out = (
        make_env("Blackjack", split=split) for split in ("all", "train", "held-out")
    )
    held = 0
    for seed in range(150):
        deal = first_deal(plain, seed)  # the split that does not hold it draws again
        in_train, in_held_out = first_deal(train, seed) == deal, first_deal(held_out, seed) == deal
        assert in_train != in_held_out
        held += in_held_out
    assert 15 <= held <= 45  # one in five of 150 is 30; three deviations are 15
