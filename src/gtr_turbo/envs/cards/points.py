"""EZPoints and Points24: make 12 or 24 from the cards (RL4VLM, arXiv 2405.10292)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import gymnasium
import numpy as np

from gtr_turbo import prompts
from gtr_turbo.envs.cards import deals, drawing, formula
from gtr_turbo.envs.cards.drawing import Card
from gtr_turbo.envs.cards.formula import Step
from gtr_turbo.envs.cards.plans import (
    as_formula,
    evaluates_to,
    holds,
    leads_to,
    make_steps,
    planned_formula,
    plans,
    read_claims,
    show,
    show_step,
    trace,
)
from gtr_turbo.envs.cards.solver import fitting, solver
from gtr_turbo.envs.contract import SPLITS, AnyText, ContractError, Tool, observation_space

NUMBERS = tuple(str(n) for n in range(1, 11))
GRANULARITIES = ("token", "reduction", "formula")


class PointsEnv(gymnasium.Env[dict[str, Any], str]):
    """What EZPoints and Points24 share: cards, an exact formula, rewards. Use the two subclasses."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 - Gymnasium's name and form
    fields = ("cards", "formula", "thoughts", "action")
    name: ClassVar[str]
    count: ClassVar[int]
    goal: ClassVar[int]
    operators: ClassVar[str]
    symbols: ClassVar[tuple[str, ...]]
    max_length: ClassVar[int]
    splits: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        *,
        prompt: str = "full",
        granularity: str = "token",
        early_truncation: bool = False,
        solvable_only: bool = False,
        split: str = "all",
        solving: float = 1.0,
        render_mode: str | None = None,
    ) -> None:
        if granularity not in GRANULARITIES:
            raise ContractError(
                f"granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}"
            )
        if not 0 <= solving <= 1:
            raise ContractError(f"solving={solving} must be a probability, between 0 and 1")
        flags = {"early_truncation": early_truncation, "solvable_only": solvable_only}
        deals.check_flags(self.name, **flags)
        self.render_mode = render_mode
        self._compact = prompts.check_style(prompt) == "compact"
        self.granularity = granularity
        self._early_truncation = early_truncation
        self._solvable_only = solvable_only
        self._split = deals.check_split(self.name, split, self.splits)
        self._solving = solving
        self.observation_space = observation_space(drawing.SIZE, drawing.SIZE)
        self.action_space = AnyText()

    # -- rules ---------------------------------------------------------------------------------

    @abstractmethod
    def _deal(self) -> list[Card]:
        """Draw cards from `np_random`."""

    def _accepts(self, cards: Sequence[Card]) -> bool:
        by_multiset = "held-out-multisets" in self.splits
        if self._split != "all" and self._split != deals.split_of_cards(
            cards, by_multiset=by_multiset
        ):
            return False
        values = [card.value for card in cards]
        return not self._solvable_only or formula.solvable(values, self.goal, self.operators)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Deal the cards. `options={"cards": [Card, ...]}` sets them; a `ContractError` if they cannot be."""
        super().reset(seed=seed)
        given = (options or {}).get("cards")
        cards = self._deal() if given is None else deals.check_cards(self.name, given, self.count)
        while given is None and not self._accepts(cards):
            cards = self._deal()
        self.cards: list[Card] = cards
        self.tokens: list[str] = []
        self.steps: list[Step] = []
        self._turns = 0
        return self._observation(), self._info()

    @property
    def numbers(self) -> list[int]:
        """Card values in the order of the cards."""
        return [card.value for card in self.cards]

    @property
    def left(self) -> tuple[Fraction, ...]:
        """Numbers left after the reductions so far, the last result first."""
        return self.steps[-1].left if self.steps else tuple(Fraction(n) for n in self.numbers)

    def step(self, action: str) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Append a token, make a reduction, or give the formula, by `granularity`."""
        action = action.replace(" ", "") if len(action) < 200 else "?"
        self._turns += 1
        if self.granularity == "formula":
            self.tokens = formula.tokenize(action.removesuffix("="))
            closed, legal = True, True
        elif action == "=":
            closed = legal = True
        else:
            closed = False
            legal = self._append(action) if self.granularity == "token" else self._reduce(action)
        success = closed and self._solved()
        too_long = len(self.tokens) > self.max_length or self._turns > self.max_length
        reward = 10.0 if success else (-1.0 if closed or not legal or too_long else 0.0)
        terminated = closed or (self._early_truncation and reward < 0)
        truncated = too_long and not terminated
        info = {**self._info(), "success": success}  # every turn: a limit of Gymnasium's may end it
        return self._observation(), reward, terminated, truncated, info

    def _append(self, token: str) -> bool:
        """Append `token`, or a blank where it is no token or a number used up already."""
        numbers = [str(n) for n in self.numbers]
        legal = token in self.symbols or (
            token in NUMBERS and self.tokens.count(token) < numbers.count(token)
        )
        self.tokens.append(token if legal else "")
        return legal

    def _reductions(self) -> dict[str, tuple[int, str, int]]:
        """Each step that can be made, as text; the arithmetic is left to the one that is made."""
        names, found = list(map(str, self.left)), dict[str, tuple[int, str, int]]()
        for i, operator, j in formula.pairings(self.left, self.operators):
            found.setdefault(names[i] + operator + names[j], (i, operator, j))
        return found

    def _reduce(self, action: str) -> bool:
        if chosen := self._reductions().get(action):
            self.steps.append(formula.make_step(self.left, *chosen))
        return chosen is not None

    def _solved(self) -> bool:
        if self.granularity == "reduction":
            return self.left == (Fraction(self.goal),)
        return formula.solves(self.tokens, self.numbers, self.goal)

    # -- what is shown -------------------------------------------------------------------------

    def formula_text(self) -> str:
        """The current formula (token) or the steps so far (reduction) as text."""
        if self.granularity == "reduction":
            return ", ".join(show_step(step) for step in self.steps)
        return "".join(self.tokens)

    def render(self) -> np.ndarray:
        """The frame, uint8 (300, 300, 3)."""
        lines = [(175, "Formula:", 24), (212, self.formula_text(), 44)]
        return drawing.table([(40, list(self.cards))], lines)

    def _observation(self) -> dict[str, Any]:
        text = self._compact_prompt() if self._compact else self._full_prompt()
        return {"image": self.render(), "prompt": text}

    def _compact_prompt(self) -> str:
        label = f"{self.name.lower()} {self.granularity}"
        if self.granularity == "formula":
            return label
        left = f" ({show(self.left)})" if self.steps else ""
        return f"{label} {self.formula_text()}{left}"

    def _full_prompt(self) -> str:
        letters = ("x", "y", "z", "w")[: len(self.cards)]
        if self.granularity == "formula":
            return prompts.points_formula(self.goal, letters)
        if self.granularity == "reduction":
            left = show(self.left) if self.steps else ""
            return prompts.points_reduction(self.goal, letters, self.formula_text(), left)
        return prompts.points(
            self.goal, letters, self.formula_text(), (*NUMBERS, *self.symbols, "=")
        )

    def _info(self) -> dict[str, Any]:
        tokens = (
            [show_step(s) for s in self.steps] if self.granularity == "reduction" else self.tokens
        )
        info: dict[str, Any] = {"numbers": self.numbers, "formula": list(tokens)}
        if self.granularity == "token":
            info["actions"] = [*NUMBERS, *self.symbols, "="]
        elif self.granularity == "reduction":
            info["actions"] = [*self._reductions(), "="]
        return info

    # -- for a corrector -----------------------------------------------------------------------

    @property
    def field_schemas(self) -> dict[str, Any]:
        """`cards` is a list, of values in the compact form and of ranks in the published one."""
        kind = "integer" if self._compact else "string"
        return {"cards": {"type": "array", "items": {"type": kind}}}

    @property
    def tools(self) -> tuple[Tool, ...]:
        """The exact solver."""
        return (solver(self.count, self.goal, self.operators, self.granularity, self.max_length),)

    # -- facts about a reply, and an expert ----------------------------------------------------

    def judge(self, reply: Mapping[str, Any]) -> dict[str, bool]:
        """Facts about a reply in this state.

        Returns:
            `perception`: cards (values or ranks, in order) and current formula are right.
            `plan`: the thought's formula, or its steps, lead from here to the goal.
            `arithmetic`: every step `a op b = c` of the thought is right; absent without steps.
            `agreement`: the action is the next one of the thought's plan; absent without a plan.
        """
        thoughts, action = str(reply.get("thoughts")), str(reply.get("action")).replace(" ", "")
        facts = {"perception": self._perceives(reply)}
        if self.granularity == "token":
            planned = planned_formula(thoughts[:1000])
            there = list(filter(None, self.tokens))  # no blanks of illegal ones
            if planned is not None:
                solves = formula.solves(planned, self.numbers, self.goal)
                facts["plan"] = solves and planned[: len(there)] == there
                rest = [*planned, "="][len(there) :]
                facts["agreement"] = bool(rest) and action == rest[0]
            return facts
        steps = read_claims(thoughts[:1000])
        if steps:
            facts["arithmetic"] = all(map(holds, steps))
        facts["plan"] = leads_to(self.left, steps, self.goal)
        if self.granularity == "reduction":
            first = f"{steps[0][0]}{steps[0][1]}{steps[0][2]}" if steps else "="
            facts["agreement"] = action == first
        elif steps:
            facts["agreement"] = evaluates_to(action[:200], steps[-1][3])
        return facts

    def _perceives(self, reply: Mapping[str, Any]) -> bool:
        cards = reply.get("cards")
        if not isinstance(cards, list) or len(cards) != len(self.cards):
            return False
        shown = [{str(card.value), drawing.RANKS[card.rank]} for card in self.cards]
        right = all(str(said) in names for said, names in zip(cards, shown, strict=True))
        return right and str(reply.get("formula")).replace(" ", "") == self.formula_text().replace(
            " ", ""
        )

    def demonstrate(self, rng: np.random.Generator) -> dict[str, Any]:
        """An expert's reply; with probability `1 - solving` its plan is right but misses the goal."""
        cards = self.numbers if self._compact else [drawing.RANKS[card.rank] for card in self.cards]
        if self.granularity == "token":
            thoughts, action = self._demonstrate_token(rng)
        else:
            steps = self._demonstrate_steps(rng)
            thoughts = trace(steps) if steps else show(self.left)
            first = f"{steps[0].a}{steps[0].operator}{steps[0].b}" if steps else "="
            action = first if self.granularity == "reduction" else as_formula(self.numbers, steps)
        return {
            "cards": cards,
            "formula": self.formula_text(),
            "thoughts": thoughts,
            "action": action,
        }

    def _demonstrate_steps(self, rng: np.random.Generator) -> tuple[Step, ...]:
        ways = plans(self.left, self.goal, self.operators) if rng.random() < self._solving else ()
        if ways:
            return make_steps(self.left, ways[rng.integers(len(ways))])
        steps: list[Step] = []
        left = self.left
        while len(left) > 1:
            options = [
                step
                for _, _, step in formula.reductions(left, self.operators)
                if (step.operator in "-/" or step.a >= step.b)
                and step.result.denominator == 1
                and 0 <= step.result <= 100
            ] or [step for _, _, step in formula.reductions(left, "+-")]
            steps.append(options[rng.integers(len(options))])
            left = steps[-1].left
        return tuple(steps)

    def _demonstrate_token(self, rng: np.random.Generator) -> tuple[str, str]:
        there, room = list(filter(None, self.tokens)), self.max_length - self.tokens.count("")
        found = fitting(there, self.numbers, self.goal, self.operators)
        ways = [way for way in found if len(way.tokens) <= room][:4]
        if not ways:
            return "no way", "="
        plan = ways[rng.integers(len(ways))]
        action = [*plan.tokens, "="][len(there)]
        thoughts = f"{plan.formula}={self.goal}"
        if not self._compact:
            done = "is complete" if action == "=" else "is not complete"
            thoughts = (
                f"The current formula '{self.formula_text()}' {done}. "
                f"{thoughts} reaches the goal, so '{action}' comes next."
            )
        return thoughts, action


