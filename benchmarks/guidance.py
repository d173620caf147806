"""What guidance costs: time per update of none, static, kl and sft, at the same settings, in one run.

    python benchmarks/guidance.py [--config points24] [--updates 5] [--out benchmarks/results/guidance.json]

Each kind has a run of its own: the trainer's own steps on the recipe, from the same starting model. The kinds
take turns, an update each, in an order that rotates, so that other work on the machine meets all of them
alike. `--warmup` first updates of each are not counted: in the first the teacher is the agent, and there
is no thought yet to imitate. Reported are medians of wall and CPU seconds per update, by part, and ratios to
kl: the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from gtr_turbo.config import TrainConfig
from gtr_turbo.learner import Learner
from gtr_turbo.settings import build_config, config_file, read_config
from gtr_turbo.tracking import Clock

KINDS = ("none", "static", "kl", "sft")


def settings(options: argparse.Namespace) -> TrainConfig:
    config: TrainConfig = build_config(TrainConfig, read_config(config_file(options.config)))
    if not options.quick:
        return config
    return replace(
        config,
        env=replace(config.env, num_envs=16),
        rollout=replace(config.rollout, turns_per_env=2),
        ppo=replace(config.ppo, minibatch_turns=32, microbatch_turns=16),
        guidance=replace(config.guidance, imitation=replace(config.guidance.imitation, samples=16)),
    )


def one(learner: Learner, iteration: int) -> dict[str, float]:
    """One update; seconds by part, and of the whole by the wall's clock and by the CPU's."""
    wall, cpu, clock = time.perf_counter(), time.process_time(), Clock()
    _, batch, _ = learner.step(iteration, clock)
    learner.remember(iteration, batch, clock)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "response_tokens": float(batch.inputs.response_mask.sum(1).float().mean()),
        **clock.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="points24")
    parser.add_argument("--updates", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the turns, to try it")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = settings(options)
    torch.set_num_threads(options.threads)
    made: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        learners = {}
        for kind in KINDS:
            own = replace(config, guidance=replace(config.guidance, kind=kind))
            learners[kind] = Learner(own, Path(folder) / kind, print)
            learners[kind].begin()
        for iteration in range(options.warmup + options.updates):
            first = iteration % len(KINDS)
            round_ = {k: one(learners[k], iteration) for k in KINDS[first:] + KINDS[:first]}
            told = ", ".join(f"{kind} {round_[kind]['cpu']:.1f}" for kind in KINDS)
            print(f"update {iteration + 1}: CPU seconds {told}", flush=True)
            made.append(round_)
    rounds = made[options.warmup :]
    result = {
        "config": options.config,
        "quick": options.quick,
        "machine": f"{platform.machine()}, {options.threads} thread(s)",
        "torch": torch.__version__,
        "turns_per_update": config.turns_per_update,
        "rounds": len(rounds),
        "median_seconds": {kind: _medians([r[kind] for r in rounds]) for kind in KINDS},
        "ratio_to_kl": {
            kind: {
                clock: statistics.median(r[kind][clock] / r["kl"][clock] for r in rounds)
                for clock in ("wall", "cpu")
            }
            for kind in KINDS
        },
        "updates": rounds,
    }
    for kind in KINDS:
        ratio, parts = result["ratio_to_kl"][kind], result["median_seconds"][kind]
        print(f"{kind:<7} {ratio['cpu']:.2f} of kl by CPU, {ratio['wall']:.2f} by wall; ", end="")
        print(", ".join(f"{name} {value:.2f}" for name, value in parts.items()))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


if __name__ == "__main__":
    main()
