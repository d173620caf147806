"""The jobs of a merge: one tensor of the output each, from K checkpoints or K adapters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from gtr_turbo.merging import arrays, lora
from gtr_turbo.merging.arrays import Floats, Numbers
from gtr_turbo.merging.methods import Recipe, Rows, Source, Tally, find_tensor_cuts, merge_chunks
from gtr_turbo.merging.shards import ITEMSIZE, Checkpoint, Entry, MergeError, Writer, row_dtype
from gtr_turbo.merging.trim import Cut

CHUNK = 1 << 17
"""Entries a thread works on at a time."""
FORMS = ("dense", "adapter", "cat", "factors")
THRESHOLDS = "merge-thresholds.json"


@dataclass
class Job:
    """One tensor of the output."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    run: Callable[[Context], dict[str, Any] | None]
    """Writes the tensor; returns its lines of the manifest."""
    read_bytes: int

    @property
    def size(self) -> int:
        """Entries."""
        return int(np.prod(self.shape, dtype=np.int64))


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


# -- full checkpoints --------------------------------------------------------------------------------


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
        if entry.dtype not in ITEMSIZE:
            raise MergeError(
                f"{entry.file}: tensor {name!r} is {entry.dtype}; only {', '.join(ITEMSIZE)} can be merged"
            )
        yield Job(
            name,
            dtype or entry.dtype,
            entry.shape,
            _full_run(name, checkpoints, used),
            sum(
                c.entries[name].stop - c.entries[name].start
                for c in (*checkpoints, *([used] if used else []))
            ),
        )


