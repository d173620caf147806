"""vLLM in the form the engine speaks to: a real policy, behind HTTP or its modules, and misbehaviour by script.

As a program (`python vllm_fake.py STATE ...`) it is a server process without a model that dies as STATE says.
"""

import asyncio
import base64
import http.server
import io
import json
import os
import sys
import threading
import types
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Each request for a reply takes the next fault of the script; "ok" and the end answer properly."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def send(self, status, data):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send(503 if getattr(self.server, "down", False) else 200, b"")

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append((self.path, body))
            server.keys.append(self.headers.get("Authorization"))
            asked = self.path == "/inference/v1/generate"
            fault = server.script.pop(0) if server.script and asked else "ok"
            fault = "drop" if server.down else fault
            if callable(fault):
                return self.send(200, fault(server.answer(self.path, body)))
            if fault == "ok":
                return self.send(*server.handle(self.path, body))
        return self.fail(fault)

    def fail(self, fault):
        self.close_connection = True
        if fault == "drop":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
        elif fault == "slow":
            self.server.wake.wait(5)
        elif fault == "drip":  # a header, then byte after byte: never silent for long
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            with suppress(OSError):
                for _ in range(80):
                    self.wfile.write(b"x")
                    self.server.wake.wait(0.05)
        elif isinstance(fault, bytes):
            self.send(200, fault)
        else:
            self.send(*fault)


