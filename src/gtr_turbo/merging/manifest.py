"""What a merge says of itself: `merged-from.json`, and warnings where it did not do what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gtr_turbo import __version__
from gtr_turbo.merging.shards import Checkpoint

MANIFEST = "merged-from.json"
MANY_TIES = 0.01
"""Fraction of a tensor's entries; more of them equal to the threshold make the trim a matter of their order."""
INTERNAL = ("cuts", "unchanged")
"""Lines of a tensor that are not written."""


def made_from(
    settings: dict[str, Any],
    checkpoints: Sequence[Checkpoint],
    base: Checkpoint | None,
    tensors: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The manifest of a merge.

    Args:
        settings: what was asked for.
        checkpoints: the oldest first.
        base: None if there was none.
        tensors: what the jobs say of the tensors they wrote, by name.
    """

    def described(checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "path": str(checkpoint.path),
            "bytes": checkpoint.nbytes,
            "fingerprint": checkpoint.fingerprint(),
        }

    return {
        "made_by": f"gtr-turbo {__version__} merge",
        "settings": settings,
        "checkpoints": [described(checkpoint) for checkpoint in checkpoints],
        "base": None if base is None else described(base),
        "warnings": _warnings(settings["density"], tensors),
        "tensors": {
            name: {key: value for key, value in lines.items() if key not in INTERNAL}
            for name, lines in tensors.items()
        },
    }


def _warnings(density: float, tensors: dict[str, dict[str, Any]]) -> list[str]:
    """Where trimming did not do what it is for."""
    found = []
    trimmed = {name: lines for name, lines in tensors.items() if lines.get("cuts") and density < 1}
    changed = {name: lines for name, lines in trimmed.items() if not lines["unchanged"]}
    if trimmed and not changed:
        found.append(
            f"no checkpoint differs from the base in any of the {len(trimmed)} tensors: the merge is the base"
        )
    idle = {
        name: max(lines["zero_fraction"])
        for name, lines in changed.items()
        if max(lines["zero_fraction"]) > 1 - density
    }
    if idle:
        worst = max(idle, key=lambda name: idle[name])
        found.append(
            f"in {len(idle)} of {len(changed)} tensors more changes are exactly zero than density {density} "
            f"trims (up to {idle[worst]:.1%}, {worst}), so trimming removed nothing there. Checkpoints "
            "rounded to bfloat16 do this: keep them in float32, or as adapters"
        )
    tied = [
        name
        for name, lines in changed.items()
        if name not in idle
        and max(lines["ties_at_threshold"]) > max(1, MANY_TIES * lines["entries"])
    ]
    if tied:
        found.append(
            f"in {len(tied)} of {len(changed)} tensors ({tied[0]} ...) more than {MANY_TIES:.0%} of the changes "
            "equal the threshold: which of them are kept is decided by their index. Coarse number formats do this"
        )
    return found
