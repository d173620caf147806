"""The commands, from parsed options to one call. torch is imported inside them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtr_turbo import trackers
from gtr_turbo.agents import agent_of, env_config
from gtr_turbo.checks import ConfigError
from gtr_turbo.config import TrainConfig
from gtr_turbo.distributed.launch import Launch, launch
from gtr_turbo.settings import (
    SFT_CONFIGS,
    build_config,
    config_file,
    dump_config,
    merge,
    read_config,
    read_overrides,
    with_overrides,
)
from gtr_turbo.sft_config import SFTConfig
from gtr_turbo.text import printable

if TYPE_CHECKING:
    from gtr_turbo.distributed.ranks import Ranks

DEFAULT_CONFIG = "ezpoints"


def _new_run(config: TrainConfig) -> Path:
    if config.run is not None:
        return Path(config.run)
    stem = f"runs/{config.name}-seed{config.seed}"
    number, path = 1, Path(stem)
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}")
    return path


def run_train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train an agent."""
    place = launch()
    if options.resume and options.config:
        raise ConfigError(
            f"--resume reads the settings of the run, so --config {options.config} would be ignored: leave it out "
            "and give what is to change as --group.name VALUE"
        )
    options.resume = options.resume or _goes_on(options, place)
    over = read_overrides(rest)
    for key in ("run", "seed"):
        if getattr(options, key) is not None:
            over[key] = getattr(options, key)
    source = _stored(options) if options.resume else config_file(options.config or DEFAULT_CONFIG)
    settings = read_config(source)
    if not options.resume:
        settings.setdefault("name", source.stem)
    config: TrainConfig = build_config(TrainConfig, with_overrides(settings, over))
    if options.print_config:
        if place.rank == 0:
            print(dump_config(config), end="")
        return 0
    config.check_world(place.world)
    config.model.check_trained()
    if config.guidance.kind == "external" and place.rank == 0:
        config.guidance.external.key()  # before there is a run folder
    trackers.chosen(config)
    from gtr_turbo.distributed.ranks import join
    from gtr_turbo.policy.loading import check
    from gtr_turbo.trainer import Unseen, train

    if place.world == 1:  # of several ranks each checks a device of its own
        check(config.model)
    with join(place, config.model.device, config.distributed.timeout_s) as ranks:
        run = Path(ranks.from_first(str(_new_run(config))))
        options.run = str(run)  # told if the run is interrupted
        config = replace(config, run=str(run))
        if ranks.first:
            _train_shown(config, run, options, ranks)
        else:
            train(config, run, Unseen(), resume=options.resume, ranks=ranks)
    return 0


def _stored(options: argparse.Namespace) -> Path:
    """The settings of the run to go on with."""
    if not options.run:
        raise ConfigError("--resume needs --run DIR, the folder of the run to go on with")
    stored = Path(options.run) / "config.yaml"
    if not stored.exists():
        raise ConfigError(f"cannot resume: {stored} does not exist")
    return stored


def _goes_on(options: argparse.Namespace, place: Launch) -> bool:
    """Whether torchrun has started the job again, so that it goes on from its checkpoint if it has one.

    Raises:
        ConfigError: it may do so, and could not find the run folder then.
    """
    if place.max_restarts and not options.run:
        raise ConfigError(
            "torchrun --max-restarts needs --run DIR, or a restarted job could not find its checkpoint"
        )
    if not place.restarts:
        return False
    from gtr_turbo import checkpoint

    return bool(checkpoint.folders(Path(options.run)))


def _train_shown(config: TrainConfig, run: Path, options: argparse.Namespace, ranks: Ranks) -> None:
    """Train as the process that has the run folder and the terminal."""
    from gtr_turbo import checkpoint
    from gtr_turbo.terminal import TerminalView, show_summary
    from gtr_turbo.trainer import train

    checkpoint.check_folder(run, resume=options.resume)
    text = dump_config(config)
    with checkpoint.own_folder(run):
        if options.resume:
            checkpoint.check_settings(checkpoint.folders(run)[-1], config)
        with TerminalView() as view:
            summary = train(config, run, view, resume=options.resume, ranks=ranks, settings=text)
        show_summary(view.console, summary)


