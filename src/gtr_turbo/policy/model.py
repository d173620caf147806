"""The agent: a vision-language model with its critic, what it sees, and its forward passes.

Its trained weights and the teacher on top of them are in `weights`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.policy import starter
from gtr_turbo.policy.loading import load, takes_features
from gtr_turbo.policy.norms import fuse_norms
from gtr_turbo.policy.processing import QWEN, Processor
from gtr_turbo.policy.tower import attend_by_length
from gtr_turbo.policy.weights import Weights
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


class Policy(Weights):
    """A vision-language model that acts, with its critic and its teacher.

    Attributes:
        processor: the model's tokenizer and image processor.
        value_head: the critic.
        temperature: of sampling; scoring divides the logits by it, so that what is optimised is what
            was sampled.
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
        teacher_rank: int | None = None,
    ) -> None:
        base = load(config)
        if base.config.model_type not in QWEN and hasattr(base.model, "get_rope_index"):
            raise ConfigError(
                f"model.path={config.path!r} is a {base.config.model_type} with multimodal rotary positions, "
                f"which are made here for {', '.join(QWEN)} only"
            )
        attend_by_length(base)
        fuse_norms(base)
        super().__init__(
            config, base, seed=seed, ranks=ranks, shard=shard, teacher_rank=teacher_rank
        )
        self.temperature = temperature
        self.processor = Processor(starter.model_folder(config.path), base.config.model_type)
        self.caches_features = config.vision == "frozen" and takes_features(base)
        self.value_head = ValueHead(base.config.get_text_config().hidden_size).to(self.device)
        self._hidden: list[Tensor] = []
        self._columns: slice | None = None
        base.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        self._accepts = set(inspect.signature(base.forward).parameters)
        self._positions: dict[tuple[bytes, tuple[int, ...]], Tensor] = {}
        banned = torch.zeros(base.get_output_embeddings().weight.shape[0], dtype=torch.bool)
        banned[self.processor.banned_token_ids] = True
        self.register_buffer("banned", banned.to(self.device), persistent=False)

    # -- files ---------------------------------------------------------------------------------

    def save_student(self, path: Path, *, everywhere: bool = False) -> None:
        """Write the agent: a PEFT adapter folder, or a `transformers` folder with its processor.

        All ranks must call it; the first writes, or each does, to a folder of its own.
        """
        writes = everywhere or self.ranks.first
        with self.whole():
            state = self.whole_state(self.model)
            if writes:
                self.model.save_pretrained(path, state_dict=state)
                _open_to_readers(path)
        if self.config.train == "full" and writes:
            self.processor.save(path)

    def save_cut_teacher(self, path: Path) -> None:
        """Write the teacher as a PEFT adapter folder of rank `cut.rank`; each rank does."""
        assert self.cut is not None
        config = copy(self.model.peft_config["default"])
        config.r = config.lora_alpha = self.cut.rank  # scale 1
        config.lora_dropout, config.use_rslora, config.inference_mode = 0.0, False, True
        config.rank_pattern, config.alpha_pattern = {}, {}
        config.save_pretrained(path)
        save_file(self.cut.tensors(), path / "adapter_model.safetensors")
        _open_to_readers(path)

    def save_teacher(self, path: Path) -> None:
        """Write the teacher as a `transformers` folder with its processor.

        All ranks must call it; the first writes.

        Raises:
            RuntimeError: no teacher was loaded.
        """
        with self.as_teacher():
            state = {
                name.replace(".base_layer", ""): tensor
                for name, tensor in self.whole_state(self._plain).items()
                if "lora_" not in name
            }
            if self.ranks.first:
                self._plain.save_pretrained(path, state_dict=state)
                _open_to_readers(path)
        if self.ranks.first:
            self.processor.save(path)

    # -- inputs --------------------------------------------------------------------------------

    def observe(self, frames: list[np.ndarray], prompts: list[str]) -> list[Observed]:
        """Tokenise observations; compute visual features once where the vision tower is frozen."""
        return self.encode_images(self.tokenize(frames, prompts))

    def tokenize(self, frames: list[np.ndarray], prompts: list[str]) -> list[Observed]:
        """Observations without visual features."""
        rows = self.processor.encode(frames, prompts)
        grids = [self.processor.grid(frame) if self.processor.native else None for frame in frames]
        return [
            Observed(
                prompt_ids=ids,
                positions=self._prompt_positions(ids, grid),
                frame=frame,
                features=None,
                grid=grid,
                shown=self.processor.shrink(frame),
            )
            for ids, frame, grid in zip(rows, frames, grids, strict=True)
        ]

    @torch.no_grad()
    def encode_images(self, observed: list[Observed]) -> list[Observed]:
        """The same with visual features, on the model's device, where the vision tower is frozen."""
        if not self.caches_features:
            return observed
        features = self._encode_images(self._image_inputs(observed))
        return [replace(o, features=f, shown=None) for o, f in zip(observed, features, strict=True)]

    def _image_inputs(self, observed: Sequence[Observed]) -> dict[str, Tensor]:
        frames = [self.processor.shrink(o.frame) if o.shown is None else o.shown for o in observed]
        return self.processor.image_inputs(frames, self.device)

    def _encode_images(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        out = self._plain.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
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

    def image_arguments(self, observed: Sequence[Observed]) -> dict[str, Any]:
        """Keyword arguments of a forward pass that carry the images of `observed`."""
        if observed[0].features is None:
            return self._image_inputs(observed)
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


def _open_to_readers(folder: Path) -> None:
    """Give weights, which `safetensors` writes for their owner alone, the mode of the config beside them."""
    mode = next(folder.glob("*config.json")).stat().st_mode & 0o666
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
