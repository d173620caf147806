import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest

from gtr_turbo import trackers, trainer
from gtr_turbo.checkpoint import own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.config import TrainConfig
from gtr_turbo.settings import build_config, dump_config
from gtr_turbo.trackers import Trackers, chosen
from gtr_turbo.tracking import JsonlWriter, peak_rss_mb
from tiny import Silent, scripted, settings

ROW = {"update": 1, "env_steps": 8, "rollout/success": 0.5, "rollout/valid": 1.0}
LATER = {"update": 2, "env_steps": 16, "rollout/valid": 0.75, "eval/student_success": 0.25}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No service is asked, and nothing is written outside the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


class Recorder:
    """A tracker that remembers, and fails at row `fails_at`."""

    def __init__(self, fails_at=None):
        self.rows, self.closed, self.failed, self._fails_at = [], False, None, fails_at

    def write(self, row):
        if len(self.rows) + 1 == self._fails_at:
            raise ConnectionError("no route to host")
        self.rows.append(dict(row))

    def close(self, *, failed):
        self.closed, self.failed = True, failed


@pytest.fixture
def two(monkeypatch):
    """Two made-up trackers: the first fails at its second row."""
    made = {"wandb": Recorder(fails_at=2), "tensorboard": Recorder()}
    for name, recorder in made.items():
        monkeypatch.setitem(trackers.WRITERS, name, lambda *_, it=recorder: it)
    return made


def wandb_records(path):
    """Whole records of a `.wandb` file so far: after 7 bytes, LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert b":W&B".startswith(data[:4])
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if at + 7 + size > len(data):
            return  # it is being written
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def wandb_files(run):
    """Each start of a run, from its offline files: (id, name, config, metrics by step, exit code)."""
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        records, deadline = [], time.monotonic() + 120
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline, f"{path} was never finished"
            records = list(wandb_records(path))  # wandb's own process writes it, a little later
        about = next(record.run for record in records if record.HasField("run"))
        history = {
            record.history.step.num: {
                item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            for record in records
            if record.HasField("history")
        }
        config = {item.key: json.loads(item.value_json) for item in about.config.update}
        code = next(record.exit.exit_code for record in records if record.HasField("exit"))
        yield about.run_id, about.display_name, config, history, code


def test_wandb_writes_a_run_that_can_be_read_and_resumes_under_its_id(tmp_path):
    config = settings("m", trackers=("wandb",), seed=7)
    run = tmp_path / "points-seed7"
    run.mkdir()
    for row, resume in ((ROW, False), (LATER, True)):
        writers = Trackers(config, run, pytest.fail, resume=resume)
        writers.write(row)
        writers.close(failed=not resume)
    (first, name, stored, history, code), (again, _, _, later, last_code) = wandb_files(run)
    assert (code, last_code) == (1, 0)  # the first was interrupted, which is not finished
    assert first == again == json.loads((run / "trackers.json").read_text())["id"]
    assert name == "points-seed7"
    assert stored["seed"] == 7
    assert stored["env"]["id"] == "EZPoints"
    assert {k: v for k, v in history[8].items() if "/" in k} == {
        "rollout/success": 0.5, "rollout/valid": 1.0
    }  # fmt: skip
    assert later[16]["eval/student_success"] == 0.25
    assert writers.failed == 0


def test_a_new_run_in_an_old_folder_gets_an_id_of_its_own(tmp_path, two):
    config, seen = settings("m", trackers=("wandb",)), set()
    for resume in (False, False, True):
        Trackers(config, tmp_path, pytest.fail, resume=resume)
        seen.add((tmp_path / "trackers.json").read_text())
    assert len(seen) == 2
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(ConfigError, match=r"trackers\.json is damaged"):
        Trackers(config, tmp_path, pytest.fail, resume=True)


def test_wandb_without_a_key_is_an_error_at_the_start(tmp_path):
    """In a process of its own, as wandb reads its variables once."""
    code = """
