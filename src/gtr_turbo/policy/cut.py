"""The teacher as an adapter: its change cut to a rank, for an engine that serves it beside the agent's.

The exact merge has no low rank (it elects and averages entry by entry), so the cut loses something, which is
counted. The exact teacher (`Weights.as_teacher`) does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gtr_turbo.checks import ConfigError
from gtr_turbo.merging.tensors import low_rank

FACTORS = ("lora_A", "lora_B")


class CutTeacher:
    """Factors of a rank for every layer that the merge changes, whose product is nearly its change.

    Attributes:
        rank: r.
        factors: by the name of the layer's weight: A (r, in) and B (out, r), float32 on the CPU.
    """

    def __init__(self, rank: int) -> None:
        """There is nothing until `take`."""
        self.rank = rank
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._squares: dict[str, tuple[float, float]] = {}

    def take(self, name: str, merged: Tensor, first: Tensor) -> None:
        """Cut the change of a layer; an earlier one of it is forgotten.

        Args:
            name: of the layer's weight.
            merged: (out, in) float32, the merge's change against the start, where the work is to be done.
            first: of that shape or (), what the start adds to the base.
        """
        change = merged + first
        a, b = low_rank(change, self.rank)
        lost = float((change - b @ a).square().sum(dtype=torch.float64))
        self._squares[name] = lost, float(merged.square().sum(dtype=torch.float64))
        self.factors[name] = a.cpu(), b.cpu()

    def change(self, name: str, device: torch.device) -> Tensor:
        """B A of a layer, (out, in) float32, on the device."""
        a, b = self.factors[name]
        return b.to(device) @ a.to(device)

    @property
    def energy(self) -> float:
        """Share of the squared norm of the merge's change that is kept; 1 while the merge is the start."""
        lost, whole = map(sum, zip(*self._squares.values(), strict=True))
        return max(0.0, 1 - lost / whole) if whole else 1.0

    def tensors(self) -> dict[str, Tensor]:
        """All factors as PEFT names them in `adapter_model.safetensors`, scale 1."""
        return {
            f"base_model.model.{name.removesuffix('weight')}{side}.weight": factor
            for name, pair in self.factors.items()
            for side, factor in zip(FACTORS, pair, strict=True)
        }

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes up."""
        squares = {
            f"squares:{name}": torch.tensor(pair, dtype=torch.float64)
            for name, pair in self._squares.items()
        }
        sides = {
            f"{side}:{name}": factor
            for name, pair in self.factors.items()
            for side, factor in zip(FACTORS, pair, strict=True)
        }
        return {**squares, **sides}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a teacher as it was cut; tensors of other names are not read.

        Raises:
            ConfigError: it was cut to another rank, or not at all.
        """
        names = [key.partition(":")[2] for key in state if key.startswith("squares:")]
        was = len(state[f"lora_A:{names[0]}"]) if names else None
        if was != self.rank:
            raise ConfigError(
                f"the checkpoint's teacher was kept with rollout.vllm.teacher_rank="
                f"{'null' if was is None else was}, and {self.rank} was given; resume with what it was"
            )
        for name in names:
            lost, whole = state[f"squares:{name}"].tolist()
            self._squares[name] = lost, whole
            self.factors[name] = state[f"lora_A:{name}"].clone(), state[f"lora_B:{name}"].clone()
