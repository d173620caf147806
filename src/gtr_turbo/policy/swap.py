"""Weights that wait on the host, and their way to the device and back.

A teacher at 7B is 13 GB in bfloat16 and takes the place of the agent's base for a scoring pass. It waits in
page-locked memory in the parameters' own type, so the way in is one copy a tensor and needs no room on the
device beside the parameter itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

BLOCK = 2**30
"""Bytes that are page-locked at once: torch rounds each request up to a power of two, which would nearly
double a tensor just above one. A block of 1 GiB holds the tensors of several layers."""


def host_like(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Uninitialised tensors on the CPU, of the shapes and types of `tensors`, page-locked if those are on a GPU."""
    blocks: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not blocks or _space(tensor) > room:
            blocks.append([])
            room = BLOCK
        blocks[-1].append(name)
        room -= _space(tensor)
    found: dict[str, Tensor] = {}
    for names in blocks:
        size = sum(_space(tensors[name]) for name in names)
        pinned = any(tensors[name].is_cuda for name in names)
        block, at = torch.empty(size, dtype=torch.uint8, pin_memory=pinned), 0
        for name in names:
            like = tensors[name]
            found[name] = block[at : at + like.nbytes].view(like.dtype).view(like.shape)
            at += _space(like)
    return found


def _space(tensor: Tensor) -> int:
    """Bytes of a tensor, up to the next multiple of 64: each begins aligned."""
    return -(-tensor.nbytes // 64) * 64


class Mover:
    """Copies between host and device, timed.

    Attributes:
        seconds: spent copying since `take`.
        bytes: copied since `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds, self.bytes = 0.0, 0

    @torch.no_grad()
    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Copy into the first of each pair what the second holds; all are there when it returns."""
        self._wait()
        began = time.perf_counter()
        try:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                self.bytes += target.nbytes
        finally:
            self._wait()
            self.seconds += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """What was moved since the last call, by the names of docs/metrics.md."""
        told = {"time/swap": self.seconds, "system/swap_mb": self.bytes / 1e6}
        self.seconds, self.bytes = 0.0, 0
        return told

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
