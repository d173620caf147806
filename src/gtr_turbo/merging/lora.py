"""LoRA adapters of one run as merge inputs: what each changes, and the change as an adapter again.

An adapter changes a layer's weight by dW = scale * B @ A. A and B mean nothing apart, so merging acts on dW;
the merged dW is a full matrix. Four forms of the result:

    dense     base + merged dW, as full weights: exact
    adapter   merged dW cut to a rank by a randomised SVD (Halko et al. 2011); what is lost is reported
    cat       linear merges only: the factors side by side, exact at the sum of the ranks
    factors   A and B merged apart, as PEFT's `add_weighted_adapter` does: for parity with published code
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gtr_turbo.merging.arrays import Floats, Numbers, widen
from gtr_turbo.merging.methods import Recipe
from gtr_turbo.merging.shards import Checkpoint, Entry, MergeError

FACTOR = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
HALF = re.compile(r"\.lora_[AB]\.")
"""In any name of one factor; in memory, and in what a run resumes from, PEFT adds the adapter's name."""
PLAIN_INIT = (True, False, "gaussian", "orthogonal", "eva")
SKETCH = 16
"""Columns of the randomised SVD's sketch beyond the rank."""
VISION = ("visual", "vision_tower", "vision_model", "vision_encoder")


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted layer."""

    a: Entry
    """(r, in)."""
    b: Entry
    """(out, r)."""
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of dW."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]


@dataclass
class Adapter:
    """A PEFT LoRA folder, not loaded."""

    path: Path
    config: dict[str, Any]
    weights: Checkpoint
    modules: dict[str, Module]

    @classmethod
    def open(cls, path: Path) -> Adapter:
        """Read config and headers.

        Raises:
            MergeError: damaged, or a kind of adapter whose change is not scale * B @ A alone.
        """
        try:
            config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError(f"it holds a {type(config).__name__}")
        except (ValueError, OSError, RecursionError) as error:
            raise MergeError(f"{path}/adapter_config.json cannot be read ({error})") from error
        check_kind(path, config)
        weights = Checkpoint.open(path, stem="adapter_model")
        try:
            return cls(path, config, weights, _modules(path, config, weights))
        except BaseException:
            weights.close()
            raise

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *error: object) -> None:
        self.weights.close()

    def factors(self, name: str) -> tuple[Floats, Floats]:
        """(A, B) of a module, float32."""
        module = self.modules[name]
        a, b = (widen(self.weights.tensor(entry)) for entry in (module.a, module.b))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise MergeError(
                f"module {name!r} of {module.a.file} holds a number that is not finite"
            )
        return a, b


def _modules(path: Path, config: dict[str, Any], weights: Checkpoint) -> dict[str, Module]:
    """The layers that an adapter's tensors change.

    Raises:
        MergeError: as `Adapter.open`.
    """
    sides: dict[str, dict[str, Entry]] = {}
    for name, entry in weights.entries.items():
        found = FACTOR.match(name)
        if found is None or len(entry.shape) != 2:
            raise MergeError(
                f"{entry.file}: tensor {name!r} {list(entry.shape)} is not a factor of a linear layer's "
                "LoRA, and would be lost; merge full checkpoints instead"
            )
        entry.check_type()
        sides.setdefault(found["module"], {})[found["side"]] = entry
    modules = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise MergeError(f"{path}: module {module!r} has no matching lora_A and lora_B")
        try:
            scale = _scale(config, module, pair["A"].shape[0])
            if not math.isfinite(scale):
                raise ValueError(f"a scale of {scale}")
        except (ValueError, TypeError, AttributeError, ArithmeticError, re.error) as error:
            raise MergeError(
                f"{path}/adapter_config.json: lora_alpha or alpha_pattern cannot be read ({error})"
            ) from error
        modules[module] = Module(pair["A"], pair["B"], scale)
    return modules


def is_vision(name: str) -> bool:
    """Whether a parameter or module belongs to the vision tower."""
    return any(part in VISION for part in name.split("."))


def is_adapter(path: Path) -> bool:
    """True of a PEFT folder."""
    return (path / "adapter_config.json").is_file()


def check_kind(path: Path, config: dict[str, Any]) -> None:
    """Refuse the settings of an adapter whose change is not scale * B @ A alone.

    Raises:
        MergeError: the setting that makes it so.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise MergeError(f"{path} is a {kind} adapter, not LORA")
    for key, fine in (
        ("use_dora", (False, None)),
        ("use_qalora", (False, None)),
        ("use_bdlora", (False, None)),
        ("monteclora_config", (None,)),
        ("arrow_config", (None,)),
        ("kasa_config", (None,)),
        ("lora_bias", (False, None)),
        ("bias", ("none", None)),
        ("fan_in_fan_out", (False, None)),
        ("modules_to_save", (None, [])),
        ("trainable_token_indices", (None, [], {})),
        ("target_parameters", (None, [])),
        ("layer_replication", (None, [])),
        ("alora_invocation_tokens", (None, [])),
        ("init_lora_weights", (*PLAIN_INIT, None)),
    ):
        if config.get(key) not in fine:
            raise MergeError(
                f"{path}: its adapter_config.json has {key} = {config[key]!r}, with which the change is not "
                "scale * B @ A alone. Make full weights of it (PEFT's merge_and_unload) and use those"
            )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling: alpha / r, or alpha / sqrt(r) with rslora; patterns as PEFT matches them."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def check_family(adapters: Sequence[Adapter]) -> None:
    """Adapters can be merged only if they change the same layers of the same base.

    Raises:
        MergeError: names what differs, and where.
    """
    first = adapters[0]
    for other in adapters[1:]:
        ours, theirs = (a.config.get("base_model_name_or_path") for a in (first, other))
        if ours != theirs:
            raise MergeError(
                f"{first.path} and {other.path} change different bases: {ours!r} and {theirs!r}"
            )
        if odd := sorted(set(first.modules) ^ set(other.modules)):
            lacks = first.path if odd[0] in other.modules else other.path
            raise MergeError(f"{lacks} has no adapter for module {odd[0]!r}, the other has one")
        for name, module in other.modules.items():
            if module.shape != first.modules[name].shape:
                raise MergeError(
                    f"module {name!r} is {first.modules[name].shape} in {first.path} and {module.shape} in "
                    f"{other.path}"
                )


