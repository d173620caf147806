"""An engine in a process of its own, watched: what hangs, dies or eats memory is killed and started anew.

The parent holds a `Worker`. It starts a fresh interpreter, not a fork, which runs `serve`: that imports an engine
and answers requests, one line of JSON each, over pipes. What the engine prints goes to a file, whose end is quoted
when it dies. A worker outlives its parent by no more than the time that its last request was given.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from gtr_turbo.envs.contract import ContractError

POLL = 0.1
"""Seconds between two looks at the memory of a worker that is busy."""
GRACE = 10.0
"""Seconds beyond its limit after which a worker whose parent is gone ends itself."""
MAX_ANSWER = 64_000_000
TOLD = 600
"""Characters of what an engine printed that an error quotes."""


class UnplayableError(Exception):
    """Raised by an engine: something is not installed, or the game cannot be played. Not tried again."""


class WorkerError(RuntimeError):
    """A worker failed and was killed: `crash`, `timeout`, `memory` or `error`, and the details."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker may take before it is killed."""

    start: float = 300.0
    """Seconds for the start of a process and its first game."""
    reset: float = 120.0
    """Seconds for each further game."""
    step: float = 60.0
    """Seconds for a command."""
    memory_mb: int = 4000
    """Resident memory of the worker and its children, in 10^6 bytes."""

    @staticmethod
    def of(given: Mapping[str, float]) -> Limits:
        """Limits from names and numbers.

        Raises:
            ContractError: a name is unknown, or a number is not positive and below a billion.
        """
        if not isinstance(given, Mapping):
            raise ContractError(
                f"Household: limits={given!r} must be a mapping of names to numbers"
            )
        known = [field.name for field in fields(Limits)]
        for name, value in given.items():
            if name not in known or isinstance(value, bool) or not isinstance(value, int | float):
                raise ContractError(
                    f"Household: limits={dict(given)!r} must give numbers for any of {', '.join(known)}"
                )
            if not 0 < value < 1e9:
                raise ContractError(
                    f"Household: limits.{name}={value} must be above 0 and below 1e9"
                )
        return Limits(**given)  # type: ignore[arg-type]


# -- in the parent ---------------------------------------------------------------------------------


