"""vLLM as a rank reaches it: requests that outlast outages, and the adapters that it must know."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtr_turbo.config import TrainConfig
from gtr_turbo.distributed.ranks import Ranks
from gtr_turbo.policy.vllm_http import Client, EngineError, OutageError, UnknownAdapterError
from gtr_turbo.policy.vllm_inprocess import Resident, ResidentClient
from gtr_turbo.policy.vllm_server import Server, last_words


class Link:
    """The rank's own server or engine, or a server that was there and that other ranks may speak to as well.

    Adapters have names that tell their content, so ranks that share a server share equal adapters. One that is
    replaced is unloaded by whoever is first to replace it: by then no rank writes with it any more, as an update
    lies between, in which all ranks wait for each other.

    Attributes:
        client: who is spoken to; None before the start.
        server: what is started and stopped; None for a server that was there.
        restarts: how often it was started anew.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        lora_rank: int,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Nothing is started or sent yet.

        Args:
            config: of the run.
            ranks: an own vLLM sees the GPU of its rank only, if the device has a number.
            lora_rank: the largest of the adapters.
            folder: of an own vLLM's log.
            note: told of outages that are outlasted.

        Raises:
            ConfigError: vLLM is not installed, or takes no adapter of this rank.
        """
        self._config, self._note = config.rollout.vllm, note
        self.address = self._config.address(ranks.rank, ranks.world)
        self.server: Server | Resident | None = None
        self.client: Client | ResidentClient | None = None
        self.restarts = 0
        self._answered = False
        self._adapters: dict[str, Path] = {}
        if self.address is None:
            kind = Server if self._config.mode == "server" else Resident
            gpu = torch.device(ranks.device).index
            self.server = kind(config.model, self._config, lora_rank, folder, gpu)
        else:
            self.client = Client(self.address, self._config.timeout_s)

    def load(self, name: str, path: Path) -> None:
        """Let vLLM know an adapter, now and whenever it is started anew. Raises as `insist`."""
        self._adapters[name] = path
        self.insist([lambda: self._load(name)])

    def unload(self, name: str) -> None:
        """Let vLLM forget an adapter."""
        del self._adapters[name]
        if self.client is not None:
            self.client.unload_adapter(name)

    def _load(self, name: str) -> None:
        assert self.client is not None
        self.client.load_adapter(name, str(self._adapters[name]))

    def generate(
        self, name: str, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Any]
    ) -> Any:
        """What `read` makes of the answer that the adapter `name` writes; once, for `insist` to repeat."""
        assert self.client is not None
        return read(self.client.generate({**body, "model": name}))

    def sleep(self, *, asleep: bool) -> None:
        """Let vLLM sleep or wake up. Raises as `insist`."""

        def turn() -> None:
            assert self.client is not None
            if asleep:
                self.client.sleep()
            else:
                self.client.wake_up()

        self.insist([turn])

    def insist(self, tasks: Sequence[Callable[[], Any]]) -> list[Any]:
        """Results of requests, in order; those that fail for a while are repeated, with vLLM mended.

        Raises:
            EngineError: it stays so, or one is refused.
        """
        if self.client is None:
            assert self.server is not None
            self.client = self.server.start()
        found: dict[int, Any] = {}
        outages: list[OutageError] = []
        for attempt in range(self._config.retries + 1):
            left = [i for i in range(len(tasks)) if i not in found]
            if not left:
                break
            if outages:
                self._mend(outages, attempt - 1)
            with ThreadPoolExecutor(min(len(left), self._config.concurrency)) as pool:
                futures = {i: pool.submit(tasks[i]) for i in left}
            outages = []
            for i, future in futures.items():
                try:
                    found[i] = future.result()
                    self._answered = True
                except OutageError as outage:
                    outages.append(outage)
        if not outages:
            return [found[i] for i in range(len(tasks))]
        own = f"the run's own vLLM ({self.server.log})" if self.server is not None else None
        raise EngineError(
            f"no usable answer from {own or self.address} after {self._config.retries + 1} tries: {outages[-1]}. "
            "Then go on with --resume (without it, if there is no checkpoint yet)"
        )

    def _mend(self, outages: list[OutageError], attempt: int) -> None:
        """Do what can be done before the next try: start a dead or silent vLLM anew, load adapters, wait."""
        self._note(f"vLLM: {outages[-1]}; trying again")
        assert self.client is not None
        time.sleep(self._config.backoff_s * 2**attempt)
        if self.server is not None and not (self.server.alive and self.client.healthy()):
            self.client = self._started_anew(self.server)
        elif not self._back() and not any(
            isinstance(outage, UnknownAdapterError) for outage in outages
        ):
            return
        for name in self._adapters:
            try:
                self._load(name)
            except OutageError as outage:
                self._note(f"vLLM: {outage}; trying again")

    def _started_anew(self, server: Server | Resident) -> Client | ResidentClient:
        """Start it as often as is left; raises EngineError when nothing is."""
        while self.restarts < self._config.restarts:
            self.restarts += 1
            server.stop()
            try:
                return server.start()
            except EngineError as error:  # what died may hold the GPU's memory for a while
                self._note(f"vLLM: {error}; starting it again")
                time.sleep(self._config.backoff_s)
        raise EngineError(
            f"vLLM died {self.restarts + 1} times (rollout.vllm.restarts={self._config.restarts}): "
            f"{last_words(server.log)}"
        )

    def _back(self) -> bool:
        """Wait for a server that answered before and is gone; whether it came back, without our adapters."""
        assert self.client is not None
        if self.server is not None or not self._answered or self.client.healthy():
            return False
        self._answered = False  # it is waited for once
        self._note(
            f"vLLM: waiting up to {self._config.startup_s:g} s for {self.address} to come back"
        )
        deadline = time.monotonic() + self._config.startup_s
        while time.monotonic() < deadline:
            time.sleep(self._config.backoff_s)
            if self.client.healthy():
                return True
        return False

    def close(self) -> None:
        """Stop an own vLLM; let another one forget the adapters."""
        if self.server is not None:
            self.server.stop()
        for name in list(self._adapters):
            if self.server is None:
                self.unload(name)
        self.client = None


def content_name(what: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A name for an adapter's content: no other is ever loaded under it, so no cache can mix them up.

    Args:
        what: whose it is (the name begins with the first word), and all that the tensors do not tell.
        tensors: by name.
    """
    digest = hashlib.sha256(what.encode())
    for name, tensor in sorted(tensors):
        digest.update(name.encode())
        # a copy: memory that numpy has seen cannot be freed when gathered weights are cut again
        data = tensor.detach().cpu().clone().contiguous().flatten()
        digest.update(data.view(torch.uint8).numpy().tobytes())
    return f"{what.partition(' ')[0]}-{digest.hexdigest()[:16]}"
