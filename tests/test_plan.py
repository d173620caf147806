"""`gtr-turbo plan`: against the tensors of the tiny models, published counts, and numbers worked out by hand."""

import gc
import json
from dataclasses import replace

import pytest
import torch

from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.config import ModelConfig, SamplingConfig, TrainConfig
from gtr_turbo.learning.update import make_optimizer
from gtr_turbo.planning import make_plan
from gtr_turbo.planning.dryrun import Shadow
from gtr_turbo.planning.memory import (
    Lengths,
    generation_bytes,
    scoring_bytes,
    trained_bytes,
    update_bytes,
)
from gtr_turbo.planning.plan import estimated_tokens
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.scoring import score
from gtr_turbo.settings import build_config, config_file, merge, read_config
from gtr_turbo.teacher.history import History
from gtr_turbo.teaching_config import TeacherConfig
from tiny import Bytes, inputs_of, make_policy, observations

LORA = {"train": "lora", "lora_rank": 8, "lora_alpha": 16}
KINDS = [
    {"train": "full"},
    {"train": "full", "vision": "trained", "dtype": "bfloat16"},
    LORA,
    {**LORA, "vision": "trained", "dtype": "bfloat16"},
]


def recipe(name, **over):
    return build_config(TrainConfig, merge(read_config(config_file(name)), over))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_adapters_optimizer_teacher_and_history_are_those_of_the_real_tensors(either, kind):
    policy = make_policy(either, **kind)
    shadow = Shadow(policy.config)
    plain = {n: p for n, p in policy.model.named_parameters() if "lora_" not in n}
    assert shadow.weights == sum(p.nbytes for p in plain.values())
    trained = policy.trained()
    assert sum(p.nbytes for p in shadow.trained) == sum(p.nbytes for p in trained.values())
    optimizer = make_optimizer(policy, TrainConfig().ppo)
    for parameter in [*trained.values(), *policy.value_head.parameters()]:
        parameter.grad = torch.zeros_like(parameter)
    assert trained_bytes(shadow) == sum(
        p.grad.nbytes for group in optimizer.param_groups for p in group["params"]
    )
    optimizer.step()
    moments = [s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert 2 * trained_bytes(shadow) == sum(m.nbytes for m in moments)
    history = History(TeacherConfig())
    history.add(policy.deltas())
    sums = {name: t for name, t in history.state().items() if name != "count"}
    assert 16 * shadow.exchanged == sum(t.nbytes for t in sums.values())
    policy.load_teacher(history.merged())
    teacher = [t for name, t in policy.teacher_state().items() if name != "norms"]
    assert shadow.exchanged * shadow.itemsize == sum(t.nbytes for t in teacher)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[3]])
def test_activations_are_within_a_fifth_of_counted_tensors(either, kind, checkpointed):
    policy = make_policy(either, attention="sdpa", gradient_checkpointing=checkpointed, **kind)
    observed = observations(policy, 1) * 6
    inputs = inputs_of(policy, observed, [torch.full((64,), 300)] * 6)
    policy.model.train()
    with Bytes() as counted:
        score(policy, inputs).logprobs.sum().backward()
    gradients = sum(p.grad.nbytes for p in policy.trained().values() if p.grad is not None)
    lengths = Lengths(prompt=len(observed[0].prompt_ids), image=16, reply=64)
    planned = sum(update_bytes(Shadow(policy.config), lengths, 6).values())
    assert planned == pytest.approx(counted.peak - gradients, rel=0.2)


@pytest.mark.parametrize("kind", [KINDS[0], LORA])
def test_generation_is_within_a_fifth_of_counted_tensors(either, kind):
    policy = make_policy(either, attention="sdpa", **kind)
    observed = observations(policy, 1) * 6
    policy.processor.end_token_id = -1  # no reply ends early
    gc.collect()
    with Bytes() as counted:
        generate(
            policy, observed, SamplingConfig(max_new_tokens=64), torch.Generator().manual_seed(0)
        )
    lengths = Lengths(prompt=len(observed[0].prompt_ids), image=16, reply=64)
    planned = generation_bytes(Shadow(policy.config), lengths, 6)
    assert sum(planned.values()) == pytest.approx(counted.peak, rel=0.2)
    assert (
        planned["key-value cache"] == 6 * (lengths.prompt + 63) * 4 * 2 * 2 * 32 * 4
    )  # layers, keys and values, heads, width


