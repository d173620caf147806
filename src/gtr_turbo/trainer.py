"""A run from its first update to its summary; what an update does is in `learner`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from gtr_turbo import checkpoint
from gtr_turbo.card import write_cards
from gtr_turbo.collect import SIGNALS, stream
from gtr_turbo.config import TrainConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.envs import make_env
from gtr_turbo.evaluate import Evaluation, evaluate
from gtr_turbo.learner import Learner, per_turn
from gtr_turbo.learning.update import TrainingError
from gtr_turbo.teacher.endpoint import Endpoint
from gtr_turbo.trackers import Trackers
from gtr_turbo.tracking import (
    Clock,
    JsonlWriter,
    Spent,
    Trajectories,
    finite,
    peak_rss_mb,
    rollout_metrics,
)
from gtr_turbo.turns.record import all_turns

__all__ = ["TrainingError", "View", "train"]


class View(Protocol):
    """What shows a run to a person; `gtr_turbo.terminal` has one."""

    def started(self, config: TrainConfig, run: Path, update: int) -> None:
        """Training begins (or goes on after `update` updates)."""
        ...

    def evaluating(self, what: str, done: int, episodes: int) -> None:
        """An evaluation goes on."""
        ...

    def updated(self, row: Mapping[str, float]) -> None:
        """An update is done."""
        ...

    def noted(self, text: str) -> None:
        """Something that does not stop the run went wrong."""
        ...


class Unseen:
    """The view of a rank that shows nothing: the first one shows the run."""

    def started(self, config: TrainConfig, run: Path, update: int) -> None:
        """Nothing."""

    def evaluating(self, what: str, done: int, episodes: int) -> None:
        """Nothing."""

    def updated(self, row: Mapping[str, float]) -> None:
        """Nothing."""

    def noted(self, text: str) -> None:
        """Nothing."""


def train(
    config: TrainConfig,
    run: Path,
    view: View,
    *,
    resume: bool = False,
    ranks: Ranks = ALONE,
    settings: str | None = None,
) -> dict[str, Any]:
    """Run the loop; returns what `summary.json` holds.

    Args:
        config: all settings.
        run: the run folder, held by the caller (`checkpoint.own_folder`) of the first rank.
        view: shows progress.
        resume: go on from the newest checkpoint in `run`.
        ranks: the processes of the run; the first writes all files.
        settings: the text of `config.yaml`, written when nothing stands in the way of these settings any more.

    Raises:
        EngineError: with `rollout.engine: vllm`, the server is gone for good or writes with other weights.
        TrainingError: a loss or gradient is not finite, sampler and scoring disagree, or the corrector's
            budget is spent or its endpoint gone (there is a checkpoint then).
        checkpoint.CheckpointError: the checkpoint is damaged or of another run.
        ConfigError: a tracker is not installed or does not start, the corrector's endpoint refuses us, or
            settings or models differ between ranks.
        ContractError: an environment does not take an option or a split.
    """
    ranks.agree("settings", asdict(config))
    ranks.agree("views of the run folder (some resume, some begin)", resume)
    if ranks.world > 1:
        config = replace(config, model=replace(config.model, device=ranks.device))
    if config.guidance.kind == "external" and ranks.first:
        with Endpoint(config.guidance.external) as endpoint:
            endpoint.check()
    torch.set_num_threads(config.threads)
    for name, options in config.environments():  # what evaluates at the end fails now
        make_env(name, **options).close()
    spent = Spent()
    learner = Learner(config, run, view.noted, ranks)
    state = learner.resume(run) if resume else learner.begin()
    tracked = config if ranks.first else replace(config, trackers=())
    trackers = Trackers(tracked, run, view.noted, resume=resume)
    if settings is not None:
        checkpoint.write_atomically(run / "config.yaml", settings)
    try:
        summary = _train(config, run, view, learner, state, trackers, spent)
    except BaseException:
        trackers.close(failed=True)
        raise
    else:
        trackers.close()
        return summary
    finally:
        learner.close()


def _train(
    config: TrainConfig,
    run: Path,
    view: View,
    learner: Learner,
    state: Mapping[str, Any],
    trackers: Trackers,
    spent: Spent,
) -> dict[str, Any]:
    """The loop itself."""
    start = state.get("update", 0)
    if start < config.num_updates and (why := learner.stops_before(start + 1)):
        raise TrainingError(f"stopped before update {start + 1}: {why}")
    # a resumed agent has been trained: what was not evaluated before, never is
    evaluations: dict[str, Any] = (
        state["evaluations"]
        if "evaluations" in state
        else _evaluate(learner, config, view, "before", {})
    )
    ranks = learner.policy.ranks
    spent.before(state.get("seconds", 0.0), state.get("cpu_seconds", 0.0) / ranks.world)
    if ranks.first:
        if start < config.num_updates:  # else it stands until it is written anew
            (run / "summary.json").unlink(missing_ok=True)  # of a shorter run that goes on
        metrics_file = JsonlWriter(run / "metrics.jsonl", keep_until=start)
        stored = Trajectories(run / "trajectories", config.save.trajectories, keep_until=start)
    view.started(config, run, start)
    if config.teacher.interval > config.num_updates:
        view.noted(
            f"teacher.interval={config.teacher.interval} is more than the {config.num_updates} updates of the run: "
            "nothing is merged, and the teacher stays what the run began with"
        )
    for iteration in range(start, config.num_updates):
        clock, sent = Clock(), ranks.sent_bytes
        turns, batch, learned = learner.step(iteration, clock)
        merged = learner.remember(iteration, batch, clock)
        evaluated = _evaluate_between(learner, config, view, iteration + 1, clock)
        row = {
            "update": iteration + 1,
            "env_steps": (iteration + 1) * config.turns_per_update,
            **rollout_metrics(
                all_turns(turns, ranks), seed=stream(config.seed, SIGNALS, iteration)
            ),
            **learned,
            **merged,
            **evaluated,
            **clock.seconds,
            "system/peak_rss_mb": ranks.largest(peak_rss_mb()),
            "system/seconds": spent.seconds,
            "system/cpu_seconds": ranks.total(spent.cpu_seconds),
            "system/communicated_mb": (ranks.sent_bytes - sent) / 1e6,
            "system/trackers_failed": float(trackers.failed),
        }
        if (bad := finite(row)) is not None:
            raise TrainingError(
                f"{bad} is {row[bad]} in update {iteration + 1}; resume from the last checkpoint"
            )
        if ranks.first:
            metrics_file.write(row)
            trackers.write(row)
            columns = per_turn(batch, learner.policy, config.save.trajectories)
            stored.write(iteration + 1, turns, columns)
        view.updated(row)
        if iteration == 0 and row["rollout/valid"] == 0:
            view.noted(
                f"none of the first {config.turns_per_update} replies is valid, so there is nothing to reinforce "
                "or to guide: begin with a model that writes the JSON its prompt asks for (docs/environments.md)"
            )
        last = iteration + 1 == config.num_updates
        stopped = None if last else learner.stops_before(iteration + 2)
        if (iteration + 1) % config.save.interval == 0 or last or stopped:
            learner.save(
                run,
                update=iteration + 1,
                seconds=row["system/seconds"],
                cpu_seconds=row["system/cpu_seconds"],
                evaluations=evaluations,
            )
        if stopped:
            # by now the checkpoint is written: torchrun ends the first rank when another one ends
            ranks.total(0)
            raise TrainingError(f"stopped after update {iteration + 1}: {stopped}")
    evaluations = _evaluate(learner, config, view, "after", evaluations)
    peak = ranks.largest(peak_rss_mb())
    return _summary(config, run, evaluations, spent.seconds, peak) if ranks.first else {}


def _evaluate(
    learner: Learner, config: TrainConfig, view: View, when: str, known: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate before or after: student, and after training the merge too; results by `when/split/which`."""
    found = dict(known)
    if not config.eval.episodes:
        return found
    for split in (config.env.eval_split, *config.eval.extra_splits):
        about = (split, config.eval.episodes)
        found[f"{when}/{split}/student"] = _one(learner, config, view, f"student {when}", *about)
        if when == "after":
            found[f"{when}/{split}/teacher"] = _one(
                learner, config, view, "merge after", *about, teacher=True
            )
    return found


