"""Output of a merge: safetensors of which every offset is known in advance, in a folder that appears whole.

The header goes first, and workers fill in the rest in any order, in a temporary folder that takes its place
when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from gtr_turbo.merging.arrays import Numbers
from gtr_turbo.merging.shards import INDEX, ITEMSIZE, Entry, MergeError

NO_COMPANIONS: tuple[str, ...] = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".index.json",
)
NO_COMPANIONS += ("merge-thresholds.json", "merged-from.json", "README.md")
"""Endings of files beside the weights that do not belong to a merge of them; what a model card says, its results
above all, is of other weights."""


def write_at(descriptor: int, data: Numbers, at: int) -> None:
    """Write all of `data` at a position."""
    view = memoryview(np.ascontiguousarray(data).data).cast("B")
    while len(view):
        count = os.pwrite(descriptor, view, at)
        view, at = view[count:], at + count


@dataclass
class Writer:
    """Safetensors files of which every offset is known in advance.

    Attributes:
        entries: where each tensor goes.
    """

    folder: Path
    entries: dict[str, Entry]
    _open: dict[Path, int]

    @classmethod
    def create(
        cls,
        folder: Path,
        layout: Iterable[tuple[str, str, tuple[int, ...]]],
        *,
        stem: str = "model",
        shard_bytes: int = 5 * 10**9,
    ) -> Self:
        """Write headers, and the index if there is more than one file, and reserve the space.

        Args:
            folder: exists.
            layout: (name, dtype, shape) of every tensor, in order.
            stem: of the file names.
            shard_bytes: largest file, unless one tensor is larger.

        Raises:
            OSError: the disk has not enough space.
        """
        shards: list[list[Entry]] = [[]]
        used = 0
        for name, dtype, shape in layout:
            width = int(np.prod(shape, dtype=np.int64)) * ITEMSIZE[dtype]
            if used and used + width > shard_bytes:
                shards.append([])
                used = 0
            shards[-1].append(Entry(name, folder, dtype, shape, used, used + width))
            used += width
        self = cls(folder, {}, {})
        try:
            for number, shard in enumerate(shards, 1):
                suffix = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
                self._begin(folder / f"{stem}{suffix}.safetensors", shard)
        except OSError:
            self.close(sync=False)
            raise
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(e.stop - e.start for s in shards for e in s)},
                "weight_map": {name: entry.file.name for name, entry in self.entries.items()},
            }
            (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")
        return self

    def _begin(self, file: Path, shard: list[Entry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for e in shard:
            header[e.name] = {
                "dtype": e.dtype,
                "shape": list(e.shape),
                "data_offsets": [e.start, e.stop],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        first = len(text).to_bytes(8, "little") + text
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self._open[file] = descriptor
        end = len(first) + (shard[-1].stop if shard else 0)
        try:
            os.posix_fallocate(descriptor, 0, end)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise OSError(
                    error.errno, f"there is no room for {end} bytes ({error.strerror})", str(file)
                ) from error
            os.ftruncate(descriptor, end)  # a file system that cannot reserve
        os.pwrite(descriptor, first, 0)
        for e in shard:
            self.entries[e.name] = Entry(
                e.name, file, e.dtype, e.shape, len(first) + e.start, len(first) + e.stop
            )

    def write(self, name: str, first: int, data: Numbers) -> None:
        """Write entries `first` ... of a tensor."""
        entry = self.entries[name]
        write_at(self._open[entry.file], data, entry.start + ITEMSIZE[entry.dtype] * first)

    def close(self, *, sync: bool = True) -> None:
        """Flush to the disk, unless told not to, and close.

        Raises:
            OSError: the disk is full or failed; what is still open can be closed by another call.
        """
        while self._open:
            _, descriptor = self._open.popitem()
            try:
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)


def check_new(out: Path) -> Path:
    """The folder that `out` means, followed through links.

    Raises:
        MergeError: it exists and is not an empty folder that can be replaced.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MergeError(f"{out} exists already; nothing is overwritten. Give another folder.")
    out = Path(os.path.realpath(out))  # of a link, the folder that it means
    if out.exists() and (out.is_mount() or out.samefile(Path.cwd())):
        raise MergeError(
            f"{out} is a mount point or the folder you are in, and cannot be replaced by the result; give a "
            "folder inside it"
        )
    return out


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` if the block ends well, and vanishes if not.

    Raises:
        MergeError: `out` exists and is not an empty folder that can be replaced, or its parent cannot be
            written.
        OSError: what was written cannot be flushed to the disk.
    """
    out = check_new(out)
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
            with _held(stale, out):  # else of a merge that was killed
                shutil.rmtree(stale)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise MergeError(f"cannot write beside {out}: {error.strerror}") from error
    with _held(partial, out):
        try:
            partial.chmod(0o755)
            yield partial
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            if out.exists():
                out.rmdir()
            partial.rename(out)
            _sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for folder in missing:
                with suppress(OSError):  # somebody else uses it by now
                    folder.rmdir()
            raise


@contextmanager
def _held(folder: Path, out: Path) -> Iterator[None]:
    """Lock a folder.

    Raises:
        MergeError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise MergeError(
            f"{out} is being written by another merge; wait for it or give another"
        ) from error
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights (config, tokenizer, ...), but no weights and no folders."""
    if source.is_dir():
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and not file.name.endswith(NO_COMPANIONS)
                and not file.name.startswith(".")
            ):
                shutil.copyfile(file, target / file.name)


def state_dtype(file: Path, dtype: str) -> None:
    """Make a model's `config.json` say what its weights are, wherever it names a type.

    Stock `transformers` loads weights in the type that it names: float32 ones would be rounded.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # there is none, or none that names a type
    if not isinstance(config, dict):
        return
    named = [
        (part, key)
        for part in (config, *config.values())
        if isinstance(part, dict)
        for key in ("dtype", "torch_dtype")
        if part.get(key) not in (None, dtype)
    ]
    for part, key in named:
        part[key] = dtype
    if named:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
