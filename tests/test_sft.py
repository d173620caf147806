"""`gtr-turbo sft`: what is demonstrated, what a vocabulary holds, and that imitation learns."""

import json
import warnings
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from gtr_turbo import sft
from gtr_turbo.agents import stored_settings
from gtr_turbo.checks import ConfigError
from gtr_turbo.config import EnvConfig, ModelConfig
from gtr_turbo.envs import ContractError, make_env
from gtr_turbo.envs.cards.numberline import NumberLineEnv
from gtr_turbo.policy import starter
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.settings import (
    SFT_CONFIGS,
    build_config,
    config_file,
    config_names,
    merge,
    read_config,
)
from gtr_turbo.sft_config import DemonstrationConfig, SFTConfig
from gtr_turbo.turns.batch import make_inputs

HOUSE = {"prompt": "compact", "split": "train"}


def turns(count, **settings):
    return list(islice(sft.played(DemonstrationConfig(**settings), seed=3), count))


def last_action(observation):
    """What was played before; None in the beginning."""
    past = observation["prompt"].splitlines()[1].removeprefix("past: ")
    return past.split("', '")[-1].strip("'") or None


def test_the_expert_plays_what_it_demonstrates():
    for (_, reply, _), (after, _, _) in pairwise(turns(4, id="Household-Place", options=HOUSE)):
        assert last_action(after) in (reply["action"], None)


def test_after_a_stray_action_the_experts_is_demonstrated():
    """Random actions are played, and each reply is the expert's for the state they led to."""
    env = make_env("Household-Place", **HOUSE)
    made = turns(12, id="Household-Place", options=HOUSE, stray=1.0)
    env.reset(seed=3)
    strayed = 0
    for (_, before, _), (observation, reply, _) in pairwise(made):
        played = last_action(observation)
        strayed += played != before["action"]
        env.step(played)
        assert reply == env.unwrapped.demonstrate(np.random.default_rng(0))
    assert strayed >= 8


def test_all_weights_are_not_trained_in_bfloat16(tmp_path):
    """The numbers of the error: at 0.1 the distance is 2^-11, and half of it is 0.00024."""
    weight = torch.tensor(0.1, dtype=torch.bfloat16)
    assert torch.equal(weight - 2e-4, weight)
    assert not torch.equal(weight - 3e-4, weight)
    model = ModelConfig(dtype="bfloat16")  # to play
    with pytest.raises(ConfigError, match=r"model\.dtype='bfloat16' cannot be trained"):
        sft.train(SFTConfig(out=str(tmp_path / "out"), model=model), print)
    assert not (tmp_path / "out").exists()
    ModelConfig(dtype="bfloat16", train="lora").check_trained()
    for name in config_names(SFT_CONFIGS):
        build_config(SFTConfig, read_config(config_file(name, SFT_CONFIGS))).model.check_trained()


def test_noise_replaces_actions_only():
    clean, noisy = (
        turns(30, id="EZPoints", options={"prompt": "compact"}, noise=noise) for noise in (0, 1)
    )
    assert clean[0][1]["thoughts"] == noisy[0][1]["thoughts"]
    assert all(reply["action"] in info["actions"] for _, reply, info in noisy)
    assert len({reply["action"] for _, reply, _ in noisy}) >= 8


def test_an_environment_without_an_expert_is_refused(monkeypatch):
    monkeypatch.setattr(sft, "attribute", lambda env, name: None)
    with pytest.raises(ConfigError, match="EZPoints has no demonstrate"):
        next(sft.played(DemonstrationConfig(), seed=0))


