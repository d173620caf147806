import json
import re
from pathlib import Path

import numpy as np
import pytest

from gtr_turbo.checkpoint import own_folder
from gtr_turbo.config import EvalConfig, PPOConfig, RolloutConfig
from gtr_turbo.envs import make_env
from gtr_turbo.teacher.endpoint import FAULTS
from gtr_turbo.teaching_config import GuidanceConfig
from gtr_turbo.trainer import train
from tiny import Silent, scripted, settings

PAGE = Path(__file__).parent.parent / "docs" / "metrics.md"
OTHER_ENVIRONMENTS = {  # Points24 (EZPoints writes no steps), Household
    "judge/arithmetic",
    "judge/admissible",
    "judge/expert",
}
EXTERNAL = {f"external/failed_{kind}" for kind in FAULTS} | {
    f"external/{name}"
    for name in (
        "asked", "known", "skipped", "unusable", "corrected", "agreed", "calls", "retries",
        "bad_tool_calls", "tokens_in", "tokens_out", "latency", "calls_so_far", "dollars",
    )
}  # fmt: skip
ENGINE = {  # tests/policy/test_vllm.py and test_vllm_teacher.py compare them with runs
    f"engine/{name}"
    for name in (
        "logprob_gap", "restarts", "sync_seconds", "probe_change", "probe_change_wanted", "teacher_energy",
        "teacher_gap",
    )
}  # fmt: skip
IMITATION = {
    f"imitation/{name}" for name in ("asked", "written", "tries", "unusable", "collected", "loss")
}


def documented():
    """Names in the first column of the tables, by `##` section."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        section.splitlines()[0]: re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
        for section in sections[1:]
    }


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run in which episodes end (EZPoints cuts them at 6 turns) and replies are valid."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(
        tiny,
        env_steps=14,
        rollout=RolloutConfig(turns_per_env=7, rescore=True),
        ppo=PPOConfig(minibatch_turns=7, microbatch_turns=7, epochs=1),
        eval=EvalConfig(episodes=1, interval=1, interval_episodes=2),
    )
    with pytest.MonkeyPatch.context() as patch, own_folder(folder):
        patch.setattr("gtr_turbo.collect.generate", scripted)
        train(config, folder, Silent())
    return folder


def only(path):
    return json.loads(path.read_text().splitlines()[0])


def test_every_name_is_documented_once_and_logged(run):
    names = documented()
    for section, logged in (
        (
            "Rows of metrics.jsonl",
            set(only(run / "metrics.jsonl")) | OTHER_ENVIRONMENTS | IMITATION | EXTERNAL | ENGINE,
        ),
        ("summary.json", set(json.loads((run / "summary.json").read_text()))),
        ("trajectories/NNNNNN.jsonl", set(only(run / "trajectories" / "000001.jsonl"))),
    ):
        assert len(names[section]) == len(set(names[section]))
        assert set(names[section]) == logged, section
    evaluations = json.loads((run / "summary.json").read_text())["evaluations"]
    assert set(evaluations) == {
        "before/held-out/student", "after/held-out/student", "after/held-out/teacher"
    }  # fmt: skip
    for evaluation in evaluations.values():
        assert set(evaluation) == set(names["An evaluation"])


def test_the_facts_of_other_environments_exist():
    facts = set()
    for name, options in (
        ("Points24", {"granularity": "reduction", "solvable_only": True}),
        ("Household", {}),
    ):
        env = make_env(name, prompt="compact", **options)
        env.reset(seed=0)
        reply = env.unwrapped.demonstrate(np.random.default_rng(0))
        facts |= {f"judge/{fact}" for fact in env.unwrapped.judge(reply)}
    assert facts >= OTHER_ENVIRONMENTS


def test_without_guidance_and_monitor_the_kl_is_absent(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    with own_folder(tmp_path):
        config = settings(tiny, guidance=GuidanceConfig(kind="none", monitor=False))
        train(config, tmp_path, Silent())
    row = only(tmp_path / "metrics.jsonl")
    assert not {"teacher/kl", "teacher/credit", "rollout/success"} & set(row)  # no episode ended
    assert "teacher/distance" in row
    assert "kl_tokens" not in only(tmp_path / "trajectories" / "000001.jsonl")


def test_numbers_agree_with_the_trajectories(run):
    row = only(run / "metrics.jsonl")
    lines = (run / "trajectories" / "000001.jsonl").read_text().splitlines()
    turns = [json.loads(line) for line in lines]  # of one of the two environments
    assert [turn["step"] for turn in turns] == [0, 1, 2, 3, 4, 5, 0]
    assert [turn["truncated"] for turn in turns] == [False] * 5 + [True, False]
    assert row["rollout/episodes"] == 2
    assert row["rollout/episode_turns"] == 6
    assert row["rollout/success"] == 0
    assert row["rollout/truncated"] == 2 / 14
    assert row["rollout/valid"] == 1
    # every reply has the thought "2*6=12": one template for all frames
    assert row["thought/template_share"] == row["thought/top_template"] == 1
    assert row["thought/self_bleu"] == pytest.approx(1)
    assert 0 < row["thought/distinct"] < 1
    assert row["teacher/kl"] == 0  # the first teacher is the agent
    assert row["teacher/age"] == 0
