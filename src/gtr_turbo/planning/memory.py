"""Bytes by part: on a GPU in each phase of an update, and on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

from gtr_turbo.config import TrainConfig
from gtr_turbo.planning.dryrun import Shadow
from gtr_turbo.policy.scoring import LOGITS, PASS_TOKENS

LOGIT_COPIES = 4
"""Tensors of the size of the logits that the update holds at once; twice as many where they are made in parts, and
again in the backward pass (policy/scoring.py)."""
SCORED_COPIES = 5
"""The same where no gradient is wanted: logits, log-probabilities, and three of the entropy."""
DISTRIBUTIONS = 4
"""Tensors over a micro-batch's tokens and the vocabulary at once: the agent's, the teacher's, two of their KL."""
USED = 0.9
"""Share of a GPU that is planned with: its context and the allocator's gaps take the rest."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of a turn."""

    prompt: int
    """Image tokens included."""
    image: int
    reply: int
    """Of the longest reply."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by part."""

    microbatch: int
    """Turns of a micro-batch."""
    always: dict[str, int] = field(default_factory=dict)
    """On each GPU, the whole time."""
    update: dict[str, int] = field(default_factory=dict)
    """On each GPU, in forward and backward passes of the update, beyond `always`."""
    step: dict[str, int] = field(default_factory=dict)
    """In the optimizer's step."""
    scoring: dict[str, int] = field(default_factory=dict)
    """In passes without a gradient: turns that are scored again, and what the teacher says of them."""
    generation: dict[str, int] = field(default_factory=dict)
    """While replies are written."""
    host: dict[str, int] = field(default_factory=dict)
    """On the host, of each process."""
    history: int = 0
    """On the host: the history of checkpoints, at the end of the run."""

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase, `always` included."""
        resident = sum(self.always.values())
        parts = {"update": self.update, "step": self.step, "scoring": self.scoring}
        parts["generation"] = self.generation
        return {name: resident + sum(part.values()) for name, part in parts.items()}

    @property
    def peak(self) -> int:
        """On each GPU, at most."""
        return max(self.phases.values())


def trained_bytes(shadow: Shadow) -> int:
    """Bytes of what is trained, the critic included; so much are gradients, and each of Adam's two moments."""
    return int(sum(p.nbytes for p in shadow.trained) + shadow.critic)