def test_a_vocabulary_of_demonstrations_has_a_token_for_every_word():
    demonstrations = DemonstrationConfig(id="Household-Place", options=HOUSE, stray=0.3)
    config = SFTConfig(
        architecture="qwen3-vl",
        vocabulary="demonstrations",
        pieces=(", go to",),
        demonstrations=[demonstrations],
    )
    tokens = sft.vocabulary(config)
    reply = '{"thoughts": "I hold the mug 2.", "action": "go to cabinet 12"}'
    pieces = tokens.convert_ids_to_tokens(tokens.encode(reply))
    assert pieces == [
        '{"thoughts": "', "I", "Ġhold", "Ġthe", "Ġmug", "Ġ2", ".",
        '", "action": "', "go", "Ġto", "Ġcabinet", "Ġ12", '"}',
    ]  # fmt: skip
    assert tokens.decode(tokens.encode(reply)) == reply
    assert len(tokens.encode("go to drawer 3, go to drawer 4")) == 7


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"pieces": (", ",)}, "vocabulary must be 'demonstrations'"),
        ({"vocabulary": "demonstrations"}, "no architecture"),
    ],
)
def test_a_vocabulary_needs_a_model_of_its_own(settings, error):
    with pytest.raises(ConfigError, match=error):
        SFTConfig(**settings)


def test_a_tiny_model_learns_what_is_shown(tmp_path):
    """In 40 steps the loss falls under a third, the vision tower's labels too, and the folder loads again."""
    rows = []
    config = SFTConfig(
        out=str(tmp_path / "model"),
        architecture="qwen3-vl",
        model=ModelConfig(vision="trained", attention="eager"),
        vision_steps=40,
        steps=40,
        batch_turns=8,
        warmup_steps=5,
        demonstrations=[
            DemonstrationConfig(
                id="Household-Place", options={**HOUSE, "expert": "search"}, turns=48, stray=0.5
            )
        ],
        vocabulary="demonstrations",
    )
    folder = sft.train(config, rows.append)
    losses = [row["loss"] for row in rows if "step" in row]
    assert losses[-1] < losses[0] / 3
    seen = [row["right"] for row in rows if "vision_step" in row]
    assert seen[0] < 0.3 < 0.6 < seen[-1]
    policy = Policy(ModelConfig(path=str(folder)), temperature=1.0)
    text = json.dumps({"thoughts": "I hold nothing.", "action": "look"})
    assert policy.processor.decode(policy.processor.reply_ids(text)) == f"{text}<|im_end|>"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["env"] == {
        "id": "Household-Place",
        "options": {"prompt": "compact"},
        "eval_split": "held-out",
    }


def test_the_start_of_a_real_run_is_an_adapter_that_is_trained_on_and_evaluated(tmp_path):
    """The recipe of the 7B start on the tiny model: the adapter writes as it was taught, and can go on in RL."""
    given = read_config(config_file("points24-qwen2.5-vl-7b", SFT_CONFIGS))
    tiny = {"path": "tiny-qwen2.5-vl", "lora_rank": 4, "dtype": "float32", "device": "cpu"}
    small = {"threads": 1, "steps": 2, "batch_turns": 4, "warmup_steps": 0}
    over = {"model": tiny, **small, "lr": 1e-3, "out": str(tmp_path / "start")}
    given["demonstrations"][0]["turns"] = 8
    config = build_config(SFTConfig, merge(given, over))
    folder = sft.train(config, lambda row: None)
    trained = load_file(folder / "adapter_model.safetensors")
    assert any(weight.abs().max() > 0 for name, weight in trained.items() if "lora_B" in name)
    assert any("visual" in name for name in trained)
    stored = stored_settings(folder, "student")
    base = starter.model_folder("tiny-qwen2.5-vl")
    assert stored["model"] == {
        "path": base,
        "adapter": str(folder),
        "train": "lora",
        "vision": "trained",
        "lora_rank": 4,
        "lora_alpha": 256,
        "attention": "sdpa",
        "dtype": "float32",
        "device": "cpu",
    }
    assert stored["env"]["id"] == "Points24"
    policy = Policy(ModelConfig(**stored["model"]), temperature=1.0)
    loaded = policy.trained()
    assert len(loaded) == len(trained)
    for name, weight in trained.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], weight)


