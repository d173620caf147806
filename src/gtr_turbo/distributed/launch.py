"""What torchrun says of a process, and which process tells an error. Without torch: commands ask first."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from gtr_turbo.checks import ConfigError
from gtr_turbo.text import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The place of this process among those that were started together."""

    rank: int = 0
    """From 0 to `world` - 1."""
    local_rank: int = 0
    """The same, among the processes of this machine: which GPU is ours."""
    world: int = 1
    """Processes in all."""
    restarts: int = 0
    """How often torchrun has started the job again."""
    max_restarts: int = 0
    """How often it may."""


def launch() -> Launch:
    """Read torchrun's environment; a process that was started plainly is alone.

    Raises:
        ConfigError: the environment is incomplete or holds no numbers.
    """
    names = {
        "rank": "RANK",
        "local_rank": "LOCAL_RANK",
        "world": "WORLD_SIZE",
        "restarts": "TORCHELASTIC_RESTART_COUNT",
        "max_restarts": "TORCHELASTIC_MAX_RESTARTS",
    }
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Launch()
    given = {field: os.environ[name] for field, name in names.items() if name in os.environ}
    if not ({"rank", "world"} <= set(given) and all(text.isdigit() for text in given.values())):
        said = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names.values())
        raise ConfigError(
            f"the environment of several ranks is broken ({said}); start with torchrun"
        )
    found = Launch(**{field: int(text) for field, text in given.items()})
    if found.rank >= found.world:
        raise ConfigError(f"RANK={found.rank} must be below WORLD_SIZE={found.world}")
    return found


claim: Callable[[], bool] | None = None
"""Once the ranks are in touch (`ranks.connect`): True for the first that asks."""


def speaks() -> bool:
    """Whether this process tells what went wrong: with several ranks, the first to notice."""
    return claim is None or claim()


def tell(text: str) -> None:
    """Print to standard error, unless another rank has told why the run ends; control characters as escapes."""
    if speaks():
        print(*map(printable, text.split("\n")), sep="\n", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process; one of several ranks without taking Python down.

    torch's caches of sharded tensors keep gloo's threads alive beyond `destroy_process_group`. One that is late
    to free a tensor while Python is torn down aborts the process (pytorch#190489): torchrun tells of a failed job.
    """
    if claim is None:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