def base_name(module: str, base: Checkpoint) -> str:
    """The name in the base's files of a module's weight.

    Models in memory and in files are named alike up to a prefix (`model.language_model.layers.0` is
    `model.layers.0` in some), so the longest ending that names exactly one tensor is taken, or one of the vision
    tower and one of the language model.

    Raises:
        MergeError: there is none, or more than one.
    """
    parts = f"{module}.weight".split(".")
    numbered = [place for place, part in enumerate(parts) if part.isdigit()]
    last = min(numbered, default=len(parts) - 2)  # a layer's number is never left out
    for first in range(last + 1):
        ending = ".".join(parts[first:])
        found = [
            name
            for name in base.entries
            if name == ending
            or (name.endswith(f".{ending}") and not re.search(r"\d", name[: -len(ending)]))
        ]
        if len(found) == 1:
            return found[0]
        alike = [name for name in found if is_vision(name) == is_vision(module)]
        if len(alike) == 1:
            return alike[0]
        if found:
            raise MergeError(
                f"the base {base.path} has {len(found)} tensors that may be the weight of module {module!r}: "
                f"{', '.join(found[:4])}; is it the model the adapters were trained on?"
            )
    raise MergeError(
        f"the base {base.path} has no tensor that is clearly the weight of module {module!r}; is it the "
        "model the adapters were trained on?"
    )


