"""The jobs of a merge, each of a tensor of the output or of a pair; here those of full checkpoints."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gtr_turbo.merging import arrays
from gtr_turbo.merging.arrays import Floats, Numbers
from gtr_turbo.merging.methods import Recipe, Source, Tally, find_tensor_cuts, merge_chunks
from gtr_turbo.merging.output import Writer
from gtr_turbo.merging.shards import ITEMSIZE, Checkpoint, Entry, MergeError, row_dtype
from gtr_turbo.merging.thresholds import THRESHOLDS
from gtr_turbo.merging.trim import Cut

CHUNK = 1 << 17
"""Entries a thread works on at a time."""
KEEP = 1 << 24
"""Bytes; a tensor whose rows take no more is read once and kept for all passes."""


Tensor = tuple[Checkpoint, Entry]
"""A tensor in its files."""


class Scratch(threading.local):
    """Memory that a thread uses again, chunk after chunk: fresh pages cost as much as reading."""

    def __init__(self) -> None:
        self._held: dict[str, Numbers] = {}

    def take(self, name: str, dtype: type, size: int) -> Numbers:
        """(size,) of undefined numbers; the next call of the thread with this name has the same memory."""
        wanted = size * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < wanted:
            self._held.pop(name, None)  # first, or both would be there at once
            held = self._held[name] = np.empty(wanted, np.uint8)
        return held[:wanted].view(dtype)


@dataclass
class Job:
    """Tensors of the output that are made together."""

    shapes: dict[str, tuple[int, ...]]
    """Of each tensor, by name."""
    dtype: str
    run: Callable[[Context], dict[str, Any] | None]
    """Writes them; returns the lines of the manifest that each of them has."""
    read_bytes: int
    held_bytes: int = 0
    """What it allocates beside chunks, at most."""

    @property
    def size(self) -> int:
        """Entries."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass
class Context:
    """What the jobs share."""

    writer: Writer
    kernels: ModuleType
    recipe: Recipe
    factor: np.float32
    """lambda."""
    stop: threading.Event
    thresholds: list[dict[str, Cut] | None]
    """Known ones of each checkpoint."""
    scratch: Scratch = field(default_factory=Scratch)


def full_jobs(
    checkpoints: Sequence[Checkpoint], base: Checkpoint | None, recipe: Recipe, dtype: str | None
) -> Iterator[Job]:
    """Jobs of full checkpoints.

    Raises:
        MergeError: a tensor is missing somewhere, or has another shape or type.
    """
    first = checkpoints[0]
    used = base if recipe.row.base else None
    everyone = [*checkpoints, *([base] if base is not None else [])]
    for other in everyone[1:]:
        if odd := sorted(set(first.entries) ^ set(other.entries)):
            lacks, has = (other, first) if odd[0] in first.entries else (first, other)
            raise MergeError(
                f"{lacks.path} has no tensor {odd[0]!r}, which is in {has.entries[odd[0]].file}"
                + (f" ({len(odd)} tensors differ)" if len(odd) > 1 else "")
            )
    for name, entry in first.entries.items():
        for other in everyone[1:]:
            there = other.entries[name]
            same_type = there.dtype == entry.dtype or (
                other is base and {there.dtype, entry.dtype} <= set(ITEMSIZE)
            )
            if there.shape != entry.shape or not same_type:
                raise MergeError(
                    f"tensor {name!r} is {entry.dtype} {list(entry.shape)} in {entry.file} and {there.dtype} "
                    f"{list(there.shape)} in {there.file}"
                )
        entry.check_type()
        yield Job(
            {name: entry.shape},
            dtype or entry.dtype,
            _full_run(name, [(c, c.entries[name]) for c in checkpoints], used),
            sum(
                c.entries[name].stop - c.entries[name].start
                for c in (*checkpoints, *([used] if used else []))
            ),
        )


def _full_run(
    name: str, tensors: Sequence[Tensor], base: Checkpoint | None
) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        known = None if base is None else (base, base.entries[name])
        source = FileRows(tensors, known, context)
        cuts = _known_cuts(name, source, context)
        tally = merge_into(name, source, context, cuts)
        for largest, (_, entry) in zip(tally.largest, tensors, strict=True):
            if largest >= arrays.INFINITE:
                raise MergeError(
                    f"tensor {name!r} of {entry.file} (or of the base) holds a number that is not finite"
                )
        if not tally.exact:
            raise MergeError(
                f"the thresholds kept beside the checkpoints are not those of tensor {name!r}; delete "
                f"{THRESHOLDS} in them and merge again"
            )
        return describe(tally, source.size)

    return run


def _known_cuts(name: str, source: FileRows, context: Context) -> list[Cut] | None:
    """Thresholds of all checkpoints, if any are known; the unknown ones are found here."""
    known = [cuts[name] if cuts is not None else None for cuts in context.thresholds]
    if not any(known):
        return None
    missing = [k for k, cut in enumerate(known) if cut is None]
    if missing:
        found = find_tensor_cuts(source.only(missing), context.recipe.density, context.kernels)
        for k, cut in zip(missing, found, strict=True):
            known[k] = cut
    return [cut for cut in known if cut is not None]


