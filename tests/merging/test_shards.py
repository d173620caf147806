import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from files import as_torch, assert_same, load, save, save_sharded, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gtr_turbo.merging.output import Writer, copy_companions, new_folder, state_dtype
from gtr_turbo.merging.shards import Checkpoint, MergeError

TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = {"matrix": (5, 7), "vector": (3,), "scalar": (), "empty": (0, 4), "one": (1, 1, 1)}


def tensors(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(shape, generator=generator).to(dtype) for n, shape in shapes.items()}


def raw(header, data=b""):
    """A file of any header and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, first, last, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def refused(path, *parts):
    with pytest.raises(MergeError) as caught:
        Checkpoint.open(path)
    for part in parts:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TYPES)
def test_what_safetensors_wrote_is_read_back(tmp_path, kind):
    wanted = tensors(TYPES[kind])
    path = save(tmp_path / "model", wanted)
    with Checkpoint.open(path) as found:
        assert set(found.entries) == set(wanted)
        for name, there in found.entries.items():
            assert there.dtype == kind
            assert there.shape == tuple(wanted[name].shape)
            read = as_torch(found.tensor(there))
            # float16 is widened, which loses nothing
            assert read.dtype == (torch.float32 if kind == "F16" else TYPES[kind])
            assert torch.equal(read, wanted[name].to(read.dtype))
        assert found.nbytes == (path / "model.safetensors").stat().st_size


@pytest.mark.parametrize("kind", TYPES)
def test_every_piece_of_a_tensor_can_be_read(tmp_path, kind):
    wanted = {"before": torch.ones(3), "x": torch.arange(40.0).to(TYPES[kind])}
    with Checkpoint.open(save(tmp_path / "model", wanted)) as found:
        there = found.entries["x"]
        for first, count in ((0, 40), (0, 1), (13, 8), (39, 1)):
            row = np.empty(count, np.uint16 if kind == "BF16" else np.float32)
            found.read(there, first, row)
            assert as_torch(row).float().tolist() == list(range(first, first + count))


def test_a_header_that_is_not_aligned_is_read(tmp_path):
    value = np.arange(3, dtype=np.float32)
    for padding in range(8):
        file = tmp_path / f"{padding}.safetensors"
        header = json.dumps({"x": entry([3], 0, 12)}).encode() + b" " * padding
        file.write_bytes(raw(header, value.tobytes()))
        assert load_file(file)["x"].tolist() == [0.0, 1.0, 2.0]
        with Checkpoint.open(file) as found:
            assert found.tensor(found.entries["x"]).tolist() == [0.0, 1.0, 2.0]


def test_a_sharded_folder_is_the_same_checkpoint(tmp_path):
    wanted = tensors()
    path = save_sharded(tmp_path / "model", wanted)
    (path / "optimizer.safetensors").write_bytes(
        b"no part of the model: the index does not name it"
    )
    with Checkpoint.open(path) as found:
        assert len(found.files) == 3
        assert_same({n: as_torch(found.tensor(e)) for n, e in found.entries.items()}, wanted)


def test_a_file_and_the_folder_around_it_are_the_same(tmp_path):
    folder = save(tmp_path / "model", tensors())
    with Checkpoint.open(folder) as one, Checkpoint.open(folder / "model.safetensors") as other:
        assert one.entries == other.entries
        assert one.fingerprint() == other.fingerprint()


def test_a_stem_chooses_among_files(tmp_path):
    folder = save(tmp_path / "model", {"x": torch.ones(2)})
    save_file({"y": torch.ones(2)}, folder / "adapter_model.safetensors")
    with Checkpoint.open(folder, stem="adapter_model") as found:
        assert list(found.entries) == ["y"]


def test_fingerprints_tell_checkpoints_of_one_model_apart(tmp_path):
    one, other = tensors(), tensors()
    other["matrix"] = other["matrix"] + 1
    names = {}
    for name, content in (("one", one), ("copy", one), ("other", other)):
        with Checkpoint.open(save(tmp_path / name, content)) as found:
            names[name] = found.fingerprint()
    assert names["one"] == names["copy"]
    assert names["one"] != names["other"]


def test_digests_are_those_of_the_whole_file(tmp_path):
    path = save(tmp_path / "model", tensors())
    out = subprocess.run(
        ["sha256sum", path / "model.safetensors"], capture_output=True, text=True, check=True
    )
    with Checkpoint.open(path) as found:
        assert found.digests() == {"model.safetensors": out.stdout.split()[0]}


# -- damaged input ---------------------------------------------------------------------------------


def test_a_file_cut_anywhere_is_refused(tmp_path):
    file = save(tmp_path / "m.safetensors", tensors())
    whole = file.read_bytes()
    for length in [*range(12), len(whole) // 2, len(whole) - 4, len(whole) - 1]:
        file.write_bytes(whole[:length])
        refused(file, file)


def test_a_file_with_more_than_its_header_says_is_refused(tmp_path):
    file = save(tmp_path / "m.safetensors", tensors())
    file.write_bytes(file.read_bytes() + b"\0\0\0\0")
    refused(file, file, "damaged")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    file = save(tmp_path / "m.safetensors", {"x": torch.ones(1000)})
    with Checkpoint.open(file) as found:
        os.truncate(file, 2000)
        with pytest.raises(MergeError, match=r"m\.safetensors ended inside tensor 'x'"):
            found.tensor(found.entries["x"])


@pytest.mark.parametrize("length", [0, 7, 10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(tmp_path, length):
    file = save(tmp_path / "m.safetensors", tensors())
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(file, file)


FOUR = np.zeros(4, np.float32).tobytes()
GARBAGE = {
    "no json": raw(b"garbage {", FOUR),
    "no utf-8": raw(b'{"\xff\xfe": 1}', FOUR),
    "a list": raw([1, 2], FOUR),
    "a number": raw(b"7"),
    "deeply nested": raw(b"[" * 100_000),
    "a tensor that is a number": raw({"x": 7}, FOUR),
    "a tensor that is null": raw({"x": None}, FOUR),
    "no dtype": raw({"x": {"shape": [4], "data_offsets": [0, 16]}}, FOUR),
    "no shape": raw({"x": {"dtype": "F32", "data_offsets": [0, 16]}}, FOUR),
    "no offsets": raw({"x": {"dtype": "F32", "shape": [4]}}, FOUR),
    "three offsets": raw({"x": entry([4], 0, 16) | {"data_offsets": [0, 8, 16]}}, FOUR),
    "offsets of words": raw({"x": entry([4], "a", "b")}, FOUR),
    "a shape of words": raw({"x": entry(["four"], 0, 16)}, FOUR),
    "a shape that is null": raw({"x": entry(None, 0, 16)}, FOUR),
    "infinite shape": raw(b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,16]}}', FOUR),
    "negative shape": raw({"x": entry([-2, -2], 0, 16)}, FOUR),
    "shape beyond 64 bits": raw({"x": entry([10**30], 0, 16)}, FOUR),
    "shape whose product wraps to 0": raw({"x": entry([2**40, 2**40], 0, 0)}),
    "overlap": raw({"x": entry([4], 0, 16), "y": entry([2], 8, 16)}, FOUR),
    "same bytes": raw({"x": entry([4], 0, 16), "y": entry([4], 0, 16)}, FOUR),
    "gap": raw({"x": entry([1], 0, 4), "y": entry([1], 12, 16)}, FOUR),
    "late start": raw({"x": entry([2], 8, 16)}, FOUR),
    "backwards": raw({"x": entry([4], 16, 0)}, FOUR),
    "before the file": raw({"x": entry([4], -16, 0)}, FOUR),
    "past the end": raw({"x": entry([8], 0, 32)}, FOUR),
    "shape of another size": raw({"x": entry([3], 0, 16)}, FOUR),
    "type of another size": raw({"x": entry([4], 0, 16, "BF16")}, FOUR),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_header_that_is_wrong_is_refused(tmp_path, what):
    file = tmp_path / "m.safetensors"
    file.write_bytes(GARBAGE[what])
    with pytest.raises(SafetensorError):  # the library agrees that it is wrong
        safe_open(file, "np")
    refused(file, file)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_header_is_refused_or_read_as_the_library_reads_it(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file(tensors(shapes={"a": (2, 2), "b": (3,)}), file)
    content = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(
            st.sampled_from(b'0123456789-,.:[]{}" eF\x00\xff')
        )
    file.write_bytes(content)
    try:
        with Checkpoint.open(file) as found:
            floats = {n: e for n, e in found.entries.items() if e.dtype == "F32"}
            read = {name: found.tensor(there).tolist() for name, there in floats.items()}
    except MergeError:
        read = None
    wanted = library(file)
    assert wanted is None or read == wanted


def library(file):
    """The float32 tensors as safetensors reads them; None if it does not."""
    try:
        with safe_open(file, "np") as there:
            kinds = {name: there.get_slice(name).get_dtype() for name in there.offset_keys()}
            return {n: there.get_tensor(n).tolist() for n, kind in kinds.items() if kind == "F32"}
    except SafetensorError:
        return None


def test_a_missing_path_is_refused(tmp_path):
    refused(tmp_path / "nothing", tmp_path / "nothing", "does not exist")
    refused(tmp_path / "nothing.safetensors", "does not exist")


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"x": torch.ones(2)}, file)
    refused(file, file, "safetensors")
    refused(tmp_path, tmp_path, "safetensors")  # the folder holds nothing else


def test_an_empty_folder_is_refused(tmp_path):
    refused(tmp_path, tmp_path)


def test_a_checkpoint_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "m.safetensors")
    refused(tmp_path, tmp_path, "no tensor")


def test_two_files_without_an_index_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("first", "second"):
        save_file(tensors(), folder / f"{name}.safetensors")
    refused(folder, folder, "first.safetensors", "second.safetensors")


def test_one_file_is_taken_before_shards_and_others_as_transformers_does(tmp_path):
    """It writes model.safetensors beside the index of older shards, and reads it first."""
    folder = save_sharded(tmp_path / "model", {n: t * 0 for n, t in tensors().items()})
    save_file(tensors(), folder / "model.safetensors")
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    with Checkpoint.open(folder) as found:
        assert [file.name for file in found.files] == ["model.safetensors"]
        assert set(found.entries) == set(tensors())


def test_a_checkpoint_of_a_run_is_refused_with_the_folder_to_give(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "state.json").write_text("{}")
    for name in ("trained", "optimizer"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(MergeError, match=f"give {tmp_path}/student"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_refused(tmp_path):
    folder = save_sharded(tmp_path / "model", tensors())
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, folder, "model-00002-of-00003.safetensors")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    folder = save_sharded(tmp_path / "model", tensors())
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)
    refused(folder, first, second, "tensor '")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"x": 7}}',
        '{"weight_map": {"x": ["a"]}}',
        '{"weight_map": {"x": "gone.safetensors"}}',
        "[]",
        "",
        "{",
    ],
)
def test_an_index_that_names_nothing_is_refused(tmp_path, text):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    save(tmp_path / "secret.safetensors", tensors())
    folder = tmp_path / "model"
    folder.mkdir()
    index = {"weight_map": {"matrix": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "secret.safetensors")


def test_an_index_whose_shards_lack_a_tensor_is_refused(tmp_path):
    folder = save_sharded(tmp_path / "model", tensors())
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["forgotten"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    refused(folder, "forgotten")


def test_a_refused_file_is_closed(tmp_path):
    file = save(tmp_path / "m.safetensors", tensors())
    file.write_bytes(file.read_bytes()[:-1])
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        refused(file)
    assert len(os.listdir("/proc/self/fd")) == before


# -- writing ---------------------------------------------------------------------------------------


def write(folder, content, kind, *, piece=4, **options):
    """All of `content` by a Writer, in pieces, the last first."""
    layout = [(name, kind, tuple(t.shape)) for name, t in content.items()]
    writer = Writer.create(folder, layout, **options)
    for name, tensor in reversed(content.items()):
        flat = tensor.contiguous().flatten()
        row = flat.view(torch.int16).numpy() if kind == "BF16" else flat.numpy()
        for first in reversed(range(0, max(1, len(row)), piece)):
            writer.write(name, first, row[first : first + piece])
    writer.close()


@pytest.mark.parametrize("kind", TYPES)
def test_what_the_writer_wrote_opens_in_safetensors(tmp_path, kind):
    wanted = tensors(TYPES[kind])
    write(tmp_path, wanted, kind)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), wanted)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with Checkpoint.open(tmp_path) as found:
        assert list(found.entries) == list(wanted)


def test_several_shards_have_an_index_that_names_each_tensor(tmp_path):
    wanted = tensors(shapes={f"t{i}": (10,) for i in range(7)})
    write(tmp_path, wanted, "F32", stem="model", shard_bytes=100)
    names = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == names
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 40
    for name in names:
        there = load_file(tmp_path / name)
        assert sum(t.nbytes for t in there.values()) <= 100
        assert set(there) == {n for n, file in index["weight_map"].items() if file == name}
    assert_same(load(tmp_path), wanted)


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    sizes = {"small": (2,), "large": (50,), "last": (2,)}
    for order, count in ((["small", "large", "last"], 3), (["large", "small", "last"], 2)):
        wanted = tensors(shapes={name: sizes[name] for name in order})
        folder = tmp_path / str(count)
        folder.mkdir()
        write(folder, wanted, "F32", shard_bytes=16)
        assert len(list(folder.glob("*.safetensors"))) == count
        assert_same(load(folder), wanted)


def test_names_of_any_letters_survive(tmp_path):
    wanted = {'a "quoted" näme\\ \n': torch.ones(2), "層.weight": torch.zeros(1)}
    write(tmp_path, wanted, "F32")
    assert_same(load(tmp_path), wanted)


def test_a_file_system_that_cannot_reserve_space_is_written_all_the_same(tmp_path, monkeypatch):
    def reserve(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    write(tmp_path, tensors(), "F32")
    assert_same(load(tmp_path), tensors())


def test_a_full_disk_is_known_before_anything_is_computed(tmp_path, monkeypatch):
    def reserve(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=r"no room for \d+ bytes") as caught:
        Writer.create(tmp_path, [("x", "F32", (1000,))])
    assert caught.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(caught.value)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_fails_at_the_end_is_told_and_no_file_stays_open(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    writer = Writer.create(tmp_path, [(name, "F32", (10,)) for name in "abc"], shard_bytes=40)
    calls = []

    def sync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.EIO, "the disk failed")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="the disk failed"):
        writer.close()
    writer.close(sync=False)
    assert len(calls) == 2
    assert len(os.listdir("/proc/self/fd")) == before


# -- the folder ------------------------------------------------------------------------------------


def test_the_folder_appears_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("content")
        assert not out.exists()
    assert (out / "file").read_text() == "content"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("out", ["out", "deep/er/out"])
@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_block_fails(tmp_path, error, out):
    def fail():
        with new_folder(tmp_path / out) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "file").write_text("content")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_all_is_on_the_disk_before_the_folder_appears(tmp_path, monkeypatch):
    out, synced = tmp_path / "out", []

    def sync(descriptor):
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), out.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    with new_folder(out) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "tokenizer.json").write_text("{}")
    flushed = {name for name, appeared in synced if not appeared}
    assert flushed == {"config.json", "tokenizer.json", folder.name}


def test_an_empty_folder_is_taken_and_comes_back_when_the_block_fails(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="no"), new_folder(out):
        raise ValueError("no")
    assert snapshot(tmp_path) == {str(tmp_path): "folder", str(out): "folder"}
    with new_folder(out) as folder:
        (folder / "file").write_text("content")
    assert [path.name for path in out.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_exists_is_not_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
    (out if kind == "file" else out / "mine").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(MergeError, match=r"out exists already"), new_folder(out):
        pytest.fail("the block ran")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_names_the_folder_it_leads_to(tmp_path, exists):
    there = tmp_path / "disk" / "there"
    there.parent.mkdir()
    if exists:
        there.mkdir()
    (tmp_path / "out").symlink_to(there)
    with new_folder(tmp_path / "out") as folder:
        assert folder.parent == there.parent  # a rename does not reach another disk
        (folder / "x").write_text("new")
    assert (tmp_path / "out").is_symlink()
    assert (there / "x").read_text() == "new"
    assert list(there.parent.iterdir()) == [there]


@pytest.mark.parametrize("mounted", [True, False])
def test_a_folder_that_cannot_be_replaced_is_refused_first(tmp_path, monkeypatch, mounted):
    monkeypatch.chdir(tmp_path)
    out = Path("volume" if mounted else ".")
    out.mkdir(exist_ok=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MergeError, match="a folder inside it"), new_folder(out):
        raise AssertionError("it began")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"

    def late():
        with new_folder(out):
            out.mkdir()
            (out / "mine").write_text("precious")

    with pytest.raises((MergeError, OSError)):
        late()
    assert (out / "mine").read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "run[1]", "a*b"])
def test_the_rest_of_a_killed_merge_is_removed(tmp_path, name):
    stale = tmp_path / f".{name}.partial-abc"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"half")
    other = tmp_path / ".else.partial-abc"
    other.mkdir()
    with new_folder(tmp_path / name):
        assert not stale.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".else.partial-abc", name])


HOLD = """
import fcntl, os, sys
folder = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(folder, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    partial = tmp_path / ".out.partial-abc"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    before = snapshot(tmp_path)
    arguments = [sys.executable, "-c", HOLD, str(partial)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(MergeError, match="out is being written by another merge"),
            new_folder(tmp_path / "out"),
        ):
            pytest.fail("the block ran")
        assert snapshot(tmp_path) == before
        holder.stdin.close()
        holder.wait()
    with new_folder(tmp_path / "out"):
        assert not partial.exists()


def test_two_merges_in_one_process_do_not_share_a_folder(tmp_path):
    out = tmp_path / "out"
    with new_folder(out):
        with pytest.raises(MergeError, match="another merge"), new_folder(out):
            pytest.fail("the block ran")
        assert len(list(tmp_path.iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("no folder")
    before = snapshot(tmp_path)
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(MergeError, match="cannot write beside"), new_folder(out):
            pytest.fail("the block ran")
    assert snapshot(tmp_path) == before


def test_companions_are_copied_but_no_weights_and_no_folders(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    save_sharded(source, tensors())
    kept = ["config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt"]
    left = ["pytorch_model.bin", "optimizer.pt", "rng.pth", "tf_model.h5", "f.msgpack", ".hidden"]
    left += ["pytorch_model.bin.index.json", "merge-thresholds.json", "README.md"]
    left += ["model-q4.gguf", "model.onnx", "model.onnx_data", "weights.npz"]
    for name in kept + left:
        (source / name).write_text(name)
    (source / "deep").mkdir()
    (source / "deep" / "config.json").write_text("{}")
    copy_companions(source, target)
    assert sorted(path.name for path in target.iterdir()) == sorted(kept)
    assert all((target / name).read_text() == name for name in kept)


def test_a_config_names_the_type_wherever_it_names_one(tmp_path):
    file = tmp_path / "config.json"
    parts = {"vision_config": {"torch_dtype": "bfloat16", "depth": 2}, "text_config": {"depth": 4}}
    file.write_text(json.dumps({"dtype": "bfloat16", **parts}))
    state_dtype(file, "float32")
    parts["vision_config"]["torch_dtype"] = "float32"
    assert json.loads(file.read_text()) == {"dtype": "float32", **parts}


@pytest.mark.parametrize(
    "text", ['{"depth": 1}', '{"dtype":null}', '{"dtype":"float32"}', "[1]", "{"]
)
def test_a_config_that_names_no_other_type_is_left_alone(tmp_path, text):
    file = tmp_path / "config.json"
    state_dtype(file, "float32")
    assert not file.exists()
    file.write_text(text)
    state_dtype(file, "float32")
    assert file.read_text() == text