def run_sft(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Make a starting model by imitation."""
    settings = (
        read_config(config_file(options.config, SFT_CONFIGS), SFT_CONFIGS) if options.config else {}
    )
    over = read_overrides(rest)
    for key in ("out", "seed"):
        if getattr(options, key) is not None:
            over[key] = getattr(options, key)
    config: SFTConfig = build_config(SFTConfig, merge(settings, over))
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    from gtr_turbo.sft import train

    def report(row: dict[str, float]) -> None:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)

    print(f"written to {train(config, report)}")
    return 0


def run_eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Evaluate an agent."""
    _no_rest(rest)
    import torch

    from gtr_turbo.baselines import measure, read_names

    baselines = read_names(options.baselines) if options.baselines is not None else ()
    if options.records:
        try:
            open(options.records, "a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigError(
                f"--records cannot be written: {error}; give a file in a folder that is there"
            ) from error
    policy, config = agent_of(options)
    if policy is not None:
        torch.set_num_threads(config.threads)
    env, split = env_config(options, config)
    seed = 0 if options.seed is None else options.seed
    found = {
        "env": env.id,
        "split": split,
        "seed": seed,
        "which": options.which if policy is not None else None,
        "greedy": options.greedy,
    } | measure(
        policy,
        baselines,
        env,
        config.sampling,
        episodes=options.episodes,
        split=split,
        seed=seed,
        greedy=options.greedy,
    )
    if options.records:
        players = ({"agent": found} if policy is not None else {}) | found.get("baselines", {})
        lines = [
            json.dumps({"player": player, **record})
            for player, summary in players.items()
            for record in summary["records"]
        ]
        Path(options.records).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(found))
        return 0
    from rich.console import Console

    from gtr_turbo.terminal import show_evaluation

    show_evaluation(Console(), found)
    return 0


