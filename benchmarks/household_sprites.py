"""Draw the sprite atlas of the household frames: `src/gtr_turbo/envs/household/sprites.png`.

    python benchmarks/household_sprites.py NotoColorEmoji.ttf

The font is in Debian's `fonts-noto-color-emoji` 2.042. It is needed here only; frames need the atlas.
`sprites.txt` says what each cell shows. The atlas is a PNG of 256 colours with transparency.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gtr_turbo.envs.household.sprites import ATLAS, CELL, COLUMNS, SPRITES

GRID = 48
"""The shapes of sprites.txt are drawn on a grid of this size."""
FINE = 8
"""Pixels of a grid step, before the sprite is made smaller."""
STRIKE = 109
"""The one size in which Noto Color Emoji has its pictures."""


def emoji(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The font's picture of a character, in the middle of a cell, RGBA."""
    drawn = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE))
    ImageDraw.Draw(drawn).text((0, 0), character, font=font, embedded_color=True)
    box = drawn.getbbox()
    if box is None:
        raise SystemExit(f"the font has no picture of U+{ord(character):X}")
    picture = drawn.crop(box)
    picture.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(picture, ((CELL - picture.width) // 2, (CELL - picture.height) // 2))
    return cell


def shapes(recipe: str) -> Image.Image:
    """A picture from the shapes of a line of sprites.txt, RGBA."""
    image = Image.new("RGBA", (GRID * FINE, GRID * FINE))
    draw = ImageDraw.Draw(image)
    for shape in recipe.split(";"):
        kind, colour, *words = shape.split()
        ink, numbers = f"#{colour}", [float(word) * FINE for word in words]
        if kind == "r":
            draw.rounded_rectangle(numbers, 1.5 * FINE, ink)
        elif kind == "e":
            draw.ellipse(numbers, ink)
        elif kind == "p":
            draw.polygon(numbers, ink)
        elif kind == "o":
            draw.ellipse(numbers[1:], None, ink, round(numbers[0]))
        elif kind == "l":
            draw.line(numbers[1:], ink, round(numbers[0]), joint="curve")
        else:
            raise SystemExit(f"unknown shape {shape!r}; known: r, e, p, o, l")
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def main() -> None:
    """Read sprites.txt and write the atlas."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("font", type=Path, help="NotoColorEmoji.ttf")
    font = ImageFont.truetype(str(parser.parse_args().font), STRIKE)
    lines = [line for line in SPRITES.read_text("utf-8").splitlines() if line[0] != "#"]
    atlas = Image.new("RGBA", (COLUMNS * CELL, -(-len(lines) // COLUMNS) * CELL))
    for i, line in enumerate(lines):
        recipe = line.split(maxsplit=1)[1]
        cell = emoji(chr(int(recipe[2:], 16)), font) if recipe[:2] == "U+" else shapes(recipe)
        atlas.paste(cell, (i % COLUMNS * CELL, i // COLUMNS * CELL))
    small = atlas.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    small.save(ATLAS, optimize=True)
    print(f"{len(lines)} sprites of {CELL} px, {ATLAS.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
