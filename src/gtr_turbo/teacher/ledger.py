"""What a corrector was asked, what it answered, what that cost: kept in the run folder, never paid twice.

`RUN/external/ledger.jsonl` holds a line for each conversation, written when it ends. A question that was
answered once in a run is never sent again, so a run that goes back to a checkpoint learns from the same
answers, and pays nothing for them.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gtr_turbo.checks import ConfigError
from gtr_turbo.teacher.messages import problem
from gtr_turbo.teaching_config import BudgetConfig


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one conversation, or of all."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    dollars: float = 0.0
    timeout: int = 0
    """Requests without a whole response in time: what they cost is not known, and not in the others."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))

    @property
    def tokens(self) -> int:
        """In and out."""
        return self.tokens_in + self.tokens_out


class Ledger:
    """Answers and costs of a run; its methods may be called from several threads.

    Attributes:
        answers: by the hash of the question.
        spent: by the whole run, resumed parts included.
        update: the newest in which something was asked.
    """

    def __init__(
        self,
        path: Path,
        budget: BudgetConfig,
        schema: Mapping[str, Any],
        *,
        calls_each: int,
        open_at_once: int,
        most_tokens: int,
    ) -> None:
        """Nothing is asked or spent yet.

        Args:
            path: the file; it need not exist.
            budget: what may be spent.
            schema: of an answer.
            calls_each: requests a conversation may need when nothing fails.
            open_at_once: conversations that may be open at the same time.
            most_tokens: of a response.
        """
        self._path, self._budget, self._schema = path, budget, schema
        self._calls_each, self._open_at_once = calls_each, open_at_once
        self._unseen = self._cost({"calls": 1, "tokens_in": 0, "tokens_out": most_tokens})
        self.answers: dict[str, Mapping[str, Any]] = {}
        self.spent = Cost()
        self.update = 0
        self._most_tokens, self._most_dollars = 0, 0.0
        self._open, self._extra = 0, 0
        self._changed = threading.Condition()

    def load(self) -> None:
        """Take up what the run has spent so far, its tokens at the prices of now.

        Raises:
            ConfigError: the file is damaged.
        """
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a crash may have cut the last line
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if (answer := row["answer"]) is not None and (
                    wrong := problem(answer, self._schema)
                ):
                    raise ValueError(wrong)
                self._take(row["question"], row["update"], self._cost(row["cost"]), answer)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError(
                    f"{self._path}, line {number}, is damaged ({error!r}); remove the line to pay for its "
                    "answer again"
                ) from error

    def _take(
        self, question: str, update: int, cost: Cost, answer: Mapping[str, Any] | None
    ) -> None:
        self.spent += cost
        self.update = max(self.update, update)
        self._most_tokens = max(self._most_tokens, cost.tokens)
        self._most_dollars = max(self._most_dollars, cost.dollars)
        if answer is not None:
            self.answers[question] = answer

    def begin(self) -> str | None:
        """Wait until one more conversation may be opened, and open it.

        It may be opened if the calls it may need are left, and as many tokens and dollars as the dearest
        one so far took, beside what open ones may still take; the first of a run is awaited to learn that.

        Returns:
            None; or, if it can not be opened and none is open any more, which budget is spent.
        """
        with self._changed:
            while True:
                short = self.short()
                if short is None and self._open < self._open_at_once:
                    self._open += 1
                    return None
                if not self._open:
                    return short
                self._changed.wait()

    @property
    def priced(self) -> bool:
        """Whether it is known what a conversation takes, as far as the budget asks."""
        return bool(self._most_tokens) or not (self._budget.tokens or self._budget.dollars)

    def short(self) -> str | None:
        """Why one more conversation cannot be opened now, if so; if none is open, which budget is spent."""
        budget, ahead, late = self._budget, self._open + 1, self.spent.timeout
        if not self.priced and self._open:
            return "the first price is not known yet"
        tokens = max(self._most_tokens, self._unseen.tokens)
        dollars = max(self._most_dollars, self._unseen.dollars)
        for name, spent, each in (
            ("calls", self.spent.calls + self._extra, self._calls_each),
            ("tokens", self.spent.tokens + late * tokens, self._most_tokens),
            ("dollars", self.spent.dollars + late * dollars, self._most_dollars),
        ):
            limit = getattr(budget, name)
            assumed = f" ({late} that timed out counted as the dearest)" * (
                late and name != "calls"
            )
            if limit and (spent + ahead * each > limit or spent >= limit):
                return (
                    f"guidance.external.budget.{name}={limit} is spent: {spent:.6g} so far{assumed}, and one "
                    f"more turn may take {each:.6g}. Go on with --resume (without it, if there is no checkpoint "
                    "yet) and a higher one; every answer is kept"
                )
        return None

    def may_retry(self) -> bool:
        """Whether an open conversation may send a request beyond `calls_each`; if so, it is reserved."""
        with self._changed:
            ahead = self.spent.calls + self._extra + self._open * self._calls_each
            allowed = not self._budget.calls or ahead < self._budget.calls
            self._extra += allowed
            return allowed

    def end(
        self, question: str, update: int, tally: Mapping[str, int], answer: Mapping[str, Any] | None
    ) -> None:
        """Close a conversation, whatever happens, and write it down.

        Args:
            question: its hash.
            update: in which it was asked.
            tally: its `calls`, `tokens_in` and `tokens_out`, how many had a `timeout`, and the `retries` that
                `may_retry` reserved.
            answer: what came, if anything.
        """
        with self._changed:
            try:
                cost = self._cost(tally)
                row = {
                    "question": question,
                    "update": update,
                    "cost": asdict(cost),
                    "answer": answer,
                }
                if cost.calls:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    with open(self._path, "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                        file.flush()
                        os.fsync(file.fileno())
                    self._take(question, update, cost, answer)
            finally:
                self._open -= 1
                self._extra -= tally["retries"]
                self._changed.notify_all()

    def _cost(self, tally: Mapping[str, int]) -> Cost:
        budget, tokens = self._budget, (tally["tokens_in"], tally["tokens_out"])
        dollars = (tokens[0] * budget.input_price + tokens[1] * budget.output_price) / 1e6
        return Cost(tally["calls"], *tokens, dollars, tally.get("timeout", 0))
