"""Cost of merging against PEFT, mergekit and the machine's limits, in one run.

    python benchmarks/merge.py [--only NAME ...] [--pairs 3] [--quick] [--out benchmarks/results/merge.json]

Inputs are synthetic and seeded: a model, and a walk of checkpoints from it (each is the previous one plus
noise). They and the results lie in a temporary folder (at most 3 GB) that is removed at the end. A contest
runs both sides in turn, `--pairs` times, each merge in a process of its own, on the CPU, on one thread. Of a
process it takes CPU seconds (user + system, from wait4), wall seconds, the largest resident set, and the
largest anonymous memory (RssAnon, looked at every 5 ms). "In process" means the CPU seconds of the merge
alone, after a small merge of the same kind: start-up and imports are left out, on both sides.
The ratio is the median of the pairs' ratios. A contest that is run again replaces its figures in `--out`.

    factors-K4, -K5, -K8   TIES on LoRA factors; PEFT `add_weighted_adapter("ties")`, without its loading
    full-ties, full-linear K = 4 bfloat16 models and base; `mergekit-yaml`, whole processes
    remerge                a second merge with kept thresholds; the first one
    accumulate             RunningTies: add a checkpoint and read the merge; merge of K = 8 from scratch
    limits                 the merge pass; memcpy. A merge file to file; `cat` of the inputs and `cp` of one
    memory                 anonymous memory above a tiny merge's, as is and with one tensor 8 times larger
    compile                numba's one-time compilation
"""

from __future__ import annotations

import argparse
import filecmp
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "peft", "mergekit", "numba", "numpy", "safetensors", "transformers")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1") | {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
DENSITY = 0.8
COMMANDS = Path(sys.executable).parent
UNITS = {"_mb": "MB", "_gbs": "GB/s"}
Row = dict[str, Any]

# -- measuring ---------------------------------------------------------------------------------------


def measure(command: Sequence[str | Path], env: dict[str, str] | None = None) -> tuple[Row, str]:
    """Run a command to its end; what it took (CPU and wall seconds, MB), and what it printed.

    Raises:
        RuntimeError: it failed.
    """
    everything = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    everything |= ONE_THREAD | (env or {})
    with tempfile.TemporaryFile("w+") as said:
        began, anonymous, ended = time.perf_counter(), 0, 0
        words = [str(word) for word in command]
        child = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=everything)
        while not ended:
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(0.005)
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
        wall = time.perf_counter() - began
        child.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read()
    if child.returncode:
        raise RuntimeError(f"{words} failed ({child.returncode}):\n{text[-3000:]}")
    took = {
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": wall,
        "rss_mb": usage.ru_maxrss / 1e3,
        "anon_mb": anonymous / 1e3,
    }
    return {key: round(value, 4) for key, value in took.items()}, text


def _anonymous(pid: int) -> int:
    """RssAnon in kB; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def work(worker: str, **given: Any) -> Row:
    """Run a worker below in a process of its own; what it found."""
    command = [sys.executable, __file__, "--worker", worker, json.dumps(given, default=str)]
    found: Row = json.loads(measure(command)[1].splitlines()[-1])
    return found


def of(side: str, row: Row) -> Row:
    """Keys with the side before them."""
    return {f"{side}_{key}": value for key, value in row.items()}


def middle(rows: Sequence[Row], key: str) -> float:
    """The median over pairs."""
    return statistics.median(row[key] for row in rows)


@dataclass
class Line:
    """A line of the table."""

    contest: str
    what: str
    ours: float
    other: float
    unit: str
    ratio: float
    goal: str
    """`>= x`, `<= x` or nothing; of the ratio."""

    @property
    def reached(self) -> bool | None:
        """None without a goal."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.ratio >= float(bound) if sign == ">=" else self.ratio <= float(bound)

    def __str__(self) -> str:
        reached = {None: "", True: "reached", False: "MISSED"}[self.reached]
        numbers = f"{self.ours:10.3f} {self.other:10.3f} {self.unit:5}{self.ratio:8.2f}"
        return f"{self.contest:12} {self.what:44} {numbers}  {self.goal:8} {reached}"


