import json
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText

from gtr_turbo.checks import ConfigError
from gtr_turbo.planning.dryrun import Shadow
from gtr_turbo.policy import starter, swap
from gtr_turbo.policy.loading import adapter_settings
from gtr_turbo.policy.scoring import score
from tiny import inputs_of, make_policy, observations, perturb, responses

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
FORMS = pytest.mark.parametrize("form", [{}, LORA], ids=["full", "lora"])


def noise(policy, *, scale=0.02, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(d.shape, generator=generator) for n, d in policy.deltas()}


def bits(policy):
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def logprobs(policy):
    observed = observations(policy, 2)
    return score(policy, inputs_of(policy, observed, responses(policy, 2))).logprobs


@torch.no_grad()
def plain_logprobs(policy, model):
    """The same from a stock model, one row after the other, without our scoring."""
    observed, written = observations(policy, 2), responses(policy, 2)
    rows = []
    for seen, reply in zip(observed, written, strict=True):
        ids = torch.cat([seen.prompt_ids, reply])[None]
        kinds = (ids == policy.processor.image_token_id).int()
        pixels = policy.processor.image_inputs([policy.processor.shrink(seen.frame)])
        logits = model.eval()(input_ids=ids, mm_token_type_ids=kinds, **pixels).logits[0]
        logits[:, policy.processor.banned_token_ids] = -torch.inf
        everything = (logits / policy.temperature).log_softmax(-1)[-len(reply) - 1 : -1]
        rows.append(everything.gather(1, reply[:, None])[:, 0])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def stock(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager")


@FORMS
def test_the_weights_come_back_bit_for_bit(either, form):
    policy = make_policy(either, **form)
    perturb(policy)
    policy.load_teacher(noise(policy))
    before, own = bits(policy), logprobs(policy)
    with policy.as_teacher():
        assert not same(bits(policy), before)
        assert (logprobs(policy) - own).abs().max() > 1e-3
    assert same(bits(policy), before)
    with pytest.raises(ZeroDivisionError), policy.as_teacher():
        raise ZeroDivisionError
    assert same(bits(policy), before)
    assert torch.equal(logprobs(policy), own)


@FORMS
def test_the_teacher_is_start_plus_change_whatever_the_student_became(either, form, tmp_path):
    policy = make_policy(either, **form)
    change = noise(policy)
    policy.load_teacher(change)
    perturb(policy)
    merged = stock(either)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            parameter += change.get(name, 0.0)
    expected = plain_logprobs(policy, merged)
    with policy.as_teacher():
        torch.testing.assert_close(logprobs(policy), expected, atol=1e-4, rtol=0)
    norm = sum(float((tensor**2).sum()) for tensor in change.values()) ** 0.5
    assert policy.teacher_distance() == pytest.approx(norm, rel=1e-6)


@FORMS
def test_student_and_teacher_load_in_stock_libraries(either, form, tmp_path):
    policy = make_policy(either, **form)
    perturb(policy)
    policy.load_teacher(noise(policy))
    policy.save_student(tmp_path / "student")
    policy.save_teacher(tmp_path / "teacher")
    if form:
        student = PeftModel.from_pretrained(stock(either), tmp_path / "student")
        assert (tmp_path / "student" / "adapter_config.json").exists()
    else:
        student = stock(tmp_path / "student")
    expected = logprobs(policy)
    torch.testing.assert_close(plain_logprobs(policy, student), expected, atol=1e-4, rtol=0)
    with policy.as_teacher():
        expected = logprobs(policy)
    teacher = plain_logprobs(policy, stock(tmp_path / "teacher"))
    torch.testing.assert_close(teacher, expected, atol=1e-4, rtol=0)
    # and the folder is a model to begin with: processor included
    assert torch.equal(logprobs(make_policy(tmp_path / "teacher")), expected)


@FORMS
def test_the_change_of_the_student_gives_the_student(either, form):
    policy = make_policy(either, **form)
    perturb(policy)
    own = logprobs(policy)
    policy.load_teacher(dict(policy.deltas()))
    with policy.as_teacher():
        torch.testing.assert_close(logprobs(policy), own, atol=1e-4, rtol=0)


@FORMS
def test_the_start_can_be_the_teacher_also_of_weights_that_moved(either, form):
    policy = make_policy(either, **form)
    begun = logprobs(policy)
    perturb(policy)
    assert (logprobs(policy) - begun).abs().max() > 1e-3
    policy.load_start()
    assert policy.teacher_distance() == 0
    with policy.as_teacher():
        assert torch.equal(logprobs(policy), begun)


def test_changes_of_adapters_are_scale_times_b_times_a(tiny):
    policy = make_policy(tiny, **LORA)
    assert all((delta == 0).all() for _, delta in policy.deltas())
    assert all("lora_" in name for name in policy.trained())
    assert not any("visual" in name for name in policy.trained())
    perturb(policy)
    weights = policy.trained()
    deltas = dict(policy.deltas())
    assert 2 * len(deltas) == len(weights)
    for name, delta in deltas.items():
        stem = "base_model.model." + name.removesuffix(".weight")
        a, b = weights[f"{stem}.lora_A.default.weight"], weights[f"{stem}.lora_B.default.weight"]
        torch.testing.assert_close(delta, 2.0 * (b @ a).detach())  # 8 / 4


def test_full_training_trains_the_language_model_and_the_tower_only_if_asked(tiny):
    names = {name for name, _ in make_policy(tiny).model.named_parameters()}
    language = {name for name in names if "visual" not in name}
    assert set(make_policy(tiny).trained()) == language
    assert set(make_policy(tiny, vision="trained").trained()) == names


def test_an_adapter_of_another_model_is_refused_and_planned_by_its_settings(tiny, tmp_path):
    policy = make_policy(tiny, **LORA)
    policy.save_student(tmp_path / "start")
    file = tmp_path / "start/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, file)
    config = replace(policy.config, adapter=str(tmp_path / "start"))
    told = rf"start', made on .*, does not fit model.path='{tiny}': .*size"
    with pytest.raises(ConfigError, match=told):
        make_policy(tiny, **LORA, adapter=config.adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no weight is read
        planned, fresh = Shadow(config), Shadow(policy.config)
    assert sum(p.nbytes for p in planned.trained) == sum(p.nbytes for p in fresh.trained)


def test_a_run_from_an_adapter_counts_it_as_the_start(tiny, tmp_path):
    first = make_policy(tiny, **LORA)
    perturb(first)
    first.save_student(tmp_path / "adapter")
    policy = make_policy(tiny, **LORA, adapter=str(tmp_path / "adapter"))
    start = logprobs(policy)
    torch.testing.assert_close(start, logprobs(first), atol=1e-5, rtol=0)
    zero = dict(policy.deltas())
    assert all((delta == 0).all() for delta in zero.values())
    policy.load_teacher(zero)
    perturb(policy, seed=9)
    with policy.as_teacher():  # the teacher of no change is the model the run began with
        torch.testing.assert_close(logprobs(policy), start, atol=1e-4, rtol=0)
    policy.load_teacher(dict(policy.deltas()))
    own = logprobs(policy)
    assert (own - start).abs().max() > 1e-2
    with policy.as_teacher():
        torch.testing.assert_close(logprobs(policy), own, atol=1e-4, rtol=0)


@pytest.mark.parametrize("vision", ["frozen", "trained"])
def test_settings_that_an_adapter_contradicts_are_refused_with_what_fits(
    tiny, tmp_path, vision, monkeypatch
):
    folder = tmp_path / "adapter"
    make_policy(tiny, **LORA, vision=vision).save_student(folder)
    found = {"vision": vision, "lora_rank": 4, "lora_alpha": 8}
    assert adapter_settings(folder) == found
    assert make_policy(tiny, train="lora", adapter=str(folder), **found).trained()
    monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", None)
    other = {"vision": "frozen" if vision == "trained" else "trained"}
    for wrong in ({"lora_rank": 128}, {"lora_alpha": 256}, other):
        (key,) = wrong
        with pytest.raises(ConfigError, match=f"give --model.{key} {found[key]}") as refused:
            make_policy(tiny, train="lora", adapter=str(folder), **found | wrong)
        told = "gtr-turbo sft --model.vision frozen" in str(refused.value)
        assert told is (key == "vision" and vision == "trained")


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("lora_bias", True), ("modules_to_save", ["lm_head"])]
)
def test_an_adapter_that_is_more_than_b_times_a_is_refused(tiny, tmp_path, key, value):
    """The teacher is made of B A: such a run's KL to its own start would not be 0."""
    make_policy(tiny, **LORA).save_student(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(
        ConfigError, match=rf"model\.adapter cannot be used: .* {key} = .*merge_and"
    ):
        make_policy(tiny, **LORA, adapter=str(tmp_path))


def own_adapter(base, folder, targets):
    """An adapter by PEFT alone, of numbers that are not 0."""
    torch.manual_seed(0)
    plain = AutoModelForImageTextToText.from_pretrained(base)
    model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_with_names_of_another_layout_is_refused_and_not_dropped(
    tiny, tmp_path, monkeypatch
):
    folder = own_adapter(tiny, tmp_path / "own", ["q_proj", "v_proj"])
    policy = make_policy(tiny, **LORA, adapter=str(folder))
    assert all(layer.lora_B["default"].weight.any() for _, layer in policy._adapted())
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    older = {name.replace("language_model.", ""): tensors[name].clone() for name in tensors}
    save_file(older, file)
    told = r"does not fit .*: only the model has 'base_model.*language_model.*gtr-turbo export"
    with pytest.raises(ConfigError, match=told):
        make_policy(tiny, **LORA, adapter=str(folder))
    with monkeypatch.context() as patch:
        save_file(tensors, file)
        patch.setattr(starter, "is_hub_name", lambda name: True)
        with pytest.raises(ConfigError, match=r"is an adapter of .*, not of"):
            make_policy(starter.model_folder("tiny-qwen3-vl"), **LORA, adapter=str(folder))
    save_file(tensors | older, file)
    with pytest.raises(ConfigError, match="only it has 'base_model"):
        make_policy(tiny, **LORA, adapter=str(folder))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_of_what_teachers_are_not_made_of_are_refused(tiny, tmp_path):
    folder = own_adapter(tiny, tmp_path / "words", ["q_proj", "embed_tokens"])
    with pytest.raises(ConfigError, match=r"lora_embedding_A.*is no factor of a linear layer"):
        make_policy(tiny, **LORA, adapter=str(folder))
    tied = AutoModelForImageTextToText.from_pretrained(tiny).config.tie_word_embeddings
    folder = own_adapter(tiny, tmp_path / "head", ["q_proj", "lm_head"])
    assert tied
    with pytest.raises(ConfigError, match=r"adapts the head of .* those of the embeddings too"):
        make_policy(tiny, **LORA, adapter=str(folder))


@pytest.mark.parametrize(("made", "said"), [(0.5, 0.0), (0.0, 0.5)])
def test_dropout_is_what_the_settings_say_not_what_an_adapter_was_made_with(
    tiny, tmp_path, made, said
):
    policy = make_policy(tiny, **LORA | {"lora_dropout": made})
    perturb(policy)
    policy.save_student(tmp_path)
    policy = make_policy(tiny, **LORA | {"lora_dropout": said, "adapter": str(tmp_path)})
    still = logprobs(policy)
    policy.model.train()
    assert torch.equal(logprobs(policy), still) is (said == 0)


def test_adapters_are_added_without_a_warning_of_libraries_about_each_other(tiny, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        make_policy(tiny, **LORA).save_student(tmp_path / "adapter")
        make_policy(tiny, **LORA, adapter=str(tmp_path / "adapter"))


@FORMS
def test_merging_twice_with_different_inputs_changes_the_teacher(tiny, form):
    """The published code kept its first teacher for the whole run (METHOD section 8, number 1)."""
    policy = make_policy(tiny, **form)
    scores = []
    for seed in (1, 2):
        policy.load_teacher(noise(policy, seed=seed))
        with policy.as_teacher():
            scores.append(logprobs(policy))
    assert (scores[0] - scores[1]).abs().max() > 1e-3


@FORMS
def test_a_teacher_with_missing_or_unknown_tensors_is_refused(tiny, form):
    policy = make_policy(tiny, **form)
    change = noise(policy)
    name = next(iter(change))
    with pytest.raises(KeyError, match="do not match"):
        policy.load_teacher({k: v for k, v in change.items() if k != name})
    with pytest.raises(KeyError, match="unheard"):
        policy.load_teacher({**change, "unheard": change[name]})


def test_without_a_teacher_there_is_nothing_to_swap_in(tiny):
    policy = make_policy(tiny)
    assert not policy.has_teacher
    with pytest.raises(RuntimeError, match="load_teacher"), policy.as_teacher():
        pass
    with pytest.raises(RuntimeError, match="load_teacher"):
        policy.teacher_state()


@FORMS
def test_the_state_of_a_teacher_is_exact(tiny, form):
    policy, other = make_policy(tiny, **form), make_policy(tiny, **form)
    policy.load_teacher(noise(policy))
    other.load_teacher_state(policy.teacher_state())
    assert other.teacher_distance() == policy.teacher_distance()
    assert other.teacher_rounding() == policy.teacher_rounding()
    with policy.as_teacher(), other.as_teacher():
        assert torch.equal(logprobs(policy), logprobs(other))


def test_the_saved_adapter_names_its_rank(tiny, tmp_path):
    make_policy(tiny, **LORA).save_student(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["r"], saved["lora_alpha"]) == (4, 8)
    assert not any("visual" in name or "lm_head" in name for name in saved["target_modules"])


BF16 = {"dtype": "bfloat16"}
TYPES = pytest.mark.parametrize("dtype", [{}, BF16], ids=["float32", "bfloat16"])


@TYPES
@FORMS
def test_weights_of_either_type_come_back_from_a_swap_that_fails_half_way(tiny, form, dtype):
    policy = make_policy(tiny, **form, **dtype)
    perturb(policy)
    policy.load_teacher(noise(policy))
    before, names = bits(policy), list(dict(policy.deltas()))
    teacher, half = policy._teacher, len(names) // 2

    class Broken(dict):
        def items(self):
            for i, name in enumerate(names):
                if i == half:
                    raise MemoryError(name)
                yield name, teacher[name]

    policy._teacher = Broken(teacher)
    with pytest.raises(MemoryError, match=names[half]), policy.as_teacher():
        raise AssertionError("the block must not run")
    assert same(bits(policy), before)
    policy._teacher = teacher
    with policy.as_teacher():
        for name, held in policy._exchanged().items():
            assert torch.equal(held, teacher[name])
    assert same(bits(policy), before)


@FORMS
def test_in_bfloat16_the_teacher_is_rounded_once_and_lies_in_the_type_of_the_weights(tiny, form):
    policy = make_policy(tiny, **form, **BF16)
    start = {name: tensor.clone() for name, tensor in policy._exchanged().items()}
    perturb(policy)
    change = noise(policy)
    policy.load_teacher(change)
    state = policy.teacher_state()
    del state["norms"]
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, (start[name].float() + change[name]).bfloat16())
    wanted = {name: start[name].float() + change[name] for name in state}
    lost = sum(
        float((wanted[name] - tensor.float()).square().sum()) for name, tensor in state.items()
    )
    share = lost**0.5 / policy.teacher_distance()
    assert 0.001 < policy.teacher_rounding() == pytest.approx(share, rel=1e-6)


@FORMS
def test_what_rounding_takes_of_a_change_is_told(tiny, form):
    """A change far below half a step of bfloat16 is lost whole, one of a step not at all."""
    policy = make_policy(tiny, **form, **BF16)
    start = {name: tensor.clone() for name, tensor in policy._exchanged().items()}
    policy.load_teacher({name: 2e-4 * tensor.float() for name, tensor in start.items()})
    assert policy.teacher_rounding() == pytest.approx(1, rel=1e-3)
    policy.load_teacher({name: tensor.float() for name, tensor in start.items()})  # twice the start
    assert policy.teacher_rounding() == 0
    policy.load_teacher({name: torch.zeros(tensor.shape) for name, tensor in start.items()})
    assert policy.teacher_rounding() == 0  # there is nothing to lose
    exact = make_policy(tiny, **form)
    exact.load_teacher(noise(exact))
    assert exact.teacher_rounding() == 0


def test_what_the_start_loses_is_not_taken_from_the_change(tiny, tmp_path):
    """The start of an adapter is off the grid of bfloat16: a teacher of no change is rounded, and of a change as
    large as the weights, which rounding takes a 512th of at most, no more arrives wrong than of any other."""
    first = make_policy(tiny, **LORA)
    perturb(first)
    first.save_student(tmp_path)
    policy = make_policy(tiny, **LORA, **BF16, adapter=str(tmp_path))
    base = policy._replaced()
    policy.load_teacher({name: torch.zeros_like(d) for name, d in policy.deltas()})
    begun = {name: tensor.float() for name, tensor in policy.teacher_state().items()}
    assert policy.teacher_rounding() == 0
    change = {name: 1e-4 * tensor.float().cpu() for name, tensor in base.items()}
    policy.load_teacher(change)
    lost = sum(
        float((policy.teacher_state()[name].float() - begun[name] - change[name]).square().sum())
        for name in change
    )
    assert policy.teacher_rounding() == pytest.approx(
        lost**0.5 / policy.teacher_distance(), rel=1e-5
    )


def test_with_adapters_only_the_teacher_and_the_base_move_and_the_base_is_kept_once(tiny):
    policy = make_policy(tiny, **LORA, **BF16)
    policy.load_teacher(noise(policy))
    size = sum(tensor.nbytes for tensor in policy._exchanged().values())
    kept = {name: tensor.data_ptr() for name, tensor in policy._own.items()}
    policy.mover.take()
    for _ in range(2):
        with policy.as_teacher():
            pass
        assert policy.mover.take()["system/swap_mb"] == pytest.approx(2 * size / 1e6)
    assert {name: tensor.data_ptr() for name, tensor in policy._own.items()} == kept
    with policy.as_start():  # fresh adapters: the base lies there already
        pass
    assert policy.mover.take()["system/swap_mb"] == 0
    held = {tensor.data_ptr() for tensor in policy._teacher.values()}
    policy.load_teacher(noise(policy, seed=2))  # the next merge takes the place of the last
    assert {tensor.data_ptr() for tensor in policy._teacher.values()} == held


def test_a_swap_within_a_swap_is_refused(tiny):
    policy = make_policy(tiny, **LORA)
    policy.load_teacher(noise(policy))
    before = bits(policy)
    with policy.as_teacher():
        inside = bits(policy)
        with pytest.raises(RuntimeError, match="does not nest"), policy.as_start():
            pass
        assert same(bits(policy), inside)
    assert same(bits(policy), before)


def test_tensors_share_blocks_of_bounded_size_without_overlap(monkeypatch):
    monkeypatch.setattr(swap, "BLOCK", 256)
    like = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),  # 30 bytes: 64
        "b": torch.zeros(33),  # 132 bytes: 192, with a exactly a block
        "c": torch.zeros(()),
        "d": torch.zeros(100),  # above a block: one of its own
        "e": torch.zeros(2),
    }
    made = swap.host_like(like)
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in made.items()}
    assert sizes == {"a": 256, "b": 256, "c": 64, "d": 448, "e": 64}
    assert made["a"].untyped_storage().data_ptr() == made["b"].untyped_storage().data_ptr()
    for number, (name, tensor) in enumerate(made.items()):
        assert (tensor.shape, tensor.dtype) == (like[name].shape, like[name].dtype)
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(made.values()))
