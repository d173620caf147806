"""GTR's guidance: a model behind an OpenAI-compatible endpoint corrects the agent's thoughts (extra `external`).

The corrected thought takes the place of the agent's, the agent's action stays: a target of
`gtr_turbo.teacher.imitation`.
"""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtr_turbo.checks import ConfigError
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.envs.contract import Tool
from gtr_turbo.policy.processing import Processor
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teacher.endpoint import FAULTS, OUTAGES, Endpoint
from gtr_turbo.teacher.imitation import splice
from gtr_turbo.teacher.ledger import Ledger
from gtr_turbo.teacher.messages import (
    AnswerError,
    answer_calls,
    answer_schema,
    digest,
    question,
    read_answer,
    sendable,
    thought_of,
    tool_schemas,
)
from gtr_turbo.teaching_config import ExternalConfig
from gtr_turbo.turns.record import by_time
from gtr_turbo.turns.turn import Turn

LONGEST_PAUSE_S = 60.0
REJECTIONS = 8  # in a row; fewer may be a content filter's


class Corrector:
    """Asks the endpoint about turns, within budget and bounds.

    Attributes:
        stopped: why the run must stop after this update; None while it need not.
        ledger: answers and costs of the run.
    """

    def __init__(
        self,
        config: ExternalConfig,
        folder: Path,
        fields: Sequence[str],
        schemas: Mapping[str, Any],
        tools: Sequence[Tool],
        note: Callable[[str], None],
        *,
        seed: int,
        ranks: Ranks = ALONE,
    ) -> None:
        """Nothing is sent yet.

        Args:
            config: the settings.
            folder: for the ledger.
            fields: of a reply.
            schemas: of the fields that are no strings.
            tools: of the environment.
            note: tells the person something.
            seed: of the jitter.
            ranks: who has questions; the first talks to the endpoint and keeps the ledger.

        Raises:
            ConfigError: the ledger is damaged.
        """
        self._config, self.fields = config, fields
        self._schema = answer_schema(fields, schemas)
        self._tools = tuple(tools) if config.tools else ()
        self._rounds = config.tool_rounds if self._tools else 0
        self._note, self._seed, self._ranks = note, seed, ranks
        self.ledger = Ledger(
            folder / "ledger.jsonl",
            config.budget,
            self._schema,
            calls_each=self._rounds + 1,
            open_at_once=config.concurrency,
            most_tokens=config.max_tokens,
        )
        if ranks.first:
            self.ledger.load()
        self.stopped: str | None = None
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._counts: Counter[str] = Counter()
        self._heard = time.monotonic()
        """When the endpoint last answered."""
        self._lost = 0
        """Conversations in a row that an outage ended."""
        self._rejected = 0
        """Requests in a row that were rejected."""
        self._said = ""
        """What the endpoint said to the last of them."""
        self._told = False
        """That we wait; once an update."""

    # -- an update -----------------------------------------------------------------------------

    def stops_before(self, update: int) -> str | None:
        """Why an update must not begin, if so: among other reasons, that the budget has nothing left for it.

        One that was asked about before may be repeated, as its answers are there. All ranks must call it.
        """
        if self._ranks.first and update > self.ledger.update and (short := self.ledger.short()):
            self._stop(short)
        self.stopped = self._ranks.from_first(self.stopped)
        return self.stopped

    def ask(self, turns: Sequence[Turn], update: int) -> list[Mapping[str, Any] | None]:
        """Answers about valid turns, None where there is none; equal questions are asked once a run.

        All ranks must call it, with turns of their own.

        Raises:
            ConfigError: the endpoint refuses key, model or every request.
        """
        ranks, bodies = self._ranks, [self._body(turn) for turn in turns]
        if ranks.world == 1:
            return self._ask(bodies, update)
        given = [json.loads(part) for part in ranks.to_first(json.dumps(bodies).encode())]
        answers = self._ask([body for part in given for body in part], update) if given else None
        answers, self.stopped = ranks.from_first([answers, self.stopped])
        counts = ranks.gather(len(turns))
        begin = sum(counts[: ranks.rank])
        own: list[Mapping[str, Any] | None] = answers[begin : begin + len(turns)]
        return own

    def _ask(
        self, bodies: Sequence[Mapping[str, Any]], update: int
    ) -> list[Mapping[str, Any] | None]:
        """Answers to the questions of all ranks."""
        self._counts.clear()
        self._answered()
        self._told = False
        keys = [digest(body) for body in bodies]
        fresh = {
            key: body
            for key, body in zip(keys, bodies, strict=True)
            if key not in self.ledger.answers
        }
        self._counts["known"] = len(keys) - len(fresh)
        with (
            Endpoint(self._config) as endpoint,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            futures = []
            try:
                for key, body in fresh.items():
                    if self._halt.is_set() or self._hopeless():
                        break
                    if (short := self.ledger.begin()) is not None:
                        self._stop(short)
                        break
                    futures.append(pool.submit(self._converse, endpoint, key, body, update))
                for future in futures:
                    future.result()
            except BaseException:
                self._halt.set()  # open conversations end, and are written down, before we leave
                raise
        answers = [self.ledger.answers.get(key) for key in keys]
        if not any(answers):
            self._check_rejections()
            why = ", ".join(f"{kind} {n}" for kind in FAULTS if (n := self._counts[kind]))
            if why:
                self._note(
                    f"{self._config.base_url} gave no answer of use in update {update} ({why}): nothing of it is "
                    "collected"
                )
        return answers

    def _check_rejections(self) -> None:
        """After an update without an answer: is that because the endpoint takes no request of ours?"""
        rejected, faults = self._counts["rejected"], sum(self._counts[kind] for kind in FAULTS)
        proven = rejected >= REJECTIONS or not self.ledger.answers
        if rejected and rejected == faults and proven:
            raise ConfigError(
                f"{self._config.base_url} rejected every request of the update ({rejected}), the last with "
                f"{self._said!r}. If it does not take pictures, a JSON schema, tools, or one of "
                "guidance.external.temperature and max_tokens_name, change these settings or the model"
            )

    def metrics(self) -> dict[str, float]:
        """Of the last `ask`: the counts of the `external` group, and what was spent so far; on the first rank."""
        counts, spent = self._counts, self.ledger.spent
        names = ("known", "calls", "retries", "tokens_in", "tokens_out", "bad_tool_calls")
        found = {f"external/{name}": float(counts[name]) for name in names}
        found |= {f"external/failed_{kind}": float(counts[kind]) for kind in FAULTS}
        found |= {"external/calls_so_far": float(spent.calls), "external/dollars": spent.dollars}
        if counts["calls"]:
            found["external/latency"] = counts["microseconds"] / 1e6 / counts["calls"]
        return found

    def _stop(self, reason: str) -> None:
        with self._lock:
            self.stopped = self.stopped or reason
        self._halt.set()

    def _hopeless(self) -> bool:
        """Too much in a row came to nothing: the rest of the update is not tried."""
        # while a price is to be learned, conversations wait for each other
        most = self._config.concurrency if self.ledger.priced else 1
        return self._lost >= most or self._rejected >= REJECTIONS

    def _answered(self, rejection: str = "") -> None:
        with self._lock:
            self._heard, self._lost = time.monotonic(), 0
            self._rejected = self._rejected + 1 if rejection else 0
            self._said = rejection or self._said

    # -- a conversation ------------------------------------------------------------------------

    def _body(self, turn: Turn) -> dict[str, Any]:
        config = self._config
        form = {"name": "correction", "strict": True, "schema": self._schema}
        body: dict[str, Any] = {
            "model": config.model,
            "messages": question(turn, self.fields, tools=bool(self._tools)),
            "response_format": {"type": "json_schema", "json_schema": form},
            config.max_tokens_name: config.max_tokens,
        }
        if config.temperature is not None:
            body["temperature"] = config.temperature
        if self._tools:
            body["tools"] = tool_schemas(self._tools)
        return body

    def _converse(self, endpoint: Endpoint, key: str, body: Mapping[str, Any], update: int) -> None:
        """Ask one question to its end: an answer, or none; either is in the ledger then."""
        tally: Counter[str] = Counter()
        answer = None
        try:
            jitter = random.Random(f"{self._seed} {update} {key}")
            answer = self._answer(endpoint, key, body, tally, jitter)
        except BaseException:
            self._halt.set()
            raise
        finally:
            try:
                self.ledger.end(key, update, tally, answer)
            except BaseException:
                self._halt.set()  # an answer that cannot be written down is lost; no more are paid for
                raise
            with self._lock:
                self._counts.update(tally)

    def _answer(
        self,
        endpoint: Endpoint,
        key: str,
        body: Mapping[str, Any],
        tally: Counter[str],
        jitter: random.Random,
    ) -> Mapping[str, Any] | None:
        messages = list(body["messages"])
        lost = bad = rounds = 0  # tries lost to the present outage, bad answers, rounds of tools
        since = math.inf  # when the first of them was lost
        while not self._halt.is_set() and (lost or bad or rounds or not self._hopeless()):
            alone = self._heard > since  # others got answers between our tries
            try:
                last = {"tool_choice": "none"} if self._tools and rounds == self._rounds else {}
                message = endpoint.send({**body, "messages": messages, **last}, tally)
                self._answered()
                lost, since = 0, math.inf
                if not message.get("tool_calls"):
                    return read_answer(message, self._schema, endpoint.secret)
                if rounds == self._rounds:
                    raise AnswerError("tools")
                rounds += 1
                more, wrong = answer_calls(message, self._tools)
                messages += more
                tally["bad_tool_calls"] += wrong
            except AnswerError as fault:
                tally[fault.kind] += 1
                lost, bad = (lost + 1, bad) if fault.kind in OUTAGES else (0, bad + 1)
                since = min(since, time.monotonic()) if lost else math.inf
                tries = lost + bad
                if not self._again(fault, tries, alone) or not self.ledger.may_retry(key, tally):
                    return None
                tally["retries"] += 1
                pause = min(LONGEST_PAUSE_S, self._config.backoff_s * 2.0 ** min(tries - 1, 20))
                self._halt.wait(fault.pause or pause * (0.5 + jitter.random()))
        return None

    def _again(self, fault: AnswerError, tries: int, alone: bool) -> bool:
        """Whether a conversation goes on after a failure; `alone`: others are answered while it is not."""
        outage = fault.kind in OUTAGES
        if not outage:
            self._answered(fault.said)
        if fault.kind == "rejected":
            return False
        if tries <= self._config.retries and fault.pause <= LONGEST_PAUSE_S:
            return True
        if outage and self._config.outage == "wait" and (not alone or fault.kind == "rate_limit"):
            return self._wait(fault)
        with self._lock:
            self._lost += outage
        return False

    def _wait(self, fault: AnswerError) -> bool:
        """Whether there is time left to wait for the endpoint; if not, the run is told to stop."""
        config, waited = self._config, time.monotonic() - self._heard
        if waited + fault.pause > config.wait_s:
            self._stop(
                f"{config.base_url} has not answered for {waited:.0f} s ({fault.kind}; "
                f"guidance.external.wait_s={config.wait_s:g}). Go on with --resume when it does"
            )
            return False
        with self._lock:
            told, self._told = self._told, True
        if not told:
            limited = fault.kind == "rate_limit"
            how = "limits the rate" if limited else f"does not answer ({fault.kind})"
            self._note(f"{config.base_url} {how}; waiting up to {config.wait_s:g} s")
        return True


def correct(
    corrector: Corrector,
    processor: Processor,
    turns: Sequence[Turn],
    memory: Memory,
    generator: torch.Generator,
    *,
    share: float,
    longest: int,
    update: int,
) -> dict[str, float]:
    """Have an update's turns corrected, and collect the targets; returns the `external` group, over all ranks.

    Args:
        corrector: is asked.
        processor: of the agent.
        turns: of this rank.
        memory: keeps the targets.
        generator: draws the turns that are sent; all ranks must give the same.
        share: of the valid turns of all ranks, so many are sent, in the mean.
        longest: tokens of a reply; a longer target would teach the agent to be cut.
        update: its number.
    """
    ranks, envs = memory.ranks, len({turn.env_index for turn in turns})
    flags = list(by_time(ranks.gather([turn.valid for turn in turns]), envs))
    valid = torch.tensor(flags).nonzero()[:, 0]
    order, due = torch.randperm(len(valid), generator=generator), share * len(valid)
    rest = float(torch.rand((), generator=generator, dtype=torch.float64))  # of a turn, by chance
    drawn = order[: math.floor(due + rest)]
    rows = valid[drawn.sort().values]
    asked: list[int] = ranks.own_rows(rows, (len(turns) // envs, envs)).tolist()
    answers = corrector.ask([turns[row] for row in asked], update)
    made: list[tuple[Tensor, int] | None] = [None] * len(turns)
    changed = agreed = 0
    for row, answer in zip(asked, answers, strict=True):
        if answer is None:
            continue
        turn = turns[row]
        thought = {name: answer["thought"][name] for name in corrector.fields if name != "action"}
        changed += thought != thought_of(turn, corrector.fields)
        agreed += answer["correct"]
        text = sendable(json.dumps({**thought, "action": turn.action}, ensure_ascii=False))
        target = splice(processor, text, turn.text, corrector.fields)
        if target is not None and len(target[0]) <= longest:
            made[row] = target
    memory.add(update, turns, made)
    counts = (
        len(asked),
        sum(answer is not None for answer in answers),
        sum(target is not None for target in made),
        changed,
        agreed,
    )
    sent, answered, usable, changed, agreed = ranks.sum(torch.tensor(counts)).tolist()
    metrics = {
        "external/asked": float(sent),
        "external/skipped": float(sent - answered),
        "external/unusable": float(answered - usable),
        "imitation/collected": float(len(memory)),
        **corrector.metrics(),
    }
    if answered:
        metrics["external/corrected"] = changed / answered
        metrics["external/agreed"] = agreed / answered
    return metrics