@pytest.mark.parametrize("kind", ["a file", "weights"])
def test_nothing_is_overwritten_and_no_other_models_files_are_mixed_in(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "weights":
        out.mkdir()
    (out if kind == "a file" else out / "adapter_model.safetensors").write_text("precious")
    rows = []
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        sft.train(SFTConfig(out=str(out), steps=1), rows.append)
    assert not rows


def test_the_vision_tower_cannot_learn_without_labels(monkeypatch, tmp_path):
    monkeypatch.setattr(sft, "visible", lambda info, game: torch.full((sft.SLOTS,), -100))
    few = DemonstrationConfig(id="NumberLine", turns=4, options={"prompt": "compact"})
    config = SFTConfig(out=str(tmp_path / "out"), demonstrations=[few], vision_steps=1, steps=1)
    with pytest.raises(ConfigError, match="vision_steps"):
        sft.train(config, lambda row: None)


def test_the_vision_tower_cannot_learn_where_it_is_frozen():
    with pytest.raises(ConfigError, match="vision_steps=5 would train the vision tower"):
        SFTConfig(vision_steps=5, model=ModelConfig(vision="frozen"))


def shown(policy, count):
    data = sft.Demonstrations()
    config = DemonstrationConfig(options={"prompt": "compact"}, turns=count)
    data.collect(policy, config, seed=0, labelled=True)
    return data


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_made_again_where_memory_is_to_be_saved(tiny, checkpointing):
    """`transformers` does so in training mode only. Three passes: one a micro-batch, two with checkpointing."""
    lora = {"train": "lora", "lora_rank": 4, "vision": "trained", "attention": "eager"}
    policy = Policy(
        ModelConfig(path=str(tiny), gradient_checkpointing=checkpointing, **lora), temperature=1.0
    )
    data, passes = shown(policy, 6), []
    layer = next(m for name, m in policy.named_modules() if name.endswith("layers.0.mlp"))
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    config = SFTConfig(steps=1, batch_turns=6, microbatch_turns=2)
    sft.imitate(policy, data, config, lambda row: None)
    assert len(passes) == 3 * (1 + checkpointing)
    assert not policy.model.training


def test_a_pass_that_memory_does_not_hold_is_made_again_in_smaller_ones(tiny, monkeypatch):
    """The loss of the step is that of one pass over all."""
    config = SFTConfig(steps=1, batch_turns=6, microbatch_turns=6, lr=1e-3)
    losses, sizes, whole = [], [], sft.score

    def scarce(policy, inputs):
        sizes.append(len(inputs.observed))
        if len(inputs.observed) > most:
            raise torch.OutOfMemoryError
        return whole(policy, inputs)

    monkeypatch.setattr(sft, "score", scarce)
    for most in (6, 1):
        policy = Policy(ModelConfig(path=str(tiny), attention="eager"), temperature=1.0)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            sft.imitate(policy, shown(policy, 6), config, losses.append)
        assert [str(w.message).split(": ")[1][:13] for w in told] == ["micro-batches"] * (
            6 // most // 3
        )
    assert sizes == [6, 6, 3, *[1] * 6]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], abs=1e-5)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-3)


def test_features_of_a_frozen_tower_are_made_a_pass_at_a_time(tiny):
    """24,000 turns of a 7B model have 21 GB of them."""
    policy = Policy(ModelConfig(path=str(tiny), attention="eager"), temperature=1.0)
    data = shown(policy, 6)
    assert all(observed.features is None for observed in data.observed)
    seen = policy.encode_images(data.observed)
    again = policy.observe([o.frame for o in data.observed], ["go"] * 6)
    for one, other in zip(seen, again, strict=True):
        assert torch.equal(one.features, other.features)
    rows = []
    sft.imitate(policy, data, SFTConfig(steps=1, batch_turns=6, microbatch_turns=6), rows.append)
    inputs = make_inputs(seen, data.replies, policy.processor.pad_token_id)
    fresh = Policy(ModelConfig(path=str(tiny), attention="eager"), temperature=1.0)
    logprobs = score(fresh, inputs).logprobs
    assert rows[0]["loss"] == pytest.approx(
        -logprobs.sum().item() / sum(map(len, data.replies)), rel=1e-4
    )


