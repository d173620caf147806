"""Bytes of a run without its weights: the model is built on torch's meta device, and its layers are run there.

A meta tensor has a shape and a type and no memory, so what is counted is what the model's own code, `peft`'s
adapters and autograd would make. Only attention is replaced: by one that keeps what a fused kernel keeps.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig
from gtr_turbo.planning.architectures import SHAPES, published
from gtr_turbo.policy.loading import DTYPES, add_adapters, is_vision, takes_features
from gtr_turbo.policy.model import ValueHead
from gtr_turbo.policy.starter import model_folder


class Counter(TorchDispatchMode):
    """Inside the block, bytes of the tensors that operations make: `live` now, and `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), keywords: Any = None
    ) -> Any:
        made = function(*arguments, **(keywords or {}))
        given = {
            id(t.untyped_storage())
            for t in tree_leaves((arguments, keywords))
            if torch.is_tensor(t)
        }
        for tensor in tree_leaves(made):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in given and storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return made

    def _gone(self, size: int) -> None:
        self.live -= size


class _Fused(torch.autograd.Function):
    """Attention as far as memory goes: keeps its inputs, its result and a number a row, and no L x L matrix."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, width = query.shape
        out = query.new_empty(batch, length, heads, width)
        rows = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, rows)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # with a mask, transformers repeats keys and values
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    return _Fused.apply(query, key, value), None  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Pass:
    """Bytes of one layer's passes."""

    kept: int
    """By its forward pass for its backward pass, its own result not counted."""
    peak: int
    """At most, in forward and backward, its input not counted."""
    forward: int
    """At most, in a forward pass without a gradient."""


class Shadow:
    """A run's model without its weights.

    Attributes:
        base: the bare model, on the meta device.
        trained: parameters (not of the critic) that training changes.
        exchanged: entries of the weights that the teacher replaces.
        caches_features: True if the features of images are made once a turn.
        layers: of the language model.
        blocks: of the vision tower.
    """

    def __init__(self, config: ModelConfig) -> None:
        from transformers import AttentionInterface, AutoModelForImageTextToText
        from transformers.initialization import no_init_weights

        AttentionInterface.register("planned", _attention)
        self.config = config
        self.architecture = architecture(config.path)
        kind = "eager" if config.attention == "eager" else "planned"
        with torch.device("meta"), no_init_weights():  # random numbers without memory take seconds
            self.base: Any = AutoModelForImageTextToText.from_config(
                self.architecture, dtype=DTYPES[config.dtype], attn_implementation=kind
            )
            self.base.tie_weights()  # which the initialisation would have done
        self.parameters = sum(p.numel() for p in self.base.parameters())
        self.weights = _nbytes(self.base.parameters())
        embeddings, head = (
            self.base.get_input_embeddings().weight,
            self.base.get_output_embeddings().weight,
        )
        same = embeddings is head
        self.head = head.numel()
        vision = sum(p.numel() for n, p in self.base.named_parameters() if is_vision(n))
        self.vision_weights = vision
        self.language_weights = (
            self.parameters - vision - embeddings.numel() - (0 if same else self.head)
        )
        self.caches_features = config.vision == "frozen" and takes_features(self.base)
        self.model: Any = self.base
        if config.train == "lora":
            with no_init_weights():
                self.model = add_adapters(self.base, config, planned=True)
        else:
            for name, parameter in self.base.named_parameters():
                parameter.requires_grad_(config.vision == "trained" or not is_vision(name))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if config.train == "lora":
            adapted = [m for m in self.base.modules() if hasattr(m, "lora_A")]
            self.exchanged = sum(m.base_layer.weight.numel() for m in adapted)
        else:
            self.exchanged = sum(p.numel() for p in self.trained)
        self.text: Any = self.base.config.get_text_config()
        with torch.device("meta"):
            self.critic = _nbytes(ValueHead(self.text.hidden_size).parameters())
        self.layers = list(self.base.model.language_model.layers)
        self._layers: dict[int, Pass] = {}
        self._blocks: dict[int, Pass] = {}
        self.blocks = list(self.base.model.visual.blocks)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight."""
        return DTYPES[self.config.dtype].itemsize

    @property
    def key_values(self) -> int:
        """Bytes of the key-value cache for each token."""
        text = self.text
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return int(len(self.layers) * 2 * text.num_key_value_heads * width * self.itemsize)

    def layer(self, turns: int, length: int) -> Pass:
        """Passes of a decoder layer over (turns, length) tokens; all is proportional to the turns."""
        if length not in self._layers:
            self._layers[length] = self._one_turn(length)
        one = self._layers[length]
        return Pass(turns * one.kept, turns * one.peak, turns * one.forward)

    def _one_turn(self, length: int) -> Pass:
        text = self.text
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kind = DTYPES[self.config.dtype]

        def run(module: Any, hidden: Tensor) -> Any:
            turn = torch.empty(1, length, width, dtype=kind, device="meta")
            mask = torch.empty(1, 1, length, length, dtype=torch.bool, device="meta")
            if self.config.attention == "eager":
                mask = mask.to(kind)
            return module(hidden, attention_mask=mask, position_embeddings=(turn, turn))

        return self._pass(self.layers[0], (1, length, text.hidden_size), run)

    def block(self, patches: int) -> Pass:
        """Passes of a block of the vision tower over so many patches of one image."""
        if patches not in self._blocks:
            self._blocks[patches] = self._one_image(patches)
        return self._blocks[patches]

    def _one_image(self, patches: int) -> Pass:
        vision = self.architecture.vision_config
        width = vision.hidden_size // vision.num_heads
        ends = torch.tensor([0, patches], dtype=torch.int32)

        def run(module: Any, hidden: Tensor) -> Any:
            turn = torch.empty(patches, width, dtype=torch.float32, device="meta")
            return module(hidden, cu_seqlens=ends, position_embeddings=(turn, turn))

        return self._pass(self.blocks[0], (patches, vision.hidden_size), run)

    def _pass(
        self, module: nn.Module, shape: tuple[int, ...], run: Callable[[Any, Tensor], Any]
    ) -> Pass:
        kind = DTYPES[self.config.dtype]
        module.train()
        hidden = torch.empty(shape, dtype=kind, device="meta", requires_grad=True)
        module.zero_grad(set_to_none=True)
        gc.collect()
        with Counter() as counter:
            out = run(module, hidden)
            out = out[0] if isinstance(out, tuple) else out
            kept = counter.live - out.untyped_storage().nbytes()
            out.backward(torch.empty_like(out))
        own = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
        peak = counter.peak - own  # gradients of weights are counted apart
        module.zero_grad(set_to_none=True)
        del out
        with torch.no_grad(), Counter() as counter:
            run(module, hidden.detach())
        return Pass(kept, max(peak, kept), counter.peak)


def _nbytes(parameters: Any) -> int:
    return sum(p.nbytes for p in parameters)


def shape_name(path: str) -> str | None:
    """The key of `SHAPES` for a hub name."""
    return next((key for key, shape in SHAPES.items() if shape["hub"] == path), None)


def local_folder(path: str) -> str | None:
    """A folder here, or in the hub's cache, with the model's `config.json`."""
    folder = Path(model_folder(path))
    if (folder / "config.json").is_file():
        return str(folder)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        return None
    return str(Path(cached).parent) if isinstance(cached, str) else None


def architecture(path: str) -> Any:
    """The `transformers` config of a model, without any download.

    Raises:
        ConfigError: it is neither here nor among the built-in ones, or of a kind that cannot be planned.
    """
    from transformers import AutoConfig

    folder, name = local_folder(path), shape_name(path)
    if folder is None and name is None:
        known = ", ".join(shape["hub"] for shape in SHAPES.values())
        raise ConfigError(
            f"model.path={path!r}: its config.json is not on this machine (`hf download {path} config.json` "
            f"fetches it), and it is none of the built-in ones: {known}"
        )
    try:
        found = AutoConfig.from_pretrained(folder) if folder else published(str(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}/config.json cannot be read: {error}") from error
    if found.model_type not in ("qwen2_5_vl", "qwen3_vl"):
        raise ConfigError(
            f"model.path={path!r} is a {found.model_type}; plans are made for Qwen2.5-VL and Qwen3-VL"
        )
    return found
