"""LoRA products in the type of the weights."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from gtr_turbo.policy import adapters
from gtr_turbo.policy.adapters import fixed, multiply_in_type_of_weights
from gtr_turbo.policy.scoring import score
from tiny import inputs_of, make_policy, observations, perturb, responses

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8}

W = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])
A = torch.tensor([[1.0, 0.0, 2.0]])
B = torch.tensor([[3.0], [-1.0]])
X = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 0.0, -1.0]]])
# W x = (3, 0) and (2, 1); A x = 3 and 0; with scale 4: + 12 (3, -1) and + 0
BY_HAND = torch.tensor([[[39.0, -12.0], [2.0, 1.0]]])


def adapted(kind=torch.bfloat16, **settings):
    """One linear layer with an adapter; small whole numbers, which bfloat16 holds exactly."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).to(kind)
    model[0].weight.data.copy_(W)
    lora = LoraConfig(r=1, lora_alpha=4, target_modules=["0"], **settings)
    made = get_peft_model(model, lora)
    layer = made.base_model.model[0]
    layer.lora_A["default"].weight.data.copy_(A)
    layer.lora_B["default"].weight.data.copy_(B)
    multiply_in_type_of_weights(made)
    return made, layer


def test_the_sum_of_both_products_by_hand():
    model, layer = adapted()
    assert layer.lora_A["default"].weight.dtype == torch.float32
    out = model(X.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.float(), BY_HAND)
    with model.disable_adapter():
        assert torch.equal(model(X.bfloat16()).float(), X @ W.t())


def test_gradients_reach_the_factors_and_the_input_by_hand():
    model, layer = adapted()
    x = X.bfloat16().requires_grad_()
    upstream = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
    model(x).backward(upstream.bfloat16())
    # scale B^T g = 4 (3 - 2) and 4 (0 - 1): times x for A, and times A, beside W^T g, for x
    inner = torch.tensor([4.0, -4.0])
    assert torch.equal(layer.lora_A["default"].weight.grad, (inner[:, None] * X[0]).sum(0)[None])
    assert torch.equal(layer.lora_B["default"].weight.grad, torch.tensor([[12.0], [24.0]]))
    assert torch.equal(x.grad.float()[0], upstream[0] @ W + inner[:, None] * A)
    assert layer.base_layer.weight.grad is None


def test_the_product_is_not_rounded_before_it_is_added():
    """(1 + 1/128) (1 - 1/128) is 1 - 1/16384, in bfloat16 1; and there 259 is 260, but 259 - 1/16384 is 258."""
    model, layer = adapted()
    layer.base_layer.weight.data.copy_(torch.tensor([[258.0, 0, 0], [0, 0, 0]]))
    layer.lora_A["default"].weight.data.copy_(torch.tensor([[1 - 1 / 128, 0, 0]]))
    layer.lora_B["default"].weight.data.copy_(torch.tensor([[(1 + 1 / 128) / 4], [0.0]]))
    assert model(torch.tensor([1.0, 0, 0]).bfloat16()).tolist() == [258, 0]


def test_dropout_drops_what_goes_into_the_adapter_only():
    model, _ = adapted(lora_dropout=0.5)
    model.train()
    torch.manual_seed(0)
    rows = torch.ones(4000, 3, dtype=torch.bfloat16)
    out = model(rows).float()
    # kept entries are doubled: A x is 0, 2, 4 or 6, each of a fourth of the rows
    steps = ((out[:, 0] - 3) / 12).round()
    assert sorted(set(steps.tolist())) == [0, 2, 4, 6]
    assert torch.equal(model.eval()(rows[:1]).float(), torch.tensor([[39.0, -12.0]]))


def test_inside_fixed_the_factors_stay_those_of_its_beginning():
    model, layer = adapted()
    x = X.bfloat16()

    def cut_off():
        with fixed(model):
            with fixed(model):
                assert torch.equal(model(x).float(), BY_HAND)
            layer.lora_B["default"].weight.data.zero_()
            assert torch.equal(model(x).float(), BY_HAND)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert torch.equal(model(x).float(), X @ W.t())


def test_factors_that_could_not_all_be_rounded_are_not_kept(monkeypatch):
    model, layer = adapted()

    room = iter([True])

    def rounded(layer, kind):
        if not next(room, False):
            raise torch.OutOfMemoryError
        return layer.lora_A["default"].weight.to(kind), layer.lora_B["default"].weight.to(kind)

    whole = nn.ModuleList([model, adapted()[0]])
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "_rounded", rounded)
        with pytest.raises(torch.OutOfMemoryError), fixed(whole):
            pass
    layer.lora_B["default"].weight.data.zero_()
    assert torch.equal(model(X.bfloat16()).float(), X @ W.t())


def test_layers_of_float32_are_peft_s_own():
    model, layer = adapted(torch.float32)
    assert "forward" not in vars(layer)
    with fixed(model):
        layer.lora_B["default"].weight.data.zero_()
        assert torch.equal(model(X), X @ W.t())


def test_a_policy_in_bfloat16_computes_as_near_the_exact_one_as_with_products_in_float32(tiny):
    """Both against the same adapters in float32."""
    found = {}
    for name in ("exact", "ours", "peft"):
        policy = make_policy(tiny, **LORA, dtype="float32" if name == "exact" else "bfloat16")
        perturb(policy)
        if name == "peft":
            for module in policy.model.modules():
                vars(module).pop("forward", None)
        with torch.no_grad():
            inputs = inputs_of(policy, observations(policy, 8), responses(policy, 8))
            found[name] = score(policy, inputs).logprobs
    ours, peft = (float((found[n] - found["exact"]).square().mean()) for n in ("ours", "peft"))
    assert 0 < ours < 1.5 * peft
