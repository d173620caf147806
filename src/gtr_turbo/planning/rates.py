"""How fast: assumed rates of a GPU, or those that `benchmarks/gpu.py` measured; and the time of an update."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import TrainConfig
from gtr_turbo.planning.dryrun import Shadow
from gtr_turbo.planning.memory import Lengths, trained_bytes

GPUS = {
    24: ("RTX 4090", 165.0, 1008.0),
    40: ("A100 40 GB", 312.0, 1555.0),
    48: ("L40S", 362.0, 864.0),
    80: ("A100 80 GB", 312.0, 2039.0),
    141: ("H200", 989.0, 4800.0),
}
"""By GB of memory: a GPU of that size, its dense bfloat16 TFLOP/s and its memory's GB/s, of its data sheet."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the device does a second, and what it is known from."""

    source: str
    measured: bool
    matmul_tflop_s: float
    memory_gb_s: float
    bus_gb_s: float = 20.0
    """Between host and device."""
    update_share: float = 0.4
    """Of the matmul rate, in update passes."""
    scoring_share: float = 0.4
    """The same in passes without a gradient."""
    memory_share: float = 0.6
    """Of the memory's rate, while weights are read for one token of each reply."""
    layer_ms: float = 1.0
    """Least time of one layer in one decoding step of our own engine: launching its kernels."""
    merge_entries_s: float = 130e6
    """Weights a second that a merge goes through, of each checkpoint that it makes again from its factors. One CPU
    thread (docs/merging.md: 16.8 M in 0.13 s)."""
    network_gb_s: float = 25.0
    """Between nodes, of each GPU's gradients."""


def assumed(size_gb: float) -> Rates:
    """Rates of the largest known GPU that is not larger; of a CPU core for 0."""
    if not size_gb:
        return Rates(
            source="a CPU core: 50 GFLOP/s, 10 GB/s",
            measured=False,
            matmul_tflop_s=0.05,
            memory_gb_s=10.0,
        )
    known = max((n for n in GPUS if n <= size_gb), default=min(GPUS))
    name, matmul, memory = GPUS[known]
    return Rates(
        source=f"data sheet of a {name}: {matmul:g} TFLOP/s, {memory:g} GB/s",
        measured=False,
        matmul_tflop_s=matmul,
        memory_gb_s=memory,
        merge_entries_s=1e9,
    )


def measured(file: Path, model: str | None) -> Rates:
    """Rates from the JSON of `benchmarks/gpu.py`.

    Args:
        file: what `--out` wrote.
        model: key of the architecture; another model's shares are taken if the file lacks it, and said so.

    Raises:
        ConfigError: not such a file, or a part is missing in it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        name = model if model in found["models"] else next(iter(found["models"]))
        parts, limits = found["models"][name], found["limits"]
        rows = [key for key in parts["generation"] if key.startswith("share_of_memory_limit")]
        largest = max(rows, key=lambda key: int(key.rsplit("_", 1)[1]))
        return Rates(
            source=f"{found['device']}, measured with {name}",
            measured=True,
            matmul_tflop_s=float(limits["matmul_tflop_s"]),
            memory_gb_s=float(limits["memory_gb_s"]),
            bus_gb_s=float(parts["swap"]["gb_s"]),
            update_share=float(parts["update"]["share_of_matmul_limit"]),
            scoring_share=float(parts["scoring"]["share_of_matmul_limit"]),
            memory_share=float(parts["generation"][largest]),
            layer_ms=0.0,  # it is in the measured share
            merge_entries_s=float(parts["merge"]["entries_s"]),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"--measured {file} cannot be read: {error}") from error
    except (KeyError, TypeError, StopIteration, IndexError, AttributeError) as error:
        raise ConfigError(
            f"--measured {file} is not a whole result of benchmarks/gpu.py, which has the parts swap, generation, "
            f"scoring, update and merge ({str(error) or 'a model'} is missing): measure again, with more --minutes"
        ) from error


def update_seconds(
    shadow: Shadow,
    config: TrainConfig,
    lengths: Lengths,
    rates: Rates,
    *,
    ranks: int,
    microbatch: int,
) -> dict[str, float]:
    """Seconds of each part of an update on `ranks` GPUs, each with its share of the environments."""
    turns = config.turns_per_update / ranks
    tokens = turns * (lengths.prompt + lengths.reply)
    patches = turns * lengths.image * shadow.architecture.vision_config.spatial_merge_size**2
    # a multiply and an add for each weight and token; attention's own products are left out
    tower = 0 if shadow.caches_features else 2 * shadow.vision_weights * patches
    once = 2 * (shadow.language_weights * tokens + shadow.head * turns * lengths.reply) + tower
    flops = rates.matmul_tflop_s * 1e12
    scoring = once / (flops * rates.scoring_share)
    factor = 2 + (config.model.gradient_checkpointing) + (config.model.train == "full")
    steps = config.ppo.epochs * config.turns_per_update // config.ppo.minibatch_turns
    learned = config.ppo.epochs * turns
    if config.guidance.kind in ("sft", "external"):  # collected thoughts join each step
        learned += steps * config.guidance.imitation.samples / ranks
    passes = factor * once / turns * learned
    guided = config.guidance.kind in ("kl", "static") or config.guidance.monitor
    again = config.rollout.rescore or config.rollout.engine == "vllm"
    moved = 2 * shadow.exchanged * shadow.itemsize / (rates.bus_gb_s * 1e9)
    asking = scoring + moved
    if config.guidance.estimator == "full":
        # the agent is asked again, and the teacher put in place for each micro-batch
        asking = 2 * scoring + moved * turns / microbatch
    reduced = 2 * trained_bytes(shadow) * (ranks - 1) / ranks / (rates.network_gb_s * 1e9)
    return {
        "write replies": _agents_replies(shadow, config, lengths, rates, ranks),
        "write the teacher's thoughts": _thoughts(shadow, config, lengths, rates, turns, moved),
        "score again": scoring if again else 0.0,
        "ask the teacher": asking if guided else 0.0,
        "learn": passes / (flops * rates.update_share),
        "share gradients": steps * reduced,
        "remember and merge": shadow.exchanged * _gone_through(config) / rates.merge_entries_s,
    }


def _gone_through(config: TrainConfig) -> float:
    """Checkpoints that an update's merge goes through, on average over the run; of sums, the newest alone."""
    if config.history == "sums":
        return 1.0
    return (config.num_updates + 1) / 2 / config.teacher.interval


