"""The recipes of published runs hold the published settings (docs/method.md says where ours differ)."""

import pytest

from gtr_turbo.config import TrainConfig
from gtr_turbo.envs import check_env, make_env
from gtr_turbo.settings import build_config, config_file, config_names, read_config

MODELS = {
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
}
SHARED = {
    "model.train": "lora", "model.vision": "trained", "model.lora_rank": 128, "model.lora_alpha": 256,
    "ppo.epochs": 4, "ppo.minibatch_turns": 128, "ppo.clip": 0.1, "ppo.ratio": "sequence",
    "ppo.lr": 1e-5, "ppo.lr_final": 1e-9, "ppo.adam_eps": 1e-7, "ppo.weight_decay": 0,
    "ppo.max_grad_norm": 1, "ppo.gamma": 0.9, "ppo.gae_lambda": 0.95, "ppo.value_coef": 0.5,
    "sampling.temperature": 0.2, "sampling.top_k": 5, "sampling.repetition_penalty": 1.2,
    "sampling.max_new_tokens": 256,
    "guidance.kind": "kl", "guidance.estimator": "clip", "guidance.beta": 1, "guidance.tokens": "thought",
    "teacher.method": "ties", "teacher.density": 0.8, "teacher.weights": "sma", "teacher.interval": 1,
    "turns_per_update": 1024,
}  # fmt: skip
TASKS = {
    "points24": {
        "env.id": "Points24", "env_steps": 30720, "num_updates": 30, "ppo.thought_weight": 0.5,
        "rollout.format_valid": 3, "rollout.format_invalid": -2,
        "env.options": {"prompt": "full", "early_truncation": True},
    },
    "alfworld": {
        "env.id": "Household", "env_steps": 20480, "num_updates": 20, "ppo.thought_weight": 0.2,
        "rollout.format_valid": 5, "rollout.format_invalid": -5,
        # every past action in the prompt, no words about the room, a random command for an inadmissible one
        "env.options": {
            "prompt": "full", "history": 50, "describe": False, "early_truncation": True,
            "illegal": "random",
        },
    },
}  # fmt: skip


def value(config, path):
    for name in path.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_a_published_recipe_holds_the_published_settings(task, model):
    config = build_config(TrainConfig, read_config(config_file(f"{task}-{model}")))
    published = {**SHARED, **TASKS[task], "model.path": MODELS[model]}
    assert {path: value(config, path) for path in published} == published
    assert (config.env.train_split, config.env.eval_split) == ("train", "held-out")
    for split in ("train", "held-out"):
        check_env(make_env(config.env.id, **config.env.options, split=split), episodes=1)


@pytest.mark.parametrize("name", [name for name in config_names() if "-vl-" in name])
def test_a_run_of_hours_is_kept_every_hour(name):
    """By `gtr-turbo plan` an update takes 7 to 23 minutes of Points24 and up to 45 of ALFWorld."""
    config = build_config(TrainConfig, read_config(config_file(name)))
    assert config.save.interval == (1 if name.startswith("alfworld") else 2)
