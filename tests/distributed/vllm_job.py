"""Two ranks whose replies come from vLLM; test_vllm_ranks.py starts both and reads what rank 0 writes.

python vllm_job.py MODEL_FOLDER OUT
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "policy"))

from vllm_fake import installed, serving

from gtr_turbo import trainer
from gtr_turbo.config import (
    DistributedConfig,
    ModelConfig,
    RolloutConfig,
    SamplingConfig,
    VllmConfig,
)
from gtr_turbo.distributed.launch import launch, leave
from gtr_turbo.distributed.ranks import connect, join
from gtr_turbo.teaching_config import GuidanceConfig, ImitationConfig
from tiny import Silent, make_policy, settings

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8}


def valid(seed):
    fields = {"cards": [2, 6], "formula": "", "thoughts": "2*6=12", "action": str(seed % 10 + 1)}
    return json.dumps(fields)


def config_of(path, **vllm):
    vllm = VllmConfig(teacher_rank=6, backoff_s=0.01, timeout_s=60.0, **vllm)
    return settings(
        path,
        env_steps=8,
        model=ModelConfig(path=path, attention="eager", **LORA),
        rollout=RolloutConfig(turns_per_env=2, engine="vllm", vllm=vllm),
        guidance=GuidanceConfig(kind="sft", imitation=ImitationConfig(samples=4, retries=0)),
        sampling=SamplingConfig(max_new_tokens=80),
    )


def own_engines(path, ranks, run, *, shard):
    """Each rank has an engine of its own; the first makes its second one during the run."""
    with pytest.MonkeyPatch.context() as patch:
        policy = make_policy(path, **LORA)
        faults = ("ok", "dead") if ranks.first else ()
        with installed(patch, policy, *faults) as vllm:
            vllm.server.says = valid
            config = config_of(path, mode="inprocess")
            config = replace(config, distributed=DistributedConfig(shard=shard))
            trainer.train(config, run, Silent(), ranks=ranks)
            told = [call for call in vllm.calls if call in ("add_lora", "remove_lora", "shutdown")]
            return ranks.gather(
                {
                    "engines": len(vllm.engines),
                    "told": told,
                    "places": sorted({"RANK", "WORLD_SIZE", "MASTER_PORT"} & set(vllm.seen[0])),
                }
            )


def one_server(path, ranks, run):
    """Both ranks speak to a server that was there."""
    policy = make_policy(path, **LORA) if ranks.first else None
    with serving(policy) if ranks.first else nullcontext() as server:
        if ranks.first:
            server.says = valid
        url = ranks.from_first(server and server.url)
        trainer.train(config_of(path, base_url=url), run, Silent(), ranks=ranks)
        ranks.total(0)  # nobody asks any more
        if not ranks.first:
            return None
        return {
            "left": list(server.loaded),
            "loads": [
                b["lora_name"] for p, b in server.requests if p.endswith("/load_lora_adapter")
            ],
            "unknown": server.unknown,
        }


def main():
    path, out = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    place = launch()
    connect(place)
    with join(place, "cpu", 600.0) as ranks:
        found = {
            "own": own_engines(path, ranks, out / "own", shard=False),
            "sharded": own_engines(path, ranks, out / "sharded", shard=True),
            "shared": one_server(path, ranks, out / "shared"),
        }
        if ranks.first:
            (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
    leave(0)
