"""What an update changes, and the update: play, pad, ask the teacher, assign credit, learn, remember, merge."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtr_turbo import checkpoint
from gtr_turbo.collect import MINIBATCHES, SAMPLING, TEACHING, Envs, collect, stream
from gtr_turbo.config import TrainConfig
from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.learning.advantages import assign_credit
from gtr_turbo.learning.losses import masked_mean
from gtr_turbo.learning.update import Imitation, check_gap, make_optimizer, update
from gtr_turbo.parsing import token_texts
from gtr_turbo.policy.engine import Engine
from gtr_turbo.policy.memory import CudaMeter, Microbatch
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.vllm import VllmEngine
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teacher.external import Corrector, correct
from gtr_turbo.teacher.guidance import guide
from gtr_turbo.teacher.history import FactorHistory, History
from gtr_turbo.teacher.imitation import imitation_loss, teach
from gtr_turbo.tracking import Clock
from gtr_turbo.turns.batch import Batch, make_batch
from gtr_turbo.turns.turn import Turn


class Learner:
    """The agent with all that its updates change.

    Attributes:
        policy: the agent, with its teacher.
        engine: writes the agent's replies; None if the policy does so itself.
        teacher_age: updates since the teacher was merged.
    """

    def __init__(
        self, config: TrainConfig, run: Path, note: Callable[[str], None], ranks: Ranks = ALONE
    ) -> None:
        """Load the model and make the environments; `begin` or `resume` comes next. `note` tells of outages.

        Raises:
            ConfigError: the ranks have different starting models, or the model cannot be trained in its type.
        """
        config.model.check_trained()
        self._config, self._ranks = config, ranks
        self.policy = Policy(
            config.model,
            temperature=config.sampling.temperature,
            seed=config.seed,
            ranks=ranks,
            shard=config.distributed.shard,
            teacher_rank=config.teacher_rank,
        )
        self.engine: Engine | None = None
        if config.rollout.engine == "vllm":
            self.engine = VllmEngine(self.policy, config, run / "vllm", note)
        self._optimizer = make_optimizer(self.policy, config.ppo)
        self._own_envs = config.env.num_envs // ranks.world
        first = ranks.rank * self._own_envs
        split = config.env.train_split
        self._envs = Envs(config.env, split, config.seed, self._own_envs, first)
        device = self.policy.device
        meter = CudaMeter(device) if device.type == "cuda" else None
        self._micro = Microbatch(
            config.ppo, note, meter, ranks=ranks, sharded=config.distributed.shard
        )
        self._history = (
            FactorHistory(config.teacher, self.policy.change_of)
            if config.history == "factors"
            else History(config.teacher)
        )
        limit = config.guidance.imitation.limit
        self._memory = Memory(run / "imitation", limit, ranks, self._own_envs)
        self._corrector = _corrector(config, run, self._envs, note, ranks)
        with self.policy.whole():
            start = dict(self.policy.model.named_parameters())
            self._start_print = checkpoint.fingerprint(start)
        critic = checkpoint.fingerprint(dict(self.policy.value_head.named_parameters()))
        ranks.agree("starting models (model.path)", [self._start_print, critic])
        self.teacher_age = 0

    def stops_before(self, update: int) -> str | None:
        """Why there can be no such update, if so; all ranks must call it."""
        return self._corrector.stops_before(update) if self._corrector else None

    def begin(self) -> dict[str, Any]:
        """The start of a run: the first episodes, and the starting model as teacher. No state is known yet."""
        self._memory.restore(0, 0)  # what an attempt without a checkpoint left in this folder
        self._envs.start()
        self.policy.load_start()
        return {}

    def resume(self, run: Path) -> dict[str, Any]:
        """Take up the newest checkpoint of `run`; returns its state.

        Raises:
            CheckpointError: it is damaged, or of other settings or another starting model.
        """
        newest = self._ranks.from_first([path.name for path in checkpoint.folders(run)][-1:])[0]
        checkpoint.check_settings(run / "checkpoints" / newest, self._config)
        state = checkpoint.load(
            run / "checkpoints" / newest,
            self.policy,
            self._optimizer,
            self._history,
            self._start_print,
        )
        self._envs.restore(state["envs"][self._envs.first :][: self._own_envs])
        try:
            self._memory.restore(state["update"], state.get("targets", 0))
        except (OSError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"checkpoint {newest} of {run} needs the thoughts collected so far: {error}. Bring back "
                "RUN/imitation (it goes with the run), or remove the checkpoint to go on from the one before"
            ) from error
        self.teacher_age = state["teacher_age"]
        return state

    def step(self, iteration: int, clock: Clock) -> tuple[list[Turn], Batch, dict[str, float]]:
        """Play, ask the teacher, assign credit, learn; returns (turns, batch, metrics)."""
        config, policy, ranks = self._config, self.policy, self._ranks
        draws = stream(config.seed, SAMPLING, iteration, *ranks.own_stream)
        generator = torch.Generator().manual_seed(draws)
        with policy.whole():
            turns = collect(
                self._envs, policy, config.sampling, config.rollout, generator, self.engine
            )
        gap = _sampling_gap(turns, ranks, config)
        clock.lap("collect")
        batch = make_batch(turns, self._own_envs, policy.processor.pad_token_id)
        self._micro.measure(
            policy,
            batch.inputs.observed,
            config.sampling.max_new_tokens,
            moments=bool(self._optimizer.state),
        )
        played = batch
        with policy.whole():
            batch = self._micro.attempt(
                lambda turns: guide(played, policy, config.guidance, microbatch_turns=turns)
            )
        clock.lap("guide")
        told, imitation = _imitate(
            policy, turns, self._envs, self._memory, self._corrector, self.engine, config, iteration
        )
        engine = self.engine.metrics() if self.engine is not None else {}
        clock.lap("teach")
        batch = credit(batch, ranks, **_credit(config))
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
            ranks=ranks,
            microbatch=self._micro,
        )
        clock.lap("update")
        return turns, batch, stats | gap | told | engine

    def remember(self, iteration: int, batch: Batch, clock: Clock) -> dict[str, float]:
        """Keep the checkpoint and merge if a merge is due; returns the `teacher` group.

        The first rank has the history and merges: it takes more memory than the weights, and the others get
        the same bits.
        """
        factors = self._config.history == "factors"
        newest = self.policy.factors() if factors else self.policy.deltas()
        if self._ranks.first:
            self._history.add(newest)
        else:
            deque(newest, maxlen=0)  # the first rank needs our part of sharded weights
        self.teacher_age += 1
        if self._history.merge_is_due(iteration):
            self.policy.load_teacher(self._ranks.spread(self._history.merged()))
            self.teacher_age = 0
        clock.lap("merge")
        return _teacher_metrics(self.policy, batch, self._history, self._config, self.teacher_age)

    def close(self) -> None:
        """Stop what runs beside the trainer, and free the environments."""
        try:
            self._envs.close()
        finally:
            if self.engine is not None:
                self.engine.close()

    def save(self, run: Path, **state: Any) -> None:
        """Write a checkpoint of the run's `state` and of everything here; all ranks must call it.

        Raises:
            ConfigError: the ranks' weights have drifted apart.
        """
        if not self.policy.sharded:
            weights = dict(self.policy.trained()) | dict(self.policy.value_head.named_parameters())
            self._ranks.agree("weights", checkpoint.fingerprint(weights))
        state |= {
            "seed": self._config.seed,
            "settings": checkpoint.fixed_settings(self._config),
            "start": self._start_print,
            "teacher_age": self.teacher_age,
            "targets": len(self._memory),
            "envs": [env for part in self._ranks.gather(self._envs.state()) for env in part],
        }
        keep = self._config.save.keep
        self._memory.sync()
        checkpoint.save(run, self.policy, self._optimizer, self._history, state, keep=keep)
        if self._ranks.first:
            self._memory.prune(int(checkpoint.folders(run)[0].name))


def _sampling_gap(turns: Sequence[Turn], ranks: Ranks, config: TrainConfig) -> dict[str, float]:
    """How far this process' sampler was from the scoring that replaced it, nats per token over all ranks.

    Raises:
        TrainingError: further than `rollout.max_logprob_gap`.
    """
    rollout = config.rollout
    if not rollout.rescore or rollout.engine != "hf":
        return {}
    own = (sum(t.reply.gap for t in turns), sum(len(t.reply.response_ids) for t in turns))
    gaps, tokens = zip(*ranks.gather(own), strict=True)
    gap = sum(gaps) / sum(tokens)
    check_gap(gap, rollout.max_logprob_gap)
    return {"ppo/sampling_gap": gap}


def _corrector(
    config: TrainConfig, run: Path, envs: Envs, note: Callable[[str], None], ranks: Ranks
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
        ranks=ranks,
    )


def _imitate(
    policy: Policy,
    turns: Sequence[Turn],
    envs: Envs,
    memory: Memory,
    corrector: Corrector | None,
    engine: Engine | None,
    config: TrainConfig,
    iteration: int,
) -> tuple[dict[str, float], Imitation | None]:
    """Guidance by imitation: collect the teacher's thoughts; (metrics, what joins the update's steps)."""
    guidance, own = config.guidance, config.guidance.imitation
    # what a corrector is asked is drawn by all ranks together
    own_stream = () if corrector is not None else memory.ranks.own_stream
    seed = stream(config.seed, TEACHING, iteration, *own_stream)
    generator = torch.Generator().manual_seed(seed)
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
            engine=None if config.teacher_rank is None else engine,
        )
    else:
        return {}, None
    weight = own.weight_at(iteration, config.num_updates)
    if not memory.targets or not weight:
        return told, None

    def losses(draws: torch.Generator, size: int) -> Iterator[tuple[Tensor, float]]:
        parts = imitation_loss(policy, memory, own.samples, draws, microbatch=size, idle=turns[0])
        for loss, number in parts:
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
    metrics = {"teacher/age": float(age), "teacher/student_distance": policy.student_distance()}
    metrics |= policy.mover.take()
    metrics["teacher/distance"] = policy.teacher_distance()
    metrics["teacher/rounding"] = policy.teacher_rounding()
    metrics["teacher/zero_fraction"] = history.zero_fraction
    if batch.kl_tokens is not None:
        assert batch.kl_mask is not None
        total, tokens = policy.ranks.sum(
            torch.stack([batch.kl_tokens.sum(), batch.kl_mask.sum()])
        ).tolist()
        if tokens:
            metrics["teacher/kl"] = total / tokens
    if "teacher/kl" in metrics and config.guidance.kind in ("kl", "static"):
        metrics["teacher/credit"] = config.guidance.beta * metrics["teacher/kl"]
    return metrics


def credit(batch: Batch, ranks: Ranks, **settings: Any) -> Batch:
    """`assign_credit` over the turns of all ranks, each of which computes all of it: a few numbers a turn."""
    if ranks.world == 1:
        return assign_credit(batch, **settings)
    names = (
        "rewards", "old_values", "next_values", "terminated", "done", "thought_mask", "kl", "kl_tokens",
        "kl_mask",
    )  # fmt: skip
    columns = {
        name: ranks.gather_rows(getattr(batch, name), batch.shape)
        for name in names
        if getattr(batch, name) is not None
    }
    every = (batch.shape[0], batch.shape[1] * ranks.world)
    whole = assign_credit(batch.with_(shape=every, **columns), **settings)
    assert whole.advantages is not None
    assert whole.returns is not None
    own = ranks.rows(batch.shape)
    advantages = whole.advantages[own]
    if advantages.ndim > 1:
        advantages = advantages[:, : batch.thought_mask.shape[1]]
    return batch.with_(advantages=advantages, returns=whole.returns[own])


def per_turn(batch: Batch, policy: Policy, envs: int) -> dict[str, list[Any]]:
    """What trajectories hold beside the turns; the text of the tokens for the first `envs` environments."""
    assert batch.advantages is not None
    advantages = batch.advantages
    if advantages.ndim > 1:
        advantages = masked_mean(advantages, batch.inputs.response_mask, dim=1)
    columns: dict[str, list[Any]] = {
        "advantage": advantages.tolist(),
        "tokens": [
            token_texts(row[mask].tolist(), policy.processor.decode)
            if number % batch.shape[1] < envs
            else []
            for number, (row, mask) in enumerate(
                zip(batch.inputs.response_ids, batch.inputs.response_mask, strict=True)
            )
        ],
    }
    if batch.kl_tokens is not None:
        assert batch.kl_mask is not None
        counts = batch.kl_mask.sum(1).tolist()
        columns["kl_tokens"] = [
            [round(x, 5) for x in row[:n]]
            for row, n in zip(batch.kl_tokens.tolist(), counts, strict=True)
        ]
    return columns