def _evaluate_between(
    learner: Learner, config: TrainConfig, view: View, update: int, clock: Clock
) -> dict[str, float]:
    """The `eval` group, in updates at which an evaluation is due: student and merge on the same episodes."""
    if not config.eval.interval or update % config.eval.interval:
        return {}
    split, episodes = config.env.eval_split, config.eval.interval_episodes
    student = _one(learner, config, view, f"student at update {update}", split, episodes)
    teacher = _one(
        learner, config, view, f"merge at update {update}", split, episodes, teacher=True
    )
    clock.lap("evaluate")
    return {
        "eval/student_success": student["success"],
        "eval/teacher_success": teacher["success"],
        "eval/episodes": float(episodes),
    }


def _one(
    learner: Learner,
    config: TrainConfig,
    view: View,
    what: str,
    split: str | None,
    episodes: int,
    *,
    teacher: bool = False,
) -> dict[str, Any]:
    """The merge writes in this process, whatever the engine: its change has no low rank to be sent."""

    def told(done: int) -> None:
        view.evaluating(f"{what} ({split})" if split else what, done, episodes)

    with learner.policy.as_teacher() if teacher else nullcontext():
        result: Evaluation = evaluate(
            learner.policy,
            config.env,
            config.sampling,
            episodes=episodes,
            split=split,
            seed=config.seed,
            on_episode=told,
            engine=None if teacher else learner.engine,
        )
    summary = result.summary()
    return {key: value for key, value in summary.items() if key != "records"}


def _summary(
    config: TrainConfig, run: Path, evaluations: Mapping[str, Any], seconds: float, peak: float
) -> dict[str, Any]:
    split = config.env.eval_split
    before = evaluations.get(f"before/{split}/student", {})
    after = evaluations.get(f"after/{split}/student", {})
    merge = evaluations.get(f"after/{split}/teacher", {})
    last = checkpoint.folders(run)[-1]
    summary = {
        "success_before": before.get("success"),
        "success_after": after.get("success"),
        "success_merge": merge.get("success"),
        "interval_before": before.get("interval"),
        "interval_after": after.get("interval"),
        "interval_merge": merge.get("interval"),
        "split": split,
        "episodes": config.eval.episodes,
        "env_steps": config.num_updates * config.turns_per_update,
        "seconds": seconds,
        "peak_rss_mb": peak,
        "seed": config.seed,
        "name": config.name,
        "student": str(last / "student"),
        "teacher": str(last / "teacher"),
        "evaluations": dict(evaluations),
    }
    checkpoint.write_atomically(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_cards(config, summary)
    return summary
