"""The trackio writer with trackio itself: `make test-trackio`, which gives it an environment of its own.

trackio wants pillow below 13, the pinned environment of `make test` has 13, so pytest does not collect this.
"""

import json

import pytest
from trackio.sqlite_storage import SQLiteStorage

from gtr_turbo.config import TrainConfig
from gtr_turbo.trackers import Trackers

ROW = {"update": 1, "env_steps": 8, "rollout/success": 0.5}
LATER = {"update": 2, "env_steps": 16, "eval/student_success": 0.25}


def test_trackio_writes_a_run_that_can_be_read_and_resumes_under_its_name(tmp_path):
    run = tmp_path / "points-seed7"
    run.mkdir()
    config = TrainConfig(trackers=("trackio",), seed=7)
    for row, resume in ((ROW, False), (LATER, True)):
        writers = Trackers(config, run, pytest.fail, resume=resume)
        writers.write(row)
        writers.close()
    identity = json.loads((run / "trackers.json").read_text())["id"]
    assert SQLiteStorage.get_runs("gtr-turbo") == [f"points-seed7-{identity}"]
    logs = SQLiteStorage.get_logs("gtr-turbo", f"points-seed7-{identity}")
    found = [{k: v for k, v in log.items() if "/" in k or k == "step"} for log in logs]
    assert found == [
        {"step": 8, "rollout/success": 0.5},
        {"step": 16, "eval/student_success": 0.25},
    ]
    stored = SQLiteStorage.get_run_config("gtr-turbo", f"points-seed7-{identity}")
    assert stored["seed"] == 7
    assert stored["env"]["id"] == "EZPoints"
