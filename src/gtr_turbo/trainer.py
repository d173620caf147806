"""The loop: play, pad, ask the teacher, assign credit, learn, remember, merge. Nothing else is here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gtr_turbo import checkpoint
from gtr_turbo.collect import MINIBATCHES, SAMPLING, SIGNALS, TEACHING, Envs, collect, stream
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

    def noted(self, text: str) -> None:
        """Something that does not stop the run went wrong."""
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
        ConfigError: a tracker is not installed or does not start, or the corrector's endpoint refuses us.
    """
    if config.guidance.kind == "external":
        with Endpoint(config.guidance.external) as endpoint:
            endpoint.check()
    torch.set_num_threads(config.threads)
    spent = Spent()
    trackers = Trackers(config, run, view.noted, resume=resume)
    learner = Learner(config, run, view.noted)
    state = learner.resume(run) if resume else learner.begin()
    evaluations: dict[str, Any] = state.get("evaluations") or _evaluate(
        learner.policy, config, view, "before", {}
    )
    spent.before(state.get("seconds", 0.0), state.get("cpu_seconds", 0.0))
    start = state.get("update", 0)
    metrics_file = JsonlWriter(run / "metrics.jsonl", keep_until=start)
    trajectories = Trajectories(run / "trajectories", config.save.trajectories)
    view.started(config, run, start)
    for iteration in range(start, config.num_updates):
        clock = Clock()
        turns, batch, learned = learner.step(iteration, clock)
        merged = learner.remember(iteration, batch, clock)
        evaluated = _evaluate_between(learner.policy, config, view, iteration + 1, clock)
        row = {
            "update": iteration + 1,
            "env_steps": (iteration + 1) * config.turns_per_update,
            **rollout_metrics(turns, seed=stream(config.seed, SIGNALS, iteration)),
            **learned,
            **merged,
            **evaluated,
            **clock.seconds,
            "system/peak_rss_mb": peak_rss_mb(),
            "system/seconds": spent.seconds,
            "system/cpu_seconds": spent.cpu_seconds,
            "system/trackers_failed": float(trackers.failed),
        }
        if (bad := finite(row)) is not None:
            raise TrainingError(
                f"{bad} is {row[bad]} in update {iteration + 1}; resume from the last checkpoint"
            )
        metrics_file.write(row)
        trackers.write(row)
        columns = _per_turn(batch, learner.policy, config.save.trajectories)
        trajectories.write(iteration + 1, turns, columns)
        view.updated(row)
        last = iteration + 1 == config.num_updates
        if (iteration + 1) % config.save.interval == 0 or last or learner.stopped:
            learner.save(
                run,
                update=iteration + 1,
                seconds=row["system/seconds"],
                cpu_seconds=row["system/cpu_seconds"],
                evaluations=evaluations,
            )
        if learner.stopped and not last:
            raise TrainingError(f"stopped after update {iteration + 1}: {learner.stopped}")
    evaluations = _evaluate(learner.policy, config, view, "after", evaluations)
    summary = _summary(config, run, evaluations, spent.seconds)
    trackers.close()
    return summary