@pytest.mark.parametrize("kind", [KINDS[0], LORA])
def test_scoring_is_within_a_fifth_of_counted_tensors(either, kind):
    policy = make_policy(either, attention="sdpa", **kind)
    observed = observations(policy, 1) * 6
    inputs = inputs_of(policy, observed, [torch.full((64,), 300)] * 6)
    config = replace(recipe("ezpoints"), model=policy.config)
    lengths = Lengths(prompt=len(observed[0].prompt_ids), image=16, reply=64)
    gc.collect()
    with torch.no_grad(), Bytes() as counted:
        score(policy, inputs)
    planned = scoring_bytes(Shadow(policy.config), config, lengths, rows=6, turns=2)
    assert sum(planned.values()) == pytest.approx(counted.peak, rel=0.2)
    full = replace(config, guidance=replace(config.guidance, estimator="full"))
    more = scoring_bytes(Shadow(policy.config), full, lengths, rows=6, turns=2)
    vocabulary = len(policy.banned)
    assert more["distributions of agent and teacher"] == 4 * 4 * 2 * 64 * vocabulary


def test_prompts_are_counted_by_words_where_there_is_no_tokenizer(capsys):
    # "Go", " to", " ", "1", ", ", "count"+"ertop"... : letters by six, a digit each, a blank with its word
    assert estimated_tokens("Go to 12, countertop") == 1 + 1 + 1 + 2 + 1 + 2
    assert estimated_tokens("") == 0
    assert estimated_tokens("手牌 3") == 2 + 1 + 1
    assert main(["plan", "--config", "alfworld-qwen3-vl-2b", "--gpus", "1x80GB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("were counted by words" in line for line in found["assumptions"])
    # fifty past actions of some words each, and as many commands to choose from
    assert 700 < found["tokens"]["prompt"] < 1300


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656),
        ("Qwen/Qwen3-VL-2B-Instruct", 2_127_532_032),
        ("Qwen/Qwen3-VL-4B-Instruct", 4_437_815_808),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696),
    ],
)
def test_the_built_in_models_have_the_published_numbers_of_parameters(path, parameters):
    assert Shadow(ModelConfig(path=path, dtype="bfloat16")).parameters == parameters


@pytest.fixture(scope="module")
def seven():
    """The published run on a GPU of 80 GB."""
    return make_plan(recipe("points24-qwen2.5-vl-7b"), gpus="1x80GB", dollars_per_hour=2.0)


def test_the_published_run_by_hand(seven):
    assert seven.lengths.image == 121
    assert seven.trained == 414_597_120  # METHOD: about 415 M
    memory = seven.memory
    assert memory.always["weights"] == 2 * 8_292_166_656
    assert memory.always["adapters"] == 4 * 414_597_120
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    block = 1280 * 3840 + 1280 * 1280 + 3 * 1280 * 3420
    adapted = 28 * layer + 32 * block + 5120 * 5120 + 5120 * 3584
    assert memory.history == 30 * 4 * 414_597_120  # the factors of 30 checkpoints
    assert memory.host == {"the teacher": 2 * adapted, "the agent's own weights": 2 * adapted}
    tokens = seven.lengths.prompt + 256
    assert memory.generation["key-value cache"] == 64 * (tokens - 1) * 28 * 2 * 512 * 2
    assert memory.update["activations kept"] == 28 * memory.microbatch * tokens * 3584 * 2
    assert seven.fits
    assert seven.dollars == pytest.approx(2 * seven.hours)
    assert seven.hours == pytest.approx(30 * sum(seven.seconds.values()) / 3600)
    assert seven.seconds["remember and merge"] == pytest.approx(adapted * 15.5 / 1e9)


def test_vllm_takes_its_share_always_or_asleep_while_replies_are_written():
    def plan(**vllm):
        rollout = {"engine": "vllm", "vllm": {"gpu_memory": 0.4, **vllm}}
        over = {"model": {"vision": "frozen"}, "rollout": rollout, "eval": {"episodes": 0}}
        return make_plan(recipe("points24-qwen2.5-vl-7b", **over), gpus="1x80GB").memory

    awake, asleep, elsewhere = plan(), plan(sleep=True), plan(base_url="http://h:1")
    assert awake.always["vLLM"] == asleep.generation["vLLM"] == int(0.4 * 80e9)
    assert awake.generation == {}
    assert "vLLM" not in {**asleep.always, **elsewhere.always, **elsewhere.generation}
    assert asleep.host["vLLM's weights, asleep"] == asleep.always["weights"]
    assert asleep.microbatch > awake.microbatch


