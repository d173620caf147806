"""Attention of the vision tower in a few calls: the numbers of the stock model, and how many calls there are."""

import itertools
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend
from transformers import AutoModelForImageTextToText

from gtr_turbo.planning.architectures import published
from gtr_turbo.policy import tower
from gtr_turbo.policy.tower import attend_by_length, by_length, layout

GRIDS = torch.tensor([[1, 22, 22], [1, 22, 22], [1, 6, 18], [1, 22, 22]])
"""Patches of images; 22 x 22 is a 300 x 300 frame of Points24 for Qwen2.5-VL-7B."""


def model(name, **vision):
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": 32,
    } | vision
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(
        published(name, text=text, vision=vision), attn_implementation="sdpa"
    )


MODELS = pytest.mark.parametrize(
    ("name", "vision", "calls"),
    [
        # sides of 11 merged tokens (2 x 2 patches) are cut 4 + 4 + 3, 3 x 9 is cut 3 x (4 + 4 + 1): windows of
        # 64, 48, 36 and 12 patches
        ("qwen2.5-vl-7b", {"fullatt_block_indexes": [1]}, [4, 2, 4]),
        ("qwen3-vl-8b", {"deepstack_visual_indexes": [0]}, [2, 2, 2]),
    ],
)


@MODELS
def test_the_tower_computes_what_the_stock_one_does_in_fewer_calls(name, vision, calls):
    found = []
    for ours in (False, True):
        made = model(name, **vision)
        if ours:
            attend_by_length(made)
        visual = made.model.visual
        width = (
            visual.config.in_channels
            * visual.config.temporal_patch_size
            * visual.config.patch_size**2
        )
        pixels = torch.randn(
            int(GRIDS.prod(1).sum()), width, generator=torch.Generator().manual_seed(1)
        )
        with mock.patch.object(tower, "scaled_dot_product_attention", wraps=attend) as counted:
            out = visual(pixels, grid_thw=GRIDS).pooler_output
        out.square().sum().backward()
        assert counted.call_count == (sum(calls) if ours else 0)
        found.append([out.detach(), *(p.grad for p in visual.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 20
    for stock, here in zip(*found, strict=True):
        torch.testing.assert_close(here, stock, rtol=1e-5, atol=1e-6)


def test_windows_are_sorted_by_length_and_the_way_back_is_known():
    groups, back = layout(torch.tensor([0, 2, 3, 5, 6], dtype=torch.int32))
    assert [(length, positions.tolist()) for length, positions in groups] == [
        (1, [2, 5]),
        (2, [0, 1, 3, 4]),
    ]
    assert back.tolist() == [2, 3, 0, 4, 5, 1]
    (only,), back = layout(torch.tensor([0, 3, 6]))
    assert (only[0], only[1].tolist(), back) == (3, [0, 1, 2, 3, 4, 5], None)


def test_a_window_sees_itself_and_nothing_else():
    ends = torch.tensor([0, 3, 4, 7])
    query, key, value = torch.randn(3, 1, 2, 7, 8, generator=torch.Generator().manual_seed(0))
    out, weights = by_length(None, query, key, value, None, scaling=0.5, cu_seq_lens_q=ends)
    assert weights is None
    for a, b in itertools.pairwise(ends.tolist()):
        products = 0.5 * query[..., a:b, :] @ key[..., a:b, :].transpose(-1, -2)
        by_hand = products.softmax(-1) @ value[..., a:b, :]
        torch.testing.assert_close(out[:, a:b], by_hand.transpose(1, 2))


def test_a_tower_of_another_kind_of_model_is_left_alone():
    """Some have the same name and fewer keys than queries."""
    made = model("qwen3-vl-8b", deepstack_visual_indexes=[0])
    made.config.model_type = "exaone4_5"
    attend_by_length(made)
    assert made.model.visual.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["eager", "flash_attention_2"])
def test_another_attention_that_was_asked_for_is_left_alone(kind):
    made = model("qwen3-vl-8b", deepstack_visual_indexes=[0])
    made.model.visual.config._attn_implementation = kind
    attend_by_length(made)
    assert made.model.visual.config._attn_implementation == kind
