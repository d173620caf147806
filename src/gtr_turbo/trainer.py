"""The loop: play, pad, ask the teacher, assign credit, learn, remember, merge. Nothing else is here."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gtr_turbo import checkpoint
from gtr_turbo.collect import MINIBATCHES, SAMPLING, TEACHING, Envs, collect, stream
from gtr_turbo.config import TrainConfig
from gtr_turbo.evaluate import Evaluation, evaluate
from gtr_turbo.learning.advantages import assign_credit
from gtr_turbo.learning.update import Imitation, TrainingError, make_optimizer, update
from gtr_turbo.policy.model import Policy
from gtr_turbo.teacher.endpoint import Endpoint
from gtr_turbo.teacher.external import Corrector, correct
from gtr_turbo.teacher.guidance import guide
from gtr_turbo.teacher.history import History
from gtr_turbo.teacher.imitation import Memory, imitation_loss, teach
from gtr_turbo.tracking import (
    Clock,
    JsonlWriter,
    TensorBoardWriter,
    Trajectories,
    Writer,
    finite,
    peak_rss_mb,
    rollout_metrics,
)
from gtr_turbo.turns.batch import Batch, make_batch
from gtr_turbo.turns.turn import Turn

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

    def note(self, text: str) -> None:
        """Something to tell; may come from another thread."""
        ...


def train(config: TrainConfig, run: Path, view: View, *, resume: bool = False) -> dict[str, Any]:
    """Run the loop; returns what `summary.json` holds.

    Args:
        config: all settings.
        run: the run folder, held by the caller (`checkpoint.own_folder`).
        view: shows progress.
        resume: go on from the newest checkpoint in `run`.

    Raises:
        TrainingError: a loss or gradient is not finite, sampler and scoring disagree, or the corrector's
            budget is spent or its endpoint gone (there is a checkpoint then).
        checkpoint.CheckpointError: the checkpoint is damaged or of another run.
        ConfigError: the corrector's endpoint refuses us.
    """
    if config.guidance.kind == "external":
        with Endpoint(config.guidance.external) as endpoint:
            endpoint.check()
    torch.set_num_threads(config.threads)
    began = time.monotonic()
    policy = Policy(config.model, temperature=config.sampling.temperature, seed=config.seed)
    optimizer = make_optimizer(policy, config.ppo)
    envs = Envs(config.env, config.env.train_split, config.seed)
    history = History(config.teacher)
    memory = Memory(run / "imitation", config.guidance.imitation.limit)
    corrector = _corrector(config, run, envs, view)
    start_print = checkpoint.fingerprint(dict(policy.model.named_parameters()))
    start, state = 0, {}
    if resume:
        state = checkpoint.load(
            checkpoint.folders(run)[-1], policy, optimizer, history, start_print
        )
        envs.restore(state["envs"])
        start = state["update"]
        memory.restore(start)
    else:
        envs.start()
        policy.load_teacher({name: torch.zeros_like(delta) for name, delta in policy.deltas()})
    evaluations: dict[str, Any] = state.get("evaluations") or _evaluate(
        policy, config, view, "before", {}
    )
    began -= state.get("seconds", 0.0)
    age = state.get("teacher_age", 0)
    writers = _writers(config, run, start)
    trajectories = Trajectories(run / "trajectories", config.save.trajectories)
    view.started(config, run, start)
    for iteration in range(start, config.num_updates):
        clock = Clock()
        generator = torch.Generator().manual_seed(stream(config.seed, SAMPLING, iteration))
        turns = collect(envs, policy, config.sampling, config.rollout, generator)
        clock.lap("collect")
        batch = make_batch(turns, config.env.num_envs, policy.processor.pad_token_id)
        batch = guide(batch, policy, config.guidance, microbatch_turns=config.ppo.microbatch_turns)
        clock.lap("guide")
        told, imitation = _imitate(policy, turns, envs, memory, corrector, config, iteration)
        clock.lap("teach")
        batch = assign_credit(batch, **_credit(config))
        stats = update(
            policy,
            optimizer,
            batch,
            config.ppo,
            seed=stream(config.seed, MINIBATCHES, iteration),
            progress=iteration / config.num_updates,
            progress_after=(iteration + 1) / config.num_updates,
            max_logprob_gap=config.rollout.max_logprob_gap,
            imitation=imitation,
        )
        clock.lap("update")
        history.add(policy.deltas())
        age += 1
        if history.merge_is_due(iteration):
            policy.load_teacher(history.merge())
            age = 0
        clock.lap("merge")
        row = {
            "update": iteration + 1,
            "env_steps": (iteration + 1) * config.turns_per_update,
            **rollout_metrics(turns),
            **stats,
            **told,
            **_teacher_metrics(policy, batch, history, config, age),
            **clock.seconds,
            "system/peak_rss_mb": peak_rss_mb(),
            "system/seconds": time.monotonic() - began,
        }
        _log(row, writers)
        trajectories.write(iteration + 1, turns, _per_turn(batch, policy, config.save.trajectories))
        view.updated(row)
        stopped = corrector.stopped if corrector else None
        due = (iteration + 1) % config.save.interval == 0 or iteration + 1 == config.num_updates
        if due or stopped:
            saved = {
                "update": iteration + 1,
                "seed": config.seed,
                "start": start_print,
                "teacher_age": age,
                "seconds": row["system/seconds"],
                "envs": envs.state(),
                "evaluations": evaluations,
            }
            checkpoint.save(run, policy, optimizer, history, saved, keep=config.save.keep)
        if stopped and iteration + 1 < config.num_updates:
            raise TrainingError(f"stopped after update {iteration + 1}: {stopped}")
    for writer in writers:
        writer.close()
    evaluations = _evaluate(policy, config, view, "after", evaluations)
    return _summary(config, run, evaluations, time.monotonic() - began)


def _log(row: Mapping[str, float], writers: Sequence[Writer]) -> None:
    """Write a row.

    Raises:
        TrainingError: one of its numbers is not finite; nothing is written then.
    """
    if (bad := finite(row)) is not None:
        raise TrainingError(
            f"{bad} is {row[bad]} in update {row['update']:.0f}; resume from the last checkpoint"
        )
    for writer in writers:
        writer.write(row)


def _corrector(config: TrainConfig, run: Path, envs: Envs, view: View) -> Corrector | None:
    """What corrects thoughts, with `guidance.kind: external`."""
    if config.guidance.kind != "external":
        return None
    return Corrector(
        config.guidance.external,
        run / "external",
        envs.fields,
        envs.field_schemas,
        envs.tools,
        view.note,
        seed=config.seed,
    )


def _imitate(
    policy: Policy,
    turns: Sequence[Turn],
    envs: Envs,
    memory: Memory,
    corrector: Corrector | None,
    config: TrainConfig,
    iteration: int,
) -> tuple[dict[str, float], Imitation | None]:
    """Guidance by imitation: collect the teacher's thoughts; (metrics, what joins the update's steps)."""
    guidance, own = config.guidance, config.guidance.imitation
    generator = torch.Generator().manual_seed(stream(config.seed, TEACHING, iteration))
    if corrector is not None:
        told = correct(
            corrector,
            policy.processor,
            turns,
            memory,
            generator,
            share=guidance.external.share,
            longest=config.sampling.max_new_tokens,
            update=iteration + 1,
        )
    elif guidance.kind == "sft":
        told = teach(
            policy,
            turns,
            envs.fields,
            memory,
            guidance,
            config.sampling,
            generator,
            update=iteration + 1,
        )
    else:
        return {}, None
    weight = own.weight + (own.weight_final - own.weight) * iteration / config.num_updates
    if not memory.targets or not weight:
        return told, None

    def losses(draws: torch.Generator) -> Iterator[tuple[Tensor, float]]:
        for loss, number in imitation_loss(
            policy, memory, own.samples, draws, microbatch=config.ppo.microbatch_turns
        ):
            yield weight * loss, number

    return told, losses


def _credit(config: TrainConfig) -> dict[str, Any]:
    ppo, guidance = config.ppo, config.guidance
    return {
        "gamma": ppo.gamma,
        "lam": ppo.gae_lambda,
        "normalize": ppo.normalize,
        "eps": ppo.normalize_eps,
        "beta": guidance.beta if guidance.kind in ("kl", "static") else 0.0,
        "credit": guidance.credit,
        "center": guidance.center,
    }


def _writers(config: TrainConfig, run: Path, start: int) -> list[Writer]:
    writers: list[Writer] = [JsonlWriter(run / "metrics.jsonl", keep_until=start)]
    installed = importlib.util.find_spec("tensorboard") is not None
    if config.tensorboard or (config.tensorboard is None and installed):
        writers.append(TensorBoardWriter(run / "tensorboard"))
    return writers


def _teacher_metrics(
    policy: Policy, batch: Batch, history: History, config: TrainConfig, age: int
) -> dict[str, float]:
    """The `teacher` group."""
    square = sum(float((delta**2).sum()) for _, delta in policy.deltas())
    metrics = {"teacher/age": float(age), "teacher/student_distance": square**0.5}
    metrics["teacher/distance"] = policy.teacher_distance()
    metrics["teacher/zero_fraction"] = history.zero_fraction
    if batch.kl_tokens is not None:
        thoughts = config.guidance.tokens == "thought"
        mask = batch.thought_mask if thoughts else batch.inputs.response_mask
        metrics["teacher/kl"] = float(batch.kl_tokens.sum() / mask.sum().clamp(min=1))
    if batch.kl_tokens is not None and config.guidance.kind in ("kl", "static"):
        metrics["teacher/credit"] = config.guidance.beta * metrics["teacher/kl"]
    return metrics


def _per_turn(batch: Batch, policy: Policy, envs: int) -> dict[str, list[Any]]:
    """What trajectories hold beside the turns; the text of the tokens for the first `envs` environments."""
    assert batch.advantages is not None
    advantages = batch.advantages
    columns: dict[str, list[Any]] = {
        "advantage": (advantages if advantages.ndim == 1 else advantages.mean(1)).tolist(),
        "tokens": [
            [policy.processor.decode([token]) for token in row[mask].tolist()]
            if number % batch.shape[1] < envs
            else []
            for number, (row, mask) in enumerate(
                zip(batch.inputs.response_ids, batch.inputs.response_mask, strict=True)
            )
        ],
    }
    if batch.kl_tokens is not None:
        counts = batch.thought_mask.sum(1).tolist()
        columns["kl_tokens"] = [
            [round(x, 5) for x in row[:n]]
            for row, n in zip(batch.kl_tokens.tolist(), counts, strict=True)
        ]
    return columns


def _evaluate(
    policy: Policy, config: TrainConfig, view: View, when: str, known: dict[str, Any]
) -> dict[str, Any]:
    """Evaluate before or after: student, and after training the merge too; results by `when/split/which`."""
    found = dict(known)
    if not config.eval.episodes:
        return found
    for split in (config.env.eval_split, *config.eval.extra_splits):
        found[f"{when}/{split}/student"] = _one(policy, config, view, f"student {when}", split)
        if when == "after":
            with policy.as_teacher():
                found[f"{when}/{split}/teacher"] = _one(policy, config, view, "merge after", split)
    return found


def _one(
    policy: Policy, config: TrainConfig, view: View, what: str, split: str | None
) -> dict[str, Any]:
    episodes = config.eval.episodes

    def told(done: int) -> None:
        view.evaluating(f"{what} ({split})" if split else what, done, episodes)

    result: Evaluation = evaluate(
        policy,
        config.env,
        config.sampling,
        episodes=episodes,
        split=split,
        seed=config.seed,
        on_episode=told,
    )
    summary = result.summary()
    return {key: value for key, value in summary.items() if key != "records"}


def _summary(
    config: TrainConfig, run: Path, evaluations: Mapping[str, Any], seconds: float
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
        "peak_rss_mb": peak_rss_mb(),
        "seed": config.seed,
        "name": config.name,
        "student": str(last / "student"),
        "teacher": str(last / "teacher"),
        "evaluations": dict(evaluations),
    }
    checkpoint.write_atomically(run / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary
