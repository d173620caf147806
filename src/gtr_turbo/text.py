"""Text of models, files and servers, made fit to be shown."""

from __future__ import annotations

PRINTABLE = {"\n": " ", "\t": " "}


def printable(text: str) -> str:
    """Text safe for a terminal: control characters are shown as escapes, never obeyed."""
    return "".join(
        PRINTABLE.get(c, c) if c.isprintable() or c in PRINTABLE else repr(c)[1:-1] for c in text
    )