class Product:
    """A `Source`: the changes dW of one module in K adapters, made in blocks of rows."""

    exact16 = False
    origin: Path | None = None

    def __init__(self, adapters: Sequence[Adapter], module: str, chunk: int) -> None:
        self.count = len(adapters)
        self._scales = [adapter.modules[module].scale for adapter in adapters]
        self._factors = [adapter.factors(module) for adapter in adapters]
        self._rows, self._columns = adapters[0].modules[module].shape
        self.size = self._rows * self._columns
        self._step = max(1, chunk // max(1, self._columns))
        self._kept: tuple[Numbers, Numbers] | None = None

    def chunks(self) -> Iterator[tuple[Numbers, Numbers]]:
        """Blocks of whole rows; `base` is always empty, as the rows are changes already."""
        if self._kept is not None:
            yield self._kept
            return
        step = min(self._step, self._rows)
        memory = np.empty(self.count * step * self._columns, np.float32)
        for first in range(0, self._rows, max(1, step)):
            count = min(step, self._rows - first)
            block = memory[: self.count * count * self._columns].reshape(
                self.count, count, self._columns
            )
            for change, scale, (a, b) in zip(block, self._scales, self._factors, strict=True):
                np.matmul(b[first : first + count], a, out=change)
                change *= np.float32(scale)
            made = block.reshape(self.count, -1), np.empty(0, np.float32)
            if count == self._rows:
                self._kept = made
            yield made


def low_rank(
    change: Floats, rank: int, rng: np.random.Generator, *, passes: int = 2
) -> tuple[Floats, Floats, float]:
    """The best factors of a rank for a matrix, nearly (Halko, Martinsson and Tropp 2011, algorithm 4.4).

    Args:
        change: (out, in) float32.
        rank: r.
        rng: of the sketch.
        passes: power iterations.

    Returns:
        A (r, in) and B (out, r), zero-padded where the matrix has a smaller side, and the fraction of the
        squared Frobenius norm that B @ A lacks.
    """
    out, into = change.shape
    width = min(rank + SKETCH, out, into)
    sketch = change @ rng.standard_normal((into, width), np.float32)
    for _ in range(passes):
        sketch = change @ np.linalg.qr(change.T @ np.linalg.qr(sketch)[0])[0]
    basis = np.linalg.qr(sketch)[0]
    left, values, right = np.linalg.svd(basis.T @ change, full_matrices=False)
    kept = min(rank, width)
    root = np.sqrt(values[:kept])
    a, b = np.zeros((rank, into), np.float32), np.zeros((out, rank), np.float32)
    a[:kept] = root[:, None] * right[:kept]
    b[:, :kept] = (basis @ left[:, :kept]) * root
    energy = float(np.einsum("ij,ij", change, change, dtype=np.float64))  # makes no copy of it
    found = float(np.square(values[:kept], dtype=np.float64).sum())
    return a, b, max(0.0, 1 - found / energy) if energy else 0.0


def concatenate(
    factors: Sequence[tuple[Floats, Floats]], weights: Sequence[float], rank: int | None
) -> tuple[Floats, Floats, float]:
    """The weighted sum of changes B @ A as one pair of factors.

    Args:
        factors: (A (r, in), B (out, r)) of each checkpoint, ranks may differ.
        weights: the factor of each, its scale included.
        rank: None keeps the sum of the ranks, which is exact; else cut to this rank by QR of both sides and an
            SVD of the small middle, which is optimal.

    Returns:
        A, B, and the fraction of the squared Frobenius norm that was lost.
    """
    a = np.concatenate([pair[0] for pair in factors])
    b = np.concatenate(
        [np.float32(w) * pair[1] for w, pair in zip(weights, factors, strict=True)], axis=1
    )
    if rank is None:
        return a, b, 0.0
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(b), np.linalg.qr(a.T)
    left, values, right = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    small_a, small_b = (
        np.zeros((rank, a.shape[1]), np.float32),
        np.zeros((len(b), rank), np.float32),
    )
    small_a[:kept] = root[:, None] * (right[:kept] @ q_right.T)
    small_b[:, :kept] = (q_left @ left[:, :kept]) * root
    energy = np.square(values, dtype=np.float64)
    total = float(energy.sum())
    return small_a, small_b, max(0.0, 1 - float(energy[:kept].sum()) / total) if total else 0.0


def parity_recipe(recipe: Recipe, adapters: Sequence[Adapter], module: str) -> Recipe:
    """The recipe PEFT uses on each factor: the root of weight * scale, its own votes and divisor."""
    scales = [adapter.modules[module].scale for adapter in adapters]
    weights = tuple((w * s) ** 0.5 for w, s in zip(recipe.weights, scales, strict=True))
    return Recipe(method="ties", weights=weights, density=recipe.density, compat="peft")


def merged_config(adapters: Sequence[Adapter], rank: int) -> dict[str, Any]:
    """The newest adapter's config, for factors whose scale is 1."""
    return adapters[-1].config | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "inference_mode": True,
        "init_lora_weights": True,
    }
