"""Attention of a vision tower: a few calls for all images, not one for each image or window.

With `sdpa`, `transformers` calls the attention of every layer once an image, and for most layers of Qwen2.5-VL once
a window of an image: 1,152 times for 128 frames of 300 x 300. On a GPU the time of these calls is that of starting
them. Frames of one environment have one size, so their windows have few lengths; one call takes all of a length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from gtr_turbo.policy.processing import QWEN

NAME = "flash_by_length"
"""`transformers` hands over all windows in one call where the name holds `flash`."""

Layout = tuple[list[tuple[int, Tensor]], Tensor | None]
"""(length, (N * length,) positions of the N windows of that length) for each length; and where each position is
among all of these, None if that is the order they have."""

_layouts: Any = WeakTensorKeyDictionary()  # all layers of a pass get the same tensor


def attend_by_length(model: Any) -> None:
    """Let the vision tower of a Qwen model that runs with `sdpa` attend so; other models stay as they are."""
    from transformers import AttentionInterface

    if model.config.model_type not in QWEN:
        return
    tower = model.model.visual
    if tower.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, by_length)
        tower.config._attn_implementation = NAME


def layout(ends: Tensor) -> Layout:
    """Windows by their length.

    Args:
        ends: (W + 1,) integers, 0 and where each window ends, one beginning where the last ends.
    """
    if ends not in _layouts:
        lengths, starts = ends.diff(), ends[:-1]
        groups = []
        for length in lengths.unique().tolist():
            inside = torch.arange(length, device=ends.device)
            groups.append((length, (starts[lengths == length, None] + inside).flatten()))
        back = torch.cat([positions for _, positions in groups]).argsort()
        _layouts[ends] = groups, back if len(groups) > 1 else None
    found: Layout = _layouts[ends]
    return found


def by_length(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention within windows, as an `AttentionInterface`.

    Args:
        module: of the attention.
        query: (1, H, S, d), the windows one after the other; `key` and `value` likewise.
        key: see there.
        value: see there.
        attention_mask: None; a window sees all of itself and nothing else.
        scaling: of the products.
        cu_seq_lens_q: where the windows end, as `layout` takes it.

    Returns:
        (1, S, H, d), and no weights.
    """
    groups, back = layout(cu_seq_lens_q)
    made = []
    for length, positions in groups:
        q, k, v = (
            (whole if back is None else whole.index_select(2, positions))
            .unflatten(2, (-1, length))[0]
            .transpose(0, 1)  # (N, H, length, d)
            for whole in (query, key, value)
        )
        out = scaled_dot_product_attention(q, k, v, scale=scaling)
        made.append(out.transpose(1, 2).flatten(0, 1))
    whole = torch.cat(made)
    return (whole if back is None else whole.index_select(0, back))[None], None
