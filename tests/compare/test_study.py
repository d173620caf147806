"""benchmarks/study.py: what it copies, and how it ends; `compare` is a script here."""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gtr_turbo.compare import make_plan
from gtr_turbo.settings import config_file, read_overrides

STUDY = Path(__file__).parents[2] / "benchmarks" / "study.py"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script with another root; its command is a script that writes `compare.json`, or fails."""
    spec = importlib.util.spec_from_file_location("study", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    monkeypatch.setattr(sys, "argv", ["study.py", "ezpoints", "--folder", str(tmp_path)])
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield module
    for number, handler in before:
        signal.signal(number, handler)


def test_only_what_this_call_wrote_is_copied(study, tmp_path, monkeypatch):
    fake, out = tmp_path / "python", tmp_path / "ezpoints"
    fake.write_text(f"#!/bin/sh\necho new > {out}/compare.json\nexit $CODE\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    out.mkdir()
    for name in ("compare.json", "report.html"):
        (out / name).write_text("old\n")
        os.utime(out / name, (0, 0))
    monkeypatch.setenv("CODE", "1")
    assert study.main() == 1
    copied = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert [path.name for path in copied] == ["ezpoints.json"]
    assert copied[0].read_text() == "new\n"
    copied[0].unlink()
    fake.write_text("#!/bin/sh\nexit 2\n")
    assert study.main() == 2
    assert not copied[0].exists()


def a_run(folder, number):
    folder.mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "run.lock"):
        (folder / name).write_text(f"{number} {name}")


def test_finished_runs_are_kept_and_come_back_on_another_machine(study, tmp_path):
    made, kept, again = tmp_path / "made", tmp_path / "root" / study.RESULTS, tmp_path / "again"
    a_run(made / "guidance=kl" / "seed0", 0)
    a_run(made / "guidance=kl" / "seed3", 3)
    a_run(made / "guidance=kl" / "seed1", 1)
    (made / "guidance=kl" / "seed1" / "summary.json").unlink()  # not finished
    study.keep(made, kept / "stress")
    a_run(again / "guidance=kl" / "seed3", 33)
    study.bring("stress", again)
    found = {str(path.relative_to(again)): path.read_text() for path in again.rglob("*.*")}
    assert found.pop("guidance=kl/seed3/run.lock") == "33 run.lock"
    assert found == {
        f"guidance=kl/seed{seed}/{name}": f"{number} {name}"
        for seed, number in ((0, 0), (3, 33))  # what is there stays
        for name in study.KEPT
    }


def test_the_runs_of_kl_serve_the_ablations_for_their_three_seeds(study, tmp_path):
    for seed in (0, 3):
        a_run(tmp_path / "root" / study.RESULTS / "stress" / "guidance=kl" / f"seed{seed}", seed)
    study.bring("beta", tmp_path / "beta")
    runs = [path.relative_to(tmp_path / "beta") for path in (tmp_path / "beta").glob("*/*")]
    assert list(map(str, runs)) == ["beta=20,center=true/seed0"]


def test_the_unchanged_variant_of_each_ablation_is_the_recipe_of_kl(study):
    parser, plans = argparse.ArgumentParser(), {}
    parser.add_argument("--vary", action="append")
    parser.add_argument("--seeds")
    for name in ("stress", *study.UNCHANGED):
        recipe, *rest = study.STUDIES[name]
        own, rest = parser.parse_known_args(rest)
        over = read_overrides([part for part in rest if part])
        over.pop("guidance", None)  # of `external` alone
        plan = make_plan(
            config_file(recipe), over, vary=own.vary, seeds=own.seeds, jobs=1, threads=1, out=None
        )
        plans[name] = {variant.label: variant.config for variant in plan.variants}
    for name, label in study.UNCHANGED.items():
        assert plans[name][label] == plans["stress"]["guidance=kl"]


CHILD = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.6)  # longer than subprocess.run waits
    print("ended in order after", signal.Signals(number).name, flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_and_waited_for(number):
    code = f"import sys; sys.path.insert(0, {str(STUDY.parent)!r}); import study; "
    code += f"sys.exit(study.run([sys.executable, '-c', {CHILD!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
        said = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    assert (said, process.returncode) == (f"ended in order after {number.name}\n", 130)
