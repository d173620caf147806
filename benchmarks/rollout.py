"""Environment steps per second of collect + guide + update, against the published way, in one run.

    python benchmarks/rollout.py [--config points24] [--pairs 3] [--out benchmarks/results/rollout.json]

Both sides train the same model on the same environment with the same number of PPO epochs; each pair runs
ours, then the published way, on one thread, and the ratio is the median over pairs. The published way (the
code of RL4VLM, GTR and GTR-Turbo): one environment; batch 1 throughout; `generate`, then a second full
forward pass padded to 512 tokens for the log-probs; a second copy of the model for the teacher, one padded
forward a turn; one padded forward and backward a turn and epoch in the update.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from gtr_turbo.collect import Envs, collect
from gtr_turbo.config import TrainConfig
from gtr_turbo.learning.advantages import assign_credit
from gtr_turbo.learning.update import make_optimizer, update
from gtr_turbo.parsing import parse
from gtr_turbo.policy.model import Policy
from gtr_turbo.settings import build_config, config_file, read_config
from gtr_turbo.teacher.guidance import guide
from gtr_turbo.turns.batch import make_batch

PADDED = 512


def ours(
    config: TrainConfig, policy: Policy, envs: Envs, step: int
) -> tuple[int, dict[str, float]]:
    """One update as the trainer makes it; returns environment steps and seconds by part."""
    optimizer = make_optimizer(policy, config.ppo)
    laps, last = {}, time.perf_counter()
    with policy.whole():
        turns = collect(
            envs, policy, config.sampling, config.rollout, torch.Generator().manual_seed(step)
        )
    laps["collect"], last = time.perf_counter() - last, time.perf_counter()
    batch = make_batch(turns, len(envs), policy.processor.pad_token_id)
    with policy.whole():
        batch = guide(batch, policy, config.guidance, microbatch_turns=config.ppo.microbatch_turns)
    laps["guide"], last = time.perf_counter() - last, time.perf_counter()
    batch = assign_credit(
        batch,
        gamma=0.9,
        lam=0.95,
        normalize=True,
        eps=0.1,
        beta=1.0,
        credit="advantage",
        center=True,
    )
    update(
        policy, optimizer, batch, config.ppo, seed=step, progress=0.0, progress_after=1.0, max_logprob_gap=1.0
    )  # fmt: skip
    laps["update"] = time.perf_counter() - last
    return len(turns), laps


def _padded(
    policy: Policy, ids: torch.Tensor, images: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    pad = policy.processor.pad_token_id
    row = torch.full((1, max(PADDED, ids.shape[1])), pad)
    row[:, : ids.shape[1]] = ids
    mask = torch.zeros_like(row)
    mask[:, : ids.shape[1]] = 1
    kinds = (row == policy.processor.image_token_id).int()
    padded = {"input_ids": row, "attention_mask": mask, "mm_token_type_ids": kinds, **images}
    return {name: tensor.to(policy.device) for name, tensor in padded.items()}


def published(
    config: TrainConfig, policy: Policy, teacher: torch.nn.Module, envs: Envs, steps: int
) -> int:
    """`steps` turns the published way: play, score, teacher, then `epochs` passes of the update."""
    model = policy.model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    stored = []
    for _ in range(steps):
        shown = envs.observations[0]
        ids = policy.processor.encode([shown["image"]], [shown["prompt"]])[0][None].to(
            policy.device
        )
        images = policy.processor.image_inputs([policy.processor.shrink(shown["image"])])
        images = {name: tensor.to(policy.device) for name, tensor in images.items()}
        kinds = (ids == policy.processor.image_token_id).int()
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=kinds,
                do_sample=True,
                temperature=config.sampling.temperature,
                max_new_tokens=config.sampling.max_new_tokens,
                suppress_tokens=policy.processor.banned_token_ids,
                pad_token_id=policy.processor.pad_token_id,
                **images,
            )
            inputs = _padded(policy, out.cpu(), images)
            model(**inputs).logits.log_softmax(-1)
            teacher(**inputs).logits.log_softmax(-1)
        text = policy.processor.decode(out[0, ids.shape[1] :]).replace("<|im_end|>", "")
        outcome = envs.step(0, parse(text, envs.fields).action)
        if outcome.terminated or outcome.truncated:
            envs.reset(0, envs.episodes[0] + 1)
        stored.append((inputs, ids.shape[1], out.shape[1]))
    for _ in range(config.ppo.epochs):
        for inputs, start, end in stored:
            logits = model(**inputs).logits.log_softmax(-1)[0, start - 1 : end - 1]
            chosen = logits.gather(-1, inputs["input_ids"][0, start:end, None])
            (-chosen.sum() / len(stored)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="points24")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--published-steps", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config: TrainConfig = build_config(TrainConfig, read_config(config_file(options.config)))
    torch.set_num_threads(1)
    policy = Policy(config.model, temperature=config.sampling.temperature)
    policy.load_start()
    teacher = copy.deepcopy(policy.model).eval()
    many = Envs(config.env, config.env.train_split, 0)
    one = Envs(config.env, config.env.train_split, 1, count=1)
    many.start()
    one.start()
    rows = []
    for pair in range(options.pairs):
        steps, laps = ours(config, policy, many, pair)
        fast = steps / sum(laps.values())
        began = time.perf_counter()
        slow = published(config, policy, teacher, one, options.published_steps) / (
            time.perf_counter() - began
        )
        rows.append({"ours": fast, "published": slow, "ratio": fast / slow, **laps})
        print(
            f"pair {pair}: ours {fast:.1f}/s, published way {slow:.2f}/s, ratio {fast / slow:.1f}"
        )
    ratio = statistics.median(row["ratio"] for row in rows)
    share = statistics.median(row["guide"] / (row["collect"] + row["update"]) for row in rows)
    print(f"median ratio {ratio:.1f}; KL guidance adds {share:.1%} to collect + update")
    result = {
        "config": options.config,
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "median_ratio": ratio,
        "kl_share": share,
        "pairs": rows,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