def line(
    what: str, rows: Sequence[Row], ours: str, other: str, goal: str = "", *, cost: bool = False
) -> Line:
    """The medians of two keys; the ratio is how many times less is ours, with `cost` how many times more."""
    contest, _, what = what.partition(": ")
    top, bottom = (ours, other) if cost else (other, ours)
    ratio = statistics.median(row[top] / row[bottom] for row in rows)
    unit = next((unit for end, unit in UNITS.items() if ours.endswith(end)), "s")
    return Line(contest, what, middle(rows, ours), middle(rows, other), unit, ratio, goal)


def differing(contest: str, rows: Sequence[Row], goal: str = "") -> Line:
    """The largest number of entries that differ, and the number of entries."""
    most, total = max(row["differing"] for row in rows), rows[0]["entries"]
    return Line(contest, "entries that differ; all", most, total, "", most / total, goal)


# -- the inputs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of the synthetic models: Qwen2.5-VL's text part at a quarter of its width, fewer layers."""

    hidden: int = 896
    kv: int = 128
    mlp: int = 4736
    rank: int = 128
    lora_layers: int = 4
    full_layers: int = 8
    vocabulary: int = 20000
    entries: int = 1 << 24
    """Of a tensor in memory."""


QUICK = Sizes(128, 64, 256, 8, 1, 1, 500, 1 << 18)
WARM = Sizes(640, 64, 640, 128, 1, 1, 500)
"""Small, but with tensors of more than one chunk."""


def linear_shapes(sizes: Sizes, layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (out, in)) of every linear layer."""
    hidden, kv, mlp = sizes.hidden, sizes.kv, sizes.mlp
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }.items():
            yield f"model.layers.{layer}.{name}", shape


def full_shapes(sizes: Sizes, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Qwen2ForCausalLM with tied embeddings."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, sizes.hidden)}
    for name, shape in linear_shapes(sizes, layers):
        shapes[f"{name}.weight"] = shape
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            shapes[f"{name}.bias"] = shape[:1]
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{norm}.weight"] = (sizes.hidden,)
    return shapes | {"model.norm.weight": (sizes.hidden,)}


def make_full(folder: str, sizes: Row, layers: int, vocabulary: int, count: int) -> Row:
    """`base` and `c1` to `cK`: bfloat16 models; the walk itself is float32, 1e-3 a step."""
    import torch
    from safetensors.torch import save_file
    from transformers import Qwen2Config

    size = Sizes(**sizes)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: 0.02 * torch.randn(shape, generator=generator)
        for name, shape in full_shapes(size, layers, vocabulary).items()
    }
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.kv // 64,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    )
    for name in ("base", *(f"c{k}" for k in range(1, count + 1))):
        if name != "base":
            for tensor in state.values():
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
        where = Path(folder) / name
        where.mkdir(parents=True)
        config.save_pretrained(where)
        half = {key: tensor.bfloat16() for key, tensor in state.items()}
        save_file(half, where / "model.safetensors", {"format": "pt"})
    return {"bytes": (Path(folder) / "base/model.safetensors").stat().st_size}


def tree(sizes: Row) -> Any:
    """A bare module tree of linear layers (torch), without memory behind it."""
    import torch

    root = torch.nn.Module()
    for name, (out, into) in linear_shapes(Sizes(**sizes), sizes["lora_layers"]):
        at = root
        *parents, last = name.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = getattr(at, part)
        at.add_module(last, torch.nn.Linear(into, out, bias=False, device="meta"))
    return root


def make_adapters(folder: str, sizes: Row, count: int) -> Row:
    """`a1` to `aK`: float32 LoRA adapters with alpha = r; a walk from a random A and B = 0, 1e-3 a step."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    size = Sizes(**sizes)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, (out, into) in linear_shapes(size, size.lora_layers):
        a = (2 * torch.rand(size.rank, into, generator=generator) - 1) / into**0.5
        for side, tensor in (("A", a), ("B", torch.zeros(out, size.rank))):
            state[f"base_model.model.{name}.lora_{side}.weight"] = tensor
    targets = sorted({name.rpartition(".")[2] for name, _ in linear_shapes(size, 1)})
    for k in range(1, count + 1):
        for tensor in state.values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=1e-3)
        where = Path(folder) / f"a{k}"
        where.mkdir(parents=True)
        save_file(state, where / "adapter_model.safetensors", {"format": "pt"})
        LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=targets).save_pretrained(where)
    return {"bytes": (Path(folder) / "a1/adapter_model.safetensors").stat().st_size}


