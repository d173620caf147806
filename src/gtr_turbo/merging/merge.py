"""Merging checkpoints from files to files, in bounded memory: what `gtr-turbo merge` calls.

The output's files are laid out first; then every tensor (of a low rank: every pair) is a job, the largest first,
done by one thread in chunks: read K + 1 rows, merge, round once, write at its offset. The folder appears when it is
complete. The result does not depend on the number of threads or on how inputs are sharded.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gtr_turbo.merging import lora
from gtr_turbo.merging.jobs import CHUNK, KEEP, Context, Job, full_jobs
from gtr_turbo.merging.lora_jobs import lora_jobs
from gtr_turbo.merging.manifest import MANIFEST, made_from
from gtr_turbo.merging.methods import METHODS, Recipe, ema, sma
from gtr_turbo.merging.output import Writer, check_new, copy_companions, new_folder, state_dtype
from gtr_turbo.merging.shards import ITEMSIZE, Checkpoint, MergeError
from gtr_turbo.merging.thresholds import load_thresholds, save_thresholds
from gtr_turbo.merging.trim import Cut, backend

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ALPHA, MAX_LOST = 0.5, 0.1
"""Defaults; another value is refused where the option has no use."""


@dataclass(kw_only=True)
class Plan:
    """What a merge will do; `gtr-turbo merge --dry-run` prints it."""

    kind: str
    """`full` or `lora`."""
    form: str
    inputs: list[str]
    base: str | None
    out: str
    settings: dict[str, Any]
    tensors: int
    """Tensors in the output."""
    merged: int
    """Those that are merged; the others are copied from the base."""
    read_bytes: int
    disk_bytes: int
    memory_bytes: int
    """Bound on the memory that the merge allocates."""
    cached: int
    """Inputs whose thresholds are known already."""


@dataclass(kw_only=True)
class Report:
    """What was done."""

    plan: Plan
    manifest: dict[str, Any]
    """What lies in `merged-from.json`; empty after a dry run."""
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """Facts that make the merge doubtful."""
        return list(self.manifest.get("warnings", []))


@dataclass
class _Prepared:
    """Inputs, opened and checked, and the jobs they give."""

    kind: str
    opened: list[Checkpoint]
    base: Checkpoint | None
    jobs: list[Job]
    merged: int
    config: dict[str, Any] | None = None
    """Of the adapter to write."""


def merge(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | Path | None = None,
    method: str = "ties",
    weights: str | Sequence[float] = "sma",
    alpha: float = ALPHA,
    density: float | None = None,
    lam: float = 1.0,
    compat: str | None = None,
    form: str = "dense",
    rank: int | None = None,
    max_lost: float = MAX_LOST,
    dtype: str | None = None,
    seed: int = 0,
    threads: int = 2,
    shard_bytes: int = 5 * 10**9,
    engine: str = "numba",
    keep_thresholds: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Merge checkpoints into a new folder.

    Args:
        checkpoints: the oldest first: full models (folder or .safetensors file), or LoRA adapters of one base.
            One alone with `linear` is written out as it is.
        out: folder to make.
        base: where the checkpoints started from. Needed by methods that work on changes, and by `dense`.
        method: a row of `methods.METHODS`.
        weights: `sma`, `ema`, or one number per checkpoint.
        alpha: of `ema`.
        density: fraction of entries that `ties` and the `dare` methods keep; default 0.8 for them.
        lam: the merged change is multiplied by it (methods that work on changes).
        compat: `peft` for PEFT's definition of ties.
        form: of the result, for adapters: `dense`, `adapter`, `cat` or `factors`; see `lora`.
        rank: of the form `adapter` (default: twice the inputs' largest rank) or `cat` (default: their sum).
        max_lost: bound on the fraction of a module's squared norm that `adapter` and `cat` may lose.
        dtype: of the result: `float32`, `bfloat16` or `float16`; default as the checkpoints' (full), the base's
            (dense) or float32 (adapters).
        seed: of the random drop and of the SVD's sketch.
        threads: at work at once.
        shard_bytes: largest file of the result.
        engine: `numba` or `numpy`.
        keep_thresholds: write the thresholds of full checkpoints beside them, so that the next `ties` with
            this base and density needs one pass less.
        dry_run: only plan.
        progress: told (bytes read, bytes to read).

    Raises:
        MergeError: the input cannot be merged (names file and tensor), or an option has no use. Nothing is left
            behind.
        OSError: the disk is full or cannot be written.
    """
    began = time.monotonic()
    recipe = _recipe(len(checkpoints), method, weights, alpha, density, seed, compat, lam)
    if dtype is not None and dtype not in DTYPES:
        raise MergeError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    if engine not in ("numba", "numpy"):
        raise MergeError(f"engine {engine!r}: expected numba or numpy")
    if threads < 1 or shard_bytes < 1:
        raise MergeError(f"threads {threads} and shard size {shard_bytes} must be at least 1")
    if not max_lost >= 0:
        raise MergeError(f"max_lost {max_lost} must be 0 or more")
    if max_lost != MAX_LOST and form in ("dense", "factors"):
        raise MergeError(f"form {form} has no max_lost; drop it, or take form adapter or cat")
    wanted = DTYPES[dtype] if dtype else None
    paths = [Path(path) for path in checkpoints]
    with ExitStack() as stack:
        prepared = _prepare(stack, paths, base, recipe, form, rank, max_lost, wanted, lam)
        known: list[dict[str, Cut] | None] = [None] * len(paths)
        trimmed = recipe.row.thin == "trim" and prepared.kind == "full"
        if keep_thresholds and not trimmed:
            raise MergeError("thresholds are kept of the ties of full models only; drop the option")
        if trimmed and prepared.base is not None:
            known = [load_thresholds(c, prepared.base, recipe.density) for c in prepared.opened]
        layout = [
            (name, job.dtype, shape) for job in prepared.jobs for name, shape in job.shapes.items()
        ]
        plan = Plan(
            kind=prepared.kind,
            form=form,
            inputs=[str(path) for path in paths],
            base=None if base is None else str(base),
            out=str(out),
            settings={
                "method": method,
                "weights": list(recipe.weights),
                "density": recipe.density,
                "lambda": lam,
                "compat": compat,
                "seed": seed,
                "rank": None if prepared.config is None else prepared.config["r"],
            },
            tensors=len(layout),
            merged=prepared.merged,
            read_bytes=sum(job.read_bytes for job in prepared.jobs),
            disk_bytes=sum(ITEMSIZE[job.dtype] * job.size for job in prepared.jobs),
            memory_bytes=_memory(prepared.jobs, len(paths), threads),
            cached=sum(cuts is not None for cuts in known),
        )
        check_new(Path(out))
        if dry_run:
            return Report(plan=plan, manifest={}, seconds=time.monotonic() - began)
        with new_folder(Path(out)) as folder:
            stem = "model" if prepared.config is None else "adapter_model"
            whole = prepared.config is not None  # peft reads one file
            writer = Writer.create(
                folder, layout, stem=stem, shard_bytes=plan.disk_bytes + 1 if whole else shard_bytes
            )
            stack.callback(writer.close, sync=False)
            context = Context(
                writer, backend(engine), recipe, np.float32(lam), threading.Event(), known
            )
            tensors = _run(prepared.jobs, context, threads, progress)
            settings = plan.settings | {"kind": plan.kind, "form": plan.form}
            manifest = made_from(settings, prepared.opened, prepared.base, tensors)
            _complete(folder, prepared, paths, base)
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            writer.close()
        if keep_thresholds and prepared.base is not None:
            failed = save_thresholds(prepared.opened, prepared.base, recipe.density, tensors)
            manifest["warnings"] += failed
    return Report(plan=plan, manifest=manifest, seconds=time.monotonic() - began)


