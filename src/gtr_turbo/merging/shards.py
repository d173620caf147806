"""Checkpoints as files: safetensors read in pieces, without loading a tensor.

A checkpoint is a `.safetensors` file, or a folder with one, or a folder with shards and their index, as
`transformers` and `peft` write them. Reading is by position, so several threads share a file, and a short
file is an error and not a crash.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gtr_turbo.merging.arrays import Numbers

MAX_HEADER = 100 << 20
INDEX = ".safetensors.index.json"
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2}


class MergeError(ValueError):
    """Input that cannot be merged: what was given, what was expected, what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    name: str
    file: Path
    dtype: str
    """safetensors' name: F32, BF16, F16, ..."""
    shape: tuple[int, ...]
    start: int
    """Of its first byte in the file."""
    stop: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """In its file."""
        return self.stop - self.start

    def check_type(self) -> None:
        """Refuse a tensor whose numbers cannot be read.

        Raises:
            MergeError: its type is none of `ITEMSIZE`.
        """
        if self.dtype not in ITEMSIZE:
            raise MergeError(
                f"{self.file}: tensor {self.name!r} is {self.dtype}; only {', '.join(ITEMSIZE)} can be merged"
            )


@dataclass
class Checkpoint:
    """The tensors of a checkpoint, not loaded.

    Attributes:
        path: file or folder as given.
        entries: by name, in the order of the files.
        files: the safetensors files.
    """

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    _open: dict[Path, int] = field(default_factory=dict, repr=False)
    _headers: dict[Path, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path, *, stem: str | None = None) -> Self:
        """Read the headers.

        Args:
            path: a file or a folder.
            stem: of the weight file in a folder, `model` or `adapter_model`; None takes what is there.

        Raises:
            MergeError: nothing there, or not a sound safetensors file.
        """
        self = cls(Path(path))
        try:
            for file in _files(self.path, stem):
                self._read_header(file)
            if not self.entries:
                raise MergeError(f"{self.path} holds no tensor")
            self._check_index()
        except BaseException:
            self.close()
            raise
        return self

    def _check_index(self) -> None:
        """An index must not name tensors that its files lack."""
        for index in self.path.glob(f"*{INDEX}") if len(self.files) > 1 else ():
            if lost := sorted(set(_weight_map(index)) - set(self.entries)):
                raise MergeError(f"{index} names tensor {lost[0]!r}, which none of its files holds")

    def _read_header(self, file: Path) -> None:
        size = file.stat().st_size
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self._open[file] = descriptor
        first = os.pread(descriptor, 8, 0)
        length = int.from_bytes(first, "little")
        if len(first) < 8 or length > min(size - 8, MAX_HEADER):
            raise MergeError(
                f"{file} is not a safetensors file or is cut short: {size} bytes, of which its header "
                f"claims {length}. Copy or download it again."
            )
        header = os.pread(descriptor, length, 8)
        self._headers[file] = first + header
        try:
            found = json.loads(header)
            found.pop("__metadata__", None)
            entries = [_entry(name, file, value, 8 + length) for name, value in found.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MergeError(f"{file}: its safetensors header cannot be read ({error})") from error
        end = 8 + length
        for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
            width = entry.stop - entry.start
            sound = entry.start == end and width >= 0
            if sound and entry.dtype in ITEMSIZE:
                sound = width == entry.size * ITEMSIZE[entry.dtype]
            if not sound:
                raise MergeError(f"{file}: the header's offsets of tensor {entry.name!r} are wrong")
            end = entry.stop
            if entry.name in self.entries:
                raise MergeError(
                    f"tensor {entry.name!r} is in {self.entries[entry.name].file} and in {file}"
                )
            self.entries[entry.name] = entry
        if end != size:
            raise MergeError(
                f"{file} is damaged: its header describes {end} bytes, the file has {size}. Copy or "
                "download it again."
            )
        self.files.append(file)

    def read(self, entry: Entry, first: int, row: Numbers) -> None:
        """Read entries `first` ... into a row.

        Args:
            entry: of this checkpoint.
            first: index of the first entry.
            row: float32, or uint16 for bfloat16; float16 is widened to float32. As long as what is read.

        Raises:
            MergeError: the file ended too early, or the type is not read.
        """
        entry.check_type()
        if entry.dtype == "F16":
            raw = np.empty(row.size, np.float16)
            self._pread(entry, entry.start + 2 * first, raw)
            row[:] = raw
        else:
            self._pread(entry, entry.start + row.itemsize * first, row)

    def _pread(self, entry: Entry, at: int, row: NDArray[Any]) -> None:
        view = memoryview(row.data).cast("B")
        while len(view):
            count = os.preadv(self._open[entry.file], [view], at)
            if count == 0:
                raise MergeError(f"{entry.file} ended inside tensor {entry.name!r}")
            view, at = view[count:], at + count

    def tensor(self, entry: Entry) -> Numbers:
        """A whole tensor, float32 or uint16, in its shape."""
        row: Numbers = np.empty(entry.size, row_dtype(entry.dtype))
        self.read(entry, 0, row)
        return row.reshape(entry.shape)

    def raw(self, entry: Entry) -> bytes:
        """The bytes of a tensor, whatever its type."""
        return os.pread(self._open[entry.file], entry.stop - entry.start, entry.start)

    def fingerprint(self) -> str:
        """SHA-256 of headers and of a page from the middle of every tensor.

        Tells two checkpoints of one model apart at the cost of a page a tensor. It is no proof of
        integrity: `digests` reads everything.
        """
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(self._headers[file])
        for entry in self.entries.values():
            middle = (entry.start + entry.stop) // 2
            page = os.pread(self._open[entry.file], min(4096, entry.stop - middle), middle)
            digest.update(page)
        return digest.hexdigest()

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file, as the model hub states them."""
        found = {}
        for file in self.files:
            with file.open("rb") as stream:
                found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def row_dtype(dtype: str) -> type[np.float32] | type[np.uint16]:
    """What `Checkpoint.read` reads a tensor of this type into."""
    return np.uint16 if dtype == "BF16" else np.float32


def _weight_map(index: Path) -> dict[str, Any]:
    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])


def _files(path: Path, stem: str | None) -> list[Path]:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise MergeError(
                f"{path} is no .safetensors file; convert it with save_pretrained() first"
            )
        return [path]
    if not path.is_dir():
        raise MergeError(f"{path} does not exist: expected a folder or a .safetensors file")
    if (whole := path / f"{stem or 'model'}.safetensors").is_file():
        return [whole]  # as transformers does: it leaves the index of older shards where it is
    indices = sorted(path.glob(f"{stem or '*'}{INDEX}"))
    if indices:
        try:
            names = sorted({str(name) for name in _weight_map(indices[0]).values()})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise MergeError(f"{indices[0]} cannot be read ({error})") from error
        files = [path / Path(name).name for name in names]
    else:
        if (path / "state.json").is_file() and (path / "student").is_dir():
            raise MergeError(f"{path} is a checkpoint of a run; give {path / 'student'}")
        files = sorted(path.glob(f"{stem or '*'}.safetensors"))
        if len(files) > 1:
            raise MergeError(
                f"{path} holds {len(files)} .safetensors files and no index: name one of "
                + ", ".join(file.name for file in files[:4])
            )
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise MergeError(f"{path} lacks {missing[0]}, which its index names")
    if not files:
        raise MergeError(f"{path} holds no {stem or ''}*.safetensors file")
    return files


def _entry(name: str, file: Path, value: Mapping[str, Any], origin: int) -> Entry:
    first, last = value["data_offsets"]
    shape = tuple(value["shape"])
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"shape {list(shape)} of tensor {name!r}")
    return Entry(name, file, str(value["dtype"]), shape, origin + int(first), origin + int(last))
