"""Settings of `gtr-turbo sft`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gtr_turbo.checks import (
    ConfigError,
    check_names,
    check_seed,
    fraction,
    not_negative,
    positive,
)
from gtr_turbo.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class DemonstrationConfig:
    """Demonstrations of one environment for `gtr-turbo sft`."""

    _prefix = "demonstrations."

    id: str = "EZPoints"
    """Environment."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments."""
    turns: int = 4096
    """Turns to demonstrate, in episodes one after another; states may repeat."""
    noise: float = 0.0
    """Chance that the demonstrated action is replaced by a random legal one; thoughts stay right."""
    stray: float = 0.0
    """Chance that a random legal action is played in place of the demonstrated one, which is what is learned:
    so there are demonstrations of what to do after a mistake (DART, Laskey et al. 2017)."""

    def __post_init__(self) -> None:
        positive(self, "turns")
        check_names("demonstrations.options.", self.options)
        fraction(self, "noise", "stray")


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """Supervised fine-tuning on demonstrations of the environments' own experts."""

    _prefix = ""

    out: str | None = None
    """Folder to write the model to."""
    architecture: Literal["qwen3-vl", "qwen2.5-vl"] | None = None
    """Begin with a tiny model of random weights instead of `model.path`."""
    vocabulary: Literal["cards", "demonstrations"] = "cards"
    """What a tiny model's tokens are made of: the words of the card games, or those that the demonstrations
    show."""
    pieces: tuple[str, ...] = ()
    """With `vocabulary: demonstrations`, strings that are one token each, beside the reply's JSON."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vision="trained"))
    demonstrations: list[DemonstrationConfig] = field(
        default_factory=lambda: [DemonstrationConfig()]
    )
    """What is learned."""
    vision_steps: int = 0
    """First train the vision tower alone for so many steps, with a throw-away head that names what the
    frame shows. A tiny model with random weights does not learn to see without it."""
    steps: int = 500
    """Optimizer steps."""
    batch_turns: int = 64
    """Turns per optimizer step."""
    microbatch_turns: int = 8
    """Turns per forward and backward pass; halved where a GPU's memory does not hold so many."""
    lr: float = 2e-3
    """Peak learning rate; linear warm-up, then linear decay to 0."""
    warmup_steps: int = 50
    """Steps of the warm-up."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    seed: int = 0
    """Seed of weights, demonstrations and order."""
    threads: int = 1
    """CPU threads of torch."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the written weights."""

    def __post_init__(self) -> None:
        positive(self, "steps", "batch_turns", "microbatch_turns", "lr", "threads")
        not_negative(self, "vision_steps", "warmup_steps", "weight_decay")
        check_seed(self)
        if self.pieces and self.vocabulary == "cards":
            raise ConfigError(
                "pieces are given, so vocabulary must be 'demonstrations', got 'cards'"
            )
        if self.vocabulary != "cards" and self.architecture is None:
            raise ConfigError("vocabulary is given, but no architecture: model.path has its own")
        if self.vision_steps and self.model.vision == "frozen":
            raise ConfigError(
                f"vision_steps={self.vision_steps} would train the vision tower, and model.vision='frozen' keeps "
                "it as it is; give vision_steps 0 or model.vision trained"
            )
        if not self.demonstrations:
            raise ConfigError("demonstrations is empty; name at least one environment")
