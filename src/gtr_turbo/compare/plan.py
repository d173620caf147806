"""What a comparison runs: variants from `--vary`, a run for each of their seeds, and what is there already."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from gtr_turbo import trackers
from gtr_turbo.checks import ConfigError
from gtr_turbo.config import TrainConfig
from gtr_turbo.envs import make_env
from gtr_turbo.settings import (
    SWITCHES,
    UNREADABLE,
    build_config,
    dump_config,
    merge,
    read_config,
    with_overrides,
)

ENDPOINT = (
    "base_url", "key_variable", "timeout_s", "retries", "backoff_s", "concurrency", "outage", "wait_s", "budget",
)  # fmt: skip
"""Of `guidance.external`, how the corrector is reached and paid; what it is asked are the others."""

FREE = ("run", "threads", "trackers", "save.keep", *(f"guidance.external.{n}" for n in ENDPOINT))
"""Settings that do not change what is to be computed: a stored run may have others, and goes on with new ones."""

RETIRED = ("tensorboard",)
"""Settings of former versions that did not either: a finished run may have them, `train --resume` refuses them."""

MOST_SEEDS = 1000
"""That `--seeds N` may mean."""

LONGEST = 80
"""Characters of a label; longer ones are cut, with a hash of the whole."""

State = Literal["finished", "unfinished", "new"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A setting that is varied."""

    key: str
    """Its dotted name."""
    short: str
    """Its name in labels."""
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One recipe of the comparison."""

    label: str
    """`name=value,...`, also the folder's name."""
    values: Mapping[str, Any]
    """The varied settings, by dotted name."""
    config: TrainConfig
    """With seed 0, and no run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run."""

    variant: Variant
    seed: int
    folder: Path
    state: State
    update: int = 0
    """Updates that its newest checkpoint holds."""

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def name(self) -> str:
        """`label, seed N`."""
        return f"{self.variant.label}, seed {self.seed}"


def read_seeds(text: str) -> tuple[int, ...]:
    """`5` is 0 to 4; `3,7` are those two; `3,` is that one.

    Raises:
        ConfigError: not whole numbers from 0, none, one twice, or too many.
    """
    parts = [part.strip() for part in text.removesuffix(",").split(",")]
    if not all(part.isascii() and part.isdigit() and len(part) <= 18 for part in parts):
        raise ConfigError(f"--seeds {text!r} must be how many (5), or which (3,7)")
    if "," not in text and int(text) > MOST_SEEDS:
        raise ConfigError(
            f"--seeds {text} is {text} seeds, at most {MOST_SEEDS}; for the seed {text} alone write {text},"
        )
    seeds = tuple(map(int, parts)) if "," in text else tuple(range(int(text)))
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {text!r} must name at least one seed, and none twice")
    return seeds


def read_factors(texts: Sequence[str]) -> list[Factor]:
    """`KEY=V1,V2,...`, values as YAML; a group's name alone means its main switch.

    Raises:
        ConfigError: not of that form, a key given twice, a value given twice, or a group without a switch.
    """
    import yaml

    factors: list[Factor] = []
    for text in texts:
        given, equals, listed = text.partition("=")
        try:
            values = yaml.safe_load(f"[{listed}]") if equals and listed else None
        except UNREADABLE as error:
            raise ConfigError(f"the values of --vary {text!r} cannot be read: {error}") from error
        if not values:
            raise ConfigError(
                f"--vary {text!r} must be KEY=VALUE,VALUE,... such as guidance=none,kl"
            )
        key = _switch(given)
        if key in ("run", "seed", "threads"):
            raise ConfigError(f"--vary {key} cannot be: see --out, --seeds and --threads")
        if len({text_of(value) for value in values}) < len(values):
            raise ConfigError(f"--vary {text!r} names a value twice")
        if key in [factor.key for factor in factors]:
            raise ConfigError(f"--vary {key} is given twice; give its values once, with commas")
        short = given.rpartition(".")[2]
        if short in [factor.short for factor in factors]:
            short = given
        factors.append(Factor(key=key, short=short, values=tuple(values)))
    return factors


