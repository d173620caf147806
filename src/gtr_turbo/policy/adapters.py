"""LoRA products in the type of the weights.

`peft` keeps adapters in float32 over a bfloat16 base, as Adam's small steps need it, and computes in float32 too:
each layer casts its input up, writes the product, scales it, adds it to the layer's own and casts the sum back. On
a GPU that moves five times the bytes and starts twice the kernels. What arrives is bfloat16 all the same. Here the
factors are rounded, and the product is added as it is made. `benchmarks/rounding.py` sees no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FACTORS = "_fixed_factors"


def multiply_in_type_of_weights(model: nn.Module) -> None:
    """Let the LoRA layers of a `peft` model compute so; layers whose weights are float32 are left alone."""
    for layer in _adapted(model):
        if layer.get_base_layer().weight.dtype != torch.float32:
            layer.forward = MethodType(_forward, layer)


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """Inside the block adapters do not change, so their factors are rounded once; it nests."""
    layers = [
        layer
        for layer in _adapted(model)
        if "forward" in vars(layer) and not hasattr(layer, FACTORS)
    ]
    try:
        for layer in layers:
            setattr(layer, FACTORS, _rounded(layer, layer.get_base_layer().weight.dtype))
        yield
    finally:
        for layer in layers:
            vars(layer).pop(FACTORS, None)


def _adapted(model: nn.Module) -> Iterator[Any]:
    modules: Iterator[Any] = model.modules()
    return (m for m in modules if hasattr(m, "lora_A") and "default" in m.lora_A)


def _rounded(layer: Any, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.lora_A["default"].weight.to(kind), layer.lora_B["default"].weight.to(kind)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """W x + scale * B A x."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = layer.base_layer(rows)
    if not layer.disable_adapters:
        a, b = getattr(layer, FACTORS, None) or _rounded(layer, x.dtype)
        inner = linear(layer.lora_dropout["default"](rows), a)
        out = out.addmm_(inner, b.t(), alpha=layer.scaling["default"])
    return out.view(*x.shape[:-1], -1)
