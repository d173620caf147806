"""`gtr-turbo doctor`: does this machine have what a run needs? Every line is measured, none is assumed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report: `ok` False makes the command's exit code 1."""

    what: str
    ok: bool
    detail: str


PACKAGES = ("torch", "transformers", "peft", "safetensors", "gymnasium", "numpy", "numba", "pillow")
OPTIONAL = ("tensorboard", "wandb", "trackio", "openai", "flash_attn")


def _versions() -> list[Finding]:
    found = [Finding("python", True, f"{platform.python_version()} on {platform.platform()}")]
    for name in PACKAGES:
        try:
            found.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, "not installed: pip install gtr-turbo"))
    for name in OPTIONAL:
        try:
            found.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, True, "not installed (optional)"))
    return found


def _devices() -> list[Finding]:
    import torch

    found = [
        Finding(
            "CPU", True, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"
        )
    ]
    if not torch.cuda.is_available():
        return [*found, Finding("GPU", True, "none; the tiny models need none, 2B-8B models do")]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        name = torch.cuda.get_device_name(i)
        found.append(
            Finding(f"GPU {i}", True, f"{name}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free")
        )
    return found


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    try:
        with tempfile.TemporaryDirectory(dir=Path.cwd()):
            pass
    except OSError as error:
        return Finding("disk", False, f"{Path.cwd()} is not writable: {error}")
    return Finding("disk", free > 1, f"{free:.0f} GB free in {Path.cwd()}")


def _environments() -> Finding:
    from gtr_turbo.envs import check_env

    names = ("NumberLine", "EZPoints", "Points24", "Blackjack")
    for name in names:
        check_env(name)
    return Finding("environments", True, f"{', '.join(names)} keep the contract")


def _merging() -> Finding:
    import torch

    from gtr_turbo.merging.methods import Recipe
    from gtr_turbo.merging.tensors import merge_tensors

    changes = [torch.sin(torch.arange(1.0, 2001.0) * k) for k in (1, 2, 3)]
    recipe = Recipe(method="ties", weights=(1.0, 1.0, 1.0), density=0.8)
    compiled, plain = (merge_tensors(changes, recipe, engine=e) for e in ("numba", "numpy"))
    same = torch.equal(compiled, plain)
    return Finding(
        "merging", same, f"the compiled kernels {'agree' if same else 'do not agree'} with numpy's"
    )


def _starter() -> Finding:
    import torch

    from gtr_turbo.config import EnvConfig, ModelConfig, SamplingConfig
    from gtr_turbo.evaluate import evaluate
    from gtr_turbo.policy.model import Policy

    torch.set_num_threads(1)
    policy = Policy(ModelConfig(), temperature=0.7)
    env = EnvConfig(options={"prompt": "compact"}, num_envs=16)
    result = evaluate(policy, env, SamplingConfig(), episodes=16, split="held-out", seed=0)
    read = result.facts.get("perception", 0.0)
    return Finding("starter model", read > 0.5, f"loads, plays, and reads {read:.0%} of the cards")


def examine() -> list[Finding]:
    """Run every check; one that raises becomes a finding that failed."""
    found = _versions()
    checks: list[Callable[[], Finding | list[Finding]]] = [
        _devices, _disk, _environments, _merging, _starter
    ]  # fmt: skip
    for check in checks:
        try:
            result = check()
        except Exception as error:  # a check that raises is a finding, not a crash
            result = Finding(check.__name__.strip("_"), False, f"{type(error).__name__}: {error}")
        found += result if isinstance(result, list) else [result]
    return found
