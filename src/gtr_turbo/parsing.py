"""From a reply's text to its fields, and to the token where the action begins.

What a model writes is data: nothing here raises on any text, and nothing evaluates it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MAX_REPAIR = 20_000  # characters; a longer reply that is no JSON is not worth repairing
MAX_OPEN = 200  # braces and brackets; a reply with more is refused, so that nothing nests deeply
MAX_TRIED = 3  # places where a first object may end and another begin
MAX_STANDS = 1_000  # characters of an action that had to be repaired; a longer one is refused
MAX_PARTS = 4  # tokens of a character: its bytes in UTF-8
_NEXT = re.compile(r"\}\s*\{")
_COLON = re.compile(r"\s*:")
_ACTION = re.compile(r"""["']?\baction["']?\s*:""")  # of replies that are not strict JSON
_WORD = re.compile(r"""["']?\baction\b""")


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
    strict: bool = False
    """True if it is valid and nothing had to be repaired."""


def _members(text: str) -> list[tuple[str, int]]:
    """Members of the JSON object that `text` begins with: (key, offset of its quote), in order."""
    found: list[tuple[str, int]] = []
    depth, i = 0, 0
    while i < len(text):
        char = text[i]
        if char == '"':
            opened, i = i, i + 1
            while i < len(text) and text[i] != '"':
                i += 2 if text[i] == "\\" else 1
            if depth == 1 and _COLON.match(text, i + 1):
                found.append((json.loads(text[opened : i + 1]), opened))
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
            if depth == 0:
                break
        i += 1
    return found


def _action_begins(text: str, required: Sequence[str]) -> int:
    """Offset of the first `"action"` member of a JSON object; -1 unless the required keys precede it."""
    members, others = _members(text), set(required) - {"action"}
    at = min(offset for key, offset in members if key == "action")
    return -1 if any(offset > at for key, offset in members if key in others) else at


def _load(text: str) -> tuple[Any, bool]:
    """The JSON value that `text` begins with, and whether it was JSON before small faults were repaired."""
    if text.count("{") + text.count("[") > MAX_OPEN:
        return None, False
    if (value := _strict(text)) is not None:
        return value, True
    if len(text) > MAX_REPAIR or not text.rstrip("` \r\n\t").endswith("}"):
        return None, False
    for behind in itertools.islice(_NEXT.finditer(text), MAX_TRIED):
        first = _repaired(text[: behind.start() + 1])  # of several objects, the last would win
        if isinstance(first, dict) and "action" in first:
            return first, False
    return _repaired(text), False


def _strict(text: str) -> Any:
    """The JSON value that `text` begins with; None if that is no JSON."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def _repaired(text: str) -> Any:
    """What `text` is as JSON once its faults are mended; None if they cannot be."""
    import json_repair

    try:
        return json_repair.loads(text)
    except Exception:  # also its assertions: it fails on some texts in ways that it does not name
        return None


def _action_found(text: str) -> int:
    """`_action_begins` of an object that had to be repaired: the first that looks like the member's key.

    If the repair reads a key before it, as in `{“action”: "5", "why": "my action: 7"}`, the first such word.
    """
    for pattern in (_ACTION, _WORD):
        match = pattern.search(text)
        if match is None:
            break
        before = _repaired(text[: match.start()])
        if not (isinstance(before, dict) and "action" in before):
            return match.start()
    return -1


def _stands(action: str, text: str, start: int) -> bool:
    """Whether a member `"action"` from `start` on has this value, whole: a repair may give half of `(8-4)*6`.

    Every part of the pattern fits a place of the text in one way; else one that nearly fits takes years.
    """
    if len(action) > MAX_STANDS:
        return False
    blanks = r"(?:\s|\\[nrt])*+"
    single, double = ("".join(_written(c, slash) for c in action) for slash in (r"\\", r"\\\\"))
    value = f"(?:{single}|{double})"
    key = r"""["'“]?\w++["'”]?\s*+:"""
    quoted = rf"""["'“]{blanks}{value}{blanks}["'”]\s*+(?:$|[,;}}\].)]|//|/\*|{key})"""
    bare = rf"""["'“]?\s*+{value}\s*+(?:$|[,;}}\]]|{key})"""
    member = re.compile(rf"""\baction["'”]?\s*+:?\s*+(?:{quoted}|{bare})""")
    return member.search(text, start) is not None


def _written(char: str, slash: str) -> str:
    """How a character may stand in a reply: as it is, or as JSON escapes it; a backslash as `slash`."""
    if char == "\\":
        return slash
    if char in "\"'":
        return rf"\\?{char}"
    own, escaped = re.escape(char), json.dumps(char)[1:-1]
    return own if escaped == char else rf"(?:{own}|(?i:{re.escape(escaped)}))"


def _behind(text: str, start: int) -> tuple[int, Any, bool] | None:
    """Behind what the brace at `start` opens, the first object with an action, as in `{7, 5}. {"action": "5"}`.

    Returns:
        Where it begins, the object, and True for strict JSON, which alone counts here; None if there is none.
    """
    depth, tried = 0, 0
    if text.count("{", start) + text.count("[", start) > MAX_OPEN:
        return None
    for at in range(start, min(len(text), MAX_REPAIR)):
        if text[at] == "{":
            if depth == 0 and at > start:
                value = _strict(text[at:])
                if isinstance(value, dict) and "action" in value:
                    return at, value, True
                tried += 1
            depth += 1
        elif text[at] == "}":
            depth -= 1
        if depth < 0 or tried == MAX_TRIED:
            break
    return None


def parse(text: str, required: Sequence[str]) -> Parsed:
    """Read a reply.

    Text before the first `{` and a code fence around the object are allowed; single quotes, a missing
    comma and the like are repaired if the object is closed. A key given twice has its last value; the
    action then begins where the key first stands, so that no part of any action counts as thought. A repaired
    reply in which the action is not all that stands behind such a key is not valid: a repair may cut it. Of
    several objects the first with an action counts.

    Args:
        text: the reply without its end token.
        required: keys the reply must have, `"action"` among them.
    """
    start = text.find("{")
    if start < 0:
        return Parsed()
    value, strict = _load(text[start:])
    found = _read(text, start, value, strict, required)
    if found.valid or (strict and isinstance(value, dict) and "action" in value):
        return found
    behind = _behind(text, start)
    return _read(text, *behind, required) if behind else found


def _read(text: str, start: int, value: Any, strict: bool, required: Sequence[str]) -> Parsed:
    """The reply whose object begins at `start` and was loaded as `value`."""
    if not isinstance(value, dict) or any(key not in value for key in required):
        return Parsed()
    action, order = value["action"], list(value)
    if isinstance(action, bool) or not isinstance(action, (str, int)):
        return Parsed()
    if any(order.index(key) > order.index("action") for key in required):
        return Parsed()
    at = _action_begins(text[start:], required) if strict else _action_found(text[start:])
    action = str(action).strip()
    if at < 0 or not (strict or _stands(action, text, start + at)):
        return Parsed()
    return Parsed(
        fields=value,
        action=action,
        action_start=start + at,
        valid=True,
        strict=strict,
    )


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token; a character that several tokens make is that of the last of them, the others have "".

    Args:
        ids: the sampled ids.
        decode: ids -> text, with U+FFFD for a part of a character.
    """
    texts: list[str] = []
    parts: list[int] = []
    for token in ids:
        parts.append(token)
        text = decode(parts)
        whole = not text.endswith("\ufffd") or len(parts) == MAX_PARTS
        texts.append(text if whole else "")
        parts = [] if whole else parts
    return [*texts[:-1], decode(parts)] if parts else texts


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
