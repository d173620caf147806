"""Drawing what the agent sees: a symbolic rendering of the state, not frames of AI2-THOR.

In the middle of the room: the plan, all furniture with its names. At a receptacle: that one with what is in or
on it, the hand, and a small plan. Nothing is drawn but what `visible` returns, the furniture and the pose. Lengths
are in units of 1/300 of the frame; no text is smaller than 10. No file, font or network is needed but the atlas.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from gtr_turbo.envs.household.sprites import (
    BADGES,
    BAR,
    FLOOR,
    GREY,
    PAPER,
    Box,
    Colour,
    Label,
    caption,
    cells,
    sprite,
    tile,
    tint,
    write,
)
from gtr_turbo.envs.household.world import Game, Pose, Receptacle, Seen, State, visible

SIZE = 300
Slot = tuple[int, int]
"""Column and row of a cell of the plan."""

HERE, BESIDE, AGENT = (255, 214, 64), (255, 240, 178), (214, 30, 60)
SCENE, HAND, HEAD = 190, 80, 36
"""Heights of the part that shows receptacles and of the head of the plan; width of the hand."""
BELOW = 3
"""Receptacles drawn one below the other, at most."""
SPACE = 1.1
"""Slots of a plan for each thing in it, at least."""
AHEAD = {0: (0, 2), 90: (2, 0), 180: (0, -2), 270: (-2, 0)}
"""Rotation -> steps from where the agent stands to the middle of the furniture it faces."""


MOST_BESIDE, MOST_THINGS = 12, 100
"""Receptacles used from one place, and receptacles or objects of a game, that there is room for; ALFRED's have at
most 4, 55 and 65."""


def undrawable(game: Game) -> str:
    """Why frames of a game cannot be drawn; empty if they can."""
    kinds = {home.kind for home in game.receptacles} | {item.kind for item in game.objects}
    if strange := sorted(kinds - set(cells())):
        return f"there is no picture of its {strange[:5]}"
    counts = {
        "receptacles": (len(game.receptacles), MOST_THINGS),
        "objects": (len(game.objects), MOST_THINGS),
        "receptacles used from one place": (
            max(Counter(r.pose for r in game.receptacles).values(), default=0),
            MOST_BESIDE,
        ),
    }
    for what, (count, most) in counts.items():
        if count > most:
            return f"it has {count} {what}, and a frame has room for {most}"
    return ""


class Plan(NamedTuple):
    """A drawn plan of a room."""

    image: Image.Image
    slots: tuple[Slot, ...]
    """Of each receptacle, and of the start."""
    cell: tuple[float, float]
    """Width and height of a slot in pixels."""
    labels: tuple[Label, ...]


def arrange(points: Sequence[tuple[float, float]], columns: int, rows: int) -> tuple[Slot, ...]:
    """Give each point of a room a slot of its own, about where it is.

    Two points change places, or one moves to a free slot, as long as that lowers the sum of the squared ways, in
    shares of the room.

    Args:
        points: (x, z), z to the north; at most as many as there are slots.
        columns: at least 2, the first in the west.
        rows: at least 2, the first in the north.
    """
    given, count = np.asarray(points, dtype=float), columns * rows
    low, high = given.min(axis=0), given.max(axis=0)
    share = (given - low) / np.maximum(high - low, 1)
    row, column = np.divmod(np.arange(count), columns)
    grid = np.stack([column / (columns - 1), 1 - row / (rows - 1)], axis=1)
    cost = np.zeros((count, count))  # of a point in a slot; that of no point is 0
    cost[: len(given)] = ((share[:, None] - grid) ** 2).sum(axis=2)
    slots = np.arange(count)
    while True:
        now, other = cost[np.arange(count), slots], cost[:, slots]
        gain = now[:, None] + now - other - other.T
        i, j = divmod(int(gain.argmax()), count)
        if gain[i, j] < 1e-9:
            return tuple((int(column[s]), int(row[s])) for s in slots[: len(given)])
        slots[[i, j]] = slots[[j, i]]


def _place(pose: Pose) -> tuple[float, float]:
    """Where the furniture is that is used from `pose`."""
    ahead = AHEAD[pose.rotation % 360]
    return pose.x + ahead[0], pose.z + ahead[1]


def _inside(slot: Slot, cell: tuple[float, float]) -> Box:
    """The pixels of a slot, without the gap to the next."""
    (column, row), (width, height) = slot, cell
    return (
        round(column * width) + 1,
        round(row * height) + 1,
        round((column + 1) * width) - 2,
        round((row + 1) * height) - 2,
    )


def _furniture(
    image: Image.Image, receptacle: Receptacle, box: Box, text: int, names: bool
) -> Label:
    """A receptacle in the large plan: its sprite, and its name below."""
    left, top, right, bottom = box
    ImageDraw.Draw(image).rounded_rectangle(box, 2, PAPER)
    across = min(right - left, bottom - top - text - 2)
    drawn, middle = sprite(receptacle.kind, across), (left + right) / 2
    image.paste(drawn, (round(middle - across / 2), top), drawn)
    name = caption(receptacle.kind, receptacle.name, right - left, text, names)
    return write(image, (middle, (top + bottom + across) / 2), name, text)


def _line(
    image: Image.Image,
    receptacle: Receptacle,
    box: Box,
    text: int,
    names: bool,
    paper: Colour = PAPER,
    indent: int = 0,
) -> Label:
    """A receptacle in the small plan: its name, or its sprite and its number, right of `indent`."""
    left, top, right, bottom = box
    ImageDraw.Draw(image).rounded_rectangle(box, 2, paper)
    left += indent
    name = caption(receptacle.kind, receptacle.name, right - left, text, names)
    if names:
        return write(image, ((left + right) / 2, (top + bottom) / 2), name, text)
    drawn = sprite(receptacle.kind, bottom - top)
    image.paste(drawn, (left, top), drawn)
    return write(image, (left + bottom - top + 2, (top + bottom) / 2), name, text, share=0)


@lru_cache(maxsize=256)  # of 100 episodes side by side, two each; a small one takes 100 kB
def plan(
    receptacles: tuple[Receptacle, ...], start: Pose, size: int, names: bool, whole: bool
) -> Plan:
    """A plan of a room, about to scale: each receptacle in a slot of a grid, near where it is.

    Args:
        receptacles: those of a game.
        start: where the agent stands before it goes anywhere.
        size: of the frame it is for.
        names: write classes; else numbers beside sprites.
        whole: a large one for the middle of the room; else a small one.
    """
    unit = size / SIZE
    width, height = (SIZE, SIZE - HEAD) if whole else (SIZE - HAND, SIZE - SCENE)
    columns, rows = 2, 0
    while columns * rows < SPACE * (len(receptacles) + 1):
        columns += 1
        roomy = columns < (6 if whole else 5)
        rows = int(height / (0.66 * width / columns if whole else 15 if roomy else 12))
    cell = (width * unit / columns, height * unit / rows)
    text = round((11 if roomy else 10) * unit)
    image = Image.new("RGB", (round(width * unit), round(height * unit)), FLOOR)
    slots = arrange([*(_place(r.pose) for r in receptacles), (start.x, start.z)], columns, rows)
    labels = []
    for receptacle, slot in zip(receptacles, slots, strict=False):
        box = _inside(slot, cell)
        labels.append((_furniture if whole else _line)(image, receptacle, box, text, names))
    return Plan(image, slots, cell, tuple(labels))


class Frame(NamedTuple):
    """A frame that is being drawn, and what of."""

    image: Image.Image
    game: Game
    state: State
    names: bool
    unit: float
    """Pixels of a length of 1."""


def _arrow(image: Image.Image, box: Box, rotation: int, most: float) -> None:
    """The agent: an arrow in the direction it looks, north up, at most `most` pixels long each way."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    r = min((box[2] - box[0]) / 2, (box[3] - box[1]) / 2, most)
    shape = [(0, -1), (0.8, 0.9), (0, 0.5), (-0.8, 0.9)]
    for _ in range(rotation % 360 // 90):
        shape = [(-b, a) for a, b in shape]
    ImageDraw.Draw(image).polygon([(x + a * r, y + b * r) for a, b in shape], AGENT)


def _small_plan(frame: Frame, here: Sequence[Seen]) -> Image.Image:
    """The plan with the receptacles here marked, and the agent at the one it went to."""
    game, indent = frame.game, round(9 * frame.unit)
    of = plan(game.receptacles, game.start, frame.image.width, frame.names, False)
    image, text = of.image.copy(), of.labels[0].size
    for seen in here[1:]:
        box = _inside(of.slots[seen.receptacle], of.cell)
        _line(image, game.receptacles[seen.receptacle], box, text, frame.names, BESIDE)
    faced = game.receptacles[here[0].receptacle]
    box = left, top, _, bottom = _inside(of.slots[here[0].receptacle], of.cell)
    _line(image, faced, box, text, frame.names, HERE, indent)
    _arrow(image, (left, top, left + indent, bottom), faced.pose.rotation, indent)
    return image


def _object(frame: Frame, number: int, box: Box) -> None:
    """Draw an object into `box`."""
    item, (left, top, right, bottom) = frame.game.objects[number], box
    state, text = frame.state, round(10 * frame.unit)
    sets = (state.hot, state.cool, state.clean, state.sliced, state.on)
    badges = tuple(word for word, members in zip(BADGES, sets, strict=True) if number in members)
    drawn = tile(item.kind, item.name, badges, right - left, bottom - top, text, frame.names)
    frame.image.paste(drawn, (left, top), drawn)


@lru_cache(maxsize=64)
def _body(
    kind: str, closed: bool, openable: bool, width: int, height: int, edge: int
) -> Image.Image:
    """A receptacle without its contents: shut, open with walls around, or a surface with an edge."""
    image = Image.new("RGB", (width, height), tint(kind, 0.5 if closed else 0.8))
    draw, dark = ImageDraw.Draw(image), tint(kind, -0.5)
    if openable:
        draw.rectangle((0, 0, width - 1, height - 1), None, dark, edge)
    else:
        draw.rectangle((0, height - edge, width, height), dark)
    if closed:
        across = max(1, round(0.8 * height))
        image.paste(shut := sprite(kind, across), ((width - across) // 2, height // 10), shut)
    return image


def _head(frame: Frame, seen: Seen, box: Box) -> None:
    """A line above a receptacle: its sprite, its name, and whether it is open, closed or empty."""
    left, top, right, bottom = box
    image, receptacle = frame.image, frame.game.receptacles[seen.receptacle]
    across, middle, gap = bottom - top, (top + bottom) / 2, 4 * frame.unit
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right - 1, bottom - 1), BAR)
    draw.rectangle((left, top, left + across - 1, bottom - 1), PAPER)
    image.paste(drawn := sprite(receptacle.kind, across - 2), (left + 1, top + 1), drawn)
    text = round(min(14 * frame.unit, across * 0.6))
    words = ["closed" if seen.closed else "open"] if receptacle.openable else []
    if not seen.contents and not seen.closed:
        words.append("empty")
    state = write(image, (right - gap, middle), ", ".join(words), text, HERE, 1)
    width = state.box[0] - left - across - 2 * gap
    name = caption(receptacle.kind, receptacle.name, width, text, frame.names)
    write(image, (left + across + gap, middle), name, text, PAPER, 0)


def _stack(frame: Frame, seen: Sequence[Seen], left: int, right: int, head: int) -> None:
    """Draw receptacles one below the other, their contents in as few columns as there is room for."""
    unit, width = frame.unit, right - left
    edge, height = round(3 * unit), round(SCENE * unit)
    room = height - len(seen) * (head + 2 * edge)
    columns, pitch, rows = round(3 * width / frame.image.width) - 1, height, [1]
    while sum(rows) * pitch > room:
        columns += 1
        across = min(width / columns, 100 * unit)
        pitch = round(across / 2 + 14 * unit if across > 29 * unit else across)
        rows = [-(-len(one.contents) // columns) for one in seen]
    spare, top = (room - sum(rows) * pitch) // len(seen), 0
    for one, lines in zip(seen, rows, strict=True):
        _head(frame, one, (left, top, right, top + head))
        top += head
        receptacle, below = frame.game.receptacles[one.receptacle], lines * pitch + spare + 2 * edge
        body = _body(receptacle.kind, one.closed, receptacle.openable, width, below, edge)
        frame.image.paste(body, (left, top))
        for i, number in enumerate(one.contents):
            row, column = divmod(i, columns)
            y = top + edge + row * pitch + round(spare * (row + 1) / (lines + 1))
            start, end = (left + round(c * width / columns) for c in (column, column + 1))
            _object(frame, number, (start + edge, y, end - edge, y + pitch - 2))
        top += below


def _hand(frame: Frame, box: Box) -> None:
    """What is in the hand."""
    image, text = frame.image, round(10 * frame.unit)
    left, top, right, bottom = box
    draw, middle = ImageDraw.Draw(image), (left + right) / 2
    draw.rectangle(box, PAPER)
    if bottom - top > HEAD * frame.unit:
        draw.rectangle((left, top, right, top + text + 4), BAR)
        write(image, (middle, top + 2 + text / 2), "in hand", text, PAPER)
        top += text + 6
    if frame.state.held is None:
        write(image, (middle, (top + bottom) / 2), "hand empty", text, GREY)
    else:
        _object(frame, frame.state.held, (left + 2, top, right - 2, bottom - 1))


def draw(game: Game, state: State, size: int = SIZE, names: bool = True) -> np.ndarray:
    """A frame of what the agent sees.

    Args:
        game: what does not change.
        state: what does.
        size: side of the frame in pixels, at least 300.
        names: write the names of receptacles and objects; else their numbers only.

    Returns:
        uint8 (size, size, 3), RGB; the same bytes for the same view.

    Raises:
        ValueError: `size` is below 300, or there is no sprite for a class.
    """
    if size < SIZE:
        raise ValueError(f"a household frame of {size} pixels is not legible; the least is {SIZE}")
    here, unit = visible(game, state).here, size / SIZE
    image = Image.new("RGB", (size, size), FLOOR)
    frame, hand = Frame(image, game, state, names, unit), round(HAND * unit)
    if here:
        stacks, head = -(-len(here) // BELOW), round((26 if len(here) == 1 else 18) * unit)
        edges = [round(i * size / stacks) for i in range(stacks + 1)]
        for i in range(stacks):
            _stack(frame, here[i::stacks], edges[i], edges[i + 1], head)
        top = round(SCENE * unit)
        _hand(frame, (0, top, hand, size))
        image.paste(_small_plan(frame, here), (hand, top))
        return np.asarray(image)
    top = round(HEAD * unit)
    ImageDraw.Draw(image).rectangle((0, 0, size, top - 1), BAR)
    write(image, (8 * unit, top / 2), game.room, round(16 * unit), PAPER, 0)
    _hand(frame, (size - hand, 2, size, top - 3))
    of = plan(game.receptacles, game.start, size, names, True)
    image.paste(of.image, (0, top))
    left, above, right, below = _inside(of.slots[-1], of.cell)
    _arrow(image, (left, top + above, right, top + below), game.start.rotation, 16 * unit)
    return np.asarray(image)
