"""Run folders: atomic writes, one owner at a time, checkpoints that resume bit for bit. No pickle.

    RUN/config.yaml                     the resolved settings
    RUN/metrics.jsonl                   a row an update
    RUN/summary.json                    what the run reached
    RUN/checkpoints/NNNNNN/student/     the agent: `transformers` folder, or PEFT adapter
    RUN/checkpoints/NNNNNN/teacher/     the merge: `transformers` folder
    RUN/checkpoints/NNNNNN/*.safetensors, state.json
    RUN/trajectories/                   some episodes of each update, frames as PNG

NNNNNN counts updates done. Randomness needs no generator state: every stream is derived from the run's
seed and counters (`collect.stream`), and running episodes are replayed from their actions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import TrainConfig
from gtr_turbo.distributed.sharding import full, is_sharded, local, shard_of
from gtr_turbo.policy.model import Policy
from gtr_turbo.teacher.history import History

FORMAT = 1
FIXED = (
    "seed", "env.id", "env.options", "env.train_split", "env.num_envs", "rollout.turns_per_env", "model.train",
    "model.vision", "model.lora_rank", "model.lora_alpha", "model.dtype", "teacher.method", "teacher.density",
    "teacher.weights", "teacher.alpha",
)  # fmt: skip
"""What a run keeps to its end: its episodes, counts of turns, weights and sums of the teacher rest on it."""


WRITTEN = (
    "config.yaml", "metrics.jsonl", "trackers.json", "trajectories", "imitation", "external", "tensorboard",
    "vllm",
)  # fmt: skip
"""What a run that begins writes, or clears away of an attempt that came to nothing."""


class CheckpointError(RuntimeError):
    """A run folder is in use, not writable, damaged, or of another run."""


def write_atomically(path: Path, text: str) -> None:
    """Write so that a reader, or a crash, never meets half a file."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def check_folder(run: Path, *, resume: bool) -> None:
    """Refuse a run folder to go on in or to begin in.

    Raises:
        ConfigError: there is nothing to go on from; or a run, or files of no run, would be lost.
    """
    finished = (run / "summary.json").exists()
    if not folders(run) and finished:
        raise ConfigError(
            f"{run} holds the results of a finished run whose checkpoints are gone, and they would be lost; give "
            "another --run"
        )
    if resume and not folders(run):
        raise ConfigError(
            f"cannot resume: {run} holds no complete checkpoint; start without --resume"
        )
    if not resume and folders(run):
        raise ConfigError(f"{run} holds a run already: go on with --resume, or give another --run")
    if not resume and not (run / "run.lock").exists():
        for foreign in filter(Path.exists, (run / name for name in WRITTEN)):
            raise ConfigError(f"{foreign} is of no run, and would be lost; give another --run")


@contextmanager
def own_folder(run: Path) -> Iterator[None]:
    """Hold the run folder for this process.

    Raises:
        CheckpointError: the folder cannot be written, or another process holds it.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = open(run / "run.lock", "w")  # noqa: SIM115 - held open for the whole run
    except OSError as error:
        raise CheckpointError(
            f"the run folder {run} cannot be written: {error}. Give another --run"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"the run folder {run} is in use by another process; wait for it or give another --run"
            ) from error
        yield


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes, types and bits; it tells whether a run resumes from the model it began with.

    Of a tensor with more than 65,536 entries about that many are read, evenly spaced.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        entries = tensor.flatten()
        # a copy: memory that numpy has seen cannot be freed when gathered weights are cut again
        entries = entries[:: max(1, len(entries) // 65_536)].cpu().clone().contiguous()
        digest.update(entries.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    state = optimizer.state_dict()["state"]
    return ((f"{i}.{key}", value) for i, entry in state.items() for key, value in entry.items())


def _collected(tensors: Iterable[tuple[str, Tensor]], policy: Policy) -> dict[str, Tensor]:
    """Whole tensors, on the first rank; the others give their parts of what is sharded."""
    found = {}
    for name, tensor in tensors:
        everything = full(tensor.detach())
        if policy.ranks.first:
            found[name] = (everything.cpu() if is_sharded(tensor) else everything).contiguous()
    return found


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        like = parameters[int(number)]
        part = shard_of(tensor, like) if tensor.shape == like.shape else tensor
        state.setdefault(int(number), {})[key] = part
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def folders(run: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    found = (run / "checkpoints").glob("[0-9]*")
    return sorted(path for path in found if path.name.isdigit() and (path / "state.json").exists())


def save(
    run: Path,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    history: History,
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write checkpoint number `state["update"]`, then drop all but the newest `keep`.

    All ranks must call it; the first writes. It is written aside and renamed, so a crash or a full disk leaves
    the older ones as they were.

    Raises:
        OSError: the disk is full, or the folder not writable; the half-written part is removed.
    """
    target = run / "checkpoints" / f"{state['update']:06d}"
    part = target.with_name(f".{target.name}.part")
    first = policy.ranks.first
    trained = _collected(policy.trained().items(), policy)
    moments = _collected(_optimizer_tensors(optimizer), policy)
    # a teacher older than the history cannot be merged again
    teacher = policy.teacher_state() if state["teacher_age"] else None
    if first:
        shutil.rmtree(part, ignore_errors=True)
    try:
        if first:
            part.mkdir(parents=True)
        policy.save_student(part / "student")
        policy.save_teacher(part / "teacher")
        if not first:
            return target
        # the folders above are for others; these are the exact bits a resumed run goes on from
        save_file(trained, part / "trained.safetensors")
        save_file(policy.value_head.state_dict(), part / "value_head.safetensors")
        save_file(moments, part / "optimizer.safetensors")
        save_file(history.state(), part / "history.safetensors")
        if teacher is not None:
            save_file(teacher, part / "teacher.safetensors")
        files = {f.name: f.stat().st_size for f in sorted(part.glob("*.safetensors"))}
        write_atomically(
            part / "state.json", json.dumps({"format": FORMAT, "files": files, **state}, indent=1)
        )
        for file in part.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(part, target)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        # tokenizers raises a plain Exception where the disk is full
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise OSError(f"checkpoint {target} could not be written: {error}") from error
        raise
    _prune(run, keep)
    return target


