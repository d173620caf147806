"""RMSNorm in one kernel.

`transformers` writes it in eight operations; at one token they are a third of all that a Qwen model starts. Torch
has it fused on a GPU.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm


def fuse_norms(model: nn.Module) -> None:
    """Let the norms of a model be so computed; those whose weights are float32 keep their own last digit."""
    modules: Any = model.modules()
    for module in modules:
        ours = type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")
        if ours and module.weight.dtype != torch.float32:
            module.forward = MethodType(_forward, module)


def _forward(norm: Any, x: Tensor) -> Tensor:
    """The norm x / sqrt(mean(x^2) + epsilon) * weight in float32, rounded once (stock: before the product too)."""
    return rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
