"""How many turns go through the model at once: a number given, or what the device's free memory holds.

The gradient of a minibatch does not depend on it: every turn's loss is divided by the turns of the whole
minibatch, so a minibatch that ran out of memory is made again in smaller parts, by all ranks in the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from gtr_turbo.config import PPOConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.distributed.sharding import local
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Observed

T = TypeVar("T")

ON_CPU = 64
"""What `auto` is on a CPU, where there is nothing to measure."""
PROBE = 4
"""Turns of the larger of the two passes that are measured."""
USED = 0.9
"""Share of the free memory that is planned with: blocks of the allocator do not fit without gaps."""


class Meter(Protocol):
    """Memory of a device, in bytes."""

    def start(self) -> None:
        """From here on the peak counts."""
        ...

    def peak(self) -> int:
        """The most that was held since `start`, beyond what was held then."""
        ...

    def free(self) -> int:
        """What tensors could still take."""
        ...


class CudaMeter:
    """Memory of a CUDA device, as torch's allocator counts it."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before = device, 0

    def start(self) -> None:
        """From here on the peak counts."""
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """The most that was held since `start`, beyond what was held then."""
        return torch.cuda.max_memory_allocated(self._device) - self._before

    def free(self) -> int:
        """Free on the device, and reserved by the allocator but unused."""
        free: int = torch.cuda.mem_get_info(self._device)[0]
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(
            self._device
        )
        return free + unused


def fitting(*, one: int, several: int, probe: int, room: float, most: int) -> int:
    """Turns that fit, in equal parts of `most`.

    Memory is taken as fixed + turns * each, through two measured points.

    Args:
        one: bytes that a pass over one turn took.
        several: bytes that a pass over `probe` turns took.
        probe: at least 2.
        room: bytes there are.
        most: turns of a minibatch.
    """
    each = max(1.0, (several - one) / (probe - 1))
    turns = int(min(most, max(1.0, 1 + (room - one) / each)))
    return -(-most // -(-most // turns))


class Microbatch:
    """The size of micro-batches, which shrinks where the device is too small.

    Attributes:
        turns: the size now, the same on all ranks.
    """

    def __init__(
        self,
        config: PPOConfig,
        note: Callable[[str], None],
        meter: Meter | None = None,
        *,
        ranks: Ranks = ALONE,
        sharded: bool = False,
    ) -> None:
        """Begin with the number given; `auto` begins with that of a CPU and is measured once, by `meter`."""
        given = config.microbatch_turns
        self._most = config.minibatch_turns
        self.turns = min(ON_CPU, self._most) if given == "auto" else given
        self._meter = meter if given == "auto" else None
        self._note, self._ranks, self._sharded = note, ranks, sharded

    def measure(
        self, policy: Policy, observed: Sequence[Observed], length: int, *, moments: bool = False
    ) -> None:
        """Once, for `auto` on a GPU: the longest prompts with replies of `length` tokens, forward and backward.

        Room is kept for Adam's two moments, which the first optimizer step makes, unless they are there (`moments`:
        a resumed run has them). Ranks take the least that one of them has room for.

        Raises:
            torch.OutOfMemoryError: of sharded weights, whose passes all ranks make together.
        """
        meter, self._meter = self._meter, None
        if meter is None:
            return
        longest = sorted(observed, key=lambda o: len(o.prompt_ids), reverse=True)[:PROBE]
        reply = torch.full((length,), policy.processor.end_token_id)

        def took(turns: int) -> int:
            meter.start()
            inputs = make_inputs(longest[:turns], [reply] * turns, policy.processor.pad_token_id)
            score(policy, inputs).logprobs.sum().backward()
            return meter.peak()

        policy.model.train()
        try:
            took(1)  # makes the gradients' memory
            one = took(1)
            adam = 0 if moments else 2 * sum(local(p).nbytes for p in policy.trained().values())
            room = USED * meter.free() - adam
            self.turns = 1
            if len(longest) > 1:
                several = took(len(longest))
                self.turns = fitting(
                    one=one, several=several, probe=len(longest), room=room, most=self._most
                )
        except torch.OutOfMemoryError as error:
            if self._sharded:
                raise self._too_little() from error
            self.turns = 1
        finally:
            policy.model.eval()
            policy.zero_grad(set_to_none=True)
        self.turns = -int(self._ranks.largest(-self.turns))

    def attempt(self, work: Callable[[int], T]) -> T:
        """`work` with the size; where memory does not suffice, all ranks from its beginning with half of it.

        Unless the weights are sharded, `work` must not talk to other ranks.

        Raises:
            torch.OutOfMemoryError: not even one turn fits, or the weights are sharded: the other ranks wait in the
                middle of a pass then.
        """
        while True:
            done: list[T] = []
            try:
                done.append(work(self.turns))
            except torch.OutOfMemoryError as error:
                if self._sharded:
                    raise self._too_little() from error
                if self.turns == 1:
                    raise
            if not self._ranks.largest(float(not done)):
                return done[0]
            self.turns //= 2  # outside the handler, which holds the frames and their tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._note(f"out of device memory: micro-batches are {self.turns} turns from here on")

    def _too_little(self) -> torch.OutOfMemoryError:
        return torch.OutOfMemoryError(
            f"rank {self._ranks.rank} is out of device memory with {self.turns} turns a pass, and sharded weights "
            "cannot make one again: set ppo.microbatch_turns to a smaller number and go on with --resume"
        )