# -- workers: each runs in a process of its own ------------------------------------------------------


def merge_in_process(small: Row, job: Row) -> Row:
    """CPU seconds of `gtr_turbo.merging.merge` after a small merge of the same kind."""
    from gtr_turbo.merging import merge

    merge(**small)
    began = time.process_time(), time.perf_counter()
    report = merge(**job)
    return {
        "cpu": time.process_time() - began[0],
        "wall": time.perf_counter() - began[1],
        "cached": report.plan.cached,
        "warnings": report.warnings,
    }


def peft_in_process(inputs: list[list[str]], sizes: list[Row], out: str) -> Row:
    """CPU seconds of `add_weighted_adapter` alone, after a small one; the adapters are loaded before."""
    import torch
    from peft import PeftModel

    torch.set_num_threads(1)
    for paths, size in zip(inputs, sizes, strict=True):
        root = tree(size).to_empty(device="cpu")
        names = [f"a{k}" for k in range(len(paths))]
        model = PeftModel.from_pretrained(root, paths[0], names[0], low_cpu_mem_usage=True)
        for path, name in zip(paths[1:], names[1:], strict=True):
            model.load_adapter(path, name, low_cpu_mem_usage=True)
        began = time.process_time(), time.perf_counter()
        ones = [1.0] * len(names)
        model.add_weighted_adapter(names, ones, "merged", "ties", density=DENSITY)
        took = time.process_time() - began[0], time.perf_counter() - began[1]
    model.save_pretrained(out, selected_adapters=["merged"])
    return {"cpu": took[0], "wall": took[1]}


def compare(one: str, other: str, base: str | None = None) -> Row:
    """How two files of tensors differ, entry by entry; `base` gives the relative error of the change too."""
    import torch
    from safetensors import safe_open

    total = differing = beyond = 0
    error = change = 0.0
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        if odd := set(a.keys()) ^ set(b.keys()):
            raise RuntimeError(f"{one} and {other} hold different tensors: {sorted(odd)[:3]}")
        for name in a.keys():  # noqa: SIM118 - not a dict
            x, y = a.get_tensor(name), b.get_tensor(name)
            kind = torch.int16 if x.dtype == torch.bfloat16 else torch.int32
            most = torch.iinfo(kind).max
            places = [t.view(kind).long() for t in (x, y)]
            # sign and magnitude to a number that counts floats in order; -0 and 0 are one place
            steps = [torch.where(p < 0, -(p & most), p) for p in places]
            differing += int((places[0] != places[1]).sum())
            beyond += int(((steps[0] - steps[1]).abs() > 1).sum())
            total += x.numel()
            if base is not None:
                with safe_open(base, "pt") as start:
                    known = start.get_tensor(name).float()
                error += float((x.float() - y.float()).square().sum())
                change += float((y.float() - known).square().sum())
    found = {"entries": total, "differing": differing, "more_than_1_ulp": beyond}
    return found | ({"relative_error_of_change": (error / change) ** 0.5} if base else {})


