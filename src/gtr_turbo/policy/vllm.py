"""Replies from vLLM, a server or an engine in this process: adapters out, replies back, and distrust in between.

Every reply of the agent is scored by the trainer, which gives what PPO needs (log-probs of the policy, value,
hidden state) and is compared with vLLM's log-probs. These are the model's own, at temperature 1 and with nothing
banned: the one kind that every vLLM returns, whatever its sampler does. The teacher's thoughts are not scored; its
adapter is checked on a fixed reply.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtr_turbo.config import SamplingConfig, TrainConfig
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.policy.vllm_http import (
    EngineError,
    OutageError,
    check_prompt,
    folded,
    picture,
    read_reply,
    read_scores,
)
from gtr_turbo.policy.vllm_link import Link, content_name
from gtr_turbo.policy.vllm_probe import Probe, check_moved, mistaken_for
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Observed, Reply

BAN = -100.0
"""The strongest bias vLLM takes."""
SCORED = 16  # replies in a scoring pass, where `ppo.microbatch_turns` is auto


class VllmEngine:
    """The agent's and the teacher's adapter on a vLLM of the rank's own, or on one that was there."""

    def __init__(
        self, policy: Policy, config: TrainConfig, folder: Path, note: Callable[[str], None]
    ) -> None:
        """Nothing is started or sent yet; `note` tells of outages that are outlasted.

        Raises:
            ConfigError: vLLM is not installed, or takes no adapter of this rank.
        """
        ranks = policy.ranks
        folder = folder.resolve() / f"rank-{ranks.rank}" if ranks.world > 1 else folder.resolve()
        self._policy, self._folder = policy, folder
        self._config, self._bound = config.rollout.vllm, config.rollout.max_logprob_gap
        given = config.ppo.microbatch_turns
        self._rows = SCORED if given == "auto" else given
        self._bias = {str(token): BAN for token in policy.processor.banned_token_ids}
        rank = max(policy.model.peft_config["default"].r, config.teacher_rank or 0)
        self._link = Link(config, ranks, rank, folder, note)
        self._names: dict[str, str] = {}  # of the adapters that vLLM writes with, by whose they are
        self._probe: Probe | None = None
        self._known: dict[str, Tensor] = {}  # log-probs of the probe by what the teacher was before
        self._asleep = False
        self._gap_sum = self._gap_tokens = 0.0
        self._stats: dict[str, float] = {}

    # -- weights -------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Let vLLM take up the agent's adapter, and check that it did; all ranks must call it.

        Raises:
            EngineError: vLLM is gone for good, refuses the adapter, or goes on with the old one.
        """
        self._wake()
        lora = self._policy.model.peft_config["default"]
        with self._policy.whole():
            name = content_name(
                f"student {lora.r} {lora.lora_alpha}", self._policy.trained().items()
            )
            self._replace(
                name,
                lambda path: self._policy.save_student(path, everywhere=True),
                self._check_student,
            )

    def refresh_teacher(self) -> None:
        """The same of the teacher's adapter, `policy.cut`, after the agent's first replies."""
        self._wake()
        cut = self._policy.cut
        assert cut is not None
        name = content_name(f"teacher {cut.rank}", cut.tensors().items())
        self._replace(name, self._policy.save_cut_teacher, self._check_teacher)
        self._stats["engine/teacher_energy"] = cut.energy

    def _replace(self, name: str, write: Callable[[Path], None], check: Callable[[], None]) -> None:
        """Write, load and check an adapter, then forget the one before; nothing if there is no other."""
        role = name.partition("-")[0]
        old = self._names.get(role)
        if name == old:
            return
        began = time.monotonic()
        path, part = self._folder / name, self._folder / f"{name}.part"
        if not self._names:  # a run that was killed may have left some
            self._remove_adapters()
        write(part)
        os.replace(part, path)
        self._link.load(name, path)
        self._names[role] = name
        if self._probe is not None:
            check()
        if old is not None:
            self._link.unload(old)
            shutil.rmtree(self._folder / old)
        seconds = self._stats.get("engine/sync_seconds", 0.0)
        self._stats["engine/sync_seconds"] = seconds + time.monotonic() - began

    def rest(self) -> None:
        """Let vLLM sleep until the next `refresh`, with `rollout.vllm.sleep`. Raises as `refresh`."""
        if self._config.sleep and not self._asleep:
            self._turn(asleep=True)

    def _wake(self) -> None:
        if self._asleep:
            self._turn(asleep=False)

    def _turn(self, *, asleep: bool) -> None:
        if self._policy.device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps at hand is missing to vLLM
        self._link.sleep(asleep=asleep)
        self._asleep = asleep

    def _theirs(self, role: str, probe: Probe) -> Tensor:
        """VLLM's log-probs of the probe, (R,), with one of the adapters."""
        reply = probe.ids.tolist()
        body = self._body(
            probe.observed, {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        )
        body["token_ids"] = [*body["token_ids"], *reply]
        name = self._names[role]
        task = [lambda: self._link.generate(name, body, lambda a: read_scores(a, reply))]
        return torch.tensor(self._link.insist(task)[0])

    def _ours(self, probe: Probe) -> Tensor:
        """The trainer's, with the weights in place."""
        return self._own([probe.observed], [probe.ids])[0]

    def _check_student(self) -> None:
        """Score the probe on both sides.

        Raises:
            EngineError: vLLM goes on with the old weights.
        """
        assert self._probe is not None
        probe = self._probe
        theirs, ours = self._theirs("student", probe), self._ours(probe)
        moved = check_moved(probe, ours, theirs)
        self._stats["engine/probe_change"] = float((theirs - probe.theirs).abs().mean())
        self._stats["engine/probe_change_wanted"] = float((ours - probe.ours).abs().mean())
        if moved is None:
            return  # measured against the same log-probs next time, until the change has added up
        if not moved:
            raise EngineError(
                f"vLLM took the adapter {self._names['student']} but still writes with the old weights: on a fixed "
                f"reply the trainer's log-probs changed by {self._stats['engine/probe_change_wanted']:.3g} nats "
                f"per token, vLLM's by {self._stats['engine/probe_change']:.3g}. Look at its log for adapter "
                "layers that it ignores"
            )
        self._probe = Probe(probe.observed, probe.ids, ours, theirs)

    def _check_teacher(self) -> None:
        """Score the probe on both sides, by the teacher as it was cut, and by what vLLM may take for it.

        Raises:
            EngineError: vLLM writes with other weights than the teacher's.
        """
        assert self._probe is not None
        probe, policy = self._probe, self._policy
        with policy.whole():
            student = self._ours(probe)
        with policy.as_cut_teacher():
            ours = self._ours(probe)
        if "start" not in self._known:
            with policy.as_start():
                self._known["start"] = self._ours(probe)
        noise = float((self._theirs("student", probe) - student).abs().mean())
        theirs = self._theirs("teacher", probe)
        gap = self._stats["engine/teacher_gap"] = float((theirs - ours).abs().mean())
        other = mistaken_for(theirs, ours, {"agent": student, **self._known}, noise)
        if other is not None or not gap <= self._bound:
            nearer = f", and nearer to those of the {other}" if other is not None else ""
            raise EngineError(
                f"vLLM took the adapter {self._names['teacher']} but does not write with it: on a fixed reply its "
                f"log-probs are {gap:.3g} nats per token away from the teacher's{nearer} (bound "
                f"rollout.max_logprob_gap={self._bound}). Look at its log for adapter layers that it ignores; "
                "rollout.vllm.teacher_rank=null does without this adapter"
            )
        self._known["teacher before"] = ours

    # -- replies -------------------------------------------------------------------------------

    def generate(
        self,
        observed: list[Observed],
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        greedy: bool = False,
    ) -> list[Reply]:
        """Write one reply to each observation.

        Args:
            observed: B observations.
            sampling: limits and warps.
            generator: the seed of each reply's sampling is drawn from it.
            greedy: take the likeliest token instead of sampling.

        Raises:
            EngineError: vLLM is gone for good, its prompts are not the trainer's, or its log-probs differ
                from the trainer's by more than `rollout.max_logprob_gap`.
        """
        temperature = 0.0 if greedy else self._policy.temperature
        written = self._written("student", observed, sampling, generator, temperature)
        replies, gaps = [], []
        for at in range(0, len(observed), self._rows):
            part = slice(at, at + self._rows)
            made, gap = self._score(observed[part], written[part])
            replies += made
            gaps.append(gap)
        self._check_gap(torch.cat(gaps))
        return replies

    def write_as_teacher(
        self,
        observed: list[Observed],
        sampling: SamplingConfig,
        generator: torch.Generator,
        *,
        temperature: float,
    ) -> list[Tensor]:
        """The ids of one reply of the teacher's adapter to each observation. Raises as `generate`."""
        written = self._written("teacher", observed, sampling, generator, temperature)
        return [torch.tensor(ids) for ids, _ in written]

    def _written(
        self,
        role: str,
        observed: list[Observed],
        sampling: SamplingConfig,
        generator: torch.Generator,
        temperature: float,
    ) -> list[tuple[list[int], list[float]]]:
        """(ids, vLLM's log-probs of them) for each observation."""
        seeds = torch.randint(2**31, (len(observed),), generator=generator).tolist()
        settings = {
            "temperature": temperature,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_new_tokens,
        }
        tasks = [
            self._task(self._names[role], seen, {**settings, "seed": seed})
            for seen, seed in zip(observed, seeds, strict=True)
        ]
        return self._link.insist(tasks)

    def _body(self, seen: Observed, settings: Mapping[str, Any]) -> dict[str, Any]:
        """A request; every setting of the sampler is given, so that none is left to vLLM."""
        processor = self._policy.processor
        return {
            "token_ids": folded(seen.prompt_ids.tolist(), processor.image_token_id),
            "content_parts": [{"type": "image_url", "url": picture(processor.shrink(seen.frame))}],
            "return_token_ids": True,
            "sampling_params": {
                "top_p": 1.0,
                "min_p": 0.0,
                "logprobs": 0,  # of the token itself
                "detokenize": False,
                "ignore_eos": True,
                "stop_token_ids": [processor.end_token_id],
                "logit_bias": self._bias,
                **settings,
            },
        }

    def _task(
        self, name: str, seen: Observed, settings: Mapping[str, Any]
    ) -> Callable[[], tuple[list[int], list[float]]]:
        body, prompt, limit = (
            self._body(seen, settings), seen.prompt_ids.tolist(), settings["max_tokens"],
        )  # fmt: skip

        def read(answer: Mapping[str, Any]) -> tuple[list[int], list[float]]:
            check_prompt(answer, prompt)
            ids, logprobs, ended = read_reply(answer)
            self._check_reply(ids, ended, limit)
            return ids, logprobs

        return lambda: self._link.generate(name, body, read)

    def _check_reply(self, ids: list[int], ended: str, limit: int) -> None:
        processor = self._policy.processor
        end = processor.end_token_id
        if (ended == "stop") != (ids[-1] == end) or end in ids[:-1] or len(ids) > limit:
            raise OutageError("its reply does not end where it must")
        if ended == "length" and len(ids) < limit:
            raise EngineError(
                f"vLLM cut a reply after {len(ids)} of {limit} tokens: its context is full; raise "
                f"rollout.vllm.max_model_len (now {self._config.max_model_len}), or --max-model-len of a server "
                "elsewhere"
            )
        if max(ids) >= len(self._policy.banned) or self._policy.banned[ids].any():
            raise EngineError(
                "vLLM sampled a placeholder of a picture, or a token that is none; serve the model that is "
                "trained, with a vLLM that heeds logit_bias"
            )

    @torch.no_grad()
    def _own(self, observed: list[Observed], ids: list[Tensor]) -> list[Tensor]:
        """The model's own log-probs of replies, as the trainer computes them."""
        inputs = make_inputs(observed, ids, self._policy.processor.pad_token_id)
        scores = score(self._policy, inputs, raw=True)
        assert scores.raw is not None
        return [row[: len(i)].cpu() for row, i in zip(scores.raw, ids, strict=True)]

    @torch.no_grad()
    def _score(
        self, observed: list[Observed], written: list[tuple[list[int], list[float]]]
    ) -> tuple[list[Reply], Tensor]:
        """Replies as PPO needs them, and the gap of each of their tokens."""
        ids = [torch.tensor(row) for row, _ in written]
        inputs = make_inputs(observed, ids, self._policy.processor.pad_token_id)
        scores = score(self._policy, inputs, raw=True)
        assert scores.raw is not None
        values = self._policy.value_head(scores.hidden)
        replies, gaps = [], []
        for i, (row, (_, theirs)) in enumerate(zip(ids, written, strict=True)):
            ours = scores.raw[i, : len(row)].cpu()
            gaps.append((torch.tensor(theirs) - ours).abs())
            if self._probe is None:
                self._probe = Probe(observed[i], row, ours, torch.tensor(theirs))
            replies.append(
                Reply(
                    response_ids=row,
                    logprobs=scores.logprobs[i, : len(row)].cpu(),
                    value=float(values[i]),
                    hidden=scores.hidden[i].float().cpu(),
                )
            )
        return replies, torch.cat(gaps)

    def _check_gap(self, gaps: Tensor) -> None:
        """Add the gap of each token, (tokens,), to the update's; mean over the call bounds it."""
        self._gap_sum += float(gaps.sum())
        self._gap_tokens += len(gaps)
        gap = float(gaps.mean())
        if not gap <= self._bound:
            raise EngineError(
                f"vLLM's log-probs differ from the trainer's by {gap:.3g} nats per token (bound "
                f"rollout.max_logprob_gap={self._bound}): it writes with other weights than those that are "
                "trained. Serve the model that is trained, in the type model.dtype"
            )

    def metrics(self) -> dict[str, float]:
        """The `engine` group, since the last call, over all ranks, each of which must call it."""
        own = {
            "gap": self._gap_sum,
            "tokens": self._gap_tokens,
            "restarts": float(self._link.restarts),
            **self._stats,
        }
        rows = self._policy.ranks.gather(own)
        gap, tokens, restarts = (
            sum(row.pop(name) for row in rows) for name in ("gap", "tokens", "restarts")
        )
        self._gap_sum = self._gap_tokens = 0.0
        self._stats = {}
        # of the rank with the largest: it was waited for, or it is the one to look at
        largest = {
            name: max(row[name] for row in rows if name in row) for row in rows for name in row
        }
        return {
            "engine/logprob_gap": gap / max(1.0, tokens),
            "engine/restarts": restarts,
            **largest,
        }

    def close(self) -> None:
        """Stop vLLM, if it is ours, and remove the adapters that only it read."""
        self._link.close()
        self._remove_adapters()

    def _remove_adapters(self) -> None:
        """Remove all adapters' files in our folder, finished or not."""
        for path in (*self._folder.glob("student-*"), *self._folder.glob("teacher-*")):
            shutil.rmtree(path, ignore_errors=True)
