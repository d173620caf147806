import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from files import (
    SHAPES,
    SMALL,
    assert_same,
    changes,
    expected,
    load,
    save,
    save_sharded,
    snapshot,
    walk,
    weight_bytes,
    written,
)

from gtr_turbo.merging import MergeError, merge
from gtr_turbo.merging.methods import METHODS, ema
from gtr_turbo.merging.shards import Checkpoint
from gtr_turbo.merging.thresholds import THRESHOLDS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDECAR = "merge-thresholds.json"
PIECES = {"large": (300, 1000), "small": (16,)}


def count_of(method):
    return METHODS[method].count or 3


def density_of(method):
    return 1.0 if METHODS[method].thin == "none" else 0.8


def refused(paths, out, *parts, kept=(), **options):
    """A clear MergeError, nothing written, no input touched."""
    before = snapshot(out.parent, *kept)
    with pytest.raises(MergeError) as caught:
        merge(paths, out, **options)
    for part in parts:
        assert str(part) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(out.parent, *kept) == before


@pytest.fixture
def three(tmp_path):
    """(base, three checkpoints) as files of small float32 tensors."""
    return written(tmp_path, *walk(3, shapes=SMALL))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """(tensors of the base, those of three checkpoints, and their files); one is larger than a piece."""
    tensors = walk(3, shapes=PIECES)
    return *tensors, *written(tmp_path_factory.mktemp("pieces"), *tensors)


# -- the result ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_a_merge_of_files_is_the_merge_in_memory_rounded_once(tmp_path, method, dtype):
    base, checkpoints = walk(count_of(method), dtype=DTYPES[dtype], seed=len(method))
    origin, paths = written(tmp_path, base, checkpoints)
    before = snapshot(origin, *paths)
    merge(paths, tmp_path / "out", base=origin, method=method)
    wanted = expected(base, checkpoints, method=method, density=density_of(method))
    assert_same(load(tmp_path / "out"), wanted)
    assert snapshot(origin, *paths) == before


def test_ties_of_files_by_hand(tmp_path):
    base = {"x": torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])}
    deltas = [
        torch.tensor([1.0, -2.0, 0.25, 3.0, 0.5]),
        torch.tensor([2.0, 1.0, -4.0, -1.0, 0.5]),
        torch.tensor([-4.0, 3.0, -2.0, -3.0, 0.0]),
    ]
    origin, paths = written(tmp_path, base, [{"x": base["x"] + delta} for delta in deltas])
    merge(paths, tmp_path / "out", base=origin, density=0.8)
    # four of five are kept: 1 -2 0 3 .5 / 2 1 -4 -1 0 / -4 3 -2 -3 0; elected - + - - +
    assert load(tmp_path / "out")["x"].tolist() == [6.0, 22.0, 27.0, 38.0, 50.5]


@pytest.mark.parametrize("lam", [0.3, 2.0, -1.0, 0.0])
def test_lambda_multiplies_the_merged_change(tmp_path, lam):
    base, checkpoints = walk(3, shapes=SMALL)
    origin, paths = written(tmp_path, base, checkpoints)
    merge(paths, tmp_path / "out", base=origin, lam=lam, density=0.5)
    assert_same(load(tmp_path / "out"), expected(base, checkpoints, lam=lam, density=0.5))


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"weights": [1, 2, 3]}, (1.0, 2.0, 3.0)),
        ({"weights": [0, 1, 0.5]}, (0.0, 1.0, 0.5)),
        ({"weights": "ema"}, (0.25, 0.25, 0.5)),
        ({"weights": "ema", "alpha": 0.2}, tuple(ema(3, 0.2))),
        ({"weights": "sma"}, (1 / 3,) * 3),
    ],
)
@pytest.mark.parametrize("method", ["ties", "linear", "task-arithmetic"])
def test_weights_are_those_that_were_given(tmp_path, method, options, weights):
    base, checkpoints = walk(3, shapes=SMALL)
    origin, paths = written(tmp_path, base, checkpoints)
    report = merge(paths, tmp_path / "out", base=origin, method=method, **options)
    wanted = expected(base, checkpoints, method=method, weights=weights, density=density_of(method))
    assert_same(load(tmp_path / "out"), wanted)
    assert report.manifest["settings"]["weights"] == pytest.approx(weights)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.55, 1.0])
def test_density_is_the_fraction_that_is_kept(pieces, tmp_path, density):
    base, checkpoints, origin, paths = pieces
    merge(paths, tmp_path / "out", base=origin, density=density)
    found = load(tmp_path / "out")
    assert_same(found, expected(base, checkpoints, density=density))
    if density == 0.001:  # 300 of 300,000 in each of three
        assert 300 <= int((found["large"] != base["large"]).sum()) <= 900


def test_ties_as_peft_defines_it_is_another_merge(tmp_path):
    base, checkpoints = walk(3, shapes=SMALL)
    origin, paths = written(tmp_path, base, checkpoints)
    for compat in ("peft", None):
        merge(paths, tmp_path / str(compat), base=origin, compat=compat, weights=[1, 2, 3])
        wanted = expected(base, checkpoints, compat=compat, weights=(1, 2, 3), density=0.8)
        assert_same(load(tmp_path / str(compat)), wanted)
    assert weight_bytes(tmp_path / "peft") != weight_bytes(tmp_path / "None")


