"""`gtr-turbo sft`: imitate the environments' own experts. It makes the model that RL starts from.

Leaves out: RL, teachers, packing. One pass of this over a base model is the published start.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import PPOConfig
from gtr_turbo.envs import check_env, make_env
from gtr_turbo.envs.contract import attribute, resolve_id
from gtr_turbo.policy import starter
from gtr_turbo.policy.loading import DTYPES
from gtr_turbo.policy.memory import Microbatch
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.sft_config import DemonstrationConfig, SFTConfig
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Observed

Report = Callable[[dict[str, float]], None]
CLASSES = 32  # numbers a frame can show, 0..31, for the throw-away head
SLOTS = 16
SHOWN = 4
"""Most of the numbers that an environment can put into `shown`."""
WORDY_TURNS = 4000
"""So many turns of every environment a vocabulary is made of."""


def visible(info: Mapping[str, Any], game: bool) -> Tensor:
    """(SLOTS,) int64: the numbers a frame shows, by place; -100 where there is none.

    Read from the truth an environment puts into `info` (docs/environments.md): `shown`, and of the games built in
    `numbers` of n cards, `target` and `current`, `player` and `dealer`.

    Raises:
        ConfigError: `shown` is not what it must be.
    """
    labels = torch.full((SLOTS,), -100)
    shown = info.get("shown", ())
    places = list(shown) if isinstance(shown, (Sequence, np.ndarray)) else [None]
    whole = all(isinstance(n, (int, np.integer)) and 0 <= n < CLASSES for n in places)
    if len(places) > SHOWN or not whole:
        raise ConfigError(
            f"info['shown'] must list up to {SHOWN} whole numbers from 0 to {CLASSES - 1}, the labels of "
            f"vision_steps, got {shown!r:.200}; leave it out, or give vision_steps 0"
        )
    labels[SLOTS - len(places) :] = torch.tensor(places, dtype=torch.long)
    if not game:
        return labels
    numbers = info.get("numbers", ())
    offset = {2: 0, 4: 2}.get(len(numbers), 0)
    labels[offset : offset + len(numbers)] = torch.tensor(numbers, dtype=torch.long)
    for slot, key in enumerate(("target", "current", "player", "dealer"), start=8):
        if key in info:
            labels[slot] = int(info[key])
    return labels


class Demonstrations:
    """Observations without visual features, which fill a GPU; expert replies; and what the frames show."""

    def __init__(self) -> None:
        self.observed: list[Observed] = []
        self.replies: list[Tensor] = []
        self.labels: list[Tensor] = []

    def collect(
        self, policy: Policy, config: DemonstrationConfig, seed: int, *, labelled: bool
    ) -> None:
        """Let the expert of an environment play until `config.turns` turns are recorded.

        Args:
            policy: reads the observations.
            config: the environment, and how its expert plays.
            seed: of the episodes.
            labelled: record what the frames show, too.

        Raises:
            ConfigError: the environment has no `demonstrate`.
        """
        game = resolve_id(config.id).startswith("gtr/")
        for observation, reply, info in islice(played(config, seed), config.turns):
            (seen,) = policy.tokenize([observation["image"]], [observation["prompt"]])
            assert seen.shown is not None
            self.observed.append(replace(seen, frame=seen.shown))  # the larger one is not kept
            self.replies.append(policy.processor.reply_ids(json.dumps(reply, ensure_ascii=False)))
            if labelled:
                self.labels.append(visible(info, game))


def played(
    config: DemonstrationConfig, seed: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """The turns of an environment's expert without end: (observation, reply to learn, info).

    Raises:
        ConfigError: the environment has no `demonstrate`.
        ContractError: it breaks the contract.
    """
    env = make_env(config.id, **config.options)
    expert = attribute(env, "demonstrate")
    if expert is None:
        raise ConfigError(
            f"{config.id} has no demonstrate(rng): nothing to imitate (docs/environments.md)"
        )
    rng = np.random.default_rng(seed)
    try:
        check_env(env, episodes=1)
        observation, info = env.reset(seed=seed)
        while True:
            reply = expert(rng)
            action, legal = reply["action"], info.get("actions")
            if legal is None and (config.noise or config.stray):
                raise ConfigError(
                    f"{config.id} lists no info['actions'], of which noise and stray choose; give both 0"
                )
            if rng.random() < config.noise and legal:
                reply = {**reply, "action": str(rng.choice(legal))}
            yield observation, reply, info
            if config.stray and legal and rng.random() < config.stray:
                action = str(rng.choice(legal))
            observation, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                observation, info = env.reset()
    finally:
        env.close()


def vocabulary(config: SFTConfig) -> Any:
    """The tokenizer of a tiny model; None is that of the card games."""
    if config.vocabulary == "cards":
        return None
    texts, pieces = [str(n) for n in range(100)] * 40, set(config.pieces)
    for i, demonstrations in enumerate(config.demonstrations):
        turns = islice(played(demonstrations, config.seed * 1000 + i), WORDY_TURNS)
        for observation, reply, _ in turns:
            texts += [observation["prompt"], *map(str, reply.values())]
            keys = list(reply)
            pieces |= {f'{{"{keys[0]}": "', *(f'", "{key}": "' for key in keys[1:]), '"}'}
    return starter.tokenizer(texts, starter.WORD_TOKENS, sorted(pieces))


def _schedule(config: SFTConfig, step: int, steps: int) -> float:
    return min((step + 1) / max(1, config.warmup_steps), (steps - step) / steps)


def _batches(count: int, size: int, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(count, generator=generator) for _ in range(steps * size // count + 1)]
    )
    return list(order[: steps * size].split(size))


def _optimizer(parameters: Any, config: SFTConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay, foreach=True
    )


def pretrain_vision(
    policy: Policy, data: Demonstrations, config: SFTConfig, report: Report
) -> None:
    """Train the vision tower to name what frames show, with a linear head that is thrown away.

    Raises:
        ConfigError: no frame comes with a label.
    """
    shown = [i for i, label in enumerate(data.labels) if (label >= 0).any()]
    if not shown:
        raise ConfigError(
            "vision_steps needs environments that say in `info` what a frame shows (docs/environments.md); "
            "with these it must be 0"
        )
    tower = policy.model.model
    size = data.observed[0].grid
    tokens = int(size.prod()) // 4 if size is not None else 0
    width = policy.model.config.get_text_config().hidden_size
    head = nn.Linear(tokens * width, SLOTS * CLASSES).to(policy.device)
    parameters = [p for n, p in policy.model.named_parameters() if "visual" in n]
    optimizer = _optimizer([*parameters, *head.parameters()], config)
    for step, rows in enumerate(
        _batches(len(shown), config.batch_turns, config.vision_steps, config.seed)
    ):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(config, step, config.vision_steps)
        chosen = [shown[int(i)] for i in rows]
        inputs = policy.image_arguments([data.observed[i] for i in chosen])
        output = tower.get_image_features(**inputs, return_dict=True)
        features = torch.stack(output.pooler_output).flatten(1)
        features = nn.functional.rms_norm(features, features.shape[1:])
        logits = head(features).view(len(chosen), SLOTS, CLASSES)
        labels = torch.stack([data.labels[i] for i in chosen]).to(policy.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == config.vision_steps:
            right = (logits.argmax(-1) == labels)[labels >= 0].float().mean().item()
            report({"vision_step": step, "loss": loss.item(), "right": right})


def imitate(policy: Policy, data: Demonstrations, config: SFTConfig, report: Report) -> None:
    """Cross-entropy on the experts' replies, averaged over tokens."""
    parameters = list(policy.trained().values())
    optimizer = _optimizer(parameters, config)
    turns = config.microbatch_turns
    microbatch = Microbatch(PPOConfig(minibatch_turns=turns, microbatch_turns=turns), warnings.warn)
    policy.model.train()  # without it there is neither dropout nor gradient checkpointing
    try:
        for step, rows in enumerate(
            _batches(len(data.replies), config.batch_turns, config.steps, config.seed)
        ):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * _schedule(config, step, config.steps)
            chosen = sorted((int(i) for i in rows), key=lambda i: len(data.observed[i].prompt_ids))

            def accumulate(turns: int, chosen: list[int] = chosen) -> float:
                optimizer.zero_grad()  # of an attempt that ran out of memory
                return _accumulate(policy, data, chosen, turns)

            loss = microbatch.attempt(accumulate)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"gradient norm is {norm.item()} at step {step}; lower lr")
            optimizer.step()
            if step % 50 == 0 or step + 1 == config.steps:
                report({"step": step, "loss": loss, "grad_norm": norm.item()})
    finally:
        policy.model.eval()


