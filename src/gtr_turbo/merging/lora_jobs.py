"""The jobs of a merge of adapters, in the forms that `lora` describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gtr_turbo.merging import arrays, lora
from gtr_turbo.merging.arrays import Floats, Numbers
from gtr_turbo.merging.jobs import CHUNK, Context, FileRows, Job, describe, merge_into, put, seed_of
from gtr_turbo.merging.methods import Recipe, Tally, merge_chunks
from gtr_turbo.merging.shards import Checkpoint, Entry, MergeError, row_dtype

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
        keys = {side: f"base_model.model.{name}.lora_{side}.weight" for side in "AB"}
        shapes: dict[str, tuple[int, ...]] = {
            "A": (size, module.shape[1]),
            "B": (module.shape[0], size),
        }
        read = {
            side: sum(getattr(a.modules[name], side.lower()).nbytes for a in adapters)
            for side in keys
        }
        kind = dtype or "F32"
        if form == "factors":
            for side, key in keys.items():
                run = _factor_run(key, adapters, name, side, recipe)
                jobs.append(Job({key: shapes[side]}, kind, run, read[side]))
            continue
        pair = _Pair(adapters, name, number, form, size, rank, max_lost, recipe, lam)
        both = {key: shapes[side] for side, key in keys.items()}
        jobs.append(Job(both, kind, pair.run, sum(read.values()), pair.held_bytes()))
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
    elif form != "dense" and base is not None:
        problem = f"form {form} makes an adapter and needs no base: drop it"
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
        entry.check_type()
        module = adapted.get(name)
        if module is None:
            run = _copy_run(base, entry)
            yield Job({name: entry.shape}, dtype or entry.dtype, run, entry.nbytes)
            continue
        shape = adapters[0].modules[module].shape
        if entry.shape != shape:
            raise MergeError(
                f"module {module!r} of {adapters[0].path} is {shape}, but tensor {name!r} of {entry.file} is "
                f"{entry.shape}: another base?"
            )
        changed = [a.modules[module] for a in adapters]
        yield Job(
            {name: entry.shape},
            dtype or entry.dtype,
            _dense_run(name, adapters, module, base, entry),
            entry.nbytes + sum(m.a.nbytes + m.b.nbytes for m in changed),
            _factor_bytes(adapters, module),
        )


def _factor_bytes(adapters: Sequence[lora.Adapter], module: str) -> int:
    """Of all its A and B in float32."""
    return sum(4 * (a.modules[module].a.size + a.modules[module].b.size) for a in adapters)


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
    """Both factors of one module's merged change."""

    adapters: Sequence[lora.Adapter]
    module: str
    number: int
    form: str
    size: int
    rank: int | None
    max_lost: float
    recipe: Recipe
    lam: float

    def held_bytes(self) -> int:
        """What `run` allocates beside chunks, at most; numpy's QR and SVD work on float64 copies, measured."""
        given = _factor_bytes(self.adapters, self.module)
        out, into = self.adapters[0].modules[self.module].shape
        made = 4 * self.size * (out + into)
        if self.form == "cat":
            return given + (2 if self.rank is None else 10) * max(given, made)
        width = min(self.size + lora.SKETCH, out, into)
        return given + made + 4 * out * into + 12 * 4 * width * (out + into)

    def run(self, context: Context) -> dict[str, Any]:
        """Make both and write them."""
        if context.stop.is_set():
            raise KeyboardInterrupt
        made = self._side_by_side() if self.form == "cat" else self._cut(context)
        a, b, lost, lines = made
        if lost > self.max_lost:
            raise MergeError(
                f"module {self.module!r}: rank {self.size} loses {lost:.1%} of the merged change's squared norm, "
                f"more than {self.max_lost:.1%}. Give a larger rank, or form dense, or a larger bound."
            )
        for side, factor in (("A", a), ("B", b)):
            key = f"base_model.model.{self.module}.lora_{side}.weight"
            if not put(context, key, 0, factor, factor.ravel()[:0], np.float32(1)):
                raise self._too_large()
        return lines | {"energy_lost": lost}

    def _too_large(self) -> MergeError:
        return MergeError(f"module {self.module!r}: the merged change does not fit float32")

    def _side_by_side(self) -> tuple[Floats, Floats, float, dict[str, Any]]:
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
                return *lora.concatenate(pairs, scaled, self.rank), {}
            except np.linalg.LinAlgError:  # of what is not finite
                raise self._too_large() from None

    def _cut(self, context: Context) -> tuple[Floats, Floats, float, dict[str, Any]]:
        change, lines = self._change(context)
        rng = np.random.default_rng([self.recipe.seed, self.number])
        try:
            return *lora.low_rank(change, self.size, rng), lines
        except np.linalg.LinAlgError:  # of a product that is not finite
            raise self._too_large() from None

    def _change(self, context: Context) -> tuple[Floats, dict[str, Any]]:
        """The merged change (out, in), and its lines of the manifest."""
        source = lora.Product(self.adapters, self.module, CHUNK)
        merged = np.empty(source.size, np.float32)
        fits = []

        def sink(at: int, base: Numbers, change: Floats) -> None:
            part = merged[at : at + len(change)]
            with np.errstate(over="ignore"):
                np.multiply(change, context.factor, out=part)
            fits.append(np.isfinite(part).all())

        tally = merge_chunks(
            source, context.recipe, sink, kernels=context.kernels, seed=seed_of(self.module)
        )
        _check_finite(tally, self.adapters, self.module)
        if not all(fits):
            raise self._too_large()
        shape = self.adapters[0].modules[self.module].shape
        return merged.reshape(shape), describe(tally, source.size)