class Fake(http.server.ThreadingHTTPServer):
    """Answers with `policy`, into which adapters are loaded; `deaf` ones change nothing.

    `serve` says which weights a name stands for, and `says`, if given, what is replied: seed -> text.
    """

    daemon_threads = True

    def __init__(self, policy, script=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.policy, self.script, self.lock = policy, list(script), threading.RLock()
        self.requests, self.keys, self.loaded, self.deaf = [], [], {}, False
        self.serve, self.says = lambda name: self.loaded[name], None
        self.wake, self.unknown, self.down = threading.Event(), 0, False
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle(self, path, body):
        if path == "/v1/load_lora_adapter" and body["lora_name"] in self.loaded:
            return 400, {"error": {"message": "The lora adapter has already been loaded."}}
        if path == "/v1/load_lora_adapter":
            self.loaded[body["lora_name"]] = read_adapter(body["lora_path"])
            return 200, b"Success"
        if path == "/v1/unload_lora_adapter":
            known = self.loaded.pop(body["lora_name"], None) is not None
            return (200, b"Success") if known else (404, {"error": {"message": "No such adapter."}})
        if body["model"] not in self.loaded:
            self.unknown += 1
            return 404, {"error": {"message": f"The model {body['model']} does not exist."}}
        return 200, self.answer(path, body)

    def answer(self, path, body):
        import numpy as np
        import torch
        from PIL import Image

        from gtr_turbo.config import SamplingConfig
        from gtr_turbo.policy.generation import generate
        from gtr_turbo.policy.scoring import score
        from gtr_turbo.turns.batch import make_inputs

        policy, settings = self.policy, body["sampling_params"]
        if not self.deaf:
            scale, tensors = self.serve(body["model"])
            for name, tensor in tensors.items():
                policy.model.get_parameter(name).data = tensor  # its rank may be another
            for _, layer in policy._adapted():
                layer.scaling["default"] = scale
        (part,) = body["content_parts"]
        frame = np.asarray(Image.open(io.BytesIO(base64.b64decode(part["url"].split(",")[1]))))
        (seen,) = policy.observe([frame], [""])
        image, count = policy.processor.image_token_id, int(seen.grid.prod()) // 4
        ids = [t for token in body["token_ids"] for t in [token] * (count if token == image else 1)]
        prompt = torch.tensor(ids)
        positions = policy._prompt_positions(prompt, seen.grid)
        from dataclasses import replace

        def own(observed, reply):
            inputs = make_inputs([observed], [reply], policy.processor.pad_token_id)
            with torch.no_grad():
                return score(policy, inputs, raw=True).raw[0].tolist()

        answer = {"prompt_token_ids": ids, "prompt_logprobs": None}
        if "prompt_logprobs" in settings:  # all behind the picture counts as the reply here
            start = len(ids) - ids[::-1].index(image) + 1
            head = replace(
                seen,
                prompt_ids=prompt[:start],
                positions=policy._prompt_positions(prompt[:start], seen.grid),
            )
            rows = own(head, prompt[start:])
            answer["prompt_logprobs"] = [None] * start + [
                {str(t): {"logprob": x}} for t, x in zip(ids[start:], rows, strict=True)
            ]
        seen = replace(seen, prompt_ids=prompt, positions=positions)
        if self.says is not None and "seed" in settings:
            written = policy.processor.reply_ids(self.says(settings["seed"]))
        else:
            (reply,) = generate(
                policy, [seen], SamplingConfig(max_new_tokens=settings["max_tokens"]),
                torch.Generator().manual_seed(settings.get("seed", 0)),
                greedy=settings["temperature"] == 0,
            )  # fmt: skip
            written = reply.response_ids
        made = written.tolist()
        content = [
            {"token_id": t, "logprob": x} for t, x in zip(made, own(seen, written), strict=True)
        ]
        ended = "stop" if made[-1] in settings["stop_token_ids"] else "length"
        choice = {"token_ids": made, "finish_reason": ended, "logprobs": {"content": content}}
        return {**answer, "choices": [choice]}


def read_adapter(folder):
    """(scale, tensors by the names of the parameters) of a PEFT folder."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    named = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    return config["lora_alpha"] / config["r"], named


@contextmanager
def serving(policy, *script):
    """A running server; `requests` are what it got, `loaded` the adapters it knows."""
    server = Fake(policy, script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.wake.set()
        server.shutdown()
        server.server_close()
        thread.join()


class DeadError(Exception):
    """As vLLM's `EngineDeadError`."""


class GenerateError(Exception):
    """As vLLM's `EngineGenerateError`."""


class FakeEngine:
    """As vLLM's `AsyncLLM`, answering as a `Fake` does, by the script that all engines of a test share."""

    def __init__(self, server, calls):
        self.server, self.calls = server, calls
        self.errored, self.asleep, self.adapters = False, False, {}

    async def call(self, name):
        self.calls.append(name)
        if self.errored:
            raise DeadError
        if self.asleep and name != "wake_up":
            raise ValueError(f"{name}, asleep")

    async def list_loras(self):
        await self.call("list_loras")

    async def sleep(self, level):
        assert level == 1
        await self.call("sleep")
        self.asleep = True

    async def wake_up(self):
        await self.call("wake_up")
        self.asleep = False

    async def add_lora(self, lora):
        await self.call("add_lora")
        assert lora.number not in self.adapters
        self.adapters[lora.number] = read_adapter(lora.path)

    async def remove_lora(self, number):
        await self.call("remove_lora")
        del self.adapters[number]

    async def generate(self, prompt, settings, number, lora_request):
        import numpy as np

        from gtr_turbo.policy.vllm_http import picture

        await self.call("generate")
        fault = self.server.script.pop(0) if self.server.script else "ok"
        if fault == "dead":
            self.errored = True
            raise DeadError
        if fault == "hang":
            await asyncio.sleep(60)
        if isinstance(fault, Exception):
            raise fault
        self.server.loaded = {"it": self.adapters[lora_request.number]}
        frame = np.asarray(prompt["multi_modal_data"]["image"])
        body = {"model": "it", "token_ids": prompt["prompt_token_ids"],
                "content_parts": [{"url": picture(frame)}], "sampling_params": settings}  # fmt: skip
        yield output(self.server.answer("", body))

    def shutdown(self):
        self.calls.append("shutdown")
        self.errored = True


def output(answer):
    """An answer over HTTP as vLLM's `RequestOutput`."""
    space = types.SimpleNamespace
    (choice,) = answer["choices"]
    scored = answer["prompt_logprobs"] and [
        row and {int(token): space(**found) for token, found in row.items()}
        for row in answer["prompt_logprobs"]
    ]
    rows = [
        {row["token_id"]: space(logprob=row["logprob"])} for row in choice["logprobs"]["content"]
    ]
    return space(
        prompt_token_ids=answer["prompt_token_ids"],
        prompt_logprobs=scored,
        outputs=[space(token_ids=choice["token_ids"], finish_reason=choice["finish_reason"], logprobs=rows)],
    )  # fmt: skip


@contextmanager
def installed(monkeypatch, policy, *script, broken=None):
    """Modules in place of vLLM's; `engines` are those that were made of them, `calls` what they all were told."""
    space, server = types.SimpleNamespace, Fake(policy, script)
    made = space(engines=[], calls=[], words=[], server=server, seen=[])

    def make(words):
        made.words.append(words)
        made.seen.append(dict(os.environ))
        if broken is not None:
            raise broken
        made.engines.append(FakeEngine(server, made.calls))
        return made.engines[-1]

    def parse(words):
        if "--chat-template" in words:
            raise SystemExit(2)
        return words

    modules = {
        "vllm": {
            "AsyncEngineArgs": space(add_cli_args=lambda parser: parser, from_cli_args=lambda words: words),
            "AsyncLLMEngine": space(from_engine_args=make),
            "SamplingParams": space(from_optional=lambda output_kind, **settings: settings),
        },
        "vllm.utils": {},
        "vllm.utils.argparse_utils": {"FlexibleArgumentParser": lambda: space(parse_args=parse)},
        "vllm.lora": {},
        "vllm.lora.request": {
            "LoRARequest": lambda name, number, path: space(lora_int_id=number, number=number, path=path)
        },
        "vllm.sampling_params": {"RequestOutputKind": space(FINAL_ONLY=2)},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": DeadError, "EngineGenerateError": GenerateError},
    }  # fmt: skip
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, origin="here")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in (
        "VLLM_LOGGING_CONFIG_PATH",
        "VLLM_ENGINE_READY_TIMEOUT_S",
        "VLLM_WORKER_MULTIPROC_METHOD",
    ):
        monkeypatch.setenv(name, "")  # put back after the test
    try:
        yield made
    finally:
        server.server_close()


