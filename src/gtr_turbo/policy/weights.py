"""What training changes of a model: its trained parameters, how far they are from their start, and the teacher.

One set of weights is resident. The teacher is a set of replacement tensors for the parameters that training
changes; `Weights.as_teacher` puts them in place for a scoring pass and takes them out again, bit for bit. With
sharded weights each rank keeps and exchanges its own parts; changes are whole tensors on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gtr_turbo.config import ModelConfig
from gtr_turbo.distributed import sharding
from gtr_turbo.distributed.ranks import Ranks
from gtr_turbo.distributed.sharding import full, joined, local, part_of
from gtr_turbo.policy.adapters import fixed
from gtr_turbo.policy.cut import CutTeacher
from gtr_turbo.policy.loading import add_adapters, is_vision
from gtr_turbo.policy.swap import Mover, host_like


class Weights(nn.Module):
    """A model with the parameters that are trained, and its teacher.

    Attributes:
        model: the `transformers` model (wrapped by `peft` if adapters are trained).
        ranks: the processes that train it.
        sharded: each rank keeps a part of the weights; `whole` puts all on every rank.
        mover: copies weights between host and device.
        cut: the teacher as an adapter of rank `teacher_rank`; None if that is None.
    """

    def __init__(
        self,
        config: ModelConfig,
        base: Any,
        *,
        seed: int,
        ranks: Ranks,
        shard: bool,
        teacher_rank: int | None = None,
    ) -> None:
        """Take a model as `loading.load` gives it; `seed` is of fresh adapters."""
        super().__init__()
        self.config = config
        self.ranks, self.sharded, self._gathered = ranks, shard, False
        self._plain = base
        torch.manual_seed(seed)
        self.model: Any = add_adapters(base, config) if config.train == "lora" else base
        if config.train == "full":
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(config.vision == "trained" or not is_vision(name))
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        if shard:  # a frozen vision tower runs outside forward passes too, so it is not cut
            frozen = config.vision == "frozen"
            sharding.shard(base, config.device, lambda name: frozen and is_vision(name))
        self.model.to(torch.device(config.device))
        self.model.eval()
        self.mover = Mover(self.device)
        self._start: dict[str, Tensor] | None = None
        if config.train == "full":
            now = self._exchanged()
            self._start = host_like(now)
            self.mover.copy((self._start[name], tensor) for name, tensor in now.items())
        self._first_factors = self._copy_factors() if config.adapter else {}
        self._own: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] | None = None
        self._teacher_norm, self._teacher_lost = 0.0, 0.0
        self.cut = None if teacher_rank is None else CutTeacher(teacher_rank)
        self._inside = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self._plain.parameters()).device
        return device

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the model (not of the critic) that training changes, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block every rank has all weights, so each may make forward passes of its own; no gradients.

        Adapters must not change inside. Sharded weights can only be trained outside of it, by all ranks in step.
        """
        if not self.sharded or self._gathered:
            with fixed(self.model):
                yield
            return
        sharding.gather(self._plain)
        self._gathered = True
        try:
            with fixed(self.model):
                yield
        finally:
            self._gathered = False
            sharding.scatter(self._plain)

    def whole_state(self, model: nn.Module) -> dict[str, Tensor]:
        """`state_dict` of the model or of what it wraps, inside `whole`."""
        if self.sharded:
            return sharding.whole_state(model, self._plain)
        return dict(model.state_dict())

    # -- changes -------------------------------------------------------------------------------

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Changes of the effective weights against the run's starting point, one tensor at a time.

        All ranks must take all of them, outside of `whole`.

        Yields:
            (name of the base model's parameter, float32 tensor on the CPU). With adapters the change of
            a layer is `scale * B @ A`, less that of the adapter the run began with (`model.adapter`);
            with full training it is the parameter minus its start.
        """
        for name, change in self._changes():
            yield name, change.cpu()

    @torch.no_grad()
    def student_distance(self) -> float:
        """Euclidean norm of all `deltas`, computed where the weights are; all ranks must call it."""
        return math.sqrt(sum(float((change**2).sum()) for _, change in self._changes()))

    def _changes(self) -> Iterator[tuple[str, Tensor]]:
        """`deltas`, each made on the device."""
        if self._start is not None:
            for name, parameter in self._replaced().items():
                part = local(parameter).float() - self._start[name].to(self.device)
                yield name, joined(part, parameter)
            return
        for name, layer in self._adapted():
            a, b = full(layer.lora_A["default"].weight), full(layer.lora_B["default"].weight)
            yield name, self._change(name, layer, a, b)

    def _change(self, name: str, layer: Any, a: Tensor, b: Tensor) -> Tensor:
        change: Tensor = layer.scaling["default"] * _product(b, a)
        return change - self._first_change(name, layer)

    @torch.no_grad()
    def factors(self) -> Iterator[tuple[str, Tensor]]:
        """What `deltas` are made of, with adapters; all ranks must take all of them, outside of `whole`.

        Yields:
            (name as in `deltas`, (r, in + out) float32 tensor on the CPU: A beside the transpose of B).
        """
        for name, layer in self._adapted():
            a, b = full(layer.lora_A["default"].weight), full(layer.lora_B["default"].weight)
            yield name, torch.cat([a.cpu().float(), b.cpu().float().t()], 1)

    @torch.no_grad()
    def change_of(self, name: str, factors: Tensor) -> Tensor:
        """The change of a layer that `deltas` gave when `factors` gave these; float32, on the device."""
        layer = self._plain.get_submodule(name.removesuffix(".weight"))
        split = [layer.in_features, layer.out_features]
        a, b = factors.to(self.device).split(split, 1)
        # laid out as the adapter's own: a product of another layout may round otherwise
        return self._change(name, layer, a.contiguous(), b.t().contiguous())

    def _copy_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapter the run begins with, (A, B) by name; it counts as part of the starting point."""
        return {
            name: (
                full(layer.lora_A["default"].weight.detach()).float().clone(),
                full(layer.lora_B["default"].weight.detach()).float().clone(),
            )
            for name, layer in self._adapted()
        }

    def _first_change(self, name: str, layer: Any) -> Tensor:
        """What the adapter the run began with adds to a layer; 0 for fresh adapters, whose B is 0."""
        if name not in self._first_factors:
            return torch.zeros((), device=self.device)
        a, b = self._first_factors[name]
        change: Tensor = layer.scaling["default"] * _product(b, a)
        return change

    def _adapted(self) -> Iterator[tuple[str, Any]]:
        for name, module in self._plain.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                yield f"{name}.weight", module

    # -- the teacher ---------------------------------------------------------------------------

    def _replaced(self) -> dict[str, Tensor]:
        """What the teacher replaces: the trained parameters, or the base weights below the adapters."""
        if self.config.train == "full":
            return {name: parameter.detach() for name, parameter in self.trained().items()}
        return {name: layer.base_layer.weight.detach() for name, layer in self._adapted()}

    def _exchanged(self) -> dict[str, Tensor]:
        """The part of `_replaced` that this rank exchanges; outside of `whole`."""
        return {name: local(tensor) for name, tensor in self._replaced().items()}

    @property
    def has_teacher(self) -> bool:
        """True once a teacher was loaded."""
        return self._teacher is not None

    @torch.no_grad()
    def load_teacher(self, change: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Make `start + change` the teacher, rounded once to the type of the weights.

        The sums are made where the model is: at 7B they are 7 billion.

        Args:
            change: for every name that `deltas` yields, a float32 tensor, the same on all ranks; as pairs, they may
                be made one after the other.

        Raises:
            KeyError: a name is missing or unknown. There is no teacher then.
        """
        pairs = change.items() if isinstance(change, Mapping) else change
        if self._start is None:
            start, layers = self._keep_own(), dict(self._adapted())
        else:
            start, layers = self._start, {}
        replaced = self._replaced()
        teacher = self._teacher or host_like(self._exchanged())
        self._teacher = None
        squares: dict[str, float] = {}
        lost: dict[str, float] = {}
        for name, tensor in pairs:
            if name not in start:
                raise KeyError(f"teacher tensors do not match: [{name!r}] is unknown")
            tensor = tensor.to(self.device)
            begun, first = start[name].to(self.device).float(), torch.zeros(())
            if self._first_factors:
                first = self._first_change(name, layers[name])
                begun = begun + part_of(first, replaced[name])
            given = part_of(tensor, replaced[name])
            made = (begun + given).to(teacher[name].dtype)
            teacher[name].copy_(made)
            if given.dtype != made.dtype:  # beside what the start itself loses
                kept = made.float() - begun.to(made.dtype).float()
                lost[name] = float((given - kept).square().sum())
            if self.cut is not None:
                self.cut.take(name, tensor, first)
            squares[name] = float((tensor**2).sum())
        if len(squares) < len(start):
            missing = sorted(set(start) - set(squares))
            raise KeyError(f"teacher tensors do not match: {missing[:5]} are missing")
        # in a fixed order, so that a resumed run gets the same last digit
        self._teacher_norm = sum(squares[name] for name in sorted(squares)) ** 0.5
        total = sum(lost[name] for name in sorted(lost))
        self._teacher_lost = math.sqrt(self.ranks.total(total) if self.sharded else total)
        self._teacher = teacher

    def load_start(self) -> None:
        """Make the run's starting point the teacher."""
        self.load_teacher(
            (name, torch.zeros(tensor.shape, device=self.device))
            for name, tensor in self._replaced().items()
        )

    def teacher_state(self) -> dict[str, Tensor]:
        """The teacher's tensors, exactly; all ranks must call it.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        if self._teacher is None:
            raise RuntimeError("there is no teacher yet: load_teacher() was never called")
        replaced = self._replaced()
        state = {name: joined(part, replaced[name]).cpu() for name, part in self._teacher.items()}
        cut = {} if self.cut is None else self.cut.state()
        norms = torch.tensor([self._teacher_norm, self._teacher_lost], dtype=torch.float64)
        return {**state, **cut, "norms": norms}

    def load_teacher_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `teacher_state` gave.

        Raises:
            ConfigError: the teacher was cut to another rank.
        """
        if self.cut is not None:
            self.cut.load_state(state)
        self._teacher = self._teacher or host_like(self._exchanged())
        replaced = self._replaced()
        for name, tensor in self._teacher.items():
            tensor.copy_(part_of(state[name], replaced[name]))
        self._teacher_norm, self._teacher_lost = state["norms"].tolist()

    def teacher_distance(self) -> float:
        """Euclidean norm of the merge's change against the run's starting point."""
        return self._teacher_norm

    def teacher_rounding(self) -> float:
        """Norm of what rounding to the type of the weights took from that change, relative to it; 0 in float32."""
        return self._teacher_lost / self._teacher_norm if self._teacher_norm else 0.0

    def as_teacher(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the teacher's weights; after it with its own.

        The exchange is by copying into the parameters and back from an exact copy on the host; the device
        needs no memory for it. With adapters that copy is made once: a run never changes its base. All ranks
        must enter; inside, sharded weights are `whole`.

        Raises:
            RuntimeError: no teacher was loaded, or the weights are exchanged already.
        """
        if self._teacher is None:
            raise RuntimeError("there is no teacher yet: load_teacher() was never called")
        return self._swapped(self._teacher.items())

    def as_cut_teacher(self) -> AbstractContextManager[None]:
        """`as_teacher`, with the teacher as the adapter makes it."""
        assert self.cut is not None
        cut, device = self.cut, self.device
        return self._swapped(self._plus((name, cut.change(name, device)) for name in cut.factors))

    def as_start(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the weights the run began with.

        With fresh adapters that is the base as it lies, and nothing is copied.
        """
        if self._start is not None:
            return self._swapped(self._start.items())
        begun = self._first_factors
        return self._swapped(
            self._plus(
                (n, self._first_change(n, layer)) for n, layer in self._adapted() if n in begun
            )
        )

    def _plus(self, changes: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Base weights with changes added, this rank's parts; outside of `whole`."""
        bases = self._replaced()
        for name, change in changes:
            yield name, local(bases[name]).float() + part_of(change, bases[name])

    def _keep_own(self) -> dict[str, Tensor]:
        """The exact copy that the exchanged weights come back from."""
        now = self._exchanged()
        if self.config.train == "full" or not self._own:
            self._own = self._own or host_like(now)
            self.mover.copy((self._own[name], tensor) for name, tensor in now.items())
        return self._own

    @contextmanager
    def _swapped(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
        if self._inside:
            raise RuntimeError("the weights are exchanged already: as_teacher does not nest")
        own: dict[str, Tensor] = {}
        now: dict[str, Tensor] = {}
        touched: list[str] = []

        def there() -> Iterator[tuple[Tensor, Tensor]]:
            for name, tensor in weights:
                touched.append(name)
                yield now[name], tensor

        self._inside = True
        try:
            with sharding.apart(self._plain, self._gathered):
                own, now = self._keep_own(), self._exchanged()
                self.mover.copy(there())
            alone = nullcontext() if self.config.train == "full" else self.model.disable_adapter()
            with self.whole(), alone:
                yield
        finally:
            with sharding.apart(self._plain, self._gathered):
                self.mover.copy((now[name], own[name]) for name in touched)
            self._inside = False


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B A in float32."""
    return b.float() @ a.float()
