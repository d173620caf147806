"""Every setting, declared once: frozen dataclasses, documented under each field, validated at birth.

Standard library only, so that a config can be checked without torch. What follows from settings is a
property. The resolved config of a run lies in its folder as `config.yaml`.
"""

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
from gtr_turbo.teaching_config import GuidanceConfig, TeacherConfig
from gtr_turbo.vllm_config import VllmConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The agent's model and which of its weights are trained."""

    _prefix = "model."

    path: str = "tiny-qwen3-vl"
    """A shipped starter (`tiny-qwen3-vl`, `tiny-qwen2.5-vl`; for households `tiny-household-qwen3-vl` and
    `tiny-household-qwen2.5-vl`), a `save_pretrained` folder, or a hub name."""
    adapter: str | None = None
    """PEFT adapter folder to start from with `train: lora`; `vision`, `lora_rank`, `lora_alpha` must be its own."""
    train: Literal["full", "lora"] = "full"
    """`full`: every weight of the language model; `lora`: adapters on its linear layers."""
    vision: Literal["frozen", "trained"] = "frozen"
    """Whether the vision tower is trained too. Frozen, its features are computed once a turn."""
    lora_rank: int = 128
    """Rank r of the adapters."""
    lora_alpha: int = 256
    """Adapters are scaled by `lora_alpha / lora_rank`."""
    lora_dropout: float = 0.0
    """Dropout before the adapters, active in the update only: above 0 the first ratio is not exactly 1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the model's weights. Adapters, log-softmax, critic and merges are float32 always. With `train: full`,
    `bfloat16` is for playing only: it would round most of a training step away."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    """Attention implementation of `transformers`."""
    device: str = "cpu"
    """A torch device: `cpu`, `cuda`, `cuda:1`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    def __post_init__(self) -> None:
        positive(self, "lora_rank", "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"model.lora_dropout={self.lora_dropout} must be in [0, 1)")
        if self.adapter and self.train != "lora":
            raise ConfigError("model.adapter is given, so model.train must be 'lora', got 'full'")

    def check_trained(self) -> None:
        """Refuse what can be played but hardly trained.

        Raises:
            ConfigError: the type would round most of each step away.
        """
        if (self.train, self.dtype) == ("full", "bfloat16"):
            raise ConfigError(
                "model.dtype='bfloat16' cannot be trained with model.train='full': Adam's steps are made on the "
                "weights themselves, and one below half the distance to the next bfloat16 number (of a weight of "
                "0.1: 0.0002) is rounded away; set model.dtype to float32, or model.train to lora, whose adapters "
                "are float32"
            )


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """The environment."""

    _prefix = "env."

    id: str = "EZPoints"
    """A built-in name (EZPoints, Points24, NumberLine, Blackjack, Household; a task type alone is Household-Place,
    -Two, -Light, -Clean, -Heat, -Cool), a Gymnasium id, or MODULE:ENV_ID."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the environment, such as `prompt`, `early_truncation`, `solvable_only`."""
    train_split: str | None = None
    """The `split` option while training; null gives none."""
    eval_split: str | None = None
    """The `split` option for the evaluations before and after; null gives none."""
    num_envs: int = 64
    """Environments stepped side by side, N."""

    def __post_init__(self) -> None:
        positive(self, "num_envs")
        check_names("env.options.", self.options)
        if "split" in self.options:
            raise ConfigError("set env.train_split and env.eval_split, not env.options.split")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How replies are written."""

    _prefix = "sampling."

    temperature: float = 0.7
    """Logits are divided by it, in sampling and in scoring: the policy is what is sampled."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0 is off. Scoring does not know it (docs/method.md)."""
    repetition_penalty: float = 1.0
    """Penalty of Keskar et al. 2019; 1 is off. Scoring does not know it (docs/method.md)."""
    max_new_tokens: int = 96
    """A reply is cut here, and is invalid if that leaves its JSON open."""

    def __post_init__(self) -> None:
        positive(self, "temperature", "repetition_penalty", "max_new_tokens")
        not_negative(self, "top_k")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Collecting turns."""

    _prefix = "rollout."

    turns_per_env: int = 8
    """Turns collected from each environment before an update, T."""
    format_valid: float = 0.0
    """Reward for a reply that is the JSON object asked for. A bonus per turn pays for loitering."""
    format_invalid: float = -2.0
    """Reward for any other reply."""
    rescore: bool = False
    """Take the old log-probs and values from a scoring pass instead of from the sampler (for bf16). With
    `engine: vllm` it is always so."""
    max_logprob_gap: float = 0.5
    """The run stops if sampler and scoring differ by more than this (mean absolute nats per token)."""
    engine: Literal["hf", "vllm"] = "hf"
    """What writes the agent's replies: our own decoding in the trainer, or vLLM."""
    vllm: VllmConfig = field(default_factory=VllmConfig)
    """Of `engine: vllm`."""

    def __post_init__(self) -> None:
        positive(self, "turns_per_env", "max_logprob_gap")


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Credit and the update (docs/method.md)."""

    _prefix = "ppo."

    lr: float = 1e-4
    """Adam's learning rate at the first optimizer step."""
    lr_final: float = 1e-9
    """Learning rate the cosine ends at, one step after the last."""
    value_lr: float = 1e-3
    """Learning rate of the critic, constant."""
    adam_eps: float = 1e-7
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay on the model."""
    max_grad_norm: float = 1.0
    """Gradients of the model are clipped to this norm; so are the critic's, apart."""
    epochs: int = 2
    """Passes over the turns of an update."""
    minibatch_turns: int = 128
    """Turns per optimizer step."""
    microbatch_turns: int | Literal["auto"] = 64
    """Turns per forward pass; gradients are accumulated up to `minibatch_turns`. `auto`: what the GPU's free memory
    holds, measured in the first update (64 on a CPU). Where memory runs out, it is halved."""
    clip: float = 0.2
    """Clip range of the ratio and of the value."""
    ratio: Literal["sequence", "token"] = "token"
    """One ratio a turn on the composite log-probability (published), or one a token."""
    thought_weight: float = 0.5
    """Lambda: weight of the thought's log-probability against the action's."""
    length_scale: float = 1.0
    """The token surrogate, summed over a turn's tokens, is divided by this."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    value_gradient: bool = False
    """Let the value loss train the model too, not only the critic."""
    critic_steps: int = 0
    """Extra optimizer steps of the critic per update, on the stored hidden states."""
    entropy_coef: float = 0.0
    """Weight of the mean token entropy, added to the objective."""
    gamma: float = 0.9
    """Discount per turn."""
    gae_lambda: float = 0.95
    """GAE's lambda."""
    normalize: bool = True
    """Normalise advantages over the update: subtract the mean, divide by the deviation."""
    normalize_eps: float = 0.1
    """Added to the deviation: keeps a batch without signal from being blown up."""

    def __post_init__(self) -> None:
        positive(
            self, "lr", "value_lr", "adam_eps", "max_grad_norm", "epochs", "minibatch_turns",
            "clip", "length_scale", "normalize_eps",
        )  # fmt: skip
        not_negative(
            self,
            "lr_final",
            "weight_decay",
            "thought_weight",
            "value_coef",
            "critic_steps",
            "entropy_coef",
        )
        fraction(self, "gamma", "gae_lambda")
        if self.microbatch_turns == "auto":
            return
        positive(self, "microbatch_turns")
        if self.minibatch_turns % self.microbatch_turns:
            raise ConfigError(
                f"ppo.microbatch_turns={self.microbatch_turns} must divide ppo.minibatch_turns="
                f"{self.minibatch_turns}"
            )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The evaluations a run makes by itself."""

    _prefix = "eval."

    episodes: int = 500
    """Episodes before and after training, of student and merge; 0 switches them off."""
    extra_splits: tuple[str, ...] = ()
    """Further splits to evaluate before and after, such as `held-out-multisets`."""
    interval: int = 0
    """Updates between evaluations of student and merge during training, on the same episodes each time; 0: none."""
    interval_episodes: int = 100
    """Episodes of each of those."""

    def __post_init__(self) -> None:
        not_negative(self, "episodes", "interval")
        positive(self, "interval_episodes")


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """What a run keeps."""

    _prefix = "save."

    interval: int = 10
    """Updates between checkpoints; the last update is always kept."""
    keep: int = 2
    """Checkpoints kept."""
    trajectories: int = 4
    """Environments, the first ones, whose turns are stored in each update, with their frames."""

    def __post_init__(self) -> None:
        positive(self, "interval", "keep")
        not_negative(self, "trajectories")


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """Several ranks, which torchrun starts (docs/distributed.md)."""

    _prefix = "distributed."

    shard: bool = False
    """FSDP2: each rank keeps a part of the weights, gradients and Adam's moments; false: all of them (DDP)."""
    timeout_s: float = 1800.0
    """Longest wait for another rank: it must outlast an evaluation, a merge, a checkpoint, a corrector."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    _prefix = ""

    run: str | None = None
    """Run folder; null makes `runs/<config>-seed<seed>`, numbered if that exists."""
    name: str = "run"
    """Name of the recipe, for folders and reports."""
    seed: int = 0
    """The one seed; every stream of randomness is derived from it (docs/method.md)."""
    env_steps: int = 7680
    """Turns to collect in all; a whole number of updates is made of it."""
    threads: int = 2
    """CPU threads of torch."""
    trackers: Literal["auto"] | tuple[Literal["tensorboard", "wandb", "trackio"], ...] = "auto"
    """Where metrics go beside `metrics.jsonl`; each needs its extra. `auto`: TensorBoard if installed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        positive(self, "env_steps", "threads")
        check_seed(self)
        if self.run == "":
            raise ConfigError("run is empty; give a folder, or leave it out")
        turns = self.turns_per_update
        if turns % self.ppo.minibatch_turns:
            raise ConfigError(
                f"ppo.minibatch_turns={self.ppo.minibatch_turns} must divide env.num_envs * "
                f"rollout.turns_per_env = {self.env.num_envs} * {self.rollout.turns_per_env} = {turns}"
            )
        if self.env_steps < turns:
            raise ConfigError(
                f"env_steps={self.env_steps} is less than one update of {turns} turns; raise env_steps or "
                "lower env.num_envs or rollout.turns_per_env"
            )
        adapted = (self.model.train, self.model.vision) == ("lora", "frozen")
        if self.rollout.engine == "vllm" and not adapted:
            raise ConfigError(
                "rollout.engine='vllm' is sent adapters of the language model only: it needs model.train='lora' "
                f"and model.vision='frozen', got {self.model.train!r} and {self.model.vision!r}"
            )
        if self.teacher.history == "factors" and self.model.train != "lora":
            raise ConfigError(
                "teacher.history='factors' keeps the factors of adapters: it needs model.train='lora', got "
                f"{self.model.train!r}; set teacher.history to auto or sums"
            )
        if self.guidance.credit == "token" and self.ppo.ratio != "token":
            raise ConfigError("guidance.credit='token' needs ppo.ratio='token', got 'sequence'")

    def check_world(self, world: int) -> None:
        """Refuse settings that cannot be with so many ranks.

        Raises:
            ConfigError: which setting it is.
        """
        if world == 1 and self.distributed.shard:
            raise ConfigError(
                "distributed.shard=true needs several ranks: start with torchrun --nproc-per-node N -m "
                "-- gtr_turbo train, or set distributed.shard to false"
            )
        if self.env.num_envs % world:
            raise ConfigError(
                f"env.num_envs={self.env.num_envs} is the number over all ranks, so the {world} ranks must "
                "divide it"
            )
        external, limit = self.guidance.external, self.distributed.timeout_s
        waits = self.guidance.kind == "external" and external.outage == "wait"
        if world > 1 and waits and external.wait_s >= limit:
            about = f"distributed.timeout_s={limit:g} must be above guidance.external.wait_s"
            raise ConfigError(f"{about}={external.wait_s:g}; raise it, or lower the other")
        if self.rollout.engine == "vllm":
            self.rollout.vllm.check_world(world)

    @property
    def teacher_rank(self) -> int | None:
        """`rollout.vllm.teacher_rank`, if it is vLLM that writes the teacher's thoughts."""
        writes = self.rollout.engine == "vllm" and self.guidance.kind == "sft"
        return self.rollout.vllm.teacher_rank if writes else None

    @property
    def history(self) -> str:
        """`teacher.history`, with `auto` resolved."""
        if self.teacher.history != "auto":
            return self.teacher.history
        factors = self.model.train == "lora" and self.teacher.method == "ties"
        return "factors" if factors else "sums"

    @property
    def turns_per_update(self) -> int:
        """T * N."""
        return self.env.num_envs * self.rollout.turns_per_env

    def environments(self) -> list[tuple[str, dict[str, Any]]]:
        """(id, options) of each environment that the run makes."""
        env, evaluation = self.env, self.eval
        splits = [env.train_split]
        if evaluation.episodes or evaluation.interval:
            splits.append(env.eval_split)
        splits += evaluation.extra_splits if evaluation.episodes else ()
        return [
            (env.id, {**env.options, **({"split": split} if split else {})}) for split in splits
        ]

    @property
    def num_updates(self) -> int:
        """Whole updates in `env_steps`."""
        return self.env_steps // self.turns_per_update