class Mortal(Handler):
    """Replies with one token; the process dies at a request for one as often as STATE counts."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        state = json.loads(STATE.read_text())
        if self.path in ("/sleep?level=1", "/wake_up"):
            if (
                os.environ.get("VLLM_SERVER_DEV_MODE") != "1"
                or "--enable-sleep-mode" not in sys.argv
            ):
                return self.send(404, b"")
            STATE.write_text(json.dumps({**state, "asleep": self.path != "/wake_up"}))
            return self.send(200, b"{}")
        if state.get("asleep"):
            return self.send(500, b"asleep")
        if self.path != "/inference/v1/generate":
            return self.send(200, b"Success")
        if state["deaths"]:
            STATE.write_text(json.dumps({**state, "deaths": state["deaths"] - 1}))
            os._exit(1)
        (end,) = body["sampling_params"]["stop_token_ids"]
        ids = [
            t
            for token in body["token_ids"]
            for t in [token] * (16 if token == state["image"] else 1)
        ]
        choice = {"token_ids": [end], "finish_reason": "stop"}
        choice["logprobs"] = {"content": [{"token_id": end, "logprob": -1.0}]}
        return self.send(200, {"prompt_token_ids": ids, "choices": [choice]})


if __name__ == "__main__":
    STATE = Path(sys.argv[1])
    STATE.with_suffix(".environment").write_text(json.dumps(dict(os.environ)))
    state = json.loads(STATE.read_text())
    state["starts"] = state.get("starts", 0) + 1
    STATE.write_text(json.dumps(state))
    if state["starts"] in state.get("broken", ()):
        sys.exit("ValueError: no such model")
    port = int(sys.argv[sys.argv.index("--port") + 1])
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Mortal).serve_forever()
