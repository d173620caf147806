"""Settings of the vLLM engine; a group of `config.RolloutConfig`. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gtr_turbo.checks import ConfigError, not_negative, positive
from gtr_turbo.teaching_config import is_base_url

OURS = re.compile("--(model|served-model-name|host|port|uds|api-key|root-path|ssl-.*)")
"""Arguments that say what is served, where, and to whom: the run gives them, or asks in vain without."""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """vLLM, where it writes the replies (docs/vllm.md)."""

    _prefix = "rollout.vllm."

    mode: Literal["server", "inprocess"] = "server"
    """A server spoken to over HTTP, or an engine that the trainer itself holds."""
    base_url: str | tuple[str, ...] | None = None
    """Address of a server that runs, such as http://HOST:8000, or a list of several, which the ranks share out in
    their order; null starts one for each rank and stops it after."""
    python: str | None = None
    """Python of an environment that has vLLM, to start the server with; null is the trainer's own."""
    arguments: tuple[str, ...] = ()
    """Further arguments of the server or engine that is started, such as `--enforce-eager`."""
    gpu_memory: float = 0.4
    """Share of the GPU's memory that vLLM takes; the trainer needs the rest."""
    sleep: bool = False
    """Let vLLM, if it is the run's own, free that memory whenever no replies are written (GPU only)."""
    max_model_len: int = 4096
    """Tokens of prompt and reply that vLLM has room for."""
    teacher_rank: int | None = None
    """With `guidance.kind: sft`: vLLM writes the merge's thoughts, with its change cut to an adapter of this rank
    (`engine/teacher_energy` is what the cut keeps); null: the trainer writes them, with the exact merge."""
    concurrency: int = 64
    """Requests in flight."""
    startup_s: float = 900.0
    """How long vLLM may take to start, or one that answered before to come back."""
    timeout_s: float = 300.0
    """Of one request, from connecting to the last byte."""
    retries: int = 4
    """New tries for a request that got no usable answer."""
    backoff_s: float = 1.0
    """Pause before the first of them; it doubles each time."""
    restarts: int = 3
    """How often a run starts its own server or engine anew."""

    def __post_init__(self) -> None:
        positive(self, "max_model_len", "concurrency", "startup_s", "timeout_s", "backoff_s")
        not_negative(self, "retries", "restarts")
        if not 0 < self.gpu_memory <= 1:
            raise ConfigError(f"rollout.vllm.gpu_memory={self.gpu_memory} must be in (0, 1]")
        if self.mode == "inprocess" and (self.base_url is not None or self.python):
            raise ConfigError(
                "rollout.vllm.mode='inprocess' is vLLM in the trainer's own Python: leave rollout.vllm.base_url "
                "and rollout.vllm.python at null, or set the mode to server"
            )
        if self.sleep and self.base_url is not None:
            raise ConfigError(
                "rollout.vllm.sleep=true is for vLLM on the trainer's GPU: leave rollout.vllm.base_url at null, or "
                "set sleep to false"
            )
        for word in self.arguments:
            name = word.partition("=")[0]
            if OURS.fullmatch(name.replace("_", "-")):
                raise ConfigError(
                    f"rollout.vllm.arguments: {name} is the run's own; leave it out, or start a server yourself "
                    "and give its address as rollout.vllm.base_url (a key is read from VLLM_API_KEY)"
                )
        if self.teacher_rank is not None:
            positive(self, "teacher_rank")
        for url in self.addresses:
            if not is_base_url(url) or url.rstrip("/").endswith("/v1"):
                raise ConfigError(
                    "rollout.vllm.base_url must be http(s)://HOST[:PORT], or a list of such, without /v1, user, "
                    "password, query or fragment (a key is read from the environment variable VLLM_API_KEY)"
                )
        if self.base_url is not None and not self.base_url:
            raise ConfigError("rollout.vllm.base_url=[] names no server; give an address, or null")

    @property
    def addresses(self) -> tuple[str, ...]:
        """Of servers that run; none if each rank has its own."""
        return (self.base_url,) if isinstance(self.base_url, str) else self.base_url or ()

    def check_world(self, world: int) -> None:
        """Refuse servers that the ranks cannot share out evenly.

        Raises:
            ConfigError: says how many there are.
        """
        if self.addresses and world % len(self.addresses):
            raise ConfigError(
                f"rollout.vllm.base_url has {len(self.addresses)} addresses for {world} "
                f"{'rank' if world == 1 else 'ranks'}: their number must divide that of the ranks, such as one for "
                "all or one for each"
            )

    def address(self, rank: int, world: int) -> str | None:
        """The server of a rank; consecutive ranks have the same."""
        return self.addresses[rank * len(self.addresses) // world] if self.addresses else None