class Learner:
    """The agent with all that its updates change.

    Attributes:
        policy: the agent, with its teacher.
        teacher_age: updates since the teacher was merged.
    """

    def __init__(self, config: TrainConfig, run: Path, note: Callable[[str], None]) -> None:
        """Load the model and make the environments; `begin` or `resume` comes next. `note` tells of outages."""
        self._config = config
        self.policy = Policy(
            config.model, temperature=config.sampling.temperature, seed=config.seed
        )
        self._optimizer = make_optimizer(self.policy, config.ppo)
        self._envs = Envs(config.env, config.env.train_split, config.seed)
        self._history = History(config.teacher)
        self._memory = Memory(run / "imitation", config.guidance.imitation.limit)
        self._corrector = _corrector(config, run, self._envs, note)
        self._start_print = checkpoint.fingerprint(dict(self.policy.model.named_parameters()))
        self.teacher_age = 0

    @property
    def stopped(self) -> str | None:
        """Why there can be no further update, if so."""
        return self._corrector.stopped if self._corrector else None

    def begin(self) -> dict[str, Any]:
        """The start of a run: the first episodes, and the starting model as teacher. No state is known yet."""
        self._envs.start()
        self.policy.load_teacher(
            {name: torch.zeros_like(delta) for name, delta in self.policy.deltas()}
        )
        return {}

    def resume(self, run: Path) -> dict[str, Any]:
        """Take up the newest checkpoint of `run`; returns its state."""
        newest = checkpoint.folders(run)[-1]
        state = checkpoint.load(
            newest, self.policy, self._optimizer, self._history, self._start_print
        )
        self._envs.restore(state["envs"])
        self._memory.restore(state["update"])
        self.teacher_age = state["teacher_age"]
        return state

    def step(self, iteration: int, clock: Clock) -> tuple[list[Turn], Batch, dict[str, float]]:
        """Play, ask the teacher, assign credit, learn; returns (turns, batch, metrics)."""
        config, policy = self._config, self.policy
        generator = torch.Generator().manual_seed(stream(config.seed, SAMPLING, iteration))
        turns = collect(self._envs, policy, config.sampling, config.rollout, generator)
        clock.lap("collect")
        batch = make_batch(turns, config.env.num_envs, policy.processor.pad_token_id)
        batch = guide(batch, policy, config.guidance, microbatch_turns=config.ppo.microbatch_turns)
        clock.lap("guide")
        told, imitation = _imitate(
            policy, turns, self._envs, self._memory, self._corrector, config, iteration
        )
        clock.lap("teach")
        batch = assign_credit(batch, **_credit(config))
        stats = update(
            policy,
            self._optimizer,
            batch,
            config.ppo,
            seed=stream(config.seed, MINIBATCHES, iteration),
            progress=iteration / config.num_updates,
            progress_after=(iteration + 1) / config.num_updates,
            max_logprob_gap=config.rollout.max_logprob_gap,
            imitation=imitation,
        )
        clock.lap("update")
        return turns, batch, stats | told

    def remember(self, iteration: int, batch: Batch, clock: Clock) -> dict[str, float]:
        """Keep the checkpoint and merge if a merge is due; returns the `teacher` group."""
        self._history.add(self.policy.deltas())
        self.teacher_age += 1
        if self._history.merge_is_due(iteration):
            self.policy.load_teacher(self._history.merge())
            self.teacher_age = 0
        clock.lap("merge")
        return _teacher_metrics(self.policy, batch, self._history, self._config, self.teacher_age)

    def save(self, run: Path, **state: Any) -> None:
        """Write a checkpoint of the run's `state` and of everything here."""
        state |= {
            "seed": self._config.seed,
            "start": self._start_print,
            "teacher_age": self.teacher_age,
            "envs": self._envs.state(),
        }
        keep = self._config.save.keep
        checkpoint.save(run, self.policy, self._optimizer, self._history, state, keep=keep)


def _corrector(
    config: TrainConfig, run: Path, envs: Envs, note: Callable[[str], None]
) -> Corrector | None:
    """What corrects thoughts, with `guidance.kind: external`."""
    if config.guidance.kind != "external":
        return None
    return Corrector(
        config.guidance.external,
        run / "external",
        envs.fields,
        envs.field_schemas,
        envs.tools,
        note,
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
        about = (split, config.eval.episodes)
        found[f"{when}/{split}/student"] = _one(policy, config, view, f"student {when}", *about)
        if when == "after":
            with policy.as_teacher():
                found[f"{when}/{split}/teacher"] = _one(policy, config, view, "merge after", *about)
    return found


def _evaluate_between(
    policy: Policy, config: TrainConfig, view: View, update: int, clock: Clock
) -> dict[str, float]:
    """The `eval` group, in updates at which an evaluation is due: student and merge on the same episodes."""
    if not config.eval.interval or update % config.eval.interval:
        return {}
    split, episodes = config.env.eval_split, config.eval.interval_episodes
    student = _one(policy, config, view, f"student at update {update}", split, episodes)
    with policy.as_teacher():
        teacher = _one(policy, config, view, f"merge at update {update}", split, episodes)
    clock.lap("evaluate")
    return {
        "eval/student_success": student["success"],
        "eval/teacher_success": teacher["success"],
        "eval/episodes": float(episodes),
    }


def _one(
    policy: Policy, config: TrainConfig, view: View, what: str, split: str | None, episodes: int
) -> dict[str, Any]:
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
