"""From a reply's text to its fields, and to the token where the action begins.

What a model writes is data: nothing here raises on any text, and nothing evaluates it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_REPAIR = 20_000  # characters; a longer reply that is no JSON is not worth repairing


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A parsed reply."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    """The JSON object; empty if invalid."""
    action: str = ""
    """The action string, outer blanks removed; empty if invalid."""
    action_start: int = 0
    """Character where the `"action"` member begins; 0 if invalid."""
    valid: bool = False
    """True if the reply is a closed JSON object with every required key, `"action"` after all others."""


def _members(text: str, start: int) -> dict[str, int]:
    """Where the members of the object at `start` begin: key -> offset of its quote (the last wins)."""
    found: dict[str, int] = {}
    depth, i, opened = 0, start, -1
    while i < len(text):
        char = text[i]
        if char == '"':
            opened, i = i, i + 1
            while i < len(text) and text[i] != '"':
                i += 2 if text[i] == "\\" else 1
            rest = text[i + 1 : i + 50].lstrip()
            if depth == 1 and rest.startswith(":"):
                found[text[opened + 1 : i]] = opened
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            if depth == 0:
                break
        i += 1
    return found


def _load(text: str) -> Any:
    """The first JSON object in `text`, small faults repaired; None if there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        pass  # not strict JSON: repaired below, or None
    if len(text) > MAX_REPAIR or not text.rstrip("` \n\t").endswith("}"):
        return None
    import json_repair

    try:
        return json_repair.loads(text)
    except (ValueError, RecursionError, IndexError, TypeError, KeyError, AttributeError):
        return None


def parse(text: str, required: Sequence[str]) -> Parsed:
    """Read a reply.

    Text before the first `{` and a code fence around the object are allowed; single quotes, a missing
    comma and the like are repaired if the object is closed.

    Args:
        text: the reply without its end token.
        required: keys the reply must have, `"action"` among them.
    """
    start = text.find("{")
    value = _load(text[start:]) if start >= 0 else None
    if not isinstance(value, dict) or any(key not in value for key in required):
        return Parsed()
    action = value["action"]
    if isinstance(action, bool) or not isinstance(action, (str, int)):
        return Parsed()
    begins = _members(text, start)
    at = begins.get("action", text.rfind("'action'"))
    if at < 0 or any(begins.get(key, -1) > at for key in required):
        return Parsed()
    return Parsed(fields=value, action=str(action).strip(), action_start=at, valid=True)


def thought_tokens(
    ids: Sequence[int], action_start: int, decode: Callable[[Sequence[int]], str]
) -> int:
    """How many of the first tokens lie wholly before character `action_start` of the decoded reply.

    A token that holds the last character of the thought and the first of the action counts to the action,
    so that the action is never guided.

    Args:
        ids: the sampled ids; their decoded prefixes are compared, nothing is encoded again.
        action_start: from `Parsed`.
        decode: ids -> text.
    """
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(decode(ids[:middle])) <= action_start:
            low = middle
        else:
            high = middle - 1
    return low
