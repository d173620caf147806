"""The run's own checkpoints, kept as what the merge needs of them; exact in both forms.

`History` keeps sums: for TIES four per parameter (`RunningTies`), for a linear merge one running mean, whatever
the number of checkpoints. `FactorHistory` keeps each checkpoint's LoRA factors and makes the same sums of them
at a merge, one layer after the other. All is float32: rounded to bfloat16, most changes of an RL step would be
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from gtr_turbo.merging.tensors import RunningTies
from gtr_turbo.merging.trim import Cut
from gtr_turbo.teaching_config import TeacherConfig


class History:
    """Checkpoints of one run, merged on demand.

    Attributes:
        count: checkpoints added so far.
        zero_fraction: of the newest checkpoint's entries, how many are exactly as they were at the start.
    """

    form = "sums"

    def __init__(self, config: TeacherConfig) -> None:
        self.config = config
        self.count = 0
        self.zero_fraction = 0.0
        self._ties: dict[str, RunningTies] = {}
        self._mean: dict[str, Tensor] = {}

    def merge_is_due(self, iteration: int) -> bool:
        """True after every `interval`-th update; iterations count from 0."""
        return (iteration + 1) % self.config.interval == 0

    def add(self, checkpoint: Iterable[tuple[str, Tensor]]) -> None:
        """Remember a checkpoint.

        Args:
            checkpoint: (name, float32 change against the run's starting point) of every merged tensor.

        Raises:
            FloatingPointError: a change is not finite.
        """
        zeros = size = 0
        for name, kept in checkpoint:
            entries, unmoved = self._keep(name, kept)
            size, zeros = size + entries, zeros + unmoved
        self.count += 1
        self.zero_fraction = zeros / max(1, size)

    def _keep(self, name: str, delta: Tensor) -> tuple[int, int]:
        """Remember a tensor; (its entries, those that are zero)."""
        if self.config.method != "ties" and not delta.isfinite().all():  # TIES looks for itself
            raise FloatingPointError("a checkpoint holds a number that is not finite")
        self.fold(name, delta, self.count)
        zeros = self._ties[name].zeros if name in self._ties else _zeros(delta)
        return delta.numel(), zeros

    def fold(self, name: str, delta: Tensor, k: int, cut: Cut | None = None) -> Cut | None:
        """Add a change of checkpoint k, counted from 0, to the sums; `cut` is its threshold, if known.

        Returns:
            The threshold, if the merge has any.
        """
        ema = self.config.weights == "ema"
        alpha = self.config.alpha if ema and k else 1.0
        if self.config.method == "ties":
            if not k:
                self._ties[name] = RunningTies(delta)
            running = self._ties[name]
            if ema and k:
                running.decay(1 - alpha)
            running.add(delta, alpha, density=self.config.density, cut=cut)
            return running.cut
        if k:
            step = alpha if ema else 1.0 / (k + 1)
            self._mean[name] += step * (delta - self._mean[name])
        else:
            self._mean[name] = delta.clone()
        return None

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
        """Take up what `state` gave.

        Raises:
            ValueError: it is of the other form.
        """
        self._check_form(state)
        self.count = int(state["count"])
        self._ties, self._mean = {}, {}
        for key, tensor in state.items():
            part, _, name = key.partition(":")
            if part == "mean":
                self._mean[name] = tensor.clone()
            elif name:
                self._ties.setdefault(name, RunningTies(tensor)).sums[part] = tensor.clone()

    def _check_form(self, state: Mapping[str, Tensor]) -> None:
        found = {key.partition(":")[0] for key in state} - {"count"}
        form = "factors" if "factors" in found else "sums"
        if found and form != self.form:
            raise ValueError(
                f"the run's history was kept as {form}, and is now to be kept as {self.form}; set "
                f"teacher.history to {form}"
            )


class FactorHistory(History):
    """Checkpoints of one run as LoRA factors: K times r (in + out) numbers a layer, not four times in * out.

    The changes are made of them at each merge, layer after layer, and go through the sums of `History` in the
    order of the checkpoints, so the merge has the same bits. Products and sums are made where `change_of` puts
    them. Thresholds are kept once found, but not saved: another device may round products otherwise.
    """

    form = "factors"

    def __init__(self, config: TeacherConfig, change_of: Callable[[str, Tensor], Tensor]) -> None:
        """`change_of` makes a layer's float32 change of its name and the factors that were added."""
        super().__init__(config)
        self._change_of = change_of
        self._factors: dict[str, list[Tensor]] = {}
        self._cuts: dict[str, list[Cut | None]] = {}

    def _keep(self, name: str, factors: Tensor) -> tuple[int, int]:
        change = self._change_of(name, factors)
        if not change.isfinite().all():
            raise FloatingPointError("a checkpoint holds a number that is not finite")
        self._factors.setdefault(name, []).append(factors)
        return change.numel(), _zeros(change)

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """`merge`, one layer after the other, where `change_of` makes changes."""
        if not self.count:
            raise RuntimeError("there is nothing to merge: no checkpoint was added")
        for name, checkpoints in self._factors.items():
            layer, cuts = History(self.config), self._cuts.setdefault(name, [])
            cuts += [None] * (len(checkpoints) - len(cuts))
            for k, factors in enumerate(checkpoints):
                cuts[k] = layer.fold(name, self._change_of(name, factors), k, cuts[k])
            layer.count = self.count
            yield name, layer.merge()[name]

    def state(self) -> dict[str, Tensor]:
        """All tensors, by checkpoint and layer."""
        factors = {
            f"factors:{k}:{name}": tensor
            for name, checkpoints in self._factors.items()
            for k, tensor in enumerate(checkpoints)
        }
        return {"count": torch.tensor(self.count), **factors}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave."""
        self._check_form(state)
        self.count = int(state["count"])
        self._factors, self._cuts = {}, {}
        for key, tensor in state.items():
            _, _, place = key.partition(":")
            k, _, name = place.partition(":")
            if name:
                checkpoints = self._factors.setdefault(name, [torch.empty(0)] * self.count)
                checkpoints[int(k)] = tensor.clone()


def _zeros(change: Tensor) -> int:
    return change.numel() - int(change.count_nonzero())
