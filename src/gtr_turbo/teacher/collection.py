"""The collected targets of a run, shared among its ranks; on disk they are files of JSON and PNG."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gtr_turbo.distributed.ranks import ALONE, Ranks
from gtr_turbo.policy.model import Policy
from gtr_turbo.turns.record import by_time
from gtr_turbo.turns.turn import Observed, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One imitated reply."""

    frame: str
    """Name of the frame in the collection."""
    prompt: str
    response_ids: Tensor
    """(R,) int64, end token included."""
    thought_tokens: int
    """The first so many are trained, and the end token."""
    rank: int = 0
    """Which rank trains it: it has the environment of the turn, and the frame."""

    @property
    def mask(self) -> Tensor:
        """(R,) bool, True on tokens that are trained."""
        places = torch.arange(len(self.response_ids))
        return (places < self.thought_tokens) | (places == len(places) - 1)


class Memory:
    """The collected targets: each update adds a file, every frame is stored once, as PNG.

    Each rank knows all targets and has the frames of its own; the first has the files.

    Attributes:
        targets: what is kept, the oldest first; the same on all ranks.
        ranks: who has them.
    """

    def __init__(self, folder: Path, limit: int, ranks: Ranks = ALONE, envs: int = 1) -> None:
        """Begin with nothing.

        Args:
            folder: for the files.
            limit: newest targets that are kept; 0 keeps all.
            ranks: who share the collection.
            envs: of each rank.
        """
        self._folder, self._limit = folder, limit
        self.ranks, self._envs = ranks, envs
        self.targets: list[Target] = []
        self._frames: dict[str, bytes] = {}
        self._seen: dict[tuple[str, str], Observed] = {}
        self._features: dict[str, Tensor] = {}
        self._unsynced: list[Path] = []

    def __len__(self) -> int:
        return len(self.targets)

    def add(
        self, update: int, turns: Sequence[Turn], targets: Sequence[tuple[Tensor, int] | None]
    ) -> None:
        """Keep targets and write those of all ranks to `NNNNNN.jsonl`, in the order of one process.

        Args:
            update: number of the update.
            turns: of this rank, ordered by time, then by environment.
            targets: (ids, trained tokens) of each turn; None where it has none.
        """
        rows: list[dict[str, Any] | None] = []
        fresh: dict[str, bytes] = {}
        for turn, target in zip(turns, targets, strict=True):
            if target is None:
                rows.append(None)
                continue
            name = self._keep_frame(turn.observed.frame, fresh)
            self._remember(name, turn.prompt, turn.observed)
            rows.append(
                {
                    "frame": name,
                    "prompt": turn.prompt,
                    "response_ids": target[0].tolist(),
                    "thought_tokens": target[1],
                    "env": turn.env_index,
                }
            )
        own = len({turn.env_index for turn in turns})
        kept = [row for row in by_time(self.ranks.gather(rows), own) if row is not None]
        self.targets += [self._target(row) for row in kept]
        self._write_frames(fresh)
        if self.ranks.first:
            lines = "".join(f"{json.dumps(row)}\n" for row in kept)
            self._write(self._folder / f"{update:06d}.jsonl", lines.encode())
        self._forget()

    def _target(self, row: Mapping[str, Any]) -> Target:
        env = int(row["env"]) if "env" in row else 0  # rows of older runs do not say it
        return Target(
            frame=row["frame"],
            prompt=row["prompt"],
            response_ids=torch.tensor(row["response_ids"]),
            thought_tokens=int(row["thought_tokens"]),
            rank=env // self._envs % self.ranks.world,
        )

    def _keep_frame(self, frame: np.ndarray, fresh: dict[str, bytes]) -> str:
        name = hashlib.sha256(frame.tobytes()).hexdigest()[:16]
        if name not in self._frames:
            stream = io.BytesIO()
            Image.fromarray(frame).save(stream, format="png")
            self._frames[name] = fresh[name] = stream.getvalue()
        return name

    def _write_frames(self, fresh: Mapping[str, bytes]) -> None:
        """Store what the ranks have seen for the first time."""
        sizes = self.ranks.gather({name: len(png) for name, png in fresh.items()})
        folder = self._folder / "frames"
        if self.ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        for names, data in zip(sizes, self.ranks.to_first(b"".join(fresh.values())), strict=False):
            at = 0
            for name, size in names.items():
                # one that is there may be what a lost machine left of it
                self._write(folder / f"{name}.png", data[at : at + size])
                at += size

    def _write(self, path: Path, data: bytes) -> None:
        part = path.with_name(path.name + ".part")
        part.write_bytes(data)
        os.replace(part, path)
        self._unsynced.append(path)

    def sync(self) -> None:
        """Have the disk hold all that was written: a checkpoint is nothing without it."""
        for path in self._unsynced:
            if path.exists():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        self._unsynced.clear()

    def _remember(self, name: str, prompt: str, observed: Observed) -> None:
        """Keep an observation without its frame; turns with one frame share its features."""
        if _small(observed):
            assert observed.features is not None
            features = self._features.setdefault(name, observed.features)
            self._seen[name, prompt] = replace(
                observed, frame=observed.frame[:0].copy(), features=features
            )

    def _forget(self) -> None:
        """Drop the oldest targets beyond the limit, and frames that nothing shows any more."""
        if not self._limit or len(self.targets) <= self._limit:
            return
        del self.targets[: len(self.targets) - self._limit]
        shown = {target.frame for target in self.own(self.targets)}
        self._frames = {name: png for name, png in self._frames.items() if name in shown}
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in shown}
        self._features = {name: kept for name, kept in self._features.items() if name in shown}

    def restore(self, update: int, saved: int) -> None:
        """Take up the newest files of the updates up to `update`; later ones are removed.

        Args:
            update: number of the last one.
            saved: targets there were after it.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is damaged, or some are missing.
        """
        read: list[list[Target]] = []
        for file in sorted(self._folder.glob("[0-9]*.jsonl"), reverse=True):
            if int(file.stem) > update:
                if self.ranks.first:
                    file.unlink()
            elif not self._limit or sum(map(len, read)) < self._limit:
                read.append(self._read(file))
        self.targets += [target for targets in reversed(read) for target in targets]
        expected = min(saved, self._limit or saved)
        if len(self.targets) < expected:
            raise ValueError(
                f"{self._folder} holds {len(self.targets)} of the {expected} targets there were"
            )
        self._forget()

    def _read(self, file: Path) -> list[Target]:
        targets = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                target = self._target(json.loads(line))
                if self.own([target]) and target.frame not in self._frames:
                    self._frames[target.frame] = _read_frame(
                        self._folder / "frames" / f"{target.frame}.png"
                    )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, line {number}, is damaged: {error}") from error
            targets.append(target)
        return targets

    def prune(self, update: int) -> None:
        """Remove files and frames that no run resumed from `update` or later needs, on the first rank."""
        if not self._limit or not self.ranks.first:
            return
        rows, old = 0, []
        for file in sorted(self._folder.glob("[0-9]*.jsonl"), reverse=True):
            if rows >= self._limit:
                old.append(file)
            elif int(file.stem) <= update:
                rows += len(file.read_text(encoding="utf-8").splitlines())
        for file in old:
            file.unlink()
        if not old:
            return
        lines = (f.read_text(encoding="utf-8") for f in self._folder.glob("[0-9]*.jsonl"))
        try:
            shown = {json.loads(line)["frame"] for text in lines for line in text.splitlines()}
        except (ValueError, KeyError, TypeError):
            return  # a damaged file, of which `restore` tells if a run needs it: its frames are not known
        for path in (self._folder / "frames").glob("*.png"):
            if path.stem not in shown:
                path.unlink()

    def own(self, targets: Sequence[Target]) -> list[Target]:
        """Those that this rank trains."""
        return [target for target in targets if target.rank == self.ranks.rank]

    def draw(self, count: int, generator: torch.Generator) -> list[Target]:
        """Random targets, of all ranks; fewer than `count` only if there are fewer."""
        rows = torch.randperm(len(self.targets), generator=generator)[:count].tolist()
        return [self.targets[row] for row in rows]

    def observe(self, targets: Sequence[Target], policy: Policy) -> list[Observed]:
        """What the agent saw before each of this rank's targets."""
        keys = [(target.frame, target.prompt) for target in targets]
        missing = list(dict.fromkeys(key for key in keys if key not in self._seen))
        fresh: dict[tuple[str, str], Observed] = {}
        if missing:
            frames = [np.asarray(Image.open(io.BytesIO(self._frames[f]))) for f, _ in missing]
            observed = policy.observe(frames, [prompt for _, prompt in missing])
            fresh = dict(zip(missing, observed, strict=True))
            for (name, prompt), seen in fresh.items():
                self._remember(name, prompt, seen)
        return [fresh[key] if key in fresh else self._seen[key] for key in keys]


def _read_frame(path: Path) -> bytes:
    png = path.read_bytes()
    try:
        Image.open(io.BytesIO(png)).verify()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no whole PNG ({error})") from error
    return png


def _small(observed: Observed) -> bool:
    """True if keeping the features costs no more than keeping the frame would."""
    features = observed.features
    return features is not None and features.nbytes <= observed.frame.nbytes
