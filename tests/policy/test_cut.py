"""The teacher as an adapter: what the cut keeps, and that it computes as the adapter does elsewhere."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from gtr_turbo.checks import ConfigError
from gtr_turbo.merging.tensors import RunningTies, low_rank
from gtr_turbo.policy.cut import CutTeacher
from gtr_turbo.policy.scoring import score
from tiny import inputs_of, make_policy, observations, perturb, responses

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8}
NOTHING = torch.zeros(())


def merge_of(policy, *, scale=0.02, seed=1):
    """A change of full rank, as TIES makes them."""
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(d.shape, generator=generator) for n, d in policy.deltas()}


@torch.no_grad()
def logprobs(policy):
    return score(policy, inputs_of(policy, observations(policy, 2), responses(policy, 2))).logprobs


def test_factors_of_a_matrix_whose_best_ones_are_known():
    a, b = low_rank(torch.diag(torch.tensor([3.0, -2.0, 1.0])), 2)
    torch.testing.assert_close(b @ a, torch.diag(torch.tensor([3.0, -2.0, 0.0])), atol=1e-5, rtol=0)
    a, b = low_rank(torch.full((2, 5), 3.0), 4)  # of rank 1, and no side is as long as 4
    assert (a.shape, b.shape) == ((4, 5), (2, 4))
    torch.testing.assert_close(b @ a, torch.full((2, 5), 3.0), atol=1e-5, rtol=0)


def test_factors_of_a_merge_are_nearly_the_best():
    """TIES of ten drifting adapters of rank 16: within 0.1 % of what the exact SVD keeps."""
    torch.manual_seed(0)
    a, b, ties = torch.randn(16, 384) / 384**0.5, torch.zeros(256, 16), None
    for _ in range(10):
        a = a + 0.1 * torch.randn(16, 384) / 384**0.5
        b = b + 0.02 * torch.randn(256, 16) * torch.logspace(0, -1.5, 16)
        ties = ties or RunningTies(b @ a)
        ties.add(b @ a, 1.0, density=0.8)
    merged = ties.merged()
    energy = torch.linalg.svdvals(merged).square()
    for rank in (16, 32):
        best = float(energy[:rank].sum() / energy.sum())
        a, b = low_rank(merged, rank)
        kept = 1 - float((merged - b @ a).square().sum() / energy.sum())
        assert best < 0.99  # there is something to lose
        assert best - 1e-3 < kept <= best + 1e-6


def test_the_energy_is_the_share_of_the_merges_squared_norm_by_hand():
    cut = CutTeacher(1)
    cut.take("one.weight", torch.diag(torch.tensor([3.0, 1.0])), NOTHING)  # keeps 9 of 10
    assert cut.energy == pytest.approx(0.9)
    cut.take("two.weight", torch.diag(torch.tensor([0.0, 2.0])), NOTHING)  # 4 of 4
    assert cut.energy == pytest.approx(13 / 14)
    cut.take("one.weight", torch.zeros(2, 2), NOTHING)  # the one before does not count any more
    assert cut.energy == pytest.approx(1)
    cut.take("two.weight", torch.zeros(2, 2), NOTHING)
    assert cut.energy == 1.0  # there is nothing to lose


def test_what_the_start_adds_to_the_base_is_in_the_adapter_but_not_in_the_energy():
    first, merged = torch.diag(torch.tensor([9.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    cut = CutTeacher(2)
    cut.take("one.weight", merged, first)
    torch.testing.assert_close(cut.change("one.weight", torch.device("cpu")), first + merged)
    assert cut.energy == pytest.approx(1)
    cut = CutTeacher(1)
    cut.take("one.weight", merged, first)
    assert cut.energy == pytest.approx(0, abs=1e-6)  # 81 of 82 are kept, and nothing of the merge


@pytest.mark.parametrize("started", [False, True])
def test_the_adapter_computes_in_stock_peft_as_the_cut_teacher_does_here(tiny25, started, tmp_path):
    adapter = {}
    if started:
        begun = make_policy(tiny25, **LORA)
        perturb(begun, scale=0.1)
        begun.save_student(tmp_path / "begun")
        adapter = {"adapter": str(tmp_path / "begun")}
    policy = make_policy(tiny25, teacher_rank=6, **LORA, **adapter)
    perturb(policy, scale=0.05, seed=3)
    policy.load_teacher(merge_of(policy))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    with policy.as_cut_teacher():
        ours = logprobs(policy)
    with policy.as_teacher():
        exact = logprobs(policy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert 0 < policy.cut.energy < 0.99
    policy.save_cut_teacher(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    plain = AutoModelForImageTextToText.from_pretrained(tiny25, attn_implementation="eager")
    merged = PeftModel.from_pretrained(plain, tmp_path / "cut").merge_and_unload()
    other = make_policy(tiny25, **LORA)  # of fresh adapters, which change nothing
    other._plain.load_state_dict(
        {n.replace("_proj.", "_proj.base_layer."): t for n, t in merged.state_dict().items()},
        strict=False,
    )
    theirs = logprobs(other)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    assert (exact - ours).abs().max() > 1e-3


def test_a_resumed_run_has_the_adapter_bit_for_bit_and_refuses_another_rank(tiny25, tmp_path):
    policy = make_policy(tiny25, teacher_rank=3, **LORA)
    policy.load_teacher(merge_of(policy))
    state = policy.teacher_state()
    again = make_policy(tiny25, teacher_rank=3, **LORA)
    again.load_teacher_state(state)
    assert again.cut.energy == policy.cut.energy
    for folder, one in (("one", policy), ("two", again)):
        one.save_cut_teacher(tmp_path / folder)
    one, two = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("one", "two"))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ConfigError, match="teacher_rank=3, and 5 was given"):
        make_policy(tiny25, teacher_rank=5, **LORA).load_teacher_state(state)
    exact = make_policy(tiny25, **LORA)
    exact.load_teacher_state(state)  # what is not asked for is not read
    with pytest.raises(ConfigError, match="teacher_rank=null, and 3 was given"):
        again.load_teacher_state(exact.teacher_state())
