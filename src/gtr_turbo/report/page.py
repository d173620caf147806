"""One self-contained HTML file from run folders: everything inline, nothing loaded, untrusted text as data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gtr_turbo import __version__
from gtr_turbo.report import overview
from gtr_turbo.report.curves import curves
from gtr_turbo.report.episodes import Episode, Prompts, join, order_of_choice, to_page
from gtr_turbo.report.frames import Frames
from gtr_turbo.report.groups import Groups, as_text
from gtr_turbo.report.read import ReportError, Run, StoredTurn, read_runs

BUDGET = 25_000_000
"""Bytes the file may have if no number of episodes is given."""

RESERVE = 200
"""Bytes for what is known only after the episodes are chosen."""

HERE = Path(__file__).parent
SCRIPTS = ("base", "overview", "plot", "curves", "compare", "episodes", "turn", "tokens", "main")
"""The page's script, in the order of its parts (`js/*.js`)."""

MOST_NAMED = 10
"""Runs without trajectories that are named."""

AT_ONCE = 32
"""Episodes whose frames are read together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportInfo:
    """What was written."""

    out: Path
    size: int
    """Bytes of the file."""
    runs: int
    episodes: int
    """Episodes in the replay."""
    left_out: int
    """Stored episodes that are not in the file."""
    turns: int
    frames: int
    """Different pictures."""
    warnings: tuple[str, ...]
    """What was skipped or missing; the page shows them too."""


def write_report(
    runs: Sequence[Path],
    out: Path,
    *,
    episodes: int | None = None,
    groups: Groups | None = None,
    comparison: dict[str, Any] | None = None,
) -> ReportInfo:
    """Write the report of one or several runs.

    Args:
        runs: run folders.
        out: the HTML file; replaced if it exists.
        episodes: episodes in the replay, spread evenly over runs and training; by default as many as fit
            into about 25 MB.
        groups: runs that are one line with a band; by default those that differ in nothing but their seed.
        comparison: of the groups, as `gtr_turbo.compare` makes it, for a section of its own.

    Raises:
        ReportError: a folder is no run folder or holds no metrics, or an argument cannot work.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ReportError(f"{out} must end in .html: a report replaces the file of its name")
    if out.is_dir():
        raise ReportError(f"{out} is a folder; name a file, such as {out / 'report.html'}")
    if episodes is not None and episodes < 0:
        raise ReportError(f"episodes={episodes} must not be negative; 0 leaves the replay empty")
    found = read_runs(runs)
    warnings = [warning for run in found for warning in run.warnings]
    joined = _join(found, warnings)
    stored = sum(map(len, joined))
    if stored and episodes != 0:
        warnings += _without_turns(found)
    data: dict[str, Any] = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "runs": [{"label": run.label, "seed": as_text(run.seed)} for run in found],
        "facts": overview.facts(found),
        "results": overview.results(found, groups),
        "settings": overview.settings(found, without=("run",) if comparison else ()),
        "curves": curves(found, groups=groups),
        "comparison": comparison,
        "stored": stored,
        "empty": _why_empty(found, stored, episodes),
        "warnings": warnings,
    }
    what = ", ".join(run.label for run in found)
    title = comparison["title"] if comparison else f"GTR-Turbo report: {what}"
    frames = Frames()
    rest = len(_render(title, as_json(data), []).encode("utf-8", "replace")) + RESERVE
    order = order_of_choice(joined)
    data["episodes"], data["prompts"] = _choose(found, order, frames, episodes, BUDGET - rest)
    if frames.unreadable:
        warnings.append(
            f"{len(frames.unreadable)} stored frame(s) missing or damaged; their turns say so"
        )
    page = _render(title, as_json(data), frames.embedded).encode("utf-8", "replace")
    write_whole(out, page)
    return ReportInfo(
        out=out,
        size=len(page),
        runs=len(found),
        episodes=len(data["episodes"]),
        left_out=stored - len(data["episodes"]),
        turns=sum(len(episode["turns"]) for episode in data["episodes"]),
        frames=len(frames.embedded),
        warnings=tuple(warnings),
    )