def _full_run(
    name: str, checkpoints: Sequence[Checkpoint], base: Checkpoint | None
) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        source = FileRows(name, checkpoints, base, context.stop)
        cuts = _known_cuts(name, source, context)
        tally = _merge_into(name, source, context, cuts)
        for k, checkpoint in enumerate(checkpoints):
            if tally.largest[k] >= arrays.INFINITE:
                raise MergeError(
                    f"tensor {name!r} of {checkpoint.entries[name].file} (or of the base) holds a number that "
                    "is not finite"
                )
        if not tally.exact:
            raise MergeError(
                f"the thresholds kept beside the checkpoints are not those of tensor {name!r}; delete "
                f"{THRESHOLDS} in them and merge again"
            )
        return _lines(tally, source.size)

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
    """A `Source`: one tensor of K checkpoints and base, read from their files."""

    exact16 = False  # a change of 16-bit numbers is a float32

    def __init__(
        self,
        name: str,
        checkpoints: Sequence[Checkpoint],
        base: Checkpoint | None,
        stop: threading.Event,
        chunk: int = CHUNK,
    ) -> None:
        self._name, self._checkpoints, self._base, self._stop = name, checkpoints, base, stop
        self._chunk = chunk
        entry = checkpoints[0].entries[name]
        self.count, self.size = len(checkpoints), entry.size
        self._dtype = row_dtype(entry.dtype)
        self._kept: tuple[Numbers, Numbers] | None = None

    def only(self, which: Sequence[int]) -> FileRows:
        """The same tensor of some of the checkpoints."""
        chosen = [self._checkpoints[k] for k in which]
        return FileRows(self._name, chosen, self._base, self._stop, self._chunk)

    def _buffers(self, size: int) -> tuple[Numbers, Numbers]:
        rows: Numbers = np.empty((self.count, size), self._dtype)
        if self._base is None:
            return rows, np.empty(0, self._dtype)
        return rows, np.empty(size, row_dtype(self._base.entries[self._name].dtype))

    def _read(self, first: int, rows: Numbers, base: Numbers) -> None:
        if self._stop.is_set():
            raise KeyboardInterrupt
        for checkpoint, row in zip(self._checkpoints, rows, strict=True):
            checkpoint.read(checkpoint.entries[self._name], first, row)
        if self._base is not None:
            self._base.read(self._base.entries[self._name], first, base)

    def chunks(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Pieces of the files; a tensor of one piece is read once."""
        if self._kept is None and self.size <= self._chunk:
            self._kept = self._buffers(self.size)
            self._read(0, *self._kept)
        if self._kept is not None:
            yield self._kept
            return
        rows, base = self._buffers(self._chunk)
        for first in range(0, self.size, self._chunk):
            count = min(self._chunk, self.size - first)
            if count < self._chunk:
                rows, base = self._buffers(count)
            self._read(first, rows, base)
            yield rows, base


def _merge_into(
    name: str,
    source: Source,
    context: Context,
    cuts: list[Cut] | None = None,
    base: tuple[Checkpoint, Entry] | None = None,
) -> Tally:
    """Merge a tensor and write base + lambda * change."""
    target = context.writer.entries[name]
    plain = context.recipe.row.base is False
    seen = 0

    def sink(at: int, chunk_base: Numbers, merged: Floats) -> None:
        nonlocal seen
        if base is not None:
            chunk_base = np.empty(len(merged), row_dtype(base[1].dtype))
            base[0].read(base[1], at, chunk_base)
        made: Numbers = np.empty(len(merged), row_dtype(target.dtype))
        factor = np.float32(1) if plain and base is None else context.factor
        largest = context.kernels.finish(merged, chunk_base, factor, made)
        if target.dtype == "F16":
            with np.errstate(over="ignore"):
                made = made.astype(np.float16)
            largest = arrays.INFINITE if not np.isfinite(made).all() else largest
        seen = max(seen, int(largest))
        context.writer.write(name, at, made)

    tally = merge_chunks(
        source,
        context.recipe,
        sink,
        kernels=context.kernels,
        cuts=cuts,
        seed=int.from_bytes(name.encode(), "little") % (1 << 61),
    )
    if tally.finite and seen >= arrays.INFINITE:
        raise MergeError(f"tensor {name!r}: the merge does not fit {target.dtype}; take float32")
    return tally


def _lines(tally: Tally, size: int) -> dict[str, Any]:
    """A tensor in the manifest."""
    lines: dict[str, Any] = {
        "entries": size,
        "zero_fraction": [round(int(z) / max(1, size), 6) for z in tally.zeros],
    }
    if tally.cuts:
        lines["threshold"] = [
            float(np.uint32(cut.magnitude).view(np.float32)) for cut in tally.cuts
        ]
        lines["ties_at_threshold"] = [cut.ties for cut in tally.cuts]
        lines["cuts"] = [[cut.magnitude, cut.need, cut.ties] for cut in tally.cuts]
    return lines


# -- adapters ----------------------------------------------------------------------------------------


def lora_jobs(
    adapters: Sequence[lora.Adapter],
    base: Checkpoint | None,
    recipe: Recipe,
    form: str,
    rank: int | None,
    max_lost: float,
    dtype: str | None,
    lam: float,
) -> tuple[list[Job], dict[str, Any] | None]:
    """(the jobs, the config of the adapter to write)."""
    _check_form(form, recipe, base, rank, lam)
    if form == "dense":
        assert base is not None
        return list(_dense_jobs(adapters, base, dtype)), None
    modules = adapters[0].modules
    ranks = {module.rank for adapter in adapters for module in adapter.modules.values()}
    if form == "factors" and len(ranks) > 1:
        raise MergeError(f"form factors needs equal ranks, given {sorted(ranks)}")
    if form == "cat":
        sums = {sum(a.modules[name].rank for a in adapters) for name in modules}
        rank = max(sums) if rank is None and len(sums) > 1 else rank
        size = rank or max(sums)
    else:
        size = rank or max(ranks) * (2 if form == "adapter" else 1)
    jobs = []
    for number, (name, module) in enumerate(modules.items()):
        pair = _Pair(adapters, name, number, form, size, rank, max_lost, recipe, lam)
        shapes = {"A": (size, module.shape[1]), "B": (module.shape[0], size)}
        for side, shape in shapes.items():
            key = f"base_model.model.{name}.lora_{side}.weight"
            read = sum(getattr(a.modules[name], side.lower()).size * 4 for a in adapters)
            jobs.append(Job(key, dtype or "F32", shape, pair.job(side, key), read))
    return jobs, lora.merged_config(adapters, size)


def _check_form(
    form: str, recipe: Recipe, base: Checkpoint | None, rank: int | None, lam: float
) -> None:
    """Refuse what a form cannot do."""
    problem = None
    if form not in FORMS:
        problem = f"form {form!r}: expected one of {', '.join(FORMS)}"
    elif recipe.method == "slerp":
        problem = "slerp is for full checkpoints; for adapters take linear or ties"
    elif form == "dense" and base is None:
        problem = "form dense adds the merged change to the base: give the base"
    elif rank is not None and (rank < 1 or form in ("dense", "factors")):
        problem = (
            f"rank {rank}: form {form} takes {'1 or more' if form in FORMS[1:3] else 'no rank'}"
        )
    elif form == "cat" and (recipe.row.thin != "none" or recipe.row.combine == "vote"):
        problem = f"form cat is exact for linear merges only, not for {recipe.method}"
    elif form == "factors" and (recipe.method != "ties" or lam != 1):
        problem = "form factors is PEFT's ties on A and B, without lambda"
    if problem:
        raise MergeError(problem)


def _dense_jobs(
    adapters: Sequence[lora.Adapter], base: Checkpoint, dtype: str | None
) -> Iterator[Job]:
    adapted = {lora.base_name(module, base): module for module in adapters[0].modules}
    if len(adapted) < len(adapters[0].modules):
        raise MergeError(f"two modules of {adapters[0].path} name one tensor of {base.path}")
    for name, entry in base.entries.items():
        module = adapted.get(name)
        if module is None:
            kind = entry.dtype
            if kind not in ITEMSIZE:
                raise MergeError(f"{entry.file}: tensor {name!r} is {kind}, which is not handled")
            yield Job(
                name, dtype or kind, entry.shape, _copy_run(base, entry), entry.stop - entry.start
            )
            continue
        shape = adapters[0].modules[module].shape
        if entry.shape != shape:
            raise MergeError(
                f"module {module!r} of {adapters[0].path} is {shape}, but tensor {name!r} of {entry.file} is "
                f"{entry.shape}: another base?"
            )
        yield Job(
            name,
            dtype or entry.dtype,
            entry.shape,
            _dense_run(name, adapters, module, base, entry),
            entry.stop - entry.start,
        )


def _copy_run(base: Checkpoint, entry: Entry) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        target = context.writer.entries[entry.name]
        for first in range(0, entry.size, CHUNK):
            row: Numbers = np.empty(min(CHUNK, entry.size - first), row_dtype(entry.dtype))
            base.read(entry, first, row)
            made: Numbers = np.empty(len(row), row_dtype(target.dtype))
            context.kernels.finish(arrays.widen(row), row[:0], np.float32(1), made)
            context.writer.write(
                entry.name, first, made.astype(np.float16) if target.dtype == "F16" else made
            )

    return run


def _dense_run(
    name: str, adapters: Sequence[lora.Adapter], module: str, base: Checkpoint, entry: Entry
) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        source = lora.Product(adapters, module, CHUNK)
        tally = _merge_into(name, source, context, base=(base, entry))
        _check_finite(tally, adapters, module)
        return _lines(tally, source.size)

    return run


def _check_finite(tally: Tally, adapters: Sequence[lora.Adapter], module: str) -> None:
    for largest, adapter in zip(tally.largest, adapters, strict=True):
        if largest >= arrays.INFINITE:
            raise MergeError(
                f"module {module!r} of {adapter.weights.files[0]} holds a number that is not finite"
            )


@dataclass
class _Pair:
    """Both factors of one module; they are made together and written apart."""

    adapters: Sequence[lora.Adapter]
    module: str
    number: int
    form: str
    size: int
    rank: int | None
    max_lost: float
    recipe: Recipe
    lam: float
    _made: dict[str, Floats] = field(default_factory=dict)
    _lines: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def job(self, side: str, key: str) -> Callable[[Context], dict[str, Any]]:
        def run(context: Context) -> dict[str, Any]:
            with self._lock:
                if not self._made:
                    self._make(context)
                factor = self._made.pop(side)
                self._made[""] = factor[:0]  # made: not to be made again for the other side
            target = context.writer.entries[key]
            made: Numbers = np.empty(factor.size, row_dtype(target.dtype))
            context.kernels.finish(factor.ravel(), factor.ravel()[:0], np.float32(1), made)
            context.writer.write(key, 0, made.astype(np.float16) if target.dtype == "F16" else made)
            return self._lines

        return run

    def _make(self, context: Context) -> None:
        if context.stop.is_set():
            raise KeyboardInterrupt
        if self.form == "factors":
            self._made = self._factors(context)
            return
        if self.form == "cat":
            weights = np.array(self.recipe.weights) * self.lam
            if self.recipe.row.combine == "mean":
                weights = weights / sum(self.recipe.weights)
            scaled = [
                float(w) * a.modules[self.module].scale
                for w, a in zip(weights, self.adapters, strict=True)
            ]
            pairs = [adapter.factors(self.module) for adapter in self.adapters]
            a, b, lost = lora.concatenate(pairs, scaled, self.rank)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                raise MergeError(f"module {self.module!r} holds a number that is not finite")
        else:
            source = lora.Product(self.adapters, self.module, CHUNK)
            merged = np.empty(source.size, np.float32)

            def sink(at: int, base: Numbers, change: Floats) -> None:
                merged[at : at + len(change)] = context.factor * change

            tally = merge_chunks(
                source, context.recipe, sink, kernels=context.kernels, seed=self.number
            )
            _check_finite(tally, self.adapters, self.module)
            self._lines |= _lines(tally, source.size)
            rng = np.random.default_rng([self.recipe.seed, self.number])
            shape = self.adapters[0].modules[self.module].shape
            a, b, lost = lora.low_rank(merged.reshape(shape), self.size, rng)
        self._lines |= {"energy_lost": lost}
        if lost > self.max_lost:
            raise MergeError(
                f"module {self.module!r}: rank {self.size} loses {lost:.1%} of the merged change's squared norm, "
                f"more than {self.max_lost:.1%}. Give a larger rank, or form dense, or a larger bound."
            )
        self._made = {"A": a, "B": b}

    def _factors(self, context: Context) -> dict[str, Floats]:
        made = {}
        recipe = lora.parity_recipe(self.recipe, self.adapters, self.module)
        for side in ("A", "B"):
            entries = [getattr(a.modules[self.module], side.lower()) for a in self.adapters]
            if len({entry.dtype for entry in entries}) > 1:
                raise MergeError(f"module {self.module!r}: factors of different dtypes")
            rows: Numbers = np.empty((len(entries), entries[0].size), row_dtype(entries[0].dtype))
            for adapter, entry, row in zip(self.adapters, entries, rows, strict=True):
                adapter.weights.read(entry, 0, row)
            merged = np.empty(entries[0].size, np.float32)

            def sink(at: int, base: Numbers, change: Floats, into: Floats = merged) -> None:
                into[at : at + len(change)] = change

            source = Rows(rows, rows[0, :0], exact16=entries[0].dtype == "BF16")
            tally = merge_chunks(source, recipe, sink, kernels=context.kernels)
            _check_finite(tally, self.adapters, self.module)
            made[side] = merged.reshape(entries[0].shape)
        return made
