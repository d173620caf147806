"""The agent's weights: a vision-language model, adapters, a value head, and the teacher on top of it.

One set of weights is resident. The teacher is a set of replacement tensors for the parameters that
training changes; `Policy.as_teacher` puts them in place for a scoring pass and takes them out again,
bit for bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gtr_turbo.config import ModelConfig
from gtr_turbo.distributed import sharding
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.distributed.sharding import full, joined, local, part_of
from gtr_turbo.policy import starter
from gtr_turbo.policy.loading import add_adapters, is_vision, load, takes_features
from gtr_turbo.policy.processing import Processor
from gtr_turbo.turns.turn import Observed


class ValueHead(nn.Module):
    """MLP hidden -> 1024 -> 512 -> 1 with ReLU (RL4VLM), in float32."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        last = nn.Linear(512, 1)
        self.layers = nn.Sequential(
            nn.Linear(hidden_size, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), last
        )
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, D) -> (B,)."""
        values: Tensor = self.layers(hidden.float()).squeeze(-1)
        return values


class Policy(nn.Module):
    """A vision-language model that acts, with its critic and its teacher.

    Attributes:
        model: the `transformers` model (wrapped by `peft` if adapters are trained).
        processor: its tokenizer and image processor.
        value_head: the critic.
        temperature: of sampling; scoring divides the logits by it, so that what is optimised is what
            was sampled.
        ranks: the processes that train it.
        sharded: each rank keeps a part of the weights; `whole` puts all on every rank.
    """

    banned: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        temperature: float,
        seed: int = 0,
        ranks: Ranks = ALONE,
        shard: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.ranks, self.sharded, self._gathered = ranks, shard, False
        self.temperature = temperature
        base = load(config)
        self.processor = Processor(starter.model_folder(config.path), base.config.model_type)
        self.caches_features = config.vision == "frozen" and takes_features(base)
        self._plain = base
        torch.manual_seed(seed)
        self.model: Any = add_adapters(base, config) if config.train == "lora" else base
        if config.train == "full":
            for name, parameter in base.named_parameters():
                parameter.requires_grad_(config.vision == "trained" or not is_vision(name))
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.enable_input_require_grads()
        self.value_head = ValueHead(base.config.get_text_config().hidden_size)
        if shard:  # a frozen vision tower runs outside forward passes too, so it is not cut
            frozen = config.vision == "frozen"
            sharding.shard(base, config.device, lambda name: frozen and is_vision(name))
        self.to(torch.device(config.device))
        self.model.eval()
        self._start = None if config.train == "lora" else self._copy_trained()
        self._first_factors = self._copy_factors() if config.adapter else {}
        self._teacher: dict[str, Tensor] | None = None
        self._teacher_norm = 0.0
        self._hidden: list[Tensor] = []
        base.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        self._accepts = set(inspect.signature(base.forward).parameters)
        self._positions: dict[tuple[bytes, tuple[int, ...]], Tensor] = {}
        banned = torch.zeros(base.get_output_embeddings().weight.shape[0], dtype=torch.bool)
        banned[self.processor.banned_token_ids] = True
        self.register_buffer("banned", banned.to(self.device), persistent=False)

    # -- weights -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self._plain.parameters()).device
        return device

    def trained(self) -> dict[str, nn.Parameter]:
        """Parameters of the model (not of the critic) that training changes, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def _copy_trained(self) -> dict[str, Tensor]:
        return {
            n: local(p.detach()).to("cpu", torch.float32).clone() for n, p in self.trained().items()
        }

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside the block every rank has all weights, so each may make forward passes of its own; no gradients.

        Sharded weights can only be trained outside of it, by all ranks in step.
        """
        if not self.sharded or self._gathered:
            yield
            return
        sharding.gather(self._plain)
        self._gathered = True
        try:
            yield
        finally:
            self._gathered = False
            sharding.scatter(self._plain)

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Changes of the effective weights against the run's starting point, one tensor at a time.

        All ranks must take all of them, outside of `whole`.

        Yields:
            (name of the base model's parameter, float32 tensor on the CPU). With adapters the change of
            a layer is `scale * B @ A`, less that of the adapter the run began with (`model.adapter`);
            with full training it is the parameter minus its start.
        """
        if self._start is not None:
            for name, parameter in self.trained().items():
                part = local(parameter.detach()).to("cpu", torch.float32) - self._start[name]
                yield name, joined(part, parameter).cpu()
            return
        for name, layer in self._adapted():
            a, b = full(layer.lora_A["default"].weight), full(layer.lora_B["default"].weight)
            change = layer.scaling["default"] * (b.float() @ a.float())
            yield name, change.cpu() - self._first_change(name, layer)

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
            return torch.zeros(())
        a, b = self._first_factors[name]
        change: Tensor = layer.scaling["default"] * (b @ a)
        return change.cpu()

    def _adapted(self) -> Iterator[tuple[str, Any]]:
        for name, module in self._plain.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                yield f"{name}.weight", module

    @property
    def has_teacher(self) -> bool:
        """True once a teacher was loaded."""
        return self._teacher is not None

    @torch.no_grad()
    def load_teacher(self, change: Mapping[str, Tensor]) -> None:
        """Make `start + change` the teacher.

        Args:
            change: for every name that `deltas` yields, a float32 tensor on the CPU.

        Raises:
            KeyError: a name is missing or unknown.
        """
        # in a fixed order, so that a resumed run gets the same last digit
        self._teacher_norm = sum(float((change[n] ** 2).sum()) for n in sorted(change)) ** 0.5
        if self._start is not None:
            if set(change) != set(self._start):
                raise KeyError(
                    f"teacher tensors do not match: {sorted(set(change) ^ set(self._start))[:5]}"
                )
            trained, start = self.trained(), self._start
            self._teacher = {n: start[n] + part_of(change[n], trained[n]) for n in start}
            return
        layers = dict(self._adapted())
        if set(change) != set(layers):
            raise KeyError(f"teacher tensors do not match: {sorted(set(change) ^ set(layers))[:5]}")
        self._teacher = {
            name: start + part_of(change[name], layers[name].base_layer.weight)
            for name, start in self._adapted_start()
        }

    def _adapted_start(self) -> Iterator[tuple[str, Tensor]]:
        """Effective weights of the adapted layers when the run began: this rank's parts, float32 on the CPU."""
        for name, layer in self._adapted():
            base, first = layer.base_layer.weight.detach(), self._first_change(name, layer)
            yield name, local(base).float().cpu() + (part_of(first, base) if first.ndim else first)

    def _swapped_parameters(self) -> dict[str, nn.Parameter]:
        """What the teacher's tensors take the place of."""
        if self._start is not None:
            return self.trained()
        return {name: layer.base_layer.weight for name, layer in self._adapted()}

    def teacher_state(self) -> dict[str, Tensor]:
        """The teacher's tensors, exactly; all ranks must call it.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        if self._teacher is None:
            raise RuntimeError("there is no teacher yet: load_teacher() was never called")
        targets = self._swapped_parameters()
        state = {name: joined(part, targets[name]).cpu() for name, part in self._teacher.items()}
        return {**state, "norm": torch.tensor(self._teacher_norm, dtype=torch.float64)}

    def load_teacher_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `teacher_state` gave."""
        targets = self._swapped_parameters()
        self._teacher = {name: part_of(state[name], target) for name, target in targets.items()}
        self._teacher_norm = float(state["norm"])

    def teacher_distance(self) -> float:
        """Euclidean norm of the teacher's change against the run's starting point."""
        return self._teacher_norm

    def as_teacher(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the teacher's weights; after it with its own.

        The exchange is by copying into the parameters and back from an exact copy, tensor by tensor; no
        second model is on the device.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        if self._teacher is None:
            raise RuntimeError("there is no teacher yet: load_teacher() was never called")
        return self._swapped(self._teacher)

    def as_start(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the weights the run began with."""
        if self._start is not None:
            return self._swapped(self._start)
        with sharding.apart(self._plain, self._gathered):
            start = dict(self._adapted_start())
        return self._swapped(start)

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own: dict[str, Tensor] = {}
        try:
            with sharding.apart(self._plain, self._gathered), torch.no_grad():
                targets = {name: local(p) for name, p in self._swapped_parameters().items()}
                own = {name: part.to("cpu", copy=True) for name, part in targets.items()}
                for name, part in targets.items():
                    part.copy_(weights[name])
            adapted = self._start is None
            with self.whole(), self.model.disable_adapter() if adapted else nullcontext():
                yield
        finally:
            with sharding.apart(self._plain, self._gathered), torch.no_grad():
                for name, kept in own.items():
                    targets[name].copy_(kept)

    def save_student(self, path: Path) -> None:
        """Write the agent: a PEFT adapter folder, or a `transformers` folder with its processor.

        All ranks must call it; the first writes.
        """
        with self.whole():
            state = self._state(self.model)
            if self.ranks.first:
                self.model.save_pretrained(path, state_dict=state)
        if self.config.train == "full" and self.ranks.first:
            self.processor.save(path)

    def save_teacher(self, path: Path) -> None:
        """Write the teacher as a `transformers` folder with its processor.

        All ranks must call it; the first writes.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        with self.as_teacher():
            state = {
                name.replace(".base_layer", ""): tensor
                for name, tensor in self._state(self._plain).items()
                if "lora_" not in name
            }
            if self.ranks.first:
                self._plain.save_pretrained(path, state_dict=state)
        if self.ranks.first:
            self.processor.save(path)

    def _state(self, model: nn.Module) -> dict[str, Tensor]:
        """`state_dict` of a model whose weights are whole."""
        if self.sharded:
            return sharding.whole_state(model, self._plain)
        return dict(model.state_dict())

    # -- inputs --------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, frames: list[np.ndarray], prompts: list[str]) -> list[Observed]:
        """Tokenise observations; compute visual features once where the vision tower is frozen."""
        rows = self.processor.encode(frames, prompts)
        grids = [self.processor.grid(frame) if self.processor.native else None for frame in frames]
        features: list[Tensor] | list[None] = [None] * len(rows)
        if self.caches_features:
            features = self._encode_images(self.processor.image_inputs(frames))
        return [
            Observed(
                prompt_ids=ids,
                positions=self._prompt_positions(ids, grids[i]),
                frame=frames[i],
                features=features[i],
                grid=grids[i],
            )
            for i, ids in enumerate(rows)
        ]

    def _encode_images(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        out = self._plain.model.get_image_features(
            inputs["pixel_values"].to(self.device),
            inputs["image_grid_thw"].to(self.device),
            return_dict=True,
        )
        layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        return [
            torch.cat([layer[i] for layer in layers], -1) for i in range(len(out.pooler_output))
        ]

    def _prompt_positions(self, ids: Tensor, grid: Tensor | None) -> Tensor | None:
        """(3, P) rotary positions; the same layout is asked for again and again, so they are kept."""
        index = getattr(self._plain.model, "get_rope_index", None)
        if index is None or grid is None:
            return None
        kinds = (ids == self.processor.image_token_id).int()
        key = (kinds.numpy().tobytes(), tuple(grid.flatten().tolist()))
        if key not in self._positions:
            if len(self._positions) > 4096:
                self._positions.clear()
            self._positions[key] = index(ids[None], kinds[None], image_grid_thw=grid)[0][:, 0]
        return self._positions[key]

    def image_arguments(self, observed: list[Observed] | tuple[Observed, ...]) -> dict[str, Any]:
        """Keyword arguments of a forward pass that carry the images of `observed`."""
        if observed[0].features is None:
            inputs = self.processor.image_inputs([o.frame for o in observed])
            return {key: value.to(self.device) for key, value in inputs.items()}
        from transformers.models.qwen3_vl.modeling_qwen3_vl import (
            BaseModelOutputWithDeepstackFeatures,
        )

        size = self._plain.config.get_text_config().hidden_size
        layers = [o.features.split(size, -1) for o in observed if o.features is not None]
        first, *deep = zip(*layers, strict=True)
        # tuples of tensors, though the class says tensors: the model concatenates them
        images: Any = {"pooler_output": tuple(first), "deepstack_features": list(map(tuple, deep))}
        output = BaseModelOutputWithDeepstackFeatures(**images)
        grid = torch.cat([o.grid for o in observed if o.grid is not None]).to(self.device)
        return {"mm_encoder_outputs": {"image": output}, "image_grid_thw": grid}

    def _keep_hidden(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self._hidden.append(arguments[0])

    def forward_hidden(self, **arguments: Any) -> tuple[Any, Tensor]:
        """One forward pass; returns its output and the hidden states (B, kept, D) behind its logits."""
        if "mm_token_type_ids" in self._accepts and "image_grid_thw" in arguments:
            kinds = (arguments["input_ids"] == self.processor.image_token_id).int()
            arguments["mm_token_type_ids"] = kinds
        self._hidden.clear()
        output = self._plain(**arguments)
        hidden = self._hidden.pop()
        return output, hidden

    def policy_logits(self, logits: Tensor, temperature: float | None = None) -> Tensor:
        """Float32 logits of the policy: banned tokens at -inf, divided by the sampling temperature."""
        logits = logits.float().masked_fill(self.banned, -torch.inf)
        return logits / (self.temperature if temperature is None else temperature)