def test_the_seed_decides_what_dare_drops(pieces, tmp_path):
    base, checkpoints, origin, paths = pieces
    options = {"base": origin, "method": "dare-linear", "density": 0.5}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        merge(paths, tmp_path / name, seed=seed, **options)
    wanted = expected(base, checkpoints, method="dare-linear", density=0.5, seed=1)
    assert_same(load(tmp_path / "one"), wanted)
    assert weight_bytes(tmp_path / "one") == weight_bytes(tmp_path / "again")
    assert weight_bytes(tmp_path / "one") != weight_bytes(tmp_path / "two")


@pytest.mark.parametrize("method", ["ties", "task-arithmetic", "linear"])
@pytest.mark.parametrize(
    ("base_dtype", "dtype"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")],
)
def test_the_base_may_have_another_type(tmp_path, method, base_dtype, dtype):
    base, checkpoints = walk(
        3, shapes=PIECES, dtype=DTYPES[dtype], base_dtype=DTYPES[base_dtype], step=0.5
    )
    origin, paths = written(tmp_path, base, checkpoints)
    merge(paths, tmp_path / "out", base=origin, method=method)
    wanted = expected(base, checkpoints, method=method, density=density_of(method))
    assert_same(load(tmp_path / "out"), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_the_type_of_the_result_can_be_chosen(tmp_path, given, dtype):
    base, checkpoints = walk(2, dtype=DTYPES[given], shapes=SMALL)
    origin, paths = written(tmp_path, base, checkpoints)
    report = merge(paths, tmp_path / "out", base=origin, dtype=dtype)
    assert_same(
        load(tmp_path / "out"), expected(base, checkpoints, dtype=DTYPES[dtype], density=0.8)
    )
    sizes = sum(t.nbytes for t in load(tmp_path / "out").values())
    assert report.plan.disk_bytes == sizes


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 70000.0), ("float16", 65520.0), ("bfloat16", 3.4e38)]
)
def test_a_merge_that_does_not_fit_its_type_is_refused(tmp_path, method, dtype, value):
    base, checkpoints = walk(2, shapes=SMALL)
    for checkpoint in checkpoints:
        checkpoint["second"][3, 4] = value
    origin, paths = written(tmp_path, base, checkpoints)
    refused(paths, tmp_path / "out", "'second'", base=origin, method=method, dtype=dtype)


def test_the_largest_number_of_a_type_fits(tmp_path):
    _, checkpoints = walk(2, shapes=SMALL)
    for checkpoint in checkpoints:
        checkpoint["second"][3, 4] = 65504.0
    paths = [save(tmp_path / str(k), tensors) for k, tensors in enumerate(checkpoints)]
    merge(paths, tmp_path / "out", method="linear", dtype="float16")
    assert load(tmp_path / "out")["second"][3, 4] == 65504.0


def test_linear_and_slerp_need_no_base(tmp_path):
    _, checkpoints = walk(2, shapes=SMALL)
    paths = [save(tmp_path / str(k), tensors) for k, tensors in enumerate(checkpoints)]
    for method in ("linear", "slerp"):
        report = merge(paths, tmp_path / method, method=method)
        assert_same(load(tmp_path / method), expected(None, checkpoints, method=method))
        assert report.manifest["base"] is None


# -- the result does not depend on ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_engine_change_no_bit(tmp_path, method):
    _, _, origin, paths = pieces_of(tmp_path, count_of(method))
    outs = []
    for engine, threads in (("numba", 1), ("numba", 2), ("numba", 4), ("numpy", 1)):
        outs.append(tmp_path / f"{engine}-{threads}")
        merge(paths, outs[-1], base=origin, method=method, engine=engine, threads=threads)
    for out in outs[1:]:
        assert weight_bytes(out) == weight_bytes(outs[0])


def pieces_of(folder, count, dtype=torch.bfloat16):
    tensors = walk(count, dtype=dtype)
    return *tensors, *written(folder, *tensors)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_engines_agree_on_every_type(tmp_path, dtype):
    _, _, origin, paths = pieces_of(tmp_path, 3, DTYPES[dtype])
    for engine in ("numba", "numpy"):
        merge(paths, tmp_path / engine, base=origin, engine=engine)
    assert weight_bytes(tmp_path / "numba") == weight_bytes(tmp_path / "numpy")


def test_sharded_inputs_change_no_bit(tmp_path):
    base, checkpoints, origin, paths = pieces_of(tmp_path, 3)
    merge(paths, tmp_path / "whole", base=origin)
    sharded = [save_sharded(tmp_path / f"s{k}", c, 2) for k, c in enumerate(checkpoints)]
    merge(sharded, tmp_path / "sharded", base=save_sharded(tmp_path / "base-s", base, 3))
    merge([sharded[0], *paths[1:]], tmp_path / "mixed", base=origin)
    files = [path / "model.safetensors" for path in paths]
    merge(files, tmp_path / "files", base=origin / "model.safetensors")
    whole = load(tmp_path / "whole")
    for name in ("sharded", "mixed", "files"):
        assert_same(load(tmp_path / name), whole)
    # files and folders of one file lay the tensors out alike
    assert weight_bytes(tmp_path / "whole") == weight_bytes(tmp_path / "files")


