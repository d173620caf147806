"""Drawing cards and number lines with Pillow. 300x300 frames; no file, font or network is needed.

Cards sit in columns of 75 pixels, a quarter of the frame, so that a vision tower with patches of
28 pixels at 112x112 sees each card whole.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

SIZE = 300
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spades", "hearts", "diamonds", "clubs")
CARD_WIDTH, CARD_HEIGHT, COLUMN = 69, 104, 75

TABLE, PAPER, INK, RED = (30, 105, 62), (255, 255, 252), (20, 20, 24), (200, 24, 36)
LINE, CREAM = (120, 130, 120), (246, 240, 210)


class Card(NamedTuple):
    """A playing card: `rank` 0..12 is A, 2..10, J, Q, K; `suit` indexes `SUITS`."""

    rank: int
    suit: int

    @property
    def value(self) -> int:
        """What the card counts: A = 1, faces = 10."""
        return min(self.rank + 1, 10)

    def __str__(self) -> str:
        return f"{RANKS[self.rank]} of {SUITS[self.suit]}"


@lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's embedded TrueType font at `size` pixels."""
    return ImageFont.load_default(size)


def fitting_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font up to `size` (at least 10) in which `text` is at most `width` pixels wide."""
    while size > 10 and font(size).getlength(text) > width:
        size -= 2
    return font(size)


def _pip(draw: ImageDraw.ImageDraw, suit: int, x: float, y: float, size: float) -> None:
    """Draw a suit symbol centred at (x, y)."""
    r, colour = size / 2, RED if suit in (1, 2) else INK
    if suit == 2:
        draw.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], fill=colour)
        return
    stem = [(x, y), (x + 0.35 * r, y + r), (x - 0.35 * r, y + r)]
    lobe = 0.52 * r
    if suit == 3:
        for cx, cy in ((x, y - 0.5 * r), (x - 0.5 * r, y + 0.2 * r), (x + 0.5 * r, y + 0.2 * r)):
            draw.ellipse((cx - lobe, cy - lobe, cx + lobe, cy + lobe), fill=colour)
        draw.polygon(stem, fill=colour)
        return
    up = -1 if suit == 0 else 1
    for side in (-1, 1):
        cx, cy = x + side * 0.46 * r, y - up * 0.3 * r
        draw.ellipse((cx - lobe, cy - lobe, cx + lobe, cy + lobe), fill=colour)
    tip = y + up * r
    draw.polygon(
        [(x - 0.95 * r, y - up * 0.12 * r), (x + 0.95 * r, y - up * 0.12 * r), (x, tip)],
        fill=colour,
    )
    if suit == 0:
        draw.polygon(stem, fill=colour)


@lru_cache(maxsize=53)
def card_face(card: Card | None) -> Image.Image:
    """A card's picture with a jumbo corner index and its suit; None is the back of a card."""
    scale = 3
    image = Image.new("RGB", (CARD_WIDTH * scale, CARD_HEIGHT * scale), TABLE)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(
        (0, 0, CARD_WIDTH * scale - 1, CARD_HEIGHT * scale - 1), 8 * scale, PAPER, LINE, scale
    )
    if card is None:
        inner = (7 * scale, 7 * scale, (CARD_WIDTH - 7) * scale, (CARD_HEIGHT - 7) * scale)
        draw.rounded_rectangle(inner, 5 * scale, (46, 74, 140))
        for i in range(10, CARD_WIDTH - 8, 8):
            draw.line(
                (i * scale, 8 * scale, i * scale, (CARD_HEIGHT - 8) * scale), (90, 120, 190), scale
            )
    else:
        colour, label = (RED if card.suit in (1, 2) else INK), RANKS[card.rank]
        draw.text(
            (5 * scale, 1 * scale),
            label,
            colour,
            font(46 * scale),
            stroke_width=scale,
            stroke_fill=colour,
        )
        _pip(draw, card.suit, 17 * scale, 78 * scale, 26 * scale)
        _pip(draw, card.suit, 48 * scale, 76 * scale, 36 * scale)
    return image.resize((CARD_WIDTH, CARD_HEIGHT), Image.Resampling.LANCZOS)


def table(
    rows: list[tuple[int, list[Card | None]]], lines: list[tuple[int, str, int]]
) -> np.ndarray:
    """A green table with cards and text.

    Args:
        rows: (top, cards): cards side by side; more than four in a row overlap like a fanned hand.
        lines: (top, text, font size): text, centred, shrunk to fit.

    Returns:
        uint8 (300, 300, 3).
    """
    frame = _bare().copy()
    for top, cards in rows:
        step = COLUMN if len(cards) <= 4 else (SIZE - COLUMN) / (len(cards) - 1)
        left = COLUMN * ((4 - len(cards)) // 2) if len(cards) <= 4 else 0
        for i, card in enumerate(cards):
            at = round(left + i * step) + 3
            frame[top : top + CARD_HEIGHT, at : at + CARD_WIDTH] = _face_pixels(card)
    for top, text, size in lines:
        label = _label(text, size)
        frame[top : top + len(label)] = label
    frame.flags.writeable = False
    return frame


@cache
def _bare() -> np.ndarray:
    return np.full((SIZE, SIZE, 3), TABLE, np.uint8)


@lru_cache(maxsize=53)
def _face_pixels(card: Card | None) -> np.ndarray:
    return np.asarray(card_face(card))


@lru_cache(maxsize=1024)  # 30 kB each: most steps of most games
def _label(text: str, size: int) -> np.ndarray:
    """A line of text across the table, as high as its letters; uint8 (height, 300, 3)."""
    image = Image.new("RGB", (SIZE, 2 * size), TABLE)
    fitted = fitting_font(text, size, SIZE - 16)
    ImageDraw.Draw(image).text((SIZE / 2, 0), text, CREAM, fitted, anchor="mt")
    box = ImageChops.difference(image, Image.new("RGB", image.size, TABLE)).getbbox()
    return np.asarray(image)[: box[3] if box else 0]


@lru_cache(maxsize=64)
def number_line(target: int, current: int) -> np.ndarray:
    """White image with "Target: g" and "Current: p"; uint8 (300, 300, 3), read-only."""
    image = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for top, label, number in ((20, "Target:", target), (170, "Current:", current)):
        draw.text((16, top + 30), label, INK, font(36))
        draw.text((225, top), str(number), INK, font(90), stroke_width=2, stroke_fill=INK)
    return np.asarray(image)
