"""What a visual-text environment is, and a checker for it.

The contract, on top of `gymnasium.Env`:

* observation: `{"image": uint8 (H, W, 3) RGB, "prompt": str}`; images are kept, so each is an array of its own;
* action: the action *string* the model wrote. An unknown string is the environment's to answer
  (the card games pay -1); `step` must not raise on any string, the empty one included;
* `fields`: class attribute, the JSON keys a reply must have, in order, `"action"` last;
* `info["actions"]`: the legal action strings, when they can be listed;
* `info["success"]`: bool, present in the info of the last step of an episode;
* optional `info["task"]`: str, the type of the episode's task, in the info of its reset or its last step;
* optional `info["goal_conditions"]`: the fraction of the goal that is met, in the info of the last step;
* optional `info["fault"]`: what failed beside the agent and ended the episode;
* optional `judge(reply)`: facts about a parsed reply in the current state, any of `"perception"`
  (what it says it sees is there), `"plan"` (its plan reaches the goal), `"agreement"` (its action
  is the plan's next step);
* optional `demonstrate(rng)`: a reply (dict of the fields) of an expert, for `gtr-turbo sft`; a `ContractError`
  where there is none with these options;
* optional `field_schemas`: JSON schemas of the fields that are no strings, and `tools`: a tuple of `Tool`,
  both for `guidance.kind: external`;
* optional `numbered`: how many fixed tasks it has; `reset(options={"number": k})` then plays number k, from 0. An
  evaluation plays each once before it plays one again;
* optional `same_frames = False`: the same seed and actions give the same prompts, but frames of a simulator that
  does not repeat itself to the last bit.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import gymnasium
import numpy as np
from gymnasium import spaces

from gtr_turbo.checks import suggest
from gtr_turbo.parsing import parse

Env = gymnasium.Env[dict[str, Any], str]

SPLITS = ("all", "train", "held-out", "held-out-multisets")
"""Splits of deals. `all` is the published distribution; the others partition it (environments.md)."""

MAX_TEXT = 100_000
REPEATED = 20
"""Turns that `check_env` plays twice."""


class Observation(TypedDict):
    """What the agent is shown: `image` uint8 (H, W, 3) RGB, and the text `prompt`."""

    image: np.ndarray
    prompt: str


class ContractError(ValueError):
    """An environment, or its name, does not keep the contract of this module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that a corrector of thoughts may call; it knows nothing but its arguments.

    It is called long after the turn it is asked about, from several threads: it must not read the state of
    the environment.
    """

    name: str
    """Letters, digits, `_`."""
    description: str
    """What it does, for the model."""
    parameters: Mapping[str, Any]
    """JSON schema of the arguments, an object whose properties are all required."""
    run: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    """Arguments that keep the schema -> what the model is told, as JSON. A `ValueError` is told as an error."""


def json_object(**properties: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object that has all of `properties` and nothing else, as strict tools need it."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


class AnyText(spaces.Text):
    """A `Text` space that contains every string of at most `MAX_TEXT` characters."""

    def __init__(self) -> None:
        super().__init__(MAX_TEXT, min_length=0)

    def contains(self, x: Any) -> bool:
        """True for any `str` that is not absurdly long, whatever its characters."""
        return isinstance(x, str) and len(x) <= MAX_TEXT

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """A short random string."""
        letters = self.np_random.choice(list("abc 123+-*/=()"), size=8)
        return "".join(letters)


def observation_space(height: int, width: int) -> spaces.Dict:
    """The space of `Observation` with images of `height` x `width` pixels."""
    image = spaces.Box(0, 255, (height, width, 3), np.uint8)
    return spaces.Dict({"image": image, "prompt": AnyText()})


def built_in() -> list[str]:
    """Names of the environments that ship with the package."""
    ours = [key for key in gymnasium.registry if key.startswith("gtr/")]
    return [key.removeprefix("gtr/").removesuffix("-v0") for key in ours]


def resolve_id(name: str) -> str:
    """Turn `Points24`, `gtr/Points24-v0` or `module:EnvId` into a registered Gymnasium id.

    Raises:
        ContractError: the module cannot be imported, or no such id is registered.
    """
    module, _, env_id = name.rpartition(":")
    if module:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m gtr_turbo` has it
        try:
            importlib.import_module(module)
        except (ImportError, TypeError) as error:  # TypeError: of a relative name, `./my_env.py`
            raise ContractError(
                f"environment {name!r}: cannot import module {module!r} ({error}). "
                "Give MODULE:ENV_ID with a module in this folder or on PYTHONPATH that registers ENV_ID."
            ) from error
    known, ours = gymnasium.registry, built_in()
    candidates = [env_id, f"gtr/{env_id}-v0", f"gtr/{env_id}", f"{env_id}-v0"]
    for candidate in candidates:
        if candidate in known:
            return candidate
    hint = suggest(env_id, [*known, *ours])
    raise ContractError(
        f"unknown environment {name!r}; built in: {', '.join(ours)}.{hint} "
        "Your own: register it with Gymnasium in a module and name it MODULE:ENV_ID."
    )


def make_env(name: str, **options: Any) -> Env:
    """Make an environment by name (see `resolve_id`), without Gymnasium's passive checker.

    Raises:
        ContractError: unknown name, or the environment does not take one of `options`.
    """
    env_id = resolve_id(name)
    try:
        return gymnasium.make(env_id, disable_env_checker=True, **options)
    except TypeError as error:
        known = _options(gymnasium.spec(env_id).entry_point)
        if unknown := [option for option in options if option not in known]:
            raise ContractError(
                f"{env_id} does not take the options {', '.join(unknown)}; it takes: "
                f"{', '.join(known) or 'none'}.{suggest(unknown[0], known)}"
            ) from error
        raise ContractError(f"{env_id} cannot be made with {options}: {error}") from error


def _options(entry: Any) -> list[str]:
    """Names of the keyword arguments of what makes an environment, those it hands to its base classes too."""
    made = gymnasium.envs.registration.load_env_creator(entry) if isinstance(entry, str) else entry
    names: list[str] = []
    for kind in made.__mro__ if isinstance(made, type) else (made,):
        given = inspect.signature(kind).parameters.values()
        names += [p.name for p in given if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if all(p.kind is not p.VAR_KEYWORD for p in given):
            break
    return list(dict.fromkeys(names))


def attribute(env: Env, name: str) -> Any:
    """`fields`, `judge` or `demonstrate` of an environment, whichever wrapper has it; None if none does."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None


