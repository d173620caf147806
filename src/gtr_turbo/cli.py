"""The command: parse, make a config, make one call. torch is imported after parsing."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gtr_turbo import __version__
from gtr_turbo.config import ConfigError, EnvConfig, TrainConfig
from gtr_turbo.settings import (
    SFT_CONFIGS,
    build_config,
    config_file,
    config_names,
    dump_config,
    merge,
    read_config,
    read_overrides,
)
from gtr_turbo.sft_config import SFTConfig

if TYPE_CHECKING:
    from gtr_turbo.policy.model import Policy

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


def _train(options: argparse.Namespace, rest: Sequence[str]) -> int:
    over = read_overrides(rest)
    for key in ("run", "seed"):
        if getattr(options, key) is not None:
            over[key] = getattr(options, key)
    stored = Path(options.run) / "config.yaml" if options.run else None
    if options.resume:
        if stored is None:
            raise ConfigError("--resume needs --run DIR, the folder of the run to go on with")
        if not stored.exists():
            raise ConfigError(f"cannot resume: {stored} does not exist")
    source = (
        stored
        if options.resume and stored is not None
        else config_file(options.config or DEFAULT_CONFIG)
    )
    settings = read_config(source)
    if not options.resume:
        settings.setdefault("name", source.stem)
    given = over.get("env", {}).get("id")
    if given is not None and given != settings.get("env", {}).get("id"):
        # the recipe's options are those of its own environment
        settings["env"] = {k: v for k, v in settings.get("env", {}).items() if k == "num_envs"}
        settings["name"] = re.sub(
            r"\W+", "-", given.rpartition(":")[2].removeprefix("gtr/")
        ).lower()
    config: TrainConfig = build_config(TrainConfig, merge(settings, over))
    if options.print_config:
        print(dump_config(config), end="")
        return 0
    run = _new_run(config)
    config = replace(config, run=str(run))
    from gtr_turbo import checkpoint
    from gtr_turbo.terminal import TerminalView, show_summary
    from gtr_turbo.trainer import train

    with checkpoint.own_folder(run):
        if options.resume and not checkpoint.folders(run):
            raise ConfigError(
                f"cannot resume: {run} holds no complete checkpoint; start without --resume"
            )
        if not options.resume and checkpoint.folders(run):
            raise ConfigError(
                f"{run} holds a run already: go on with --resume, or give another --run"
            )
        checkpoint.write_atomically(run / "config.yaml", dump_config(config))
        with TerminalView() as view:
            summary = train(config, run, view, resume=options.resume)
        show_summary(view.console, summary)
    return 0


def _sft(options: argparse.Namespace, rest: Sequence[str]) -> int:
    settings = read_config(config_file(options.config, SFT_CONFIGS)) if options.config else {}
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


def _stored_settings(path: Path, which: str) -> dict[str, Any]:
    """Settings that lie beside an agent: of its run, or the `recipe.yaml` that `sft` writes.

    Raises:
        ConfigError: `which` is not there.
    """
    from gtr_turbo import checkpoint

    if (path / "config.yaml").exists():
        settings = read_config(path / "config.yaml")
        saved = checkpoint.folders(path)
        if not saved:
            raise ConfigError(f"{path} is a run without a complete checkpoint; nothing to load")
        checkpoint.read_state(saved[-1])
        model = settings.setdefault("model", {})
        if which == "student" and model.get("train") == "lora":
            model["adapter"] = str(saved[-1] / "student")
        else:
            model |= {"path": str(saved[-1] / which), "train": "full", "adapter": None}
        return settings
    if which == "teacher":
        raise ConfigError(f"{path} is no run folder, so it has no teacher; drop --which teacher")
    from gtr_turbo.policy.starter import model_folder

    beside = [Path(model_folder(str(path))) / "recipe.yaml"]
    if path.name in ("student", "teacher"):
        beside.append(path.resolve().parent.parent.parent / "config.yaml")
    settings = next((read_config(file) for file in beside if file.exists()), {})
    return merge(settings, {"model": {"path": str(path), "train": "full", "adapter": None}})


def _agent(options: argparse.Namespace) -> tuple[Policy, TrainConfig]:
    """The agent a path names: a run (its newest student or teacher), or a model; and its config."""
    settings = _stored_settings(Path(options.agent), options.which)
    if options.config:
        model = settings.pop("model", {})
        settings = merge(read_config(config_file(options.config)), {"model": model})
    if options.env:
        env = settings.setdefault("env", {})
        if (
            env.get("id", EnvConfig().id) != options.env
        ):  # of its options only the prompt's style carries over
            style = env.get("options", {}).get("prompt")
            env["options"] = {"prompt": style} if style else {}
        env["id"] = options.env
    config: TrainConfig = build_config(TrainConfig, settings)
    from gtr_turbo.policy.model import Policy

    return Policy(config.model, temperature=config.sampling.temperature, seed=config.seed), config


def _env_config(options: argparse.Namespace, config: TrainConfig) -> tuple[EnvConfig, str | None]:
    import yaml

    given = {}
    for text in options.option or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--option {text!r} must be NAME=VALUE")
        given[key] = yaml.safe_load(value)
    env = replace(config.env, options={**config.env.options, **given})
    return env, None if options.split == "none" else options.split or env.eval_split


def _eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _no_rest(rest)
    if options.episodes < 1:
        raise ConfigError(f"--episodes {options.episodes} must be at least 1")
    import torch

    from gtr_turbo.evaluate import evaluate

    policy, config = _agent(options)
    torch.set_num_threads(config.threads)
    env, split = _env_config(options, config)
    seed = 0 if options.seed is None else options.seed
    result = evaluate(
        policy,
        env,
        config.sampling,
        episodes=options.episodes,
        split=split,
        seed=seed,
        greedy=options.greedy,
    )
    summary = {
        "env": env.id,
        "split": split,
        "seed": seed,
        "which": options.which,
        "greedy": options.greedy,
    }
    summary |= result.summary()
    if options.records:
        lines = [json.dumps(record) for record in summary["records"]]
        Path(options.records).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(summary))
        return 0
    from gtr_turbo.terminal import percent

    del summary["records"]
    print(
        f"{env.id} ({split}), {len(result.records)} episodes, {'greedy' if options.greedy else 'sampled'}"
    )
    low, high = result.interval
    print(f"success  {percent(result.success)} (95 % interval {percent(low)} to {percent(high)})")
    print(f"return   {summary['return']:.3f}")
    print(f"valid    {percent(summary['valid'])}")
    for name, value in result.facts.items():
        print(f"{name:<8} {percent(value)}")
    return 0


def _play(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _no_rest(rest)
    from rich.console import Console

    from gtr_turbo.play import watch

    policy, config = _agent(options)
    env, split = _env_config(options, config)
    watch(
        policy,
        env,
        config.sampling,
        Console(),
        episodes=options.episodes,
        split=split,
        seed=0 if options.seed is None else options.seed,
        greedy=options.greedy,
        frames=Path(options.frames) if options.frames else None,
    )
    return 0


def _weights(text: str) -> str | list[float]:
    if text in ("sma", "ema"):
        return text
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected sma, ema, or numbers separated by commas"
        ) from error


def _merge(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _no_rest(rest)
    from gtr_turbo.merging import merge as merge_checkpoints
    from gtr_turbo.terminal import MergeView, show_merge

    if not 0 < options.shard_gb < 2**20:
        raise ConfigError(f"shard size {options.shard_gb} GB must be above 0")
    given = vars(options).copy()
    for key in ("command", "run_command", "checkpoints", "out", "json", "shard_gb"):
        del given[key]
    with MergeView(quiet=options.json or options.dry_run) as view:
        report = merge_checkpoints(
            options.checkpoints,
            options.out,
            progress=view.progress,
            shard_bytes=int(options.shard_gb * 2**30),
            **given,
        )
    if options.json:
        print(json.dumps({"seconds": report.seconds, **asdict(report.plan), **report.manifest}))
    else:
        show_merge(view.console, report)
    return 0


def _report(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _no_rest(rest)
    from gtr_turbo.report import write_report

    runs = [Path(run) for run in options.runs]
    beside = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
    out = Path(options.out) if options.out else beside
    info = write_report(runs, out, episodes=options.episodes)
    for warning in info.warnings:
        print(f"note: {warning}", file=sys.stderr)
    left = f" of {info.episodes + info.left_out}" if info.left_out else ""
    print(
        f"written to {info.out}: {info.size / 1e6:.1f} MB, {info.runs} run(s), "
        f"{info.episodes}{left} episodes, {info.turns} turns"
    )
    return 0


def _doctor(options: argparse.Namespace, rest: Sequence[str]) -> int:
    _no_rest(rest)
    from gtr_turbo.doctor import examine

    findings = examine()
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what:<14} {finding.detail}")
    return 0 if all(finding.ok for finding in findings) else 1


def _no_rest(rest: Sequence[str]) -> None:
    if rest:
        raise ConfigError(f"unknown argument {rest[0]!r}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gtr-turbo",
        description="Train vision-language agents, guided by the merge of their own checkpoints.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run_command=run)
        return sub

    names = ", ".join(config_names())
    dotted = "Any setting can be given as --group.name VALUE; --print_config lists them all."
    train = command(
        "train", _train, "Train an agent. Without arguments: EZPoints, tiny model, CPU, minutes."
    )
    train.epilog = dotted
    train.add_argument("--config", metavar="NAME_OR_FILE", help=f"one of {names}, or a YAML file")
    train.add_argument("--run", metavar="DIR", help="run folder (default: runs/NAME-seedN)")
    train.add_argument("--seed", type=int, metavar="N", help="the run's seed (default 0)")
    train.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --run"
    )
    train.add_argument(
        "--print_config", action="store_true", help="print the resolved config and exit"
    )
    sft = command(
        "sft", _sft, "Imitate the environments' own experts: make the model RL starts from."
    )
    sft.epilog = dotted
    sft.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help=f"one of {', '.join(config_names(SFT_CONFIGS))}, or a YAML file",
    )
    sft.add_argument("--out", metavar="DIR", help="folder to write the model to")
    sft.add_argument("--seed", type=int, metavar="N", help="seed (default 0)")
    sft.add_argument(
        "--print_config", action="store_true", help="print the resolved config and exit"
    )
    for name, run, text in (
        ("eval", _eval, "Success on fixed episodes, with its 95 %% interval."),
        ("play", _play, "Watch an agent's episodes, turn by turn."),
    ):
        sub = command(name, run, text)
        sub.add_argument(
            "agent", metavar="RUN_OR_MODEL", help="run folder, model folder, or model name"
        )
        sub.add_argument(
            "--config", metavar="NAME_OR_FILE", help="settings for a model that is no run"
        )
        sub.add_argument("--env", metavar="ID", help="environment (default: the run's)")
        sub.add_argument(
            "--option", action="append", metavar="NAME=VALUE", help="environment option"
        )
        sub.add_argument("--episodes", type=int, default=500 if name == "eval" else 3, metavar="N")
        sub.add_argument(
            "--split", metavar="SPLIT", help="all, train, held-out, held-out-multisets, none"
        )
        sub.add_argument(
            "--seed", type=int, metavar="N", help="seed of deals and sampling (default 0)"
        )
        sub.add_argument(
            "--which", choices=("student", "teacher"), default="student", help="of a run"
        )
        sub.add_argument(
            "--greedy", action="store_true", help="likeliest token instead of sampling"
        )
    commands.choices["eval"].add_argument(
        "--json", action="store_true", help="print one JSON object"
    )
    commands.choices["eval"].add_argument(
        "--records", metavar="FILE", help="write a JSON line per episode"
    )
    commands.choices["play"].add_argument("--frames", metavar="DIR", help="save the frames as PNG")
    _merge_arguments(
        command("merge", _merge, "Merge checkpoints, full or LoRA, in bounded memory.")
    )
    report = command("report", _report, "Make one HTML file of runs: curves, settings, replay.")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are compared")
    report.add_argument(
        "--out", metavar="FILE", help="HTML file (default: report.html, in the run if there is one)"
    )
    report.add_argument(
        "--episodes",
        type=int,
        metavar="N",
        help="episodes in the replay, evenly over training (default: as many as fit into 25 MB)",
    )
    command("doctor", _doctor, "Check that this machine has what a run needs.")
    return parser


def _merge_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "checkpoints", nargs="+", metavar="CKPT", help="the oldest first; full models or adapters"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument("--base", metavar="DIR", help="the model the checkpoints started from")
    sub.add_argument(
        "--method",
        default="ties",
        metavar="NAME",
        help="ties (default), linear, slerp, task-arithmetic, dare-linear, dare-ties",
    )
    sub.add_argument(
        "--weights",
        type=_weights,
        default="sma",
        metavar="W",
        help="sma (default), ema, or one number per checkpoint: 1,1,2",
    )
    sub.add_argument("--alpha", type=float, default=0.5, help="of ema (default 0.5)")
    sub.add_argument(
        "--density", type=float, metavar="D", help="kept by ties and dare (default 0.8)"
    )
    sub.add_argument(
        "--lambda", type=float, default=1.0, dest="lam", metavar="L", help="factor of the change"
    )
    sub.add_argument("--compat", choices=("peft",), help="PEFT's definition of ties")
    sub.add_argument(
        "--form",
        choices=("dense", "adapter", "cat", "factors"),
        default="dense",
        help="of merged adapters: base + change (default), a low rank, side by side, or A and B apart",
    )
    sub.add_argument("--rank", type=int, metavar="R", help="of forms adapter and cat")
    sub.add_argument(
        "--max-lost",
        type=float,
        default=0.1,
        metavar="F",
        help="largest fraction of a module's squared norm that a rank may lose (default 0.1)",
    )
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the result")
    sub.add_argument("--seed", type=int, default=0, help="of dare and of the sketch (default 0)")
    sub.add_argument(
        "--threads",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="at work at once",
    )
    sub.add_argument(
        "--shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default 5)"
    )
    sub.add_argument(
        "--keep-thresholds",
        action="store_true",
        help="keep what trimming found beside the checkpoints; the next merge is then faster",
    )
    sub.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 (it failed), 2 (wrong input) or 130 (interrupted)."""
    # idle OpenMP threads spin only briefly: on a busy machine long spinning costs several times the work
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # of numpy, in a merge: it has threads of its own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    options, rest = _parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(options.run_command(options, rest))
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted ({str(interrupt) or 'Ctrl-C'}).{_go_on(options)}", file=sys.stderr)
        return 130
    except ConfigError as error:
        print(f"gtr-turbo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"gtr-turbo: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        return _failed(error)


def _go_on(options: argparse.Namespace) -> str:
    """How to go on with an interrupted run."""
    if options.command != "train":
        return ""
    return f" Go on with: gtr-turbo train --run {options.run or 'DIR'} --resume"


def _failed(error: Exception) -> int:
    """Our own errors as one line; anything else is a bug and keeps its traceback."""
    from gtr_turbo.merging.shards import MergeError
    from gtr_turbo.report import ReportError

    if isinstance(error, (MergeError, ReportError)):
        print(f"gtr-turbo: {error}", file=sys.stderr)
        return 2
    from gtr_turbo.checkpoint import CheckpointError
    from gtr_turbo.envs import ContractError
    from gtr_turbo.learning.update import TrainingError

    if isinstance(error, (CheckpointError, ContractError)):
        print(f"gtr-turbo: {error}", file=sys.stderr)
        return 2
    if isinstance(error, (TrainingError, FloatingPointError)):
        print(f"gtr-turbo: {error}", file=sys.stderr)
        return 1
    raise error
