"""External guidance: what is asked, what is believed, what is paid, what happens when it fails."""

import base64
import http.client
import io
import json
import logging
import sys
import threading
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import endpoints
import numpy as np
import pytest
import torch
from endpoints import endpoint, says
from PIL import Image

from gtr_turbo.checks import ConfigError
from gtr_turbo.collect import Envs, collect
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.envs import make_env
from gtr_turbo.envs.cards.drawing import RANKS
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teacher.endpoint import FAULTS, Endpoint, retry_after
from gtr_turbo.teacher.external import Corrector, correct
from gtr_turbo.teacher.messages import answer_schema, problem
from gtr_turbo.teaching_config import BudgetConfig, ExternalConfig, GuidanceConfig
from tiny import make_policy, scripted

FIELDS = ("cards", "formula", "thoughts", "action")
SCHEMAS = {"cards": {"type": "array", "items": {"type": "integer"}}}
THOUGHT = {"cards": [2, 6], "formula": "", "thoughts": "2*6=12"}
ANSWER = json.dumps({"evaluation": "fine", "correct": True, "thought": THOUGHT})


@pytest.fixture(scope="module")
def policy(tiny):
    return make_policy(tiny)


@pytest.fixture(scope="module")
def turns(policy):
    """Six valid turns of EZPoints, all different, by script; they think 2*6=12 whatever the cards are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gtr_turbo.collect.generate", scripted)
        envs = Envs(EnvConfig(options={"prompt": "compact"}, num_envs=6), "train", 0)
        envs.start()
        rollout = RolloutConfig(turns_per_env=2)
        made = collect(envs, policy, SamplingConfig(), rollout, torch.Generator().manual_seed(0))
    different = {(turn.prompt, turn.observed.frame.tobytes()): turn for turn in made}
    return list(different.values())[:6]


@pytest.fixture
def tools():
    return make_env("EZPoints", prompt="compact").get_wrapper_attr("tools")


def corrector(server, folder, offered=(), notes=None, ranks=ALONE, **changes):
    config = endpoints.settings(server, **changes)
    told = [] if notes is None else notes
    return Corrector(config, folder, FIELDS, SCHEMAS, offered, told.append, seed=0, ranks=ranks)


def failures(asked):
    return {
        name.removeprefix("external/failed_"): number
        for name, number in asked.metrics().items()
        if name.startswith("external/failed_") and number
    }


# -- what is asked -----------------------------------------------------------------------------------


def test_the_frame_the_prompt_the_thought_and_a_strict_schema_are_sent_and_no_action(
    turns, tmp_path
):
    with endpoint() as server:
        corrector(server, tmp_path).ask(turns[:1], 1)
    (body,) = server.requests
    text, picture = body["messages"][1]["content"]
    data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), turns[0].observed.frame)
    assert turns[0].prompt in text["text"]
    assert json.dumps(THOUGHT) in text["text"]
    assert '"action"' not in text["text"]
    form = body["response_format"]["json_schema"]
    assert form["strict"] is True
    assert form["schema"] == answer_schema(FIELDS, SCHEMAS)
    assert form["schema"]["properties"]["thought"]["required"] == ["cards", "formula", "thoughts"]
    assert "tools" not in body


def test_a_tool_is_called_and_its_result_is_sent_back(turns, tools, tmp_path):
    with endpoint() as server:
        asked = corrector(server, tmp_path, tools)
        (answer,) = asked.ask(turns[:1], 1)
    first, second = server.requests
    assert first["tools"][0]["function"]["name"] == "solve"
    call, result = second["messages"][-2:]
    arguments = json.loads(call["tool_calls"][0]["function"]["arguments"])
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    assert json.loads(result["content"]) == tools[0].run(arguments)
    assert answer["thought"]["thoughts"] == tools[0].run(arguments)["plan"]
    assert asked.metrics()["external/calls"] == 2


def calling(name="solve", arguments="{}"):
    function = {"name": name, "arguments": arguments}
    return says(None, tool_calls=[{"id": "a", "type": "function", "function": function}])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (calling(arguments="{"), "not JSON"),
        (calling(arguments='{"cards": ["2"]}'), "'formula' is a required property"),
        (calling(arguments='{"cards": ["11", "2"], "formula": ""}'), "'11' is not one of"),
        (calling(arguments='{"cards": ["2"], "formula": ""}'), "2 cards are due, got 1"),
        (
            calling(arguments='{"cards": ["2", "6"], "formula": "", "x": 1}'),
            "Additional properties",
        ),
        (calling(name="__import__"), "no such tool; known: solve"),
    ],
)
def test_a_bad_call_is_told_so_as_the_tools_answer(turns, tools, tmp_path, call, told):
    with endpoint(call, says(ANSWER)) as server:
        asked = corrector(server, tmp_path, tools)
        (answer,) = asked.ask(turns[:1], 1)
    assert told in json.loads(server.requests[1]["messages"][-1]["content"])["error"]
    assert answer["correct"]
    assert asked.metrics()["external/bad_tool_calls"] == 1


def test_tool_rounds_are_bounded(turns, tools, tmp_path):
    with endpoint(after=calling()) as server:
        asked = corrector(server, tmp_path, tools, tool_rounds=2, retries=1)
        assert asked.ask(turns[:1], 1) == [None]
    assert failures(asked) == {"tools": 2}
    assert len(server.requests) == 4
    assert [body.get("tool_choice") for body in server.requests] == [None, None, "none", "none"]


def test_a_text_of_lone_surrogates_is_sent(turns, tools, tmp_path):
    with endpoint(calling(arguments='"\\ud800"', name="\ud800"), says(ANSWER)) as server:
        asked = corrector(server, tmp_path, tools)
        ugly = replace(turns[0], prompt="\ud800", fields={**turns[0].fields, "thoughts": "\ud800"})
        assert asked.ask([ugly], 1)[0]["correct"]
    assert len(server.requests) == 2


# -- faults ------------------------------------------------------------------------------------------


ANOTHER_MODELS = {
    "type": "message",
    "content": [{"type": "text", "text": ANSWER}],
    "role": "assistant",
}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ((429, {}, "slow down"), "rate_limit"),
        ((500, {}, "sorry"), "server"),
        ((503, {}, "sorry"), "server"),
        ((408, {}, "too slow"), "timeout"),
        ((429, {}, b"<html>slow down</html>"), "rate_limit"),
        ((502, {}, b"<html>Bad gateway</html>"), "server"),
        ((500, {}, b""), "server"),
        ((200, {}, b""), "not_json"),
        ((200, {"Content-Encoding": "gzip"}, b"no gzip"), "connection"),
        ("html", "not_json"),
        ("garbage", "not_json"),
        ("drop", "connection"),
        (ANOTHER_MODELS, "schema"),
        ([], "schema"),
        (says("not JSON"), "not_json"),
        (says("[" * 100_000), "not_json"),
        (says('{"thought": {}}'), "schema"),
        (says(ANSWER.replace("[2, 6]", '["2", "6"]')), "schema"),
        (says(""), "empty"),
        (says(None), "empty"),
        (says(None, refusal="I will not"), "refusal"),
        ({"choices": [{"message": {"content": "{"}, "finish_reason": "length"}]}, "cut"),
    ],
)
def test_a_fault_is_counted_by_kind_and_tried_again(turns, tmp_path, fault, kind):
    with endpoint(fault) as server:
        asked = corrector(server, tmp_path)
        (answer,) = asked.ask(turns[:1], 1)
    assert answer is not None
    assert failures(asked) == {kind: 1}
    assert asked.metrics()["external/retries"] == 1
    assert asked.metrics()["external/calls"] == len(server.requests) == 2


def test_a_slow_response_times_out(turns, tmp_path):
    with endpoint("slow") as server:
        asked = corrector(server, tmp_path, timeout_s=0.2)
        assert asked.ask(turns[:1], 1) != [None]
    assert failures(asked) == {"timeout": 1}


def test_a_response_that_drips_times_out_as_a_whole(turns, tmp_path):
    began = time.monotonic()
    with endpoint("drip") as server:
        asked = corrector(server, tmp_path, timeout_s=0.3)
        assert asked.ask(turns[:1], 1) != [None]
    assert failures(asked) == {"timeout": 1}
    assert time.monotonic() - began < 3


def test_tries_of_an_outage_do_not_count_when_it_is_over(turns, tmp_path):
    script = [(503, {}, "")] * 3, [says("no")], [(503, {}, "")]
    with endpoint(*[fault for faults in script for fault in faults]) as server:
        asked = corrector(server, tmp_path, outage="wait", retries=1)
        assert asked.ask(turns[:1], 1) != [None]
    assert failures(asked) == {"server": 4, "not_json": 1}


def test_after_all_retries_the_turn_is_skipped_and_the_next_is_asked(turns, tmp_path):
    with endpoint(*[says("no")] * 3) as server:
        asked = corrector(server, tmp_path, retries=2)
        answers = asked.ask(turns[:2], 1)
    assert [answer is None for answer in answers] == [True, False]
    assert failures(asked) == {"not_json": 3}
    assert len(server.requests) == 4


def test_retry_after_is_honoured(turns, tmp_path, monkeypatch):
    pauses = []
    with endpoint((429, {"Retry-After": "0.25"}, ""), (500, {}, "")) as server:
        asked = corrector(server, tmp_path, backoff_s=0.04, retries=2)
        monkeypatch.setattr(asked._halt, "wait", pauses.append)
        asked.ask(turns[:1], 1)
    assert pauses[0] == 0.25
    assert 0.04 <= pauses[1] < 0.12  # doubled, times 0.5 to 1.5


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 1e9, 1e10),
        ("Fri, 01 Jan 1999 00:00:00 GMT", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("-3", 0, 0),
        (None, 0, 0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header, low, high):
    assert low <= retry_after(header) <= high


def test_pauses_are_the_same_for_the_same_seed(turns, tmp_path, monkeypatch):
    seen = []
    for name in ("a", "b"):
        pauses = []
        with endpoint((500, {}, "")) as server:
            asked = corrector(server, tmp_path / name)
            monkeypatch.setattr(asked._halt, "wait", pauses.append)
            asked.ask(turns[:1], 1)
        seen.append(pauses)
    assert seen[0] == seen[1] != [0.001]


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_wrong_key_or_model_stops_at_once_and_says_what_to_do(turns, tmp_path, status):
    with endpoint((status, {}, "go away"), after="ok") as server:
        asked = corrector(server, tmp_path, retries=4)
        with pytest.raises(ConfigError, match=rf"answered {status}: .*--resume"):
            asked.ask(turns, 1)
    assert len(server.requests) == 1


def test_an_account_without_credit_stops_at_once(turns, tmp_path):
    error = {"message": "no money", "code": "insufficient_quota"}
    with endpoint((429, {}, error)) as server, pytest.raises(ConfigError, match="no credit left"):
        corrector(server, tmp_path).ask(turns, 1)
    assert len(server.requests) == 1


def many(turns, number):
    return [replace(turns[0], prompt=f"{turns[0].prompt} {i}") for i in range(number)]


def test_an_endpoint_that_rejects_every_request_stops_the_run(turns, tmp_path):
    told = r"rejected every request of the update \(8\), the last with 'HTTP 400: no pictures'"
    fault = (400, {}, "no pictures")
    with endpoint(after=fault) as server, pytest.raises(ConfigError, match=told):
        corrector(server, tmp_path).ask(many(turns, 10), 1)
    assert len(server.requests) == 8  # in a row; the others are not tried
    with endpoint(after=fault) as server, pytest.raises(ConfigError, match="rejected every"):
        corrector(server, tmp_path / "few").ask(turns[:2], 1)


def test_a_rejection_does_not_give_up_the_turns_after_it(turns, tmp_path):
    with endpoint((400, {}, "content filter"), after="ok") as server:
        answers = corrector(server, tmp_path).ask(turns, 1)
    assert [answer is None for answer in answers] == [True, *[False] * 5]
    rejections = [(400, {}, "content filter")] * 7
    with endpoint(*rejections, says(ANSWER), *rejections, after=says(ANSWER)) as server:
        answers = corrector(server, tmp_path / "seven").ask(many(turns, 16), 1)
    assert sum(answer is None for answer in answers) == 14  # never 8 in a row


def test_a_rejection_in_an_outage_does_not_stop_the_run(turns, tmp_path):
    with endpoint((400, {}, "content filter"), after=(503, {}, "")) as server:
        asked = corrector(server, tmp_path, concurrency=4, retries=0)
        assert asked.ask(turns, 1) == [None] * 6
    assert asked.stopped is None


def test_a_rejection_in_a_run_that_has_answers_does_not_stop_it(turns, tmp_path):
    with endpoint("ok", (400, {}, "content filter")) as server:
        asked = corrector(server, tmp_path)
        asked.ask(turns[:1], 1)
        assert asked.ask(turns[1:2], 2) == [None]


def test_what_a_server_says_is_printable_and_short_and_the_key_is_cut_out(
    turns, tmp_path, monkeypatch
):
    monkeypatch.setenv("SOME_KEY", KEY)
    for error, told in (
        ({"message": f"\x1b[31mbad {KEY}\n" + "x" * 300}, "HTTP 400: [31mbad [key]" + "x" * 187),
        ({"detail": f"bad {KEY}"}, 'HTTP 400: {"detail": "bad [key]"}'),
    ):
        with endpoint(after=(400, {}, error)) as server, pytest.raises(ConfigError) as raised:
            corrector(server, tmp_path, key_variable="SOME_KEY").ask(turns[:1], 1)
        assert f"the last with {told!r}. If" in str(raised.value)


def test_one_rejected_request_is_skipped_without_another_try(turns, tmp_path):
    with endpoint("ok", (400, {}, "content filter"), after="ok") as server:
        asked = corrector(server, tmp_path, concurrency=2)
        answers = asked.ask(turns[:3], 1)
    assert sum(answer is None for answer in answers) == 1
    assert failures(asked) == {"rejected": 1}
    assert asked.metrics()["external/retries"] == 0


# -- outages -----------------------------------------------------------------------------------------


def test_skip_gives_an_update_up_when_nothing_answers(turns, tmp_path):
    with endpoint(after=(503, {}, "")) as server:
        asked = corrector(server, tmp_path, concurrency=2, retries=1)
        assert asked.ask(turns, 1) == [None] * 6
        tried = len(server.requests)
        server.after = "ok"
        assert None not in asked.ask(turns, 2)
    assert asked.stopped is None
    assert tried <= 2 * 3  # two in a row, and one more that may be open by then


def test_wait_outlasts_an_outage_and_says_so_once(turns, tmp_path):
    notes = []
    with endpoint(*[(503, {}, "")] * 6) as server:
        asked = corrector(server, tmp_path, notes=notes, outage="wait", retries=1)
        assert None not in asked.ask(turns[:2], 1)
    assert asked.stopped is None
    assert len(notes) == 1
    assert "does not answer (server)" in notes[0]


def test_wait_is_bounded(turns, tmp_path):
    with endpoint("ok", after=(503, {}, "")) as server:
        asked = corrector(server, tmp_path, outage="wait", wait_s=0.05, retries=0)
        answers = asked.ask(turns, 1)
    assert "has not answered for" in asked.stopped
    assert "--resume" in asked.stopped
    assert sum(answer is not None for answer in answers) >= 1  # what came is kept


@pytest.mark.parametrize("fault", ["drop", (500, {}, "")])
def test_one_question_that_always_fails_is_left_out_and_not_waited_for(turns, tmp_path, fault):
    """While the others are answered there is no outage: the run would stop for it in every update."""
    picture = []

    def special(body):
        url = body["messages"][1]["content"][1]["image_url"]["url"]
        picture.append(url)
        return fault if url == picture[0] else None

    with endpoint(special=special) as server:
        asked = corrector(
            server, tmp_path, outage="wait", wait_s=600, retries=2, backoff_s=0.1, concurrency=2
        )
        answers = asked.ask(turns, 1)
    lost = sum(url == picture[0] for url in picture)
    assert asked.stopped is None
    assert 0 < sum(answer is None for answer in answers) < len(turns)
    assert lost >= 3  # its retries were made all the same


def test_a_long_retry_after_is_not_slept_through(turns, tmp_path):
    with endpoint(after=(429, {"Retry-After": "7200"}, "")) as server:
        assert corrector(server, tmp_path, retries=9).ask(turns[:1], 1) == [None]
        asked = corrector(server, tmp_path, outage="wait", wait_s=3600)
        asked.ask(turns[:1], 1)
    assert asked.stopped
    assert len(server.requests) == 2


def test_nothing_listens(tmp_path):
    with endpoint() as server:
        config = endpoints.settings(server)
        with Endpoint(config) as there:
            there.check()
    with Endpoint(config) as gone, pytest.raises(ConfigError, match="nothing answers at"):
        gone.check()


# -- money -------------------------------------------------------------------------------------------


def test_a_question_is_paid_once_a_run(turns, tmp_path):
    with endpoint() as server:
        asked = corrector(server, tmp_path)
        first = asked.ask(turns[:2], 1)
        assert asked.ask([turns[0], turns[1], turns[0]], 2) == [*first, first[0]]
        assert asked.metrics()["external/known"] == 3
        again = corrector(server, tmp_path)  # as after a crash
        assert again.ask(turns[:2], 1) == first
    assert len(server.requests) == 2
    assert again.ledger.spent == asked.ledger.spent
    assert again.ledger.spent.calls == 2


def test_an_interrupt_keeps_what_was_answered(turns, tmp_path, monkeypatch):
    with endpoint() as server:
        asked = corrector(server, tmp_path)
        begin, begun = asked.ledger.begin, []

        def interrupted():
            begun.append(1)
            if len(begun) == 3:
                raise KeyboardInterrupt
            return begin()

        monkeypatch.setattr(asked.ledger, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            asked.ask(turns, 1)
        assert len(corrector(server, tmp_path).ledger.answers) == len(server.requests) >= 1


def test_costs_are_added_up_over_all_that_was_sent(turns, tmp_path):
    usage = {"usage": {"prompt_tokens": 1000, "completion_tokens": 100}}
    with endpoint(says("no") | usage, says(ANSWER) | usage) as server:
        asked = corrector(server, tmp_path, budget={"input_price": 2.5, "output_price": 10.0})
        asked.ask(turns[:1], 1)
    spent = asked.ledger.spent
    assert (spent.calls, spent.tokens_in, spent.tokens_out) == (2, 2000, 200)
    assert spent.dollars == pytest.approx(2000 * 2.5e-6 + 200 * 10e-6)  # $0.007
    metrics = asked.metrics()
    assert metrics["external/tokens_in"] == 2000
    assert metrics["external/dollars"] == spent.dollars


@pytest.mark.parametrize("digits", [400, 308])
def test_a_number_of_tokens_that_cannot_be_is_a_bad_answer_and_costs_nothing(
    turns, tmp_path, digits
):
    numbers = (10**digits, 100)
    absurd, used = ({"usage": {"prompt_tokens": n, "completion_tokens": 5}} for n in numbers)
    with endpoint(says(ANSWER) | absurd, after=says(ANSWER) | used) as server:
        asked = corrector(server, tmp_path, budget={"tokens": 10**6, "input_price": 100.0})
        assert asked.ask(turns[:1], 1) != [None]
    assert failures(asked) == {"schema": 1}
    assert asked.ledger.spent.tokens == 105
    assert asked.ledger.spent.dollars == pytest.approx(100 * 100e-6)


def test_a_conversation_that_cannot_be_written_down_is_closed_all_the_same(tmp_path):
    with endpoint() as server:
        ledger = corrector(server, tmp_path, budget={"input_price": 1.0}).ledger
    assert ledger.begin() is None
    tally = {"calls": 1, "tokens_in": 10**400, "tokens_out": 0, "retries": 0}
    with pytest.raises(OverflowError):
        ledger.end("a question", 1, tally, None)
    opened = []  # one may be open at a time: in a thread, as `begin` waits for one that is
    thread = threading.Thread(target=lambda: opened.append(ledger.begin()), daemon=True)
    thread.start()
    thread.join(5)
    assert opened == [None]


def test_when_an_answer_cannot_be_written_down_no_more_are_paid_for(turns, tmp_path, monkeypatch):
    with endpoint() as server:
        asked = corrector(server, tmp_path)
        monkeypatch.setattr(asked.ledger, "_path", Path("/dev/full"))
        with pytest.raises(OSError, match="No space left"):
            asked.ask(turns, 1)
    assert len(server.requests) <= 2 < len(turns)


def test_what_was_spent_before_there_were_prices_counts_at_those_of_now(turns, tmp_path):
    """Two requests of 1,100 tokens; at $1 a token in and nothing out they cost $2,000."""
    usage = {"usage": {"prompt_tokens": 1000, "completion_tokens": 100}}
    with endpoint(after=says(ANSWER) | usage) as server:
        corrector(server, tmp_path).ask(turns[:2], 1)
        priced = {"dollars": 2500.0, "input_price": 1e6}
        resumed = corrector(server, tmp_path, budget=priced)
        assert resumed.ledger.spent.dollars == pytest.approx(2000)
        assert "may take 1000" in resumed.ledger.short()


def test_a_rank_that_asks_nothing_needs_neither_the_extra_nor_the_ledger(
    turns, tmp_path, monkeypatch
):
    with endpoint() as server:
        corrector(server, tmp_path).ask(turns[:1], 1)
        monkeypatch.setitem(sys.modules, "jsonschema", None)
        with pytest.raises(ImportError):
            corrector(server, tmp_path)
        assert corrector(server, tmp_path, ranks=Ranks(rank=1, world=2)).ledger.spent.calls == 0


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_budget_of_calls_is_kept_and_used_up(turns, tmp_path, concurrency):
    with endpoint() as server:
        asked = corrector(server, tmp_path, concurrency=concurrency, budget={"calls": 4})
        answers = asked.ask(turns, 1)
        assert [answer is None for answer in answers] == [False] * 4 + [True] * 2
        assert "budget.calls=4 is spent" in asked.stopped
        more = corrector(server, tmp_path, budget={"calls": 6})
        assert None not in more.ask(turns, 1)
    assert more.stopped is None
    assert len(server.requests) == 6


def test_retries_count_against_the_budget(turns, tmp_path):
    with endpoint(after=(500, {}, "")) as server:
        asked = corrector(server, tmp_path, concurrency=9, retries=5, budget={"calls": 8})
        asked.ask(turns, 1)
    assert len(server.requests) == 8


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("budget", [{"tokens": 350}, {"dollars": 3.5e-4, "input_price": 1.0}])
def test_a_budget_of_tokens_or_dollars_is_not_overrun(turns, tmp_path, concurrency, budget):
    with endpoint(
        after=says(ANSWER) | {"usage": {"prompt_tokens": 100, "completion_tokens": 0}}
    ) as server:
        asked = corrector(server, tmp_path, concurrency=concurrency, budget=budget)
        answers = asked.ask(turns, 1)
    assert sum(answer is not None for answer in answers) == 3  # a fourth would make 400
    assert next(iter(budget)) in asked.stopped


def test_what_timed_out_counts_as_the_dearest(turns, tmp_path):
    """A provider bills the response that our deadline cut, and does not say what it was."""
    usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 50}}
    with endpoint(says(ANSWER) | usage, after="slow") as server:
        limits = {"budget": {"tokens": 1000}, "max_tokens": 300, "timeout_s": 0.1, "retries": 0}
        asked = corrector(server, tmp_path, concurrency=9, **limits)
        asked.ask(turns[:4], 1)
        assert asked.ledger.spent.timeout == 3
        assert asked.ledger.spent.tokens == 150  # what is known
        assert "is spent: 1050 so far (3 that timed out counted as the dearest)" in (
            corrector(server, tmp_path, **limits).stops_before(2)  # as after a crash
        )
        metrics = asked.metrics()
    assert metrics["external/tokens_in"] + metrics["external/tokens_out"] == 150


@pytest.mark.parametrize("outage", ["skip", "wait"])
@pytest.mark.parametrize("fault", ["slow", "cut"])
def test_retries_are_paid_from_the_budget_too(turns, tmp_path, fault, outage):
    """What is cut at its limit, or at our deadline, is billed, and tried again."""
    usage = {"usage": {"prompt_tokens": 100, "completion_tokens": 100}}
    cut = says(ANSWER[:9]) | usage
    cut["choices"][0]["finish_reason"] = "length"
    with endpoint(says(ANSWER) | usage, after=cut if fault == "cut" else fault) as server:
        asked = corrector(
            server, tmp_path, outage=outage, retries=50, timeout_s=0.1, max_tokens=100,
            concurrency=4, budget={"tokens": 2000},
        )  # fmt: skip
        asked.ask(turns, 1)
    assert "budget.tokens=2000 is spent" in asked.stopped
    assert len(server.requests) <= 10  # 200 each


def test_a_limit_of_the_rate_is_told_once_an_update(turns, tmp_path):
    notes, busy = [], (429, {}, "")
    with endpoint(*[busy, busy, "ok"] * 6) as server:
        asked = corrector(server, tmp_path, notes=notes, outage="wait", retries=1)
        assert None not in asked.ask(turns, 1)
    (note,) = notes
    assert "limits the rate; waiting up to" in note


def test_an_outage_before_the_first_price_is_given_up_after_one_turn(turns, tmp_path):
    """Conversations wait for each other then: eight of them would outlast the patience of other ranks."""
    with endpoint(after=(503, {}, "")) as server:
        asked = corrector(server, tmp_path, concurrency=4, retries=1, budget={"tokens": 1000})
        assert asked.ask(turns, 1) == [None] * 6
    assert len(server.requests) == 2


def test_an_error_in_the_place_of_an_answer_is_tried_again_within_a_budget(turns, tmp_path):
    used = says(ANSWER) | {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    with endpoint(
        {"error": {"message": "Provider returned error", "code": 502}}, after=used
    ) as server:
        asked = corrector(server, tmp_path, retries=1, concurrency=1, budget={"tokens": 1000})
        answers = asked.ask(turns[:1], 1)
    assert answers[0] is not None
    assert len(server.requests) == 2


def test_an_update_without_an_answer_of_use_is_told(turns, tmp_path):
    notes = []
    with endpoint(after=says("no json")) as server:
        corrector(server, tmp_path, notes=notes, retries=0, concurrency=1).ask(turns[:2], 7)
    assert "gave no answer of use in update 7 (not_json 2): nothing of it is collected" in notes[-1]


def test_json_of_any_depth_is_judged():
    deep = {}
    for _ in range(sys.getrecursionlimit()):
        deep = {"a": deep}
        assert problem(deep, {"type": "string"})


NOTHING = {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}


@pytest.mark.parametrize(
    "answer", [says(ANSWER), says(ANSWER) | NOTHING, says(""), says("", refusal="no")]
)
def test_a_budget_that_cannot_be_kept_is_refused(turns, tmp_path, answer):
    """Also where the answers, which are paid for, are of no use."""
    with (
        endpoint(answer) as server,
        pytest.raises(ConfigError, match="does not report its usage"),
    ):
        corrector(server, tmp_path, budget={"tokens": 1000}).ask(turns, 1)


def test_a_line_that_a_crash_cut_is_dropped_and_a_damaged_one_is_named(turns, tmp_path):
    with endpoint() as server:
        corrector(server, tmp_path).ask(turns[:2], 1)
        path = tmp_path / "ledger.jsonl"
        lines = path.read_text().splitlines(keepends=True)
        path.write_text(lines[0] + lines[1][:40])
        again = corrector(server, tmp_path)
        assert again.ledger.spent.calls == 1
        assert path.read_text() == lines[0]
        row = json.loads(lines[0])
        wrong = [row | {"answer": answer} for answer in (5, "text", {"thought": THOUGHT})]
        for line in ("{}", "5", "[" * 100_000, *map(json.dumps, wrong)):
            path.write_text(line + "\n")
            with pytest.raises(ConfigError, match=r"ledger\.jsonl, line 1, is damaged"):
                corrector(server, tmp_path)


# -- the key -----------------------------------------------------------------------------------------


KEY = "sk-test-3c0ffee"


def test_the_key_is_sent_and_written_nowhere(turns, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SOME_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    leak = json.dumps({"evaluation": KEY, "correct": False, "thought": THOUGHT | {"thoughts": KEY}})
    with endpoint(says(leak), (403, {}, KEY)) as server:
        asked = corrector(server, tmp_path, key_variable="SOME_KEY")
        (answer,) = asked.ask(turns[:1], 1)
        with pytest.raises(ConfigError) as error:
            asked.ask(turns, 2)
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert answer["thought"]["thoughts"] == "[key]"
    assert KEY not in str(error.value)
    assert KEY not in caplog.text
    assert all(KEY not in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_a_key_is_cut_out_of_what_escapes_hide(turns, tmp_path, monkeypatch):
    key = "sk-ab/cd/efghij"
    monkeypatch.setenv("SOME_KEY", key)
    leak = json.dumps({"evaluation": key, "correct": False, "thought": THOUGHT | {"thoughts": key}})
    with endpoint(says(leak.replace("/", "\\/")), says(leak.replace("/", "\\u002f"))) as server:
        asked = corrector(server, tmp_path, key_variable="SOME_KEY")
        answers = asked.ask(turns[:2], 1)
    assert [answer["thought"]["thoughts"] for answer in answers] == ["[key]"] * 2
    rows = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [row["answer"]["evaluation"] for row in rows] == ["[key]"] * 2


@pytest.mark.parametrize("key", ["sk-schl\u00fcssel", "sk-abc\ndefghijk", "sk abcdefghijk"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_repeated(monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ConfigError, match="SOME_KEY must hold a key of printable ASCII") as error:
        Endpoint(ExternalConfig(key_variable="SOME_KEY"))
    assert key not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_an_error_before_anything_is_sent(monkeypatch):
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ConfigError, match="SOME_KEY is not set; export it"):
        Endpoint(ExternalConfig(key_variable="SOME_KEY"))


def test_a_key_in_the_settings_is_refused_and_not_repeated():
    for wrong in ({"key_variable": KEY}, {"base_url": f"https://user:{KEY}@host/v1"}):
        with pytest.raises(ConfigError) as error:
            ExternalConfig(**wrong)
        assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "https://host/v1?key=1"},
        {"base_url": "https://host/v1#key"},
        {"base_url": "http://[::1/v1"},
        {"base_url": "http://host:abc/v1"},
        {"base_url": "http://host:99999/v1"},
        {"base_url": "http://999.1.1.1/v1"},
        {"base_url": "http://ho st/v1"},
        {"base_url": "http://ho\nst/v1"},
        {"share": 1.5},
        {"concurrency": 0},
        {"timeout_s": 0},
        {"retries": -1},
        {"temperature": -0.1},
        {"wait_s": 0},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ConfigError, match=f"guidance.external.{next(iter(wrong))}"):
        ExternalConfig(**wrong)


@pytest.mark.parametrize("host", ["[::1]:8000", "10.0.0.1", "my_server:80", "host.example"])
def test_an_address_is_taken(host):
    assert ExternalConfig(base_url=f"http://{host}/v1").base_url == f"http://{host}/v1"


def test_settings_that_cannot_work_together_are_refused():
    with pytest.raises(ConfigError, match="without prices"):
        BudgetConfig(dollars=5.0)
    with pytest.raises(ConfigError, match="a corrector writes thoughts"):
        GuidanceConfig(kind="external", tokens="response")


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(ConfigError, match=r"pip install 'gtr-turbo\[external\]'"):
        Endpoint(ExternalConfig(key_variable=None))


# -- targets -----------------------------------------------------------------------------------------


def corrected(asked, policy, turns, memory, *, share=1.0, longest=96):
    return correct(
        asked,
        policy.processor,
        turns,
        memory,
        torch.Generator().manual_seed(0),
        share=share,
        longest=longest,
        update=1,
    )


def test_the_corrected_thought_stands_before_the_agents_own_action(policy, turns, tmp_path):
    memory = Memory(tmp_path / "imitation", 0)
    turns = [replace(turns[0], valid=False), *turns[1:]]
    with endpoint() as server:
        asked = corrector(server, tmp_path)
        metrics = corrected(asked, policy, turns, memory)
    assert len(memory) == 5  # the invalid turn is not asked about
    for turn, target in zip(turns[1:], memory.targets, strict=True):
        ids = target.response_ids.tolist()
        reply = json.loads(policy.processor.decode(ids[:-1]))
        assert reply["action"] == turn.action
        trained = policy.processor.decode(ids[: target.thought_tokens])
        assert trained.endswith('"action": "')
        assert turn.fields["thoughts"] == "2*6=12"
    assert metrics["external/asked"] == 5
    assert metrics["external/skipped"] == metrics["external/unusable"] == 0
    answers = asked.ledger.answers.values()
    assert metrics["external/corrected"] > 0
    assert metrics["external/corrected"] + metrics["external/agreed"] == 1
    assert any(not answer["correct"] for answer in answers)


def test_letters_beyond_ascii_are_imitated_as_the_agent_writes_them(policy, turns, tmp_path):
    memory = Memory(tmp_path / "m", 0)
    thought = THOUGHT | {"formula": "\ud800", "thoughts": "2\u00d76=12"}
    answer = json.dumps({"evaluation": "", "correct": True, "thought": thought})
    agent = replace(turns[0], fields={**turns[0].fields, "thoughts": "2\u00d76=12"})
    written = []
    processor = SimpleNamespace(
        reply_ids=lambda text: written.append(text) or policy.processor.reply_ids(text),
        decode=policy.processor.decode,
        clean=policy.processor.clean,
    )
    with endpoint(says(answer)) as server:
        corrected(
            corrector(server, tmp_path), SimpleNamespace(processor=processor), [agent], memory
        )
    assert '"thoughts": "2\u00d76=12"' in written[0]
    assert '"formula": "?"' in written[0]  # a lone surrogate, which no text can hold
    assert '"thoughts": "2\u00d76=12"' in server.requests[0]["messages"][1]["content"][0]["text"]


def test_a_share_of_the_turns_is_sent(policy, turns, tmp_path):
    with endpoint() as server:
        asked = corrector(server, tmp_path)
        metrics = corrected(asked, policy, turns, Memory(tmp_path / "m", 0), share=0.5)
    assert metrics["external/asked"] == 3
    assert len(server.requests) <= 3


def test_a_share_of_less_than_a_turn_is_sent_now_and_then(policy, turns, tmp_path):
    sent = []
    with endpoint() as server:
        asked = corrector(server, tmp_path)
        for seed in range(60):
            generator, memory = torch.Generator().manual_seed(seed), Memory(tmp_path / str(seed), 0)
            told = correct(
                *(asked, policy.processor, turns, memory, generator),
                share=0.05,
                longest=96,
                update=1,
            )
            sent.append(told["external/asked"])
    assert set(sent) == {0.0, 1.0}
    assert 0.1 < np.mean(sent) < 0.5  # 0.3 is due


def test_whole_numbers_are_imitated_without_a_point(policy, turns, tmp_path):
    thought = THOUGHT | {"cards": [2.0, 6.0]}  # a schema takes them for integers
    answer = json.dumps({"evaluation": "", "correct": True, "thought": thought})
    memory = Memory(tmp_path / "m", 0)
    with endpoint(says(answer)) as server:
        corrected(corrector(server, tmp_path), policy, turns[:1], memory)
    written = policy.processor.decode(memory.targets[0].response_ids[:-1].tolist())
    assert '"cards": [2, 6]' in written


def test_a_thought_longer_than_a_reply_may_be_is_not_collected(policy, turns, tmp_path):
    memory = Memory(tmp_path / "m", 0)
    with endpoint() as server:
        metrics = corrected(corrector(server, tmp_path), policy, turns, memory, longest=3)
    assert metrics["external/unusable"] == metrics["external/asked"] == 6
    assert len(memory) == 0


def test_every_kind_of_fault_is_a_metric(turns, tmp_path):
    with endpoint() as server:
        names = corrector(server, tmp_path).metrics()
    assert {f"external/failed_{kind}" for kind in FAULTS} <= set(names)


# -- the local corrector and its tool ----------------------------------------------------------------


STYLES = [
    ("Points24", "token"),
    ("Points24", "reduction"),
    ("Points24", "formula"),
    ("EZPoints", "token"),
]


@pytest.mark.parametrize("style", ["compact", "full"])
@pytest.mark.parametrize(("name", "granularity"), STYLES)
def test_the_local_correctors_thoughts_are_right_plans(name, granularity, style):
    import solver_corrector

    rng = np.random.default_rng(0)
    checked = 0
    for seed in range(6):
        env = make_env(name, prompt=style, granularity=granularity, solvable_only=True).unwrapped
        observation, _ = env.reset(seed=seed)
        for _ in range(3):
            wrong = {"cards": [1] * env.count, "formula": "?", "thoughts": "1+1=3", "action": "1"}
            for thought in (wrong, env.demonstrate(rng)):
                schema = answer_schema(env.fields, env.field_schemas)
                answer = ask_directly(solver_corrector, observation, thought)
                assert problem(answer, schema) is None
                facts = env.judge({**answer["thought"], "action": "="})
                assert facts["perception"]
                assert facts["plan"]
                assert answer["correct"] == (thought is not wrong)
                checked += 1
            if granularity == "formula":
                break
            observation, _, ended, _, _ = env.step(env.demonstrate(rng)["action"])
            if ended:
                break
    assert checked >= 12


@pytest.mark.parametrize("name", ["Points24", "EZPoints"])
def test_where_nothing_reaches_the_goal_the_local_corrector_mends_only_what_is_seen(name):
    import solver_corrector

    env = make_env(name, prompt="compact", granularity="token").unwrapped
    cards = [solver_corrector.Card(rank, 0) for rank in (9, 2, 5, 6)[: env.count]]
    env.reset(options={"cards": cards})
    env.step("10")
    observation = env.step("3")[0]
    thought = {"cards": env.numbers, "formula": "103", "thoughts": "10+3=13"}
    answer = ask_directly(solver_corrector, observation, thought)
    assert answer["correct"]
    assert answer["evaluation"] == "The thought is right. Nothing reaches the goal from here."
    assert answer["thought"] == thought
    answer = ask_directly(solver_corrector, observation, thought | {"formula": "10+3"})
    assert not answer["correct"]
    assert answer["thought"] == thought


def ask_directly(module, observation, thought):
    stream = io.BytesIO()
    Image.fromarray(observation["image"]).save(stream, format="png")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    shown = {key: value for key, value in thought.items() if key != "action"}
    text = (
        f"The agent's prompt:\n{observation['prompt']}\n\nThe agent's thought:\n{json.dumps(shown)}"
    )
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    message = module.complete(
        {"messages": [{"role": "system"}, {"role": "user", "content": content}]}
    )
    return json.loads(message["content"])


def test_the_local_corrector_reads_every_card():
    import solver_corrector

    assert len(solver_corrector.FACES) == 52
    env = make_env("Points24").unwrapped
    for seed in range(20):
        observation, _ = env.reset(seed=seed)
        assert solver_corrector.read_cards(observation["image"]) == env.cards


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"[" * 100_000),
        ({}, b'{"messages": 5}'),
        ({"Content-Length": "abc"}, b"{}"),
        ({"Content-Length": "-1"}, b"{}"),
        (
            {},
            b'{"messages": [{}, {"content": [{"type": "text", "text": 5}, '
            b'{"type": "image_url", "image_url": {"url": "x"}}]}]}',
        ),
    ],
)
def test_the_local_corrector_answers_400_to_what_it_cannot_read(headers, body):
    import solver_corrector

    with endpoint(handler=solver_corrector.Handler) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        assert response.status == 400
        assert json.loads(response.read())["error"]["message"]
        connection.close()


def test_a_picture_that_is_not_ours_is_refused():
    import solver_corrector

    env = make_env("Points24", prompt="compact").unwrapped
    observation, _ = env.reset(seed=0)
    for row, column in ((60, 30), (220, 150)):  # one pixel of a card, one of the formula
        image = observation["image"].copy()
        image[row, column] ^= 1
        with pytest.raises(solver_corrector.RequestError):
            ask_directly(solver_corrector, {**observation, "image": image}, THOUGHT)


def test_the_solver_as_a_tool():
    def solve(granularity, cards, formula):
        (tool,) = make_env("Points24", granularity=granularity).get_wrapper_attr("tools")
        return tool.run({"cards": cards.split(), "formula": formula})

    assert solve("token", "7 5 9 8", "(7+5") == {
        "reachable": True,
        "plan": "(7+5-9)*8=24",
        "next_action": "-",
    }
    assert solve("reduction", "7 5 9 8", "7+5=12, 12-9=3") == {
        "reachable": True,
        "plan": "8*3=24",
        "next_action": "8*3",
    }
    done = solve("reduction", "7 5 9 8", "7+5=12, 12-9=3, 3*8=24")
    assert done == {"reachable": True, "plan": "24", "next_action": "="}
    assert solve("formula", "Q 8 6 3", "")["next_action"].count("10") == 1
    for granularity in ("token", "reduction", "formula"):
        assert solve(granularity, "A A A A", "") == {"reachable": False}
    assert solve("token", "7 5 9 8", "7*7") == {"reachable": False}
    # brackets that need not be are no way lost
    begun = solve("token", "3 8 2 2", "(3*8")
    assert begun == {"reachable": True, "plan": "(3*8)+2-2=24", "next_action": ")"}
    assert solve("token", "7 5 9 8", "((7+5-9)*8)")["next_action"] == "="
    assert solve("token", "7 5 9 8", "(7*5") == {"reachable": False}
    assert solve("token", "7 5 9 8", "7/(5-5") == {"reachable": False}
    # 20 tokens are the most: of 7 with 6 pairs of brackets there are 19, with 7 pairs 21
    assert solve("token", "3 8 2 2", "(" * 7)["reachable"] is False
    assert solve("token", "3 8 2 2", "(" * 6)["plan"].count(")") == 6


@pytest.mark.parametrize(
    ("formula", "told"),
    [
        ("7+5=13", r"7\+5=13 is wrong"),
        ("7+4=11", "needs 4, and left are 5 9 8"),
        ("import os", "no step such as"),
        ("1+1=2, " * 100, "at most 200"),
    ],
)
def test_the_solver_says_what_is_wrong_with_steps(formula, told):
    (tool,) = make_env("Points24", granularity="reduction").get_wrapper_attr("tools")
    with pytest.raises(ValueError, match=told):
        tool.run({"cards": ["7", "5", "9", "8"], "formula": formula})


def test_the_tools_plans_are_exact_for_many_deals():
    (tool,) = make_env("Points24", granularity="formula").get_wrapper_attr("tools")
    rng = np.random.default_rng(1)
    from gtr_turbo.envs.cards import formula as grammar

    for _ in range(40):
        ranks = rng.integers(13, size=4)
        told = tool.run({"cards": [RANKS[rank] for rank in ranks], "formula": ""})
        values = [min(int(rank) + 1, 10) for rank in ranks]
        assert told["reachable"] == grammar.solvable(values, 24)
        if told["reachable"]:
            tokens = grammar.tokenize(told["next_action"])
            assert grammar.evaluate(tokens) == Fraction(24)
            assert grammar.uses_exactly(tokens, values)


@pytest.mark.parametrize("whole", ["((7+5)-9)*8", "8*(((7)+5)-9)", "((3*8)+2)-2", "(8/(3-(8/3)))"])
def test_a_formula_can_be_continued_from_each_of_its_beginnings(whole):
    from gtr_turbo.envs.cards import formula as grammar

    (tool,) = make_env("Points24").get_wrapper_attr("tools")
    tokens = grammar.tokenize(whole)
    cards = [token for token in tokens if token.isdigit()]
    for count in range(len(tokens) + 1):
        begun = "".join(tokens[:count])
        told = tool.run({"cards": cards, "formula": begun})
        plan = told["plan"].removesuffix("=24")
        assert plan.startswith(begun)
        assert grammar.solves(grammar.tokenize(plan), list(map(int, cards)), 24)
        assert told["next_action"] == [*grammar.tokenize(plan), "="][count]