def update_bytes(shadow: Shadow, lengths: Lengths, turns: int) -> dict[str, int]:
    """Activations and logits of a micro-batch.

    Without gradient checkpointing every layer keeps what its backward pass needs; with it a layer keeps its input,
    and one layer at a time makes the rest again.
    """
    config, text = shadow.config, shadow.text
    length = lengths.prompt + lengths.reply
    layer = shadow.layer(turns, length)
    width = turns * length * text.hidden_size * shadow.itemsize
    kept, working = width * len(shadow.layers), layer.peak
    if not config.gradient_checkpointing:
        kept += layer.kept * len(shadow.layers)
        working = layer.peak - layer.kept
    tower = pixels = 0
    if config.vision == "trained":
        vision = shadow.architecture.vision_config
        patches = lengths.image * vision.spatial_merge_size**2
        block = shadow.block(patches)
        tower = turns * patches * vision.hidden_size * shadow.itemsize * len(shadow.blocks)
        if not config.gradient_checkpointing:
            tower += turns * block.kept * len(shadow.blocks)
        numbers = turns * patches * 3 * vision.temporal_patch_size * vision.patch_size**2
        cast = 0 if shadow.itemsize == 4 else shadow.itemsize
        pixels = numbers * (4 + cast)
    part = max(1, LOGITS // text.vocab_size)
    tokens = min(turns * lengths.reply, part)
    copies = LOGIT_COPIES if turns * lengths.reply <= part else 2 * LOGIT_COPIES
    return {
        "activations kept": kept,
        "activations of the vision tower": tower,
        "pixels": pixels,
        "working memory of a layer, or logits": max(working, copies * 4 * tokens * text.vocab_size),
    }


def scoring_bytes(
    shadow: Shadow, config: TrainConfig, lengths: Lengths, *, rows: int, turns: int
) -> dict[str, int]:
    """Of a pass over some of `rows` turns; with `guidance.estimator: full` over a micro-batch of `turns`."""
    length, guidance = lengths.prompt + lengths.reply, config.guidance
    whole = guidance.estimator == "full" and (guidance.kind in ("kl", "static") or guidance.monitor)
    rows = max(turns, _rows(rows, length)) if whole else _rows(rows, length)
    vocabulary = 4 * shadow.text.vocab_size
    logits = min(rows * lengths.reply, max(1, LOGITS // shadow.text.vocab_size)) * vocabulary
    states = rows * length * shadow.text.hidden_size * shadow.itemsize
    both = DISTRIBUTIONS * turns * lengths.reply * vocabulary if whole else 0
    return {
        "hidden states": states,
        "working memory of a layer, or logits": max(
            shadow.layer(rows, length).forward, SCORED_COPIES * logits
        ),
        "distributions of agent and teacher": both,
    }


def _rows(turns: int, tokens: int) -> int:
    """Rows of the largest pass over `turns` rows of `tokens` tokens."""
    return min(turns, max(1, PASS_TOKENS // tokens))


def generation_bytes(shadow: Shadow, lengths: Lengths, turns: int) -> dict[str, int]:
    """Key-value cache at its longest, and what the largest of the image's, the prompts' and a token's pass adds."""
    cache = turns * (lengths.prompt + lengths.reply - 1) * shadow.key_values
    patches = lengths.image * shadow.architecture.vision_config.spatial_merge_size**2
    prompt = turns * lengths.prompt * shadow.key_values
    # logits, masked, divided, their softmax in float64, its cumulative sum
    sampler = turns * shadow.text.vocab_size * (shadow.itemsize + 3 * 4 + 3 * 8)
    most = max(
        turns * shadow.block(patches).forward,
        prompt + shadow.layer(_rows(turns, lengths.prompt), lengths.prompt).forward,
        cache + cache // len(shadow.layers) + sampler,  # a layer's cache is copied to be lengthened
    )
    return {"key-value cache": cache, "working memory of a pass": most - cache}


def plan_memory(
    shadow: Shadow, config: TrainConfig, lengths: Lengths, *, ranks: int, size: float
) -> Memory:
    """Bytes of a run on `ranks` GPUs of `size` bytes each (0: no bound), data-parallel.

    With `ppo.microbatch_turns: auto`, the micro-batch is the largest equal part of a rank's minibatch that fits.
    """
    learned = sum(p.nbytes for p in shadow.trained)
    lora = config.model.train == "lora"
    always = {
        "weights": shadow.weights,
        "adapters": learned if lora else 0,
        "critic": shadow.critic,
        "optimizer": 2 * trained_bytes(shadow),
        "features of images": _features(shadow, config, lengths, ranks),
    }
    served = config.rollout.engine == "vllm"
    vllm = config.rollout.vllm
    own = {"vLLM": int(vllm.gpu_memory * size)} if served and vllm.base_url is None else {}
    sleeper = own if vllm.sleep else {}
    if not sleeper:
        always |= own
    # factors are as those of the agent's adapters, of another rank
    cut = learned * (config.teacher_rank or 0) // config.model.lora_rank
    most = config.ppo.minibatch_turns // ranks
    gradients = trained_bytes(shadow)
    rows = _written_here(config, ranks)
    rounded = {"adapters, rounded": learned // 2} if lora and shadow.itemsize == 2 else {}
    writing = {**generation_bytes(shadow, lengths, rows), **rounded} if rows else {}
    generation = max(sleeper, writing, key=lambda parts: sum(parts.values()))

    def memory(turns: int) -> Memory:
        weight = 4 if config.teacher.method == "linear" else 16
        copies = shadow.exchanged * shadow.itemsize
        return Memory(
            microbatch=turns,
            always=always,
            update={"gradients": gradients, **update_bytes(shadow, lengths, turns)},
            step={"gradients": gradients, "working memory of Adam": trained_bytes(shadow)},
            scoring={
                **scoring_bytes(
                    shadow, config, lengths, rows=config.env.num_envs // ranks, turns=turns
                ),
                **rounded,
            },
            generation=generation,
            host={
                "the teacher": copies,
                "the agent's own weights": copies if lora else 2 * copies,
                **({"vLLM's weights, asleep": shadow.weights} if sleeper else {}),
                **({"the teacher as an adapter": cut} if cut else {}),
            },
            history=4 * sum(p.numel() for p in shadow.trained) * config.num_updates
            if config.history == "factors"
            else weight * shadow.exchanged,
        )

    given = config.ppo.microbatch_turns
    if given != "auto":
        return memory(min(given, most))
    room = USED * size - sum(always.values())
    fitting = [n for n in range(1, most + 1) if most % n == 0]
    fits = [
        n
        for n in fitting
        if not size or max(sum(memory(n).update.values()), sum(memory(n).scoring.values())) <= room
    ]
    return memory(max(fits, default=1) if size else min(64, most))


def _written_here(config: TrainConfig, ranks: int) -> int:
    """Replies that the trainer writes at once, at most; vLLM leaves it the merge's, of evaluations and thoughts."""
    rows = config.env.num_envs // ranks
    thoughts = config.guidance.kind == "sft" and config.teacher_rank is None
    evaluated = config.eval.episodes or config.eval.interval
    most = min(config.guidance.imitation.samples, rows * config.rollout.turns_per_env)
    agents = config.rollout.engine == "hf" or bool(evaluated)
    return max(rows if agents else 0, most if thoughts else 0)


def _features(shadow: Shadow, config: TrainConfig, lengths: Lengths, ranks: int) -> int:
    """Of a frozen tower, kept for each turn of an update; 0 where the tower runs again in each pass."""
    if not shadow.caches_features:
        return 0
    deep = len(getattr(shadow.architecture.vision_config, "deepstack_visual_indexes", ()))
    turns = (config.turns_per_update + config.env.num_envs) // ranks
    return int(turns * lengths.image * (1 + deep) * shadow.text.hidden_size * shadow.itemsize)
