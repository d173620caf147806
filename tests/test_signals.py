import math
from types import SimpleNamespace

import numpy as np
import pytest

from gtr_turbo.signals import distinct_share, self_bleu, spread, template_share, top_template
from gtr_turbo.tracking import thought_metrics


def test_repetition_over_states_by_hand():
    """Four states; "a" is written for three of them, "b" twice for one state, "c" once."""
    thoughts = ["a", "a", "a", "a", "b", "b", "c"]
    states = [1, 1, 2, 3, 3, 3, 4]
    assert spread(thoughts, states) == {"a": 3, "b": 1, "c": 1}
    assert distinct_share(thoughts, states) == 3 / 4
    assert template_share(thoughts, states) == 3 / 5  # pairs: a1 a2 a3 b3 c4
    assert top_template(thoughts, states) == 3 / 4


def test_one_state_asked_again_and_again_is_no_template():
    assert template_share(["a"] * 5, [1] * 5) == 0
    assert template_share(["a"] * 5, range(5)) == top_template(["a"] * 5, range(5)) == 1
    assert template_share("abc", range(3)) == 0


def test_two_templates_have_distinct_thoughts_at_two_per_cent_and_a_full_share():
    thoughts, states = ["x", "y"] * 50, range(100)
    assert distinct_share(thoughts, states) == 0.02
    assert template_share(thoughts, states) == 1
    assert top_template(thoughts, states) == 0.5


def test_self_bleu_by_hand():
    """ "a b c d e" and "a b c d f": of five words four match, of four pairs three, of three 2, of two 1."""
    expected = (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(expected)


def test_self_bleu_clips_counts_at_the_best_single_reference():
    """ "a a a": one reference has "a" twice, so 2 of 3 words and 1 of 2 pairs match, and no triple does."""
    first = (2 / 3 * 1 / 2 * 0.1 / 1) ** (1 / 3)
    # "a a b": against "a a a", 2 of 3, 1 of 2, no triple; the same numbers
    # "a": one word, found; shorter by two than both others
    last = math.exp(1 - 3 / 1)
    assert self_bleu(["a a a", "a a b", "a"]) == pytest.approx((first + first + last) / 3)


def test_self_bleu_at_its_ends():
    assert self_bleu(["2*6=12"] * 3) == pytest.approx(1)
    assert self_bleu(["yes", "yes"]) == pytest.approx(
        1
    )  # short texts are judged by the orders they have
    assert self_bleu(["a b c d", "e f g h"]) == 0
    assert self_bleu(["a b c d", "d c b a"]) == pytest.approx((0.1 / 3 * 0.1 / 2 * 0.1) ** 0.25)
    assert self_bleu(["a"]) is None
    assert self_bleu(["a b", "", "  "]) is None


def test_self_bleu_draws_by_its_seed():
    texts = [" ".join(f"w{(i * j) % 97}" for j in range(1, 200)) for i in range(3000)]
    first = self_bleu(texts, most=64, seed=1)
    assert first == self_bleu(texts, most=64, seed=1) != self_bleu(texts, most=64, seed=2)


def turn(prompt, pixel, **fields):
    frame = np.full((2, 2, 3), pixel, np.uint8)
    return SimpleNamespace(prompt=prompt, observed=SimpleNamespace(frame=frame), fields=fields)


def test_a_state_is_a_prompt_with_its_frame():
    turns = [
        turn("p", 0, thoughts="go up now", action="up"),
        turn("p", 1, thoughts="go up now", action="up"),
        turn("q", 1, thoughts="stay", action="up"),
        turn("q", 1, thoughts="go up now", action="up"),  # its state has a thought already
    ]
    found = thought_metrics(turns, seed=0)
    assert found["thought/distinct"] == 2 / 3
    assert found["thought/template_share"] == 3 / 4
    assert found["thought/top_template"] == 1
    assert found["thought/self_bleu"] == pytest.approx(2 / 3)  # "stay" shares no word


def test_without_the_key_thoughts_all_before_the_action_is_the_thought():
    """Else every thought would be the empty one, and look like a template."""
    turns = [turn("p", i, plan=f"step {i}", action="up") for i in range(3)]
    assert thought_metrics(turns, seed=0)["thought/template_share"] == 0
    assert "thought/self_bleu" not in thought_metrics(turns[:1], seed=0)