def _accumulate(policy: Policy, data: Demonstrations, chosen: list[int], turns: int) -> float:
    """Add the gradient of the mean loss of the `chosen` replies, in passes of `turns`; returns the loss."""
    total, loss = sum(len(data.replies[i]) for i in chosen), 0.0
    for at in range(0, len(chosen), turns):  # of like lengths, so that little is padding
        part = chosen[at : at + turns]
        observed = policy.encode_images([data.observed[i] for i in part])
        replies = [data.replies[i] for i in part]
        inputs = make_inputs(observed, replies, policy.processor.pad_token_id)
        share = -score(policy, inputs).logprobs.sum() / total
        share.backward()
        loss += share.item()
    return loss


def _recipe(config: SFTConfig) -> str:
    """What `eval` and `play` need to know: the environment or its style of prompt, and how the model was run."""
    ids = {demonstrations.id for demonstrations in config.demonstrations}
    options = [demonstrations.options for demonstrations in config.demonstrations]
    styles = {given.get("prompt", "full") for given in options}
    env: dict[str, Any] = {"options": {"prompt": styles.pop() if len(styles) == 1 else "full"}}
    if len(ids) == 1:
        same = {k: v for k, v in options[0].items() if all(given.get(k) == v for given in options)}
        shared = {k: v for k, v in same.items() if k not in ("split", "expert", "solving")}
        env = {"id": ids.pop(), "options": shared}
        if same.get("split") == "train" and resolve_id(env["id"]).startswith("gtr/"):
            env["eval_split"] = "held-out"
    model = {name: getattr(config.model, name) for name in ("attention", "dtype", "device")}
    return yaml.safe_dump({"env": env, "model": model})


