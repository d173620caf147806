"""What the processes of a run tell each other: sums, rows, records. A process that is alone tells nobody.

Numbers and bytes of JSON travel, never pickles. Every method must be called by all ranks, in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from gtr_turbo.checks import ConfigError
from gtr_turbo.distributed import launch as launching
from gtr_turbo.distributed.launch import Launch
from gtr_turbo.distributed.sharding import is_sharded

BUCKET = 1 << 24
"""Entries of gradients that are summed in one go; 64 MB of float32."""
CONTACT_S = 300.0
"""Longest wait for the other ranks at the start."""


class LostContact(RuntimeError):  # noqa: N818 - it says what happened
    """Another rank is gone, or did not answer in time."""


class Ranks:
    """The processes of a run.

    Attributes:
        rank: number of this process.
        world: how many there are.
        device: torch device of this process.
        sent_bytes: what this process has handed over to be summed, gathered or broadcast.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: str = "cpu") -> None:
        self.rank, self.world, self.device = rank, world, device
        self.sent_bytes = 0

    @property
    def first(self) -> bool:
        """True for the one process that writes files and shows the run."""
        return self.rank == 0

    @property
    def own_stream(self) -> tuple[int, ...]:
        """What this rank appends to the name of a stream of randomness that ranks must not share."""
        return (self.rank,) if self.rank else ()

    @contextmanager
    def _talk(self, tensor: Tensor) -> Iterator[None]:
        self.sent_bytes += tensor.nbytes
        try:
            yield
        except RuntimeError as error:
            raise LostContact(
                f"rank {self.rank} lost contact with the others: one ended without a word (killed for its "
                f"memory?), or was slower than distributed.timeout_s. Go on with --resume ({error})"
            ) from error

    # -- numbers -------------------------------------------------------------------------------

    def _reduce(self, tensor: Tensor, how: Any) -> Tensor:
        if self.world == 1:
            return tensor
        moved = tensor.to(self.device, copy=True).contiguous()
        with self._talk(moved):
            dist.all_reduce(moved, how)
        return moved.to(tensor.device)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on each."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def total(self, number: float) -> float:
        """The sum over the ranks."""
        return float(self.sum(torch.tensor(number, dtype=torch.float64)))

    def largest(self, number: float) -> float:
        """The largest over the ranks."""
        return float(self._reduce(torch.tensor(number, dtype=torch.float64), dist.ReduceOp.MAX))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the ranks' gradients in float32; FSDP2 has done so for sharded parameters.

        The loss must be divided by global counts. A parameter that has a gradient on no rank keeps none.
        """
        if self.world == 1:
            return
        whole = [p for p in parameters if not is_sharded(p)]
        there = self.sum(torch.tensor([float(p.grad is not None) for p in whole]))
        wanted = [p for p, count in zip(whole, there.tolist(), strict=True) if count]
        for bucket in _buckets(wanted):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([grad.float().flatten() for grad in grads])
            with self._talk(flat):
                dist.all_reduce(flat)
            for parameter, part in zip(
                bucket, flat.split([p.numel() for p in bucket]), strict=True
            ):
                parameter.grad = part.view_as(parameter).to(parameter.dtype)

    # -- rows of a batch -----------------------------------------------------------------------
    # A batch of shape (T, n) holds the turns of the n environments that this rank owns, environments
    # `rank * n` to `rank * n + n - 1` of N = world * n. Row t * N + e of the global batch is turn t of
    # environment e.

    def rows(self, shape: tuple[int, int]) -> Tensor:
        """(T * n,) numbers in the global batch of this rank's rows."""
        times, own = shape
        environments = self.rank * own + torch.arange(own)
        return (torch.arange(times)[:, None] * own * self.world + environments).flatten()

    def own_rows(self, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        """Of `rows` of the global batch those of this rank, in their order, as numbers in its own batch."""
        if self.world == 1:
            return rows
        every = shape[1] * self.world
        mine = rows[rows % every // shape[1] == self.rank]
        return mine // every * shape[1] + mine % every - self.rank * shape[1]

    def most_rows(self, rows: Tensor, shape: tuple[int, int]) -> int:
        """How many of `rows` of the global batch the rank has that has most of them."""
        owners = rows % (shape[1] * self.world) // shape[1]
        return int(owners.bincount(minlength=self.world).max())

    def gather_rows(self, tensor: Tensor, shape: tuple[int, int]) -> Tensor:
        """Rows of the global batch, on every rank, from each rank's own; widths (R) are padded with 0."""
        if self.world == 1:
            return tensor
        if tensor.ndim > 1:
            width = int(self.largest(tensor.shape[1]))
            tensor = nn.functional.pad(tensor, (0, width - tensor.shape[1]))
        parts = self._gather(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor)
        whole = torch.stack([part.view(*shape, *part.shape[1:]) for part in parts], 1)
        return whole.flatten(0, 2).to(tensor.dtype)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        moved = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(moved) for _ in range(self.world)]
        with self._talk(moved):
            dist.all_gather(parts, moved)
        return [part.to(tensor.device) for part in parts]

    # -- records -------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of each rank, on every rank, by rank."""
        if self.world == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [int(length) for length in self._gather(torch.tensor([len(data)]))]
        parts = self._gather(nn.functional.pad(data, (0, max(lengths) - len(data))))
        texts = zip(parts, lengths, strict=True)
        return [json.loads(part[:length].numpy().tobytes()) for part, length in texts]

    def from_first(self, value: Any) -> Any:
        """The first rank's JSON value, on every rank."""
        return self.gather(value if self.first else None)[0]

    def to_first(self, data: bytes) -> list[bytes]:
        """Bytes of each rank, by rank, on the first; nothing on the others."""
        if self.world == 1:
            return [data]
        lengths = [int(length) for length in self._gather(torch.tensor([len(data)]))]
        if not self.first:
            if data:
                moved = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
                with self._talk(moved):
                    dist.send(moved, 0)
            return []
        found = [data]
        for rank, length in enumerate(lengths[1:], 1):
            moved = torch.empty(length, dtype=torch.uint8, device=self.device)
            if length:
                with self._talk(moved[:0]):
                    dist.recv(moved, rank)
            found.append(moved.cpu().numpy().tobytes())
        return found

    def spread(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The first rank's float32 tensors, bit for bit, on every rank's device, one after the other.

        What the others give is not read. All ranks must take all of them.
        """
        if self.world == 1:
            yield from tensors
            return
        given = iter(tensors) if self.first else iter(())
        while True:
            name, own = next(given, (None, torch.empty(0)))
            name, shape = self.from_first([name, list(own.shape)])
            if name is None:
                return
            moved = (own if self.first else torch.empty(shape)).to(self.device).contiguous()
            with self._talk(moved):
                dist.broadcast(moved, 0)
            yield name, moved

    def agree(self, what: str, value: Any) -> None:
        """Check that a JSON value is the same everywhere.

        Raises:
            ConfigError: it is not.
        """
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        odd = [i for i, other in enumerate(self.gather(digest)) if other != digest]
        if odd:
            raise ConfigError(
                f"rank {self.rank} and rank {odd[0]} have different {what}; start all ranks with the same "
                "arguments, files and versions"
            )


ALONE = Ranks()
"""A run of one process."""


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in order, at most `BUCKET` entries together (a larger one is alone)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and size + parameter.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel()
    if bucket:
        yield bucket


_store: PrefixStore | None = None


def connect(place: Launch) -> None:
    """Get in touch with the other ranks of a job, so that an error is told once.

    Raises:
        ConfigError: the port is taken, or ranks are missing.
    """
    global _store
    if place.world == 1:
        return
    where = f"{os.environ.get('MASTER_ADDR', '')}:{os.environ.get('MASTER_PORT', '')}"
    if not all(where.split(":")):
        raise ConfigError(
            "MASTER_ADDR and MASTER_PORT must say where rank 0 is; start with torchrun"
        )
    try:
        limit = timedelta(seconds=CONTACT_S)
        store = next(iter(rendezvous("env://", place.rank, place.world, timeout=limit)))[0]
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise ConfigError(
                f"port {where.rpartition(':')[2]} is in use; give torchrun another --master-port, or "
                "--standalone, which finds a free one"
            ) from error
        raise ConfigError(
            f"rank {place.rank} of {place.world} found no others at {where}: {error}"
        ) from error
    _store = PrefixStore(f"gtr-turbo/{place.restarts}", store)
    launching.claim = _first_to_tell


def _first_to_tell() -> bool:
    assert _store is not None
    try:
        return int(_store.add("told", 1)) == 1
    except RuntimeError:  # the rank that kept the store is gone
        return True


@contextmanager
def join(place: Launch, device: str, timeout_s: float) -> Iterator[Ranks]:
    """Form the group of ranks; `device` is `model.device`.

    Raises:
        ConfigError: the device is not there for this rank.
    """
    if place.world == 1:
        yield Ranks(device=device)
        return
    assert _store is not None
    if device == "cpu":
        backend = "gloo"
    elif device == "cuda":
        backend, device = "nccl", f"cuda:{place.local_rank}"
        if place.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {place.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; "
                "lower --nproc-per-node"
            )
        torch.cuda.set_device(device)
    else:
        raise ConfigError(
            f"model.device={device!r} cannot be with several ranks: give cuda (each takes its own) or cpu"
        )
    dist.init_process_group(
        backend,
        store=_store,
        rank=place.rank,
        world_size=place.world,
        timeout=timedelta(seconds=timeout_s),
    )
    ranks = Ranks(place.rank, place.world, device)
    yield ranks  # after an error the process ends; to take leave of the others could hang
    ranks.total(0)  # nobody leaves before all are done
    dist.destroy_process_group()