def run_play(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Show an agent's episodes, or let a person play."""
    _no_rest(rest)
    from rich.console import Console

    from gtr_turbo.play import by_hand, watch

    policy, config = agent_of(options)
    env, split = env_config(options, config)
    about: dict[str, Any] = {
        "episodes": options.episodes,
        "split": split,
        "seed": 0 if options.seed is None else options.seed,
        "frames": Path(options.frames) if options.frames else None,
        "show": options.show,
    }
    if policy is None:
        by_hand(env, Console(), **about)
    else:
        watch(policy, env, config.sampling, Console(), greedy=options.greedy, **about)
    return 0


def run_merge(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Merge checkpoints."""
    _no_rest(rest)
    from gtr_turbo.merging import merge as merge_checkpoints
    from gtr_turbo.terminal import MergeView, show_merge

    shard_bytes = _shard_bytes(options)
    given = vars(options).copy()
    for key in ("command", "run_command", "checkpoints", "out", "json", "shard_gb"):
        del given[key]
    with MergeView(quiet=options.json or options.dry_run) as view:
        report = merge_checkpoints(
            options.checkpoints,
            options.out,
            progress=view.progress,
            shard_bytes=shard_bytes,
            **given,
        )
    if options.json:
        print(
            json.dumps({"seconds": report.seconds, "plan": asdict(report.plan), **report.manifest})
        )
    else:
        show_merge(view.console, report)
    return 0


def _shard_bytes(options: argparse.Namespace) -> int:
    if not 0 < options.shard_gb < 1e6:
        raise ConfigError(f"shard size {options.shard_gb} GB must be above 0")
    return int(options.shard_gb * 1e9)


def run_export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Write full weights."""
    _no_rest(rest)
    from gtr_turbo.export import export
    from gtr_turbo.terminal import MergeView

    with MergeView(quiet=options.json) as view:
        report = export(
            Path(options.source),
            Path(options.out),
            base=options.base,
            which=options.which,
            dtype=options.dtype,
            threads=options.threads,
            shard_bytes=_shard_bytes(options),
            progress=view.progress,
        )
    plan = report.plan
    if options.json:
        print(json.dumps({"seconds": report.seconds, "plan": asdict(plan), **report.manifest}))
        return 0
    base = f" on {plan.base}" if plan.base else ""
    added = f", {plan.merged} changed by the adapter" if plan.base else ""
    print(
        f"written to {plan.out}: {plan.inputs[0]}{base}; {plan.tensors} tensors{added}, "
        f"{plan.disk_bytes / 1e9:.2f} GB, {report.seconds:.1f} s"
    )
    return 0


def run_report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Write the report of runs."""
    _no_rest(rest)
    from gtr_turbo.report import write_report

    runs = [Path(run) for run in options.runs]
    beside = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out = Path(options.out) if options.out else beside
    info = write_report(runs, out, episodes=options.episodes)
    for warning in info.warnings:
        print(f"note: {printable(warning)}", file=sys.stderr)
    left = f" of {info.episodes + info.left_out}" if info.left_out else ""
    print(
        f"written to {info.out}: {info.size / 1e6:.1f} MB, {info.runs} run(s), "
        f"{info.episodes}{left} episodes, {info.turns} turns"
    )
    return 0


def run_compare(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Train variants of a recipe over seeds, and compare them."""
    if options.target is not None and not 0 <= options.target <= 1:
        raise ConfigError(f"--target {options.target} must be a success between 0 and 1")
    if options.episodes < 0:
        raise ConfigError(f"--episodes {options.episodes} must not be negative")
    from rich.console import Console

    from gtr_turbo import compare
    from gtr_turbo.compare.show import show_comparison, show_plan

    plan = compare.make_plan(
        config_file(options.config),
        read_overrides(rest),
        vary=options.vary,
        seeds=options.seeds,
        jobs=options.jobs,
        threads=options.threads,
        out=Path(options.out) if options.out else None,
    )
    console = Console()
    if options.dry_run:
        plan.check()
        show_plan(console, plan)
        return 0
    failures = (
        {}
        if options.only_summary
        else compare.carry_out(plan, lambda text: print(text, flush=True))
    )
    found = compare.summarise(plan, failures, target=options.target, episodes=options.episodes)
    show_comparison(console, found)
    finished = len(found.runs) - len(found.missing)
    print(f"{finished} of {len(found.runs)} runs; tables and report are in {plan.out}")
    complete = finished if options.only_summary else not (failures or found.missing)
    return 0 if complete else 1


def run_plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Say what a run takes; the exit code is 1 if it does not fit."""
    for key in ("dollars_per_hour", "prompt_tokens"):
        number = getattr(options, key)
        if number is not None and not number > 0:
            raise ConfigError(f"--{key.replace('_', '-')} {number} must be above 0")
    source = config_file(options.config or DEFAULT_CONFIG)
    settings = read_config(source)
    settings.setdefault("name", source.stem)
    over = with_overrides(settings, read_overrides(rest))
    config: TrainConfig = build_config(TrainConfig, over)
    from rich.console import Console

    from gtr_turbo.planning import make_plan
    from gtr_turbo.planning.show import show

    plan = make_plan(
        config,
        gpus=options.gpus,
        dollars_per_hour=options.dollars_per_hour,
        results=Path(options.measured) if options.measured else None,
        prompt_tokens=options.prompt_tokens,
    )
    if options.json:
        print(json.dumps(plan.as_json()))
    else:
        show(Console(), plan)
    return 0 if plan.fits else 1


def run_doctor(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Check the machine."""
    _no_rest(rest)
    from gtr_turbo.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what:<14} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def _no_rest(rest: Sequence[str]) -> None:
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; see --help")