def test_the_recipe_beside_a_start_names_one_environment_or_none(tmp_path):
    """And the deals it was not shown; options of the demonstrator are not the game's."""
    one = {"prompt": "full", "split": "train", "solving": 0.5}
    config = SFTConfig(demonstrations=[DemonstrationConfig(id="Points24", options=one)])
    assert yaml.safe_load(sft._recipe(config))["env"] == {
        "id": "Points24",
        "options": {"prompt": "full"},
        "eval_split": "held-out",
    }
    mixed = [DemonstrationConfig(id=name) for name in ("NumberLine", "Blackjack")]
    recipe = yaml.safe_load(sft._recipe(SFTConfig(demonstrations=mixed)))
    assert recipe["env"] == {"options": {"prompt": "full"}}


def test_a_failure_leaves_no_random_weights_that_pass_for_a_model(tmp_path):
    few = DemonstrationConfig(id="NumberLine", turns=4, options={"prompt": "compact"})
    out = tmp_path / "out"
    tiny = {"architecture": "qwen3-vl", "model": ModelConfig(vision="trained"), "steps": 1}
    config = SFTConfig(out=str(out), demonstrations=[few], batch_turns=4, **tiny)

    def interrupted(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sft.train(config, interrupted)
    assert not list(tmp_path.rglob("*.safetensors"))
    rows = []
    assert (sft.train(config, rows.append) / "model.safetensors").exists()
    assert [row["step"] for row in rows if "step" in row] == [0]


def test_an_adapter_without_a_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="names no base_model_name_or_path"):
        stored_settings(tmp_path, "student")


def test_a_wrong_setting_of_a_demonstration_is_told_with_its_place():
    for wrong, told in (({"id": 3}, "id=3 must be text"), ({"turn": 3}, "unknown setting 'turn'")):
        with pytest.raises(ConfigError, match=rf"demonstrations\[1\]: {told}"):
            build_config(SFTConfig, {"demonstrations": [{}, wrong]})


def test_the_frame_of_a_household_has_labels():
    """(kind of receptacle, closed, objects in it, hand) in the last four places."""
    env = make_env("Household-Place", **HOUSE)
    _, info = env.reset(seed=3)
    assert sft.visible(info, game=True)[-4:].tolist() == [0, 0, 0, 0]
    went = next(action for action in info["actions"] if action.startswith("go to"))
    _, _, _, _, info = env.step(went)
    kind, closed, count, held = sft.visible(info, game=True)[-4:].tolist()
    taken = [action for action in info["actions"] if action.startswith("take")]
    assert (kind > 0, held, count) == (True, 0, len(taken)) or closed
    assert torch.equal(sft.visible({"numbers": [1, 2]}, game=True)[-4:], torch.full((4,), -100))


def test_keys_of_built_in_games_are_labels_in_no_other_environment():
    info = {"player": (3, 4), "target": "door", "numbers": 3, "shown": np.array([31, 0])}
    assert sft.visible(info, game=False).tolist() == [-100] * 14 + [31, 0]


@pytest.mark.parametrize("shown", [[32], [-1], [0.5], 3, [1, 2, 3, 4, 5], "door"])
def test_what_a_frame_shows_must_be_labels(shown):
    with pytest.raises(
        ConfigError, match=r"list up to 4 whole numbers from 0 to 31.*vision_steps 0"
    ):
        sft.visible({"shown": shown}, game=False)


@pytest.mark.parametrize("wanted", [{"noise": 0.1}, {"stray": 0.1}])
def test_noise_wants_actions_to_choose_from(wanted):
    options = {"granularity": "formula", "prompt": "compact"}
    config = DemonstrationConfig(id="Points24", options=options, turns=1, **wanted)
    with pytest.raises(ConfigError, match=r"lists no info\['actions'\]"):
        next(sft.played(config, seed=0))


def test_an_environment_that_breaks_the_contract_teaches_nothing(monkeypatch):
    monkeypatch.setattr(
        NumberLineEnv, "demonstrate", lambda self, rng: {"action": "+", "current number": "1"}
    )
    config = DemonstrationConfig(id="NumberLine", turns=1)
    with pytest.raises(ContractError, match="demonstrate must give"):
        next(sft.played(config, seed=0))


def test_names_of_options_must_be_text():
    for make in (DemonstrationConfig, EnvConfig):
        with pytest.raises(ConfigError, match=r"options\.True must be text.*YAML reads on"):
            make(options={True: 1, "prompt": "compact"})
