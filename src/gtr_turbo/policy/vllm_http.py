"""Requests to a vLLM server: token ids and a picture in, token ids and log-probs out.

`/inference/v1/generate` (vLLM's "tokens in, tokens out", `--enable-scale-out`) takes the prompt as ids, with one
placeholder for the picture, and returns the prompt it made of them: it must be the trainer's own, id for id.
Standard library only: the trainer needs no vLLM beside it to talk to a server elsewhere.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from gtr_turbo.checks import key_from

GENERATE = "/inference/v1/generate"
NO_ROUTE = re.compile(rb'"detail":\s*"Not Found"')
LONGEST_ANSWER = 2**26  # bytes
LONGEST_QUOTE = 300  # characters of a server's own words


class EngineError(RuntimeError):
    """Generation cannot go on: what the engine does is wrong, or it is gone for good."""


class OutageError(RuntimeError):
    """No usable answer this time; a later try may get one."""


class UnknownAdapterError(OutageError):
    """The server does not know the adapter: it was started anew."""


class Client:
    """A server's address. The key, if it wants one, is in `VLLM_API_KEY`, where vLLM itself reads it."""

    def __init__(self, url: str, timeout_s: float) -> None:
        """Nothing is sent yet. `timeout_s` bounds a request from connecting to the last byte.

        Raises:
            ConfigError: the key is none that a header can hold.
        """
        self.url, self._timeout_s = url.rstrip("/"), timeout_s
        self._key = key_from("VLLM_API_KEY")

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether a server answers and is ready."""
        try:
            return self._send("GET", "/health", b"", timeout_s)[0] == 200
        except OutageError:
            return False

    def load_adapter(self, name: str, path: str) -> None:
        """Let the server read the PEFT folder `path` and serve it as `name`; one that it has stays.

        Raises:
            OutageError: it did not answer, or failed.
            EngineError: it refuses.
        """
        try:
            self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        except UnknownAdapterError:
            raise EngineError(
                f"{self.url} has no /v1/load_lora_adapter, or cannot read {path}: start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and let it see the run folder under the same path"
            ) from None

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, if the server knows it."""
        with suppress(
            OutageError, EngineError
        ):  # it is only in the way: the server drops it by age too
            self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def sleep(self) -> None:
        """Free the GPU's memory, the model waiting in the host's (level 1).

        Raises:
            OutageError: it did not answer, or failed.
            EngineError: it refuses.
        """
        self._post("/sleep?level=1", {})

    def wake_up(self) -> None:
        """Take the memory again. Raises as `sleep`."""
        self._post("/wake_up", {})

    def generate(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Send one request for a reply.

        Raises:
            OutageError: no usable answer; `UnknownAdapterError` if the adapter is not loaded.
            EngineError: the request is refused.
        """
        try:
            answer = json.loads(self._post(GENERATE, body))
        except (ValueError, RecursionError):
            raise OutageError("it answered with what is no JSON") from None
        if not isinstance(answer, dict):
            raise OutageError("it answered with JSON that is no object")
        return answer

    def _post(self, path: str, body: Mapping[str, Any]) -> bytes:
        status, answer = self._send("POST", path, json.dumps(body).encode(), self._timeout_s)
        if status == 200 or (status == 400 and b"has already been loaded" in answer):
            return answer
        said = f"HTTP {status} at {path}: {self._words(answer)}"
        if status == 404 and path == GENERATE and NO_ROUTE.search(answer):
            raise EngineError(f"{self.url} has no {path}: start it with --enable-scale-out")
        if status == 404:
            raise UnknownAdapterError(said)
        if status in (408, 425, 429) or status >= 500:
            raise OutageError(said)
        if status in (401, 403):
            raise EngineError(
                f"{self.url} answered {status}: put the key it wants into VLLM_API_KEY"
            )
        raise EngineError(f"{self.url} refuses: {said}")

    def _words(self, answer: bytes) -> str:
        """What the server itself says of an error: the start of it, printable, without the key."""
        text = answer[: 10 * LONGEST_QUOTE].decode(errors="replace")
        text = text.replace(self._key, "(key)") if self._key else text
        return "".join(filter(str.isprintable, text))[:LONGEST_QUOTE]

    def _send(self, method: str, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """(status, body). A watch closes the connection at the deadline, however the bytes come."""
        address = urlsplit(self.url)
        kind = (
            http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        )
        connection = kind(address.hostname or "", address.port, timeout=timeout_s)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        deadline = time.monotonic() + timeout_s
        watch = None
        try:
            connection.connect()
            watch = threading.Timer(deadline - time.monotonic(), _cut, [connection.sock])
            watch.daemon = True
            watch.start()
            connection.request(method, address.path + path, body, headers)
            response = connection.getresponse()
            answer = response.read(LONGEST_ANSWER + 1)
            if response.length:  # bytes that were promised did not come
                raise http.client.IncompleteRead(answer)
            if (
                time.monotonic() >= deadline
            ):  # cut within the headers, it looks like an empty answer
                raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() >= deadline
            raise OutageError(
                f"no answer within {timeout_s:g} s" if late else f"no answer ({error!r})"
            ) from None
        finally:
            if watch is not None:
                watch.cancel()
            connection.close()
        if len(answer) > LONGEST_ANSWER:
            raise OutageError(f"it answered with more than {LONGEST_ANSWER} bytes")
        return response.status, answer


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def picture(frame: np.ndarray) -> str:
    """A frame, uint8 (H, W, 3), as a `data:` address; lossless."""
    stream = io.BytesIO()
    Image.fromarray(frame).save(stream, format="png", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def folded(ids: Sequence[int], image_token_id: int) -> list[int]:
    """Prompt ids with one placeholder for the picture: the server repeats it as often as the picture wants."""
    return [
        token
        for place, token in enumerate(ids)
        if token != image_token_id or place == 0 or ids[place - 1] != image_token_id
    ]


def check_prompt(answer: Mapping[str, Any], expected: Sequence[int]) -> None:
    """The server's prompt must be the trainer's.

    Raises:
        OutageError: it did not say.
        EngineError: it differs.
    """
    made: Any = answer.get("prompt_token_ids")
    if not _ids(made):
        raise OutageError("its answer has no prompt_token_ids")
    if made == list(expected):
        return
    shared = min(len(made), len(expected))
    place = next((i for i in range(shared) if made[i] != expected[i]), shared)
    raise EngineError(
        f"vLLM made a prompt of {len(made)} tokens, the trainer one of {len(expected)}; they part at token "
        f"{place}. Serve the same model with the same image processor (its preprocessor_config.json decides how "
        "many tokens a picture gets)"
    )


def read_reply(answer: Mapping[str, Any]) -> tuple[list[int], list[float], str]:
    """(ids, the model's own log-prob of each, why it ended: `stop` or `length`).

    Raises:
        OutageError: the answer is not of that form.
    """
    try:
        (choice,) = answer["choices"]
        ids, ended = choice["token_ids"], choice["finish_reason"]
        rows = choice["logprobs"]["content"]
        named = [row["token_id"] for row in rows]
        logprobs = [float(row["logprob"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise OutageError(f"its answer is not of the form that was asked for ({error!r})") from None
    if ended not in ("stop", "length"):
        raise OutageError(f"it broke off: finish_reason {str(ended)[:40]!r}")
    if not (_ids(ids) and named == ids and all(map(math.isfinite, logprobs))):
        raise OutageError("its token ids and log-probs do not belong together")
    return ids, logprobs, ended


def read_scores(answer: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
    """Log-probs of the last tokens of a prompt, `ids`.

    Raises:
        OutageError: the answer is not of that form.
    """
    try:
        rows = answer["prompt_logprobs"][-len(ids) :]
        found = [float(row[str(token)]["logprob"]) for row, token in zip(rows, ids, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise OutageError(f"its prompt_logprobs are not those asked for ({error!r})") from None
    if not all(map(math.isfinite, found)):
        raise OutageError("its prompt_logprobs are not finite")
    return found


def _ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(i) is int and i >= 0 for i in given)