def _prune(run: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, and what a killed process left of one."""
    for old in folders(run)[:-keep]:
        (old / "state.json").unlink()  # first, so that what is left of it is no checkpoint
    kept = {path.name for path in folders(run)}
    for path in (run / "checkpoints").iterdir():
        if path.name not in kept and re.fullmatch(r"\d{6,}|\.\d{6,}\.part", path.name):
            shutil.rmtree(path)


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, its files checked for size.

    Raises:
        CheckpointError: unreadable, of another format, or a file is missing or cut.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in state["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged ({error!r}); remove it to use the one before"
        ) from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder} has format {state.get('format')}, this version reads {FORMAT}"
        )
    wrong = [name for name, size in state["files"].items() if sizes[name] != size]
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {', '.join(wrong)} was cut; remove the folder"
        )
    return dict(state)


def fixed_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run cannot change, by name, as `state.json` holds them."""
    found = {name: attrgetter(name)(config) for name in FIXED}
    found["teacher.history"] = config.history
    return dict(json.loads(json.dumps(found, default=str)))


def check_settings(folder: Path, config: TrainConfig) -> None:
    """Refuse to go on from a checkpoint with settings that contradict it.

    Raises:
        CheckpointError: names them; or the checkpoint is damaged.
    """
    state, now = read_state(folder), fixed_settings(config)
    # of older versions the checkpoints tell these two only
    kept = {"seed": state["seed"], "env.num_envs": len(state["envs"])} | state.get("settings", {})
    other = [
        f"{name} was {was!r} and is now {now[name]!r}"
        for name, was in kept.items()
        if name in now and was != now[name]
    ]
    if other:
        raise CheckpointError(
            f"checkpoint {folder} cannot go on with other settings: {'; '.join(other)}. Leave them as they were, "
            "or start a new run with another --run"
        )
    if config.num_updates < state["update"]:
        raise CheckpointError(
            f"checkpoint {folder} has made {state['update']} updates, and env_steps={config.env_steps} is "
            f"{config.num_updates} of {config.turns_per_update} turns; raise env_steps"
        )


def load(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, history: History, start: str
) -> dict[str, Any]:
    """Restore everything `save` wrote; returns the state. All ranks must call it, and see the folder.

    Args:
        folder: the checkpoint.
        policy: freshly loaded from the run's starting model.
        optimizer: freshly made for it.
        history: empty.
        start: fingerprint of the starting model.

    Raises:
        CheckpointError: the checkpoint is damaged, or belongs to another starting model, or its history is of
            the other form.
    """
    state = read_state(folder)
    if state["start"] != start:
        raise CheckpointError(
            f"checkpoint {folder} began from another model (fingerprint {state['start']}, model.path now gives "
            f"{start}); resume with the model the run began with"
        )
    try:
        trained = load_file(folder / "trained.safetensors")
        value_head = load_file(folder / "value_head.safetensors")
        moments = load_file(folder / "optimizer.safetensors")
        remembered = load_file(folder / "history.safetensors") if policy.ranks.first else {}
        parameters = policy.trained()
        if set(trained) != set(parameters):
            raise KeyError(f"trained tensors differ: {sorted(set(trained) ^ set(parameters))[:3]}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(local(shard_of(trained[name], parameter)))
        policy.value_head.load_state_dict(value_head)
        _load_optimizer(optimizer, moments)
        teacher = load_file(folder / "teacher.safetensors") if state["teacher_age"] else None
    except (SafetensorError, OSError, LookupError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} is damaged or of another run: {error}"
        ) from error
    if policy.ranks.first:
        try:
            history.load_state(remembered)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {folder} does not fit: {error}") from error
    if teacher is not None:
        policy.load_teacher_state(teacher)
    else:
        policy.load_teacher(policy.ranks.spread(history.merged()))
    return state
