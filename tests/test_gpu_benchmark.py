"""benchmarks/gpu.py at small size, and the recipes it is about."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from gtr_turbo.config import ModelConfig, TrainConfig
from gtr_turbo.policy.model import Policy
from gtr_turbo.settings import build_config, config_file, config_names, read_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("gpu")
        for name in ("gpu", "rollout"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("qwen2.5-vl-7b", 8_292_166_656), ("qwen3-vl-8b", 8_767_123_696)],
)
def test_the_architectures_have_the_published_numbers_of_parameters(gpu, name, parameters):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(gpu.architecture(name))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_host_memory_of_a_run_by_hand(gpu):
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    found = gpu.host_memory("qwen2.5-vl-7b")
    assert found["teacher_gb_frozen"] == 2 * 28 * layer / 1e9
    kv, hidden, wide = 3584 + 512, 3584, 18944
    sides = 2 * (hidden + hidden) + 2 * kv + 3 * (hidden + wide)
    assert found["factors_gb_a_checkpoint_frozen"] == 4 * 128 * 28 * sides / 1e9
    assert found["factors_history_gb_of_30_frozen"] == 30 * found["factors_gb_a_checkpoint_frozen"]
    block = 1280 * 3840 + 1280 * 1280 + 3 * 1280 * 3420
    tower = 32 * block + 5120 * 5120 + 5120 * 3584
    assert found["ties_history_gb_trained"] == 16 * (28 * layer + tower) / 1e9


def test_a_small_run_measures_every_part_and_writes_it(gpu, tmp_path):
    arguments = ["--small", "--models", "qwen2.5-vl-7b", "--out", str(tmp_path / "gpu")]
    gpu.main(arguments)
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = result["models"]["qwen2.5-vl-7b"]
    assert set(found) == {"model", "ratio", *gpu.PARTS}
    assert not any("left_out" in part for part in found.values())
    assert found["model"]["image_tokens"] == 121  # of 300x300: (308 / 28) ** 2
    assert found["scoring"]["prompt_tokens"] > 121
    assert found["ratio"]["steps"] == found["steps"]["steps_s"] / found["published"]["steps_s"]
    assert all(number > 0 for number in result["limits"].values())
    swapped = 2 * sum(  # what adapters lie on, in and out, in float32
        tensor.numel() * 4
        for name, tensor in _small(gpu).items()
        if tensor.ndim == 2 and name.endswith("weight") and "embed" not in name and "lm_head" not in name
    )  # fmt: skip
    assert found["swap"]["mb"] == pytest.approx(swapped / 1e6)
    page = (tmp_path / "gpu.md").read_text()
    assert f"| update | tokens_s | {found['update']['tokens_s']:.4g} |" in page


def _small(gpu):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            gpu.architecture("qwen2.5-vl-7b", small=True)
        )
    return dict(model.named_parameters())


def test_a_part_that_fails_is_told_and_does_not_take_the_others_with_it(
    gpu, tmp_path, monkeypatch, capsys
):
    def broken(_):
        raise RuntimeError("the kernel is not there")

    monkeypatch.setattr(gpu, "PARTS", {"swap": broken, "generation": gpu.measure_generation})
    arguments = ["--small", "--models", "qwen3-vl-8b", "--parts", "swap", "generation"]
    with pytest.raises(SystemExit) as ended:
        gpu.main([*arguments, "--out", str(tmp_path / "gpu")])
    assert ended.value.code == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["models"]["qwen3-vl-8b"]
    assert found["swap"] == {"failed": "RuntimeError('the kernel is not there')"}
    assert found["generation"]["tokens_s_batch_2"] > 0
    assert "in broken" in capsys.readouterr().err

    def unbuilt(*_, **__):
        raise RuntimeError("no room")

    monkeypatch.setattr(gpu, "random_weights", unbuilt)
    with pytest.raises(SystemExit):
        gpu.main([*arguments, "--out", str(tmp_path / "gpu")])
    found = json.loads((tmp_path / "gpu.json").read_text())["models"]["qwen3-vl-8b"]
    assert found == {"model": {"failed": "RuntimeError('no room')"}}


def test_a_saved_model_of_random_weights_is_one_to_train(gpu, tmp_path):
    gpu.main(["--small", "--models", "qwen2.5-vl-7b", "--save", str(tmp_path)])
    policy = Policy(ModelConfig(path=str(tmp_path), train="lora"), temperature=1.0)
    assert policy._plain.config.model_type == "qwen2_5_vl"
    (seen,) = policy.observe([np.zeros((300, 300, 3), np.uint8)], ["1 2 3 4"])
    assert (seen.prompt_ids == policy.processor.image_token_id).sum() == 121


def test_a_run_out_of_time_says_what_it_left_out(gpu, tmp_path):
    gpu.main(
        ["--small", "--models", "qwen3-vl-8b", "--minutes", "0", "--out", str(tmp_path / "gpu")]
    )
    found = json.loads((tmp_path / "gpu.json").read_text())["models"]["qwen3-vl-8b"]
    assert found["model"]["image_tokens"] == 81  # (288 / 32) ** 2
    assert all(found[part] == {"left_out": "the minutes were over"} for part in gpu.PARTS)


@pytest.mark.parametrize("name", [name for name in config_names() if "-qwen" in name])
def test_the_recipes_of_real_models_are_sound(name):
    config = build_config(TrainConfig, read_config(config_file(name)))
    assert config.model.path.lower().removeprefix("qwen/").startswith(name.split("-", 1)[1][:9])
    assert (config.model.dtype, config.model.attention) == ("bfloat16", "sdpa")
    updates = {"Points24": 30, "Household": 20}[config.env.id]
    assert (config.turns_per_update, config.num_updates) == (1024, updates)
    assert config.rollout.rescore  # bfloat16 decodes and scores differently
    fast = name.endswith("-fast")
    assert (config.ppo.ratio == "token") == fast
    assert (config.sampling.top_k == 0 and config.sampling.repetition_penalty == 1) == fast


@pytest.fixture
def bench(gpu, tmp_path):
    """One of the models whose head is the embeddings, before any part."""
    config = gpu.recipe("qwen3-vl-2b", small=True, device="cpu", envs=3)
    policy = gpu.make_policy("qwen3-vl-2b", config, tmp_path, small=True)
    return gpu.Bench(policy, config, {"matmul_tflop_s": 1.0}, 6, 1)


def test_a_head_that_is_the_embeddings_is_counted_once_and_read(bench):
    named = dict(bench.policy._plain.named_parameters())
    shared = bench.policy._plain.get_input_embeddings().weight
    assert shared is bench.policy._plain.get_output_embeddings().weight
    language = sum(p.nbytes for name, p in named.items() if ".visual." not in name)
    assert bench.multiplied == sum(p.numel() for p in named.values()) - 2048 * 64
    assert bench.read_per_token == language


def test_a_micro_batch_of_auto_that_does_not_divide_is_cut_to_one_that_does(
    gpu, bench, monkeypatch
):
    monkeypatch.setattr(gpu.Microbatch, "measure", lambda self, *about: setattr(self, "turns", 4))
    assert gpu.measure_microbatch(bench)["turns"] == 4  # of 6: parts of 4 and 2
    assert bench.config.ppo.microbatch_turns == 3


def test_the_model_writes_again_after_an_update_that_ran_out_of_memory(gpu, bench, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("out")

    inputs = bench.inputs(2)
    bench.inputs = lambda turns: inputs
    monkeypatch.setattr(gpu, "score", full)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.measure_update(bench)
    assert not bench.policy.model.training