from pathlib import Path
from gtr_turbo.config import TrainConfig
from gtr_turbo.trackers import Trackers
Trackers(TrainConfig(trackers=("wandb",)), Path("."), print)
"""
    env = os.environ | {"WANDB_MODE": "online", "NETRC": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    error = done.stderr.splitlines()[-1]
    assert "ConfigError: trackers: wandb did not start" in error
    assert "API key" in error
    assert "WANDB_MODE=offline" in error


def test_trackio_is_started_named_and_resumed(tmp_path, monkeypatch):
    """Its calls; with trackio itself: real_trackio.py."""
    started, logged = [], []
    run = tmp_path / "guidance=kl" / "seed3"  # as a comparison names them
    run.mkdir(parents=True)

    class Run:
        def log(self, metrics, step):
            logged.append((step, metrics))

        def finish(self):
            logged.append("finished")

    def init(**options):
        started.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=init))
    monkeypatch.setattr(trackers, "installed", lambda name: True)
    for resume in (False, True):
        config = settings("m", trackers=("trackio",), run=str(run))
        writers = Trackers(config, run, pytest.fail, resume=resume)
        writers.write(ROW)
        writers.close()
    first, second = started
    assert (first.pop("resume"), second.pop("resume")) == ("never", "allow")
    assert first == second
    assert first["project"] == "gtr-turbo"
    assert first["name"].startswith("guidance=kl-seed3-")
    assert str(tmp_path) not in str(first)
    assert first["config"]["env"]["id"] == "EZPoints"
    assert logged[:2] == [(8, {"rollout/success": 0.5, "rollout/valid": 1.0}), "finished"]


def test_tensorboard_holds_metrics_that_are_in_some_rows_only(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = Trackers(settings("m", trackers="auto"), tmp_path, pytest.fail)
    writers.write(ROW)
    writers.write(LATER)
    writers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }
    assert points == {
        "rollout/success": [(8, 0.5)],
        "rollout/valid": [(8, 1.0), (16, 0.75)],
        "eval/student_success": [(16, 0.25)],
    }


def test_a_tracker_that_fails_is_dropped_and_told_once(tmp_path, two):
    told = []
    config = settings("m", trackers=("wandb", "tensorboard"))
    writers = Trackers(config, tmp_path, told.append)
    for _ in range(4):
        writers.write(ROW)
    writers.close()
    assert len(two["wandb"].rows) == 1
    assert len(two["tensorboard"].rows) == 4
    assert (two["wandb"].closed, two["tensorboard"].closed) == (False, True)
    assert writers.failed == 1
    (text,) = told
    assert text.startswith("wandb failed and is dropped")
    assert "ConnectionError: no route to host" in text


def test_a_tracker_that_never_closes_is_left_behind(tmp_path, two, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSING_S", 0.1)
    never, told = threading.Event(), []
    monkeypatch.setattr(two["wandb"], "close", lambda failed: never.wait())
    config = build_config(TrainConfig, {"trackers": ["wandb", "tensorboard"]})
    writers = Trackers(config, tmp_path, told.append)
    writers.close()
    never.set()
    assert two["tensorboard"].closed
    assert writers.failed == 1
    assert "wandb failed" in told[0]
    assert "TimeoutError: it did not close within 0.1 s" in told[0]


def test_a_damaged_byte_in_the_metrics_costs_one_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"update": 1}\n{"upd\xffate": 2}\n{"update": 3}\n{"update": 4}\n')
    JsonlWriter(path, keep_until=3).write({"update": 4})
    assert [json.loads(line)["update"] for line in path.read_text().splitlines()] == [1, 3, 4]


def test_memory_is_counted_in_millions_of_bytes():
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    assert peak_rss_mb() == pytest.approx(int(line.split()[1]) * 1024 / 1e6, rel=0.01)


def test_a_run_outlives_its_tracker(tiny, tmp_path, two, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    view = Silent()
    with own_folder(tmp_path):
        config = settings(tiny, env_steps=16, trackers=("wandb",))
        trainer.train(config, tmp_path, view)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    # the row that failed was made before it failed
    assert [row["system/trackers_failed"] for row in rows] == [0, 0, 1, 1]
    assert len(view.notes) == 1
    assert (tmp_path / "summary.json").exists()


def test_a_run_that_ends_well_says_so_to_its_trackers(tiny, tmp_path, two, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    with own_folder(tmp_path):
        config = settings(tiny, env_steps=4, trackers=("tensorboard",))
        trainer.train(config, tmp_path, Silent())
    assert two["tensorboard"].failed is False


def test_a_run_that_fails_closes_its_trackers(tiny, tmp_path, two, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("gtr_turbo.learner.collect", broken)
    config = settings(tiny, env_steps=16, trackers=("tensorboard",))
    with own_folder(tmp_path), pytest.raises(ZeroDivisionError):
        trainer.train(config, tmp_path, Silent())
    assert two["tensorboard"].closed
    assert two["tensorboard"].failed is True


def test_one_that_does_not_start_closes_those_before_it(tmp_path, two, monkeypatch):
    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setitem(trackers.WRITERS, "wandb", broken)
    with pytest.raises(ConfigError, match="wandb did not start: OSError: disk full"):
        Trackers(settings("m", trackers=("tensorboard", "wandb")), tmp_path, pytest.fail)
    assert two["tensorboard"].closed


def test_a_missing_package_is_told_before_the_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "installed", lambda name: name != "trackio")
    run = tmp_path / "run"
    assert main(["train", "--run", str(run), "--trackers", '["trackio"]']) == 2
    assert "pip install 'gtr-turbo[trackio]'" in capsys.readouterr().err
    assert not run.exists()


def test_a_folder_named_like_a_package_is_none(tmp_path, monkeypatch):
    """W&B itself writes into ./wandb, and Python takes a mere folder for a package."""
    (tmp_path / "a_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.util.find_spec("a_tracker") is not None
    assert not trackers.installed("a_tracker")
    assert trackers.installed("tensorboard")


def test_auto_takes_tensorboard_where_it_is(monkeypatch):
    assert chosen(settings("m", trackers="auto")) == ("tensorboard",)
    assert chosen(settings("m", trackers=())) == ()
    monkeypatch.setattr(trackers, "installed", lambda name: False)
    assert chosen(settings("m", trackers="auto")) == ()


@pytest.mark.parametrize("value", ["auto", [], ["wandb"], ["tensorboard", "trackio"]])
def test_the_setting_survives_its_file(value):
    import yaml

    config = build_config(TrainConfig, {"trackers": value})
    again = build_config(TrainConfig, yaml.safe_load(dump_config(config)))
    assert again == config
    assert config.trackers == (value if value == "auto" else tuple(value))


@pytest.mark.parametrize("value", ["mlflow", ["mlflow"], True])
def test_an_unknown_tracker_is_refused(value):
    with pytest.raises(ConfigError, match="trackers"):
        build_config(TrainConfig, {"trackers": value})
