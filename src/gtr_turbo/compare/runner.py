"""Runs of a comparison as processes of their own, so many at a time; a failed one does not lose the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gtr_turbo.compare.plan import Job, arguments
from gtr_turbo.report.page import write_whole
from gtr_turbo.settings import dump_config

GRACE = 60.0
"""Seconds that a run has to end after SIGTERM before it is killed."""

LONGEST_WHY = 300
"""Characters that are shown and kept of why a run failed."""

POLL = 0.1
"""Seconds between looks at the processes."""

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(slots=True)
class Attempts:
    """`attempts.jsonl`: each command that started runs, and when each process began and ended."""

    path: Path

    def write(self, job: Job, event: str, **more: Any) -> None:
        """Append a line on a run's process."""
        self._append(event, {"run": f"{job.variant.label}/seed{job.seed}"} | more)

    def call(self, **more: Any) -> None:
        """Append a line on a command that is about to start runs."""
        self._append("call", more)

    def _append(self, event: str, more: Mapping[str, Any]) -> None:
        line = {"event": event, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        with open(self.path, "a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line cut by a crash must not take this one with it
                    file.write(b"\n")
            file.write(json.dumps(line | dict(more)).encode() + b"\n")

    def calls(self) -> list[dict[str, Any]]:
        """What `call` wrote down: of each command that started runs, when, how, and on what."""
        texts = self.path.read_bytes().split(b"\n") if self.path.exists() else ()
        found = []
        for text in texts:
            with suppress(ValueError, RecursionError):  # a line cut by a crash
                line = json.loads(text)
                if isinstance(line, dict) and line.pop("event", None) == "call":
                    found.append(line)
        return found


@dataclass(slots=True)
class Runner:
    """Starts the jobs and waits for them.

    Use `run`; it can be interrupted (KeyboardInterrupt), and then stops what it started.
    """

    at_once: int
    threads: int
    attempts: Attempts
    say: Callable[[str], None]
    failures: dict[Path, str] = field(default_factory=dict)
    """Why a run failed, by its folder: exit code, and the last line of its log."""
    _running: dict[int, tuple[subprocess.Popen[bytes], Job, float]] = field(default_factory=dict)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs that are not finished; `failures` says which did not end well."""
        waiting = [job for job in jobs if job.state != "finished"]
        total, done = len(waiting), 0
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self.at_once:
                    self._start(waiting.pop(0))
                if (job := self._ended()) is None:
                    time.sleep(POLL)
                    continue
                done += 1
                failure = self.failures.get(job.folder)
                how = f"failed: {failure[:LONGEST_WHY]}" if failure else "finished"
                self.say(f"[{done}/{total}] {job.name}: {how}")
        except BaseException:
            self._stop()
            raise

    def _start(self, job: Job) -> None:
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        recipe = job.folder.parent / "settings.yaml"
        # whole: the run of another seed may be reading it
        write_whole(recipe, dump_config(job.variant.config).encode())
        source = ["--config", str(recipe), "--seed", str(job.seed)]
        if job.state == "unfinished":
            source = ["--resume", *arguments(job.variant.config)]
        command = [sys.executable, "-m", "gtr_turbo", "train", *source, "--run", str(job.folder)]
        with open(job.log, "ab") as log:
            process = subprocess.Popen(
                [*command, "--threads", str(self.threads)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C reaches this process only, which ends the runs in order
            )
        self._running[process.pid] = (process, job, time.monotonic())
        self.attempts.write(job, "start", how=job.state)
        how = f"goes on after update {job.update}" if job.state == "unfinished" else "started"
        self.say(f"{job.name}: {how}; its log is {job.log}")

    def _ended(self) -> Job | None:
        """A job whose process has ended, if one has; its end is written down."""
        for pid, (process, job, began) in self._running.items():
            if (code := process.poll()) is None:
                continue
            del self._running[pid]
            seconds = round(time.monotonic() - began, 3)
            self.attempts.write(job, "end", code=code, seconds=seconds)
            if code:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                self.failures[job.folder] = f"{how}: {last_line(job.log)}"
            return job
        return None

    def _stop(self) -> None:
        """End what runs: ask, wait, then kill. A second interrupt kills at once."""
        for pid in self._running:
            _send(pid, signal.SIGTERM)
        try:
            until = time.monotonic() + GRACE
            while self._running and time.monotonic() < until:
                if self._ended() is None:
                    time.sleep(POLL)
        finally:
            for pid in self._running:
                _send(pid, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    """A signal to a run's process; killing takes what the process started too."""
    with suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            os.killpg(pid, number)
        else:
            os.kill(pid, number)


def last_line(log: Path) -> str:
    """The last line of a log that says something, without control characters."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 8192))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return "no log"
    shown = ("".join(filter(str.isprintable, ESCAPES.sub("", line))).strip() for line in lines)
    said = [line for line in shown if line]
    return said[-1] if said else "the log is empty"
