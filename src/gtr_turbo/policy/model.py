"""The agent's weights: a vision-language model, adapters, a value head, and the teacher on top of it.

One set of weights is resident. The teacher is a set of replacement tensors for the parameters that
training changes; `Policy.as_teacher` puts them in place for a scoring pass and takes them out again,
bit for bit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gtr_turbo.config import ModelConfig
from gtr_turbo.policy import starter
from gtr_turbo.policy.loading import add_adapters, is_vision, load, takes_features
from gtr_turbo.policy.processing import Processor
from gtr_turbo.policy.swap import Mover, host_like
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
    """

    banned: Tensor

    def __init__(self, config: ModelConfig, *, temperature: float, seed: int = 0) -> None:
        super().__init__()
        self.config = config
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
        self.to(torch.device(config.device))
        self.model.eval()
        if config.dtype == "bfloat16":
            # adapters are float32, and without it their products take as long as those of the base
            torch.backends.cuda.matmul.allow_tf32 = True
        self.mover = Mover(self.device)
        self._start: dict[str, Tensor] | None = None
        if config.train == "full":
            self._start = host_like(self._exchanged())
            self.mover.copy((self._start[n], p) for n, p in self._exchanged().items())
        self._first_factors = self._copy_factors() if config.adapter else {}
        self._own: dict[str, Tensor] = {}
        self._teacher: dict[str, Tensor] | None = None
        self._teacher_norm = 0.0
        self._inside = False
        self._hidden: list[Tensor] = []
        self._columns: slice | None = None
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

    def _exchanged(self) -> dict[str, Tensor]:
        """What the teacher replaces: the trained parameters, or the base weights below the adapters."""
        if self.config.train == "full":
            return {name: parameter.detach() for name, parameter in self.trained().items()}
        return {name: layer.base_layer.weight.detach() for name, layer in self._adapted()}

    @torch.no_grad()
    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Changes of the effective weights against the run's starting point, one tensor at a time.

        Yields:
            (name of the base model's parameter, float32 tensor on the CPU). With adapters the change of
            a layer is `scale * B @ A`, less that of the adapter the run began with (`model.adapter`);
            with full training it is the parameter minus its start.
        """
        for name, change in self._changes():
            yield name, change.cpu()

    @torch.no_grad()
    def student_distance(self) -> float:
        """Euclidean norm of all `deltas`, computed where the weights are."""
        return math.sqrt(sum(float((change**2).sum()) for _, change in self._changes()))

    def _changes(self) -> Iterator[tuple[str, Tensor]]:
        """`deltas`, each made on the device."""
        if self._start is not None:
            for name, parameter in self._exchanged().items():
                yield name, parameter.float() - self._start[name].to(self.device)
            return
        for name, layer in self._adapted():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            change = layer.scaling["default"] * _product(b, a)
            yield name, change - self._first_change(name, layer)

    def _copy_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapter the run begins with, (A, B) by name; it counts as part of the starting point."""
        return {
            name: (
                layer.lora_A["default"].weight.detach().float().clone(),
                layer.lora_B["default"].weight.detach().float().clone(),
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

    @property
    def has_teacher(self) -> bool:
        """True once a teacher was loaded."""
        return self._teacher is not None

    @torch.no_grad()
    def load_teacher(self, change: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Make `start + change` the teacher, rounded once to the type of the weights.

        Args:
            change: for every name that `deltas` yields, a float32 tensor on the CPU; as pairs, they may be
                made one after the other.

        Raises:
            KeyError: a name is missing or unknown. There is no teacher then.
        """
        pairs = change.items() if isinstance(change, Mapping) else change
        if self._start is None:
            start, layers = self._keep_own(), dict(self._adapted())
        else:
            start, layers = self._start, {}
        teacher = self._teacher or host_like(self._exchanged())
        self._teacher = None
        squares: dict[str, float] = {}
        for name, tensor in pairs:
            if name not in start:
                raise KeyError(f"teacher tensors do not match: [{name!r}] is unknown")
            begun = start[name].float()
            if self._first_factors:
                begun = begun + self._first_change(name, layers[name]).cpu()
            teacher[name].copy_(begun + tensor)
            squares[name] = float((tensor**2).sum())
        if len(squares) < len(start):
            missing = sorted(set(start) - set(squares))
            raise KeyError(f"teacher tensors do not match: {missing[:5]} are missing")
        # in a fixed order, so that a resumed run gets the same last digit
        self._teacher_norm = sum(squares[name] for name in sorted(squares)) ** 0.5
        self._teacher = teacher

    def teacher_state(self) -> dict[str, Tensor]:
        """The teacher's tensors, exactly.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        if self._teacher is None:
            raise RuntimeError("there is no teacher yet: load_teacher() was never called")
        return {**self._teacher, "norm": torch.tensor(self._teacher_norm, dtype=torch.float64)}

    def load_teacher_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `teacher_state` gave."""
        self._teacher = self._teacher or host_like(self._exchanged())
        for name, tensor in self._teacher.items():
            tensor.copy_(state[name])
        self._teacher_norm = float(state["norm"])

    def teacher_distance(self) -> float:
        """Euclidean norm of the teacher's change against the run's starting point."""
        return self._teacher_norm

    def as_teacher(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the teacher's weights; after it with its own.

        The exchange is by copying into the parameters and back from an exact copy on the host; the device
        needs no memory for it. With adapters that copy is made once: a run never changes its base.

        Raises:
            RuntimeError: no teacher was loaded, or the weights are exchanged already.
        """
        if self._teacher is None:
            raise RuntimeError("there is no teacher yet: load_teacher() was never called")
        return self._swapped(self._teacher.items())

    def as_start(self) -> AbstractContextManager[None]:
        """Inside the block the model computes with the weights the run began with.

        With fresh adapters that is the base as it lies, and nothing is copied.
        """
        if self._start is not None:
            return self._swapped(self._start.items())
        return self._swapped(
            (name, layer.base_layer.weight.detach().float() + self._first_change(name, layer))
            for name, layer in self._adapted()
            if name in self._first_factors
        )

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
        own, now = self._keep_own(), self._exchanged()
        touched: list[str] = []

        def there() -> Iterator[tuple[Tensor, Tensor]]:
            for name, tensor in weights:
                touched.append(name)
                yield now[name], tensor

        self._inside = True
        try:
            self.mover.copy(there())
            with nullcontext() if self.config.train == "full" else self.model.disable_adapter():
                yield
        finally:
            self.mover.copy((now[name], own[name]) for name in touched)
            self._inside = False

    def save_student(self, path: Path) -> None:
        """Write the agent: a PEFT adapter folder, or a `transformers` folder with its processor."""
        self.model.save_pretrained(path)
        if self.config.train == "full":
            self.processor.save(path)

    def save_teacher(self, path: Path) -> None:
        """Write the teacher as a `transformers` folder with its processor.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        with self.as_teacher():
            if self.config.train == "full":
                self.model.save_pretrained(path)
            else:
                state = {
                    name.replace(".base_layer", ""): tensor
                    for name, tensor in self._plain.state_dict().items()
                    if "lora_" not in name
                }
                self._plain.save_pretrained(path, state_dict=state)
        self.processor.save(path)

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

    def _keep_hidden(
        self, module: nn.Module, arguments: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        if self._columns is None:  # the head by itself, on states of an earlier pass
            return None
        self._hidden.append(arguments[0])
        return (arguments[0][:, self._columns], *arguments[1:])

    def forward_hidden(
        self, *, columns: slice = slice(None), **arguments: Any
    ) -> tuple[Any, Tensor]:
        """One forward pass; returns its output and the hidden states (B, kept, D) behind its logits.

        The output has logits only in the given columns of those kept; the hidden states are all there.
        """
        if "mm_token_type_ids" in self._accepts and "image_grid_thw" in arguments:
            kinds = (arguments["input_ids"] == self.processor.image_token_id).int()
            arguments["mm_token_type_ids"] = kinds
        self._hidden.clear()
        self._columns = columns
        try:
            output = self._plain(**arguments)
        finally:
            self._columns = None
        return output, self._hidden.pop()

    def forward_states(self, **arguments: Any) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """One forward pass without its logits.

        Returns:
            (states (B, kept, S), hidden states (B, kept, D), function from states (N, S) to logits (N, V)).
            Qwen's logits are a linear map of the hidden states, which are the states then. Other models may
            do more to them, so their states are the logits, in the model's own type.
        """
        if self.processor.native:
            _, hidden = self.forward_hidden(columns=slice(0, 1), **arguments)
            return hidden, hidden, self._plain.get_output_embeddings()
        output, hidden = self.forward_hidden(**arguments)
        return output.logits, hidden, nn.Identity()

    def policy_logits(self, logits: Tensor, temperature: float | None = None) -> Tensor:
        """Float32 logits of the policy: banned tokens at -inf, divided by the sampling temperature."""
        logits = logits.float().masked_fill(self.banned, -torch.inf)
        return logits / (self.temperature if temperature is None else temperature)


def _product(b: Tensor, a: Tensor) -> Tensor:
    """B A in full float32, also where the adapters' own passes round their factors (TF32)."""
    rounds = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return b.float() @ a.float()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = rounds
