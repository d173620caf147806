"""Imitation of thoughts (SFT guidance): who writes them and what is trained.

A target is the teacher's thought with the agent's own action behind it, for an observation of the agent. The
thought (up to the key `"action"`, which ends it) and the end token are trained; the action is not: it is the
agent's, and PPO explores it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gtr_turbo.config import SamplingConfig
from gtr_turbo.parsing import parse, thought_tokens
from gtr_turbo.policy.engine import Engine
from gtr_turbo.policy.generation import generate
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.processing import Processor
from gtr_turbo.policy.scoring import score
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teaching_config import GuidanceConfig, ImitationConfig
from gtr_turbo.turns.batch import by_length, make_inputs, pad, select
from gtr_turbo.turns.turn import Observed, Turn

ACTION_KEY = re.compile(r"""["']?action["']?\s*:\s*["']?""")
"""It says nothing of the action, and ends the thought: it is trained with the thought."""

FENCE = re.compile(r"\s*```\s*$")
"""The end of a code block around a reply."""


def splice(
    processor: Processor, teacher: str, agent: str, fields: Sequence[str], *, whole: bool = False
) -> tuple[Tensor, int] | None:
    """The teacher's thought and the agent's action as one reply, which ends where its object does.

    What either wrote behind its object is left out, but for the end of a code block that the teacher began.

    Args:
        processor: its tokenizer.
        teacher: a reply.
        agent: a valid reply.
        fields: keys a reply must have.
        whole: keep the teacher's action, and train it.

    Returns:
        (ids (R,) with the end token, how many of the first are trained); None if the teacher's reply is not valid,
        if its thought is not JSON as it stands, as what `parse` has to repair is not to be learned, or if the
        tokenizer cannot write the action as it is.
    """
    teacher, agent = processor.clean(teacher), processor.clean(agent)
    written, acted = parse(teacher, fields), parse(agent, fields)
    if not (written.valid and acted.valid):
        return None
    source, own = (teacher, written) if whole else (agent, acted)
    tail = source[own.action_start :]
    if own.strict:
        tail = tail[: json.JSONDecoder().raw_decode("{" + tail)[1] - 1]
    else:
        tail = f'"action": {json.dumps(own.fields["action"], ensure_ascii=False)}}}'
    if "```" in teacher[: written.action_start] and (fence := FENCE.search(teacher)):
        tail += fence[0]
    ids = processor.reply_ids(teacher[: written.action_start] + tail)
    text = processor.decode(ids[:-1])  # a tokenizer may write it otherwise: Qwen's composes accents
    made = parse(text, fields)
    if not made.strict or made.action != own.action:
        return None
    if whole:
        return ids, len(ids)
    key = ACTION_KEY.match(text, made.action_start)
    begins = key.end() if key else made.action_start
    return ids, thought_tokens(ids[:-1].tolist(), begins, processor.decode)


@dataclass(frozen=True, slots=True)
class Written:
    """What a teacher wrote for an update's turns."""

    texts: list[str | None]
    """One reply per turn; None where there is none."""
    metrics: dict[str, float]


Writer = Callable[[list[Observed], SamplingConfig, torch.Generator, float], list[Tensor]]
"""(observations, limits, source of randomness, temperature) -> the ids of a reply to each."""


@contextmanager
def _writer(policy: Policy, engine: Engine | None) -> Iterator[Writer]:
    """The merge as it lies in the trainer, or as the engine has it."""
    if engine is None:
        with policy.as_teacher():
            yield lambda observed, sampling, generator, temperature: [
                reply.response_ids
                for reply in generate(
                    policy, observed, sampling, generator, temperature=temperature
                )
            ]
        return
    engine.refresh_teacher()
    yield lambda observed, sampling, generator, temperature: engine.write_as_teacher(
        observed, sampling, generator, temperature=temperature
    )
    engine.rest()


