"""Sprites, text and labelled objects: what the frames of the household are put together from.

`sprites.png` holds one picture for each class of ALFRED; `sprites.txt` says which and how it was made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from gtr_turbo.envs.cards.drawing import font

SPRITES = Path(__file__).with_name("sprites.txt")
ATLAS = Path(__file__).with_name("sprites.png")
CELL, COLUMNS = 64, 12
"""Pixels of a sprite in the atlas, and sprites in a row of it."""

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]

PAPER, INK, GREY, FLOOR, BAR = (
    (250, 248, 242),
    (24, 26, 30),
    (120, 124, 130),
    (226, 228, 222),
    (52, 60, 72),
)
BADGES = {
    "HOT": (206, 38, 38),
    "COLD": (24, 104, 206),
    "CLEAN": (18, 128, 66),
    "CUT": (118, 52, 176),
    "ON": (176, 98, 0),
}
"""Word and colour of each state that an object can be in."""


class Label(NamedTuple):
    """A piece of text in a picture."""

    text: str
    box: Box
    """Left, top, right, bottom of its ink, in pixels."""
    size: int
    """Of the font, in pixels."""


@lru_cache(maxsize=1)
def cells() -> dict[str, int]:
    """Class -> number of its cell in the atlas."""
    lines = (line for line in SPRITES.read_text("utf-8").splitlines() if line[0] != "#")
    return {line.split(maxsplit=1)[0]: i for i, line in enumerate(lines)}


@lru_cache(maxsize=1)
def _atlas() -> Image.Image:
    with Image.open(ATLAS) as image:
        return image.convert("RGBA")


@lru_cache(maxsize=1024)
def sprite(kind: str, size: int, cut: bool = False) -> Image.Image:
    """The picture of a class, RGBA of `size` x `size` pixels; in two halves if it is cut.

    Raises:
        ValueError: there is no picture of this class.
    """
    if kind not in cells():
        raise ValueError(f"no sprite for the class {kind!r}; add it to {SPRITES.name}")
    row, column = divmod(cells()[kind], COLUMNS)
    left, top = column * CELL, row * CELL
    image = _atlas().crop((left, top, left + CELL, top + CELL))
    if cut:
        halves = Image.new("RGBA", (CELL, CELL))
        halves.paste(image.crop((4, 0, CELL // 2, CELL - 6)), (0, 6))
        halves.paste(image.crop((CELL // 2, 6, CELL - 4, CELL)), (CELL // 2 + 4, 0))
        image = halves
    return image.resize((size, size), Image.Resampling.LANCZOS)


@lru_cache(maxsize=256)
def _colour(kind: str) -> Colour:
    """The mean colour of a class's sprite."""
    pixels = np.asarray(sprite(kind, CELL), dtype=float).reshape(-1, 4)
    red, green, blue = np.average(pixels[:, :3], axis=0, weights=pixels[:, 3])
    return int(red), int(green), int(blue)


def tint(kind: str, white: float) -> Colour:
    """The mean colour of a class, mixed with white; with black if `white` is negative."""
    end, share = (255 if white > 0 else 0), abs(white)
    red, green, blue = (round(c + (end - c) * share) for c in _colour(kind))
    return red, green, blue


@lru_cache(maxsize=8192)
def caption(kind: str, name: str, width: float, size: int, names: bool) -> str:
    """`name` if it is at most `width` pixels wide, else its class cut short: "CounTop2" for "countertop 2".

    Each word of the class keeps as many letters as there is room for; at the end the initials and the last
    letter ("CTp2", while a coffee table is "CTe2") or the initials. Without `names`, the number alone.
    """
    number = name.rpartition(" ")[2]
    if not names:
        return number
    words = re.findall("[A-Z][a-z]+|[A-Z]+(?![a-z])", kind)
    cuts = ["".join(word[:n] for word in words) for n in range(len(kind), 0, -1)]
    forms = [name, *(cut + number for cut in (*cuts[:-1], cuts[-1] + kind[-1], cuts[-1]))]
    return next((form for form in forms if font(size).getlength(form) <= width), number)


@lru_cache(maxsize=8192)
def _ink(text: str, size: int) -> tuple[Image.Image, int, int]:
    """A text as a mask, and where its left top is from the start of its base line."""
    left, top, right, bottom = (int(edge) for edge in font(size).getbbox(text, anchor="ls"))
    mask = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, 255, font(size), anchor="ls")
    return mask, left, top


def write(
    image: Image.Image,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: Colour = INK,
    share: float = 0.5,
) -> Label:
    """Write `text` with `share` of its width to the left of `at`, and half of its height above."""
    mask, left, top = _ink(text, size)
    x = round(at[0] - share * mask.width) if share else round(at[0]) + left
    y = round(at[1] + 0.36 * size) + top
    image.paste(fill, (x, y), mask)
    return Label(text, (x, y, x + mask.width, y + mask.height), size)


def _badges(image: Image.Image, words: Sequence[str], box: Box, size: int) -> None:
    """Draw state badges from the top left of `box`: words, or two letters, or bars, whatever fits."""
    left, top, right, bottom = box
    height = size + 1
    for letters in (len("CLEAN"), 2, 0):
        forms = [word[:letters] for word in words]
        x, y, places = left, top, []
        for form in forms:
            width = round(font(size).getlength(form)) + 4
            if x > left and x + width > right:
                x, y = left, y + height + 1
            places.append((x, y, x + width, y + height))
            x += width + 1
        if places[-1][3] <= bottom and max(place[2] for place in places) <= right + 2:
            break
    for word, form, place in zip(words, forms, places, strict=True):
        ImageDraw.Draw(image).rounded_rectangle(place, 2, BADGES[word])
        middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        write(image, middle, form, size, (255, 255, 255))


@lru_cache(maxsize=1024)
def tile(
    kind: str, name: str, badges: tuple[str, ...], width: int, height: int, size: int, names: bool
) -> Image.Image:
    """An object with its badges, and its caption below; of a small one the number, on the sprite. RGBA."""
    image = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(image)
    small = height < 2.4 * size
    across = min(width, height if small else height - size - 3)
    left = (width - across) // 2
    if "ON" in badges:
        draw.ellipse((left, 0, left + across - 1, across - 1), (255, 222, 89, 255))
    image.alpha_composite(sprite(kind, across, "CUT" in badges), (left, 0))
    if badges:
        _badges(image, badges, (0, 0, width, across), size)
    text = caption(kind, name, width, size, names and not small)
    middle = height - 0.62 * size
    wide = font(size).getlength(text)
    if small:
        draw.rectangle((width - wide - 1, height - size + 1, width, height), (*PAPER, 255))
    write(image, (width - wide / 2 if small else width / 2, middle), text, size)
    return image
