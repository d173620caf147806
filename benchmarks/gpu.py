"""The step of a 7B or 8B run on one GPU: rates, memory, and the published way, in one run.

    python benchmarks/gpu.py [--models qwen2.5-vl-7b qwen3-vl-8b] [--minutes 8] [--out benchmarks/results/gpu]

Nothing is downloaded: the models have the published shapes and random weights, the tokenizer is that of the
shipped starter, and prompts hold as many image tokens as the real ones. Random weights never end a reply, so
every reply has `--reply-tokens`. Each part is set against the rates of memory, matrix product and bus that the
same run measured. Results are written part by part (OUT.json, OUT.md), so a run that is cut keeps what it has; a
part or model that fails is written with its error, the others are measured, and the exit status is 1.
`--small` takes the same path with tiny models on the CPU. `--save DIR` writes such a model, for `gtr-turbo train`.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import math
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from gtr_turbo.collect import Envs
from gtr_turbo.config import ModelConfig, TrainConfig
from gtr_turbo.learning.update import make_optimizer
from gtr_turbo.planning.architectures import SHAPES, published
from gtr_turbo.policy import loading, model, starter
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.memory import CudaMeter, Microbatch
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.settings import build_config, config_file, read_config
from gtr_turbo.teacher.history import FactorHistory
from gtr_turbo.teaching_config import TeacherConfig
from gtr_turbo.turns.batch import make_inputs
from rollout import ours
from rollout import published as published_way

SMALL: dict[str, dict[str, Any]] = {
    "text": {
        "vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "vision": {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 64,
    },
}  # fmt: skip
"""What `--small` changes in them."""


def architecture(name: str, *, small: bool = False) -> Any:
    """The `transformers` config of a model, with the special tokens of the starter's tokenizer."""
    words = starter.tokenizer()
    shape = SHAPES[name]
    text, vision = dict(shape["text"]), dict(shape["vision"])
    if small:
        text, vision = text | SMALL["text"], vision | SMALL["vision"]
        text["head_dim"] = 16
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 3, 3]}
        vision |= {
            key: [1]
            for key in ("fullatt_block_indexes", "deepstack_visual_indexes")
            if key in vision
        }
    if "window_size" in vision:
        text.pop("head_dim", None)
    special = {
        f"{kind}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
        for kind, token in (
            ("image", "image_pad"), ("video", "video_pad"),
            ("vision_start", "vision_start"), ("vision_end", "vision_end"),
        )
    }  # fmt: skip
    text |= {
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    return published(name, text=text, vision=vision, **special)


def save_processor(name: str, folder: Path) -> None:
    """The starter's tokenizer, and the image processor of the published model."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    shape = SHAPES[name]
    starter.tokenizer().save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=shape["vision"]["patch_size"], temporal_patch_size=2, merge_size=2, size=shape["pixels"]
    ).save_pretrained(folder)  # fmt: skip


def random_weights(name: str, own: ModelConfig, *, small: bool) -> Any:
    """The model with random weights, made where they stay."""
    from transformers import AutoModelForImageTextToText

    with torch.device(own.device):
        return AutoModelForImageTextToText.from_config(
            architecture(name, small=small),
            dtype=loading.DTYPES[own.dtype],
            attn_implementation=own.attention,
        )


def make_policy(name: str, config: TrainConfig, folder: Path, *, small: bool) -> Policy:
    """The policy of a recipe around random weights."""
    save_processor(name, folder)
    with mock.patch.object(model, "load", lambda own: random_weights(name, own, small=small)):
        policy = Policy(
            replace(config.model, path=str(folder)), temperature=config.sampling.temperature
        )
    with torch.no_grad():
        for parameter_name, parameter in policy.trained().items():
            if "lora_B" in parameter_name:  # as of a run that has begun: fresh ones are 0
                parameter.normal_(std=1e-3)
    return policy


@dataclass
class Bench:
    """One model under measurement."""

    policy: Policy
    config: TrainConfig
    limits: dict[str, float]
    tokens: int
    """Of each reply."""
    steps: int
    """Environment steps of the published way."""
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        self.envs = Envs(self.config.env, self.config.env.train_split, 0)
        self.envs.start()
        named = dict(self.policy._plain.named_parameters())
        self.parameters = sum(p.numel() for p in named.values())
        self.weights = sum(p.nbytes for p in named.values())
        embeddings = self.policy._plain.get_input_embeddings().weight
        head = self.policy._plain.get_output_embeddings().weight
        tied = head is embeddings  # counted once then, and read as the head
        self.multiplied = self.parameters - embeddings.numel() - (0 if tied else head.numel())
        language = sum(p.nbytes for name, p in named.items() if not loading.is_vision(name))
        self.read_per_token = language - (0 if tied else embeddings.nbytes)

    def observe(self, count: int) -> list[Any]:
        """`count` observations of the environment."""
        shown = list(itertools.islice(itertools.cycle(self.envs.observations), count))
        return self.policy.observe([o["image"] for o in shown], [o["prompt"] for o in shown])

    def inputs(self, count: int) -> Any:
        """`count` turns with random replies."""
        size = len(self.policy.processor.tokenizer)
        draws = torch.Generator().manual_seed(0)
        replies = [torch.randint(300, size, (self.tokens,), generator=draws) for _ in range(count)]
        return make_inputs(self.observe(count), replies, self.policy.processor.pad_token_id)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of `work`, all kernels included."""
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_limits(device: torch.device, dtype: torch.dtype, *, small: bool) -> dict[str, float]:
    """What this device can do at most: memory and bus in GB/s, matrix products in TFLOP/s; the best of five."""
    size, width = (2**24, 256) if small else (2**31, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    host = torch.zeros(min(size, 2**29), dtype=torch.uint8, pin_memory=device.type == "cuda")
    a = torch.randn(width, width, device=device).to(dtype)

    def best(work: Callable[[], Any]) -> float:
        work()
        return min(timed(work, device) for _ in range(5))

    return {
        "memory_gb_s": 2 * size / best(lambda: target.copy_(source)) / 1e9,
        "bus_gb_s": host.nbytes / best(lambda: target[: len(host)].copy_(host, non_blocking=True)) / 1e9,
        "matmul_tflop_s": 2 * width**3 / best(lambda: a @ a) / 1e12,
    }  # fmt: skip


def measure_microbatch(bench: Bench) -> dict[str, Any]:
    """What `ppo.microbatch_turns: auto` chooses; the parts below use the largest number up to it that divides."""
    policy, ppo = bench.policy, replace(bench.config.ppo, microbatch_turns="auto")
    meter = CudaMeter(policy.device) if policy.device.type == "cuda" else None
    micro = Microbatch(ppo, print, meter)
    count = bench.config.ppo.minibatch_turns
    seconds = timed(
        lambda: micro.measure(policy, bench.observe(count), bench.tokens), policy.device
    )
    turns = max(n for n in range(1, micro.turns + 1) if count % n == 0)  # as a number given must
    bench.config = replace(bench.config, ppo=replace(ppo, microbatch_turns=turns))
    return {"turns": micro.turns, "probe_seconds": seconds}


def measure_generation(bench: Bench) -> dict[str, Any]:
    """Sampled tokens a second by batch, prompt included; the limit is reading the language weights once a step."""
    found = {}
    sampling = replace(bench.config.sampling, max_new_tokens=bench.tokens)
    for batch in sorted({1, max(1, len(bench.envs) // 4), len(bench.envs)}):
        observed = bench.observe(batch)
        draws = torch.Generator().manual_seed(0)
        replies: list[Any] = []

        def write(observed: Any = observed, draws: Any = draws, replies: Any = replies) -> None:
            replies += generate(bench.policy, observed, sampling, draws)

        with bench.policy.whole():
            seconds = timed(write, bench.policy.device)
        written = sum(len(reply.response_ids) for reply in replies)
        limit = batch * bench.limits["memory_gb_s"] * 1e9 / bench.read_per_token
        found[f"tokens_s_batch_{batch}"] = written / seconds
        found[f"share_of_memory_limit_batch_{batch}"] = written / seconds / limit
    return found


def measure_scoring(bench: Bench) -> dict[str, Any]:
    """Turns a second of the scoring pass, without a gradient: what the teacher costs beside its swap."""
    turns = int(bench.config.ppo.microbatch_turns)
    inputs = bench.inputs(turns)
    with torch.no_grad(), bench.policy.whole():
        score(bench.policy, inputs)
        seconds = timed(lambda: score(bench.policy, inputs), bench.policy.device)
    return _passes(bench, inputs, turns, seconds, flops=2)


def measure_update(bench: Bench) -> dict[str, Any]:
    """Turns a second of forward, backward and optimizer step; recomputed activations are work too."""
    turns, policy = int(bench.config.ppo.microbatch_turns), bench.policy
    inputs = bench.inputs(turns)
    optimizer = make_optimizer(policy, bench.config.ppo)

    def step() -> None:
        policy.model.train()
        try:
            score(policy, inputs).logprobs.sum().backward()
            optimizer.step()
        finally:  # also where memory ran out: the next parts write replies
            optimizer.zero_grad(set_to_none=True)
            policy.model.eval()

    step()
    again = 2 if bench.config.model.gradient_checkpointing else 0
    weights = 2 if bench.config.model.train == "full" else 0  # frozen weights have no gradient
    return _passes(bench, inputs, turns, timed(step, policy.device), flops=4 + again + weights)


def _passes(bench: Bench, inputs: Any, turns: int, seconds: float, *, flops: int) -> dict[str, Any]:
    """Rates of passes that make `flops` operations a weight and token; head and attention are not counted."""
    tokens = int(inputs.prompt_mask.sum() + inputs.response_mask.sum())
    rate = flops * bench.multiplied * tokens / seconds / 1e12
    return {
        "turns": turns,
        "prompt_tokens": int(inputs.prompt_mask.sum(1).max()),
        "reply_tokens": bench.tokens,
        "turns_s": turns / seconds,
        "tokens_s": tokens / seconds,
        "tflop_s": rate,
        "share_of_matmul_limit": rate / bench.limits["matmul_tflop_s"],
    }


def measure_swap(bench: Bench) -> dict[str, Any]:
    """The teacher in and out, the third time; and what the device held beyond the model while it changed."""
    policy = bench.policy
    first, loaded = (timed(policy.load_start, policy.device) for _ in range(2))
    for _ in range(3):
        policy.mover.take()
        cuda = policy.device.type == "cuda"
        before = _reset_peak() if cuda else 0
        with policy.as_teacher():
            pass
        beyond = torch.cuda.max_memory_allocated() - before if cuda else 0
    moved = policy.mover.take()
    seconds, mb = moved["time/swap"], moved["system/swap_mb"]
    rate = mb / 1e3 / seconds
    return {
        "seconds": seconds,
        "mb": mb,
        "gb_s": rate,
        "share_of_bus_limit": rate / bench.limits["bus_gb_s"],
        "device_mb_beyond_the_model": beyond / 1e6,
        "first_load_seconds": first,  # with the page-locked memory it is kept in
        "load_seconds": loaded,
    }


def measure_merge(bench: Bench) -> dict[str, Any]:
    """Checkpoints into the history of factors and the merge of them, for the last two layers, on the device."""
    policy, count = bench.policy, 4
    history = FactorHistory(TeacherConfig(), policy.change_of)
    layers = list(policy._adapted())
    last = layers[-14:]
    with mock.patch.object(policy, "_adapted", return_value=last):
        for _ in range(count):
            history.add(policy.factors())
            list(
                history.merged()
            )  # of one checkpoint more each time; the first compiles the kernels
        again = timed(lambda: list(history.merged()), policy.device)
        add = timed(lambda: history.add(policy.factors()), policy.device)
    out = timed(lambda: list(history.merged()), policy.device)
    sizes = {name: layer.base_layer.weight.numel() for name, layer in layers}
    share = sum(sizes[name] for name, _ in last) / sum(sizes.values())
    return {
        "tensors_measured": len(last),
        "tensors": len(layers),
        "share_of_parameters": share,
        "checkpoints": count + 1,
        "entries_s": (count + 1) * sum(sizes[name] for name, _ in last) / out,
        "add_seconds": add,
        "merge_seconds": out,
        "add_seconds_of_all_by_size": add / share,
        "merge_seconds_of_all_by_size": out / share,
        "seconds_of_all_a_further_checkpoint": again / count / share,
    }


def measure_steps(bench: Bench) -> dict[str, Any]:
    """Whole environment steps a second: collect, guide and update as a run makes them, with all epochs."""
    policy, config = bench.policy, bench.config
    config = replace(config, sampling=replace(config.sampling, max_new_tokens=bench.tokens))
    if not policy.has_teacher:
        policy.load_start()
    steps, laps = ours(config, policy, bench.envs, 0)
    return {"steps": steps, "steps_s": steps / sum(laps.values()), **laps}


def measure_published(bench: Bench) -> dict[str, Any]:
    """The published way on the same device: batch 1, a second copy of the model, padded second passes.

    The model is the stock one from here on: `peft`'s adapters, attention image by image.
    """
    config = bench.config
    for module in bench.policy.model.modules():
        vars(module).pop("forward", None)
    bench.policy._plain.model.visual.config._attn_implementation = config.model.attention
    config = replace(config, sampling=replace(config.sampling, max_new_tokens=bench.tokens))
    one = Envs(config.env, config.env.train_split, 1, count=1)
    one.start()
    # a hook of the model refers to the policy, which is not to be copied with it
    teacher = copy.deepcopy(bench.policy.model, {id(bench.policy): bench.policy}).eval()
    seconds = timed(
        lambda: published_way(config, bench.policy, teacher, one, bench.steps), bench.policy.device
    )
    return {"steps": bench.steps, "steps_s": bench.steps / seconds}


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "microbatch": measure_microbatch,
    "swap": measure_swap,
    "generation": measure_generation,
    "scoring": measure_scoring,
    "update": measure_update,
    "steps": measure_steps,
    "published": measure_published,
    "merge": measure_merge,
}


def _reset_peak() -> int:
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def recipe(name: str, *, small: bool, device: str, envs: int) -> TrainConfig:
    """The model's recipe with `envs` environments, two turns of each an update, made for this device."""
    config: TrainConfig = build_config(
        TrainConfig, read_config(config_file(SHAPES[name]["config"]))
    )
    own = replace(config.model, device=device)
    if small:
        own = replace(own, dtype="float32", lora_rank=4, lora_alpha=8)
    ppo = replace(
        config.ppo,
        minibatch_turns=2 * envs,
        microbatch_turns=math.gcd(2 * envs, 4 if small else 64),
    )
    return replace(
        config,
        model=own,
        env=replace(config.env, num_envs=envs),
        rollout=replace(config.rollout, turns_per_env=2),
        ppo=ppo,
        env_steps=max(config.env_steps, 2 * envs),
    )


def markdown(result: dict[str, Any]) -> str:
    """The result as tables."""
    lines = [f"# {result['device']}", "", f"`{result['command']}`, torch {result['torch']}", ""]
    for title, parts in (("limits", {"limits": result["limits"]}), *result["models"].items()):
        lines += [f"## {title}", "", "| part | measure | value |", "|---|---|---|"]
        for part, numbers in parts.items():
            for measure, number in numbers.items():
                shown = f"{number:.4g}" if isinstance(number, float) else number
                lines.append(f"| {part} | {measure} | {shown} |")
        lines.append("")
    return "\n".join(lines)


def write(out: Path, result: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(out.name + ".json").write_text(json.dumps(result, indent=1) + "\n")
    out.with_name(out.name + ".md").write_text(markdown(result))


def run_model(
    name: str, options: argparse.Namespace, result: dict[str, Any], folder: Path, ends: float
) -> None:
    """All parts of one model; what does not begin in time is written as left out."""
    found = result["models"].setdefault(name, {})
    config = recipe(name, small=options.small, device=options.device, envs=options.envs)
    began = time.perf_counter()
    try:
        policy = make_policy(name, config, folder, small=options.small)
        bench = Bench(
            policy, config, result["limits"], options.reply_tokens, options.published_steps
        )
    except Exception as error:
        traceback.print_exc()
        found["model"] = {"failed": repr(error)}
        write(options.out, result)
        return
    found["model"] = {
        "parameters": bench.parameters,
        "weights_gb": bench.weights / 1e9,
        "image_tokens": int(
            (bench.observe(1)[0].prompt_ids == policy.processor.image_token_id).sum()
        ),
        "trained": sum(p.numel() for p in policy.trained().values()),
        "build_seconds": time.perf_counter() - began,
    }
    cuda = policy.device.type == "cuda"
    for part, measure in PARTS.items():
        if part not in options.parts:
            continue
        if time.perf_counter() >= ends:
            found[part] = {"left_out": "the minutes were over"}
        else:
            gc.collect()
            try:
                if cuda:
                    torch.cuda.empty_cache()
                    _reset_peak()
                found[part] = measure(bench)
            except torch.OutOfMemoryError as error:
                policy.zero_grad(set_to_none=True)
                found[part] = {"left_out": f"out of memory: {str(error).splitlines()[0]}"}
            except Exception as error:  # a rented GPU is not to be left without the other parts
                traceback.print_exc()
                policy.zero_grad(set_to_none=True)
                found[part] = {"failed": repr(error)}
            if cuda:
                found[part]["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        print(name, part, found[part], flush=True)
        write(options.out, result)
    if {"steps_s"} <= set(found.get("steps", {})) & set(found.get("published", {})):
        found["ratio"] = {"steps": found["steps"]["steps_s"] / found["published"]["steps_s"]}
        write(options.out, result)


def host_memory(name: str) -> dict[str, float]:
    """GB (10^9 bytes) that a LoRA run keeps on the host, from the shapes alone, by `model.vision`."""
    from transformers import AutoModelForImageTextToText

    config = build_config(TrainConfig, read_config(config_file(SHAPES[name]["config"])))

    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(architecture(name))
    modules = dict(whole.named_modules())
    found = {
        "parameters": float(sum(p.numel() for p in whole.parameters())),
        "lora_rank": float(config.model.lora_rank),
    }
    for vision in ("frozen", "trained"):
        layers = loading.linear_layers(whole, vision=vision == "trained")
        count = sum(modules[layer].weight.numel() for layer in layers)
        found[f"base_gb_{vision}"] = found[f"teacher_gb_{vision}"] = 2 * count / 1e9
        # (out, in) of a layer: the factors are (r, in) and (out, r)
        sides = sum(sum(modules[layer].weight.shape) for layer in layers)
        factors = 4 * config.model.lora_rank * sides / 1e9
        found[f"factors_gb_a_checkpoint_{vision}"] = factors
        found[f"factors_history_gb_of_{config.num_updates}_{vision}"] = config.num_updates * factors
        found[f"ties_history_gb_{vision}"] = 16 * count / 1e9
        found[f"linear_history_gb_{vision}"] = 4 * count / 1e9
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES)[:2])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="no part begins later")
    parser.add_argument("--envs", type=int, default=64)
    parser.add_argument("--reply-tokens", type=int, default=128)
    parser.add_argument("--published-steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, on the CPU")
    parser.add_argument(
        "--save",
        type=Path,
        help="only write the first of --models, with random weights, to this folder",
    )
    parser.add_argument("--host", action="store_true", help="only print the host memory of a run")
    options = parser.parse_args(arguments)
    if options.host:
        print(json.dumps({name: host_memory(name) for name in options.models}, indent=1))
        return
    if options.small:
        options.device, options.envs, options.reply_tokens, options.published_steps = "cpu", 2, 6, 1
    elif not torch.cuda.is_available():
        parser.exit(2, "there is no CUDA device here; --small takes the same path on the CPU\n")
    if options.save:
        name = options.models[0]
        own = recipe(name, small=options.small, device=options.device, envs=options.envs).model
        save_processor(name, options.save)
        random_weights(name, own, small=options.small).save_pretrained(options.save)
        return
    began = time.perf_counter()
    device = torch.device(options.device)
    dtype = torch.float32 if options.small else torch.bfloat16
    result: dict[str, Any] = {
        "device": platform.machine() if options.small else torch.cuda.get_device_name(device),
        "command": "python benchmarks/gpu.py" + (" --small" if options.small else ""),
        "torch": torch.__version__,
        "limits": measure_limits(device, dtype, small=options.small),
        "models": {},
    }
    for number, name in enumerate(options.models):
        # the first model leaves time for the others
        share = (number + 1) / len(options.models)
        with tempfile.TemporaryDirectory() as folder:
            run_model(name, options, result, Path(folder), began + 60 * options.minutes * share)
        gc.collect()
        if not options.small:
            torch.cuda.empty_cache()
    write(options.out, result)
    parts = [part for found in result["models"].values() for part in found.values()]
    if any("failed" in part for part in parts):
        sys.exit(1)


if __name__ == "__main__":
    main()
