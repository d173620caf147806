"""A run folder as data. Damaged lines are skipped and counted; what is not there is said."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST = 1e100
"""A number of this size is taken for none: sums and squares of such could not be shown."""


class ReportError(ValueError):
    """A folder or an option from which no report can be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTurn:
    """A line of `trajectories/NNNNNN.jsonl`, checked."""

    update: int
    """The update it was collected in, from the file's name."""
    env: int
    episode: int
    step: int
    prompt: str
    reply: str
    frame: str = ""
    """Path relative to `trajectories/`; not yet checked."""
    action: str = ""
    valid: bool = False
    legal: bool = False
    terminated: bool = False
    truncated: bool = False
    success: bool | None = None
    reward: float | None = None
    format_reward: float | None = None
    value: float | None = None
    advantage: float | None = None
    facts: Mapping[str, bool] = field(default_factory=dict)
    kl: Sequence[float | None] | None = None
    """KL estimate of each thought token; None if the run did not measure it."""
    tokens: Sequence[str] | None = None
    """The reply's tokens; None in lines of older runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run folder holds."""

    folder: Path
    label: str
    """The folder's name, made unique among the runs of the report."""
    config: Mapping[str, Any]
    """The resolved config; empty if there is none."""
    rows: Sequence[Mapping[str, float]]
    """Rows of metrics.jsonl by update; finite numbers only."""
    summary: Mapping[str, Any]
    """summary.json; empty before the end of a run."""
    turns: Sequence[StoredTurn]
    """In the order of the files."""
    warnings: Sequence[str]

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.config.get("name") or self.summary.get("name") or self.label)

    @property
    def seed(self) -> Any:
        """The run's seed; None if it is not known."""
        return self.config.get("seed", self.summary.get("seed"))

    def group(self, name: str) -> Mapping[str, Any]:
        """A group of settings; empty if there is none."""
        group = self.config.get(name)
        return group if isinstance(group, dict) else {}


def finite(value: Any) -> float | None:
    """`value` if it is a number of which sums and squares are finite too, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < LARGEST else None


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, in order.

    Raises:
        ReportError: none given, one given twice, or one from which no report can be made.
    """
    if not folders:
        raise ReportError("give at least one run folder")
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            raise ReportError(f"{folder} is given twice; name each run once")
        seen.add(folder.resolve())
    return [
        read_run(folder, label)
        for folder, label in zip(folders, _labels([f.resolve() for f in folders]), strict=True)
    ]


