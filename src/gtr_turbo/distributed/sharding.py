"""FSDP2: each rank keeps a part of every weight; and what others need of a weight, sharded or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gtr_turbo.checks import ConfigError


def is_sharded(tensor: Tensor) -> bool:
    """True for a tensor of which each rank has a part."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part that this rank has, sharing its memory; all of a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; a plain one as it is. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_of(whole: Tensor, like: Tensor) -> Tensor:
    """What `like` is sharded as, from a tensor that every rank has; plain for a plain `like`."""
    if not isinstance(like, DTensor):
        return whole
    # src_data_rank: nothing is sent, each rank cuts its own part
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """What this rank keeps of a tensor that every rank has, cut as `like`; a plain `like` keeps all of it."""
    return local(shard_of(whole, like))


def joined(part: Tensor, like: Tensor) -> Tensor:
    """`full` of a tensor whose parts are cut as those of `like`; all ranks must call it."""
    if not isinstance(like, DTensor):
        return part
    whole = DTensor.from_local(
        part.to(like.device),
        like.device_mesh,
        like.placements,
        shape=like.shape,
        stride=like.stride(),
    )
    return whole.full_tensor()


def shard(model: nn.Module, device: str, keep: Callable[[str], bool]) -> None:
    """Shard a `transformers` model in place, decoder layer by decoder layer; gradients are summed.

    Args:
        model: still on the CPU; each layer is moved and cut in its turn.
        device: of this rank.
        keep: names of parameters that every rank keeps whole.

    Raises:
        ConfigError: the model does not say what its layers are.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            f"distributed.shard: {type(model).__name__} does not name its layers (_no_split_modules); "
            "train it unsharded"
        )
    kept = {parameter for name, parameter in model.named_parameters() if keep(name)}
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for layer in layers:
        if not kept.issuperset(layer.parameters()):
            fully_shard(layer, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    for module in _sharded(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def _sharded(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


@torch.no_grad()
def gather(model: nn.Module) -> None:
    """Put all weights on every rank, where they stay: forward passes need no other rank then."""
    for module in _sharded(model):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


@torch.no_grad()
def scatter(model: nn.Module) -> None:
    """Keep only this rank's part of the weights again.

    What no layer has (embeddings, head) stays whole from a forward pass to the end of its backward pass: scoring
    calls the head by itself.
    """
    for module in _sharded(model):
        module.reshard()
        module.set_reshard_after_forward(module is not model, recurse=False)


def whole_state(model: nn.Module, root: nn.Module) -> dict[str, Tensor]:
    """`state_dict` of gathered weights; `root` is what was sharded, `model` it or what wraps it."""
    names = list(model.state_dict())  # FSDP2 cuts the weights for it
    gather(root)
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return {name: tensors[name].detach() for name in names}


@contextmanager
def apart(model: nn.Module, gathered: bool) -> Iterator[None]:
    """Inside the block the weights are cut, whatever they were before."""
    if gathered:
        scatter(model)
    yield
    if gathered:
        gather(model)
