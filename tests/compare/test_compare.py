"""The command itself: real runs in processes of their own, and tables from runs made by hand."""

import csv
import fcntl
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from made_runs import finished

from gtr_turbo.cli import main

SMALL = {
    "model": {"attention": "eager"},
    "env": {"num_envs": 2, "options": {"prompt": "compact"}},
    "sampling": {"max_new_tokens": 4},
    "rollout": {"turns_per_env": 2},
    "ppo": {"minibatch_turns": 4, "microbatch_turns": 4, "epochs": 1},
    "eval": {"episodes": 2},
    "save": {"interval": 1, "trajectories": 1},
    "env_steps": 4,
}
VARY = ["--vary", "guidance=none,kl"]


@pytest.fixture(autouse=True)
def _signals():
    before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGHUP)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def small(tiny, tmp_path):
    """A config file for a run of one update."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "model": {**SMALL["model"], "path": str(tiny)}}))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_failed_run_does_not_lose_the_others(capsys, small, tiny, tmp_path):
    out = tmp_path / "out"
    command = ["compare", str(small), "--vary", f"model.path=./nowhere,{tiny}", "--seeds", "3,"]
    command += ["--out", str(out), "--threads", "1"]
    assert main([*command, "--dry-run"]) == 0
    assert not out.exists()
    assert main(command) == 1
    shown = capsys.readouterr().out
    call, start = lines(out / "attempts.jsonl")[:2]
    failed = start["run"].split("/")[0]
    assert (call["event"], call["runs"], call["jobs"], call["threads"]) == ("call", 2, 1, 1)
    assert (
        f"[1/2] {failed}, seed 3: failed: exit code 2: gtr-turbo: model.path='./nowhere'" in shown
    )
    assert f"missing: {failed}, seed 3: exit code 2: gtr-turbo: model.path='./nowhere'" in shown
    assert "1 of 2 runs" in shown
    made = json.loads((out / "compare.json").read_text())
    bad, good = made["variants"]
    assert (bad["planned"], bad["finished"], bad["estimates"]) == (1, 0, {})
    assert good["finished"] == 1
    assert good["estimates"]["after/None/student"]["mean"] == 0.0  # random weights write no JSON
    (row,) = lines(out / good["label"] / "seed3" / "metrics.jsonl")
    assert good["estimates"]["cost/cpu_seconds"]["mean"] == row["system/cpu_seconds"] > 0
    assert good["config"]["threads"] == 1
    assert (out / "report.html").exists()
    run = out / good["label"] / "seed3"
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3
    assert "evaluating student before" in (run.parent / "seed3.log").read_text()
    # what is finished is taken as it is: nothing starts, and why the other failed is not forgotten
    capsys.readouterr()
    assert main([*command, "--only-summary", "--jobs", "7"]) == 0
    assert len(lines(out / "attempts.jsonl")) == 5
    told = f"missing: {failed}, seed 3: did not finish: gtr-turbo: model.path='./nowhere'"
    assert told in capsys.readouterr().out
    again = json.loads((out / "compare.json").read_text())
    assert not {"jobs", "threads", "machine", "versions"} & set(again)
    assert [one["jobs"] for one in again["calls"]] == [1]
    assert again["calls"][0]["versions"]["torch"]


def test_an_interrupted_comparison_stops_its_runs_and_goes_on_where_they_were(
    capsys, small, tmp_path
):
    out = tmp_path / "out"
    command = ["compare", str(small), "--vary", "guidance=none", "--seeds", "1", "--out", str(out)]
    command += ["--threads", "1", "--env_steps", "80", "--eval.episodes", "0"]
    run = out / "guidance=none" / "seed0"
    process = subprocess.Popen(
        [sys.executable, "-m", "gtr_turbo", *command],
        stderr=subprocess.PIPE,
        text=True,
        # a shell's background jobs, and these tests in one, ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for _ in range(600):
            if any(path.name >= "000002" for path in (run / "checkpoints").glob("0*")):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted (Ctrl-C)." in error
    assert "Go on with the same command" in error
    _, start, end = lines(out / "attempts.jsonl")
    assert (start["event"], start["how"]) == ("start", "new")
    assert (end["event"], end["code"]) == (
        "end",
        130,
    )  # it was seen to end: nothing is left running
    assert not (run / "summary.json").exists()
    capsys.readouterr()
    assert main([*command, "--trackers", "[]", "--save.keep", "3"]) == 0
    assert "goes on after update" in capsys.readouterr().out
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["trackers"], config["save"]["keep"]) == ([], 3)
    assert len(list((run / "checkpoints").glob("0*"))) == 3
    assert [row["update"] for row in lines(run / "metrics.jsonl")] == list(range(1, 21))
    events = lines(out / "attempts.jsonl")
    hows = [line.get("how") for line in events if line["event"] != "call"]
    assert hows == ["new", None, "unfinished", None]
    # a run that was made longer, but did not get there: its summary is of the shorter one
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"env_steps": 84}))
    command[command.index("80")] = "84"
    assert main([*command, "--dry-run"]) == 0
    assert "goes on after update 20" in capsys.readouterr().out


def test_a_killed_run_says_so(capsys, monkeypatch, tmp_path):
    """A run that the system kills, such as for its memory."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho half way on $OMP_NUM_THREADS\nkill -9 $$\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    out = tmp_path / "out"
    command = ["compare", "ezpoints", "--seeds", "2", "--threads", "3", "--out", str(out)]
    assert main([*command, "--jobs", "2"]) == 1
    shown = capsys.readouterr().out
    for seed in (0, 1):
        assert f"missing: base, seed {seed}: killed by SIGKILL: half way on 3" in shown
    assert "0 of 2 runs" in shown
    assert json.loads((out / "compare.json").read_text())["variants"][0]["finished"] == 0
    assert main([*command, "--jobs", "1"]) == 1
    events = [line["event"] for line in lines(out / "attempts.jsonl")]
    both = ["call", "start", "start", "end", "end"]
    assert events == [*both, "call", "start", "end", "start", "end"]
    log = out / "base" / "seed0.log"
    assert log.read_text() == "half way on 3\n" * 2  # what was printed before is kept


