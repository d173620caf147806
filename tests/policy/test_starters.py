"""The shipped starters: small files of real classes that read the cards and play modestly."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from gtr_turbo.collect import Envs, play
from gtr_turbo.config import EnvConfig, ModelConfig, RolloutConfig, SamplingConfig
from gtr_turbo.evaluate import evaluate
from gtr_turbo.policy import starter
from gtr_turbo.policy.model import Policy

CLASSES = {
    "qwen3-vl": "Qwen3VLForConditionalGeneration",
    "qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
    "household-qwen3-vl": "Qwen3VLForConditionalGeneration",
    "household-qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
}
HOUSEHOLD = [name for name in starter.STARTERS if name.startswith("household-")]


@pytest.mark.parametrize("name", starter.STARTERS)
def test_a_starter_is_a_small_bf16_file_of_a_stock_class(name):
    folder = starter.FOLDER / name
    assert (folder / "model.safetensors").stat().st_size < 8e6
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model).__name__ == CLASSES[name]
    assert next(model.parameters()).dtype == torch.bfloat16
    tokens = AutoTokenizer.from_pretrained(folder)
    if name in HOUSEHOLD:
        pieces = tokens.convert_ids_to_tokens(tokens.encode("go to countertop 3"))
        assert pieces == ["go", "Ġto", "Ġcountertop", "Ġ3"]
        return
    assert tokens.convert_ids_to_tokens(tokens.encode("8*3=24")) == ["8", "*", "3", "=", "24"]


GAMES = [("EZPoints", {}), ("Points24", {"granularity": "reduction", "solvable_only": True})]


@pytest.mark.parametrize("name", starter.ARCHITECTURES)
@pytest.mark.parametrize(("env", "options"), GAMES)
def test_a_starter_reads_cards_it_never_saw(name, env, options):
    policy = Policy(ModelConfig(path=f"tiny-{name}", attention="eager"), temperature=1.0)
    config = EnvConfig(id=env, options={"prompt": "compact", **options}, num_envs=100)
    envs = Envs(config, "held-out", seed=5)
    envs.start()
    generator = torch.Generator().manual_seed(0)
    made = play(envs, range(100), policy, SamplingConfig(), RolloutConfig(), generator, greedy=True)
    assert sum(turn.facts.get("perception", False) for turn, _ in made) >= 97


@pytest.mark.parametrize("name", starter.ARCHITECTURES)
@pytest.mark.parametrize(("env", "options"), GAMES)
def test_a_starter_wins_some_but_leaves_most_to_learn(name, env, options):
    policy = Policy(ModelConfig(path=f"tiny-{name}", attention="eager"), temperature=1.0)
    config = EnvConfig(id=env, options={"prompt": "compact", "early_truncation": True, **options})
    result = evaluate(policy, config, SamplingConfig(), episodes=96, split="held-out", seed=1)
    assert 0.02 < result.summary()["success"] < 0.45


@pytest.mark.parametrize("name", HOUSEHOLD)
def test_a_household_starter_says_what_it_does_in_rooms_it_never_saw(name):
    policy = Policy(ModelConfig(path=f"tiny-{name}", attention="eager"), temperature=1.0)
    options = {"prompt": "compact", "history": 20}
    envs = Envs(EnvConfig(id="Household-Place", options=options, num_envs=48), "held-out", seed=5)
    envs.start()
    generator = torch.Generator().manual_seed(0)
    made = [
        turn
        for _ in range(2)
        for turn, _ in play(
            envs, range(48), policy, SamplingConfig(), RolloutConfig(), generator, greedy=True
        )
    ]
    assert sum(turn.valid for turn in made) >= 94
    assert sum(turn.facts.get("agreement", True) for turn in made) >= 90
    assert sum(turn.facts["admissible"] for turn in made) >= 80