def train(config: SFTConfig, report: Report) -> Path:
    """Fine-tune and write the model; returns the folder.

    Raises:
        ConfigError: `out` is missing or holds weights, an environment has no expert, or the model cannot be
            trained in its type.
        OSError: `out` cannot be written.
    """
    if config.out is None:
        raise ConfigError("out is missing: give the folder to write the model to (--out DIR)")
    config.model.check_trained()
    torch.set_num_threads(config.threads)
    out, began = Path(config.out), time.monotonic()
    if out.is_file() or any(out.glob("*.safetensors")):
        raise ConfigError(
            f"out={out} holds weights already, or is a file; nothing is overwritten. Give another folder"
        )
    model = config.model
    with ExitStack() as stack:
        if config.architecture is not None:
            # random weights pass for a result; only adapters need them beside themselves
            aside = stack.enter_context(TemporaryDirectory()) if model.train == "full" else out
            starter.build(config.architecture, Path(aside), config.seed, vocabulary(config))
            model = replace(model, path=str(aside))
        policy = Policy(model, temperature=1.0, seed=config.seed)
    data = Demonstrations()
    for i, demonstrations in enumerate(config.demonstrations):
        seed, labelled = config.seed * 1000 + i, config.vision_steps > 0
        data.collect(policy, demonstrations, seed, labelled=labelled)
    report({"turns": len(data.replies), "seconds": time.monotonic() - began})
    out.mkdir(parents=True, exist_ok=True)  # what cannot be written is better known before
    if config.vision_steps:
        pretrain_vision(policy, data, config, report)
    imitate(policy, data, config, report)
    if config.save_dtype != "float32":
        policy.model.to(DTYPES[config.save_dtype])
    policy.save_student(out)
    (out / "recipe.yaml").write_text(_recipe(config), encoding="utf-8")
    report({"seconds": time.monotonic() - began})
    return out