def _complete(
    folder: Path, prepared: _Prepared, paths: Sequence[Path], base: str | Path | None
) -> None:
    """Write the files beside the weights: configs, tokenizer, and what else a model needs."""
    own = [Path(base)] if base is not None and prepared.config is None else []
    # an adapter's own files would make full weights look like one
    others = paths[::-1] if prepared.kind == "full" or prepared.config is not None else []
    for beside in [path for path in (*own, *others) if path.is_dir()][:1]:
        copy_companions(beside, folder)
    kinds = {job.dtype for job in prepared.jobs}
    for kind in [kind for kind, width in DTYPES.items() if kinds == {width}]:  # if not mixed
        state_dtype(folder / "config.json", kind)
    if prepared.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(prepared.config, indent=2) + "\n")


def _recipe(
    count: int,
    method: str,
    weights: str | Sequence[float],
    alpha: float,
    density: float | None,
    seed: int,
    compat: str | None,
    lam: float,
) -> Recipe:
    """Check the numbers and resolve the weights."""
    if count < (1 if method == "linear" else 2):
        raise MergeError(
            f"a merge takes two checkpoints or more, given {count}; `gtr-turbo export` writes out one"
        )
    if alpha != ALPHA and (not isinstance(weights, str) or weights != "ema"):
        raise MergeError(f"alpha {alpha} is for weights ema; drop it, or take them")
    if isinstance(weights, str):
        if weights not in ("sma", "ema"):
            raise MergeError(
                f"weights {weights!r}: expected sma, ema, or one number per checkpoint"
            )
        if not 0 < alpha <= 1:
            raise MergeError(f"alpha {alpha} must be in (0, 1]")
        weights = sma(count) if weights == "sma" else ema(count, alpha)
    if len(weights) != count:
        raise MergeError(f"{count} checkpoints, but {len(weights)} weights")
    if not abs(lam) <= float(np.finfo(np.float32).max):
        raise MergeError(f"lambda {lam} must be a finite number")
    row = METHODS.get(method)
    if row is not None and not row.base and lam != 1:
        raise MergeError(f"{method} has no lambda; drop it, or take task-arithmetic")
    if density is None:
        density = 0.8 if row is not None and row.thin != "none" else 1.0
    try:
        return Recipe(
            method=method,
            weights=tuple(float(w) for w in weights),
            density=density,
            seed=seed,
            compat=compat,
        )
    except ValueError as error:
        raise MergeError(str(error)) from error