class EZPointsEnv(PointsEnv):
    """Make 12 from two cards, one token a turn.

    Description: the first rank is uniform in 2..K; where its value is one of 1, 2, 3, 4, 6, the second
        is 12 / value or 12 - value with equal chance, else 12 - value; the order is swapped with
        probability 0.5. Every deal is solvable.
    Action: one of `1`..`10`, `+`, `*`, `=`, appended to the formula. A string that is no token, or a
        number beyond its multiplicity among the cards, appends a blank and pays -1.
    Observation: green table, the cards in a row, the formula below; the formula is in the prompt too.
    Reward: `=` pays +10 if the formula equals 12 and uses exactly the cards, else -1; other tokens 0.
    Episode end: terminated by `=`; truncated with -1 when the formula is longer than 5. With
        `early_truncation` any -1 terminates the episode.
    Info: `actions`, `numbers` (values), `formula` (tokens); at the end `success`.
    Splits: `held-out` is one in five of the deals (ranks, suits and order). There are seven multisets
        of values in all, so none is held out.

    Args:
        prompt: `full` (published) or `compact`.
        early_truncation: end the episode at the first -1.
        split: `all`, `train` or `held-out`.
    """

    name, count, goal, operators, max_length = "EZPoints", 2, 12, "+*", 5
    symbols = ("+", "*")
    splits = ("all", "train", "held-out")

    def __init__(self, *, granularity: str = "token", **options: Any) -> None:
        if granularity != "token":
            raise ContractError(f"EZPoints has granularity 'token' only, got {granularity!r}")
        super().__init__(granularity=granularity, **options)

    def _deal(self) -> list[Card]:
        rank = int(self.np_random.integers(1, 13))
        first = Card(rank, int(self.np_random.integers(4)))
        value = first.value
        product = value in (1, 2, 3, 4, 6) and self.np_random.random() < 0.5
        second_value = 12 // value if product else 12 - value
        ranks = [r for r in range(13) if min(r + 1, 10) == second_value]
        second = Card(ranks[self.np_random.integers(len(ranks))], int(self.np_random.integers(4)))
        cards = [first, second]
        return cards[::-1] if self.np_random.random() < 0.5 else cards


