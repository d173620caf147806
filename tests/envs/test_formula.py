import ast
import contextlib
import operator
from collections import Counter
from fractions import Fraction
from itertools import combinations_with_replacement
from math import factorial, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtr_turbo.envs.cards import formula
from gtr_turbo.envs.cards.formula import FormulaError, evaluate, solves, tokenize
from gtr_turbo.envs.cards.plans import plans

MULTISETS = list(combinations_with_replacement(range(1, 11), 4))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8/(3-8/3)", Fraction(24)),
        ("10-2-3", Fraction(5)),  # from the left, not 10-(2-3) = 11
        ("8/4/2", Fraction(1)),
        ("2+3*4", Fraction(14)),
        ("(2+3)*4", Fraction(20)),
        ("1/3+1/3+1/3", Fraction(1)),
        ("1/10+2/10", Fraction(3, 10)),  # 0.30000000000000004 in floats
        ("((7))", Fraction(7)),
        (" 1 + 2 ", Fraction(3)),
    ],
)
def test_values_are_exact(text, value):
    assert evaluate(tokenize(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "", "()", "1+", "+1", "-1", "3*-1", "2**3", "7//2", "1 2", "(1", "1)", "2(3)", "(1)(2)",
        "1=1", "1.5", "1e3", "٣", "²", "0x10", "__import__('os')", "x", "1,2", "5%3", "2^3", "~1",
    ],
)  # fmt: skip
def test_what_the_grammar_does_not_know_is_no_formula(text):
    with pytest.raises(FormulaError):
        evaluate(tokenize(text))


def test_division_by_zero_is_no_formula():
    for text in ("1/0", "8/(3-3)", "0/0"):
        with pytest.raises(FormulaError, match="division by zero"):
            evaluate(tokenize(text))


def test_a_hundred_brackets_are_read_and_a_thousand_do_not_overflow_the_stack():
    assert evaluate([*"(" * 100, "7", *")" * 100]) == 7
    with pytest.raises(FormulaError, match="1000 brackets; at most 100"):
        evaluate(["("] * 1000)


def test_blanks_of_refused_tokens_do_not_join_their_neighbours():
    assert evaluate(["1", "", "+", "2"]) == 3
    with pytest.raises(FormulaError):
        evaluate(["1", "", "2"])


OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def by_python_syntax(node):
    """Value of Python's own syntax tree, restricted to the grammar; None for all else."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        a, b = by_python_syntax(node.left), by_python_syntax(node.right)
        if a is not None and b is not None and (b != 0 or not isinstance(node.op, ast.Div)):
            return OPERATIONS[type(node.op)](a, b)
    return None


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(["1", "2", "3", "8", "10", *"+-*/()"]), max_size=9))
def test_the_grammar_is_pythons_without_everything_but_four_operators(tokens):
    try:
        expected = by_python_syntax(ast.parse(" ".join(tokens), mode="eval").body)
    except SyntaxError:
        expected = None
    try:
        value = evaluate(tokens)
    except FormulaError:
        value = None
    assert value == expected


numbers = st.integers(0, 12).map(lambda n: (Fraction(n), "", str(n)))


def joined(children):
    return st.tuples(children, st.sampled_from("+-*/"), children).filter(
        lambda way: way[1] != "/" or way[2][0] != 0
    ).map(lambda way: formula.combine(
        way[0], way[2], way[1], formula.apply(way[1], way[0][0], way[2][0])
    ))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.recursive(numbers, joined, max_leaves=8))
def test_the_brackets_that_combine_leaves_out_do_not_change_the_value(item):
    assert evaluate(tokenize(item[2])) == item[0]


def test_combine_writes_no_bracket_that_is_not_needed():
    two, three = (Fraction(2), "", "2"), (Fraction(3), "", "3")
    total = formula.combine(two, three, "+", Fraction(5))
    assert formula.combine(total, two, "+", Fraction(7))[2] == "2+3+2"
    assert formula.combine(two, total, "-", Fraction(-3))[2] == "2-(2+3)"
    assert formula.combine(total, total, "*", Fraction(25))[2] == "(2+3)*(2+3)"


@given(st.text(max_size=200))
def test_any_text_is_a_value_or_a_formula_error(text):
    with contextlib.suppress(FormulaError):
        assert isinstance(evaluate(tokenize(text)), Fraction)


def test_solving_needs_the_goal_and_exactly_the_numbers():
    assert solves(tokenize("8*3*(2-1)"), [1, 2, 3, 8], 24)
    assert not solves(tokenize("8*3"), [1, 2, 3, 8], 24)  # 24 without 1 and 2
    assert not solves(tokenize("8*3*1*1"), [1, 2, 3, 8], 24)
    assert not solves(tokenize("8*3*2*1"), [1, 2, 3, 8], 24)  # 48
    assert not solves(tokenize("24*1"), [1, 2, 4], 24)  # 2 and 4 do not join
    assert not solves(tokenize("12+12"), [1, 1, 2, 2], 24)


# -- the solver ------------------------------------------------------------------------------------


def test_566_of_715_multisets_are_solvable_and_73_1_percent_of_deals():
    solvable = [values for values in MULTISETS if formula.solvable(values, 24)]
    deals = sum(
        factorial(4)
        // prod(factorial(n) for n in Counter(values).values())
        * 4 ** values.count(10)  # 10, J, Q, K
        for values in solvable
    )
    assert (len(MULTISETS), len(solvable)) == (715, 566)
    assert deals == 20_876
    assert round(100 * deals / 13**4, 1) == 73.1


def test_well_known_hands():
    for values in [(3, 3, 8, 8), (1, 5, 5, 5), (1, 3, 4, 6), (4, 4, 10, 10), (1, 2, 3, 4)]:
        assert formula.solvable(values, 24)
    for values in [(1, 1, 1, 1), (1, 1, 1, 2), (10, 10, 10, 10), (7, 7, 7, 7), (1, 1, 9, 9)]:
        assert not formula.solvable(values, 24)
    assert not formula.solvable((3, 3, 8, 8), 24, "+-*")


def test_the_only_way_for_3_3_8_8():
    assert [way.formula for way in formula.solutions([8, 3, 8, 3], 24)] == ["8/(3-8/3)"]


def test_every_plan_reaches_the_goal_with_each_number_once():
    with_plans = 0
    for values in MULTISETS:
        ways = plans(tuple(map(Fraction, values)), 24, "+-*/")
        with_plans += bool(ways)
        for way in ways:
            left = list(map(Fraction, values))
            for a, op, b in way:
                left.remove(a)
                left.remove(b)
                left.append(formula.apply(op, a, b))
            assert left == [24]
    assert with_plans == 566


def test_every_plan_is_in_whole_numbers_where_such_a_plan_exists():
    """Ten multisets need fractions; none needs a number below zero."""
    fractions = set()
    for values in MULTISETS:
        for way in plans(tuple(map(Fraction, values)), 24, "+-*/"):
            results = [formula.apply(op, a, b) for a, op, b in way]
            if any(result.denominator > 1 for result in results):
                fractions.add(values)
            assert min(results) >= 0 or values in fractions
    assert fractions == {
        (1, 3, 4, 6), (1, 4, 5, 6), (1, 5, 5, 5), (1, 6, 6, 8), (2, 4, 10, 10),
        (2, 5, 5, 10), (2, 7, 7, 10), (3, 3, 7, 7), (3, 3, 8, 8), (4, 4, 7, 7),
    }  # fmt: skip


@pytest.mark.parametrize("values", MULTISETS[7::71])
def test_every_solution_solves_and_its_steps_chain(values):
    ways = formula.solutions(values, 24)
    assert bool(ways) == formula.solvable(values, 24)
    for way in ways:
        assert solves(way.tokens, values, 24)
        assert [step.left[0] for step in way.steps] == [step.result for step in way.steps]
        assert way.steps[-1].left == (24,)


def test_a_deal_of_ezpoints_has_both_orders_of_its_one_way():
    assert {way.formula for way in formula.solutions([3, 4], 12, "+*")} == {"3*4", "4*3"}
    assert {way.formula for way in formula.solutions([2, 10], 12, "+*")} == {"2+10", "10+2"}
    assert formula.solutions([2, 3], 12, "+*") == ()