def accumulate(entries: int, count: int) -> Row:
    """CPU seconds of one more checkpoint in the running sums, and of a merge of all of them."""
    import torch

    from gtr_turbo.merging.methods import Recipe
    from gtr_turbo.merging.tensors import RunningTies, merge_tensors

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    walk = torch.zeros(entries)
    deltas = []
    for _ in range(count):
        walk.add_(torch.randn(entries, generator=generator), alpha=1e-3)
        deltas.append(walk.clone())
    recipe = Recipe(method="ties", weights=(1 / count,) * count, density=DENSITY)
    few = [delta[:5000] for delta in deltas]
    merge_tensors(few, recipe)
    running = RunningTies(few[0])
    running.add(few[0], 1.0, density=DENSITY)
    running.merged()
    running = RunningTies(walk)
    for delta in deltas[:-1]:
        running.add(delta, 1.0, density=DENSITY)
    began = time.process_time()
    running.add(deltas[-1], 1.0, density=DENSITY)
    merged = running.merged()
    middle = time.process_time()
    scratch = merge_tensors(deltas, recipe)
    end = time.process_time()
    differing = int((merged.view(torch.int32) != scratch.view(torch.int32)).sum())
    return {
        "ours": middle - began,
        "scratch": end - middle,
        "differing": differing,
        "entries": entries,
    }