def write_thoughts(
    policy: Policy,
    turns: Sequence[Turn],
    fields: Sequence[str],
    config: ImitationConfig,
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    batch_turns: int,
    engine: Engine | None = None,
) -> Written:
    """Replies of the merged teacher to the observations of the valid turns.

    Answers that cannot be read are drawn again, hotter each time. The metrics are over the turns of all ranks.

    Args:
        policy: has the teacher.
        turns: of this rank.
        fields: JSON keys a reply must have.
        config: temperatures and tries.
        sampling: its limits.
        generator: the only source of randomness.
        batch_turns: replies that the trainer writes at once; an engine is asked for all of them.
        engine: writes with the teacher's adapter; None decodes in this process.
    """
    texts: list[str | None] = [None] * len(turns)
    open_rows = [i for i, turn in enumerate(turns) if turn.valid]
    asked, temperature, tries = len(open_rows), config.temperature, 0
    plain = replace(sampling, top_k=0, repetition_penalty=1.0)
    size = batch_turns if engine is None else len(turns)
    with _writer(policy, engine) as write:
        for attempt in range(config.retries + 1):
            failed = []
            for at in range(0, len(open_rows), size):
                rows = open_rows[at : at + size]
                tries += len(rows)
                replies = write([turns[i].observed for i in rows], plain, generator, temperature)
                for i, reply in zip(rows, replies, strict=True):
                    ids = reply.tolist()
                    ended = ids[-1] == policy.processor.end_token_id
                    text = policy.processor.decode(ids[:-1] if ended else ids)
                    if ended and parse(text, fields).valid:
                        texts[i] = text
                    else:
                        failed.append(i)
            open_rows = failed
            if not open_rows or attempt == config.retries:
                break
            temperature = min(temperature * config.temperature_ramp, config.temperature_max)
    counts = torch.tensor([asked, asked - len(open_rows), tries], dtype=torch.float64)
    of_all, done, drawn = policy.ranks.sum(counts).tolist()
    metrics = {"imitation/asked": of_all}
    if of_all:
        metrics |= {"imitation/written": done / of_all, "imitation/tries": drawn / of_all}
    return Written(texts, metrics)


def teach(
    policy: Policy,
    turns: Sequence[Turn],
    fields: Sequence[str],
    memory: Memory,
    guidance: GuidanceConfig,
    sampling: SamplingConfig,
    generator: torch.Generator,
    *,
    update: int,
    engine: Engine | None = None,
) -> dict[str, float]:
    """Let the merge write thoughts for an update's turns, and collect them; returns the `imitation` group.

    Raises:
        EngineError: an `engine` is to write them, and cannot.
    """
    config = guidance.imitation
    written = write_thoughts(
        policy,
        turns,
        fields,
        config,
        sampling,
        generator,
        batch_turns=config.samples,
        engine=engine,
    )
    whole = guidance.tokens == "response"
    made: list[tuple[Tensor, int] | None] = []
    for turn, text in zip(turns, written.texts, strict=True):
        target = (
            None if text is None else splice(policy.processor, text, turn.text, fields, whole=whole)
        )
        if target is not None and len(target[0]) > sampling.max_new_tokens:
            target = None  # it would teach the agent to be cut
        made.append(target)
    memory.add(update, turns, made)
    lost = sum(text is not None for text in written.texts) - sum(t is not None for t in made)
    return written.metrics | {
        "imitation/unusable": float(policy.ranks.sum(torch.tensor(lost))),
        "imitation/collected": float(len(memory)),
    }


def imitation_loss(
    policy: Policy,
    memory: Memory,
    count: int,
    generator: torch.Generator,
    *,
    microbatch: int,
    idle: Turn | None = None,
) -> Iterator[tuple[Tensor, float]]:
    """Cross-entropy on random targets, a part for each micro-batch of those of this rank.

    Args:
        policy: is scored.
        memory: has the targets.
        count: how many are drawn, over all ranks.
        generator: draws; all ranks must give the same.
        microbatch: targets of a forward pass.
        idle: any turn, for forward passes that only other ranks need (sharded weights).

    Yields:
        (sum of the micro-batch's -log p over its trained tokens, divided by the number of trained tokens of all
        drawn targets; the weights' own temperature 1), its value.
    """
    drawn = memory.draw(count, generator)
    total = sum(int(target.mask.sum()) for target in drawn)
    own, pad_id = memory.own(drawn), policy.processor.pad_token_id
    passes = -(-len(own) // microbatch)
    if own:
        inputs = make_inputs(
            memory.observe(own, policy), [target.response_ids for target in own], pad_id
        )
        masks, _ = pad([target.mask for target in own], left=False, value=0)
        for part in by_length(inputs, torch.arange(len(own))).split(microbatch):
            scores = score(policy, select(inputs, part), temperature=1.0)
            mask = masks[part, : scores.logprobs.shape[1]].to(scores.logprobs.device)
            loss = -(scores.logprobs * mask).sum() / total
            yield loss, float(loss.detach())
    if policy.sharded:
        assert idle is not None
        most = Counter(target.rank for target in drawn).most_common(1)[0][1]
        inputs = make_inputs([idle.observed], [idle.reply.response_ids], pad_id)
        for _ in range(passes, -(-most // microbatch)):
            yield 0.0 * score(policy, inputs, temperature=1.0).logprobs.sum(), 0.0
