import errno
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from files import SMALL, assert_same, expected, load, save, snapshot, walk, weight_bytes, written
from rich.console import Console
from safetensors.torch import save_file

from gtr_turbo import doctor, merging
from gtr_turbo.cli import main
from gtr_turbo.merging import merge
from gtr_turbo.terminal import MergeView, show_merge


@pytest.fixture(autouse=True)
def _signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def files(tmp_path):
    """(tensors of the base, those of three checkpoints, their paths as the command takes them)."""
    base, checkpoints = walk(3, shapes=SMALL)
    origin, paths = written(tmp_path, base, checkpoints)
    return base, checkpoints, [str(path) for path in paths], ["--base", str(origin)]


@pytest.fixture
def adapters(tmp_path):
    """Two adapters of rank 2 of one layer, and the arguments that name their base."""
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"adapter-{k}" for k in range(2)]
    for path in paths:
        path.mkdir()
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "b"}
        (path / "adapter_config.json").write_text(json.dumps(config))
        shapes = {"lora_A": (2, 12), "lora_B": (9, 2)}
        tensors = {
            f"base_model.model.layer.{name}.weight": torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }
        save_file(tensors, path / "adapter_model.safetensors")
    base = save(tmp_path / "origin", {"layer.weight": torch.ones(9, 12), "bias": torch.ones(9)})
    return [str(path) for path in paths], ["--base", str(base)]


