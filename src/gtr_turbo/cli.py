"""The command: parse, make a config, make one call. torch is imported after parsing."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gtr_turbo import __version__
from gtr_turbo.checks import ConfigError
from gtr_turbo.commands import (
    run_compare,
    run_doctor,
    run_eval,
    run_export,
    run_merge,
    run_plan,
    run_play,
    run_report,
    run_sft,
    run_train,
)
from gtr_turbo.distributed.launch import launch, speaks, tell
from gtr_turbo.settings import SFT_CONFIGS, config_names

DOTTED = "Any setting can be given as --group.name VALUE; --print_config lists them all."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gtr-turbo",
        description="Train vision-language agents, guided by the merge of their own checkpoints.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text.replace("%", "%%"),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run_command=run)
        return sub

    text = "Train an agent. Without arguments: EZPoints, tiny model, CPU, minutes."
    _train_arguments(command("train", run_train, text))
    text = "Imitate the environments' own experts: make the model RL starts from."
    _sft_arguments(command("sft", run_sft, text))
    sub = command("eval", run_eval, "Success on fixed episodes, with its 95 % interval.")
    _agent_arguments(sub, episodes=500)
    sub.add_argument(
        "--baselines",
        metavar="NAMES",
        help="players of the same episodes: random (a legal action), blind (the agent, frames black), oracle (the "
        "environment's expert); as in random,blind,oracle",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")
    sub.add_argument("--records", metavar="FILE", help="write a JSON line per episode")
    sub = command("play", run_play, "Watch an agent's episodes turn by turn, or play yourself.")
    _agent_arguments(sub, episodes=3)
    sub.add_argument(
        "--frames",
        metavar="DIR",
        help="save the frames as PNG (yours: in a new folder, if none is given)",
    )
    sub.add_argument("--show", action="store_true", help="draw the frames with coloured blocks")
    text = "Merge checkpoints, full or LoRA, in bounded memory."
    _merge_arguments(command("merge", run_merge, text))
    text = (
        "Write a run's student or teacher, or an adapter, as full weights for stock transformers."
    )
    _export_arguments(command("export", run_export, text))
    text = "Make one HTML file of runs: curves, settings, replay."
    _report_arguments(command("report", run_report, text))
    text = "Train variants of a recipe over several seeds, and compare them."
    _compare_arguments(command("compare", run_compare, text))
    text = "What a recipe takes on given GPUs: memory by part, hours, dollars. Starts nothing."
    _plan_arguments(command("plan", run_plan, text))
    command("doctor", run_doctor, "Check that this machine has what a run needs.")
    return parser


def _train_arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = DOTTED
    names = ", ".join(config_names())
    sub.add_argument("--config", metavar="NAME_OR_FILE", help=f"one of {names}, or a YAML file")
    sub.add_argument("--run", metavar="DIR", help="run folder (default: runs/NAME-seedN)")
    sub.add_argument("--seed", type=int, metavar="N", help="the run's seed (default 0)")
    sub.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in --run"
    )
    sub.add_argument(
        "--print_config", action="store_true", help="print the resolved config and exit"
    )


def _sft_arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = DOTTED
    names = ", ".join(config_names(SFT_CONFIGS))
    sub.add_argument("--config", metavar="NAME_OR_FILE", help=f"one of {names}, or a YAML file")
    sub.add_argument("--out", metavar="DIR", help="folder to write the model to")
    sub.add_argument("--seed", type=int, metavar="N", help="seed (default 0)")
    sub.add_argument(
        "--print_config", action="store_true", help="print the resolved config and exit"
    )


def _agent_arguments(sub: argparse.ArgumentParser, episodes: int) -> None:
    sub.add_argument(
        "agent",
        nargs="?",
        metavar="RUN_OR_MODEL",
        help="run folder, model folder or model name; none, or the name of an environment: no agent",
    )
    sub.add_argument("--config", metavar="NAME_OR_FILE", help="settings for a model that is no run")
    sub.add_argument("--env", metavar="ID", help="environment (default: the run's)")
    sub.add_argument("--option", action="append", metavar="NAME=VALUE", help="environment option")
    sub.add_argument("--episodes", type=int, default=episodes, metavar="N")
    sub.add_argument(
        "--split", metavar="SPLIT", help="all, train, held-out, held-out-multisets, none"
    )
    sub.add_argument("--seed", type=int, metavar="N", help="seed of deals and sampling (default 0)")
    sub.add_argument("--which", choices=("student", "teacher"), default="student", help="of a run")
    sub.add_argument("--greedy", action="store_true", help="likeliest token instead of sampling")


def _report_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run folder; several are compared")
    sub.add_argument(
        "--out", metavar="FILE", help="HTML file (default: report.html, in the run if there is one)"
    )
    sub.add_argument(
        "--episodes",
        type=int,
        metavar="N",
        help="episodes in the replay, evenly over training (default: as many as fit into 25 MB)",
    )


def _compare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = f"{DOTTED} They hold for all variants."
    sub.allow_abbrev = False
    names = ", ".join(config_names())
    sub.add_argument("config", metavar="CONFIG", help=f"one of {names}, or a YAML file")
    sub.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=V1,V2,...",
        help="a setting and its values; guidance means guidance.kind, teacher teacher.method; several make a grid",
    )
    sub.add_argument(
        "--seeds", default="5", metavar="N", help="how many (default 5: 0 to 4), or which: 3,7"
    )
    sub.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default 1)")
    sub.add_argument(
        "--threads", type=int, metavar="N", help="CPU threads of a run (default: CPUs / jobs)"
    )
    sub.add_argument("--out", metavar="DIR", help="folder (default: runs/compare-CONFIG)")
    sub.add_argument(
        "--target", type=float, metavar="S", help="success whose first reach is counted"
    )
    sub.add_argument(
        "--episodes", type=int, default=100, metavar="N", help="in the replay (default 100)"
    )
    sub.add_argument("--dry-run", action="store_true", help="print the plan, start nothing")
    sub.add_argument(
        "--only-summary", action="store_true", help="make the tables from what is there"
    )


def _weights(text: str) -> str | list[float]:
    if text in ("sma", "ema"):
        return text
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected sma, ema, or numbers separated by commas"
        ) from error


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
    sub.add_argument("--seed", type=int, default=0, help="of dare and of the sketch (default 0)")
    _output_arguments(sub)
    sub.add_argument(
        "--keep-thresholds",
        action="store_true",
        help="keep what trimming found beside the checkpoints; the next merge is then faster",
    )
    sub.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def _output_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the result")
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
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _export_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "source", metavar="RUN_OR_ADAPTER", help="run folder, PEFT adapter, or model folder"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    sub.add_argument(
        "--base", metavar="MODEL", help="folder of the adapter's base (default: the one it names)"
    )
    sub.add_argument("--which", choices=("student", "teacher"), default="student", help="of a run")
    _output_arguments(sub)


def _plan_arguments(sub: argparse.ArgumentParser) -> None:
    sub.epilog = DOTTED
    sub.allow_abbrev = False
    names = ", ".join(config_names())
    sub.add_argument("--config", metavar="NAME_OR_FILE", help=f"one of {names}, or a YAML file")
    sub.add_argument(
        "--gpus", metavar="NxMEMORY", help="as in 1x80GB; not needed by recipes for a CPU"
    )
    sub.add_argument("--dollars-per-hour", type=float, metavar="X", help="price of one GPU")
    sub.add_argument(
        "--measured",
        metavar="FILE",
        help="JSON of benchmarks/gpu.py: its rates instead of estimates",
    )
    sub.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="of a prompt, image included (default: counted)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def _terminate(number: int, frame: Any) -> None:
    if number == signal.SIGHUP:  # a closing terminal and its shell both send it
        signal.signal(number, signal.SIG_IGN)
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
    for stream in (sys.stdout, sys.stderr):  # what an encoding does not have is no reason to end
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    options, rest = _parser().parse_known_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, _terminate)
    try:
        _meet(options.command)
        return int(options.run_command(options, rest))
    except KeyboardInterrupt as interrupt:
        tell(f"\ninterrupted ({str(interrupt) or 'Ctrl-C'}).{_go_on(options)}")
        return 130
    except ConfigError as error:
        tell(f"gtr-turbo: {error}")
        return 2
    except OSError as error:
        tell(f"gtr-turbo: {error}")
        return 1
    except Exception as error:
        return _failed(error)


def _meet(command: str) -> None:
    """Get in touch with the other ranks, if torchrun has started several.

    Raises:
        ConfigError: the command is for one process.
    """
    place = launch()
    if place.world == 1:
        return
    if command != "train":
        raise ConfigError(
            f"{command} runs in one process (WORLD_SIZE={place.world}); start it plainly"
        )
    from gtr_turbo.distributed.ranks import connect

    connect(place)


def _go_on(options: argparse.Namespace) -> str:
    """How to go on with an interrupted run."""
    if options.command == "compare":
        return " Go on with the same command: what was done is kept"
    if options.command != "train":
        return ""
    if options.run and any(Path(options.run).glob("checkpoints/*/state.json")):
        return f" Go on with: gtr-turbo train --run {options.run} --resume"
    return " There is no checkpoint yet: start again"


def _failed(error: Exception) -> int:
    """Our own errors as one line; anything else is a bug and keeps its traceback."""
    from gtr_turbo.merging.shards import MergeError
    from gtr_turbo.report import ReportError

    if isinstance(error, (MergeError, ReportError)):
        tell(f"gtr-turbo: {error}")
        return 2
    from gtr_turbo.checkpoint import CheckpointError
    from gtr_turbo.distributed.ranks import LostContact
    from gtr_turbo.envs import ContractError
    from gtr_turbo.learning.update import TrainingError

    if isinstance(error, (CheckpointError, ContractError)):
        tell(f"gtr-turbo: {error}")
        return 2
    from torch import OutOfMemoryError

    from gtr_turbo.policy.vllm_http import EngineError

    known = (TrainingError, EngineError, FloatingPointError, LostContact, OutOfMemoryError)
    if isinstance(error, known):
        tell(f"gtr-turbo: {error}")
        return 1
    if not speaks():
        return 1  # another rank has told, and this is what its end did to us
    raise error