def test_beside_vllm_the_trainer_writes_what_is_the_merges():
    def plan(engine, **over):
        over = {"model": {"vision": "frozen"}, **over}
        rollout = {"rollout": {"engine": engine, **over.pop("rollout", {})}}
        return make_plan(recipe("points24-qwen2.5-vl-7b", **over, **rollout), gpus="1x80GB").memory

    own, quiet = plan("hf").generation, {"eval": {"episodes": 0}}
    assert plan("vllm").generation == own  # evaluations of the merge
    thoughts = {"guidance": {"kind": "sft", "imitation": {"samples": 32}}}
    cache, half = (
        m["key-value cache"] for m in (own, plan("vllm", **quiet, **thoughts).generation)
    )
    assert half == cache / 2  # of 64 environments
    cut = {"rollout": {"vllm": {"teacher_rank": 128}}}
    assert plan("vllm", **quiet, **thoughts, **cut).generation == {}


def test_what_the_teacher_writes_and_the_agent_imitates_takes_time(seven):
    sft = make_plan(
        recipe("points24-qwen2.5-vl-7b", guidance={"kind": "sft"}), gpus="1x80GB"
    ).seconds
    swap = seven.seconds["ask the teacher"] - seven.seconds["score again"]
    # as many at once, and as often, as the agent's replies
    assert sft["write the teacher's thoughts"] == pytest.approx(sft["write replies"] + swap)
    # 64 in each of 32 steps, beside 4 times 1,024 turns
    assert sft["learn"] == pytest.approx(1.5 * seven.seconds["learn"])
    assert sft["ask the teacher"] == seven.seconds["ask the teacher"]  # guidance.monitor
    assert seven.seconds["write the teacher's thoughts"] == 0
    external = make_plan(
        recipe("points24-qwen2.5-vl-7b", guidance={"kind": "external", "external": {"model": "m"}}),
        gpus="1x80GB",
    )
    assert external.seconds["learn"] == sft["learn"]
    assert any("corrector's answers" in text for text in external.assumptions)


def test_a_teacher_cut_to_twice_the_agents_rank_takes_twice_its_adapters_on_the_host():
    def plan(kind):
        rollout = {"engine": "vllm", "vllm": {"teacher_rank": 256}}
        over = {"model": {"vision": "frozen"}, "rollout": rollout, "guidance": {"kind": kind}}
        return make_plan(recipe("points24-qwen2.5-vl-7b", **over), gpus="1x80GB").memory

    memory = plan("sft")
    assert memory.host["the teacher as an adapter"] == 2 * memory.always["adapters"]
    assert "the teacher as an adapter" not in plan("kl").host


def test_more_gpus_share_the_work_but_not_the_merge(seven):
    two = make_plan(recipe("points24-qwen2.5-vl-7b"), gpus="2x80GB")
    halved = ("write replies", "score again", "learn")
    for part in halved[1:]:
        assert two.seconds[part] == pytest.approx(seven.seconds[part] / 2)
    assert (
        two.seconds["write replies"] > seven.seconds["write replies"] / 2
    )  # weights are read all the same
    assert two.seconds["remember and merge"] == seven.seconds["remember and merge"]
    assert two.seconds["share gradients"] == pytest.approx(
        4 * 8 * trained_of(seven) / 25e9
    )  # epochs, steps of one
    assert two.host_bytes - seven.host_bytes == sum(seven.memory.host.values())


def trained_of(plan):
    return plan.memory.step["gradients"]  # 2 (n - 1) / n of it travels, for n = 2 all of it once


