"""What a merge loses when it is cut to an adapter (`rollout.vllm.teacher_rank`): a table over ranks, of a run.

    python benchmarks/cut.py RUN --ranks 8,16,32,64

RUN is a finished run with adapters (`model.train: lora`) and TIES. The exact merge writes a reply to each of 16
first frames; the table says how far the log-probs of their tokens are from those of the merge cut to a rank.
Whether an agent learns the same from the two is not measured.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file

from gtr_turbo import checkpoint
from gtr_turbo.collect import Envs
from gtr_turbo.config import TrainConfig
from gtr_turbo.policy.cut import CutTeacher
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.settings import build_config, read_config
from gtr_turbo.teacher.history import FactorHistory
from gtr_turbo.turns.batch import make_inputs


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path)
    parser.add_argument("--ranks", default="8,16,32,64")
    options = parser.parse_args()
    config: TrainConfig = build_config(TrainConfig, read_config(options.run / "config.yaml"))
    torch.set_num_threads(config.threads)
    policy = Policy(config.model, temperature=config.sampling.temperature, seed=config.seed)
    history = FactorHistory(config.teacher, policy.change_of)
    history.load_state(load_file(checkpoint.folders(options.run)[-1] / "history.safetensors"))
    merged = history.merge()
    envs = Envs(config.env, config.env.eval_split, config.seed, 16)
    envs.start()
    shown = envs.observations
    observed = policy.observe([o["image"] for o in shown], [o["prompt"] for o in shown])
    policy.load_teacher(merged)
    with policy.as_teacher():
        replies = generate(policy, observed, config.sampling, torch.Generator().manual_seed(0))
    ids = [reply.response_ids for reply in replies]
    inputs = make_inputs(observed, ids, policy.processor.pad_token_id)
    mask = inputs.response_mask

    def logprobs() -> torch.Tensor:
        found: torch.Tensor = score(policy, inputs).logprobs.cpu()[mask]
        return found

    with policy.as_teacher():
        exact = logprobs()
    with policy.as_start():
        start = logprobs()
    print(f"{history.count} checkpoints, {int(mask.sum())} tokens of {len(ids)} replies")
    print("| rank | energy kept | nats per token away from the merge |\n|---|---|---|")
    print(f"| none: the start | 0 | {(start - exact).abs().mean():.5f} |")
    for rank in map(int, options.ranks.split(",")):
        policy.cut = CutTeacher(rank)
        policy.load_teacher(merged)
        with policy.as_cut_teacher():
            print(f"| {rank} | {policy.cut.energy:.4f} | {(logprobs() - exact).abs().mean():.5f} |")


if __name__ == "__main__":
    main()
