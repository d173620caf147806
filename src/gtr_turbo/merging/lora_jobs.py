"""The jobs of a merge of adapters, in the forms that `lora` describes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gtr_turbo.merging import arrays, lora
from gtr_turbo.merging.arrays import Floats, Numbers
from gtr_turbo.merging.jobs import CHUNK, Context, FileRows, Job, describe, merge_into, put, seed_of
from gtr_turbo.merging.methods import Recipe, Tally, merge_chunks
from gtr_turbo.merging.shards import ITEMSIZE, Checkpoint, Entry, MergeError, row_dtype

FORMS = ("dense", "adapter", "cat", "factors")


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
            read = sum(getattr(a.modules[name], side.lower()).nbytes for a in adapters)
            run = (
                pair.job(side, key)
                if form != "factors"
                else _factor_run(key, adapters, name, side, recipe)
            )
            jobs.append(Job(key, dtype or "F32", shape, run, read))
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
            yield Job(name, dtype or kind, entry.shape, _copy_run(base, entry), entry.nbytes)
            continue
        shape = adapters[0].modules[module].shape
        if entry.shape != shape:
            raise MergeError(
                f"module {module!r} of {adapters[0].path} is {shape}, but tensor {name!r} of {entry.file} is "
                f"{entry.shape}: another base?"
            )
        changed = [a.modules[module] for a in adapters]
        yield Job(
            name,
            dtype or entry.dtype,
            entry.shape,
            _dense_run(name, adapters, module, base, entry),
            entry.nbytes + sum(m.a.nbytes + m.b.nbytes for m in changed),
        )


def _copy_run(base: Checkpoint, entry: Entry) -> Callable[[Context], None]:
    def run(context: Context) -> None:
        for first in range(0, entry.size, CHUNK):
            row: Numbers = np.empty(min(CHUNK, entry.size - first), row_dtype(entry.dtype))
            base.read(entry, first, row)
            if not put(context, entry.name, first, arrays.widen(row), row[:0], np.float32(1)):
                raise MergeError(
                    f"tensor {entry.name!r} of {entry.file} holds a number that is not finite"
                )

    return run


def _dense_run(
    name: str, adapters: Sequence[lora.Adapter], module: str, base: Checkpoint, entry: Entry
) -> Callable[[Context], dict[str, Any]]:
    def run(context: Context) -> dict[str, Any]:
        source = lora.Product(adapters, module, CHUNK)
        tally = merge_into(name, source, context, base=(base, entry), module=module)
        _check_finite(tally, adapters, module)
        return describe(tally, source.size)

    return run


def _factor_run(
    key: str, adapters: Sequence[lora.Adapter], module: str, side: str, recipe: Recipe
) -> Callable[[Context], dict[str, Any]]:
    """One factor, merged apart from the other."""
    tensors = [(a.weights, getattr(a.modules[module], side.lower())) for a in adapters]
    if len({entry.dtype for _, entry in tensors}) > 1:
        raise MergeError(f"module {module!r}: factors of different dtypes")
    recipe = lora.parity_recipe(recipe, adapters, module)

    def run(context: Context) -> dict[str, Any]:
        source = FileRows(tensors, None, context)
        tally = merge_into(key, source, replace(context, recipe=recipe))
        _check_finite(tally, adapters, module)
        return describe(tally, source.size)

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
            if not put(context, key, 0, factor, factor.ravel()[:0], np.float32(1)):
                raise self._too_large()
            return self._lines

        return run

    def _too_large(self) -> MergeError:
        return MergeError(f"module {self.module!r}: the merged change does not fit float32")

    def _make(self, context: Context) -> None:
        if context.stop.is_set():
            raise KeyboardInterrupt
        if self.form == "cat":
            weights = np.array(self.recipe.weights) * self.lam
            if self.recipe.row.combine == "mean":
                weights = weights / sum(self.recipe.weights)
            scaled = [
                float(w) * a.modules[self.module].scale
                for w, a in zip(weights, self.adapters, strict=True)
            ]
            pairs = [adapter.factors(self.module) for adapter in self.adapters]
            with np.errstate(over="ignore", invalid="ignore"):
                try:
                    a, b, lost = lora.concatenate(pairs, scaled, self.rank)
                except np.linalg.LinAlgError:  # of what is not finite
                    raise self._too_large() from None
        else:
            source = lora.Product(self.adapters, self.module, CHUNK)
            merged = np.empty(source.size, np.float32)

            def sink(at: int, base: Numbers, change: Floats) -> None:
                with np.errstate(over="ignore"):
                    merged[at : at + len(change)] = context.factor * change

            tally = merge_chunks(
                source, context.recipe, sink, kernels=context.kernels, seed=seed_of(self.module)
            )
            _check_finite(tally, self.adapters, self.module)
            if not np.isfinite(merged).all():
                raise self._too_large()
            self._lines |= describe(tally, source.size)
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