def _prepare(
    stack: ExitStack,
    paths: Sequence[Path],
    base: str | Path | None,
    recipe: Recipe,
    form: str,
    rank: int | None,
    max_lost: float,
    dtype: str | None,
    lam: float,
) -> _Prepared:
    """Open and check everything."""
    kinds = [lora.is_adapter(path) for path in paths]
    if len(set(kinds)) > 1:
        one, other = paths[kinds.index(True)], paths[kinds.index(False)]
        raise MergeError(f"{one} is an adapter, {other} is not: merge like with like")
    opened_base = None
    if base is not None:
        if lora.is_adapter(Path(base)):
            raise MergeError(
                f"the base {base} is an adapter; give the full model it belongs to. If the checkpoints began at "
                "it, the merge would then trim its change with theirs: `gtr-turbo export` it and each of them, and "
                "merge these full weights"
            )
        opened_base = stack.enter_context(Checkpoint.open(base))
    if kinds[0]:
        adapters = [stack.enter_context(lora.Adapter.open(path)) for path in paths]
        lora.check_family(adapters)
        jobs, config = lora_jobs(adapters, opened_base, recipe, form, rank, max_lost, dtype, lam)
        opened = [adapter.weights for adapter in adapters]
        written = sum(len(job.shapes) for job in jobs)
        merged = len(adapters[0].modules) if form == "dense" else written
        return _Prepared("lora", opened, opened_base, jobs, merged, config)
    if form != "dense" or rank is not None:
        raise MergeError(f"{paths[0]} is a full model: form {form!r} and rank are for adapters")
    opened = [stack.enter_context(Checkpoint.open(path)) for path in paths]
    halves = list(filter(lora.HALF.search, opened[0].entries))
    # a full model may have layers of its own with such names, but not nothing else
    if halves and (len(halves) == len(opened[0].entries) or any(map(lora.FACTOR.match, halves))):
        raise MergeError(
            f"{paths[0]} holds {halves[0]!r}, half of an adapter's change, which cannot be merged apart from the "
            "other; give the adapters' folders, with adapter_config.json"
        )
    if recipe.row.base and opened_base is None:
        raise MergeError(f"{recipe.method} works on changes: give the base they started from")
    jobs = list(full_jobs(opened, opened_base, recipe, dtype))
    return _Prepared("full", opened, opened_base, jobs, len(jobs))


def _run(
    jobs: Sequence[Job],
    context: Context,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, dict[str, Any]]:
    """Do all jobs, the largest first; the first failure stops the others."""
    total, done = sum(job.read_bytes for job in jobs), 0
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(threads) as pool:
        futures = {
            pool.submit(job.run, context): job
            for job in sorted(jobs, key=lambda job: -job.read_bytes)
        }
        try:
            for future in as_completed(futures):
                job, lines = futures[future], future.result()
                if lines is not None:
                    found |= dict.fromkeys(job.shapes, lines)
                done += job.read_bytes
                if progress is not None:
                    progress(done, total)
        except BaseException:
            context.stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {name: found[name] for job in jobs for name in job.shapes if name in found}


def _memory(jobs: Sequence[Job], count: int, threads: int) -> int:
    """What a merge allocates at most: chunks and histograms of each thread, and what its jobs hold beside them."""
    # rows, base, merge and result; the last of float16 is there in float32 too
    rows = max(4 * CHUNK * (count + 4), KEEP + 7 * KEEP // count)
    held = max(job.held_bytes for job in jobs)
    return threads * (rows + 8 * count * (1 << 16) + held)