def test_a_folder_in_use_is_left_alone(capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / "compare.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["compare", "ezpoints", "--seeds", "1", "--out", str(out)]) == 2
        assert "is in use by another compare" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["compare.lock"]


def test_no_path_of_this_machine_is_written_down(capsys, made, monkeypatch, tmp_path):
    fake, home = tmp_path / "python", tmp_path / "home"
    fake.write_text(
        '#!/bin/sh\necho "bad: $OUT/x, $PWD/y, $HOME/z and $HOME-made $OUT $OUT $OUT $OUT"\nexit 1\n'
    )
    fake.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OUT", str(made))
    monkeypatch.chdir(work)
    arguments = ["compare", "ezpoints", *VARY, "--seeds", "4", "--out", str(made)]
    assert main([*arguments, "--episodes", "0"]) == 1
    why = f"exit code 1: bad: OUT/x, ./y, ~/z and {home}-made OUT OUT OUT OUT"
    found = json.loads((made / "compare.json").read_text())
    assert [run["why"] for run in found["runs"] if not run["finished"]] == [why, why]
    for name in ("compare.json", "compare.csv", "report.html"):
        text = (made / name).read_text()
        assert str(made) not in text, name
        assert str(work) not in text, name
        assert "bad: OUT/x" in text, name


# from runs made by hand


@pytest.fixture
def made(tmp_path):
    """3 seeds without guidance at 0.4, 0.5, 0.6; with it 0.1, 0.1 and 0.4 higher; 1 seed is missing."""
    out = tmp_path / "made"
    for seed, (low, gap) in enumerate(((0.4, 0.1), (0.5, 0.1), (0.6, 0.4))):
        for kind, after in (("none", low), ("kl", low + gap)):
            finished(
                out / f"guidance={kind}" / f"seed{seed}",
                seed=seed,
                over={"guidance": {"kind": kind}},
                after=after,
                merge_after=after + 0.05,
                curve=(0.0, 0.2, 0.4, after, after, after),
            )
    return out


def test_threads_are_those_that_the_process_may_use(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    command = ["compare", "ezpoints", *VARY, "--jobs", "2", "--out", str(tmp_path), "--dry-run"]
    assert main(command) == 0
    assert "2 at once on 3 threads each" in " ".join(capsys.readouterr().out.split())


def summarise(out, *more, code=0):
    arguments = ["compare", "ezpoints", *VARY, "--seeds", "4", "--out", str(out), "--episodes", "0"]
    assert main([*arguments, "--only-summary", *more]) == code
    return json.loads((out / "compare.json").read_text())


def test_the_numbers_are_those_of_the_runs(made):
    found = summarise(made, "--target", "0.5")
    none, kl = found["variants"]
    assert (kl["label"], kl["planned"], kl["finished"]) == ("guidance=kl", 4, 3)
    assert none["estimates"]["after/held-out/student"]["mean"] == pytest.approx(0.5)
    assert none["differences"] == {}
    gap = kl["differences"]["after/held-out/student"]
    assert gap["mean"] == pytest.approx(0.2)
    assert (gap["pairs"], gap["above"], gap["below"]) == (3, 3, 0)
    page = (made / "report.html").read_text()
    assert re.search(r'"above": ?3, ?"below": ?0, ?"pairs": ?3', page)
    # gaps 0.1, 0.1, 0.4: deviation 0.1 sqrt(3), error 0.1, t(2) = 4.302653
    assert gap["t_interval"] == pytest.approx([0.2 - 0.4302653, 0.2 + 0.4302653])
    merge = kl["estimates"]["after/held-out/merge_minus_student"]
    assert (merge["mean"], merge["t_interval"]) == (pytest.approx(0.05), None)
    # seed 0 without guidance: (0 + 0.2) / 2 + 0.3 + 0.4 + 0.4 + 0.4 over 5 intervals of 256 steps
    assert found["runs"][0]["values"]["area/rollout/success"] == pytest.approx(1.6 / 5)
    # the mean of 3 updates reaches 0.5: without guidance (0.4, 0.5, 0.6) never, at 6, at 5
    assert (none["reached"], none["median_steps"]) == (2, 6 * 256)
    assert (kl["reached"], kl["median_steps"]) == (3, 5 * 256)
    assert found["runs"][3]["values"]["target/seconds"] == 50.0
    assert found["runs"][3]["values"]["cost/cpu_seconds"] == 90.0  # of the last row
    assert [run["why"] for run in found["runs"] if not run["finished"]] == ["not started"] * 2
    assert str(made) not in (made / "compare.json").read_text()


def test_a_row_a_run_is_in_the_csv(made):
    summarise(made)
    table = list(csv.DictReader((made / "compare.csv").read_text().splitlines()))
    assert len(table) == 8
    assert (table[1]["variant"], table[1]["guidance.kind"], table[1]["seed"]) == (
        "guidance=kl",
        "kl",
        "0",
    )
    assert float(table[1]["after/held-out/student"]) == 0.5
    assert (table[7]["finished"], table[7]["after/held-out/student"]) == ("false", "")


def test_the_table_fits_80_columns_and_marks_the_best(capsys, made, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    summarise(made, "--target", "0.5")
    text = capsys.readouterr().out
    assert "* 70.0 %" in text
    assert "-23.0 to +63.0" in text
    assert "3 of 4 runs" in text
    assert "reaching 50.0 % (success while training)" in text
    assert "missing: guidance=kl, seed 3: not started" in text
    table = text[: text.index("Mean over seeds")]
    assert all(len(line) <= 80 for line in table.splitlines())


def test_a_narrow_terminal_gets_more_tables_and_every_number(capsys, made, monkeypatch):
    found = {}
    for columns in ("300", "80", "50"):
        monkeypatch.setenv("COLUMNS", columns)
        summarise(made)
        text = capsys.readouterr().out
        table = text[: text.index("Mean over seeds")]
        assert max(map(len, table.splitlines())) <= int(columns)
        found[columns] = sorted(re.findall(r"[+-]?[\d.,]+ to [+-]?[\d.,]+", table))
    assert len(found["300"]) > 10
    assert found["300"] == found["80"] == found["50"]


def test_held_out_curves_are_used_where_they_were_logged(capsys, made):
    for number, path in enumerate(sorted(made.glob("*/seed*/metrics.jsonl"))):
        rows = lines(path)
        for row in rows[:6:2]:
            row["eval/student_success"], row["eval/teacher_success"] = 0.5, 0.6 + 0.01 * number
            row["external/dollars"] = 0.001 * row["env_steps"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = summarise(made, "--target", "0.5")
    kl = found["variants"][1]["estimates"]  # the first three of the paths
    assert kl["area/eval/teacher_success"]["mean"] == pytest.approx(0.61)
    assert kl["cost/dollars"]["mean"] == pytest.approx(
        1.28
    )  # the last row that has it: 5 * 256 steps
    lead = kl["area/eval/merge_minus_student"]
    assert lead["mean"] == pytest.approx(0.11)
    assert lead["t_interval"] == pytest.approx(
        [0.11 - 4.302653 * 0.01 / 3**0.5, 0.11 + 4.302653 * 0.01 / 3**0.5]
    )
    assert found["variants"][1]["median_steps"] == 256 * 5  # the third time it is measured
    assert "reaching 50.0 % (student, fixed deals)" in capsys.readouterr().out
    assert "(student, fixed deals). Of finished runs" in (made / "report.html").read_text()


@pytest.mark.parametrize("short", ["guidance=none", "guidance="])
def test_too_few_held_out_evaluations_leave_the_curve_of_training_to_judge_all(capsys, made, short):
    for path in sorted(made.glob("*/seed*/metrics.jsonl")):
        rows = lines(path)
        for row in rows[: 4 if path.parts[-3].startswith(short) else 6 : 2]:
            row["eval/student_success"] = 1.0
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    none, kl = summarise(made, "--target", "0.5")["variants"]
    assert (none["reached"], kl["reached"]) == (2, 3)
    assert "reaching 50.0 % (success while training)" in capsys.readouterr().out


def test_fewer_than_three_values_say_nothing_of_a_target(capsys, made):
    for path in made.glob("guidance=none/seed*/metrics.jsonl"):
        rows = lines(path)
        for row in rows[2:6]:
            del row["rollout/success"]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    none, kl = summarise(made, "--target", "0.5")["variants"]
    assert (none["finished"], none["judged"], none["reached"]) == (3, 0, None)
    assert (kl["judged"], kl["reached"]) == (3, 3)
    text = capsys.readouterr().out
    assert "fewer than 3 values of rollout/success logged in 3 of 6 runs" in text
    rows = re.findall(r"(\d of \d) +([\d,]+) *$", text, re.MULTILINE)
    assert rows == [("3 of 3", "1,280")]


def test_a_run_that_lost_rows_changes_no_curve_of_the_others(capsys, made):
    whole = summarise(made, "--target", "0.5")
    path = made / "guidance=kl" / "seed1" / "metrics.jsonl"
    text = path.read_text().splitlines()
    for kept in (text[:3], text[:2] + text[3:], text[1:]):
        path.write_text("\n".join(kept) + "\n")
        found = summarise(made, "--target", "0.5")
        note = "note: guidance=kl/seed1/metrics.jsonl lacks rows"
        assert note in capsys.readouterr().out
        (kl,) = (run for run in found["runs"] if run["folder"] == "guidance=kl/seed1")
        gone = {name for name in kl["values"] if name.startswith(("area/", "target/"))}
        assert not gone | {"cost/cpu_seconds"} & set(kl["values"])
        assert kl["values"]["after/held-out/student"] == 0.6
        for before, after in zip(whole["runs"], found["runs"], strict=True):
            assert after is kl or after["values"] == before["values"]
        assert (found["variants"][1]["judged"], found["variants"][1]["reached"]) == (2, 2)
        pairs = found["variants"][1]["differences"]["area/rollout/success"]["pairs"]
        assert pairs == 2


def test_a_curve_that_few_log_together_says_over_which_steps_its_mean_is(capsys, made):
    summarise(made)
    assert "only over environment steps" not in capsys.readouterr().out
    path = made / "guidance=kl" / "seed1" / "metrics.jsonl"
    rows = lines(path)
    for row in rows[2:6]:
        del row["rollout/success"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (note,) = summarise(made)["notes"]
    assert note.startswith(
        "success while training, mean over the run: only over environment steps 256 to 512, which all runs that "
        "log it have, of 256 to 1,536"
    )
    assert "environment steps 256 to 512" in " ".join(capsys.readouterr().out.split())
    for row in rows[:2]:
        row["rollout/success"] = row["env_steps"] = 0
    del rows[0]["rollout/success"], rows[1]["rollout/success"]
    rows[9]["rollout/success"] = 0.5
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = summarise(made)
    assert "there is none, as no environment steps are common" in found["notes"][0]
    assert not any("area/rollout/success" in run["values"] for run in found["runs"])


def test_the_table_says_on_how_many_pairs_a_difference_rests(capsys, made):
    for name in ("summary.json", "config.yaml", "metrics.jsonl"):
        (made / "guidance=none" / "seed2" / name).unlink()
    summarise(made)
    text = capsys.readouterr().out
    assert "+10.0, 2 pairs" in text  # of seeds 0 and 1; the row has seed 2 too
    assert "the same, 2 pairs" in text


def test_a_damaged_line_is_skipped_and_told(capsys, made):
    path = made / "guidance=kl" / "seed1" / "metrics.jsonl"
    text = path.read_text().splitlines()
    path.write_text("\n".join([text[0], text[1][:20], *text[2:], '{"update": 7']) + "\n")
    found = summarise(made)
    assert (
        "note: guidance=kl/seed1/metrics.jsonl: 2 damaged lines skipped" in capsys.readouterr().out
    )
    assert found["variants"][1]["finished"] == 3
    path.write_text("nothing of use\n")
    found = summarise(made)
    assert found["variants"][1]["finished"] == 2
    assert "none of them readable" in found["runs"][3]["why"]


def test_a_run_that_cannot_be_read_is_no_success_though_it_has_ended(capsys, made):
    (made / "guidance=kl" / "seed1" / "metrics.jsonl").write_text("nothing of use\n")
    arguments = ["compare", "ezpoints", *VARY, "--seeds", "3", "--out", str(made)]
    arguments += ["--episodes", "0"]
    assert main(arguments) == 1
    assert "missing: guidance=kl, seed 1: OUT/guidance=kl/seed1/met" in capsys.readouterr().out
    assert main([*arguments, "--only-summary"]) == 0, "it shows what is there"


def test_facts_of_the_replies_are_compared_too(capsys, made):
    for run in sorted(made.glob("guidance=*/seed*")):
        kind, seed = run.parent.name, int(run.name[-1])
        summary = json.loads((run / "summary.json").read_text())
        right = 0.5 + 0.1 * seed + (0.2 if kind == "guidance=kl" else 0.0)
        student = summary["evaluations"]["after/held-out/student"]
        student |= {"valid": 0.9, "facts": {"arithmetic": right, "odd": "\x1b[31m"}}
        (run / "summary.json").write_text(json.dumps(summary))
    none, kl = summarise(made)["variants"]
    name = "judge/after/held-out/student/arithmetic"
    assert none["estimates"][name]["mean"] == pytest.approx(0.6)
    assert kl["differences"][name]["mean"] == pytest.approx(0.2)
    assert kl["estimates"]["judge/after/held-out/student/valid"]["mean"] == pytest.approx(0.9)
    assert "judge/after/held-out/student/odd" not in kl["estimates"]  # no number
    text = capsys.readouterr().out
    assert "replies of the student after (held-out)" in text
    assert "80.0 %" in text
    assert "+20.0" in text


def test_damaged_files_cost_neither_the_table_nor_the_terminal(capsys, made):
    deep = b"[" * 100_000
    calls = [b'{"event": "call", "jobs": 1}', b"\xff\xfe", deep, b'{"event": "call", "jobs": 2}']
    (made / "attempts.jsonl").write_bytes(b"\n".join(calls))
    (made / "guidance=kl" / "seed0" / "summary.json").write_bytes(deep)
    path = made / "guidance=none" / "seed1" / "summary.json"
    nasty = path.read_text().replace("held-out", "\\u001b]0;title\\u0007\\u001b[31m\\u202e")
    path.write_text(nasty)
    found = summarise(made)
    assert [call["jobs"] for call in found["calls"]] == [1, 2]
    assert [variant["finished"] for variant in found["variants"]] == [3, 2]
    text = capsys.readouterr().out
    assert "title" in text
    evaluations = json.loads(path.read_text())
    for evaluation in evaluations["evaluations"].values():
        evaluation["facts"] = {"in[/b]": 0.5, "a/b": 0.5, "\x1b[31mred\u202e": 0.5}
    path.write_text(json.dumps(evaluations))
    summarise(made)
    text += capsys.readouterr().out
    assert "in[/b]" in text
    assert "a/b" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_a_folder_of_another_config_stops_everything(capsys, made):
    finished(made / "guidance=kl" / "seed3", seed=3, over={"ppo": {"clip": 0.1}})
    arguments = ["compare", "ezpoints", *VARY, "--seeds", "4", "--out", str(made)]
    for more in ([], ["--only-summary"], ["--dry-run"]):
        assert main([*arguments, *more]) == 2
        error = capsys.readouterr().err
        assert "seed3 holds a run with other settings" in error
        assert "guidance.kind is 'kl', not" not in error
        assert "ppo.clip is 0.1, not 0.2" in error
    assert not (made / "attempts.jsonl").exists()


def test_a_grid_has_the_effect_of_each_setting_over_the_others(capsys, tmp_path):
    out = tmp_path / "out"
    success = {("none", 1): 0.2, ("none", 5): 0.6, ("kl", 1): 0.3, ("kl", 5): 0.9}
    for (kind, beta), after in success.items():
        for seed, more in enumerate((-0.02, 0.02)):
            finished(
                out / f"guidance={kind},beta={beta}" / f"seed{seed}",
                seed=seed,
                over={"guidance": {"kind": kind, "beta": beta}},
                after=after + more,
            )
    arguments = ["compare", "ezpoints", *VARY, "--vary", "guidance.beta=1,5", "--seeds", "2"]
    assert main([*arguments, "--only-summary", "--out", str(out), "--episodes", "0"]) == 0
    effects = json.loads((out / "compare.json").read_text())["effects"]
    kl = effects["guidance.kind"][1]
    assert kl["label"] == "guidance=kl"
    assert kl["estimates"]["after/held-out/student"]["mean"] == pytest.approx(0.6)
    assert kl["differences"]["after/held-out/student"]["mean"] == pytest.approx(
        0.2
    )  # (0.1 + 0.3) / 2
    assert kl["differences"]["after/held-out/student"]["pairs"] == 4
    assert kl["differences"]["after/held-out/student"]["t_interval"] is None  # both seeds have 0.2
    high = effects["guidance.beta"][1]
    assert high["differences"]["after/held-out/student"]["mean"] == pytest.approx(
        0.5
    )  # (0.4 + 0.6) / 2
    assert "effect of guidance.beta" in capsys.readouterr().out


def test_a_row_counts_the_runs_that_its_numbers_rest_on(capsys, tmp_path):
    for kind in ("none", "kl"):
        for beta in (1, 5):
            for seed in (0, 1):
                if (kind, beta, seed) != ("kl", 5, 1):
                    over = {"guidance": {"kind": kind, "beta": beta}}
                    folder = tmp_path / f"guidance={kind},beta={beta}" / f"seed{seed}"
                    finished(folder, seed=seed, over=over)
    (lacking,) = tmp_path.glob("guidance=none,beta=5/seed0")
    summary = json.loads((lacking / "summary.json").read_text())
    del summary["evaluations"]["after/held-out/teacher"]
    (lacking / "summary.json").write_text(json.dumps(summary))
    arguments = ["compare", "ezpoints", *VARY, "--vary", "guidance.beta=1,5", "--seeds", "2"]
    arguments += ["--only-summary", "--out", str(tmp_path), "--episodes", "0"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    effect = text[text.index("effect of guidance.kind") : text.index("effect of guidance.beta")]
    # seed 0 of none lacks the merge's number, seed 1 of kl a run: each takes two runs with it
    assert re.findall(r"\d[ \w]* runs", effect) == ["2 to 4 of 4 runs", "2 of 4 runs"]


def test_settings_are_written_as_they_are_given(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    for kind in ("none", "kl"):
        for center in ("true", "false"):
            over = {"guidance": {"kind": kind, "center": center == "true"}}
            finished(tmp_path / f"guidance={kind},center={center}" / "seed0", over=over)
    arguments = ["compare", "ezpoints", *VARY, "--vary", "guidance.center=true,false"]
    arguments += ["--seeds", "1", "--out", str(tmp_path), "--episodes", "0"]
    assert main([*arguments, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert plan.count(str(tmp_path)) == 1
    assert "\n  taken as it is  guidance=none,center=true/seed0\n" in plan
    note = "guidance.kind is none in guidance=none,center=true, guidance=none,center=false: guidance.center changes"
    assert note in plan
    assert main([*arguments, "--only-summary"]) == 0
    assert "center=false" in capsys.readouterr().out
    effects = json.loads((tmp_path / "compare.json").read_text())["effects"]
    assert [one["label"] for one in effects["guidance.center"]] == ["center=true", "center=false"]
    table = list(csv.DictReader((tmp_path / "compare.csv").read_text().splitlines()))
    assert [row["guidance.center"] for row in table] == ["true", "false"] * 2
    page = (tmp_path / "report.html").read_text()
    assert "by guidance.center, over the other settings; differences are to center=true" in page


def test_nothing_there_is_no_success(capsys, tmp_path):
    arguments = ["compare", "ezpoints", "--seeds", "1", "--only-summary", "--out"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "which holds runs of no variant" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert main([*arguments, str(tmp_path / "typo")]) == 2
    assert "typo is no folder of a comparison" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("plan", [[], ["--vary", "guidance=sft"], [*VARY, "--seeds", "3,"]])
def test_a_summary_of_another_plan_replaces_nothing(capsys, made, plan):
    summarise(made)
    before = {path: path.read_bytes() for path in made.iterdir() if path.is_file()}
    arguments = ["compare", "ezpoints", *plan, "--out", str(made), "--episodes", "0"]
    assert main([*arguments, "--only-summary"]) == 2
    assert "which holds runs of guidance=kl, guidance=none;" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in made.iterdir() if path.is_file()} == before


def test_comparing_what_is_there_needs_no_torch(made):
    code = f"""
import sys
from gtr_turbo.cli import main
main(["compare", "ezpoints", "--vary", "guidance=none,kl", "--only-summary", "--out", {str(made)!r}])
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