def _join(runs: Sequence[Run], warnings: list[str]) -> list[list[Episode]]:
    joined = []
    for number, run in enumerate(runs):
        episodes, twice = join(run.turns, number)
        joined.append(episodes)
        if twice:
            warnings.append(f"{run.label}: {twice} turns were stored twice; the later are shown")
        broken = sum(not episode.complete for episode in episodes)
        if broken:
            warnings.append(f"{run.label}: {broken} episodes lack turns; they are marked")
    return joined


def _without_turns(runs: Sequence[Run]) -> list[str]:
    """What the replay lacks: a line, if there are runs that should have stored turns and have none."""
    without = [
        run.label for run in runs if not run.turns and run.group("save").get("trajectories") != 0
    ]
    if not without:
        return []
    more = f" and {len(without) - MOST_NAMED} more" if len(without) > MOST_NAMED else ""
    return [f"no trajectories are there of {', '.join(without[:MOST_NAMED])}{more}"]


def _why_empty(runs: Sequence[Run], stored: int, limit: int | None) -> str:
    """Why a replay without episodes is empty."""
    if limit == 0:
        return "The report was made with --episodes 0."
    if stored:
        return "Not one stored episode fits into the file; give --episodes N to have N of them."
    off = all(run.group("save").get("trajectories") == 0 for run in runs)
    why = " (save.trajectories is 0)" if off else ""
    return (
        f"No trajectories were stored{why}. Train with --save.trajectories 4, for instance, to keep "
        "the turns of 4 environments."
    )


def _choose(
    runs: Sequence[Run],
    order: Sequence[Episode],
    frames: Frames,
    limit: int | None,
    budget: int,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Episodes for the page in the order of training, and their prompts.

    They are the first `limit` of `order`, or the first that fit into `budget` bytes.
    """
    chosen: list[dict[str, Any]] = []
    prompts, used = Prompts(), 0
    if limit is not None:
        order = order[:limit]
    for start in range(0, len(order), AT_ONCE):
        part = [
            (episode, [_frame_path(runs[episode.run], turn) for turn in episode.turns])
            for episode in order[start : start + AT_ONCE]
        ]
        frames.load(path for _, paths in part for path in paths if path is not None)
        for episode, paths in part:
            known = len(prompts.texts)
            entry = to_page(episode, prompts.number)
            used += len(as_json([entry, prompts.texts[known:]]))
            used += frames.cost(path for path in paths if path is not None)
            if limit is None and used > budget:
                chosen.sort(key=_place)
                return chosen, prompts.texts[:known]
            for turn, path in zip(entry["turns"], paths, strict=True):
                turn["frame"] = "no frame was stored" if path is None else frames.embed(path)
            chosen.append(entry)
    chosen.sort(key=_place)
    return chosen, prompts.texts


def _place(entry: dict[str, Any]) -> tuple[int, int, int, int]:
    return entry["run"], entry["turns"][0]["update"], entry["env"], entry["episode"]


def _frame_path(run: Run, turn: StoredTurn) -> Path | None:
    """Where a turn's frame lies; None if it has none, or names a file outside the run's trajectories."""
    folder = (run.folder / "trajectories").resolve()
    try:
        path = (folder / turn.frame).resolve()
    except (OSError, ValueError):  # such as a null character in the name
        return None
    return path if turn.frame and path.is_relative_to(folder) else None


def as_json(data: Any) -> str:
    """JSON that may stand inside a script element: ASCII only, and no character that HTML reads."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _render(title: str, data: str, frames: Sequence[str]) -> str:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    style = (HERE / "style.css").read_text(encoding="utf-8")
    parts = [(HERE / "js" / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, keep_trailing_newline=True
    )
    return environment.get_template("template.html.j2").render(
        title=title,
        style=Markup(style),
        style_hash=_source_hash(style),
        script=Markup(script),
        script_hash=_source_hash(script),
        data=Markup(data),
        frames=[Markup(frame) for frame in frames],
    )


def _source_hash(text: str) -> str:
    """A hash source of a content security policy (CSP Level 3, section 2.3.1)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_whole(out: Path, content: bytes) -> None:
    """Write so that a reader never meets half a file, and two writers do not meet."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(content)
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
