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
        self._running: dict[str, tuple[Cost, int]] = {}
        """Of open conversations with new tries: their cost before the last of them, and 1 if it was granted."""
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
        if not self.priced and self._open:
            return "the first price is not known yet"
        late = self.spent.timeout
        for name in ("calls", "tokens", "dollars"):
            limit, (taken, each) = getattr(self._budget, name), self._taken(name)
            assumed = f" ({late} that timed out counted as the dearest)"
            if limit and (taken + each > limit or taken >= limit):
                return (
                    f"guidance.external.budget.{name}={limit} is spent: {taken:.6g} so far"
                    f"{assumed if late and name != 'calls' else ''}, and one more turn may take {each:.6g}. "
                    "Go on with --resume (without it, if there is no checkpoint yet) and a higher one; every "
                    "answer is kept"
                )
        return None

    def _taken(self, name: str) -> tuple[float, float]:
        """What is spent or may still be by open conversations, and what one more may take."""
        if name == "calls":
            each: float = self._calls_each
            return self.spent.calls + self._extra + self._open * each, each
        each = self._most_tokens if name == "tokens" else self._most_dollars
        dearest = max(each, getattr(self._unseen, name))
        so_far = [
            getattr(cost, name) + cost.timeout * dearest + granted * each
            for cost, granted in self._running.values()
        ]
        ahead = sum(max(each, cost) for cost in so_far) + (self._open - len(so_far)) * each
        return getattr(self.spent, name) + self.spent.timeout * dearest + ahead, each

    def may_retry(self, question: str, tally: Mapping[str, int]) -> bool:
        """Whether an open conversation, with this tally so far, may send a request beyond `calls_each`.

        If so, the request is reserved. It may take as much as a whole turn: one that is cut, or times out, is paid.
        """
        with self._changed:
            cost = self._cost(tally)
            self._running[question] = cost, 0
            for name in ("calls", "tokens", "dollars"):
                limit, (taken, each) = getattr(self._budget, name), self._taken(name)
                if limit and taken + (1 if name == "calls" else each) > limit:
                    return False
            self._running[question] = cost, 1
            self._extra += 1
            return True

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
                self._running.pop(question, None)
                self._extra -= tally["retries"]
                self._changed.notify_all()

    def _cost(self, tally: Mapping[str, int]) -> Cost:
        budget, tokens = self._budget, (tally["tokens_in"], tally["tokens_out"])
        dollars = (tokens[0] * budget.input_price + tokens[1] * budget.output_price) / 1e6
        return Cost(tally["calls"], *tokens, dollars, tally.get("timeout", 0))