def resident(pid: int) -> int:
    """Bytes of resident memory of a process and its descendants; 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [c for t in threads for c in (t / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") + sum(resident(int(child)) for child in children)


def _end(process: subprocess.Popen[bytes], printed: IO[bytes]) -> None:
    """Kill a process with all it started, and leave nothing open."""
    with contextlib.suppress(ProcessLookupError):  # all gone already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, printed):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # a request that was never read
                pipe.close()


class Worker:
    """A watched process with one engine.

    Args:
        engine: `MODULE:CLASS` of the engine; see `serve`.
        options: arguments of the class, JSON values.
        limits: beyond which it is killed.
    """

    def __init__(self, engine: str, options: Mapping[str, Any], limits: Limits) -> None:
        if not Path("/proc/self/statm").exists():
            raise ContractError(
                "Household: the memory of an engine's process is watched through /proc, which this "
                "system does not have; use Linux, or backend: native"
            )
        self._engine, self._options, self._limits = engine, dict(options), limits
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._buffer = b""

    @property
    def pid(self) -> int | None:
        """The process, if one runs."""
        return None if self._process is None else self._process.pid

    def reset(self, **request: Any) -> dict[str, Any]:
        """Start a game; after a fault once more, in a new process.

        Raises:
            ContractError: the second process failed too; or the engine is not installed, or cannot play the game.
        """
        try:
            return self._reset(request)
        except WorkerError as fault:
            warnings.warn(f"Household: {fault}; the game is started again", stacklevel=3)
        try:
            return self._reset(request)
        except WorkerError as fault:
            raise ContractError(
                f"Household: {fault}, a second time in a row at the start of a game, {request}. Leave "
                f"it out, or raise limits: {self._limits}"
            ) from fault

    def _reset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        seconds = self._limits.start
        if self._process is not None:
            seconds = self._limits.reset
            self._printed.truncate(self._printed.seek(0))  # the worker writes at the same position
        return self._ask({**request, "do": "reset"}, seconds)

    def step(self, command: str) -> dict[str, Any]:
        """Play a command.

        Raises:
            WorkerError: the process failed. The episode is lost; `reset` starts another process.
        """
        if self._process is None:
            raise WorkerError("crash: no process runs this game any more; reset the environment")
        return self._ask({"do": "step", "command": command}, self._limits.step)

    def close(self) -> None:
        """End the process."""
        if self._finalizer is not None:
            self._finalizer()
        self._process, self._finalizer, self._buffer = None, None, b""

    def _start(self) -> subprocess.Popen[bytes]:
        printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `_end`
        code = (
            f"from {__name__} import serve; serve({self._engine!r}, {json.dumps(self._options)!r})"
        )
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=printed,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # a group to kill, and no Ctrl-C from our terminal
        )
        self._finalizer = weakref.finalize(self, _end, process, printed)
        self._process, self._printed, self._buffer = process, printed, b""
        return process

    def _ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(
                json.dumps({**request, "seconds": seconds + GRACE}).encode() + b"\n"
            )
            process.stdin.flush()
            answer = json.loads(self._line(process, seconds))
        except BrokenPipeError:
            raise self._failed("crash") from None
        except ValueError:
            raise self._failed("error", "its answer is no JSON") from None
        except KeyboardInterrupt:  # its answer would be taken for that to the next request
            self.close()
            raise
        if not isinstance(answer, dict):
            raise self._failed("error", "its answer is no JSON object")
        if "unplayable" in answer:
            self.close()
            raise ContractError(f"Household: {answer['unplayable']}")
        if "error" in answer:
            raise self._failed("error", str(answer["error"]))
        return answer

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert process.stdout is not None
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = end - time.monotonic()
                if left <= 0:
                    raise self._failed("timeout", f"no answer within {seconds:g} s")
                if ready.select(min(left, POLL)):
                    part = os.read(process.stdout.fileno(), 1 << 16)
                    if not part:
                        raise self._failed("crash")
                    self._buffer += part
                    if len(self._buffer) > MAX_ANSWER:
                        raise self._failed("error", f"an answer of more than {MAX_ANSWER} bytes")
                elif (used := resident(process.pid)) > self._limits.memory_mb * 10**6:
                    raise self._failed("memory", self._too_much(used))
        if (used := resident(process.pid)) > self._limits.memory_mb * 10**6:
            raise self._failed("memory", self._too_much(used))
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _too_much(self, used: int) -> str:
        return f"{used / 1e6:.0f} MB, more than limits.memory_mb={self._limits.memory_mb}"

    def _failed(self, kind: str, what: str = "") -> WorkerError:
        """Kill the process and say why."""
        process = self._process
        assert process is not None
        if kind == "crash":
            try:
                code = process.wait(timeout=1)
                what = f"the process ended with {-code if code < 0 else code}"
                what += f" ({signal.Signals(-code).name})" if code < 0 else ""
            except subprocess.TimeoutExpired:
                what = "the process closed its pipe"
        self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, self._printed.tell() - TOLD))
        printed = " ".join(self._printed.read().decode(errors="replace").split())
        said = f"; it printed: ...{printed}" if printed and kind in ("crash", "error") else ""
        fault = WorkerError(f"{kind}: {what} (process {process.pid}, {self._engine}{said})")
        self.close()
        return fault


# -- in the worker ---------------------------------------------------------------------------------


def serve(engine: str, options: str) -> None:
    """Answer the parent's requests until it goes away. Runs in the worker.

    Args:
        engine: `MODULE:CLASS`. An object of the class has `reset(**request)` and `step(command)`, which return JSON
            objects, and may raise `UnplayableError`.
        options: arguments of the class, a JSON object.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the engine prints is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    played: Any = None
    for line in requests:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request.pop("seconds"))  # ends the process
        try:
            if played is None:
                module, _, name = engine.partition(":")
                played = getattr(importlib.import_module(module), name)(**json.loads(options))
            answer = getattr(played, request.pop("do"))(**request)
        except UnplayableError as error:
            answer = {"unplayable": str(error)}
        except Exception as error:  # whatever the engine raises, the parent is to know it
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
