"""Settings from files and the command line: YAML with a `base`, dotted overrides, typed and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from gtr_turbo.checks import ConfigError, check_keys, suggest
from gtr_turbo.config import EnvConfig

CONFIGS = Path(__file__).parent / "configs"
SFT_CONFIGS = CONFIGS / "sft"
SWITCHES = {"model": "path", "env": "id", "guidance": "kind", "teacher": "method"}
"""Of a group, the setting that its name alone means: `--model X` is `--model.path X`."""

UNREADABLE = (yaml.YAMLError, ValueError)
"""What `yaml.safe_load` raises: ValueError of bytes that are no text, and of a date that is none, 2026-02-30."""

WORDS = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def config_names(folder: Path = CONFIGS) -> list[str]:
    """Names of the configs that ship with the package."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def config_file(name: str, folder: Path = CONFIGS) -> Path:
    """A shipped config by name, or a YAML file by path.

    Raises:
        ConfigError: neither exists.
    """
    shipped = folder / f"{name}.yaml"
    if shipped.exists():
        return shipped
    if Path(name).is_file():
        return Path(name)
    names = config_names(folder)
    raise ConfigError(
        f"config {name!r} is neither a file nor one of {', '.join(names)}.{suggest(name, names)}"
    )


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, group by group; `options` are merged key by key too."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def with_overrides(
    settings: dict[str, Any], over: dict[str, Any], *, rename: bool = True
) -> dict[str, Any]:
    """A recipe's settings under others; another environment leaves of its own what fits, and names it."""
    env, own, evaluation = over.get("env"), settings.get("env", {}), settings.get("eval", {})
    given = env.get("id") if isinstance(env, dict) else None
    if isinstance(given, str) and isinstance(own, dict) and isinstance(evaluation, dict):
        if not _same_environment(own, given):
            name = re.sub(r"\W+", "-", given.rpartition(":")[2].removeprefix("gtr/")).lower()
            # its own splits are of the other environment
            kept = {key: value for key, value in evaluation.items() if key != "extra_splits"}
            settings = settings | {"eval": kept} | ({"name": name} if rename else {})
        settings = settings | {"env": other_environment(own, given)}
    return merge(settings, over)


def _same_environment(env: dict[str, Any], name: str) -> bool:
    from gtr_turbo.envs.contract import ContractError, resolve_id

    found, own = resolve_id(name), env.get("id", EnvConfig().id)
    with suppress(ContractError):  # the one of the settings may not be here
        return isinstance(own, str) and resolve_id(own) == found
    return False