def test_a_sharded_output_has_the_same_tensors(tmp_path):
    _, _, origin, paths = pieces_of(tmp_path, 3)
    merge(paths, tmp_path / "whole", base=origin)
    merge(paths, tmp_path / "sharded", base=origin, shard_bytes=1000)
    assert_same(load(tmp_path / "sharded"), load(tmp_path / "whole"))
    shards = sorted(file.name for file in (tmp_path / "sharded").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    again = [tmp_path / "sharded", tmp_path / "whole"]  # what was written can be merged
    merge(again, tmp_path / "again", base=origin, density=1.0)
    assert set(load(tmp_path / "again")) == set(SHAPES)


def test_one_checkpoint_named_twice_merges_to_itself(tmp_path, three):
    _, paths = three
    merge([paths[0], paths[0]], tmp_path / "out", method="linear")
    assert_same(load(tmp_path / "out"), load(paths[0]))


def trimmed(delta, density):
    """By a stable sort: the largest, equal ones from the front."""
    order = np.argsort(-delta.abs().numpy(), kind="stable")
    found = torch.zeros_like(delta)
    kept = torch.from_numpy(order[: int(density * len(delta))])
    found[kept] = delta[kept]
    return found


LONG = 400_001
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal(LONG).astype(np.float32)
PLACE = np.arange(LONG)
HOSTILE = {
    "rising": np.sort(np.abs(NOISE)),
    "falling": -np.sort(-NOISE),
    "large at the end": NOISE * np.where(PLACE < LONG - 5000, 1e-6, 1e6),
    "striped": NOISE * np.where(PLACE // 1024 % 2, 1e-3, 1e3),
    "every eighth is zero": np.where(PLACE % 8 == 0, 0, NOISE),
    "only every eighth is not zero": np.where(PLACE % 8 == 0, NOISE, 0),
    "three magnitudes": RNG.choice([-3, -2, -1, 1, 2, 3], LONG),
    "one magnitude": RNG.choice([-2.5, 2.5], LONG),
    "neighbouring numbers": 1 + RNG.integers(0, 90, LONG) * 2.0**-23,
    "subnormal": NOISE * 1e-42,
    "all sizes": NOISE * 10.0 ** RNG.integers(-38, 37, LONG),
    "zero": np.zeros(LONG),
}
"""Changes whose order or spread misleads whoever looks at a part of them."""


@pytest.mark.parametrize("what", HOSTILE)
def test_exactly_the_largest_are_kept_whatever_their_order(tmp_path, what):
    delta = torch.from_numpy(HOSTILE[what].astype(np.float32))
    origin = save(tmp_path / "base", {"x": torch.zeros(LONG)})
    paths = [save(tmp_path / str(k), {"x": delta}) for k in range(2)]
    for density in (0.1, 0.5, 0.8, 0.99):
        merge(paths, tmp_path / f"out-{density}", base=origin, density=density)
        # the mean of a change with itself is that change
        found = load(tmp_path / f"out-{density}")["x"]
        assert torch.equal(found, trimmed(delta, density)), density


# -- what lies beside ------------------------------------------------------------------------------


def test_companions_come_from_the_base(tmp_path, three):
    origin, paths = three
    for path in (origin, *paths):
        (path / "config.json").write_text(json.dumps({"of": path.name}))
    (origin / "tokenizer.json").write_text("{}")
    (origin / "merged-from.json").write_text('{"of": "an earlier merge"}')
    (paths[-1] / "trainer_state.json").write_text("{}")
    merge(paths, tmp_path / "out", base=origin)
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["config.json", "merged-from.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"of": "base"}
    assert "tensors" in json.loads((tmp_path / "out/merged-from.json").read_text())


def test_without_a_base_companions_come_from_the_newest_checkpoint(tmp_path, three):
    _, paths = three
    for path in paths:
        (path / "config.json").write_text(json.dumps({"of": path.name}))
    merge(paths, tmp_path / "out", method="linear")
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"of": "checkpoint-2"}


def test_a_merged_model_loads_in_stock_transformers(tiny, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    base = load(tiny)
    generator = torch.Generator().manual_seed(0)
    checkpoints = [
        {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
        for _ in range(3)
    ]
    paths = [save(tmp_path / str(k), tensors) for k, tensors in enumerate(checkpoints)]
    merge(paths, tmp_path / "out", base=tiny, shard_bytes=2 << 20)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    wanted = expected(base, checkpoints, density=0.8)
    assert set(wanted) <= set(state)
    for name, tensor in wanted.items():
        assert torch.equal(state[name].float(), tensor.float()), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(
        AutoTokenizer.from_pretrained(tiny)
    )


# -- the manifest ----------------------------------------------------------------------------------


def test_the_manifest_says_what_was_merged(tmp_path, three):
    origin, paths = three
    report = merge(paths, tmp_path / "out", base=origin, density=0.7, lam=0.5, weights=[1, 1, 2])
    kept = json.loads((tmp_path / "out" / "merged-from.json").read_text())
    assert kept == report.manifest
    assert kept["settings"] == {
        "method": "ties",
        "weights": [1.0, 1.0, 2.0],
        "density": 0.7,
        "lambda": 0.5,
        "compat": None,
        "seed": 0,
        "rank": None,
        "kind": "full",
        "form": "dense",
    }
    for path, lines in zip((*paths, origin), (*kept["checkpoints"], kept["base"]), strict=True):
        with Checkpoint.open(path) as opened:
            assert lines["fingerprint"] == opened.fingerprint()
        assert lines["path"] == str(path)
        assert lines["bytes"] == (path / "model.safetensors").stat().st_size
    assert len({lines["fingerprint"] for lines in kept["checkpoints"]}) == 3
    assert list(kept["tensors"]) == list(load(paths[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_manifest_counts_zeros_and_ties_at_the_threshold(tmp_path, dtype):
    base, checkpoints = walk(3, shapes=PIECES, dtype=DTYPES[dtype], step=0.003)
    base["still"] = torch.ones(8, dtype=DTYPES[dtype])
    checkpoints = [{**checkpoint, "still": base["still"]} for checkpoint in checkpoints]
    origin, paths = written(tmp_path, base, checkpoints)
    report = merge(paths, tmp_path / "out", base=origin, density=0.6)
    for name, lines in report.manifest["tensors"].items():
        assert lines["entries"] == base[name].numel()
        for k, change in enumerate(changes(base, checkpoints, name)):
            size = change.abs().flatten().sort(descending=True).values
            threshold = float(size[int(0.6 * size.numel()) - 1])
            zeros = int((size == 0).sum()) / size.numel()
            assert lines["zero_fraction"][k] == pytest.approx(zeros, abs=1e-6)
            assert lines["threshold"][k] == threshold
            assert lines["ties_at_threshold"][k] == int((size == threshold).sum())
    assert report.manifest["tensors"]["still"]["zero_fraction"] == [1.0] * 3


def test_rounding_that_leaves_nothing_to_trim_is_warned_of(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        base, checkpoints = walk(3, shapes={"x": (64, 64), "y": (64, 64)}, dtype=dtype, step=1e-4)
        origin, paths = written(tmp_path / str(dtype), base, checkpoints)
        report = merge(paths, tmp_path / f"out-{dtype}", base=origin)
        assert report.warnings == report.manifest["warnings"]
        if dtype == torch.float32:
            assert report.warnings == []
        else:
            (warning,) = report.warnings
            worst = max(float((c == 0).float().mean()) for c in changes(base, checkpoints, "x"))
            assert worst > 0.2
            assert warning.startswith("in 2 of 2 tensors more changes are exactly zero")
            assert "bfloat16" in warning


def test_ties_at_the_threshold_are_warned_of(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {"coarse": torch.zeros(1000), "fine": torch.zeros(1000)}
    checkpoints = [
        {
            "coarse": torch.randint(1, 4, (1000,), generator=generator).float(),
            "fine": torch.randn(1000, generator=generator),
        }
        for _ in range(2)
    ]
    origin, paths = written(tmp_path, base, checkpoints)
    (warning,) = merge(paths, tmp_path / "out", base=origin).warnings
    assert warning.startswith("in 1 of 2 tensors (coarse ...) more than 1% of the changes equal")


def test_the_threshold_itself_is_no_tie_to_warn_of(tmp_path):
    base, checkpoints = walk(2, shapes={"bias": (16,), "scalar": (), "two": (2,)})
    origin, paths = written(tmp_path, base, checkpoints)
    report = merge(paths, tmp_path / "out", base=origin)
    assert report.manifest["tensors"]["bias"]["ties_at_threshold"] == [1, 1]
    assert report.warnings == []


def test_what_is_not_trimmed_has_no_warning(tmp_path):
    base = {"still": torch.zeros(1000)}
    origin, paths = written(tmp_path, base, [base, base])
    (warning,) = merge(paths, tmp_path / "out", base=origin).warnings
    assert warning.startswith("no checkpoint differs from the base in any of the 1 tensors")
    assert merge(paths, tmp_path / "all", base=origin, density=1.0).warnings == []


def test_a_frozen_tensor_is_not_warned_of_and_hides_none_that_is(tmp_path):
    base, checkpoints = walk(2, shapes={"x": (64, 64), "frozen": (64, 64)})
    checkpoints = [{**checkpoint, "frozen": base["frozen"]} for checkpoint in checkpoints]
    origin, paths = written(tmp_path / "fine", base, checkpoints)
    assert merge(paths, tmp_path / "out", base=origin).warnings == []
    for checkpoint in checkpoints:
        checkpoint["x"][:32] = base["x"][:32]
    origin, paths = written(tmp_path / "idle", base, checkpoints)
    (warning,) = merge(paths, tmp_path / "out-2", base=origin).warnings
    assert warning.startswith("in 1 of 1 tensors more changes are exactly zero")
    assert "up to 50.0%, x" in warning


def test_a_tensor_with_one_change_is_not_a_frozen_one(tmp_path):
    base = {"x": torch.zeros(4_000_000)}
    changed = {"x": base["x"].clone()}
    changed["x"][7] = 1.0
    origin, paths = written(tmp_path, base, [changed, changed])
    (warning,) = merge(paths, tmp_path / "out", base=origin).warnings
    assert "more changes are exactly zero" in warning


def test_the_plan_is_what_is_done(tmp_path, three):
    origin, paths = three
    plan = merge(paths, tmp_path / "out", base=origin, dry_run=True)
    assert plan.manifest == {}
    assert plan.warnings == []
    assert not (tmp_path / "out").exists()
    numbers = 24 * 16 + 40 * 8 + 16
    assert plan.plan.tensors == plan.plan.merged == 3
    assert plan.plan.read_bytes == 4 * numbers * 4
    assert plan.plan.disk_bytes == numbers * 4
    told = []
    done = merge(paths, tmp_path / "out", base=origin, progress=lambda *seen: told.append(seen))
    assert done.plan == plan.plan
    assert told[-1] == (plan.plan.read_bytes, plan.plan.read_bytes)
    assert len(told) == 3
    assert told == sorted(told)


# -- thresholds kept beside the checkpoints ------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    """(base, three checkpoints with their thresholds, bytes of the first merge); density 0.8."""
    origin, paths = written(tmp_path, *walk(3, shapes=PIECES))
    merge(paths, tmp_path / "first", base=origin, keep_thresholds=True)
    return origin, paths, weight_bytes(tmp_path / "first")


def test_kept_thresholds_give_the_same_bytes(tmp_path, kept):
    origin, paths, first = kept
    report = merge(paths, tmp_path / "second", base=origin)
    assert report.plan.cached == 3
    assert weight_bytes(tmp_path / "second") == first
    again = merge(paths, tmp_path / "numpy", base=origin, engine="numpy", threads=1)
    assert again.plan.cached == 3
    assert weight_bytes(tmp_path / "numpy") == first
    fresh = json.loads((tmp_path / "first" / "merged-from.json").read_text())
    assert report.manifest["tensors"] == fresh["tensors"]


def test_thresholds_are_written_only_when_asked_for(tmp_path, three):
    origin, paths = three
    before = snapshot(origin, *paths)
    merge(paths, tmp_path / "one", base=origin)
    merge(paths, tmp_path / "three", base=origin, dry_run=True, keep_thresholds=True)
    assert snapshot(origin, *paths) == before
    merge(paths, tmp_path / "four", base=origin, keep_thresholds=True)
    after = snapshot(origin, *paths)
    assert set(after) - set(before) == {str(path / SIDECAR) for path in paths}
    assert {name: after[name] for name in before} == before
    assert not (tmp_path / "four" / SIDECAR).exists()


def test_thresholds_that_cannot_be_kept_are_warned_of(tmp_path, three, monkeypatch):
    origin, paths = three

    def replace(part, to):
        if to.parent == paths[1]:
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        os.replace(part, to)

    monkeypatch.setattr(Path, "replace", replace)
    report = merge(paths, tmp_path / "out", base=origin, keep_thresholds=True)
    (warning,) = (text for text in report.warnings if "thresholds" in text)
    assert str(paths[1]) in warning
    assert "No space left" in warning
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [(path / THRESHOLDS).exists() for path in paths] == [True, False, True]
    assert not list(paths[1].glob("*.part"))


def test_thresholds_do_not_depend_on_the_weights(tmp_path, kept):
    origin, paths, _ = kept
    options = {"base": origin, "weights": [1, 2, 3], "lam": 0.5}
    assert merge(paths[:2] + paths, tmp_path / "more", base=origin).plan.cached == 5
    assert merge(paths, tmp_path / "kept", **options).plan.cached == 3
    for path in paths:
        (path / SIDECAR).unlink()
    assert merge(paths, tmp_path / "fresh", **options).plan.cached == 0
    assert weight_bytes(tmp_path / "kept") == weight_bytes(tmp_path / "fresh")


def test_some_kept_thresholds_are_used_and_the_others_found(tmp_path, kept):
    origin, paths, first = kept
    for missing in (0, 2, 1):
        (paths[missing] / SIDECAR).unlink()
        report = merge(paths, tmp_path / f"without-{missing}", base=origin)
        assert report.plan.cached == sum((path / SIDECAR).exists() for path in paths)
        assert weight_bytes(tmp_path / f"without-{missing}") == first
    assert report.plan.cached == 0


def test_thresholds_of_another_density_or_base_are_ignored(tmp_path, kept):
    origin, paths, first = kept
    assert merge(paths, tmp_path / "sparse", base=origin, density=0.5).plan.cached == 0
    assert merge(paths[1:], tmp_path / "moved", base=paths[0]).plan.cached == 0
    for path in paths:
        (path / SIDECAR).unlink()
    merge(paths, tmp_path / "fresh", base=origin, density=0.5)
    assert weight_bytes(tmp_path / "fresh") == weight_bytes(tmp_path / "sparse") != first


def test_thresholds_of_another_checkpoint_are_ignored(tmp_path, kept):
    origin, paths, first = kept
    shutil.copy(paths[0] / SIDECAR, paths[1] / SIDECAR)
    assert merge(paths, tmp_path / "second", base=origin).plan.cached == 2
    assert weight_bytes(tmp_path / "second") == first


def test_thresholds_lie_beside_a_file_too(tmp_path):
    base, checkpoints = walk(2, shapes=SMALL)
    origin = save(tmp_path / "base.safetensors", base)
    paths = [save(tmp_path / f"c{k}.safetensors", c) for k, c in enumerate(checkpoints)]
    merge(paths, tmp_path / "first", base=origin, keep_thresholds=True)
    assert sorted(file.name for file in tmp_path.glob("*.json")) == [
        "c0.merge-thresholds.json",
        "c1.merge-thresholds.json",
    ]
    assert merge(paths, tmp_path / "second", base=origin).plan.cached == 2
    assert_same(load(tmp_path / "second"), load(tmp_path / "first"))


def test_thresholds_are_not_carried_into_a_result(tmp_path, kept):
    _, paths, _ = kept
    merge(paths, tmp_path / "out", method="linear")
    assert not (tmp_path / "out" / SIDECAR).exists()
    merge(paths[1:], tmp_path / "moved", base=paths[0])
    assert not (tmp_path / "moved" / SIDECAR).exists()


def magnitude(step):
    def change(cut):
        cut[0] += step

    return change


def need(step):
    def change(cut):
        cut[1] += step

    return change


def both(cut):
    cut[:] = [0, 0, 0]


def beyond(number):
    def change(cut):
        cut[0] = number

    return change


TAMPERED = {
    "a larger magnitude": magnitude(1000),
    "a smaller magnitude": magnitude(-1000),
    "the next magnitude": magnitude(1),
    "one more needed": need(1),
    "one less needed": need(-1),
    "many more needed": need(10**6),
    "far too many needed": need(2**70),
    "all zero": both,
    "a negative magnitude": beyond(-5),
    "an infinite magnitude": beyond(0x7F800000),
    "a magnitude with a sign": beyond(0xBF800000),
    "a magnitude past 32 bits": beyond(2**32 + 7),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_thresholds_that_were_tampered_with_are_refused(tmp_path, kept, what):
    origin, paths, _ = kept
    file = paths[1] / SIDECAR
    content = json.loads(file.read_text())
    TAMPERED[what](content["cuts"]["large"])
    file.write_text(json.dumps(content))
    refused(paths, tmp_path / "out", SIDECAR, base=origin)
    file.unlink()
    merge(paths, tmp_path / "out", base=origin)


def test_thresholds_of_weights_that_changed_since_are_refused(tmp_path, kept):
    origin, paths, _ = kept
    file = paths[0] / "model.safetensors"
    with Checkpoint.open(file) as opened:
        start = opened.entries["large"].start
        before = opened.fingerprint()
    with file.open("r+b") as stream:  # far from the pages that the fingerprint is of
        stream.seek(start)
        stream.write(np.full(64, 30, np.float32).tobytes())
    with Checkpoint.open(file) as opened:
        assert opened.fingerprint() == before
    refused(paths, tmp_path / "out", SIDECAR, "'large'", base=origin)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"cuts": 7}', '{"cuts": {"large": 7}}', '{"cuts": {"x": [1]}}'],
)
def test_a_damaged_file_of_thresholds_is_refused(tmp_path, kept, text):
    origin, paths, _ = kept
    (paths[1] / SIDECAR).write_text(text)
    refused(paths, tmp_path / "out", paths[1] / SIDECAR, base=origin)
    # a merge that trims nothing does not care
    merge(paths, tmp_path / "out", base=origin, method="task-arithmetic")


# -- input that cannot be merged -------------------------------------------------------------------


def spoiled(tensors, **changed):
    made = {**tensors, **changed}
    return {name: tensor for name, tensor in made.items() if tensor is not None}


def numbers(value, shape=(40, 8)):
    tensor = torch.ones(shape)
    tensor.view(-1)[-1] = value
    return tensor


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("method", ["ties", "linear"])
@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"second": None}, ["'second'", "no tensor"]),
        ({"extra": torch.ones(2)}, ["'extra'", "no tensor"]),
        ({"second": torch.ones(8, 40)}, ["'second'", "[8, 40]", "[40, 8]"]),
        ({"second": torch.ones(320)}, ["'second'", "[320]"]),
        ({"second": torch.ones(40, 8).bfloat16()}, ["'second'", "BF16", "F32"]),
        ({"second": torch.ones(40, 8).long()}, ["'second'", "I64"]),
        ({"second": torch.ones(40, 8).double()}, ["'second'", "F64"]),
        ({"second": numbers(NAN)}, ["'second'", "not finite"]),
        ({"second": numbers(INF)}, ["'second'", "not finite"]),
        ({"second": numbers(-INF)}, ["'second'", "not finite"]),
    ],
)
def test_a_checkpoint_unlike_the_others_is_named(tmp_path, changed, parts, method):
    base, checkpoints = walk(3, shapes=SMALL)
    checkpoints[1] = spoiled(checkpoints[1], **changed)
    origin, paths = written(tmp_path, base, checkpoints)
    refused(paths, tmp_path / "out", "checkpoint-1", *parts, base=origin, method=method)
    refused(paths, tmp_path / "out", "'", base=origin, method=method, engine="numpy", threads=1)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_number_that_is_not_finite_is_found_in_every_type_and_piece(tmp_path, value):
    for dtype in DTYPES.values():
        base, checkpoints = walk(2, shapes=PIECES, dtype=dtype)
        checkpoints[1]["large"][-1, -1] = value
        origin, paths = written(tmp_path / str(dtype), base, checkpoints)
        refused(paths, tmp_path / "out", "'large'", "checkpoint-1", base=origin)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("method", ["dare-ties", "dare-linear"])
@pytest.mark.parametrize("engine", ["numba", "numpy"])
def test_what_is_not_finite_is_found_where_nothing_is_dropped(
    tmp_path, three, method, engine, value
):
    origin, paths = three
    bad = save(tmp_path / "bad", spoiled(load(paths[1]), second=numbers(value)))
    given = {"base": origin, "method": method, "density": 1.0, "engine": engine}
    refused([paths[0], bad], tmp_path / "out", "'second'", "bad", "not finite", **given)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_base_that_is_not_finite_is_refused(tmp_path, value):
    base, checkpoints = walk(3, shapes=SMALL)
    origin, paths = written(tmp_path, spoiled(base, second=numbers(value)), checkpoints)
    refused(paths, tmp_path / "out", "'second'", "base", "not finite", base=origin)


def test_tensors_of_integers_are_refused(tmp_path):
    steps = {"steps": torch.arange(4)}
    paths = [save(tmp_path / name, steps | {"x": torch.ones(2)}) for name in ("a", "b")]
    refused(paths, tmp_path / "out", "'steps'", "I64", paths[0], method="linear")


def test_a_base_of_another_model_is_refused(tmp_path, three):
    _, paths = three
    other = save(tmp_path / "other", {"else": torch.ones(2)})
    refused(paths, tmp_path / "out", "other", "no tensor", base=other)
    shape = save(tmp_path / "shape", spoiled(load(paths[0]), third=torch.ones(17)))
    refused(paths, tmp_path / "out", "'third'", "[17]", "shape", base=shape)
    integers = save(tmp_path / "integers", spoiled(load(paths[0]), third=torch.ones(16).int()))
    refused(paths, tmp_path / "out", "'third'", "I32", base=integers)


@pytest.mark.parametrize("count", [0, 1])
def test_a_merge_takes_two(tmp_path, three, count):
    origin, paths = three
    refused(paths[:count], tmp_path / "out", f"given {count}", base=origin)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"density": 0}, ["density 0", "(0, 1]"]),
        ({"density": -0.1}, ["density -0.1"]),
        ({"density": 1.1}, ["density 1.1"]),
        ({"density": NAN}, ["density nan"]),
        ({"method": "linear", "density": 0.5}, ["linear has no density"]),
        ({"method": "tiess"}, ["'tiess'", "expected one of", "ties"]),
        ({"method": "slerp"}, ["slerp takes 2", "given 3"]),
        ({"weights": [1, 2]}, ["3 checkpoints, but 2 weights"]),
        ({"weights": [1, 2, 3, 4]}, ["3 checkpoints, but 4 weights"]),
        ({"weights": []}, ["3 checkpoints, but 0 weights"]),
        ({"weights": [1, -1, 1]}, ["weights", "-1.0"]),
        ({"weights": [1, NAN, 1]}, ["weights", "nan"]),
        ({"weights": [1, INF, 1]}, ["weights", "inf"]),
        ({"weights": [0, 0, 0]}, ["weights", "not all 0"]),
        ({"weights": "mean"}, ["'mean'", "sma, ema"]),
        ({"weights": "ema", "alpha": 0}, ["alpha 0"]),
        ({"weights": "ema", "alpha": 1.5}, ["alpha 1.5"]),
        ({"alpha": 0.9}, ["alpha 0.9", "for weights ema"]),
        ({"weights": [1, 2, 3], "alpha": 0.9}, ["alpha 0.9", "for weights ema"]),
        ({"method": "linear", "keep_thresholds": True}, ["ties of full models only"]),
        ({"method": "dare-ties", "keep_thresholds": True}, ["ties of full models only"]),
        ({"max_lost": 0.5}, ["form dense has no max_lost"]),
        ({"lam": NAN}, ["lambda nan"]),
        ({"lam": INF}, ["lambda inf"]),
        ({"lam": 1e39}, ["lambda 1e+39"]),
        ({"method": "linear", "lam": 0.5}, ["linear has no lambda"]),
        ({"method": "task-arithmetic", "compat": "peft"}, ["compat peft is for ties"]),
        ({"compat": "mergekit"}, ["compat 'mergekit'"]),
        ({"form": "adapter"}, ["full model", "'adapter'"]),
        ({"form": "tight"}, ["'tight'"]),
        ({"rank": 8}, ["full model", "rank"]),
        ({"dtype": "int8"}, ["dtype 'int8'", "float32, bfloat16, float16"]),
        ({"threads": 0}, ["threads 0"]),
        ({"shard_bytes": 0}, ["shard size 0"]),
        ({"seed": -1}, ["seed -1"]),
        ({"method": "dare-ties", "seed": -1}, ["seed -1"]),
        ({"max_lost": NAN}, ["max_lost nan"]),
        ({"engine": "cuda"}, ["'cuda'", "numba"]),
        ({"base": None}, ["give the base"]),
        ({"base": None, "method": "task-arithmetic"}, ["give the base"]),
        ({"base": None, "method": "dare-ties"}, ["give the base"]),
        ({"base": "nowhere"}, ["nowhere does not exist"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, three, options, parts):
    origin, paths = three
    refused(paths, tmp_path / "out", *parts, **{"base": origin, **options})


def test_damaged_files_are_refused(tmp_path, three):
    origin, paths = three
    file = paths[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(paths, tmp_path / "out", file, "damaged", base=origin)
    refused([paths[0], tmp_path / "gone"], tmp_path / "out", tmp_path / "gone", base=origin)


def test_a_folder_in_use_is_not_overwritten(tmp_path, three):
    origin, paths = three
    refused(paths, paths[0], "exists already", base=origin)
    refused(paths, paths[0], "exists already", base=origin, dry_run=True)
    refused(paths, origin / "model.safetensors", "exists already", base=origin)


def test_an_adapter_is_not_mixed_with_full_models(tmp_path, three):
    origin, paths = three
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused([*paths, adapter], tmp_path / "out", adapter, "is an adapter", paths[0], base=origin)
    refused(paths, tmp_path / "out", adapter, "full model", base=adapter)


def test_a_merge_that_fails_leaves_no_file_open(tmp_path):
    base, checkpoints = walk(2, shapes=SMALL)
    checkpoints[1] = spoiled(checkpoints[1], second=numbers(NAN))
    origin, paths = written(tmp_path, base, checkpoints)
    before = os.listdir("/proc/self/fd")
    refused(paths, tmp_path / "out", base=origin)
    refused(paths, tmp_path / "out", base=origin, dtype="int8")
    assert len(os.listdir("/proc/self/fd")) == len(before)


# -- disk, memory, signals -------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path, three, monkeypatch):
    origin, paths = three
    before = snapshot(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space")

    for call in ("posix_fallocate", "pwrite", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match=r"no room|no space") as caught:
                merge(paths, tmp_path / "out", base=origin)
        assert caught.value.errno == errno.ENOSPC
        assert snapshot(tmp_path) == before


def test_an_error_of_the_callers_own_stops_the_merge(tmp_path, three):
    origin, paths = three
    before = snapshot(tmp_path)
    for error in (KeyboardInterrupt, ZeroDivisionError):

        def progress(done, total, error=error):
            raise error

        with pytest.raises(error):
            merge(paths, tmp_path / "out", base=origin, progress=progress)
        assert snapshot(tmp_path) == before


MEMORY = """
import sys, threading
from pathlib import Path
from gtr_turbo.merging import merge

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def grown(size, method):
    folder = Path(sys.argv[1]) / size
    most, done = [anonymous()], threading.Event()
    def watch():
        while not done.wait(0.002):
            most.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    first = most[0]
    report = merge([folder / f"checkpoint-{k}" for k in range(3)], folder / method,
                   base=folder / "base", method=method, threads=1)
    done.set()
    watcher.join()
    return max(most) - first, report.plan.memory_bytes

for method in ("ties", "linear"):
    grown("tiny", method)  # loads the compiled code
    print(*grown("small", method), *grown("large", method))
"""


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    for name, size in (("tiny", 1 << 10), ("small", 1 << 20), ("large", 1 << 24)):
        rng = np.random.default_rng(0)
        at = rng.random(size, np.float32)
        tensors = [{"x": torch.from_numpy(at * (1 + 0.01 * k))} for k in range(4)]
        written(tmp_path / name, tensors[0], tensors[1:])
    out = python(MEMORY, tmp_path)
    for line in out.splitlines():
        small, _, large, told = (int(n) for n in line.split())
        assert large < 40 << 20
        assert large - small < 16 << 20  # the tensor has 64 MiB
        assert large < told + (4 << 20)


def python(script, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    return done.stdout


KILLED = """
import os, signal, sys
from pathlib import Path
from gtr_turbo.merging import merge

def progress(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

folder = Path(sys.argv[1])
merge([folder / f"checkpoint-{k}" for k in range(3)], folder / "out", base=folder / "base",
      threads=1, progress=progress)
"""


def test_a_killed_merge_leaves_no_result_and_the_next_one_cleans_up(tmp_path, three):
    origin, paths = three
    before = snapshot(origin, *paths)
    python(KILLED, tmp_path, code=-signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    (partial,) = tmp_path.glob(".out.partial-*")
    assert (partial / "model.safetensors").exists()
    assert snapshot(origin, *paths) == before
    merge(paths, tmp_path / "out", base=origin)
    names = ["base", "checkpoint-0", "checkpoint-1", "checkpoint-2", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    merge(paths, tmp_path / "other", base=origin)
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_told_to_stop_leaves_nothing(tmp_path, number):
    size = 1 << 18
    rng = np.random.default_rng(0)
    base = {f"t{i}": torch.from_numpy(rng.random(size, np.float32)) for i in range(24)}
    checkpoints = [{n: t * (1 + 0.01 * k) for n, t in base.items()} for k in range(1, 4)]
    origin, paths = written(tmp_path, base, checkpoints)
    before = snapshot(tmp_path)
    arguments = ["merge", *paths, "--out", tmp_path / "out", "--base", origin, "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "gtr_turbo", *map(str, arguments)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's & ignores it
    ) as process:
        limit = time.monotonic() + 60
        while not list(tmp_path.glob(".out.partial-*/model.safetensors")):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.001)
        process.send_signal(number)
        error = process.stderr.read().decode()
        assert process.wait(60) == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert snapshot(tmp_path) == before