def _switch(key: str) -> str:
    """The dotted name of a setting, where the name of a group may stand for its switch."""
    cls: Any = TrainConfig
    for part in key.split("."):
        kinds = get_type_hints(cls) if is_dataclass(cls) else {}
        if part not in kinds:
            return key  # building the config says what is wrong with it, or it is an option
        cls = kinds[part]
    if not is_dataclass(cls):
        return key
    known = [field.name for field in fields(cls)]
    if not (switch := SWITCHES.get(key)):
        listed = ", ".join(f"{key}.{name}" for name in known)
        raise ConfigError(f"--vary {key} is a group of settings; name one of {listed}")
    return f"{key}.{switch}"


def make_variants(
    source: Path, over: Mapping[str, Any], factors: Sequence[Factor], threads: int
) -> list[Variant]:
    """Every combination of the factors' values, each with its config built.

    Raises:
        ConfigError: a variant's settings are unknown or cannot work, two variants have the same ones, or a setting
            is both varied and given.
    """
    for key, instead in (("run", "--out"), ("seed", "--seeds")):
        if key in over:
            raise ConfigError(f"--{key} cannot be given to compare; see {instead}")
    for factor in factors:
        if _given(over, factor.key):
            raise ConfigError(f"{factor.key} is both varied and given; take one of the two away")
    settings = read_config(source)
    settings.setdefault("name", source.stem)
    variants: list[Variant] = []
    made: dict[str, str] = {}
    for values in itertools.product(*(factor.values for factor in factors)):
        nested: dict[str, Any] = {}
        for factor, value in zip(factors, values, strict=True):
            for part in reversed(factor.key.split(".")):
                value = {part: value}
            nested = merge(nested, value)
        label = _label([f.short for f in factors], values)
        fixed = {"run": None, "seed": 0, "threads": threads}
        try:
            config = build_config(
                TrainConfig, with_overrides(settings, merge(merge(dict(over), nested), fixed))
            )
        except ConfigError as error:
            raise ConfigError(f"variant {label}: {error}" if factors else str(error)) from error
        if (first := made.setdefault(dump_config(config), label)) != label:
            raise ConfigError(
                f"variants {first} and {label} have the same settings; name each value once"
            )
        keyed = dict(zip((factor.key for factor in factors), values, strict=True))
        variants.append(Variant(label=label, values=keyed, config=config))
    return variants


def _given(over: Mapping[str, Any], key: str) -> bool:
    """Whether nested settings say something of a dotted key."""
    found: Any = over
    for part in key.split("."):
        if not isinstance(found, Mapping):
            return True
        if part not in found:
            return False
        found = found[part]
    return True


def idle(variants: Sequence[Variant]) -> list[str]:
    """Notes on settings of the guidance that are varied where there is none: those variants learn the same."""
    unguided = [variant for variant in variants if variant.config.guidance.kind == "none"]
    return [
        f"guidance.kind is none in {', '.join(v.label for v in unguided)}: {key} changes nothing that these learn"
        for key in variants[0].values
        if key.startswith("guidance.") and len({text_of(v.values[key]) for v in unguided}) > 1
    ]


def _label(names: Sequence[str], values: Sequence[Any]) -> str:
    """`name=value,...` of characters that any file system takes; what was lost is told apart by a hash."""
    full = ",".join(f"{name}={text_of(value)}" for name, value in zip(names, values, strict=True))
    full = full or "base"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", full)
    if safe == full and len(full) <= LONGEST:
        return full
    return f"{safe[:LONGEST]}-{hashlib.sha256(full.encode()).hexdigest()[:6]}"


def text_of(value: Any) -> str:
    """A value as labels have it.

    Raises:
        ConfigError: a file could not hold it.
    """
    try:
        return value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--vary cannot take the value {value}: {error}") from error


def make_jobs(variants: Sequence[Variant], seeds: Sequence[int], out: Path) -> list[Job]:
    """A run for each seed of each variant, seed by seed, so that there is something to compare early.

    Raises:
        ConfigError: a run folder holds something else.
    """
    jobs = []
    for seed in seeds:
        for variant in variants:
            folder = out / variant.label / f"seed{seed}"
            state, update = examine(folder, replace(variant.config, seed=seed))
            jobs.append(Job(variant=variant, seed=seed, folder=folder, state=state, update=update))
    return jobs


