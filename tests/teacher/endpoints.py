"""A real HTTP server on loopback that misbehaves by script, and otherwise corrects with the exact solver."""

import json
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

import solver_corrector

from gtr_turbo.teaching_config import BudgetConfig, ExternalConfig


class Scripted(solver_corrector.Handler):
    """Each request for a completion takes the next fault of the script; "ok" and the end answer properly."""

    def do_POST(self):  # noqa: N802 - http.server's name
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.keys.append(self.headers.get("Authorization"))
            fault = server.script.pop(0) if server.script else server.after
        fault = server.special(body) or fault
        if fault == "ok":
            message = solver_corrector.complete(body)
            answer = solver_corrector.completion(body, message)
            self.reply(200, answer)
        elif fault == "drop":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
            self.close_connection = True
        elif fault == "slow":
            server.wake.wait(5)
            self.close_connection = True
        elif fault == "drip":  # a header, then byte after byte: never silent for long
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
            with suppress(OSError):
                for _ in range(80):
                    self.wfile.write(b"x")
                    server.wake.wait(0.05)
            self.close_connection = True
        elif fault == "html":
            self.send(200, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
        elif fault == "garbage":
            self.send(200, b'{"choices": [', {"Content-Type": "application/json"})
        elif isinstance(fault, tuple):
            status, headers, error = fault
            if isinstance(error, bytes):
                self.send(status, error, {"Content-Type": "text/html", **headers})
                return
            error = error if isinstance(error, dict) else {"message": error}
            data = json.dumps({"error": error}).encode()
            self.send(status, data, {"Content-Type": "application/json", **headers})
        else:
            self.reply(200, fault)

    def send(self, status, data, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def endpoint(*script, after="ok", handler=Scripted, special=lambda body: None):
    """A running server; `requests` are the bodies it got, `keys` the Authorization headers.

    `special` gives the fault of a request whose body asks for one, whatever the script says.
    """
    server = solver_corrector.serve(handler=handler)
    server.script, server.after, server.lock = list(script), after, threading.Lock()
    server.special = special
    server.requests, server.keys, server.wake = [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.wake.set()
        server.shutdown()
        server.server_close()
        thread.join()


def settings(server, **changes):
    """Settings for a server, quick and one at a time."""
    budget = BudgetConfig(**changes.pop("budget", {}))
    defaults = {
        "base_url": server.url,
        "key_variable": None,
        "concurrency": 1,
        "backoff_s": 0.001,
        "retries": 1,
    }
    return ExternalConfig(budget=budget, **{**defaults, **changes})


def says(content, **message):
    """A chat completion with that content."""
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": "stop"}]}
