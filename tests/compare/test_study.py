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
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.getsignal(number)) for number in numbers]
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
    made, again = tmp_path / "made", tmp_path / "again"
    a_run(made / "guidance=kl" / "seed0", 0)
    a_run(made / "guidance=kl" / "seed3", 3)
    a_run(made / "guidance=kl" / "seed1", 1)
    (made / "guidance=kl" / "seed1" / "summary.json").unlink()  # not finished
    study.keep("stress", made)
    a_run(again / "guidance=kl" / "seed3", 3)
    study.bring("stress", again)
    found = {str(path.relative_to(again)): path.read_text() for path in again.rglob("*.*")}
    assert found.pop("guidance=kl/seed3/run.lock") == "3 run.lock"  # what is there stays
    assert found == {
        f"guidance=kl/seed{seed}/{name}": f"{number} {name}"
        for seed, number in ((0, 0), (3, 3))
        for name in study.KEPT
    }


def test_another_run_than_the_kept_one_stops_everything_and_both_stay(study, tmp_path):
    out, kept = tmp_path / "out", tmp_path / "root" / study.RESULTS / "stress"
    for seed in (0, 1):
        a_run(kept / "guidance=kl" / f"seed{seed}", 1)
    a_run(out / "guidance=kl" / "seed1", 2)
    a_run(out / "guidance=none" / "seed0", 2)
    for call in (study.bring, study.keep):
        with pytest.raises(
            SystemExit, match=f"{out}/guidance=kl/seed1 and {kept}/guidance=kl/seed1$"
        ):
            call("stress", out)
    assert not (out / "guidance=kl" / "seed0").exists()
    assert (out / "guidance=kl" / "seed1" / "summary.json").read_text() == "2 summary.json"
    assert (kept / "guidance=kl" / "seed1" / "summary.json").read_text() == "1 summary.json"
    assert (kept / "guidance=none" / "seed0" / "summary.json").exists()  # nothing was kept there


def test_how_runs_came_about_is_kept_over_machines(study, tmp_path):
    kept = tmp_path / "root" / study.RESULTS / "beta" / study.ATTEMPTS
    first, second = tmp_path / "first", tmp_path / "second"
    for out, text in ((first, '{"call": 1}\n{"cut'), (second, '{"call": 2}\n')):
        out.mkdir()
        (out / study.ATTEMPTS).write_text(text)
    study.keep("beta", first)
    study.bring("beta", second)
    with open(second / study.ATTEMPTS, "a") as file:
        file.write('{"call": 3}\n')
    study.keep("beta", second)
    study.bring("beta", tmp_path / "third")
    lines = ['{"call": 1}', '{"cut', '{"call": 2}', '{"call": 3}']
    assert kept.read_text().splitlines() == lines
    assert (tmp_path / "third" / study.ATTEMPTS).read_text() == kept.read_text()
    study.bring("beta", first)
    assert (first / study.ATTEMPTS).read_text() == kept.read_text()


def test_the_runs_of_kl_serve_the_ablations_for_their_three_seeds(study, tmp_path):
    out, kept = tmp_path / "beta", tmp_path / "root" / study.RESULTS
    for seed in (0, 3):
        a_run(kept / "stress" / "guidance=kl" / f"seed{seed}", seed)
    a_run(kept / "beta" / study.UNCHANGED["beta"] / "seed0", 7)  # those of `stress` count
    study.bring("beta", out)
    runs = [path.relative_to(out) for path in out.glob("*/*")]
    assert list(map(str, runs)) == ["beta=20,center=true/seed0"]
    assert (out / runs[0] / "summary.json").read_text() == "0 summary.json"
    a_run(out / "beta=20,center=true" / "seed1", 1)
    a_run(out / "beta=1,center=true" / "seed0", 2)
    study.keep("beta", out)  # and only `stress` keeps them
    places = sorted(
        str(path.parent.relative_to(kept)) for path in kept.glob("beta/*/*/summary.json")
    )
    assert places == ["beta/beta=1,center=true/seed0", "beta/beta=20,center=true/seed0"]


def test_the_unchanged_variant_is_the_recipe_of_the_runs_that_serve_it(study):
    parser, plans = argparse.ArgumentParser(), {}
    parser.add_argument("--vary", action="append")
    parser.add_argument("--seeds")
    for name in ("stress", "points24", *study.UNCHANGED):
        recipe, *rest = study.STUDIES[name]
        own, rest = parser.parse_known_args(rest)
        over = read_overrides([part for part in rest if part])
        over.get("guidance", {}).pop("external", None)  # counts for no other kind
        plan = make_plan(
            config_file(recipe), over, vary=own.vary, seeds=own.seeds, jobs=1, threads=1, out=None
        )
        plans[name] = {variant.label: variant.config for variant in plan.variants}
    for name, label in study.UNCHANGED.items():
        of, variant, _ = study.THOSE_RUNS.get(name, "stress/guidance=kl/").split("/")
        assert plans[name][label] == plans[of][variant]
    never = plans["imitation"]["interval=1000"]  # the teacher stays the start
    assert never.num_updates < never.teacher.interval


def test_imitation_takes_the_runs_of_points24(study, tmp_path):
    out, kept = tmp_path / "imitation", tmp_path / "root" / study.RESULTS
    for seed in (0, 4):
        a_run(kept / "points24" / "guidance=sft" / f"seed{seed}", seed)
    study.bring("imitation", out)
    runs = sorted(str(path.relative_to(out)) for path in out.glob("*/*"))
    assert runs == ["interval=1/seed0", "interval=1/seed4"]


CHILD = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.6)  # longer than subprocess.run waits
    print("ended in order after", signal.Signals(number).name, flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGHUP, end)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_handed_on_and_waited_for(number):
    code = f"import sys; sys.path.insert(0, {str(STUDY.parent)!r}); import study; "
    code += f"sys.exit(study.run([sys.executable, '-c', {CHILD!r}]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        ),  # the tests may run under nohup
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
        said = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    assert (said, process.returncode) == (f"ended in order after {number.name}\n", 130)
