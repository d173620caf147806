"""Which deals belong to which split: a fixed hash, so that no list of deals has to be shipped."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from gtr_turbo.envs.cards.drawing import RANKS, SUITS, Card
from gtr_turbo.envs.contract import SPLITS, ContractError


def check_split(env: str, split: str, known: Sequence[str] = SPLITS) -> str:
    """Return `split`.

    Raises:
        ContractError: `split` is not in `known`.
    """
    if split not in known:
        raise ContractError(f"{env}: split={split!r} is not one of {', '.join(known)}")
    return split


def check_flags(env: str, **flags: bool) -> None:
    """Refuse what is neither true nor false: the text "off" would switch an option on.

    Raises:
        ContractError: one of `flags` is no `bool`.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ContractError(f"{env}: {name}={value!r:.80} must be true or false")


def check_cards(env: str, cards: Sequence[Card], count: int) -> list[Card]:
    """Return `cards` as a list.

    Raises:
        ContractError: they are not `count` cards.
    """
    ranks, suits = range(len(RANKS)), range(len(SUITS))
    right = [isinstance(c, Card) and c.rank in ranks and c.suit in suits for c in cards]
    if right != [True] * count:
        raise ContractError(
            f"{env}: options['cards']={cards!r:.200} must be {count} of Card(rank, suit), with rank 0..12 and "
            "suit 0..3"
        )
    return list(cards)


def _hash(kind: str, numbers: Sequence[int]) -> int:
    return zlib.crc32(f"{kind}:{','.join(map(str, numbers))}".encode())


def held_out(numbers: Sequence[int]) -> bool:
    """True for one in five of all deals; `numbers` identify the deal (ranks and suits, in order)."""
    return _hash("deal", numbers) % 5 == 0


def split_of_cards(cards: Sequence[Card], *, by_multiset: bool) -> str:
    """The split a deal belongs to: `train`, `held-out` or `held-out-multisets`.

    Args:
        cards: the deal, in order; ranks and suits count.
        by_multiset: also hold out one in seven of all multisets of card *values*, whatever the order
            and the suits; their deals are in neither of the other splits.
    """
    if by_multiset and _hash("multiset", sorted(card.value for card in cards)) % 7 == 0:
        return "held-out-multisets"
    flat = [number for card in cards for number in card]
    return "held-out" if held_out(flat) else "train"
