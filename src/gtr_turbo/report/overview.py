"""The top of the page: facts of the runs, success in their evaluations with intervals, settings side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gtr_turbo.report.groups import Groups, as_text, flatten, named_groups
from gtr_turbo.report.read import Run, finite

STAGES = (("before", "student"), ("after", "student"), ("after", "teacher"))
"""Evaluations in the order of the table: agent before, agent after, merge after."""


def facts(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(what, its different values over the runs), for the head of the page."""
    makers = (
        ("Environment", _environment),
        ("Model", _model),
        ("Guidance", _guidance),
        ("Teacher", _teacher),
        ("Seeds", lambda run: "" if run.seed is None else str(run.seed)),
        ("Training", _training),
    )
    found = []
    for what, make in makers:
        values = list(dict.fromkeys(text for run in runs if (text := make(run))))
        found.append((what, values or ["not known"]))
    return found


def _environment(run: Run) -> str:
    env = run.group("env")
    options = env.get("options")
    listed = options.items() if isinstance(options, dict) else ()
    text = ", ".join(f"{key}={as_text(value)}" for key, value in listed)
    return f"{env['id']} ({text})" if text and "id" in env else str(env.get("id", ""))


def _model(run: Run) -> str:
    model = run.group("model")
    if "path" not in model:
        return ""
    trained = {"full": "all weights", "lora": "LoRA"}.get(str(model.get("train")), "")
    parts = [trained, f"vision {model['vision']}" if "vision" in model else ""]
    text = ", ".join(part for part in parts if part)
    return f"{model['path']} ({text})" if text else str(model["path"])


GUIDANCE = {
    "none": "none (RL4VLM)",
    "kl": "KL to the merge",
    "static": "KL to the starting model",
    "sft": "imitation of the merge",
    "external": "imitation of an external corrector (GTR)",
}
"""What `guidance.kind` means."""


def _guidance(run: Run) -> str:
    guidance = run.group("guidance")
    kind = str(guidance.get("kind", ""))
    listed = [GUIDANCE.get(kind, kind)] if kind else []
    if kind in ("kl", "static"):
        for key in ("beta", "estimator", "credit", "tokens"):
            if key in guidance:
                listed.append(f"{key} {as_text(guidance[key])}")
        listed += ["centred"] * (guidance.get("center") is True)
    imitation = guidance.get("imitation")
    if kind in ("sft", "external") and isinstance(imitation, dict):
        for key in ("weight", "samples", "temperature"):
            if key in imitation:
                listed.append(f"{key} {as_text(imitation[key])}")
    return ", ".join(listed)


def _teacher(run: Run) -> str:
    teacher = run.group("teacher")
    if "method" not in teacher:
        return ""
    listed = [
        f"{key} {teacher[key]}" for key in ("density", "weights", "interval") if key in teacher
    ]
    return ", ".join([f"merge by {teacher['method']}", *listed])


def _training(run: Run) -> str:
    rows = run.rows
    return f"{rows[-1]['update']:,.0f} updates, {rows[-1]['env_steps']:,.0f} environment steps"


def results(runs: Sequence[Run], groups: Groups | None = None) -> list[dict[str, Any]]:
    """Rows of the table of results: means of recipes with several seeds, then one for each run and split."""
    means: list[dict[str, Any]] = []
    rows = [row for number, run in enumerate(runs) for row in _results(number, run)]
    for group, (label, members) in enumerate(named_groups(runs) if groups is None else groups):
        if len(members) < 2:
            continue
        own = [row for row in rows if row.get("run") in members]
        for split in dict.fromkeys(row["split"] for row in own):
            same = [row for row in own if row["split"] == split]
            stages = [_over_seeds([row["stages"][i] for row in same]) for i in range(len(STAGES))]
            if any(stages):
                text = f"{label}, mean of {len(same)} seeds"
                place = {"run": None, "group": group, "label": text}
                means.append(place | {"split": split, "stages": stages})
    return means + rows


def _results(number: int, run: Run) -> list[dict[str, Any]]:
    last = run.rows[-1]
    common = {
        "run": number,
        "label": run.label,
        "ended": bool(run.summary),
        "steps": finite(run.summary.get("env_steps")) or last["env_steps"],
        "seconds": finite(run.summary.get("seconds")) or last.get("system/seconds"),
        "memory": finite(run.summary.get("peak_rss_mb")) or last.get("system/peak_rss_mb"),
    }
    stored = run.summary.get("evaluations")
    evaluations = stored if isinstance(stored, dict) else {}
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for key, evaluation in evaluations.items():
        when, _, rest = str(key).partition("/")
        split, _, which = rest.rpartition("/")
        found.setdefault(split, {})[when, which] = evaluation
    if not found and "success_after" in run.summary:
        found[str(run.summary.get("split"))] = {
            stage: {
                "success": run.summary.get(f"success_{name}"),
                "interval": run.summary.get(f"interval_{name}"),
                "episodes": run.summary.get("episodes"),
            }
            for stage, name in zip(STAGES, ("before", "after", "merge"), strict=True)
        }
    if not found:
        return [common | {"split": "", "stages": [None] * len(STAGES)}]
    return [
        common
        | {"split": "" if split == "None" else split, "stages": [_stage(by.get(s)) for s in STAGES]}
        for split, by in found.items()
    ]


def _stage(evaluation: Any) -> dict[str, Any] | None:
    """Success and interval of an evaluation; None if there is none."""
    if not isinstance(evaluation, dict):
        return None
    success, interval = finite(evaluation.get("success")), evaluation.get("interval")
    if success is None:
        return None
    ends = [finite(end) for end in interval] if isinstance(interval, list) else []
    low, high = ends if len(ends) == 2 else (None, None)
    return {
        "success": success,
        "low": low,
        "high": high,
        "episodes": finite(evaluation.get("episodes")),
    }


def _over_seeds(stages: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Mean of the seeds' successes; its ends are the worst and the best seed."""
    known = [stage["success"] for stage in stages if stage]
    if not known or len(known) < len(stages):
        return None
    same = {stage["episodes"] for stage in stages if stage}
    return {
        "success": sum(known) / len(known),
        "low": min(known),
        "high": max(known),
        "episodes": same.pop() if len(same) == 1 else None,
    }


def settings(runs: Sequence[Run], without: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every setting with its value in each run; `differs` where they are not all the same.

    Args:
        runs: of the report.
        without: settings that are not shown.
    """
    flat = [flatten(run.config) for run in runs]
    names = dict.fromkeys(name for table in flat for name in table if name not in without)
    rows = []
    for name in names:
        values = [table.get(name) for table in flat]
        rows.append({"name": name, "values": values, "differs": len(set(values)) > 1})
    return rows