def merge_pass(entries: int, count: int) -> Row:
    """CPU seconds of the pass that merges with known thresholds, and of a memcpy that moves as many bytes."""
    import numpy as np

    from gtr_turbo.merging.methods import Recipe, Rows, find_tensor_cuts, merge_chunks
    from gtr_turbo.merging.trim import backend

    kernels = backend()
    rng = np.random.default_rng(0)
    walk = np.float32(0.02) * rng.standard_normal(entries, np.float32)
    base = (walk.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    rows = np.empty((count, entries), np.uint16)
    for row in rows:
        walk += np.float32(1e-3) * rng.standard_normal(entries, np.float32)
        row[:] = walk.view(np.uint32) >> np.uint32(16)
    recipe = Recipe(method="ties", weights=(1.0,) * count, density=DENSITY)
    source, made = Rows(rows, base), np.zeros(entries, np.uint16)
    cuts = find_tensor_cuts(source, DENSITY, kernels)

    def sink(at: int, known: Any, merged: Any) -> None:
        kernels.finish(merged, known, np.float32(1), made[at : at + len(merged)])

    moved = entries * 2 * (count + 2)  # rows and base are read, one is written
    here, there = np.ones(moved // 2, np.uint8), np.zeros(moved // 2, np.uint8)
    merges: list[float] = []
    copies: list[float] = []
    selections: list[float] = []
    for _ in range(6):  # the first of each is a warm-up
        for times, action in (
            (merges, lambda: merge_chunks(source, recipe, sink, kernels=kernels, cuts=list(cuts))),
            (copies, lambda: np.copyto(there, here)),
            (selections, lambda: find_tensor_cuts(source, DENSITY, kernels)),
        ):
            began = time.process_time()
            action()
            times.append(time.process_time() - began)
    merge, copy, select = (statistics.median(times[1:]) for times in (merges, copies, selections))
    return {
        "pass_gbs": moved / merge / 1e9,
        "memcpy_gbs": moved / copy / 1e9,
        "merge_s": merge,
        "select_s": select,
    }


WORKERS: dict[str, Callable[..., Row]] = {
    "make-full": make_full,
    "make-adapters": make_adapters,
    "merge": merge_in_process,
    "peft": peft_in_process,
    "compare": compare,
    "accumulate": accumulate,
    "merge-pass": merge_pass,
}


# -- the contests ------------------------------------------------------------------------------------


class Bench:
    """The temporary folder, and what is in it by now."""

    def __init__(self, folder: Path, *, pairs: int, quick: bool) -> None:
        self.folder, self.pairs = folder, pairs
        self.sizes = QUICK if quick else Sizes()
        self.small = self.models("small", WARM, 1, WARM.vocabulary)
        self.small_lora = self.adapters("small-lora", WARM)
        self.command(self.small)  # fills numba's cache
        self.command(self.small_lora, "factors")

    def _made(self, name: str, worker: str, **given: Any) -> Path:
        """A folder of inputs, made once."""
        where = self.folder / name
        if not where.exists():
            work(worker, folder=where, **given)
        return where

    def models(self, name: str, sizes: Sizes, layers: int, vocabulary: int) -> Path:
        """Four models and their base."""
        given = {"layers": layers, "vocabulary": vocabulary, "count": 4}
        return self._made(name, "make-full", sizes=asdict(sizes), **given)

    def adapters(self, name: str, sizes: Sizes) -> Path:
        """Eight adapters."""
        return self._made(name, "make-adapters", sizes=asdict(sizes), count=8)

    def full(self) -> Path:
        """The models most contests are about."""
        return self.models("full", self.sizes, self.sizes.full_layers, self.sizes.vocabulary)

    def fresh(self, name: str) -> Path:
        """A folder that is not there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def given(self, inputs: Path, kind: str, count: int) -> Row:
        """Arguments of `merge`; `kind` is `factors` or a method for full models."""
        found: Row = {"weights": [1.0] * count, "threads": 1}
        letter = "a" if kind == "factors" else "c"
        found["checkpoints"] = [inputs / f"{letter}{k}" for k in range(1, count + 1)]
        if kind == "linear":
            return found | {"method": "linear"}
        more = {"form": "factors"} if kind == "factors" else {"base": inputs / "base"}
        return found | {"density": DENSITY} | more

    def command(
        self,
        inputs: Path,
        kind: str = "ties",
        count: int = 4,
        env: Row | None = None,
        threads: int = 1,
    ) -> Row:
        """Run `gtr-turbo merge` with the same arguments; the result lies in `out`."""
        given = self.given(inputs, kind, count) | {"threads": threads}
        words = [COMMANDS / "gtr-turbo", "merge", *given.pop("checkpoints")]
        given["weights"] = ",".join(map(str, given["weights"]))
        for key, value in given.items():
            words += [f"--{key}", str(value)]
        return measure([*words, "--out", self.fresh("out"), "--json"], env)[0]

    def in_process(self, inputs: Path, kind: str = "ties", count: int = 4, **more: Any) -> Row:
        """Run `merge` in a process that has merged before; the result lies in `out`."""
        small = self.small_lora if kind == "factors" else self.small
        jobs = [
            self.given(where, kind, count) | {"out": self.fresh(out)} | more
            for where, out in ((small, "warm"), (inputs, "out"))
        ]
        return work("merge", small=jobs[0], job=jobs[1])


Found = tuple[list[Line], list[Row]]


def factors(bench: Bench, count: int) -> Found:
    """TIES on LoRA factors."""
    name, inputs, rows = f"factors-K{count}", bench.adapters("lora", bench.sizes), []
    for _ in range(bench.pairs):
        row = of("command", bench.command(inputs, "factors", count))
        theirs = bench.fresh("peft")
        both = [
            [str(where / f"a{k}") for k in range(1, count + 1)]
            for where in (bench.small_lora, inputs)
        ]
        row |= of(
            "peft", work("peft", inputs=both, sizes=[asdict(WARM), asdict(bench.sizes)], out=theirs)
        )
        row |= of("ours", bench.in_process(inputs, "factors", count))
        file = "adapter_model.safetensors"
        row |= work("compare", one=bench.folder / "out" / file, other=theirs / "merged" / file)
        rows.append(row)
    return [
        line(f"{name}: CPU, in process / PEFT", rows, "ours_cpu", "peft_cpu", ">= 30"),
        line(f"{name}: CPU, whole command / PEFT's merge", rows, "command_cpu", "peft_cpu"),
        differing(name, rows, "<= 0"),
    ], rows


def full(bench: Bench, method: str) -> Found:
    """Full models; mergekit."""
    name, inputs, rows = f"full-{method}", bench.full(), []
    each: Row = {"weight": 1.0} | ({"density": DENSITY} if method == "ties" else {})
    settings: Row = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [{"model": str(inputs / f"c{k}"), "parameters": each} for k in range(1, 5)],
        "parameters": {"normalize": True},
    }
    if method == "ties":
        settings["base_model"] = str(inputs / "base")
    recipe = bench.folder / "recipe.yaml"
    recipe.write_text(json.dumps(settings))  # JSON is YAML
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--no-cuda", "--num-threads", "1"]
    for _ in range(bench.pairs):
        row = of("ours", bench.command(inputs, method))
        theirs = bench.fresh("mergekit")
        row |= of("mergekit", measure([COMMANDS / "mergekit-yaml", recipe, theirs, *options])[0])
        rows.append(row)
    (merged,) = theirs.glob("*.safetensors")
    ours, base = (bench.folder / where / "model.safetensors" for where in ("out", "full/base"))
    rows[-1] |= work("compare", one=ours, other=merged, base=base)
    bench.fresh("mergekit")
    goal = ">= 20" if method == "ties" else ">= 8"
    return [
        line(f"{name}: CPU, whole command / mergekit", rows, "ours_cpu", "mergekit_cpu", goal),
        line(f"{name}: wall / mergekit", rows, "ours_wall", "mergekit_wall"),
        line(f"{name}: resident set / mergekit", rows, "ours_rss_mb", "mergekit_rss_mb", ">= 5"),
        line(f"{name}: anonymous memory / mergekit", rows, "ours_anon_mb", "mergekit_anon_mb"),
        differing(name, rows[-1:], "<= 0" if method == "linear" else ""),
    ], rows


def remerge(bench: Bench) -> Found:
    """Kept thresholds."""
    inputs, rows, first = bench.full(), [], bench.folder / "first.safetensors"
    made = bench.folder / "out/model.safetensors"
    for _ in range(bench.pairs):
        row = of("scratch", bench.in_process(inputs))
        made.replace(first)
        row |= of("keeping", bench.in_process(inputs, keep_thresholds=True))
        row |= of("again", bench.in_process(inputs))
        for kept in bench.folder.glob("*/c?/merge-thresholds.json"):
            kept.unlink()
        if row["again_cached"] != 4 or not filecmp.cmp(made, first, shallow=False):
            raise RuntimeError(f"a merge with kept thresholds is not the same: {row}")
        rows.append(row)
    return [
        line(
            "remerge: CPU, thresholds kept / from scratch", rows, "again_cpu", "scratch_cpu", ">= 3"
        ),
        line("remerge: CPU, keeping them / not", rows, "keeping_cpu", "scratch_cpu", cost=True),
    ], rows


def running(bench: Bench) -> Found:
    """Running sums."""
    rows = [work("accumulate", entries=bench.sizes.entries, count=8) for _ in range(bench.pairs)]
    what = "accumulate: CPU, add + merged / merge of 8"
    return [
        line(what, rows, "ours", "scratch", ">= 3"),
        differing("accumulate", rows, "<= 0"),
    ], rows


def limits(bench: Bench) -> Found:
    """The machine."""
    inputs, rows = bench.full(), []
    files = [str(inputs / name / "model.safetensors") for name in ("base", "c1", "c2", "c3", "c4")]
    for _ in range(bench.pairs):
        row = work("merge-pass", entries=bench.sizes.entries, count=4)
        row |= of("command", bench.command(inputs)) | of("ours", bench.in_process(inputs))
        copying = f"cat {' '.join(files)} > /dev/null && cp {files[0]} {bench.folder / 'copy'}"
        row |= of("copy", measure(["sh", "-c", copying])[0])
        (bench.folder / "copy").unlink()
        rows.append(row)
    what = "limits: CPU, file to file / cat + cp, "
    return [
        line("limits: merge pass / memcpy", rows, "pass_gbs", "memcpy_gbs", ">= 0.5", cost=True),
        line(f"{what}command", rows, "command_cpu", "copy_cpu", "<= 8", cost=True),
        line(f"{what}in process", rows, "ours_cpu", "copy_cpu", "", cost=True),
    ], rows


def memory(bench: Bench) -> Found:
    """Anonymous memory and the size of tensors."""
    lines, rows = [], []
    for threads in (1, 2):
        for times in (1, 8):
            entries = times * bench.sizes.vocabulary
            inputs = bench.models(f"embedding-{times}", bench.sizes, 1, entries)
            some = []
            for _ in range(bench.pairs):
                row = of("idle", bench.command(bench.small, threads=threads))
                row |= of("ours", bench.command(inputs, threads=threads))
                row["above_mb"] = row["ours_anon_mb"] - row["idle_anon_mb"]
                some.append(row | {"threads": threads, "times": times})
            rows += some
            bound = 64 + threads * 4 * (1 << 17) * 2 / 1e6
            above, idle = middle(some, "above_mb"), middle(some, "idle_anon_mb")
            what = f"above idle, {threads} threads, {entries * bench.sizes.hidden * 2 / 1e6:.0f} MB tensor"
            lines.append(Line("memory", what, above, idle, "MB", above, f"<= {bound:.1f}"))
    return lines, rows


def compiling(bench: Bench) -> Found:
    """An empty numba cache, then a full one."""
    lines, rows = [], []
    for kind, inputs in (("ties", bench.small), ("factors", bench.small_lora)):
        with tempfile.TemporaryDirectory(dir=bench.folder) as cache:
            env = {"NUMBA_CACHE_DIR": cache}
            first, later = (bench.command(inputs, kind, env=env) for _ in range(2))
        rows.append({"kind": kind} | of("first", first) | of("later", later))
        what = f"compile: CPU of a small merge, {kind}, first / later"
        lines.append(line(what, rows[-1:], "first_cpu", "later_cpu", cost=True))
    return lines, rows


CONTESTS: dict[str, Callable[[Bench], Found]] = {
    "compile": compiling,
    "factors-K4": lambda bench: factors(bench, 4),
    "factors-K5": lambda bench: factors(bench, 5),
    "factors-K8": lambda bench: factors(bench, 8),
    "full-ties": lambda bench: full(bench, "ties"),
    "full-linear": lambda bench: full(bench, "linear"),
    "remerge": remerge,
    "accumulate": running,
    "limits": limits,
    "memory": memory,
}
LAST_USE = {"factors-K8": "lora", "limits": "full"}


def machine() -> Row:
    """What it runs on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.machine()),
        "cpus": os.cpu_count(),
        "threads": "1 on both sides, unless a line says otherwise",
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTS, help="some of the contests")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny inputs, one pair: does it run?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WORKERS[options.worker[0]](**json.loads(options.worker[1]))))
        return
    result: Row = {"command": "python benchmarks/merge.py", "contests": {}}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text())
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-") as folder:
        bench = Bench(
            Path(folder), pairs=1 if options.quick else options.pairs, quick=options.quick
        )
        print(
            f"{'contest':12} {'ours / the other':44} {'ours':>10} {'other':>10}         ratio  goal"
        )
        for name in options.only or CONTESTS:
            on = machine()
            lines, rows = CONTESTS[name](bench)
            print(*lines, sep="\n", flush=True)
            shown = [asdict(line) | {"reached": line.reached} for line in lines]
            result["contests"][name] = {"machine": on, "lines": shown, "measurements": rows}
            if not options.only and name in LAST_USE:
                bench.fresh(LAST_USE[name])
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
