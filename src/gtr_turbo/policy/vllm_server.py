"""A vLLM server that a run starts for itself, and stops; what it shares with an engine in the trainer's process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from gtr_turbo.checks import ConfigError, installed
from gtr_turbo.config import ModelConfig
from gtr_turbo.policy import starter
from gtr_turbo.policy.vllm_http import Client, EngineError
from gtr_turbo.vllm_config import VllmConfig

BASE = "base"
"""The name under which the model without adapters is served."""

TORCHRUN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip
"""Names that tell a process its place among the ranks, beside those that begin with TORCHELASTIC_."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes as --max-lora-rank."""

TETHER = (  # the server ends when the run does, a killed one included
    "import ctypes, os, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, 15)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


def engine_arguments(model: ModelConfig, config: VllmConfig, rank: int) -> list[str]:
    """What vLLM is started with, as a server or in the trainer's process.

    Raises:
        ConfigError: vLLM is not installed, or takes no adapter of this rank.
    """
    if config.python is None and not installed("vllm"):
        raise ConfigError(
            "rollout.engine='vllm' needs an extra: pip install 'gtr-turbo[vllm]'. To keep the environments apart, "
            "leave rollout.vllm.mode at server and name the Python of another one that has vLLM as "
            "rollout.vllm.python, or a server as rollout.vllm.base_url"
        )
    if rank > RANKS[-1]:
        raise ConfigError(f"vLLM serves adapters up to rank {RANKS[-1]}, got {rank}")
    return [
        "--model", starter.model_folder(model.path), "--served-model-name", BASE,
        "--dtype", model.dtype, "--max-model-len", str(config.max_model_len),
        "--gpu-memory-utilization", str(config.gpu_memory),
        "--limit-mm-per-prompt", '{"image": 1, "video": 0}',
        "--generation-config", "vllm",
        # the agent's and the teacher's side by side; while they are replaced, both of each are known
        "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "4",
        "--max-lora-rank", str(min(r for r in RANKS if r >= rank)),
        *(["--enable-sleep-mode"] if config.sleep else []),
        *config.arguments,
    ]  # fmt: skip


def own_environment(gpu: int | None) -> dict[str, str]:
    """The environment of a vLLM beside a rank, which is no rank itself: it would look for the others.

    Args:
        gpu: the one it sees, counted among those that this process sees; None: all.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    if gpu is not None:
        shown = kept.get("CUDA_VISIBLE_DEVICES")
        kept["CUDA_VISIBLE_DEVICES"] = shown.split(",")[gpu] if shown else str(gpu)
    return kept


def command(model: ModelConfig, config: VllmConfig, rank: int, port: int) -> list[str]:
    """What starts the server.

    Raises:
        ConfigError: as `engine_arguments`.
    """
    return [
        config.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--host", "127.0.0.1", "--port", str(port), "--enable-scale-out",
        *engine_arguments(model, config, rank),
    ]  # fmt: skip


def last_words(log: Path) -> str:
    """The end of a log, and where the rest is."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    said = [line for line in lines[-200:] if "Error" in line] or lines
    text = "".join(filter(str.isprintable, said[-1])) if said else "(it said nothing)"
    return f"{text[-300:]} ({log})"


class Server:
    """The process, on a free port of this machine.

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
        """Nothing is started yet.

        Args:
            model: what it serves.
            config: how.
            rank: the largest of the adapters.
            folder: of its log.
            gpu: as of `own_environment`.

        Raises:
            ConfigError: vLLM is not installed, or takes no adapter of this rank.
        """
        command(model, config, rank, 0)
        self._model, self._config, self._rank, self._gpu = model, config, rank, gpu
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Client:
        """Start it and wait until it is ready.

        Raises:
            EngineError: it ended, or was not ready in time; its last words are quoted.
        """
        port = _free_port()
        words = command(self._model, self._config, self._rank, port)
        environment = {
            "VLLM_NO_USAGE_STATS": "1",
            **own_environment(self._gpu),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            **({"VLLM_SERVER_DEV_MODE": "1"} if self._config.sleep else {}),  # has /sleep
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", TETHER, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        client = Client(f"http://127.0.0.1:{port}", self._config.timeout_s)
        deadline = time.monotonic() + self._config.startup_s
        try:
            while not client.healthy():
                if not self.alive:
                    raise EngineError(f"vLLM ended at its start: {last_words(self.log)}")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"vLLM was not ready within rollout.vllm.startup_s={self._config.startup_s:g} s: "
                        f"{last_words(self.log)}"
                    )
                time.sleep(0.2)
        except BaseException:  # interrupted ones too: no server is left behind
            self.stop()
            raise
        return client

    def stop(self) -> None:
        """End it, and the processes it started."""
        if self._process is None:
            return
        for how, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, how)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
                break
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers that outlived it
        self._process = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