def other_environment(env: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of `env` with this environment: what would be options of another one is left out.

    Raises:
        ContractError: unknown name.
    """
    from gtr_turbo.envs.contract import resolve_id

    if not isinstance(env, dict):  # told as what it is when settings are built
        return {"id": name}
    if _same_environment(env, name):
        return env | {"id": name}
    kept = {key: value for key, value in env.items() if key == "num_envs"}
    if resolve_id(name).startswith(
        "gtr/"
    ):  # the built-in ones all know the two styles of prompt, and `split`
        kept |= {key: value for key, value in env.items() if key.endswith("_split")}
        options = env.get("options")
        style = options.get("prompt") if isinstance(options, dict) else None
        kept["options"] = {"prompt": style} if style else {}
    return kept | {"id": name}


def read_config(
    path: Path, folder: Path = CONFIGS, *, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """Settings of a YAML file; a key `base: NAME` takes another config and changes it as the command line would.

    Args:
        path: the file.
        folder: of the shipped configs that `base` may name; a file is looked for beside `path` first.
        above: files whose `base` led here.

    Raises:
        ConfigError: not YAML, not a mapping, a key given twice, or its own base.
        ContractError: it names an environment that there is not, in place of that of its base.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text) or {}
        _check_once(yaml.compose(text, yaml.SafeLoader), path)
    except (*UNREADABLE, OSError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold settings (key: value), got {type(settings).__name__}")
    base = settings.pop("base", None)
    if base is None:
        return settings
    above = (*above, path.resolve())
    beside = path.parent / str(base)
    below = beside if beside.is_file() else config_file(str(base), folder)
    if below.resolve() in above:
        raise ConfigError(f"base: {base} in {path} leads back to {below}")
    return with_overrides(read_config(below, folder, above=above), settings, rename=False)


def _check_once(node: Any, path: Path, group: str = "") -> None:
    """Refuse a key that a group has twice: YAML would silently take the last.

    Raises:
        ConfigError: names it.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if key.value in seen:
            raise ConfigError(
                f"{path}, line {key.start_mark.line + 1}: {group}{key.value} is given twice; put its settings "
                "together"
            )
        seen.add(key.value)
        _check_once(value, path, f"{group}{key.value}.")


def read_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """`--ppo.lr 1e-4 --env.options.prompt=full --model DIR` as nested settings; values are YAML.

    Raises:
        ConfigError: an argument is no `--key value`.
    """
    found: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key, equals, value = rest.pop(0).partition("=")
        if not key.startswith("--") or (not equals and not rest):
            hint = f"; the recipe is given as --config {key}" if key in config_names() else ""
            raise ConfigError(f"cannot read {key!r}; give settings as --group.name VALUE{hint}")
        value = value if equals else rest.pop(0)
        try:
            read = yaml.safe_load(value)
        except UNREADABLE as error:
            raise ConfigError(f"value of {key} cannot be read: {value!r}") from error
        name = key[2:]
        if name in SWITCHES and not isinstance(read, dict):
            name = f"{name}.{SWITCHES[name]}"
        group = found
        *path, last = name.split(".")
        for part in path:
            group = group.setdefault(part, {})
            if not isinstance(group, dict):
                raise ConfigError(
                    f"{key} and --{part} cannot both be given: {part} is a group of settings"
                )
        both = isinstance(read, dict) and isinstance(group.get(last), dict)
        group[last] = merge(group[last], read) if both else read
    return found


def build_config(cls: type, settings: dict[str, Any]) -> Any:
    """Settings as a checked, frozen config.

    Raises:
        ConfigError: unknown key, wrong type, or settings that cannot work.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    check_keys(settings, cls)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", type=cls)
    try:
        return parser.instantiate_classes(parser.parse_object({"config": settings})).config
    except ConfigError:
        raise
    except (ArgumentError, ValueError, TypeError, KeyError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        found = re.search(r'Parser key "config\.([\w.]+)"', str(error))
        raise ConfigError(_misfit(cls, settings, found[1]) if found else str(error)) from error


def _misfit(cls: type, settings: dict[str, Any], path: str) -> str:
    """What a setting is and what it must be, in words."""
    hint: Any = cls
    value: Any = settings
    for part in path.split("."):
        hint, value = get_type_hints(hint)[part], value[part]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        for at, item in enumerate(value):
            try:
                build_config(get_args(hint)[0], item)
            except ConfigError as error:
                return f"{path}[{at}]: {error}"
    text = f"{path}={value!r} must be {_words(hint)}"
    if isinstance(value, bool) and _choices(hint):
        return f"{text}. YAML reads on, off, yes and no as true and false"
    if not isinstance(value, str):
        return text
    choices = _choices(hint)
    if "a list" in text and (value in choices or not choices):
        return f"{text}. A list is written '[{value}]'"
    close = suggest(value, choices)
    return f"{text}.{close}" if close else text


def _choices(hint: Any) -> list[str]:
    """The strings that a type names."""
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [name for part in get_args(hint) for name in _choices(part)]


def _words(hint: Any) -> str:
    """A type as people say it."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if kind in (Union, UnionType):
        return ", or ".join(map(_words, parts))
    if kind in (tuple, list):
        return f"a list of {_words(parts[0]).removeprefix('one of ')}"
    return WORDS.get(hint, "a group of settings (name: value)")


def dump_config(config: Any) -> str:
    """A config as YAML, every setting written out.

    Raises:
        ConfigError: an option of an environment is no JSON, as a date of YAML is.
    """
    from dataclasses import asdict

    try:
        plain = json.loads(json.dumps(asdict(config)))
    except TypeError as error:
        raise ConfigError(
            f"options hold a value that is no JSON ({error}); put a date into quotes"
        ) from error
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
