import builtins
from collections import Counter
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.envs import ContractError, make_env
from gtr_turbo.envs.cards import deals, formula
from gtr_turbo.envs.cards.drawing import RANKS, Card
from gtr_turbo.envs.cards.plans import (
    holds,
    leads_to,
    make_steps,
    planned_formula,
    plans,
    read_claims,
    trace,
)


def dealt(ranks, name="Points24", **options):
    """An environment with the cards of `ranks`, such as "8 3 5 Q"."""
    env = make_env(name, **options)
    cards = [Card(RANKS.index(rank), i) for i, rank in enumerate(ranks.split())]
    env.reset(seed=0, options={"cards": cards})
    return env


def play(env, actions):
    """The steps (reward, terminated, truncated) and the last info."""
    outcomes = [env.step(action) for action in actions]
    return [outcome[1:4] for outcome in outcomes], outcomes[-1][4]


ON, WON, LOST = (0.0, False, False), (10.0, True, False), (-1.0, True, False)
PAID, CUT = (-1.0, False, False), (-1.0, False, True)


# -- token granularity: the published game ---------------------------------------------------------


def test_a_right_formula_pays_ten_at_the_closing_token():
    steps, info = play(dealt("8 3 2 A"), [*"8*3*(2-1)", "="])
    assert steps == [ON] * 9 + [WON]
    assert info["success"] is True
    assert info["formula"] == [*"8*3*(2-1)"]


@pytest.mark.parametrize(("ranks", "text"), [("3 3 8 8", "8/(3-8/3)"), ("A 5 5 5", "5*(5-1/5)")])
def test_fractions_are_exact(ranks, text):
    assert (
        play(dealt(ranks), [*text, "="])[0][-1] == WON
    )  # 8/(3-8/3) is 23.99999999999999 in floats


def test_three_faces_may_all_be_used():
    steps, _ = play(dealt("J Q K 4"), ["10", "+", "10", "+", "10", "-", "4", "="])
    assert steps == [ON] * 7 + [LOST]  # 26: legal all the way
    assert play(dealt("J Q K 6"), ["10", "+", "10", "+", "10", "-", "6", "="])[0][-1] == WON


@pytest.mark.parametrize(
    "tokens",
    [
        ["="],
        [*"8*3", "="],  # 24 with two cards unused
        [*"8*3+2-1", "="],  # 25
        [*"8*3*(2-1", "="],
        [*"8/(2-2", "="],
    ],
)
def test_a_wrong_formula_pays_minus_one_at_the_closing_token(tokens):
    steps, info = play(dealt("8 3 2 A"), tokens)
    assert steps[-1] == LOST
    assert info["success"] is False


def test_a_number_beyond_its_multiplicity_pays_minus_one_leaves_a_blank_and_goes_on():
    steps, info = play(dealt("8 8 3 A"), [*"8*8*8"])
    assert steps == [ON] * 4 + [PAID]
    assert info["formula"] == ["8", "*", "8", "*", ""]
    assert info["success"] is False


def test_a_blank_does_not_spoil_a_formula_that_is_right_without_it():
    steps, _ = play(dealt("8 3 2 A"), ["8", "7", *"*3*(2-1)", "="])
    assert steps == [ON, PAID, *[ON] * 8, WON]


@pytest.mark.parametrize("token", ["", "11", "24", "83", "08", "**", "//", "-3", "J", "eight", "٣"])
def test_what_is_no_token_pays_minus_one_and_leaves_a_blank(token):
    steps, info = play(dealt("8 3 2 A"), ["8", token])
    assert steps == [ON, PAID]
    assert info["formula"] == ["8", ""]


def test_two_numbers_in_a_row_do_not_join_and_two_stars_are_no_power():
    assert play(dealt("2 4 A A"), [*"24*1*1", "="])[0][-1] == LOST
    assert play(dealt("5 2 A 2"), [*"5**2-1", "="])[0][-1] == LOST  # 24 in Python
    assert play(dealt("8 3 A A"), [*"8*3*1//1", "="])[0][-1] == LOST
    assert play(dealt("4 6 A A"), [*"-4*-6*1*1", "="])[0][-1] == LOST


