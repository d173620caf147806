"""A recipe on given GPUs: does it fit, how long does it take, what does it cost, and what to change."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gtr_turbo.checks import ConfigError
from gtr_turbo.collect import Envs
from gtr_turbo.config import TrainConfig
from gtr_turbo.planning.architectures import SHAPES
from gtr_turbo.planning.dryrun import Shadow, local_folder, shape_name
from gtr_turbo.planning.memory import USED, Lengths, Memory, plan_memory
from gtr_turbo.planning.rates import Rates, assumed, hours, measured, update_seconds
from gtr_turbo.policy.starter import model_folder

GPUS = re.compile(r"(\d+)x(\d+(?:\.\d+)?)GB")
LOOKED_AT = 8
"""Episodes, played with random actions, whose longest prompt is planned with."""
LONGEST = 200
"""Turns of an episode, at most."""
PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]+|_|\s+")
LETTERS = 6
"""Of a token where there is no tokenizer to ask: longer words have several. Rather too few for English words."""
NODE = 8
"""GPUs of a node, which share its host's memory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `gtr-turbo plan` says."""

    config: TrainConfig
    gpus: int
    size_gb: float
    """Of each GPU's memory; 0 for a CPU."""
    lengths: Lengths
    parameters: int
    trained: int
    """Parameters of the model that are trained."""
    memory: Memory
    rates: Rates
    seconds: dict[str, float]
    """Of an update, by part."""
    hours: float
    dollars: float | None
    host_bytes: int
    """Of a node."""
    assumptions: list[str]
    advice: list[str]

    @property
    def fits(self) -> bool:
        """True if the peak is within what is planned with."""
        return not self.size_gb or self.memory.peak <= USED * self.size_gb * 1e9

    def as_json(self) -> dict[str, Any]:
        """Everything, for `--json`."""
        return {
            "name": self.config.name,
            "model": self.config.model.path,
            "gpus": self.gpus,
            "gpu_gb": self.size_gb,
            "parameters": self.parameters,
            "trained": self.trained,
            "tokens": asdict(self.lengths),
            "microbatch_turns": self.memory.microbatch,
            "bytes": {
                "always": self.memory.always,
                "update": self.memory.update,
                "step": self.memory.step,
                "generation": self.memory.generation,
                "phases": self.memory.phases,
                "peak": self.memory.peak,
                "host_of_a_process": self.memory.host,
                "history": self.memory.history,
                "host_of_a_node": self.host_bytes,
            },
            "fits": self.fits,
            "updates": self.config.num_updates,
            "seconds_of_an_update": self.seconds,
            "hours": self.hours,
            "dollars": self.dollars,
            "rates": asdict(self.rates),
            "assumptions": self.assumptions,
            "advice": self.advice,
        }


def read_gpus(text: str | None, device: str) -> tuple[int, float]:
    """(how many, GB of each) of `8x80GB`; (1, 0) for a recipe that runs on a CPU.

    Raises:
        ConfigError: not of this form, or missing where the recipe needs a GPU.
    """
    if text is None:
        if device == "cpu":
            return 1, 0.0
        raise ConfigError("--gpus is missing: say how many of how much memory, as in --gpus 1x80GB")
    found = GPUS.fullmatch(text)
    if found is None or not int(found[1]) or not float(found[2]):
        raise ConfigError(
            f"--gpus {text!r}: expected NUMBERxMEMORY, as in 1x80GB or 8x40GB (10^9 bytes)"
        )
    return int(found[1]), float(found[2])


