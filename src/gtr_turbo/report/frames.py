"""Frames as data URIs: each picture once, without loss, in the smaller of WebP and the PNG itself."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


ELEMENT = 60
"""Characters of the element around a frame."""


class Frames:
    """Reads frames, in threads, and keeps one copy of each content."""

    def __init__(self) -> None:
        self._hashes: dict[Path, str] = {}
        self._uris: dict[str, str] = {}
        self._reasons: dict[Path, str] = {}
        self._ids: dict[str, int] = {}
        self.embedded: list[str] = []
        """Data URIs in the order of their numbers."""
        self.unreadable: set[Path] = set()
        """Frames that were to be embedded and cannot be shown."""

    def load(self, paths: Iterable[Path]) -> None:
        """Read and encode those not read yet."""
        new = [p for p in dict.fromkeys(paths) if p not in self._hashes and p not in self._reasons]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, (key, uri) in zip(new, pool.map(_encode, new), strict=True):
                if key:
                    self._hashes[path] = key
                    self._uris[key] = uri
                else:
                    self._reasons[path] = uri

    def cost(self, paths: Iterable[Path]) -> int:
        """Characters that the loaded frames at `paths` would add to the page."""
        keys = {self._hashes[path] for path in paths if path in self._hashes}
        return sum(len(self._uris[key]) + ELEMENT for key in keys if key not in self._ids)

    def embed(self, path: Path) -> int | str:
        """Number of a loaded frame on the page, or why it cannot be shown."""
        if path in self._reasons:
            self.unreadable.add(path)
            return self._reasons[path]
        key = self._hashes[path]
        if key not in self._ids:
            self._ids[key] = len(self.embedded)
            self.embedded.append(self._uris[key])
        return self._ids[key]


def _encode(path: Path) -> tuple[str, str]:
    """(hash of the content, data URI) of a PNG, or ("", the reason why it cannot be read)."""
    from PIL import Image

    try:
        content = path.read_bytes()
    except OSError:
        return "", f"{path.name} is missing"
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            image.load()
            smaller = _webp(image)
    except Exception:  # Pillow raises anything on a damaged file: IndexError, AssertionError, ...
        return "", f"{path.name} is not a readable PNG"
    kind, best = ("webp", smaller) if smaller and len(smaller) < len(content) else ("png", content)
    text = base64.b64encode(best).decode("ascii")
    return hashlib.sha256(content).hexdigest(), f"data:image/{kind};base64,{text}"


def _webp(image: Image.Image) -> bytes | None:
    """The picture as lossless WebP; None if WebP cannot hold it."""
    if image.mode not in ("1", "L", "P", "RGB", "RGBA") or max(image.size) > 16383:
        return None
    plain = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    plain.save(file, "webp", lossless=True, method=1, quality=30, exact=True)
    return file.getvalue()
