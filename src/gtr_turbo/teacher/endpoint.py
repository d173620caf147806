"""One request to an OpenAI-compatible endpoint (extra `external`): send, and tell what went wrong.

The key is read from the environment; it is in no setting, no file and no message, and is cut out of what
comes back.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Mapping
from typing import Any

from gtr_turbo.checks import ConfigError
from gtr_turbo.teacher.messages import COMPLETION, AnswerError, cut, loads, problem, read_choice
from gtr_turbo.teaching_config import ExternalConfig

OUTAGES = ("connection", "timeout", "rate_limit", "server")
"""Kinds of failure that a patient client outlasts."""
FAULTS = (
    *OUTAGES, "rejected", "not_json", "schema", "refusal", "cut", "empty", "tools",
)  # fmt: skip
"""All kinds (docs/external.md)."""

MOST_TOKENS = 10**9  # of one request; a report of more is no number to pay by
LONGEST_QUOTE = 200  # characters of a server's own words
SHORTEST_KEY = 8  # a shorter one is a placeholder ("none"), and could be part of an innocent word


class Endpoint:
    """Where the corrector is; a context manager, safe to use from several threads.

    Requests run in an event loop of its own, as only there a whole response can be given a deadline: a
    blocking client bounds the time between two bytes.

    Attributes:
        secret: the key, to cut out of what comes back; empty if there is none, or a placeholder.
    """

    def __init__(self, config: ExternalConfig) -> None:
        """Nothing is sent yet.

        Raises:
            ConfigError: no key, one that cannot be sent, or the extra is not installed.
        """
        self._config, key = config, config.key()
        self.secret = key if len(key) >= SHORTEST_KEY else ""
        try:
            import jsonschema  # noqa: F401 - needed by `messages`
            import openai
        except ImportError as error:
            raise ConfigError(
                "guidance.kind='external' needs an extra: pip install 'gtr-turbo[external]'"
            ) from error
        self._client = openai.AsyncOpenAI(
            api_key=key or "none", base_url=config.base_url, timeout=None, max_retries=0
        )

    def __enter__(self) -> Endpoint:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._client.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _await(self, request: Awaitable[Any]) -> Any:
        """The result of a request.

        Raises:
            TimeoutError: it took longer than `timeout_s`, from connecting to the last byte.
        """
        limited = asyncio.wait_for(request, self._config.timeout_s)
        future = asyncio.run_coroutine_threadsafe(limited, self._loop)
        try:
            return future.result()
        finally:
            future.cancel()  # an interrupted one is not left open

    def check(self) -> None:
        """One free request (`/models`), to fail before anything starts.

        Raises:
            ConfigError: nothing listens there, or the key is refused.
        """
        import openai

        try:
            self._await(self._client.models.with_raw_response.list())
        except (TimeoutError, openai.APIConnectionError):
            raise ConfigError(
                f"nothing answers at guidance.external.base_url={self._config.base_url}; start the endpoint, "
                "or correct the address"
            ) from None
        except openai.APIStatusError as error:  # an endpoint need not have a list of its models
            if error.status_code in (401, 403):
                raise self._refused(error.status_code) from None

    def send(self, body: Mapping[str, Any], tally: Counter[str]) -> Mapping[str, Any]:
        """Send one request for a completion and read the message that comes back.

        Args:
            body: the request.
            tally: `calls`, `microseconds`, `tokens_in` and `tokens_out` are added to.

        Raises:
            AnswerError: nothing usable came back.
            ConfigError: key, model or account are refused, or a budget cannot be kept.
        """
        import openai

        began = time.monotonic()
        tally["calls"] += 1
        try:
            create = self._client.chat.completions.with_raw_response.create
            text = self._await(create(**body)).text
        except openai.APIStatusError as error:
            raise self._meaning(error) from None
        except TimeoutError:
            raise AnswerError("timeout") from None
        except openai.APIConnectionError:
            raise AnswerError("connection") from None
        finally:
            tally["microseconds"] += round(1e6 * (time.monotonic() - began))
        completion = loads(text, self.secret)
        counted = self._count_tokens(completion, tally)
        made = problem(completion, COMPLETION) is None  # what is none may have cost nothing
        if made and not counted and (self._config.budget.tokens or self._config.budget.dollars):
            raise ConfigError(
                f"{self._config.base_url} does not report its usage, so a budget of tokens or dollars cannot "
                "be kept; set guidance.external.budget.calls instead"
            )
        return read_choice(completion)

    def _meaning(self, error: Any) -> Exception:
        """What an HTTP status other than 2xx means."""
        status, pause = error.status_code, retry_after(error.response.headers.get("retry-after"))
        if status in (401, 402, 403, 404):
            return self._refused(status)
        if status == 429:
            spent = error.code == "insufficient_quota"
            return self._refused(402) if spent else AnswerError("rate_limit", pause)
        if status == 408:
            return AnswerError("timeout", pause)
        if status >= 500:
            return AnswerError("server", pause)
        return AnswerError("rejected", said=f"HTTP {status}: {self._words(error)}")

    def _words(self, error: Any) -> str:
        """What the server itself says of an error: the start of it, printable."""
        try:
            body = cut(error.body, self.secret)
            if isinstance(body, dict):
                body = body.get("message") or body
            text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
        except RecursionError:
            text = "(nested too deeply to be read)"
        return "".join(filter(str.isprintable, text))[:LONGEST_QUOTE]

    def _refused(self, status: int) -> ConfigError:
        """What to do about a status that no retry can mend."""
        config = self._config
        key = (
            f"the key in {config.key_variable}"
            if config.key_variable
            else "a request without a key"
        )
        why = {
            401: f"{key} is not accepted; put in the right one",
            402: "the account has no credit left; top it up",
            403: f"{key} gives no access to the model {config.model!r}; change one of them",
            404: f"the address or the model {config.model!r} is not known there; correct "
            "guidance.external.base_url or guidance.external.model",
        }
        return ConfigError(
            f"{config.base_url} answered {status}: {why[status]}. Then go on with --resume (without it, if "
            "there is no checkpoint yet)"
        )

    def _count_tokens(self, completion: Any, tally: Counter[str]) -> bool:
        """Whether the answer says what it used.

        Raises:
            AnswerError: `schema`, it says more than can be.
        """
        usage = completion.get("usage") if isinstance(completion, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        told = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        counts = [number for number in told if type(number) is int and number >= 0]
        if len(counts) < len(told) or not counts[0]:  # a prompt has tokens
            return False
        if max(counts) > MOST_TOKENS:
            raise AnswerError("schema")
        tally["tokens_in"] += counts[0]
        tally["tokens_out"] += counts[1]
        return True


def retry_after(header: str | None) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or as a date (RFC 9110); 0 if it does not."""
    try:
        seconds = float(header or 0)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(str(header)).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0