def read_lengths(config: TrainConfig, prompt: int | None, notes: list[str]) -> Lengths:
    """Tokens of a turn, from the environment's own prompts and frames, played with random actions."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder = local_folder(config.model.path)
    name = shape_name(config.model.path)
    prompts, frame = _seen(config)
    if folder is not None and (Path(folder) / "preprocessor_config.json").is_file():
        images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    elif name is not None:
        shape = SHAPES[name]
        images = Qwen2VLImageProcessorPil(
            patch_size=shape["vision"]["patch_size"],
            temporal_patch_size=2,
            merge_size=2,
            size=shape["pixels"],
        )
    else:
        raise ConfigError(
            f"{folder} has no preprocessor_config.json, which says how many tokens an image is"
        )
    grid = images(images=[frame], return_tensors="pt")["image_grid_thw"]
    image = int(grid.prod()) // images.merge_size**2
    if prompt is None:
        words_of = folder if folder and (Path(folder) / "tokenizer.json").is_file() else None
        words: Any = AutoTokenizer.from_pretrained(words_of or model_folder("tiny-qwen3-vl"))
        if words_of is None:
            longest = len(_ids(words, "")) - 1 + max(map(estimated_tokens, prompts))
            notes.append(
                f"prompts were counted by words, a token for each {LETTERS} letters, as the model's tokenizer is "
                "not here; --prompt-tokens N gives another length"
            )
        else:  # one placeholder is there already
            longest = max(len(_ids(words, text)) for text in prompts) - 1
        prompt = longest + image
        notes.append(
            f"prompt: the longest of {len(prompts)} different ones, in {LOOKED_AT} episodes played at random"
        )
    if prompt < image:
        raise ConfigError(f"--prompt-tokens {prompt} is less than the {image} tokens of the image")
    return Lengths(prompt=prompt, image=image, reply=config.sampling.max_new_tokens)


def estimated_tokens(text: str) -> int:
    """Tokens of a text by a tokenizer of Qwen's kind, which is not here: it cuts as `PIECES`, then words.

    A blank goes with the word behind it; a digit is a token, and so is a letter that is not ASCII's.
    """
    pieces: list[str] = PIECES.findall(text)
    blanks = sum(a == " " and b.isalpha() for a, b in itertools.pairwise(pieces))
    sizes = (
        len(p) if not p.isascii() else math.ceil(len(p) / LETTERS) for p in pieces if p.isalpha()
    )
    return sum(sizes) + sum(not p.isalpha() for p in pieces) - blanks


def _ids(words: Any, text: str) -> list[int]:
    """The prompt as the model sees it, with one placeholder for the image."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    chat = words.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    return list(words(chat, add_special_tokens=False)["input_ids"])


def _seen(config: TrainConfig) -> tuple[set[str], np.ndarray]:
    """Prompts of some environments, played with random actions where they are listed; and a frame."""
    rng = np.random.default_rng(config.seed)
    prompts: set[str] = set()
    with Envs(config.env, config.env.train_split, config.seed, count=LOOKED_AT) as envs:
        envs.start()
        frame: np.ndarray = envs.observations[0]["image"]
        for i in range(LOOKED_AT):
            for _ in range(LONGEST):
                prompts.add(envs.observations[i]["prompt"])
                actions = envs.infos[i].get("actions")
                if not actions:
                    break
                outcome = envs.step(i, str(rng.choice(actions)))
                if outcome.terminated or outcome.truncated:
                    break
    return prompts, frame


def make_plan(
    config: TrainConfig,
    *,
    gpus: str | None,
    dollars_per_hour: float | None = None,
    results: Path | None = None,
    prompt_tokens: int | None = None,
) -> Plan:
    """Plan a run.

    Args:
        config: the recipe.
        gpus: `NUMBERxMEMORY`, as in `8x80GB`; may be left out for a recipe on a CPU.
        dollars_per_hour: of each GPU (or of the machine without one).
        results: JSON of `benchmarks/gpu.py`, for measured rates.
        prompt_tokens: of a prompt, image included; by default counted in the environment.

    Raises:
        ConfigError: an argument cannot be read, the model is not known here or not trained in its type, or the GPUs
            cannot share the work.
    """
    config.model.check_trained()
    ranks, size = read_gpus(gpus, config.model.device)
    for key, number in (
        ("env.num_envs", config.env.num_envs),
        ("ppo.minibatch_turns", config.ppo.minibatch_turns),
    ):
        if number % ranks:
            raise ConfigError(
                f"{key}={number} must be a multiple of the {ranks} GPUs, which share it; give --{key}"
            )
    if config.distributed.shard and ranks == 1:
        raise ConfigError("distributed.shard=true needs several GPUs: give --gpus 2x80GB or so")
    config.check_world(ranks)
    notes: list[str] = []
    shadow = Shadow(config.model)  # refuses a model that is not known
    lengths = read_lengths(config, prompt_tokens, notes)
    memory = plan_memory(shadow, config, lengths, ranks=ranks, size=size * 1e9)
    name = shape_name(config.model.path)
    rates = measured(results, name) if results else assumed(size)
    seconds = update_seconds(
        shadow, config, lengths, rates, ranks=ranks, microbatch=memory.microbatch
    )
    total = hours(seconds, config)
    local = min(ranks, NODE)
    plan = Plan(
        config=config,
        gpus=ranks,
        size_gb=size,
        lengths=lengths,
        parameters=shadow.parameters,
        trained=sum(p.numel() for p in shadow.trained),
        memory=memory,
        rates=rates,
        seconds=seconds,
        hours=total,
        dollars=None if dollars_per_hour is None else dollars_per_hour * ranks * total,
        host_bytes=local * sum(memory.host.values()) + memory.history,
        assumptions=[*notes, *_assumptions(config, rates, ranks)],
        advice=[],
    )
    if plan.fits:
        return plan
    return replace(plan, advice=list(_advice(plan)))


