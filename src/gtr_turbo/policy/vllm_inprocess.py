"""vLLM held by the trainer itself: what `vllm_server` and `vllm_http` do, without a server and HTTP.

vLLM's asynchronous engine takes requests on an event loop in a thread of the trainer. The model runs in a child
process, as vLLM always has it under this engine: its end does not end the run, and it can be started anew.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig
from gtr_turbo.policy.vllm_http import EngineError, OutageError, UnknownAdapterError
from gtr_turbo.policy.vllm_server import engine_arguments, last_words, own_environment
from gtr_turbo.vllm_config import VllmConfig

WATCH = (  # the engine ends when the run does, a killed one included
    "import os, sys\nsys.stdin.read()\nfor child in sys.argv[1:]: os.kill(int(child), 9)"
)


class Resident:
    """The engine's life, as `vllm_server.Server` is a server's.

    Attributes:
        log: what it says.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: VllmConfig,
        rank: int,
        folder: Path,
        gpu: int | None = None,
    ) -> None:
        """Nothing is started or imported yet. Arguments and errors are those of `vllm_server.Server`."""
        self._words = engine_arguments(model, config, rank)
        self._config, self.log, self._gpu = config, folder / "engine.log", gpu
        self._client: ResidentClient | None = None
        self._watch: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether there is an engine that has not failed."""
        return self._client is not None and not self._client.engine.errored

    def start(self) -> ResidentClient:
        """Make the engine and wait until it is ready.

        Raises:
            ConfigError: vLLM does not know an argument.
            EngineError: it could not be made; its last words are quoted.
        """
        self._prepare()
        before = set(multiprocessing.active_children())
        with _environment(own_environment(self._gpu)):  # the child inherits it
            self._client = ResidentClient(self._make(), self._config.timeout_s)
        children = set(multiprocessing.active_children()) - before
        self._watch = subprocess.Popen(
            [sys.executable, "-c", WATCH, *(str(child.pid) for child in children)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        return self._client

    def _make(self) -> Any:
        """The engine; never in a variable, as failed imports, which vLLM keeps, keep those of all callers."""
        from vllm import AsyncEngineArgs, AsyncLLMEngine
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        try:
            arguments = parser.parse_args([*self._words, "--disable-log-stats"])
        except SystemExit:  # it has told why
            raise ConfigError(
                "vLLM refuses an argument (see above): with rollout.vllm.mode=inprocess it takes those of "
                f"`vllm serve` that are not of the server itself; got {' '.join(self._config.arguments)!r}"
            ) from None
        try:
            return AsyncLLMEngine.from_engine_args(AsyncEngineArgs.from_cli_args(arguments))
        except Exception as error:  # of any kind: its imports, its checks, its child
            raise EngineError(
                f"vLLM ended at its start: {_words(error)}; its log: {last_words(self.log)}"
            ) from error

    def _prepare(self) -> None:
        """Set what vLLM reads from the environment, some of it when it is imported."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        handlers = {
            "file": {"class": "logging.FileHandler", "filename": str(self.log), "formatter": "line"}
        }
        logging = {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
            "handlers": handlers,
            "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
        }
        settings = self.log.with_name("logging.json")
        settings.write_text(json.dumps(logging))
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(settings)
        os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] = str(max(1, round(self._config.startup_s)))
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # the trainer has threads, and CUDA
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    def stop(self) -> None:
        """End it, and its processes."""
        if self._watch is not None:
            self._watch.kill()
            self._watch.communicate()
            self._watch = None
        if self._client is not None:
            self._client.close()
            self._client = None