def test_early_truncation_ends_the_task_at_the_first_minus_one():
    steps, info = play(dealt("8 3 2 A", early_truncation=True), [*"8*8"])
    assert steps == [ON, ON, LOST]
    assert info["success"] is False


def test_the_twenty_first_token_is_too_much():
    steps, info = play(dealt("8 3 2 A"), ["("] * 21)
    assert steps == [ON] * 20 + [CUT]
    assert info["success"] is False


def test_twenty_tokens_may_still_be_closed():
    tokens = [*"((((((8*3*(2-1)", ")", ")", ")", ")", ")"]
    assert len(tokens) == 20
    assert play(dealt("8 3 2 A"), [*tokens, "="])[0] == [ON] * 20 + [LOST]  # one bracket is open
    tokens = [*"(((((8*3*(2-1))))))"]
    assert len(tokens) == 19
    assert play(dealt("8 3 2 A"), [*tokens, "="])[0] == [ON] * 19 + [WON]


def test_with_early_truncation_a_formula_that_is_too_long_is_terminated():
    assert play(dealt("8 3 2 A", early_truncation=True), ["("] * 21)[0][-1] == LOST


def test_python_never_evaluates_a_formula(monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise AssertionError("the environment evaluated a model's text")

    trap = tmp_path / "trap"
    text = f"open({str(trap)!r},'w')"
    envs = [dealt("8 3 2 A", granularity=g) for g in ("token", "reduction", "formula")]
    monkeypatch.setattr(builtins, "eval", forbidden)
    monkeypatch.setattr(builtins, "exec", forbidden)
    for env in envs:
        env.unwrapped.judge({"thoughts": text, "action": text, "formula": text, "cards": [text]})
        assert env.step(text)[1] == -1.0
    assert not trap.exists()


# -- EZPoints --------------------------------------------------------------------------------------


def test_ezpoints_is_won_by_product_and_by_sum():
    assert play(dealt("3 4", "EZPoints"), [*"3*4", "="])[0] == [ON, ON, ON, WON]
    assert play(dealt("K 2", "EZPoints"), ["2", "+", "10", "="])[0][-1] == WON
    assert play(dealt("6 6", "EZPoints"), [*"6+6", "="])[0][-1] == WON
    assert play(dealt("3 4", "EZPoints"), [*"3+4", "="])[0][-1] == LOST


def test_ezpoints_has_no_minus_and_at_most_five_tokens():
    assert play(dealt("3 4", "EZPoints"), ["-"])[0] == [PAID]
    assert play(dealt("3 4", "EZPoints"), ["+"] * 6)[0] == [ON] * 5 + [CUT]
    assert play(dealt("3 4", "EZPoints"), ["7", "7", *"3*4", "="])[0][-1] == WON


def test_ezpoints_deals_follow_the_published_rule():
    """Of 24 equal parts: first rank one of 12, then product or sum where both exist."""
    env = make_env("EZPoints")
    env.reset(seed=3)
    cards = [env.unwrapped._deal() for _ in range(6000)]
    values = Counter(tuple(sorted(card.value for card in deal)) for deal in cards)
    parts = {(2, 10): 9, (2, 6): 2, (3, 4): 2, (3, 9): 3, (4, 8): 3, (5, 7): 4, (6, 6): 1}
    assert set(values) == set(parts)
    for pair, part in parts.items():
        assert abs(values[pair] / 6000 - part / 24) < 0.025  # four deviations at most
    assert {card.rank for deal in cards for card in deal} == set(range(1, 13))  # 2..K, no ace
    larger_first = sum(a.value > b.value for a, b in cards) / (6000 - values[6, 6])
    assert abs(larger_first - 0.5) < 0.03


def test_ezpoints_has_one_granularity():
    with pytest.raises(ContractError, match="granularity 'token' only, got 'reduction'"):
        make_env("EZPoints", granularity="reduction")


# -- reduction and formula granularity -------------------------------------------------------------


def test_three_reductions_and_a_close_win():
    env = dealt("8 3 5 Q", granularity="reduction")
    steps, info = play(env, ["10/5", "3-2", "8*1"])
    assert steps == [ON] * 3
    assert info["formula"] == ["10/5=2", "3-2=1", "8*1=8"]
    assert env.step("=")[1:4] == LOST  # 8
    env = dealt("8 3 2 A", granularity="reduction")
    steps, info = play(env, ["2-1", "8*3", "24*1", "="])
    assert steps == [ON, ON, ON, WON]
    assert info["success"] is True


def test_the_result_of_a_reduction_takes_the_place_of_its_numbers():
    env = dealt("8 3 2 A", granularity="reduction")
    _, _, _, _, info = env.step("3-8")
    assert env.unwrapped.left == (-5, 2, 1)
    assert "-5*2" in info["actions"]
    assert "8*2" not in info["actions"]
    assert info["actions"][-1] == "="


def test_the_first_reduction_of_four_different_numbers_has_48_forms():
    """Twelve ordered pairs, four operators; equal numbers give fewer, and `=` closes."""
    assert len(dealt("8 3 2 A", granularity="reduction").unwrapped._info()["actions"]) == 49
    assert len(dealt("3 3 8 8", granularity="reduction").unwrapped._info()["actions"]) == 17


def test_an_impossible_reduction_pays_minus_one_and_changes_nothing():
    env = dealt("8 3 2 A", granularity="reduction")
    for action in ("8*8", "7+1", "8", "8*3*2", "2**3", "8//3", "", "8*3=24"):
        assert env.step(action)[1:4] == PAID
    assert env.unwrapped.left == (8, 3, 2, 1)
    assert env.step(" 8 * 3 ")[1:4] == ON


def test_dividing_by_a_zero_that_was_made_is_no_action():
    env = dealt("3 3 8 8", granularity="reduction")
    _, _, _, _, info = env.step("3-3")
    assert "0*8" in info["actions"]
    assert "8/0" not in info["actions"]
    assert env.step("8/0")[1:4] == PAID


def test_closing_before_one_number_is_left_loses():
    assert play(dealt("8 3 2 A", granularity="reduction"), ["8*3", "="])[0] == [ON, LOST]


def test_a_reduction_episode_is_truncated_after_twenty_turns():
    steps, _ = play(dealt("8 3 2 A", granularity="reduction"), ["?"] * 21)
    assert steps == [PAID] * 20 + [CUT]


@pytest.mark.parametrize(
    ("action", "outcome"),
    [
        ("8/(3-8/3)", WON),
        (" 8 / ( 3 - 8 / 3 ) =", WON),
        ("8*3", LOST),
        ("3*8=24", LOST),
        ("33-8/8", LOST),
        ("", LOST),
        ("=", LOST),
        ("(" * 190, LOST),
        ("8/(3-8/3)" + " " * 300, LOST),  # longer than any answer: not read
    ],
)
def test_a_formula_is_one_turn(action, outcome):
    steps, info = play(dealt("3 3 8 8", granularity="formula"), [action])
    assert steps == [outcome]
    assert info["success"] is (outcome == WON)


# -- the expert and the judge ----------------------------------------------------------------------

FRACTIONS = ["3 3 8 8", "A 5 5 5", "A 3 4 6", "A 4 5 6", "A 6 6 8", "2 4 J Q", "2 5 5 K", "2 7 7 10",
             "3 3 7 7", "4 4 7 7"]  # fmt: skip
"""The deals that need fractions on the way."""


def wins(env, rng):
    """Let the expert play; every reply has the fields, and all that can be judged is right."""
    while True:
        reply = env.unwrapped.demonstrate(rng)
        assert tuple(reply) == env.unwrapped.fields
        facts = env.unwrapped.judge(reply)
        assert {"perception", "plan"} <= set(facts)
        assert all(facts.values()), (reply, facts)
        _, reward, terminated, truncated, info = env.step(reply["action"])
        if terminated or truncated:
            return reward == 10.0 and info["success"]
        assert reward == 0.0


@pytest.mark.parametrize("style", ["full", "compact"])
@pytest.mark.parametrize("granularity", ["token", "reduction", "formula"])
def test_the_expert_wins_every_solvable_deal_and_is_judged_right(granularity, style):
    options = {"granularity": granularity, "prompt": style, "solvable_only": True}
    env, rng = make_env("Points24", **options), np.random.default_rng(0)
    for seed in range(10 if granularity == "token" else 60):
        env.reset(seed=seed)
        assert wins(env, rng)
    for ranks in FRACTIONS:
        assert wins(dealt(ranks, granularity=granularity, prompt=style), rng)


def test_the_expert_wins_every_deal_of_ezpoints():
    rng = np.random.default_rng(0)
    for style in ("full", "compact"):
        env = make_env("EZPoints", prompt=style)
        for seed in range(60):
            env.reset(seed=seed)
            assert wins(env, rng)


@pytest.mark.parametrize("granularity", ["reduction", "formula"])
def test_an_expert_that_does_not_solve_computes_right_and_misses_the_goal_nearly_always(
    granularity,
):
    env = make_env("Points24", granularity=granularity, solving=0.0, solvable_only=True)
    rng, reached = np.random.default_rng(0), 0
    for seed in range(60):
        env.reset(seed=seed)
        facts = env.unwrapped.judge(env.unwrapped.demonstrate(rng))
        assert facts["perception"]
        assert facts["arithmetic"]
        assert facts["agreement"]
        reached += facts["plan"]
    assert reached < 15


def test_a_trace_of_steps_by_hand():
    numbers = tuple(map(Fraction, (7, 5, 9, 8)))
    moves = [(7, "+", 5), (12, "-", 9), (8, "*", 3)]
    steps = make_steps(numbers, [(Fraction(a), op, Fraction(b)) for a, op, b in moves])
    assert trace(steps) == "7+5=12 (12 9 8), 12-9=3 (3 8), 8*3=24"
    assert tuple((step.a, step.operator, step.b) for step in steps) in plans(numbers, 24, "+-*/")


def judged(thoughts, granularity="reduction", ranks="8 3 2 A", played=(), **changes):
    env = dealt(ranks, granularity=granularity)
    for action in played:
        env.step(action)
    base = {"cards": ranks.split(), "formula": env.unwrapped.formula_text(), "action": "2-1"}
    return env.unwrapped.judge({**base, "thoughts": thoughts, **changes})


RIGHT = "2-1=1 (1 8 3), 8*3=24 (24 1), 24*1=24"


def test_judge_agrees_with_a_right_reply():
    every = {"perception": True, "arithmetic": True, "plan": True, "agreement": True}
    assert judged(RIGHT) == every
    assert judged(RIGHT, "formula", action="8*3*(2-1)") == every
    assert judged("8*3=24 (24 1), 24*1=24", played=["2-1"], action="8*3") == every


@pytest.mark.parametrize(
    ("cards", "right"),
    [
        (["8", "3", "2", "A"], True),
        ([8, 3, 2, 1], True),
        (["8", "3", "2", "1"], True),
        (["3", "8", "2", "A"], False),  # the order counts
        (["8", "3", "2"], False),
        (["8", "3", "2", "A", "A"], False),
        (["8", "3", "2", "K"], False),
        ("8321", False),
        (None, False),
        ([["8"], 3, 2, 1], False),
    ],
)
def test_perception_is_the_cards_in_order_by_rank_or_value(cards, right):
    assert judged(RIGHT, cards=cards)["perception"] is right


def test_perception_is_the_current_formula_too():
    assert judged(RIGHT, formula="2-1=1")["perception"] is False
    assert judged("8*3=24, 24*1=24", played=["2-1"])["perception"] is True
    assert judged("8*3=24, 24*1=24", played=["2-1"], formula="")["perception"] is False
    assert judged("", "token", played=["8", "*"], formula="8 *")["perception"] is True


def test_a_plan_that_misses_the_goal_or_reuses_a_number_is_wrong_though_its_arithmetic_is_right():
    for thoughts in (
        "2-1=1, 8*3=24, 24+1=25",
        "8*3=24",  # two numbers unused
        "8*3=24, 8*3=24, 24*1=24",
        "12*2=24",
    ):
        facts = judged(thoughts)
        assert (facts["arithmetic"], facts["plan"]) == (True, False)


def test_wrong_arithmetic_makes_the_plan_wrong():
    facts = judged("2-1=2, 8*3=24, 24*2=24")
    assert facts == {"perception": True, "arithmetic": False, "plan": False, "agreement": True}


def test_agreement_is_the_first_step_of_the_plan_whether_or_not_it_is_good():
    assert judged(RIGHT, action="8*3")["agreement"] is False
    assert judged("8+3=11", action="8+3") == {
        "perception": True, "arithmetic": True, "plan": False, "agreement": True,
    }  # fmt: skip
    assert judged(RIGHT, "formula", action="8*3+2-1")["agreement"] is False  # 25, the plan gives 24


def test_a_thought_without_steps_has_no_arithmetic_and_a_plan_only_at_the_goal():
    assert judged("hm") == {"perception": True, "plan": False, "agreement": False}
    played = ["2-1", "8*3", "24*1"]
    assert judged("24", played=played, action="=") == {
        "perception": True, "plan": True, "agreement": True,
    }  # fmt: skip


def test_with_tokens_the_plan_is_the_last_formula_of_the_thought_and_starts_with_what_is_written():
    plan = "not 8+3 but 8*3*(2-1)=24"
    assert judged(plan, "token", action="8") == {
        "perception": True, "plan": True, "agreement": True,
    }  # fmt: skip
    facts = judged(plan, "token", played=["8", "*"], action="3")
    assert (facts["plan"], facts["agreement"]) == (True, True)
    facts = judged(plan, "token", played=["3"], action="*")
    assert (facts["plan"], facts["agreement"]) == (False, True)
    assert judged(plan, "token", action="3")["agreement"] is False
    assert judged(plan, "token", played=[*"8*3*(2-1)"], action="=")["agreement"] is True
    assert judged("no formula", "token") == {"perception": True}


def test_blanks_of_illegal_tokens_are_no_part_of_the_formula():
    env = dealt("7 5 9 8")
    for action in ("(", "?"):
        env.step(action)
    assert env.unwrapped.tokens == ["(", ""]
    reply = {"thoughts": "(7+5-9)*8=24", "action": "7"}
    assert env.unwrapped.judge(reply) == {"perception": False, "plan": True, "agreement": True}
    assert env.unwrapped.judge(reply | {"action": "+"})["agreement"] is False
    assert goes_on(env) == 10


def goes_on(env):
    """The last reward of the expert, from here on."""
    rng, ended = np.random.default_rng(0), False
    while not ended:
        _, reward, terminated, truncated, _ = env.step(env.unwrapped.demonstrate(rng)["action"])
        ended = terminated or truncated
    return reward


def test_an_expert_gives_up_where_blanks_leave_no_room():
    """A formula is at most 20 tokens long, and blanks count; the shortest, 8*5-9-7, has 7."""
    for blanks, reward in ((13, 10), (14, -1)):
        env = dealt("7 5 9 8")
        for _ in range(blanks):
            env.step("?")
        assert goes_on(env) == reward


@pytest.mark.parametrize("plan", ["3 × 8 = 24, 24 × 1 = 24", "3·8=24, 24÷1=24", "27−3=24, 4/2=2"])
def test_signs_that_people_write_are_read(plan):
    assert all(map(holds, read_claims(plan)))
    assert len(read_claims(plan)) == 2


def test_decimals_are_read_whole():
    assert read_claims("10/4=2.5 and 2.5*4=10.") == [
        (10, "/", 4, Fraction(5, 2)), (Fraction(5, 2), "*", 4, 10),
    ]  # fmt: skip
    assert [holds(claim) for claim in read_claims("1/5=0.2, 5-0.2=4.8, 4.8*5=24.5")] == [
        True, True, False,
    ]  # fmt: skip
    assert leads_to([1, 5, 5, 5], read_claims("1/5=0.2, 5-0.2=4.8, 4.8*5=24"), 24)


def test_numbers_without_an_operator_are_no_plan():
    assert planned_formula("We have 7 5 9 8") is None
    assert "".join(planned_formula("(7 + 5 − 9) × 8 = 24")) == "(7+5-9)*8"


def test_no_cards_are_refused_and_not_dealt_at_random():
    with pytest.raises(ContractError, match="cards"):
        make_env("Points24").reset(options={"cards": []})


def test_a_limit_of_gymnasium_may_end_an_episode():
    env = make_env("Points24", max_episode_steps=3)
    env.reset(seed=0)
    ends = [env.step("(") for _ in range(3)]
    assert [end[3] for end in ends] == [False, False, True]
    assert ends[-1][4]["success"] is False


def test_a_step_with_a_fraction_below_the_line_is_read_as_it_is_written():
    eight_by_a_third = (8, "/", Fraction(1, 3), 24)
    assert read_claims("8/1/3=24") == [eight_by_a_third]
    assert read_claims("8/3/2=4/3") == [(Fraction(8, 3), "/", 2, Fraction(4, 3))]
    assert read_claims("8/3/2=16/3") == [(8, "/", Fraction(3, 2), Fraction(16, 3))]
    assert [holds(claim) for claim in read_claims("8/3/2=5, 3-8/3=1/3, -5+7=2")] == [
        False, True, True,
    ]  # fmt: skip
    assert [holds(claim) for claim in read_claims("8/4/-2=-1, 8/4/-2=-4, 8/4/-2=4")] == [
        True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["3/00+1=4", "1/0=0", "3/0/0=1", "1+1=2/0", "8/4/0=2", "0/0=0", "48/2/-0=0"]
)
def test_a_number_over_zero_is_wrong_and_no_error(text):
    assert [holds(claim) for claim in read_claims(text)] == [False]


def test_a_thought_of_brackets_is_no_formula_and_no_stack_overflow():
    assert judged("(" * 900 + "8+3 2 1", "token")["plan"] is False


@pytest.mark.parametrize("granularity", ["token", "reduction", "formula"])
@settings(max_examples=60, deadline=None)
@given(
    thoughts=st.text("0123456789+-*/=() ,J", max_size=60) | st.text(max_size=30),
    other=st.none()
    | st.text(max_size=10)
    | st.lists(st.integers() | st.text(max_size=3), max_size=5),
)
def test_judge_takes_any_reply(granularity, thoughts, other):
    game = dealt("8 3 2 A", granularity=granularity).unwrapped
    reply = {"cards": other, "formula": other, "thoughts": thoughts, "action": other}
    for facts in (game.judge(reply), game.judge({}), game.judge({"thoughts": other})):
        assert all(isinstance(value, bool) for value in facts.values())


# -- deals and splits ------------------------------------------------------------------------------


def test_given_cards_are_dealt_whatever_the_split():
    env = dealt("A A A A", split="held-out", solvable_only=True)
    assert env.unwrapped.numbers == [1, 1, 1, 1]


def test_a_deal_is_four_independent_uniform_cards():
    env = make_env("Points24")
    env.reset(seed=1)
    ranks = Counter(card.rank for _ in range(3000) for card in env.unwrapped._deal())
    assert set(ranks) == set(range(13))
    assert all(abs(count / 12000 - 1 / 13) < 0.011 for count in ranks.values())


def split_of(cards):
    return deals.split_of_cards(cards, by_multiset=True)


@pytest.mark.parametrize("split", ["train", "held-out", "held-out-multisets"])
def test_an_environment_deals_its_split_only(split):
    env = make_env("Points24", split=split, solvable_only=True)
    for seed in range(60):
        env.reset(seed=seed)
        assert split_of(env.unwrapped.cards) == split
        assert formula.solvable(env.unwrapped.numbers, 24)


def test_all_deals_from_every_split_at_the_documented_rates():
    env = make_env("Points24")
    env.reset(seed=0)
    counts = Counter(split_of(env.unwrapped._deal()) for _ in range(6000))
    assert set(counts) == {"train", "held-out", "held-out-multisets"}
    assert abs(counts["held-out-multisets"] / 6000 - 0.129) < 0.02  # 3687 of 28,561
    rest = counts["train"] + counts["held-out"]
    assert abs(counts["held-out"] / rest - 0.2) < 0.025


def test_94_multisets_are_held_out_which_is_3687_of_28561_deals_of_ranks():
    held = [
        [min(rank + 1, 10) for rank in ranks]
        for ranks in product(range(13), repeat=4)
        if split_of([Card(rank, 0) for rank in ranks]) == "held-out-multisets"
    ]
    assert (len({tuple(sorted(values)) for values in held}), len(held)) == (94, 3687)


def test_a_shuffle_or_other_suits_keep_a_held_out_multiset_held_out():
    env = make_env("Points24", split="held-out-multisets")
    env.reset(seed=5)
    cards = env.unwrapped.cards
    assert (
        split_of([Card(card.rank, 3 - card.suit) for card in cards[::-1]]) == "held-out-multisets"
    )


def test_ezpoints_holds_out_deals_but_no_multisets():
    dealt_by = {}
    for split in ("train", "held-out"):
        env = make_env("EZPoints", split=split)
        dealt_by[split] = set()
        for seed in range(150):
            env.reset(seed=seed)
            dealt_by[split].add(tuple(env.unwrapped.cards))
    assert not dealt_by["train"] & dealt_by["held-out"]
    with pytest.raises(ContractError, match="is not one of all, train, held-out"):
        make_env("EZPoints", split="held-out-multisets")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "letter"}, "granularity='letter' is not one of token, reduction, formula"),
        ({"split": "test"}, "split='test' is not one of all, train, held-out, held-out-multisets"),
        ({"solving": 1.5}, "solving=1.5 must be a probability"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ContractError, match=message):
        make_env("Points24", **options)


