"""The run's own checkpoints, kept as what the merge needs of them: O(1) in their number, exact.

TIES keeps four sums per parameter (`RunningTies`), a linear merge one running mean. Both are float32:
rounded to bfloat16, most changes of an RL step would be zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gtr_turbo.merging.tensors import RunningTies
from gtr_turbo.teaching_config import TeacherConfig


class History:
    """Checkpoints of one run, merged on demand.

    Attributes:
        count: checkpoints added so far.
        zero_fraction: of the newest checkpoint's entries, how many are exactly as they were at the start.
    """

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.count = 0
        self.zero_fraction = 0.0
        self._ties: dict[str, RunningTies] = {}
        self._mean: dict[str, Tensor] = {}

    def merge_is_due(self, iteration: int) -> bool:
        """True after every `interval`-th update; iterations count from 0."""
        return (iteration + 1) % self.config.interval == 0

    def add(self, deltas: Iterable[tuple[str, Tensor]]) -> None:
        """Remember a checkpoint.

        Args:
            deltas: (name, float32 change against the run's starting point) of every merged tensor.
        """
        ema = self.config.weights == "ema"
        alpha = self.config.alpha if ema and self.count else 1.0
        zeros = size = 0
        for name, delta in deltas:
            size += delta.numel()
            if self.config.method == "ties":
                running = self._ties.setdefault(name, RunningTies(delta))
                if ema and self.count:
                    running.decay(1 - alpha)
                running.add(delta, alpha, density=self.config.density)
                zeros += running.zeros
                continue
            zeros += delta.numel() - int(delta.count_nonzero())
            if name in self._mean:
                step = alpha if ema else 1.0 / (self.count + 1)
                self._mean[name] += step * (delta - self._mean[name])
            else:
                self._mean[name] = delta.clone()
        self.count += 1
        self.zero_fraction = zeros / max(1, size)

    def merge(self) -> dict[str, Tensor]:
        """The merged change of every tensor.

        Raises:
            RuntimeError: nothing was added.
        """
        return dict(self.merged())

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """`merge`, one tensor after the other: at 7B all of them are 26 GB."""
        if not self.count:
            raise RuntimeError("there is nothing to merge: no checkpoint was added")
        for name, running in self._ties.items():
            yield name, running.merged()
        for name, mean in self._mean.items():
            yield name, mean.clone()

    def state(self) -> dict[str, Tensor]:
        """All tensors, by a name that says what they are."""
        sums = {
            f"{part}:{n}": t
            for n, running in self._ties.items()
            for part, t in running.sums.items()
        }
        means = {f"mean:{name}": tensor for name, tensor in self._mean.items()}
        return {"count": torch.tensor(self.count), **sums, **means}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self.count = int(state["count"])
        self._ties, self._mean = {}, {}
        for key, tensor in state.items():
            part, _, name = key.partition(":")
            if part == "mean":
                self._mean[name] = tensor.clone()
            elif name:
                self._ties.setdefault(name, RunningTies(tensor)).sums[part] = tensor.clone()