def _labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    parts = max(len(folder.parts) for folder in folders)
    for count in range(1, parts + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def read_run(folder: Path, label: str | None = None, *, turns: bool = True) -> Run:
    """Read one run folder.

    Args:
        folder: what `gtr-turbo train --run` made.
        label: its name in the report; by default the folder's name.
        turns: read the stored turns too.

    Raises:
        ReportError: `folder` is no run folder, or holds no usable row of metrics.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ReportError(
            f"{folder} {what}; give the folder that `gtr-turbo train --run DIR` wrote"
        )
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        if (folder / "summary.json").exists():
            raise ReportError(
                f"{metrics} does not exist, though the run has ended (there is a summary.json): put the file back, "
                "or remove the folder and train again"
            )
        if (folder / "config.yaml").exists():
            raise ReportError(
                f"{metrics} does not exist: the run has not finished its first update; wait for it"
            )
        raise ReportError(
            f"{folder} is no run folder: it holds no metrics.jsonl; "
            "give the folder that `gtr-turbo train --run DIR` wrote"
        )
    warnings: list[str] = []
    label = label or folder.resolve().name
    rows = _metrics(metrics, label, warnings)
    return Run(
        folder=folder,
        label=label,
        config=_config(folder / "config.yaml", label, warnings),
        rows=rows,
        summary=_summary(folder / "summary.json", label, warnings),
        turns=_turns(folder / "trajectories", label, warnings) if turns else (),
        warnings=tuple(warnings),
    )


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Lines of a JSONL file with their numbers; None where a line is no JSON object."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield number, value if isinstance(value, dict) else None


def _note_damage(path: str, lines: Sequence[int], warnings: list[str]) -> None:
    if lines:
        where = ", ".join(map(str, lines[:5])) + (", ..." if len(lines) > 5 else "")
        many = len(lines) > 1
        warnings.append(
            f"{path}: {len(lines)} damaged line{'s' if many else ''} skipped "
            f"(line{'s' if many else ''} {where})"
        )


def _metrics(path: Path, label: str, warnings: list[str]) -> list[dict[str, float]]:
    rows: dict[float, dict[str, float]] = {}
    damaged: list[int] = []
    for number, found in _objects(path):
        row = {}
        for key, value in (found or {}).items():
            if (checked := finite(value)) is not None:
                row[key] = checked
        if "update" in row and "env_steps" in row:
            rows[row["update"]] = row
        else:
            damaged.append(number)
    if not rows:
        what = f"{len(damaged)} lines, none of them readable" if damaged else "no line yet"
        raise ReportError(
            f"{path} holds {what}: nothing to report; wait for the first update, or name another run"
        )
    _note_damage(f"{label}/metrics.jsonl", damaged, warnings)
    return [rows[update] for update in sorted(rows)]


def _config(path: Path, label: str, warnings: list[str]) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        warnings.append(f"{label}/config.yaml is missing: no settings are shown for this run")
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(config, default=str, skipkeys=True)  # by an anchor, a setting can hold itself
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.append(f"{label}/config.yaml cannot be read as YAML ({first}): no settings shown")
        return {}
    if not isinstance(config, dict):
        warnings.append(f"{label}/config.yaml holds no settings")
        return {}
    return config


def _summary(path: Path, label: str, warnings: list[str]) -> dict[str, Any]:
    if not path.is_file():
        warnings.append(f"{label}/summary.json is missing: the run has not ended, or was cut short")
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        warnings.append(f"{label}/summary.json is damaged: no evaluations are shown for this run")
        return {}
    return summary


def _turns(folder: Path, label: str, warnings: list[str]) -> list[StoredTurn]:
    files = [path for path in sorted(folder.glob("*.jsonl")) if path.stem.isdecimal()]
    turns: list[StoredTurn] = []
    for path in files:
        if not path.is_file():
            warnings.append(f"{label}/trajectories/{path.name}: no file; skipped")
            continue
        damaged = []
        for number, found in _objects(path):
            turn = _turn(found or {}, int(path.stem))
            if turn is None:
                damaged.append(number)
            else:
                turns.append(turn)
        _note_damage(f"{label}/trajectories/{path.name}", damaged, warnings)
    return turns


def _turn(line: Mapping[str, Any], update: int) -> StoredTurn | None:
    """A checked turn; None if it lacks what identifies it, or what was asked and answered."""
    place = [line.get(key) for key in ("env", "episode", "step")]
    if not all(type(number) is int and 0 <= number < 2**53 for number in place):
        return None
    if not isinstance(line.get("prompt"), str) or not isinstance(line.get("reply"), str):
        return None
    facts = line.get("facts")
    success, tokens, kl = line.get("success"), line.get("tokens"), line.get("kl_tokens")
    return StoredTurn(
        update=update,
        env=line["env"],
        episode=line["episode"],
        step=line["step"],
        prompt=line["prompt"],
        reply=line["reply"],
        frame=_text(line, "frame"),
        action=_text(line, "action"),
        valid=line.get("valid") is True,
        legal=line.get("legal") is True,
        terminated=line.get("terminated") is True,
        truncated=line.get("truncated") is True,
        success=success if isinstance(success, bool) else None,
        reward=finite(line.get("reward")),
        format_reward=finite(line.get("format_reward")),
        value=finite(line.get("value")),
        advantage=finite(line.get("advantage")),
        facts={k: v for k, v in facts.items() if isinstance(v, bool)}
        if isinstance(facts, dict)
        else {},
        kl=[finite(number) for number in kl] if isinstance(kl, list) else None,
        tokens=tokens
        if isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
        else None,
    )


def _text(line: Mapping[str, Any], key: str) -> str:
    value = line.get(key)
    return value if isinstance(value, str) else ""