@pytest.mark.parametrize("name", ["NumberLine", "EZPoints", "Points24", "Blackjack"])
@pytest.mark.parametrize("value", ["off", 0, None])
def test_what_is_neither_true_nor_false_switches_nothing_on(name, value):
    with pytest.raises(ContractError, match=f"{name}: early_truncation={value!r} must be true or"):
        make_env(name, early_truncation=value)
    if "Points" in name:
        with pytest.raises(ContractError, match=f"solvable_only={value!r} must be true or false"):
            make_env(name, solvable_only=value)


@pytest.mark.parametrize(
    "cards", [[Card(1, 1)] * 3, [Card(1, 1)] * 5, [(1, 1)] * 4, [Card(13, 0)] * 4, "4444"]
)
def test_cards_that_cannot_be_dealt_are_refused(cards):
    with pytest.raises(ContractError, match=r"must be 4 of Card\(rank, suit\)"):
        make_env("Points24").reset(seed=0, options={"cards": cards})


def test_only_solvable_deals_are_dealt_when_asked():
    plain, filtered = make_env("Points24"), make_env("Points24", solvable_only=True)
    solvable = 0
    for seed in range(200):
        plain.reset(seed=seed)
        filtered.reset(seed=seed)
        assert formula.solvable(filtered.unwrapped.numbers, 24)
        solvable += formula.solvable(plain.unwrapped.numbers, 24)
    assert 120 <= solvable <= 172  # 73.1 % of 200 is 146; four deviations are 25


@pytest.mark.parametrize("ranks", ["8 3 5 Q", "7 7 7 A", "2 2 4 4"])
def test_the_actions_of_a_reduction_are_the_solver_s_steps_in_its_order(ranks):
    env = dealt(ranks, granularity="reduction").unwrapped
    while len(env.left) > 1:
        steps = {}
        for _, _, step in formula.reductions(env.left):
            steps.setdefault(f"{step.a}{step.operator}{step.b}", step)
        assert env._info()["actions"] == [*steps, "="]
        action = list(steps)[-1]  # divides, where it can
        env.step(action)
        assert env.steps[-1] == steps[action]
