"""Settings of the guidance and of the teacher."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from gtr_turbo.checks import ConfigError, fraction, key_from, not_negative, positive


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """Imitation of the teacher's thoughts; what it writes is collected over the run (DAgger)."""

    _prefix = "guidance.imitation."

    weight: float = 1.0
    """Of the cross-entropy per token in the loss."""
    weight_final: float | None = None
    """Its value in the last update, to which it changes linearly; null is `weight`. At 0 thoughts are collected all
    the same."""
    samples: int = 64
    """Collected turns that join each optimizer step. The trainer also lets the teacher write so many replies at
    once."""
    limit: int = 0
    """Newest turns that are kept, on disk those that a checkpoint needs too; 0 keeps all, as published. A larger
    one on resume does not bring back what was dropped."""
    temperature: float = 0.2
    """At which the teacher writes."""
    temperature_ramp: float = 1.1
    """Factor of the temperature after an answer that cannot be read."""
    temperature_max: float = 0.9
    """Where the ramp ends."""
    retries: int = 4
    """New tries for answers that cannot be read; what is left after them is skipped, and counted."""

    def __post_init__(self) -> None:
        positive(self, "samples", "temperature", "temperature_ramp", "temperature_max")
        not_negative(self, "weight", "limit", "retries")
        if self.weight_final is not None:
            not_negative(self, "weight_final")
        if self.temperature_ramp < 1 or self.temperature > self.temperature_max:
            raise ConfigError(
                f"guidance.imitation: new tries must not be colder, but temperature_ramp={self.temperature_ramp}, "
                f"temperature={self.temperature} and temperature_max={self.temperature_max} are given; the ramp is "
                "at least 1, the maximum at least the temperature"
            )

    @property
    def last_weight(self) -> float:
        """That of the last update."""
        return self.weight if self.weight_final is None else self.weight_final

    def weight_at(self, update: int, updates: int) -> float:
        """The weight in an update, counted from 0, of a run of so many; that of a single one is `weight`."""
        return self.weight + (self.last_weight - self.weight) * update / max(1, updates - 1)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What a run may spend on its corrector, resumed parts included; 0 is unlimited."""

    _prefix = "guidance.external.budget."

    calls: int = 0
    """Requests sent."""
    tokens: int = 0
    """Tokens in and out, as the endpoint reports them."""
    dollars: float = 0.0
    """Needs at least one of the prices."""
    input_price: float = 0.0
    """Dollars per million tokens in."""
    output_price: float = 0.0
    """Dollars per million tokens out."""

    def __post_init__(self) -> None:
        not_negative(self, "calls", "tokens", "dollars", "input_price", "output_price")
        if self.dollars and not (self.input_price or self.output_price):
            raise ConfigError(
                f"guidance.external.budget.dollars={self.dollars} cannot be kept without prices; set "
                "guidance.external.budget.input_price and output_price (dollars per million tokens)"
            )


@dataclass(frozen=True, kw_only=True)
class ExternalConfig:
    """A corrector of thoughts behind an OpenAI-compatible endpoint (GTR, arXiv 2503.08525)."""

    _prefix = "guidance.external."

    base_url: str = "https://api.openai.com/v1"
    """Where `/chat/completions` is."""
    model: str = "gpt-4o"
    """Name the endpoint knows the model by; the default is GTR's."""
    key_variable: str | None = "OPENAI_API_KEY"
    """NAME of the environment variable that holds the key; null for an endpoint that wants none."""
    share: float = 1.0
    """Of an update's valid turns that are sent, drawn at random."""
    concurrency: int = 8
    """Turns that are asked about at the same time."""
    timeout_s: float = 60.0
    """Longest wait for a response, to its last byte."""
    retries: int = 4
    """New tries for a turn, whatever went wrong; those of an outage are forgotten when it ends."""
    backoff_s: float = 1.0
    """Pause before the first new try, doubled each time up to 60 s, with jitter; `Retry-After` comes first, and one
    above 60 s ends the tries."""
    temperature: float | None = 0.2
    """Of the corrector; null sends none, for models that refuse it."""
    max_tokens: int = 1024
    """Longest response."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The endpoint's name for it; OpenAI's reasoning models know the second only."""
    tools: bool = True
    """Offer the environment's tools, where it has any."""
    tool_rounds: int = 4
    """Responses of a conversation that may call tools."""
    outage: Literal["wait", "skip"] = "skip"
    """When an endpoint cannot be reached or refuses work (429, 5xx) after all retries: leave the turns without
    guidance, or wait."""
    wait_s: float = 3600.0
    """With `wait`: the run stops, resumable, after so long without a response."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """Where the run stops spending."""

    def __post_init__(self) -> None:
        positive(self, "concurrency", "timeout_s", "backoff_s", "max_tokens", "wait_s")
        not_negative(self, "retries", "tool_rounds")
        fraction(self, "share")
        if self.temperature is not None:
            not_negative(self, "temperature")
        if not re.fullmatch("[A-Z_][A-Z0-9_]*", self.key_variable or "_"):
            raise ConfigError(
                "guidance.external.key_variable must be the NAME of an environment variable, in capitals, "
                "such as OPENAI_API_KEY; a key itself does not belong into settings"
            )
        if not is_base_url(self.base_url):
            raise ConfigError(
                "guidance.external.base_url must be http(s)://HOST[:PORT]/PATH in ASCII, without user, password, "
                "query or fragment (keys are read from the environment variable that "
                "guidance.external.key_variable names)"
            )

    def key(self) -> str:
        """The key, from the environment; empty if none is wanted.

        Raises:
            ConfigError: the variable is not set, or holds what a header cannot.
        """
        if self.key_variable is None:
            return ""
        if not (key := key_from(self.key_variable)):
            raise ConfigError(
                f"guidance.kind='external' needs a key for {self.base_url}, and the environment variable "
                f"{self.key_variable} is not set; export it, name another as "
                "guidance.external.key_variable, or give null there if the endpoint wants no key"
            )
        return key


def is_base_url(text: str) -> bool:
    """Whether a client can take it, and it holds an address only."""
    try:
        url = urlsplit(text)
        host, _ = url.hostname or "", url.port
        if ":" in host or re.fullmatch(r"[\d.]+", host):
            ipaddress.ip_address(host)
    except ValueError:  # brackets, port or digits that are none
        return False
    return bool(
        re.fullmatch("[!-~]{1,2000}", text)
        and url.scheme in ("http", "https")
        and re.fullmatch(r"[\w.:-]+", host)
        and not (url.query or url.fragment or "@" in url.netloc)
    )


@dataclass(frozen=True, kw_only=True)
class GuidanceConfig:
    """How the teacher guides the agent's thoughts."""

    _prefix = "guidance."

    kind: Literal["none", "static", "kl", "sft", "external"] = "kl"
    """`none` is RL4VLM; `kl` penalises the reverse KL to the merge on the thought's tokens, `static` the KL to
    the starting model; `sft` imitates thoughts that the merge writes for the same observations; `external` is
    GTR: it imitates thoughts that a model behind an endpoint has corrected."""
    tokens: Literal["thought", "response"] = "thought"
    """What is guided; the paper guides thoughts only, as guided actions explore less."""
    estimator: Literal["clip", "k1", "abs", "k3", "full"] = "clip"
    """KL estimate per token; `full` sums over the whole vocabulary."""
    credit: Literal["advantage", "reward", "token"] = "advantage"
    """Where it enters: each turn's advantage (the paper's equation), its reward (the paper's Algorithm 2),
    or each token's advantage (dense; needs `ppo.ratio: token`)."""
    monitor: bool = True
    """With `none`, `sft` and `external`, which do not use it: still measure the KL to the merge, which shows
    collapse, at the cost of a scoring pass with the teacher."""
    beta: float = 5.0
    """Weight of the KL; 1 is the paper's."""
    center: bool = True
    """Subtract the KL's mean over the update first: a penalty that is never negative pushes every reply down."""

    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    """Of `sft`; its weights, samples and limit of `external` too."""
    external: ExternalConfig = field(default_factory=ExternalConfig)
    """Of `external`."""

    def __post_init__(self) -> None:
        not_negative(self, "beta")
        if self.kind == "external" and self.tokens != "thought":
            raise ConfigError(
                f"guidance.tokens={self.tokens!r} cannot be with guidance.kind='external': a corrector "
                "writes thoughts, no actions; set guidance.tokens to thought"
            )


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The merge of the run's own checkpoints."""

    _prefix = "teacher."

    method: Literal["ties", "linear"] = "ties"
    """How checkpoints are merged."""
    density: float = 0.8
    """TIES keeps this fraction of each change, the largest by magnitude."""
    weights: Literal["sma", "ema"] = "sma"
    """All checkpoints alike, or exponentially fewer for older ones."""
    alpha: float = 0.5
    """EMA's weight of the newest checkpoint."""
    interval: int = 1
    """Updates between merges."""
    history: Literal["auto", "sums", "factors"] = "auto"
    """What is kept of the checkpoints: `sums` per merged weight, whatever their number, or each one's LoRA
    `factors` (docs/performance.md); the merge is the same. `auto`: `factors` for TIES of adapters, else `sums`."""

    def __post_init__(self) -> None:
        positive(self, "interval")
        for name in ("density", "alpha"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"teacher.{name}={getattr(self, name)} must be in (0, 1]")