class Points24Env(PointsEnv):
    """Make 24 from four cards.

    Description: four ranks uniform in A..K with replacement (A = 1; J, Q, K = 10), suits uniform.
        566 of the 715 multisets of values are solvable, 73.1 % of deals.
    Action, by `granularity`:
        `token` (published): one of `1`..`10`, `+ - * / ( )`, `=`, appended to the formula. A string that
            is no token, or a number beyond its multiplicity among the cards, appends a blank and pays -1.
        `reduction`: two of the numbers left and an operator, `8*3`; the result takes their place. `=`
            closes. Anything else pays -1 and changes nothing. Three turns and a close.
        `formula`: the whole formula, one turn.
    Observation: green table, four cards in a row, the formula (or the steps) below; it is in the prompt
        too, and with `reduction` the numbers left after the first step.
    Reward: closing pays +10 if the formula equals 24 and uses exactly the four cards, else -1; else 0.
    Episode end: terminated by closing; truncated with -1 when the formula is longer than 20 (or after
        20 turns). With `early_truncation` any -1 terminates the episode: a rule of the training task, so
        nothing is bootstrapped beyond it.
    Info: `numbers` (values), `formula` (tokens or steps), `actions` (not for `formula`); at the end
        `success`.
    Splits: `held-out-multisets` is one in seven of the value multisets; of the other deals `held-out` is
        one in five (ranks, suits and order), `train` the rest.

    Args:
        prompt: `full` (published) or `compact`.
        granularity: `token`, `reduction` or `formula`.
        early_truncation: end the episode at the first -1.
        solvable_only: deal only what can be solved.
        split: `all`, `train`, `held-out` or `held-out-multisets`.
        solving: chance that a demonstration's plan reaches 24 (`reduction`, `formula`).
    """

    name, count, goal, operators, max_length = "Points24", 4, 24, "+-*/", 20
    symbols = ("+", "-", "*", "/", "(", ")")
    splits = SPLITS

    def _deal(self) -> list[Card]:
        ranks, suits = self.np_random.integers(13, size=4), self.np_random.integers(4, size=4)
        return [Card(int(r), int(s)) for r, s in zip(ranks, suits, strict=True)]
