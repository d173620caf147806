"""RMSNorm in one kernel: the stock formula, rounded once."""

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from gtr_turbo.policy.norms import fuse_norms
from gtr_turbo.policy.scoring import score
from tiny import inputs_of, make_policy, observations, responses


@pytest.mark.parametrize("kind", [Qwen2_5_VLRMSNorm, Qwen3VLTextRMSNorm])
def test_the_norm_is_the_exact_one_rounded_once(kind):
    draws = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 3, 64, generator=draws), torch.randn(64, generator=draws)
    x, weight = x.bfloat16(), weight.bfloat16()
    norm = kind(64, eps=0.5).bfloat16()
    norm.weight.data.copy_(weight)
    stock = norm(x)
    fuse_norms(norm)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight.double()
    assert torch.equal(norm(x), exact.bfloat16())
    assert not torch.equal(stock, exact.bfloat16())
    torch.testing.assert_close(norm(x), stock)


def test_norms_of_another_formula_and_of_float32_are_left_alone():
    class ShiftedRMSNorm(torch.nn.Module):  # weight + 1, as Gemma's
        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)), 1e-6

    for norm in (ShiftedRMSNorm(), Qwen3VLTextRMSNorm(4)):
        fuse_norms(norm)
        assert "forward" not in vars(norm)


def test_a_policy_in_bfloat16_is_as_near_the_exact_one_as_with_stock_norms(either):
    found = {}
    for name in ("exact", "fused", "stock"):
        policy = make_policy(
            either, train="lora", dtype="float32" if name == "exact" else "bfloat16"
        )
        norms = [m for m in policy.model.modules() if hasattr(m, "variance_epsilon")]
        assert norms
        assert all(("forward" in vars(norm)) == (name != "exact") for norm in norms)
        if name == "stock":
            for norm in norms:
                del norm.forward
        inputs = inputs_of(policy, observations(policy, 8), responses(policy, 8))
        with torch.no_grad():
            found[name] = score(policy, inputs).logprobs
    fused, stock = (float((found[n] - found["exact"]).square().mean()) for n in ("fused", "stock"))
    assert 0 < fused < 1.5 * stock
