"""Loading a vision-language model, and which of its layers get adapters."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig
from gtr_turbo.policy import starter
from gtr_turbo.policy.processing import QWEN

VISION = ("visual", "vision_tower", "vision_model", "vision_encoder")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_vision(name: str) -> bool:
    """Whether a parameter or module belongs to the vision tower."""
    return any(part in VISION for part in name.split("."))


def takes_features(model: Any) -> bool:
    """Whether image features can be computed once and handed to the forward pass."""
    return (
        model.config.model_type in QWEN
        and "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        and hasattr(model.model, "get_image_features")
    )


def load(config: ModelConfig) -> Any:
    """The `transformers` model.

    Raises:
        ConfigError: there is none at `model.path`, or it is of another kind.
    """
    from transformers import AutoModelForImageTextToText

    path = starter.model_folder(config.path)
    try:
        return AutoModelForImageTextToText.from_pretrained(
            path, dtype=DTYPES[config.dtype], attn_implementation=config.attention
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.path={config.path!r} cannot be loaded: {error}. Give tiny-qwen3-vl, tiny-qwen2.5-vl, a "
            "folder that save_pretrained wrote, or a hub name of an image-text-to-text model. Where no hub "
            "is reached, download the model elsewhere (`hf download NAME --local-dir DIR`), bring DIR here, and "
            "give --model DIR."
        ) from error


def linear_layers(model: nn.Module, *, vision: bool) -> list[str]:
    """Names of the linear layers that get adapters: all of the language model, none of the heads."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and "lm_head" not in name
        and (vision or not is_vision(name))
        and not (
            not vision
            and any(part in ("multi_modal_projector", "connector") for part in name.split("."))
        )
    ]


def add_adapters(base: Any, config: ModelConfig) -> Any:
    """The model with LoRA adapters: fresh ones, or those of `model.adapter`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if config.adapter:
        return PeftModel.from_pretrained(base, config.adapter, is_trainable=True)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=linear_layers(base, vision=config.vision == "trained"),
    )
    return get_peft_model(base, lora)
