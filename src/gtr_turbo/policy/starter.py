"""Tiny models of real classes (Qwen3-VL, Qwen2.5-VL) with random weights: where `gtr-turbo sft` begins.

1.6 M parameters, 112x112 pixels, 16 visual tokens. The trained ones ship in `gtr_turbo/starters/`; the
commands that made them are in `docs/starters.md`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from gtr_turbo.policy.processing import CHAT_TEMPLATE

ARCHITECTURES = ("qwen3-vl", "qwen2.5-vl")
STARTERS = (*ARCHITECTURES, "household-qwen3-vl", "household-qwen2.5-vl")
"""The shipped ones; those with the bare name of an architecture know the card games."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
FOLDER = Path(__file__).parent.parent / "starters"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CARD_PIECES = (
    '{"cards": [',
    '], "formula": "',
    '", "thoughts": "',
    '", "action": "',
    '"}',
    '{"current number": "',
    '", "target number": "',
    '{"thoughts": "',
    ", ",
)
"""Pieces of the JSON that the card games ask for: one token each, so that a tiny model can write them."""

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "attention_dropout": 0.0,
}


def model_folder(path: str) -> str:
    """`tiny-NAME` is the shipped starter NAME; all else is a folder or a hub name."""
    if path.startswith("tiny-"):
        name = path.removeprefix("tiny-")
        if name in STARTERS:
            return str(FOLDER / name)
    return path


def is_hub_name(name: str) -> bool:
    """True of ORGANISATION/MODEL that is no folder here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def is_here(name: str) -> bool:
    """False of what is no folder, no starter, no name to ask the hub for: `runs/mien` where `runs` is a folder."""
    if Path(model_folder(name)).is_dir():
        return True
    if not is_hub_name(name):
        return False
    from huggingface_hub import try_to_load_from_cache

    return not Path(name).parent.is_dir() or bool(try_to_load_from_cache(name, "config.json"))


def card_words() -> list[str]:
    """What the prompts and replies of the card games are made of, each as often as a vocabulary wants it."""
    from gtr_turbo import prompts

    letters = ("x", "y", "z", "w")
    texts = [
        prompts.number_line(),
        prompts.blackjack(),
        prompts.points(24, letters, "", ()),
        prompts.points_reduction(24, letters, "", "1 2"),
        prompts.points_formula(24, letters),
        " token reduction formula against soft no way stand hit",
    ]
    words = [word for text in texts for word in re.findall(r" ?[A-Za-z]+", text)]
    words += ["user", "assistant", "numberline", "blackjack", "ezpoints", "points"]
    return [str(n) for n in range(200)] * 40 + words * 40


CARD_TOKENS = r"\d{1,3}|[-+*/=()]| ?[A-Za-z_]+|[^\sA-Za-z\d]|\s"
"""A regular expression: what a token never reaches beyond. Here each operator and number is one by itself."""
WORD_TOKENS = r" ?\d{1,3}| ?[A-Za-z_]+|[^\sA-Za-z\d]|\s"
"""The same for prompts of words: a number takes the blank before it along."""


def tokenizer(
    corpus: Iterable[str] | None = None,
    tokens: str = CARD_TOKENS,
    pieces: Sequence[str] = CARD_PIECES,
) -> Any:
    """Byte-level BPE that has a token for every word it meets 30 times.

    Args:
        corpus: what it learns; the words of the card games by default.
        tokens: a regular expression; no token reaches beyond a match.
        pieces: strings that are one token each.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokens), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=30,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    fast.train_from_iterator(card_words() if corpus is None else corpus, trainer)
    fast.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[3:]),
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build(architecture: str, path: Path, seed: int, words: Any = None) -> None:
    """Write a tiny model with random weights, its tokenizer and image processor into `path`.

    Args:
        architecture: one of `ARCHITECTURES`.
        path: the folder.
        seed: of the weights.
        words: what `tokenizer` gave; that of the card games by default.

    Raises:
        ValueError: unknown architecture.
    """
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
    )
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is not one of {', '.join(ARCHITECTURES)}")
    words = words or tokenizer()
    ids = {name: words.convert_tokens_to_ids(token) for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    )}  # fmt: skip
    text: dict[str, Any] = {**TEXT, "vocab_size": len(words), "pad_token_id": words.pad_token_id}
    text |= {"eos_token_id": words.eos_token_id, "bos_token_id": None}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 96,
        "intermediate_size": 288,
        "num_heads": 4,
        "patch_size": 14,
    }
    vision |= {
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": TEXT["hidden_size"],
    }
    torch.manual_seed(seed)
    model: Any
    if architecture == "qwen3-vl":
        rope |= {"mrope_interleaved": True}
        text |= {"head_dim": 32, "rope_parameters": rope}
        vision |= {"num_position_embeddings": 256, "deepstack_visual_indexes": [1]}
        config: Any = Qwen3VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
        )
        model = Qwen3VLForConditionalGeneration(config)
    else:
        text |= {"rope_parameters": rope}
        vision |= {"window_size": 112, "fullatt_block_indexes": [0, 1]}
        config = Qwen2_5_VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    words.save_pretrained(path)
    # smart_resize floors on a float edge: 112 * 112 pixels would give 84x84, so the bounds leave slack
    size = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112 + 112}
    Qwen2VLImageProcessorPil(
        patch_size=14, temporal_patch_size=2, merge_size=2, size=size
    ).save_pretrained(path)
