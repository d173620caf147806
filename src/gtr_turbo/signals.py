"""Signals of thought collapse: how much the thoughts of an update repeat each other across states.

Pure functions of texts. Entropy sees one state at a time; a model that writes one and the same thought to
every state can be sure or unsure of each token, so repetition has to be measured over states.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

ORDERS = 4
"""BLEU counts n-grams of 1 to this many words."""
EPSILON = 0.1
"""In place of a count of 0 matching n-grams (method 1 of Chen and Cherry 2014), as Texygen has it."""


def spread(thoughts: Sequence[Hashable], states: Sequence[Hashable]) -> dict[Hashable, int]:
    """For each different thought, the number of different states it was written for."""
    written: dict[Hashable, set[Hashable]] = defaultdict(set)
    for thought, state in zip(thoughts, states, strict=True):
        written[thought].add(state)
    return {thought: len(where) for thought, where in written.items()}


def distinct_share(thoughts: Sequence[Hashable], states: Sequence[Hashable]) -> float:
    """Different thoughts per different state; above 1 where one state got several thoughts."""
    return len(set(thoughts)) / len(set(states))


def template_share(thoughts: Sequence[Hashable], states: Sequence[Hashable]) -> float:
    """Share of the different (state, thought) pairs whose thought was written for another state too.

    0: every thought is of one state only. 1: there is no thought that only one state has.
    """
    counts = spread(thoughts, states).values()
    return sum(count for count in counts if count > 1) / sum(counts)


def top_template(thoughts: Sequence[Hashable], states: Sequence[Hashable]) -> float:
    """Share of the different states that got the most widespread thought; 1 is one thought for all."""
    return max(spread(thoughts, states).values()) / len(set(states))


def self_bleu(texts: Sequence[str], *, most: int = 128, seed: int = 0) -> float | None:
    """Mean BLEU-4 of each text against all others as references (self-BLEU, Zhu et al. 2018, Texygen).

    Sentence BLEU of Papineni et al. 2002: clipped precisions of 1- to 4-grams with equal weights, times the
    brevity penalty for the closest reference length (the shorter of two as close). A text of fewer than
    four words is judged by the orders it has; one that shares no word with another scores 0. Words are runs
    of letters and digits, and single other characters, so that `2*6=12` has five. Exact, in time linear in
    the number of n-grams.

    Args:
        texts: of one update.
        most: so many are drawn at random from more.
        seed: of the draw.

    Returns:
        0 (no word in common) to 1 (all alike); None for fewer than two texts that have words.
    """
    words = [found for text in texts if (found := re.findall(r"\w+|[^\w\s]", text))]
    if len(words) > most:
        words = random.Random(seed).sample(words, most)
    if len(words) < 2:
        return None
    logs = [0.0] * len(words)
    for order in range(1, ORDERS + 1):
        grams = [Counter(zip(*(w[i:] for i in range(order)), strict=False)) for w in words]
        best = _two_largest(grams)
        for i, own in enumerate(grams):
            if not own:
                continue
            matches = sum(min(n, _without(best[gram], i)) for gram, n in own.items())
            if order == 1 and not matches:
                logs[i] = -math.inf  # not a word in common
            logs[i] += math.log((matches or EPSILON) / own.total()) / min(ORDERS, len(words[i]))
    lengths = Counter(map(len, words))
    scores = [math.exp(log + _brevity(len(w), lengths)) for log, w in zip(logs, words, strict=True)]
    return sum(scores) / len(scores)


def _two_largest(grams: Sequence[Counter[tuple[str, ...]]]) -> dict[tuple[str, ...], list[int]]:
    """For each n-gram its largest count in a text, that text's number, and the largest count in any other."""
    best: dict[tuple[str, ...], list[int]] = {}
    for i, own in enumerate(grams):
        for gram, n in own.items():
            known = best.setdefault(gram, [0, -1, 0])
            if n > known[0]:
                known[:] = n, i, known[0]
            elif n > known[2]:
                known[2] = n
    return best


def _without(best: Sequence[int], i: int) -> int:
    """The largest count in a text other than `i`."""
    return best[2] if best[1] == i else best[0]


def _brevity(length: int, lengths: Counter[int]) -> float:
    """Logarithm of the brevity penalty against the closest length among the other texts."""
    others = (n for n, count in lengths.items() if count - (n == length) > 0)
    closest = min(others, key=lambda n: (abs(n - length), n))
    return min(0.0, 1 - closest / length)