def _agents_replies(
    shadow: Shadow, config: TrainConfig, lengths: Lengths, rates: Rates, ranks: int
) -> float:
    """Seconds in which all replies of an update are written, one turn after the other."""
    rows, ours = config.env.num_envs / ranks, config.rollout.engine == "hf"
    return config.rollout.turns_per_env * _writing(shadow, lengths, rates, rows, ours=ours)


def _thoughts(
    shadow: Shadow, config: TrainConfig, lengths: Lengths, rates: Rates, turns: float, moved: float
) -> float:
    """The same of the merge's thoughts with `guidance.kind: sft`, one for each of a rank's turns.

    The trainer writes `imitation.samples` at once, after the teacher was put in place in `moved` seconds; vLLM
    as many as there are requests in flight.
    """
    if config.guidance.kind != "sft":
        return 0.0
    ours = config.teacher_rank is None
    most = config.guidance.imitation.samples if ours else config.rollout.vllm.concurrency
    rows = min(most, turns)
    written = turns / rows * _writing(shadow, lengths, rates, rows, ours=ours)
    return written + (moved if ours else 0.0)


def _writing(shadow: Shadow, lengths: Lengths, rates: Rates, rows: float, *, ours: bool) -> float:
    """Seconds in which `rows` replies are written side by side, prompts included; `ours`: in the trainer."""
    flops = rates.matmul_tflop_s * 1e12 * rates.scoring_share
    image = lengths.image * shadow.architecture.vision_config.spatial_merge_size**2
    prompt = 2 * (shadow.language_weights * lengths.prompt + shadow.vision_weights * image) * rows
    weights = (shadow.language_weights + shadow.head) * shadow.itemsize
    cache = rows * (lengths.prompt + lengths.reply / 2) * shadow.key_values
    reading = (weights + cache) / (rates.memory_gb_s * 1e9 * rates.memory_share)
    products = 2 * (shadow.language_weights + shadow.head) * rows / flops
    launching = len(shadow.layers) * rates.layer_ms / 1e3 if ours else 0.0
    step: float = max(reading, products, launching)
    total: float = prompt / flops + lengths.reply * step
    return total


def hours(seconds: Mapping[str, float], config: TrainConfig) -> float:
    """Hours of all updates; evaluations, environments and checkpoints are not in it."""
    return sum(seconds.values()) * config.num_updates / 3600