def test_a_recipe_that_does_not_fit_says_what_to_change(capsys):
    small = ["plan", "--config", "points24-qwen3-vl-2b", "--gpus", "1x24GB", "--json"]
    wide = ["--ppo.microbatch_turns", "128", "--model.gradient_checkpointing", "false"]
    assert main([*small, *wide]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert found["bytes"]["peak"] > 0.9 * 24e9
    one, checkpointing = found["advice"][:2]
    assert one.startswith("ppo.microbatch_turns=1: ")
    assert one.endswith("fits")
    assert checkpointing.startswith("model.gradient_checkpointing=true: ")
    assert main([*small, "--ppo.microbatch_turns", "1", *wide[2:]]) == 0  # the advice is right
    planned = json.loads(capsys.readouterr().out)["bytes"]["peak"] / 1e9
    assert f"{planned:.1f} GB" in one


def test_no_advice_changes_the_turns_of_an_update(capsys):
    """Four times the turns of a quarter of 6 environments would be others, which minibatches may not divide."""
    odd = ["--env.num_envs", "6", "--rollout.turns_per_env", "8", "--ppo.minibatch_turns", "48"]
    odd += ["--ppo.microbatch_turns", "1", "--prompt-tokens", "2000"]
    recipe = ["plan", "--config", "points24-qwen2.5-vl-7b", "--gpus", "1x24GB", "--json"]
    assert main([*recipe, *odd]) == 1
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice
    assert not any(text.startswith("env.num_envs=") for text in advice)


def test_no_advice_is_to_train_all_weights_in_bfloat16(capsys):
    """Most of each step would be rounded away."""
    full = ["plan", "--config", "points24-qwen3-vl-2b", "--gpus", "1x8GB", "--json"]
    full += ["--model.train", "full", "--model.dtype"]
    assert main([*full, "float32"]) == 1
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert any(text.startswith("model.train=lora: ") for text in advice)
    assert all("model.train=lora" in text for text in advice if "bfloat16" in text)
    assert main([*full, "bfloat16"]) == 2
    assert "model.dtype='bfloat16' cannot be trained" in capsys.readouterr().err


def measured_file(path, **parts):
    model = {
        "swap": {"gb_s": 50.0},
        "generation": {"share_of_memory_limit_batch_1": 0.1, "share_of_memory_limit_batch_64": 0.5},
        "scoring": {"share_of_matmul_limit": 0.5},
        "update": {"share_of_matmul_limit": 0.25},
        "merge": {"entries_s": 4e7},
    }
    result = {
        "device": "GPU X",
        "limits": {"matmul_tflop_s": 500.0, "memory_gb_s": 3000.0},
        "models": {"qwen2.5-vl-7b": model | parts},
    }
    path.write_text(json.dumps(result))
    return path


def test_measured_rates_take_the_place_of_estimates(seven, tmp_path):
    file = measured_file(tmp_path / "gpu.json")
    found = make_plan(recipe("points24-qwen2.5-vl-7b"), gpus="1x80GB", results=file)
    assert found.seconds["score again"] == pytest.approx(
        seven.seconds["score again"] * (312 * 0.4) / (500 * 0.5)
    )
    assert found.seconds["learn"] == pytest.approx(
        seven.seconds["learn"] * 312 * 0.4 / (500 * 0.25)
    )
    assert found.rates.memory_share == 0.5  # of the largest batch
    assert found.rates.merge_entries_s == 4e7
    assert not any("estimates" in text for text in found.assumptions)
    assert any("times are estimates" in text for text in seven.assumptions)


def fails(capsys, arguments, *parts):
    assert main(["plan", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gtr-turbo: ")
    for part in parts:
        assert part in error


def test_wrong_input_is_refused_with_what_to_do(capsys, tmp_path):
    seven = ["--config", "points24-qwen2.5-vl-7b"]
    fails(capsys, seven, "--gpus is missing", "--gpus 1x80GB")
    for text in ("80GB", "0x80GB", "1x80", "ax80GB"):
        fails(capsys, [*seven, "--gpus", text], f"--gpus {text!r}", "as in 1x80GB")
    fails(capsys, [*seven, "--gpus", "128x80GB"], "env.num_envs=64", "multiple of the 128 GPUs")
    fails(capsys, [*seven, "--gpus", "1x80GB", "--dollars-per-hour", "-1"], "above 0")
    unknown = [*seven, "--gpus", "1x80GB", "--model.path", "Some/Model-9B"]
    fails(capsys, unknown, "'Some/Model-9B'", "config.json", "hf download", "Qwen2.5-VL-7B")
    fails(capsys, [*seven, "--gpus", "1x80GB", "--prompt-tokens", "5"], "121 tokens of the image")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    given = [*seven, "--gpus", "1x80GB", "--measured"]
    fails(capsys, [*given, broken], "cannot be read")
    partial = measured_file(tmp_path / "partial.json", swap={"left_out": "the minutes were over"})
    fails(capsys, [*given, partial], "not a whole result", "gb_s")


def test_the_tiny_recipe_is_shown_for_a_cpu(capsys):
    assert main(["plan"]) == 0
    shown = capsys.readouterr().out
    assert "ezpoints on a CPU" in shown
    assert "ESTIMATES" in shown
    with pytest.raises(ConfigError, match="2 GPUs"):
        make_plan(
            recipe("ezpoints", ppo={"minibatch_turns": 1, "microbatch_turns": 1}), gpus="2x8GB"
        )
