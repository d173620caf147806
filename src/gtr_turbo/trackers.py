"""Where metrics go beside `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.

They are copies for people to look at. One that is missing or cannot start is an error before the run;
one that fails later is dropped, and the run goes on. Keys come from the environment only.
"""

from __future__ import annotations

import contextvars
import functools
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

from gtr_turbo.checks import ConfigError, installed
from gtr_turbo.config import TrainConfig

CLOSING_S = 600.0
"""How long a run waits for a tracker to close; what was logged last may be on its way to a service."""


class Writer(Protocol):
    """Takes the metrics of an update; a metric may be in some rows only."""

    def write(self, row: Mapping[str, float]) -> None:
        """Write one row; `update` and `env_steps` are among its keys."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flush; `failed` tells that the run ends by an error or an interrupt."""
        ...


class TensorBoardWriter:
    """Event files for TensorBoard in the run's `tensorboard/` (extra `tensorboard`)."""

    def __init__(self, config: TrainConfig, run: Path, identity: str, resume: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if not resume:  # of an attempt that came to nothing
            shutil.rmtree(run / "tensorboard", ignore_errors=True)
        self._writer = SummaryWriter(str(run / "tensorboard"))

    def write(self, row: Mapping[str, float]) -> None:
        """One scalar per metric, over environment steps."""
        for name, number in _metrics(row).items():
            self._writer.add_scalar(name, number, int(row["env_steps"]))
        self._writer.flush()

    def close(self, *, failed: bool) -> None:
        """Flush and close."""
        self._writer.close()


class WandbWriter:
    """A run of Weights & Biases (extra `wandb`); its files are in the run's `wandb/`.

    WANDB_API_KEY, WANDB_MODE, WANDB_PROJECT and its other variables work as it documents them.
    """

    def __init__(self, config: TrainConfig, run: Path, identity: str, resume: bool) -> None:
        import wandb

        # silent, or it would ask for a key; and what is printed stays in the terminal
        quiet = wandb.Settings(silent=True, console="off")
        wandb.setup(settings=quiet)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "gtr-turbo",
            name=_name(run),
            id=identity,
            resume="allow",
            dir=str(run),
            config=asdict(replace(config, run=None)),
            settings=quiet,
        )

    def write(self, row: Mapping[str, float]) -> None:
        """One step, at the number of environment steps."""
        self._run.log(_metrics(row), step=int(row["env_steps"]))

    def close(self, *, failed: bool) -> None:
        """Send what is left, and whether the run is finished or failed."""
        self._run.finish(exit_code=int(failed))


class TrackioWriter:
    """A run of trackio (extra `trackio`), in its own database; TRACKIO_DIR says where."""

    def __init__(self, config: TrainConfig, run: Path, identity: str, resume: bool) -> None:
        import trackio

        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT") or "gtr-turbo",
            name=f"{_name(run)}-{identity}",
            config=asdict(replace(config, run=None)),
            resume="allow" if resume else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def write(self, row: Mapping[str, float]) -> None:
        """One step, at the number of environment steps."""
        self._run.log(_metrics(row), step=int(row["env_steps"]))

    def close(self, *, failed: bool) -> None:
        """Write what is left."""
        self._run.finish()


WRITERS: dict[str, Callable[[TrainConfig, Path, str, bool], Writer]] = {
    "tensorboard": TensorBoardWriter,
    "wandb": WandbWriter,
    "trackio": TrackioWriter,
}
"""By the name of the package, which is that of the extra and of the setting too."""


def _name(run: Path) -> str:
    """The folder's name; in a comparison, `VARIANT/seedN`, the variant's too."""
    run = run.resolve()
    return f"{run.parent.name}-{run.name}" if re.fullmatch(r"seed\d+", run.name) else run.name


def _metrics(row: Mapping[str, float]) -> dict[str, float]:
    return {name: number for name, number in row.items() if "/" in name}


def chosen(config: TrainConfig) -> tuple[str, ...]:
    """The trackers of a run; for `auto`, TensorBoard where it is installed.

    Raises:
        ConfigError: one that was asked for is not installed.
    """
    if config.trackers == "auto":
        return ("tensorboard",) if installed("tensorboard") else ()
    for name in config.trackers:
        if not installed(name):
            raise ConfigError(
                f"trackers: {name} is not installed: pip install 'gtr-turbo[{name}]', or take it off the list"
            )
    return tuple(config.trackers)


def _identity(run: Path, resume: bool) -> str:
    """The run's id at its trackers, kept in `trackers.json`, so that a resumed run goes on in the same place."""
    path = run / "trackers.json"
    if resume and path.exists():
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is damaged; remove it to start anew at the trackers"
            ) from error
    identity = secrets.token_hex(4)
    path.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity


class Trackers:
    """The trackers of a run.

    Attributes:
        failed: how many were dropped.
    """

    def __init__(
        self, config: TrainConfig, run: Path, tell: Callable[[str], None], *, resume: bool = False
    ) -> None:
        """Start them.

        Args:
            config: of the run; logged with it.
            run: its folder.
            tell: shows a line to a person: what failed, once for each tracker.
            resume: go on where the run's trackers stopped.

        Raises:
            ConfigError: one is not installed or does not start.
        """
        self._tell = tell
        self.failed = 0
        self._writers: dict[str, Writer] = {}
        names = chosen(config)
        identity = _identity(run, resume) if names else ""
        for name in names:
            try:
                self._writers[name] = WRITERS[name](config, run, identity, resume)
            except Exception as error:
                self.close(failed=True)
                raise ConfigError(
                    f"trackers: {name} did not start: {type(error).__name__}: {error}. Its account and address are "
                    "set by its environment variables (WANDB_MODE=offline needs none); or leave it out (--trackers "
                    "'[]' has none)"
                ) from error

    def write(self, row: Mapping[str, float]) -> None:
        """Give a row to all that are left."""
        for name, writer in list(self._writers.items()):
            self._guard(name, functools.partial(writer.write, row))

    def close(self, *, failed: bool = False) -> None:
        """Flush all that are left, and tell them if the run ends by an error or an interrupt.

        One that takes longer than `CLOSING_S` is left to the end of the process.
        """
        for name, writer in list(self._writers.items()):
            self._guard(
                name, functools.partial(_in_time, functools.partial(writer.close, failed=failed))
            )
        self._writers.clear()

    def _guard(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # whatever a tracker raises, the run is worth more
            del self._writers[name]
            self.failed += 1
            self._tell(
                f"{name} failed and is dropped for the rest of this run, which goes on: "
                f"{type(error).__name__}: {error}"
            )


def _in_time(act: Callable[[], None]) -> None:
    """Do it in a thread, which is given up after `CLOSING_S`.

    Raises:
        TimeoutError: it was given up.
        Exception: what it raised.
    """
    errors: list[Exception] = []

    def guarded() -> None:
        try:
            act()
        except Exception as error:
            errors.append(error)

    # with the context of this thread: trackio keeps its run there
    thread = threading.Thread(target=contextvars.copy_context().run, args=(guarded,), daemon=True)
    thread.start()
    thread.join(CLOSING_S)
    if thread.is_alive():
        raise TimeoutError(f"it did not close within {CLOSING_S} s")
    for error in errors:
        raise error