class ResidentClient:
    """Requests to the engine, in the words of `vllm_http.Client`; from any thread.

    Attributes:
        engine: vLLM's `AsyncLLM`.
    """

    def __init__(self, engine: Any, timeout_s: float) -> None:
        """Start the event loop that the engine's requests run on. `timeout_s` bounds each of them."""
        self.engine, self._timeout_s = engine, timeout_s
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop, self._done = self._runner.get_loop(), asyncio.Event()
        self._thread = threading.Thread(
            target=self._runner.run, args=[self._done.wait()], name="vllm", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the engine, then the loop."""
        self.engine.shutdown()
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()
        self._runner.close()
        del self.engine
        gc.collect()  # it holds itself, and would complain if it went only with the interpreter

    def healthy(self, timeout_s: float = 5.0) -> bool:
        """Whether the engine answers."""
        try:
            self._wait(self.engine.list_loras(), timeout_s)
        except (OutageError, EngineError):
            return False
        return True

    def load_adapter(self, name: str, path: str) -> None:
        """Read the PEFT folder `path` and serve it as `name`; one that is there stays.

        Raises:
            OutageError: the engine did not answer, or died.
            EngineError: it refuses.
        """
        from vllm.lora.request import LoRARequest

        if name not in self._adapters:
            request = LoRARequest(name, next(self._numbers), path)
            self._wait(self.engine.add_lora(request))
            self._adapters[name] = request

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter, if the engine knows it."""
        request = self._adapters.pop(name, None)
        if request is not None:
            with suppress(OutageError, EngineError):  # it is only in the way
                self._wait(self.engine.remove_lora(request.lora_int_id))

    def sleep(self) -> None:
        """Free the GPU's memory, the model waiting in the host's (level 1). Raises as `load_adapter`."""
        self._wait(self.engine.sleep(level=1))

    def wake_up(self) -> None:
        """Take the memory again. Raises as `load_adapter`."""
        self._wait(self.engine.wake_up())

    def generate(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Answer one request, both of the form of /inference/v1/generate.

        Raises:
            OutageError: no usable answer; `UnknownAdapterError` if the adapter is not loaded.
            EngineError: the request is refused.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        adapter = self._adapters.get(body["model"])
        if adapter is None:
            raise UnknownAdapterError(f"it has no adapter {body['model']}")
        (part,) = body["content_parts"]
        picture = Image.open(io.BytesIO(base64.b64decode(part["url"].split(",", 1)[1])))
        prompt = {"prompt_token_ids": body["token_ids"], "multi_modal_data": {"image": picture}}
        settings = SamplingParams.from_optional(
            **body["sampling_params"], output_kind=RequestOutputKind.FINAL_ONLY
        )
        return answer(self._wait(self._last(prompt, settings, adapter)))

    async def _last(self, prompt: Mapping[str, Any], settings: Any, adapter: Any) -> Any:
        number, output = f"turn-{next(self._numbers)}", None
        async for made in self.engine.generate(prompt, settings, number, lora_request=adapter):
            output = made
        return output

    def _wait(self, work: Coroutine[Any, Any, Any], timeout_s: float | None = None) -> Any:
        """The result of work on the loop; what vLLM raises becomes one of our two errors."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise OutageError(f"no answer within {timeout_s:g} s") from None
        except (EngineDeadError, EngineGenerateError) as error:
            raise OutageError(_words(error.__cause__ or error)) from error
        except Exception as error:  # of any kind, by what it refuses
            raise EngineError(f"vLLM refuses: {_words(error)}") from error


@contextmanager
def _environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Inside the block the environment is `wanted`; what is set there beyond it stays."""
    given = dict(os.environ)
    odd = [n for n in given.keys() | wanted.keys() if given.get(n) != wanted.get(n)]

    def take(values: Mapping[str, str]) -> None:
        for name in odd:
            os.environ.pop(name, None)
            os.environ.update({name: values[name]} if name in values else {})

    take(wanted)
    try:
        yield
    finally:
        take(given)


def answer(output: Any) -> dict[str, Any]:
    """A `RequestOutput` in the form of an answer of /inference/v1/generate, as far as it is read."""
    prompt = output.prompt_logprobs
    return {
        "prompt_token_ids": list(output.prompt_token_ids),
        "prompt_logprobs": prompt and [row and _row(row) for row in prompt],
        "choices": [
            {
                "token_ids": list(one.token_ids),
                "finish_reason": one.finish_reason,
                "logprobs": {
                    "content": [
                        {"token_id": token, "logprob": row[token].logprob}
                        for token, row in zip(one.token_ids, one.logprobs or [], strict=False)
                    ]
                },
            }
            for one in output.outputs
        ],
    }


def _row(row: Mapping[int, Any]) -> dict[str, dict[str, float]]:
    return {str(token): {"logprob": found.logprob} for token, found in row.items()}


def _words(error: BaseException) -> str:
    """The start of what an error says, printable."""
    return "".join(filter(str.isprintable, f"{type(error).__name__}: {error}"))[:300]
