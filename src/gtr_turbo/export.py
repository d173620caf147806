"""Weights for everyone: an agent or teacher of a run, or any LoRA adapter, as a stock `transformers` folder.

An adapter is added to its base by the merge engine (`merging`): W + scale * B A in float32, rounded once, tensor by
tensor in bounded memory. Full weights are read, checked and written by the same way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gtr_turbo import checkpoint
from gtr_turbo.card import model_card, without_paths
from gtr_turbo.checks import ConfigError
from gtr_turbo.merging import Report, merge
from gtr_turbo.merging.lora import is_adapter
from gtr_turbo.merging.manifest import MANIFEST
from gtr_turbo.policy.starter import is_hub_name, model_folder
from gtr_turbo.settings import read_config


@dataclass(frozen=True)
class Source:
    """What is exported."""

    weights: Path
    """A PEFT adapter, or full weights."""
    base: str | None
    """Name or folder of the base model; None if it is not known."""
    which: str
    settings: dict[str, Any] | None = None
    """Of the run; None if the weights lie in none."""
    summary: dict[str, Any] | None = None
    """Of the run; None if it has not ended, or the weights are not its newest."""


def find_source(path: Path, which: str) -> Source:
    """What a path names: a run (its newest student or teacher), one of a run's folders, or other weights.

    Raises:
        ConfigError: nothing there to export.
        CheckpointError: the run's newest checkpoint is damaged.
    """
    if (path / "config.yaml").is_file():
        saved = checkpoint.folders(path)
        if not saved:
            raise ConfigError(f"{path} is a run without a complete checkpoint; nothing to export")
        checkpoint.read_state(saved[-1])
        return _of_run(path, saved[-1] / which, which)
    real = path.resolve()  # it may be a link, or "."
    run = real.parent.parent.parent
    if real.name in ("student", "teacher") and (run / "config.yaml").is_file():
        if which == "teacher" and real.name == "student":
            raise ConfigError(
                f"{path} is a student; for the teacher give the run, or {real.parent}/teacher"
            )
        return _of_run(run, path, real.name)
    if which == "teacher":
        raise ConfigError(f"{path} is no run folder, so it has no teacher; drop --which teacher")
    if is_adapter(path):
        return Source(path, _recorded_base(path), which)
    if (path / "config.json").is_file():
        return Source(path, None, which)
    raise ConfigError(
        f"{path} is neither a run, nor a PEFT adapter (adapter_config.json), nor a model folder (config.json)"
    )


def _of_run(run: Path, weights: Path, which: str) -> Source:
    settings = read_config(run / "config.yaml")
    summary, file = None, run / "summary.json"
    if file.is_file():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            # by its number: a run folder may have been moved
            if Path(found[which]).parent.name == weights.resolve().parent.name:
                summary = found
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{file} is damaged ({error!r}); remove it to export without the run's results"
            ) from error
    return Source(weights, settings["model"]["path"], which, settings, summary)


def _recorded_base(adapter: Path) -> str | None:
    """The base that an adapter names; one that cannot be read is reported by the merge."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"] or "") or None
    except (ValueError, KeyError, TypeError):
        return None


def find_base(name: str) -> Path:
    """The folder with a base model's weights: a folder, a shipped starter, or the cache of the hub.

    Raises:
        ConfigError: it is not on this machine; says what to download.
    """
    folder = Path(model_folder(name))
    if not folder.is_dir() and is_hub_name(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except LocalEntryNotFoundError:
            folder = Path()  # holds no weights: refused below
    if name and folder != Path() and any(folder.glob("*.safetensors")):
        return folder
    how = f"download it with `hf download {name}`, or give" if is_hub_name(name) else "give"
    raise ConfigError(
        f"the base model {name!r} is not on this machine (no folder with its .safetensors files); {how} "
        "--base FOLDER with its weights"
    )


def export(
    path: Path,
    out: Path,
    *,
    base: str | None = None,
    which: str = "student",
    dtype: str | None = None,
    threads: int = 2,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write full weights, sharded, with config, tokenizer, processor, chat template and model card.

    Of a run, its environment and sampling go along too, as `recipe.yaml`, which `eval` and `play` read. No file
    names a folder of this machine; a note on stderr names the options of the environment that lost one.

    Args:
        path: a run, an adapter, or a model folder.
        out: folder to make.
        base: the adapter's base model, if not the one it names.
        which: `student` or `teacher`, of a run.
        dtype: of the result; default: the base's, or that of full weights.
        threads: at work at once.
        shard_bytes: largest file.
        progress: told (bytes read, bytes to read).

    Raises:
        ConfigError: nothing to export, no base, or another base than the adapter's.
        MergeError: the adapter does not fit the base, `out` is not empty, or a file is damaged.
    """
    source = find_source(path, which)
    adapter = is_adapter(source.weights)
    if base is not None and not adapter:
        raise ConfigError(f"{source.weights} holds full weights, which need no --base; drop it")
    name = base or source.base
    folder = None
    if adapter:
        if name is None:
            raise ConfigError(f"{source.weights} does not name its base model; give --base")
        if base and source.base and is_hub_name(base) and is_hub_name(source.base):
            _same_base(base, source)
        folder = find_base(name)
    report = merge(
        [source.weights],
        out,
        base=folder,
        method="linear",
        dtype=dtype,
        threads=threads,
        shard_bytes=shard_bytes,
        progress=progress,
    )
    for given in report.manifest["checkpoints"]:
        given["path"] = Path(given["path"]).resolve().name
    if (given := report.manifest["base"]) is not None:  # of the hub's cache the last part is a hash
        hub = source.base or name
        given["path"] = hub if is_hub_name(hub or "") else Path(given["path"]).resolve().name
    checkpoint.write_atomically(out / MANIFEST, json.dumps(report.manifest, indent=1) + "\n")
    text = model_card(
        base=source.base or name or "not known",
        which=source.which,
        adapter=False,
        settings=source.settings,
        summary=source.summary,
    )
    checkpoint.write_atomically(out / "README.md", text)
    recipe = None if source.settings is None else _recipe(source.settings)
    if recipe is None and (source.weights / "recipe.yaml").is_file():  # that `sft` made
        recipe = read_config(source.weights / "recipe.yaml")
    if recipe is not None:
        text = yaml.safe_dump(without_paths(recipe), sort_keys=False, allow_unicode=True)
        checkpoint.write_atomically(out / "recipe.yaml", text)
        for name, value in recipe.get("env", {}).get("options", {}).items():
            if without_paths(value) != value:
                print(
                    f"note: of the environment's option {name}, a path, recipe.yaml holds the last part only; give "
                    f"it again: gtr-turbo eval {out} --option {name}=PATH",
                    file=sys.stderr,
                )
    return report


def _recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a run's settings, what `eval` and `play` need to know."""
    model = {name: settings["model"][name] for name in ("attention", "dtype", "device")}
    env = {name: value for name, value in settings["env"].items() if name != "num_envs"}
    return {"env": env, "sampling": settings["sampling"], "model": model}


def _same_base(base: str, source: Source) -> None:
    if base != source.base:
        raise ConfigError(
            f"{source.weights} is an adapter of {source.base}, not of {base}: on another base it means nothing. "
            "Drop --base, or give a folder that holds its base"
        )
