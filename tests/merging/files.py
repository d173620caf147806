"""What the merge tests share: checkpoints as files, and what they should become."""

import hashlib
import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from gtr_turbo.merging.methods import METHODS, Recipe
from gtr_turbo.merging.tensors import merge_tensors

SHAPES = {"embed": (300, 1000), "matrix": (24, 16), "bias": (16,), "scalar": (), "empty": (0, 4)}
"""One tensor of several pieces (`jobs.CHUNK` is 131,072 entries), and all odd ones."""
SMALL = {"first": (24, 16), "second": (40, 8), "third": (16,)}


def save(path, tensors):
    """A folder with one file, or a file, as the name says."""
    file = path
    if path.suffix != ".safetensors":
        path.mkdir(parents=True)
        file = path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, {"format": "pt"})
    return path


def save_sharded(path, tensors, count=3):
    """A folder with `count` shards and their index; tensors dealt out in turn."""
    path.mkdir(parents=True)
    names = list(tensors)
    where = {}
    for i in range(count):
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        shard = {name: tensors[name].contiguous() for name in names[i::count]}
        save_file(shard, path / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path):
    """All tensors of a folder (or file), by the library that everyone reads them with."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    tensors = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def walk(count, *, shapes=SHAPES, dtype=torch.float32, step=0.1, seed=0, base_dtype=None):
    """(base, checkpoints): each checkpoint is the one before plus noise, in float32, then rounded."""
    generator = torch.Generator().manual_seed(seed)
    at = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = {name: t.to(base_dtype or dtype) for name, t in at.items()}
    checkpoints = []
    for _ in range(count):
        at = {n: t + step * torch.randn(t.shape, generator=generator) for n, t in at.items()}
        checkpoints.append({name: t.to(dtype) for name, t in at.items()})
    return base, checkpoints


def written(folder, base, checkpoints):
    """(path of the base, paths of the checkpoints)."""
    paths = [save(folder / f"checkpoint-{k}", tensors) for k, tensors in enumerate(checkpoints)]
    return save(folder / "base", base), paths


def changes(base, checkpoints, name):
    return [(c[name].float() - base[name].float()) for c in checkpoints]


def expected(base, checkpoints, *, dtype=None, lam=1.0, **recipe):
    """The merge by `merge_tensors` in memory, rounded once by torch."""
    recipe = {"weights": (1 / len(checkpoints),) * len(checkpoints), **recipe}
    made = Recipe(**recipe)
    found = {}
    for name, like in checkpoints[0].items():
        seed = int.from_bytes(name.encode(), "little") % ((1 << 61) - 1)
        if METHODS[made.method].base:
            merged = merge_tensors(changes(base, checkpoints, name), made, seed=seed)
            merged = base[name].float() + lam * merged
        else:
            merged = merge_tensors([c[name].float() for c in checkpoints], made, seed=seed)
        found[name] = merged.to(dtype or like.dtype)
    return found


def assert_same(found, wanted):
    """Equal names, types, shapes and bits."""
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor):
    return (
        tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )


def weight_bytes(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors*"))}


def snapshot(*paths):
    """Hash of every file below, and every folder."""
    found = {}
    for path in paths:
        for file in [path, *sorted(path.rglob("*"))]:
            text = "folder" if file.is_dir() else hashlib.sha256(file.read_bytes()).hexdigest()
            found[str(file)] = text
    return found


def as_torch(array):
    """What `Checkpoint.tensor` gives (uint16 holds bfloat16), as torch has it."""
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
