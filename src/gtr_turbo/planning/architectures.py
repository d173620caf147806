"""Published shapes of the models in our recipes, so that a plan or a benchmark needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": {
        "hub": "Qwen/Qwen2.5-VL-7B-Instruct",
        "config": "points24-qwen2.5-vl-7b",
        "tied": False,
        "text": {
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "out_hidden_size": 3584, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "pixels": {"shortest_edge": 3136, "longest_edge": 12845056},
    },
    "qwen3-vl-8b": {
        "hub": "Qwen/Qwen3-VL-8B-Instruct",
        "config": "points24-qwen3-vl-8b",
        "tied": False,
        "text": {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": 4096, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
        },
        "pixels": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
    "qwen2.5-vl-3b": {
        "hub": "Qwen/Qwen2.5-VL-3B-Instruct",
        "config": "points24-qwen2.5-vl-3b",
        "tied": True,
        "text": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
            "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "vision": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14,
            "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "pixels": {"shortest_edge": 3136, "longest_edge": 12845056},
    },
    "qwen3-vl-4b": {
        "hub": "Qwen/Qwen3-VL-4B-Instruct",
        "config": "points24-qwen3-vl-4b",
        "tied": True,
        "text": {
            "vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": 2560, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
        "pixels": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
    "qwen3-vl-2b": {
        "hub": "Qwen/Qwen3-VL-2B-Instruct",
        "config": "points24-qwen3-vl-2b",
        "tied": True,
        "text": {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision": {
            "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16,
            "out_hidden_size": 2048, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
        },
        "pixels": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
}  # fmt: skip
"""The published config values (config.json and preprocessor_config.json of the Instruct models)."""


def published(
    name: str,
    *,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    **special: int,
) -> Any:
    """The `transformers` config of a model in `SHAPES`.

    Args:
        name: a key of `SHAPES`.
        text: values that replace those of the language model.
        vision: values that replace those of the vision tower.
        special: `image_token_id` and the like, if not the published ones.
    """
    from transformers import Qwen2_5_VLConfig, Qwen3VLConfig

    shape = SHAPES[name]
    kind: Any = Qwen2_5_VLConfig if name.startswith("qwen2.5") else Qwen3VLConfig
    return kind(
        text_config={**shape["text"], **(text or {})},
        vision_config={**shape["vision"], **(vision or {})},
        tie_word_embeddings=shape["tied"],
        **special,
    )