def check_observation(name: str, observation: Any) -> None:
    """Refuse what is no `Observation`.

    Raises:
        ContractError: why, with `name`, the environment's.
    """
    if not isinstance(observation, dict) or set(observation) != {"image", "prompt"}:
        keys = sorted(observation) if isinstance(observation, dict) else type(observation).__name__
        raise ContractError(
            f"{name}: an observation must be a dict of image and prompt, got {keys}"
        )
    image, prompt = observation["image"], observation["prompt"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ContractError(f"{name}: image must be a uint8 array, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 8:
        raise ContractError(f"{name}: image must be RGB (H, W, 3), got shape {image.shape}")
    if not isinstance(prompt, str) or not prompt:
        raise ContractError(f"{name}: prompt must be a non-empty str, got {prompt!r}")


def _check_info(name: str, info: Mapping[str, Any]) -> None:
    task, met = info.get("task"), info.get("goal_conditions")
    if task is not None and not isinstance(task, str):
        raise ContractError(
            f"{name}: info['task'] must be a str, the type of the episode's task, got {task!r}; "
            "give anything else under another name"
        )
    number = isinstance(met, (int, float, np.integer, np.floating, np.bool_))
    if met is not None and not (number and 0 <= met <= 1):
        raise ContractError(
            f"{name}: info['goal_conditions'] must be a fraction, 0 to 1, got {met!r}"
        )


def _check_step(name: str, env: Env, action: str) -> tuple[Any, float, bool, dict[str, Any]]:
    try:
        observation, reward, terminated, truncated, info = env.step(action)
    except Exception as error:
        raise ContractError(
            f"{name}: step({action!r}) raised {type(error).__name__}: {error}. What the model says "
            "is data: answer every action with a reward, an unknown one too; do not raise."
        ) from error
    check_observation(name, observation)
    _check_info(name, info)
    number = isinstance(reward, (int, float, np.integer, np.floating))
    if not number or not math.isfinite(reward):
        raise ContractError(f"{name}: reward must be a finite number, got {reward!r}")
    for flag, value in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(value, (bool, np.bool_)):
            raise ContractError(f"{name}: {flag} must be a bool, got {value!r}")
    done = bool(terminated or truncated)
    if done and not isinstance(info.get("success"), (bool, np.bool_)):
        raise ContractError(
            f"{name}: the last info of an episode must hold success=True or False, got "
            f"{info.get('success')!r}"
        )
    return observation, float(reward), done, info


def _action(name: str, info: Mapping[str, Any], rng: np.random.Generator) -> str:
    actions = info.get("actions")
    if actions is not None and (
        not isinstance(actions, Sequence) or not all(isinstance(a, str) for a in actions)
    ):
        raise ContractError(f"{name}: info['actions'] must list strings, got {actions!r}")
    if odd := [action for action in actions or () if not action or action != action.strip()]:
        raise ContractError(
            f"{name}: info['actions'] lists {odd[0]!r}, which no reply can give: they are read without outer blanks"
        )
    return str(rng.choice(list(actions))) if actions else "?"


def _check_for_corrector(name: str, env: Env, fields: Sequence[str]) -> None:
    if wrong := [tool for tool in attribute(env, "tools") or () if not isinstance(tool, Tool)]:
        raise ContractError(f"{name}: `tools` must be `contract.Tool` objects, got {wrong[0]!r}")
    if unknown := set(attribute(env, "field_schemas") or {}) - set(fields):
        raise ContractError(
            f"{name}: `field_schemas` names {sorted(unknown)}, which are not among its fields {fields}"
        )


def _check_expert(name: str, env: Env, fields: Sequence[str]) -> None:
    """In the state that the environment is in: what an expert says, and facts about a reply."""
    expert, judge = attribute(env, "demonstrate"), attribute(env, "judge")
    try:
        said = expert(np.random.default_rng(0)) if expert is not None else None
    except ContractError:  # it has none as it was made
        said = None
    if said is not None:
        try:
            json.dumps(said)
        except (TypeError, ValueError) as error:
            raise ContractError(
                f"{name}: demonstrate must give what JSON can hold, got {said!r:.200} ({error}); "
                "int() and str() make plain values of NumPy's"
            ) from error
        if not parse(json.dumps(said), fields).valid:
            raise ContractError(
                f"{name}: demonstrate must give {list(fields)}, the action last and as text or a whole number, "
                f"or no such reply could be read, got {said!r:.200}"
            )
    for reply in (said, dict.fromkeys(fields, ""), {field: ["?"] for field in fields}):
        if judge is None or reply is None:
            continue
        try:
            facts = judge(reply)
        except Exception as error:
            raise ContractError(
                f"{name}: judge({reply!r:.200}) raised {type(error).__name__}: {error}. What the model says is "
                "data: leave a fact out that cannot be told, do not raise."
            ) from error
        if not isinstance(facts, Mapping) or not all(
            isinstance(fact, (bool, np.bool_)) for fact in facts.values()
        ):
            raise ContractError(f"{name}: judge must give a dict of True and False, got {facts!r}")


def _check_repeats(name: str, env: Env) -> None:
    """A resumed run plays its running episodes again, so the same seed and actions must lead to the same place."""
    same_frames = attribute(env, "same_frames") is not False
    courses = []
    for _ in range(2):
        rng = np.random.default_rng(0)
        observation, info = env.reset(seed=7)
        course: list[tuple[str, Any, Any]] = [("reset(seed=7)", observation, None)]
        for _ in range(REPEATED):
            action = _action(name, info, rng)
            observation, reward, done, info = _check_step(name, env, action)
            if "fault" in info:  # a worker's: nothing can be said
                return
            course.append((f"step({action!r})", observation, (reward, done)))
            if done:
                break
        courses.append(course)
    for (call, first, paid), (_, again, paid_again) in zip(*courses, strict=False):
        same = first["prompt"] == again["prompt"] and paid == paid_again
        if not same or (same_frames and not np.array_equal(first["image"], again["image"])):
            raise ContractError(
                f"{name}: {call} gave something else in an episode that was played again from the same seed. Most "
                "likely reset does not call super().reset(seed=seed), or something draws from another generator "
                "than self.np_random."
            )


def check_env(env: Env | str, *, episodes: int = 3, max_turns: int = 200) -> None:
    """Play an environment and verify the contract of this module.

    Args:
        env: an environment or its name.
        episodes: episodes to play, with legal actions where they are listed.
        max_turns: an episode longer than this breaks the contract (it needs a step limit).

    Raises:
        ContractError: says which rule is broken and the likely cause.
    """
    if isinstance(env, str):
        env = make_env(env)
    name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    fields = attribute(env, "fields")
    if not isinstance(fields, tuple) or not fields or fields[-1] != "action":
        raise ContractError(
            f"{name}: class attribute `fields` must be a tuple of JSON keys with 'action' last, got {fields!r}. "
            "To use a Gymnasium environment with discrete actions, see `wrap_discrete` (docs/environments.md)"
        )
    _check_for_corrector(name, env, fields)
    first, info = env.reset(seed=7)
    check_observation(name, first)
    kept = first["image"].copy()
    _check_info(name, info)
    _check_expert(name, env, fields)
    _check_repeats(name, env)
    rng = np.random.default_rng(0)
    for episode in range(episodes):
        _, info = env.reset(seed=episode)
        for _ in range(max_turns):
            _, _, done, info = _check_step(name, env, _action(name, info, rng))
            if done:
                break
        else:
            raise ContractError(
                f"{name}: an episode did not end in {max_turns} turns; give it a step limit "
                "(truncate in step; or register(..., max_episode_steps=N) and give info['success'] "
                "every turn)"
            )
    for ugly in ("", "no such action", "\x00\ud83c", "9" * 5000):
        env.reset(seed=0)
        _check_step(name, env, ugly)
    if not np.array_equal(kept, first["image"]):
        raise ContractError(
            f"{name}: the image of its first observation changed when it went on. The trainer keeps images, so "
            "each must be an array of its own; return a copy (image.copy())"
        )