def _assumptions(config: TrainConfig, rates: Rates, ranks: int) -> Iterator[str]:
    if rates.measured:
        yield f"rates: {rates.source}"
    else:
        yield (
            f"times are estimates, not measurements, from the {rates.source}; of these "
            f"{rates.update_share:.0%} are reached in passes and {rates.memory_share:.0%} in decoding, of which a "
            f"layer takes at least {rates.layer_ms:g} ms; a merge goes through {rates.merge_entries_s / 1e9:g} "
            "billion weights a second, of each checkpoint that it makes again"
        )
    yield "every reply is as long as sampling.max_new_tokens"
    yield "environments, evaluations and checkpoints take no time"
    if config.guidance.kind == "sft":
        yield "the teacher writes a thought for every turn, at the first try"
    if config.guidance.kind == "external":
        yield "the corrector's answers take no time"
    if ranks > 1:
        yield (
            f"the {ranks} GPUs each hold the whole model and share environments and minibatches; gradients travel "
            f"at {rates.network_gb_s:g} GB/s; nodes of {NODE}, one history in all"
        )
    if config.distributed.shard:
        yield (
            "distributed.shard is not counted: weights, gradients and Adam's states are those of an unsharded run, "
            "of which an update needs less then"
        )


def _changes(config: TrainConfig, ranks: int) -> Iterator[tuple[str, TrainConfig]]:
    """Changes that need less memory, each by itself, the least first."""
    if config.ppo.microbatch_turns != "auto" and config.ppo.microbatch_turns > 1:
        yield "ppo.microbatch_turns=1", replace(config, ppo=replace(config.ppo, microbatch_turns=1))
    model = config.model
    checkpointed = replace(config, model=replace(model, gradient_checkpointing=True))
    if not model.gradient_checkpointing:
        yield "model.gradient_checkpointing=true", checkpointed
    envs, odd = divmod(config.env.num_envs, 4)
    if envs and not odd and envs % ranks == 0:
        fewer = replace(
            config,
            env=replace(config.env, num_envs=envs),
            rollout=replace(config.rollout, turns_per_env=4 * config.rollout.turns_per_env),
        )
        yield (
            f"env.num_envs={envs}, rollout.turns_per_env={4 * config.rollout.turns_per_env}",
            fewer,
        )
    if model.dtype == "float32" and model.train == "lora":
        yield "model.dtype=bfloat16", replace(config, model=replace(model, dtype="bfloat16"))
    if model.train == "full":
        yield "model.train=lora", replace(config, model=replace(model, train="lora"))
    everything = replace(
        checkpointed,
        ppo=replace(config.ppo, microbatch_turns=1),
        model=replace(checkpointed.model, train="lora", dtype="bfloat16"),
    )
    if everything != config:
        yield (
            "model.train=lora, model.dtype=bfloat16, model.gradient_checkpointing=true, ppo.microbatch_turns=1",
            everything,
        )
    start = ", model.adapter=null" if model.adapter else ""  # it is of this model
    for name in ("qwen3-vl-4b", "qwen2.5-vl-3b", "qwen3-vl-2b"):
        hub = SHAPES[name]["hub"]
        if hub != model.path:
            yield (
                f"model.path={hub}{start}, model.train=lora, model.dtype=bfloat16, "
                "model.gradient_checkpointing=true, ppo.microbatch_turns=1",
                replace(everything, model=replace(everything.model, path=hub, adapter=None)),
            )


def _advice(plan: Plan) -> Iterator[str]:
    """What makes the recipe fit, and how far each change goes."""
    room, any_fits = USED * plan.size_gb * 1e9, False
    size = plan.size_gb * 1e9
    for what, config in _changes(plan.config, plan.gpus):
        shadow = Shadow(config.model)
        if shadow.parameters > plan.parameters:
            continue
        memory = plan_memory(shadow, config, plan.lengths, ranks=plan.gpus, size=size)
        fits = memory.peak <= room
        any_fits |= fits
        verdict = "fits" if fits else "is not enough by itself"
        yield f"{what}: {memory.peak / 1e9:.1f} GB, {verdict}"
        if fits and "path" in what:
            return
    if not any_fits:
        yield "none of these fits: take GPUs with more memory"