class FileRows:
    """A `Source`: one tensor of K checkpoints, of one type, and of a base; read from their files."""

    def __init__(self, tensors: Sequence[Tensor], base: Tensor | None, context: Context) -> None:
        self._tensors, self._base, self._context = tensors, base, context
        entry = tensors[0][1]
        self.count, self.size = len(tensors), entry.size
        self._dtype = row_dtype(entry.dtype)
        # differences of 16-bit numbers are none
        self.exact16 = base is None and entry.dtype == "BF16"
        self.origin = None if base is None else base[1].file
        self._kept: tuple[Numbers, Numbers] | None = None

    def only(self, which: Sequence[int]) -> FileRows:
        """The same tensor of some of the checkpoints."""
        return FileRows([self._tensors[k] for k in which], self._base, self._context)

    def _buffers(self, size: int) -> tuple[Numbers, Numbers]:
        rows = self._context.scratch.take("rows", self._dtype, self.count * size).reshape(
            self.count, size
        )
        if self._base is None:
            return rows, rows[0, :0]
        return rows, self._context.scratch.take("base", row_dtype(self._base[1].dtype), size)

    def _read(self, first: int, rows: Numbers, base: Numbers) -> None:
        if self._context.stop.is_set():
            raise KeyboardInterrupt
        for (checkpoint, entry), row in zip(self._tensors, rows, strict=True):
            checkpoint.read(entry, first, row)
        if self._base is not None:
            self._base[0].read(self._base[1], first, base)

    def chunks(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Pieces of the files; a small tensor is read once, as one."""
        small = self.count * self.size * np.dtype(self._dtype).itemsize <= KEEP
        if self._kept is None and small:
            self._kept = self._buffers(self.size)
            self._read(0, *self._kept)
        if self._kept is not None:
            yield self._kept
            return
        rows, base = self._buffers(CHUNK)
        for first in range(0, self.size, CHUNK):
            count = min(CHUNK, self.size - first)
            if count < CHUNK:
                rows, base = self._buffers(count)
            self._read(first, rows, base)
            yield rows, base


def merge_into(
    name: str,
    source: Source,
    context: Context,
    cuts: list[Cut] | None = None,
    base: Tensor | None = None,
    module: str | None = None,
) -> Tally:
    """Merge a tensor and write base + lambda * change."""
    factor = context.factor if context.recipe.row.base else np.float32(1)
    fits = []

    def sink(at: int, chunk_base: Numbers, merged: Floats) -> None:
        if base is not None:
            chunk_base = np.empty(len(merged), row_dtype(base[1].dtype))
            base[0].read(base[1], at, chunk_base)
        origin = base[1].file if base is not None else source.origin
        fits.append(put(context, name, at, merged, chunk_base, factor, origin))

    tally = merge_chunks(
        source,
        context.recipe,
        sink,
        kernels=context.kernels,
        cuts=cuts,
        seed=seed_of(module or name),
    )
    if tally.finite and not all(fits):
        raise MergeError(f"tensor {name!r}: the merged change does not fit float32")
    return tally


def seed_of(name: str) -> int:
    """A seed for a tensor, or for an adapted module, whatever form its merge takes."""
    return int.from_bytes(name.encode(), "little") % ((1 << 61) - 1)


def put(
    context: Context,
    name: str,
    at: int,
    change: Floats,
    base: Numbers,
    factor: np.float32,
    origin: Path | None = None,
) -> bool:
    """Write base + factor * change, rounded once, to entries `at` ... of a tensor of the output.

    Args:
        context: of the merge.
        name: of the tensor.
        at: index of the first entry.
        change: float32.
        base: of `change`'s size, or (0,).
        factor: of the change.
        origin: file that the base is from.

    Returns:
        False if the change is not finite.

    Raises:
        MergeError: the sum is not finite though the change is.
    """
    target = context.writer.entries[name]
    made: Numbers = np.empty(change.size, row_dtype(target.dtype))
    largest = context.kernels.finish(change.ravel(), base, factor, made)
    if target.dtype == "F16":
        with np.errstate(over="ignore"):
            made = made.astype(np.float16)
        largest = largest if np.isfinite(made).all() else arrays.INFINITE
    finite = largest < arrays.INFINITE or bool(np.isfinite(change).all())
    if largest >= arrays.INFINITE and finite:
        if base.size and not np.isfinite(arrays.widen(base)).all():
            raise MergeError(f"tensor {name!r} of {origin} holds a number that is not finite")
        raise MergeError(f"tensor {name!r}: the merge does not fit {target.dtype}; take float32")
    context.writer.write(name, at, made)
    return finite


def describe(tally: Tally, size: int) -> dict[str, Any]:
    """A tensor in the manifest."""
    lines: dict[str, Any] = {"entries": size}
    if tally.counted:
        lines["zero_fraction"] = [round(int(zeros) / max(1, size), 6) for zeros in tally.zeros]
        lines["unchanged"] = bool((tally.zeros == size).all())
    if tally.cuts:
        lines["threshold"] = [
            float(np.uint32(cut.magnitude).view(np.float32)) for cut in tally.cuts
        ]
        lines["ties_at_threshold"] = [cut.ties for cut in tally.cuts]
        lines["cuts"] = [[cut.magnitude, cut.need, cut.ties] for cut in tally.cuts]
    return lines
