"""Which agent, and in which environment, the options of `eval` and `play` name. torch is imported inside."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtr_turbo.checks import ConfigError, suggest
from gtr_turbo.config import EnvConfig, TrainConfig
from gtr_turbo.settings import (
    UNREADABLE,
    build_config,
    config_file,
    config_names,
    merge,
    other_environment,
    read_config,
)

if TYPE_CHECKING:
    from gtr_turbo.policy.model import Policy


def stored_settings(path: Path, which: str) -> dict[str, Any]:
    """Settings that lie beside an agent: of its run, or the `recipe.yaml` that `sft` and `export` write.

    Raises:
        ConfigError: `which` is not there.
    """
    from gtr_turbo import checkpoint
    from gtr_turbo.policy.loading import adapter_settings
    from gtr_turbo.policy.starter import model_folder

    if (path / "config.yaml").exists():
        settings = read_config(path / "config.yaml")
        saved = checkpoint.folders(path)
        if not saved:
            raise ConfigError(f"{path} is a run without a complete checkpoint; nothing to load")
        checkpoint.read_state(saved[-1])
        model = settings.setdefault("model", {})
        if which == "student" and model.get("train") == "lora":
            student = saved[-1] / "student"
            model |= {"adapter": str(student), **adapter_settings(student)}
        else:
            model |= {"path": str(saved[-1] / which), "train": "full", "adapter": None}
        return settings
    if which == "teacher":
        raise ConfigError(f"{path} is no run folder, so it has no teacher; drop --which teacher")
    beside = [Path(model_folder(str(path))) / "recipe.yaml"]
    if path.resolve().name in ("student", "teacher"):
        beside.append(path.resolve().parent.parent.parent / "config.yaml")
    settings = next((read_config(file) for file in beside if file.exists()), {})
    return merge(settings, {"model": _weights(path)})


def _weights(path: Path) -> dict[str, Any]:
    """Settings of a model that are its weights: a whole model, or a PEFT adapter on its base.

    Raises:
        ConfigError: the adapter does not say what it adapts, or cannot be read.
    """
    described = path / "adapter_config.json"
    if not described.exists():
        return {"path": str(path), "train": "full", "adapter": None}
    try:
        base = json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise ConfigError(
            f"{described} names no base_model_name_or_path, so what the adapter is for is not known; put the "
            "folder or the hub name of its base model there"
        )
    from gtr_turbo.policy.loading import adapter_settings

    return {"path": base, "train": "lora", "adapter": str(path), **adapter_settings(path)}


def is_environment(name: str) -> bool:
    """True if an environment has this name; a folder of the same name comes first."""
    from gtr_turbo.envs import ContractError
    from gtr_turbo.envs.contract import resolve_id

    if Path(name).exists():
        return False
    try:
        resolve_id(name)
    except ContractError:
        if ":" in name:
            raise
        return False
    return True


def check_agent(name: str) -> None:
    """Refuse a name that leads nowhere, before the hub is asked for it.

    Raises:
        ConfigError: no run, no model, and no name that the hub may know; with what is there, and what is like it.
    """
    from gtr_turbo.envs.contract import built_in
    from gtr_turbo.policy.starter import STARTERS, is_here

    path = Path(name)
    if path.is_dir():
        files = ("config.yaml", "config.json", "adapter_config.json")
        if any((path / file).is_file() for file in files):
            return
        told, beside = f"is a folder without a run or a model ({', '.join(files)})", {path}
    elif is_here(name):
        return
    else:
        told, beside = "is no folder here, no model and no environment", {path.parent, Path("runs")}
    runs = sorted(str(file.parent) for folder in beside for file in folder.glob("*/config.yaml"))
    starters = [f"tiny-{known}" for known in STARTERS]
    close = suggest(name, [*config_names(), *runs, *starters, *built_in()])
    told += f".{close}"
    for recipe in config_names():
        if recipe == name or repr(recipe) in close:
            told += f" The recipe is given as --config {recipe}."
    if runs:
        told += f" Runs here: {', '.join(runs[:9])}{', ...' if len(runs) > 9 else ''}."
    raise ConfigError(f"{name!r} {told}")


def _asked(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what evaluation does not ask, and what may be for adapters only."""
    unasked = {("rollout", "engine"), ("teacher", "history")}
    return {
        group: {name: value for name, value in held.items() if (group, name) not in unasked}
        if isinstance(held, dict)
        else held
        for group, held in settings.items()
    }


def agent_of(options: argparse.Namespace) -> tuple[Policy | None, TrainConfig]:
    """The agent a path names: a run (its newest student or teacher), or a model; and its config.

    An environment in the agent's place is the environment, and the agent is None, as it is if none is given.
    """
    if options.episodes < 1:
        raise ConfigError(f"--episodes {options.episodes} must be at least 1")
    if options.seed is not None and options.seed < 0:
        raise ConfigError(f"--seed {options.seed} must be at least 0")
    if options.agent and not options.env and is_environment(options.agent):
        options.env, options.agent = options.agent, None
    if options.agent:
        check_agent(options.agent)
        settings = stored_settings(Path(options.agent), options.which)
        if "id" not in settings.get("env", {}) and not (options.config or options.env):
            raise ConfigError(
                f"{options.agent} has no environment in the settings beside its weights (the config.yaml of a run, "
                "the recipe.yaml of sft and export), so what it plays is not known: give the recipe it had "
                "(--config NAME_OR_FILE), or an environment (--env ID)"
            )
    elif not (options.env or options.config):
        raise ConfigError(f"{options.command} needs a run, a model or an environment; see --help")
    elif options.greedy or options.which != "student":
        raise ConfigError("--greedy and --which are of an agent, and none is given")
    else:
        settings = {}
    if options.config:
        model = settings.pop("model", {})
        settings = merge(read_config(config_file(options.config)), {"model": model})
    if options.env:
        settings["env"] = other_environment(settings.get("env", {}), options.env)
    config: TrainConfig = build_config(TrainConfig, _asked(settings))
    if not options.agent:
        return None, config
    from gtr_turbo.policy.model import Policy

    return Policy(config.model, temperature=config.sampling.temperature, seed=config.seed), config


def env_config(options: argparse.Namespace, config: TrainConfig) -> tuple[EnvConfig, str | None]:
    """The environment with `--option` applied, and the split to play.

    Raises:
        ConfigError: an option is not NAME=VALUE, or the value is no YAML; or it is the split.
    """
    import yaml

    given = {}
    for text in options.option or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text!r} must be NAME=VALUE")
        try:
            given[key] = yaml.safe_load(value)
        except UNREADABLE as error:
            told = " ".join(str(error).split())
            raise ConfigError(f"--option {text!r}: the value is no YAML ({told})") from error
    if "split" in given:
        raise ConfigError(
            f"--option split={given['split']}: the split has an option of its own, --split"
        )
    env = replace(config.env, options={**config.env.options, **given})
    return env, None if options.split == "none" else options.split or env.eval_split
