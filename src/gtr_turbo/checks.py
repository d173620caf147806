"""What settings are checked with, at birth."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or cannot work."""


def installed(package: str) -> bool:
    """Whether it can be imported; a mere folder of its name, which Python takes for a package too, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def key_from(variable: str) -> str:
    """The key that an environment variable holds, outer blanks removed; empty if it holds none.

    Raises:
        ConfigError: no header can hold it; the key is not repeated.
    """
    key = os.environ.get(variable, "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise ConfigError(
            f"the environment variable {variable} must hold a key of printable ASCII, but there is a blank, a line "
            "break or another character in it; copy the key into it again"
        )
    return key


def suggest(word: str, known: list[str]) -> str:
    """A sentence to append, "Did you mean 'x'?", if something close is known; else an empty string."""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def check_keys(settings: Mapping[str, Any], cls: type, where: str = "") -> None:
    """Refuse keys that `cls` does not declare and null where it is no value, nested ones included.

    Raises:
        ConfigError: names the key, what is known there, and the closest known key.
    """
    known = {f.name: get_type_hints(cls)[f.name] for f in fields(cls)}
    check_names(where, settings)
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(
                f"unknown setting {where + key!r}; known{' in ' + where[:-1] if where else ''}: "
                f"{', '.join(known)}.{suggest(key, list(known))}"
            )
        if value is None and type(None) not in get_args(known[key]):
            raise ConfigError(f"{where}{key} must not be null; leave it out for its default")
        if is_dataclass(known[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}{key} must be a group of settings, got {value!r}")
            check_keys(value, known[key], f"{where}{key}.")


def check_names(where: str, settings: Mapping[Any, Any]) -> None:
    """Refuse names of settings, or of options of an environment, that are no text."""
    for key in settings:
        if not isinstance(key, str):
            raise ConfigError(
                f"{where}{key!r} must be text, as names of settings are. YAML reads on, off, yes and no as true "
                "and false"
            )


def check_seed(owner: Any) -> None:
    """Refuse a `seed` that is no number of a generator."""
    if not 0 <= owner.seed < 2**63:
        raise ConfigError(
            f"seed={owner.seed} must be a number, not negative and below 2 to the 63rd"
        )


def positive(owner: Any, *names: str) -> None:
    """Refuse fields of `owner` that are not finite numbers above 0."""
    for name in names:
        if not 0 < getattr(owner, name) < math.inf:
            raise ConfigError(
                f"{_path(owner)}{name}={getattr(owner, name)} must be a number greater than 0"
            )


def not_negative(owner: Any, *names: str) -> None:
    """Refuse fields of `owner` that are not finite numbers of 0 or more."""
    for name in names:
        if not 0 <= getattr(owner, name) < math.inf:
            raise ConfigError(
                f"{_path(owner)}{name}={getattr(owner, name)} must be a number, not negative"
            )


def fraction(owner: Any, *names: str) -> None:
    """Refuse fields of `owner` outside 0 to 1."""
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            raise ConfigError(
                f"{_path(owner)}{name}={getattr(owner, name)} must be between 0 and 1"
            )


def _path(owner: Any) -> str:
    return getattr(owner, "_prefix", "")