def check_startable(jobs: Sequence[Job]) -> None:
    """Find what would only stop a run that has begun: an environment's options, a type, a key, a tracker.

    Raises:
        ConfigError: a run that is not finished cannot start; its variant is named.
    """
    made: list[tuple[str, dict[str, Any]]] = []
    for variant in {j.variant.label: j.variant for j in jobs if j.state != "finished"}.values():
        config = variant.config
        try:
            config.model.check_trained()
            if config.guidance.kind == "external":
                config.guidance.external.key()
            trackers.chosen(config)
            for name, options in config.environments():
                if (name, options) not in made:
                    made.append((name, options))
                    make_env(name, **options).close()
        except Exception as error:  # an environment of the user's may raise any
            raise ConfigError(f"variant {variant.label}: {error}") from error


def examine(folder: Path, config: TrainConfig) -> tuple[State, int]:
    """What a run folder holds of a run with this config, and the updates of its newest checkpoint.

    Raises:
        ConfigError: it holds something else, or cannot be resumed; the folder and the settings are named.
    """
    checkpoints = sorted(
        int(path.parent.name)
        for path in folder.glob("checkpoints/*/state.json")
        if path.parent.name.isdigit()
    )
    stored = folder / "config.yaml"
    if not stored.exists():
        if checkpoints or any(
            (folder / name).exists() for name in ("metrics.jsonl", "summary.json")
        ):
            raise ConfigError(
                f"{folder} holds a run without its config.yaml, so nobody knows what was run; "
                "remove the folder or give another --out"
            )
        return "new", 0
    try:
        settings = read_config(stored)
        retired = [key for key in RETIRED if key in settings]
        kept = {key: value for key, value in settings.items() if key not in FREE + RETIRED}
        found = build_config(TrainConfig, kept)
    except ConfigError as error:
        raise ConfigError(
            f"the config of {folder} cannot be used ({error}); remove the folder or give another --out"
        ) from error
    if other := different(_in_use(found), _in_use(config)):
        raise ConfigError(
            f"{folder} holds a run with other settings: {'; '.join(other[:5])}"
            f"{'; ...' if len(other) > 5 else ''}. Give another --out, or remove the folder"
        )
    if read_summary(folder).get("env_steps") == config.num_updates * config.turns_per_update:
        return "finished", checkpoints[-1] if checkpoints else 0
    if checkpoints and retired:
        raise ConfigError(
            f"{folder} cannot be resumed: its config.yaml has the setting {', '.join(retired)} of a former "
            "version; take that line out, remove the folder or give another --out"
        )
    return ("unfinished", checkpoints[-1]) if checkpoints else ("new", 0)


def _in_use(config: TrainConfig) -> dict[str, Any]:
    """Its settings, without the groups that its kind of guidance does not read; null as what it stands for."""
    settings = asdict(config)
    guidance = settings["guidance"]
    guidance["imitation"]["weight_final"] = config.guidance.imitation.last_weight
    if config.guidance.kind != "external":
        del guidance["external"]
        if config.guidance.kind != "sft":
            del guidance["imitation"]
    return settings


def arguments(config: TrainConfig) -> list[str]:
    """`--KEY VALUE` of the FREE settings in use, for `train --resume`; folder and threads are each run's own."""
    settings = _in_use(config)
    found = []
    for key in FREE:
        if key not in ("run", "threads") and _given(settings, key):
            value = functools.reduce(operator.getitem, key.split("."), settings)
            found += [f"--{key}", json.dumps(value)]
    return found


def different(stored: Mapping[str, Any], wanted: Mapping[str, Any], above: str = "") -> list[str]:
    """`ppo.lr is 0.1, not 0.2` for every setting that changes what a run computes."""
    found = []
    for key in dict.fromkeys([*stored, *wanted]):
        name, one, two = f"{above}{key}", stored.get(key), wanted.get(key)
        if name in FREE or one == two:
            continue
        if isinstance(one, dict) and isinstance(two, dict):
            found += different(one, two, f"{name}.")
        else:
            found.append(f"{name} is {one!r}, not {two!r}")
    return found


def read_summary(folder: Path) -> dict[str, Any]:
    """`summary.json` of a run; empty if there is none that can be read."""
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return summary if isinstance(summary, dict) else {}
