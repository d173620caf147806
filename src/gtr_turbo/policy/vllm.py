"""Replies from vLLM, a server or an engine in this process: adapters out, replies back, and distrust in between.

Every reply is scored by the trainer, which gives what PPO needs (log-probs of the policy, value, hidden state) and
is compared with the log-probs of vLLM. These are the model's own, at temperature 1 and with nothing banned:
the one kind that every vLLM returns, whatever its sampler does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtr_turbo.config import SamplingConfig, TrainConfig
from gtr_turbo.policy.model import Policy
from gtr_turbo.policy.scoring import score
from gtr_turbo.policy.vllm_http import (
    Client,
    EngineError,
    OutageError,
    UnknownAdapterError,
    check_prompt,
    folded,
    picture,
    read_reply,
    read_scores,
)
from gtr_turbo.policy.vllm_inprocess import Resident, ResidentClient
from gtr_turbo.policy.vllm_probe import Probe, check_moved
from gtr_turbo.policy.vllm_server import Server, last_words
from gtr_turbo.turns.batch import make_inputs
from gtr_turbo.turns.turn import Observed, Reply

BAN = -100.0
"""The strongest bias vLLM takes."""
SCORED = 16  # replies in a scoring pass, where `ppo.microbatch_turns` is auto


class VllmEngine:
    """The agent's adapter on vLLM: a server that is owned or was there, or an engine in this process."""

    def __init__(
        self, policy: Policy, config: TrainConfig, folder: Path, note: Callable[[str], None]
    ) -> None:
        """Nothing is started or sent yet; `note` tells of outages that are outlasted.

        Raises:
            ConfigError: vLLM is not installed, or takes no adapter of this rank.
        """
        self._policy, self._folder, self._note = policy, folder.resolve(), note
        self._config, self._bound = config.rollout.vllm, config.rollout.max_logprob_gap
        given = config.ppo.microbatch_turns
        self._rows = SCORED if given == "auto" else given
        self._bias = {str(token): BAN for token in policy.processor.banned_token_ids}
        rank = policy.model.peft_config["default"].r
        self._server: Server | Resident | None = None
        self._client: Client | ResidentClient | None = None
        if self._config.base_url is None:
            kind = Server if self._config.mode == "server" else Resident
            self._server = kind(config.model, self._config, rank, self._folder)
        else:
            self._client = Client(self._config.base_url, self._config.timeout_s)
        self._adapter: str | None = None
        self._probe: Probe | None = None
        self._asleep = False
        self.restarts = 0
        self._gap_sum = self._gap_tokens = 0.0
        self._stats: dict[str, float] = {}

    # -- weights -------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Let vLLM take up the agent's adapter, and check that it did.

        Raises:
            EngineError: vLLM is gone for good, refuses the adapter, or goes on with the old one.
        """
        if self._asleep:
            self._turn(to_sleep=False)
        name = self._name()
        if name == self._adapter:
            return
        self._ready()
        began, old = time.monotonic(), self._adapter
        self._write(name)
        self._adapter = name
        self._insist([self._load])
        if self._probe is not None:
            self._check_probe(self._probe)
        if old is not None:
            assert self._client is not None
            self._client.unload_adapter(old)
            shutil.rmtree(self._folder / old)
        self._stats["engine/sync_seconds"] = time.monotonic() - began

    def rest(self) -> None:
        """Let vLLM sleep until the next `refresh`, with `rollout.vllm.sleep`. Raises as `refresh`."""
        if self._config.sleep and not self._asleep:
            self._turn(to_sleep=True)

    def _turn(self, *, to_sleep: bool) -> None:
        def turn() -> None:
            assert self._client is not None
            if to_sleep:
                self._client.sleep()
            else:
                self._client.wake_up()

        if self._policy.device.type == "cuda":
            torch.cuda.empty_cache()  # what torch keeps at hand is missing to vLLM
        self._insist([turn])
        self._asleep = to_sleep

    def _name(self) -> str:
        """A name for the adapter's content: no other is ever loaded under it, so no cache can mix them up."""
        lora = self._policy.model.peft_config["default"]
        digest = hashlib.sha256(f"{lora.r} {lora.lora_alpha}".encode())
        for name, parameter in sorted(self._policy.trained().items()):
            digest.update(name.encode())
            data = parameter.detach().cpu().contiguous().flatten()
            digest.update(data.view(torch.uint8).numpy().tobytes())
        return f"student-{digest.hexdigest()[:16]}"

    def _write(self, name: str) -> None:
        path, part = self._folder / name, self._folder / f"{name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(path, ignore_errors=True)
        self._policy.save_student(part)
        os.replace(part, path)

    def _load(self) -> None:
        assert self._client is not None
        assert self._adapter is not None
        self._client.load_adapter(self._adapter, str(self._folder / self._adapter))

    def _check_probe(self, probe: Probe) -> None:
        """Score the probe on both sides.

        Raises:
            EngineError: vLLM goes on with the old weights.
        """
        reply = probe.ids.tolist()
        body = self._body(
            probe.observed, {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0}
        )
        body["token_ids"] = [*body["token_ids"], *reply]
        (answer,) = self._insist([lambda: self._generate(body, lambda a: read_scores(a, reply))])
        theirs, ours = torch.tensor(answer), self._own([probe.observed], [probe.ids])[0]
        moved = check_moved(probe, ours, theirs)
        self._stats["engine/probe_change"] = float((theirs - probe.theirs).abs().mean())
        self._stats["engine/probe_change_wanted"] = float((ours - probe.ours).abs().mean())
        if moved is None:
            return  # measured against the same log-probs next time, until the change has added up
        if not moved:
            raise EngineError(
                f"vLLM took the adapter {self._adapter} but still writes with the old weights: on a fixed "
                f"reply the trainer's log-probs changed by {self._stats['engine/probe_change_wanted']:.3g} nats "
                f"per token, vLLM's by {self._stats['engine/probe_change']:.3g}. Look at its log for adapter "
                "layers that it ignores"
            )
        self._probe = Probe(probe.observed, probe.ids, ours, theirs)

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
        seeds = torch.randint(2**31, (len(observed),), generator=generator).tolist()
        temperature = 0.0 if greedy else self._policy.temperature
        settings = {
            "temperature": temperature,
            "top_k": sampling.top_k,
            "repetition_penalty": sampling.repetition_penalty,
            "max_tokens": sampling.max_new_tokens,
        }
        tasks = [
            self._task(seen, {**settings, "seed": seed}, sampling.max_new_tokens)
            for seen, seed in zip(observed, seeds, strict=True)
        ]
        written = self._insist(tasks)
        replies, gaps = [], []
        for at in range(0, len(observed), self._rows):
            part = slice(at, at + self._rows)
            made, gap = self._score(observed[part], written[part])
            replies += made
            gaps.append(gap)
        self._check_gap(torch.cat(gaps))
        return replies

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
        self, seen: Observed, settings: Mapping[str, Any], limit: int
    ) -> Callable[[], tuple[list[int], list[float]]]:
        body, prompt = self._body(seen, settings), seen.prompt_ids.tolist()

        def read(answer: Mapping[str, Any]) -> tuple[list[int], list[float]]:
            check_prompt(answer, prompt)
            ids, logprobs, ended = read_reply(answer)
            self._check_reply(ids, ended, limit)
            return ids, logprobs

        return lambda: self._generate(body, read)

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

    def _generate(self, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Any]) -> Any:
        assert self._client is not None
        return read(self._client.generate({**body, "model": self._adapter}))

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
        """The `engine` group, since the last call."""
        gap = self._gap_sum / max(1.0, self._gap_tokens)
        found = {"engine/logprob_gap": gap, "engine/restarts": float(self.restarts), **self._stats}
        self._gap_sum = self._gap_tokens = 0.0
        self._stats = {}
        return found

    # -- outages -------------------------------------------------------------------------------

    def _insist(self, tasks: list[Callable[[], Any]]) -> list[Any]:
        """Results of requests, in order; those that fail for a while are repeated, with vLLM mended.

        Raises:
            EngineError: it stays so, or one is refused.
        """
        self._ready()
        found: dict[int, Any] = {}
        for attempt in range(self._config.retries + 1):
            left = [i for i in range(len(tasks)) if i not in found]
            with ThreadPoolExecutor(min(len(left), self._config.concurrency)) as pool:
                futures = {i: pool.submit(tasks[i]) for i in left}
            outages = []
            for i, future in futures.items():
                try:
                    found[i] = future.result()
                except OutageError as outage:
                    outages.append(outage)
            if not outages:
                return [found[i] for i in range(len(tasks))]
            if attempt < self._config.retries:
                self._mend(outages, attempt)
        own = f"the run's own vLLM ({self._server.log})" if self._server is not None else None
        where = own or self._config.base_url
        raise EngineError(
            f"no usable answer from {where} after {self._config.retries + 1} tries: {outages[-1]}. Then go on with "
            "--resume (without it, if there is no checkpoint yet)"
        )

    def _mend(self, outages: list[OutageError], attempt: int) -> None:
        """Do what can be done before the next try: start a dead or silent vLLM anew, load the adapter, wait."""
        self._note(f"vLLM: {outages[-1]}; trying again")
        assert self._client is not None
        time.sleep(self._config.backoff_s * 2**attempt)
        if self._server is not None and not (self._server.alive and self._client.healthy()):
            if self.restarts == self._config.restarts:
                raise EngineError(
                    f"vLLM died {self.restarts + 1} times (rollout.vllm.restarts={self._config.restarts}): "
                    f"{last_words(self._server.log)}"
                )
            self.restarts += 1
            self._server.stop()
            self._client = self._server.start()
            self._reload()
        elif any(isinstance(outage, UnknownAdapterError) for outage in outages):
            self._reload()

    def _ready(self) -> None:
        if self._client is None:
            assert self._server is not None
            self._client = self._server.start()

    def _reload(self) -> None:
        try:
            self._load()
        except OutageError as outage:
            self._note(f"vLLM: {outage}; trying again")

    def close(self) -> None:
        """Stop vLLM, if it is ours, and remove the adapter that only it read."""
        if self._server is not None:
            self._server.stop()
        elif self._adapter is not None and self._client is not None:
            self._client.unload_adapter(self._adapter)
        self._client = None
        if self._adapter is not None:
            shutil.rmtree(self._folder / self._adapter, ignore_errors=True)
