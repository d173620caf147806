"""Trim thresholds kept beside a checkpoint: they depend on it alone, so the next merge needs one pass less."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gtr_turbo.merging.arrays import INFINITE
from gtr_turbo.merging.shards import Checkpoint, MergeError
from gtr_turbo.merging.trim import Cut

THRESHOLDS = "merge-thresholds.json"


def save_thresholds(
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint,
    density: float,
    tensors: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Write the thresholds that a merge found beside each checkpoint; `tensors` is from `jobs.describe`.

    Returns:
        Which could not be written, and why: the merge is there all the same.
    """
    origin, failed = base.fingerprint(), []
    for k, checkpoint in enumerate(checkpoints):
        text = json.dumps(
            {
                "density": density,
                "base": origin,
                "checkpoint": checkpoint.fingerprint(),
                "cuts": {name: lines["cuts"][k] for name, lines in tensors.items()},
            }
        )
        where = _thresholds_file(checkpoint)
        part = where.with_name(where.name + ".part")
        try:
            part.write_text(text + "\n")
            part.replace(where)
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            failed.append(f"the thresholds of {checkpoint.path} could not be kept: {error}")
    return failed


def _thresholds_file(checkpoint: Checkpoint) -> Path:
    path = checkpoint.path
    return path / THRESHOLDS if path.is_dir() else path.with_suffix(f".{THRESHOLDS}")


def load_thresholds(
    checkpoint: Checkpoint, base: Checkpoint, density: float
) -> dict[str, Cut] | None:
    """Thresholds kept beside a checkpoint, if they are of these files and this density.

    They are checked again entry by entry while merging (`Tally.exact`).

    Raises:
        MergeError: the file is damaged.
    """
    file = _thresholds_file(checkpoint)
    if not file.exists():
        return None
    try:
        kept = json.loads(file.read_text())
        cuts = {name: Cut(*(int(n) for n in numbers)) for name, numbers in kept["cuts"].items()}
        of = (kept["density"], kept["base"], kept["checkpoint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MergeError(f"{file} cannot be read ({error}); delete it and merge again") from error
    if of != (density, base.fingerprint(), checkpoint.fingerprint()):
        return None
    if set(cuts) != set(checkpoint.entries):
        return None
    for name, cut in cuts.items():
        size = checkpoint.entries[name].size
        if not (0 <= cut.magnitude < INFINITE and 0 <= cut.need <= size):
            raise MergeError(f"{file}: the threshold of tensor {name!r} is impossible; delete it")
    return cuts
