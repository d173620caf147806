"""What a teacher in bfloat16 loses: its weights are `bfloat16(start + change)`, and small changes round away.

    python benchmarks/rounding.py [--lr 1e-5]

The starter with fresh adapters (rank 64) is taught with Adam to make some of its own replies likelier and others
less likely. After some steps the agent's change is made the teacher, so both should say the same. For every token
of the replies, d is how far the change moves its log-prob in float32. The table has, for the agent and the teacher
in bfloat16, the slope of their own move against d (1: all of the change arrives, 0: nothing); how far the two are
apart; and `teacher/rounding`.
"""

from __future__ import annotations

import argparse
from typing import Literal

import torch
from torch import Tensor

from gtr_turbo.collect import Envs
from gtr_turbo.config import EnvConfig, ModelConfig, SamplingConfig
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.turns.batch import make_inputs

STEPS = (1, 4, 8, 16, 32, 64)
REPLIES = 16


def policy(dtype: Literal["float32", "bfloat16"]) -> Policy:
    """The starter of EZPoints with adapters that change nothing yet."""
    model = ModelConfig(
        path="tiny-qwen3-vl",
        train="lora",
        lora_rank=64,
        lora_alpha=128,
        lora_dropout=0.0,
        dtype=dtype,
    )
    return Policy(model, temperature=1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lr", type=float, default=1e-5, help="of Adam; the 7B recipes have 1e-5")
    options = parser.parse_args()
    exact, coarse = policy("float32"), policy("bfloat16")
    envs = Envs(EnvConfig(options={"prompt": "compact"}), "train", 0, REPLIES)
    envs.start()
    seen = [(o["image"], o["prompt"]) for o in envs.observations]
    observed = exact.observe(*map(list, zip(*seen, strict=True)))
    draws = torch.Generator().manual_seed(0)
    replies = [r.response_ids for r in generate(exact, observed, SamplingConfig(), draws)]
    inputs = make_inputs(observed, replies, exact.processor.pad_token_id)
    mask = inputs.response_mask

    @torch.no_grad()
    def logprobs(agent: Policy) -> Tensor:
        found: Tensor = score(agent, inputs).logprobs[mask].double()
        return found

    begun, begun_coarse = logprobs(exact), logprobs(coarse)
    signs = torch.randn(REPLIES, 1, generator=draws)
    optimizer = torch.optim.Adam(exact.trained().values(), lr=options.lr, eps=1e-7)
    print(f"{int(mask.sum())} tokens, learning rate {options.lr:g}; rms in nats per token")
    print(
        "| steps | rms of d | agent's slope | teacher's slope | rms of teacher - agent | teacher/rounding |"
    )
    print("|---|---|---|---|---|---|")
    for step in range(1, max(STEPS) + 1):
        optimizer.zero_grad()
        loss = -(score(exact, inputs).logprobs * mask * signs).sum() / mask.sum()
        loss.backward()
        optimizer.step()
        if step not in STEPS:
            continue
        with torch.no_grad():
            for name, parameter in coarse.trained().items():
                parameter.copy_(exact.trained()[name])
        coarse.load_teacher(coarse.deltas())
        d, agent = logprobs(exact) - begun, logprobs(coarse)
        with coarse.as_teacher():
            teacher = logprobs(coarse)
        slopes = [float((move - begun_coarse) @ d / (d @ d)) for move in (agent, teacher)]
        rms = [float(x.square().mean().sqrt()) for x in (d, teacher - agent)]
        print(
            f"| {step} | {rms[0]:.4f} | {slopes[0]:.2f} | {slopes[1]:.2f} | {rms[1]:.4f} | "
            f"{coarse.teacher_rounding():.2f} |"
        )


if __name__ == "__main__":
    main()