def fails(capsys, arguments, *parts, code=2):
    """The command ends with `code`, and says one line that holds all `parts`."""
    assert main(["merge", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("gtr-turbo: ")
    assert shown.err.count("\n") == 1
    for part in parts:
        assert part in shown.err


def test_the_command_merges(files, tmp_path, capsys):
    base, checkpoints, paths, origin = files
    out = tmp_path / "out"
    assert main(["merge", *paths, *origin, "--out", str(out)]) == 0
    assert_same(load(out), expected(base, checkpoints, density=0.8))
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "merged" in shown.out
    assert "ties, density 0.8" in shown.out
    assert "3, of which 3 merged" in shown.out


def test_every_option_reaches_the_merge(files, tmp_path, capsys):
    base, checkpoints, paths, origin = files
    options = ["--method", "ties", "--weights", "1,2,3", "--density", "0.5", "--lambda", "0.25"]
    options += ["--compat", "peft", "--dtype", "bfloat16", "--seed", "3", "--threads", "1"]
    out = tmp_path / "out"
    shards = ["--shard-gb", "0.0000005"]  # 536 bytes
    assert main(["merge", *paths, *origin, "--out", str(out), *options, *shards]) == 0
    recipe = {"weights": (1.0, 2.0, 3.0), "density": 0.5, "compat": "peft", "lam": 0.25}
    assert_same(load(out), expected(base, checkpoints, dtype=torch.bfloat16, **recipe))
    assert len(list(out.glob("*.safetensors"))) == 3
    told = json.loads((out / "merged-from.json").read_text())["settings"]
    assert (told["seed"], told["lambda"], told["compat"]) == (3, 0.25, "peft")
    assert "as PEFT defines it" in capsys.readouterr().out


def test_ema_has_its_alpha(files, tmp_path):
    base, checkpoints, paths, origin = files
    options = ["--weights", "ema", "--alpha", "0.2", "--method", "linear"]
    assert main(["merge", *paths, *origin, "--out", str(tmp_path / "out"), *options]) == 0
    wanted = expected(base, checkpoints, method="linear", weights=(0.64, 0.16, 0.2))
    for name, tensor in load(tmp_path / "out").items():
        torch.testing.assert_close(tensor, wanted[name])


def test_json_is_one_object(files, tmp_path, capsys):
    _, _, paths, origin = files
    assert main(["merge", *paths, *origin, "--out", str(tmp_path / "out"), "--json"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.count("\n") == 1
    told = json.loads(shown.out)
    assert told["seconds"] > 0
    assert told["settings"]["method"] == "ties"
    assert told["settings"]["density"] == 0.8
    assert told["plan"]["inputs"] == paths
    kept = json.loads((tmp_path / "out" / "merged-from.json").read_text())
    assert told["tensors"] == kept["tensors"]
    assert told["checkpoints"] == kept["checkpoints"]
    assert told["warnings"] == []


def test_a_dry_run_writes_nothing_and_prints_the_plan(files, tmp_path, capsys):
    _, _, paths, origin = files
    before = snapshot(tmp_path)
    arguments = ["merge", *paths, *origin, "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "plan (nothing was written)" in shown
    assert re.search(r"writes\D+0\.0 MiB", shown)
    assert re.search(r"memory\D+at most \d+ MiB", shown)
    assert all(path in unfolded(shown) for path in paths)
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    numbers = 24 * 16 + 40 * 8 + 16
    assert told["plan"]["disk_bytes"] == numbers * 4
    assert told["plan"]["read_bytes"] == 4 * numbers * 4
    assert told["plan"]["memory_bytes"] > 0
    assert snapshot(tmp_path) == before


def unfolded(table):
    """What a table shows, long words in one piece again."""
    return re.sub(r"[│\s]", "", table)


def test_a_dry_run_finds_wrong_input(files, tmp_path, capsys):
    _, _, paths, _ = files
    fails(capsys, [*paths, "--out", str(tmp_path / "out"), "--dry-run"], "give the base")


def test_kept_thresholds_are_told(files, tmp_path, capsys):
    _, _, paths, origin = files
    out = str(tmp_path / "out")
    assert main(["merge", *paths, *origin, "--out", out, "--keep-thresholds"]) == 0
    assert "known" not in capsys.readouterr().out
    assert main(["merge", *paths, *origin, "--out", f"{out}-2"]) == 0
    assert "known for 3 of 3 checkpoints" in capsys.readouterr().out
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "out-2")


def test_warnings_are_shown(tmp_path, capsys):
    base, checkpoints = walk(2, shapes=SMALL, dtype=torch.bfloat16, step=1e-4)
    origin, paths = written(tmp_path, base, checkpoints)
    arguments = ["merge", *map(str, paths), "--base", str(origin), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: in 3 of 3 tensors more changes are exactly zero" in shown


def test_adapters_are_merged_to_every_form(adapters, tmp_path, capsys):
    paths, base = adapters
    forms = {
        "dense": base,
        "adapter": ["--form", "adapter", "--rank", "3", "--max-lost", "0.9"],
        "cat": ["--form", "cat", "--method", "linear"],
        "factors": ["--form", "factors"],
    }
    for form, options in forms.items():
        out = tmp_path / form
        assert main(["merge", *paths, *options, "--out", str(out)]) == 0
        shown = capsys.readouterr().out
        assert f"(lora,{form}" in unfolded(shown)
        assert (out / "adapter_model.safetensors").exists() == (form != "dense")
        assert ("squared norm lost" in shown) == (form in ("adapter", "cat"))
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 3


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--density", "1.5"], ["density 1.5", "(0, 1]"]),
        (["--method", "tiess"], ["'tiess'", "expected one of"]),
        (["--method", "slerp"], ["slerp takes 2 checkpoints, given 3"]),
        (["--weights", "1,2"], ["3 checkpoints, but 2 weights"]),
        (["--weights", "1,-2,1"], ["-2.0"]),
        (["--lambda", "nan"], ["lambda nan"]),
        (["--alpha", "0.9"], ["alpha 0.9", "for weights ema"]),
        (["--keep-thresholds", "--method", "linear"], ["ties of full models only"]),
        (["--max-lost", "0.5"], ["form dense has no max_lost"]),
        (["--form", "adapter"], ["full model"]),
        (["--rank", "4"], ["full model"]),
        (["--threads", "0"], ["threads 0"]),
        (["--shard-gb", "0"], ["shard size 0"]),
        (["--shard-gb", "-1"], ["shard size"]),
        (["--shard-gb", "nan"], ["shard"]),
        (["--shard-gb", "inf"], ["shard"]),
        (["--base", "nowhere"], ["nowhere does not exist"]),
        (["--unknown"], ["unknown argument '--unknown'"]),
    ],
)
def test_wrong_input_is_one_line_and_code_2(files, tmp_path, capsys, options, parts):
    _, _, paths, origin = files
    before = snapshot(tmp_path)
    fails(capsys, [*paths, *origin, "--out", str(tmp_path / "out"), *options], *parts)
    assert snapshot(tmp_path) == before


def test_a_damaged_file_is_one_line_and_code_2(files, tmp_path, capsys):
    _, _, paths, origin = files
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    fails(capsys, [*paths, *origin, "--out", str(tmp_path / "out")], str(file), "cut short")


def test_an_existing_folder_is_not_overwritten(files, tmp_path, capsys):
    _, _, paths, origin = files
    before = snapshot(tmp_path)
    fails(capsys, [*paths, *origin, "--out", paths[0]], "checkpoint-0 exists already")
    assert snapshot(tmp_path) == before


def test_a_full_disk_is_one_line_and_code_1(files, tmp_path, capsys, monkeypatch):
    _, _, paths, origin = files
    before = snapshot(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    arguments = [*paths, *origin, "--out", str(tmp_path / "out")]
    fails(capsys, arguments, "no room", str(tmp_path), code=1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--weights", "foo"], ["--weights", "'foo'", "sma, ema, or numbers"]),
        (["--weights", "1,,2"], ["--weights", "'1,,2'"]),
        (["--density", "half"], ["--density", "'half'"]),
        (["--form", "sparse"], ["--form", "'sparse'"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
        (["--compat", "mergekit"], ["--compat", "'mergekit'"]),
    ],
)
def test_an_option_that_cannot_be_read_is_an_error_of_usage(files, capsys, options, parts):
    _, _, paths, origin = files
    with pytest.raises(SystemExit) as caught:
        main(["merge", *paths, *origin, "--out", "out", *options])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    for part in parts:
        assert part in error


@pytest.mark.parametrize("arguments", [["merge"], ["merge", "a", "b"], ["merge", "--out", "x"]])
def test_checkpoints_and_out_must_be_given(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "required" in capsys.readouterr().err


# -- help, imports, the terminal -------------------------------------------------------------------


def test_help_lists_the_command_and_its_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "Merge checkpoints, full or LoRA, in bounded memory." in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["merge", "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--out", "--base", "--method", "--weights", "--density", "--form", "--rank"):
        assert option in shown


IMPORTS = """
import sys
import gtr_turbo.merging
assert "torch" not in sys.modules, "by import gtr_turbo.merging"
from gtr_turbo.cli import main
code = main(["merge", *sys.argv[1:]])
heavy = {"torch", "transformers", "peft"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_merging_imports_no_torch(files, adapters, tmp_path):
    _, _, paths, origin = files
    lora, base = adapters
    for code, arguments in (
        (0, [*paths, *origin, "--out", tmp_path / "full"]),
        (0, [*lora, *base, "--out", tmp_path / "lora"]),
        (2, [*paths, "--out", tmp_path / "wrong"]),
    ):
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr


def terminal(width=100):
    return Console(force_terminal=True, width=width, record=True, file=io.StringIO())


def test_a_bar_shows_how_far_the_merge_is(files, tmp_path):
    _, _, paths, origin = files
    console = terminal()
    with MergeView(console) as view:
        merge(paths, tmp_path / "out", base=origin[1], progress=view.progress)
    shown = console.export_text()
    assert "merging" in shown
    assert "11.2/11.2 KiB" in shown  # 4 files of 720 numbers


def test_a_quiet_view_shows_nothing(files, tmp_path):
    _, _, paths, origin = files
    console = terminal()
    with MergeView(console, quiet=True) as view:
        merge(paths, tmp_path / "out", base=origin[1], progress=view.progress)
    assert console.export_text() == ""


def test_names_with_brackets_are_shown_as_they_are(tmp_path):
    base, checkpoints = walk(2, shapes=SMALL)
    origin, paths = written(tmp_path / "a[bold]b", base, checkpoints)
    report = merge(paths, tmp_path / "[red]out", base=origin, dry_run=True)
    console = terminal(300)
    show_merge(console, report)
    shown = console.export_text()
    for path in (*paths, origin, tmp_path / "[red]out"):
        assert str(path) in shown


def test_weights_are_shown_beside_their_checkpoints(files, tmp_path):
    _, _, paths, origin = files
    options = {"weights": np.array([1.0, 2.5, 0.125]), "lam": 2.0, "dry_run": True}
    console = terminal(300)
    show_merge(console, merge(paths, tmp_path / "out", base=origin[1], **options))
    shown = console.export_text()
    assert "lambda 2.0" in shown
    for weight, path in zip(("1", "2.5", "0.125"), paths, strict=True):
        assert f"{weight} x {path}" in shown


@pytest.mark.parametrize("broken", [False, True])
def test_the_doctor_says_whether_the_kernels_compile(monkeypatch, broken):
    """A numba that does not fit numpy is found, and by the doctor; every run merges."""
    for name in ("_devices", "_disk", "_environments", "_starter"):
        monkeypatch.setattr(doctor, name, list)
    if broken:
        monkeypatch.delattr(merging, "kernels", raising=False)
        monkeypatch.setitem(sys.modules, "gtr_turbo.merging.kernels", None)
    found = {finding.what: finding for finding in doctor.examine()}
    assert "numba" in found
    assert found["merging"].ok is not broken
    assert ("ModuleNotFoundError" in found["merging"].detail) is broken
