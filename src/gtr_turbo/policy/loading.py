"""Loading a vision-language model, and which of its layers get adapters."""

from __future__ import annotations

import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig
from gtr_turbo.merging.lora import FACTOR, check_kind
from gtr_turbo.merging.lora import is_vision as is_vision  # for others too
from gtr_turbo.merging.shards import MergeError
from gtr_turbo.policy import starter
from gtr_turbo.policy.adapters import multiply_in_type_of_weights
from gtr_turbo.policy.processing import QWEN

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def takes_features(model: Any) -> bool:
    """Whether image features can be computed once and handed to the forward pass."""
    return (
        model.config.model_type in QWEN
        and "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        and hasattr(model.model, "get_image_features")
    )


def check_device(device: str) -> None:
    """Refuse a device that torch cannot put a tensor on.

    Raises:
        ConfigError: why, and what can be given.
    """
    try:
        torch.empty(1, device=torch.device(device))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0].rstrip(".")
        raise ConfigError(
            f"model.device={device!r} cannot be used here: {reason}. Give cpu, or cuda or cuda:N where torch sees "
            "a GPU (`gtr-turbo doctor` lists what it sees). A stored agent has it in its config.yaml or recipe.yaml"
        ) from error


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The settings of `model` that a LoRA adapter was made with: `vision`, `lora_rank`, `lora_alpha`.

    Raises:
        ConfigError: there is no LoRA adapter, it cannot be read, or it changes more than scale * B @ A, which is
            all that teachers are made of.
    """
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            names = list(file.keys())
        rank, alpha = about["r"], about["lora_alpha"]
        check_kind(folder, about)
        if other := [name for name in names if FACTOR.match(name) is None]:
            raise MergeError(f"{folder} holds {other[0]!r}, which is no factor of a linear layer")
    except MergeError as error:
        raise ConfigError(f"model.adapter cannot be used: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ConfigError(
            f"model.adapter={str(folder)!r} holds no LoRA adapter ({error}). Give the folder that `gtr-turbo sft` "
            "or PEFT wrote, or a run's checkpoints/NNNNNN/student: adapter_config.json, adapter_model.safetensors"
        ) from error
    seen = any(is_vision(name) for name in names)
    return {"vision": "trained" if seen else "frozen", "lora_rank": rank, "lora_alpha": alpha}


def check_adapter(config: ModelConfig) -> None:
    """Refuse settings that `model.adapter`, which brings its own layers and rank, contradicts.

    Raises:
        ConfigError: which they are, and what to do.
    """
    if config.adapter is None:
        return
    found = adapter_settings(Path(config.adapter))
    wrong = {key: made for key, made in found.items() if made != getattr(config, key)}
    if not wrong:
        return
    given = ", ".join(f"model.{key}={getattr(config, key)!r}" for key in wrong)
    fitting = " ".join(f"--model.{key} {made}" for key, made in wrong.items())
    other = ""
    if wrong.get("vision") == "trained":
        other = (
            ". It adapts the vision tower; where that must be frozen (vLLM, the -fast recipes), start from an "
            "adapter made with `gtr-turbo sft --model.vision frozen`"
        )
    raise ConfigError(
        f"model.adapter={config.adapter!r} was not made with {given}: give {fitting}{other}"
    )


def _advice() -> str:
    """What `model.path` may be."""
    known = ", ".join(f"tiny-{name}" for name in starter.STARTERS)
    return (
        f"Give {known}, a folder that save_pretrained wrote, or a hub name (OWNER/MODEL) of an image-text-to-text "
        "model. Where no hub is reached, download the model elsewhere (`hf download NAME --local-dir DIR`), bring "
        "DIR here, and give it in the name's place"
    )


def check(config: ModelConfig) -> None:
    """Refuse what cannot be loaded here, as far as that shows before weights are read.

    Raises:
        ConfigError: the device, the adapter or the path.
    """
    check_device(config.device)
    check_adapter(config)
    if not starter.is_here(config.path):
        raise ConfigError(f"model.path={config.path!r} is no folder here. {_advice()}")


def load(config: ModelConfig) -> Any:
    """The `transformers` model.

    Raises:
        ConfigError: there is none at `model.path`, it is of another kind, or it cannot be run as the settings say.
    """
    from transformers import AutoModelForImageTextToText

    check(config)
    path = starter.model_folder(config.path)
    try:
        return AutoModelForImageTextToText.from_pretrained(
            path, dtype=DTYPES[config.dtype], attn_implementation=config.attention
        )
    except (OSError, ValueError) as error:
        reason = f"model.path={config.path!r} cannot be loaded: {error}"
        raise ConfigError(f"{reason.rstrip('.')}. {_advice()}") from error
    except ImportError as error:
        if config.attention != "flash_attention_2":
            raise
        raise ConfigError(
            f"model.attention='flash_attention_2' cannot be used here: {str(error).rstrip('.')}. "
            "Install flash-attn, or give sdpa; `gtr-turbo doctor` lists what is installed"
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


def add_adapters(base: Any, config: ModelConfig, *, planned: bool = False) -> Any:
    """The model with LoRA adapters: fresh ones, or those of `model.adapter`; `planned`: of its shape, not read.

    Raises:
        ConfigError: the settings contradict `model.adapter`, or it is of another model.
    """
    check_adapter(config)
    model = _with_adapters(base, config, planned=planned)
    multiply_in_type_of_weights(model)
    return model


def _with_adapters(base: Any, config: ModelConfig, *, planned: bool) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    with warnings.catch_warnings():  # peft asks transformers for a property by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is dep", FutureWarning)
        if config.adapter:
            made = LoraConfig.from_pretrained(config.adapter)
            made.lora_dropout, made.inference_mode = config.lora_dropout, False
            try:
                model = (
                    get_peft_model(base, made)
                    if planned
                    else PeftModel.from_pretrained(
                        base, config.adapter, is_trainable=True, config=made
                    )
                )
            except (RuntimeError, ValueError) as error:
                if not re.search("size mismatch|Target modules", str(error)):
                    raise
                raise ConfigError(
                    f"model.adapter={config.adapter!r}, made on {made.base_model_name_or_path}, does not fit "
                    f"model.path={config.path!r}: {str(error).strip().splitlines()[-1].strip()}"
                ) from error
            _check_fits(model, config)
            return model
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=linear_layers(base, vision=config.vision == "trained"),
        )
        return get_peft_model(base, lora)


def _check_fits(model: Any, config: ModelConfig) -> None:
    """Refuse an adapter that does not change the layers that it names; PEFT drops what it does not find.

    Raises:
        ConfigError: why, and what to do.
    """
    from peft import get_peft_model_state_dict

    assert config.adapter is not None
    with safe_open(Path(config.adapter) / "adapter_model.safetensors", "pt") as file:
        stored = set(file.keys())
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    way = f"make full weights of it (`gtr-turbo export {config.adapter} --out DIR`), and give DIR as model.path"
    if differing := sorted(stored ^ wanted):
        whose = "it" if differing[0] in stored else "the model"
        raise ConfigError(
            f"model.adapter={config.adapter!r} does not fit model.path={config.path!r}: only {whose} has "
            f"{differing[0]!r}. If it was made on this model by other software, {way}"
        )
    of = str(model.peft_config["default"].base_model_name_or_path)
    if of != config.path and starter.is_hub_name(of) and starter.is_hub_name(config.path):
        raise ConfigError(
            f"model.adapter={config.adapter!r} is an adapter of {of}, not of {config.path}: on another base it "
            "means nothing. Give its base as model.path, by its name or as a folder"
        )
    plain = model.get_base_model()
    head = plain.get_output_embeddings()
    shared = plain.get_input_embeddings().weight
    if hasattr(head, "lora_A") and head.base_layer.weight is shared:
        raise ConfigError(
            f"model.adapter={config.adapter!r} adapts the head of {config.path!r}, whose weights are those of the "
            f"embeddings too, which a teacher would then change as well: {way}"
        )
