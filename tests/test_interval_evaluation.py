import json

import pytest
import torch
from safetensors.torch import load_file

from gtr_turbo import trainer
from gtr_turbo.checkpoint import folders, own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.config import EvalConfig
from tiny import Silent, scripted, settings

OWN = {"eval/student_success", "eval/teacher_success", "eval/episodes", "time/evaluate"}


@pytest.fixture(autouse=True)
def _valid_replies(monkeypatch):
    """Valid replies, so that there are thoughts and the merge is not the agent."""
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)


def run_with(tiny, folder, evaluation, view=None, **options):
    config = settings(tiny, env_steps=16, eval=evaluation)
    with own_folder(folder):
        trainer.train(config, folder, view or Silent(), **options)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clocks(row):
    return {k: v for k, v in row.items() if not k.startswith(("time/", "system/"))}


def test_evaluations_between_updates_leave_the_run_bit_for_bit(tiny, tmp_path):
    plain = run_with(tiny, tmp_path / "plain", EvalConfig(episodes=0))
    looked = run_with(
        tiny, tmp_path / "looked", EvalConfig(episodes=0, interval=2, interval_episodes=3)
    )
    assert [OWN & set(row) for row in plain] == [set()] * 4
    assert [OWN & set(row) for row in looked] == [set(), OWN, set(), OWN]
    assert all(row["eval/episodes"] == 3 for row in looked[1::2])
    for before, after in zip(plain, looked, strict=True):
        after = {k: v for k, v in after.items() if k not in OWN}
        assert without_clocks(after) == without_clocks(before)
    ours, theirs = (folders(tmp_path / name)[-1] for name in ("plain", "looked"))
    files = sorted(ours.glob("*.safetensors"))
    assert files
    for file in files:
        a, b = load_file(file), load_file(theirs / file.name)
        assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [
        (tmp_path / name / "trajectories" / "000004.jsonl").read_text()
        for name in ("plain", "looked")
    ]
    assert lines[0] == lines[1]


def test_a_resumed_run_evaluates_as_if_nothing_had_happened(tiny, tmp_path):
    class Interrupting(Silent):
        def updated(self, row):
            if row["update"] == 2:
                raise KeyboardInterrupt

    evaluation = EvalConfig(episodes=0, interval=2, interval_episodes=3)
    whole = run_with(tiny, tmp_path / "whole", evaluation)
    with pytest.raises(KeyboardInterrupt):
        run_with(tiny, tmp_path / "parts", evaluation, Interrupting())
    parts = run_with(tiny, tmp_path / "parts", evaluation, resume=True)
    assert list(map(without_clocks, parts)) == list(map(without_clocks, whole))
    assert parts[-1]["system/cpu_seconds"] > parts[0]["system/cpu_seconds"] > 0


def test_a_resumed_agent_is_not_evaluated_as_the_one_before(tiny, tmp_path):
    """Nor is an evaluation said to rest on other episodes than it does."""

    class Interrupting(Silent):
        def updated(self, row):
            if row["update"] == 2:
                raise KeyboardInterrupt

    for episodes in (0, 3):
        run = tmp_path / str(episodes)
        with pytest.raises(KeyboardInterrupt):
            run_with(tiny, run, EvalConfig(episodes=episodes), Interrupting())
        run_with(tiny, run, EvalConfig(episodes=2), resume=True)
        summary = json.loads((run / "summary.json").read_text())
        found = {key: value["episodes"] for key, value in summary["evaluations"].items()}
        before = {"before/held-out/student": 3} if episodes else {}
        after = {f"after/held-out/{which}": 2 for which in ("student", "teacher")}
        assert found == before | after
        assert (summary["success_before"] is None) == (episodes == 0)
        assert summary["episodes"] == 2


def test_student_and_merge_play_the_same_episodes_each_time(tiny, tmp_path, monkeypatch):
    """What is evaluated, by split, seed and number of episodes; the merge with its own weights in place."""
    asked, evaluate = [], trainer.evaluate

    def watched(policy, env, sampling, **options):
        name, weight = next(iter(policy.trained().items()))
        merge = policy.teacher_state()[name]
        asked.append(
            (options["split"], options["seed"], options["episodes"], torch.equal(weight, merge))
        )
        return evaluate(policy, env, sampling, **options)

    monkeypatch.setattr(trainer, "evaluate", watched)
    run_with(tiny, tmp_path, EvalConfig(episodes=0, interval=3, interval_episodes=2))
    assert asked == [("held-out", 0, 2, False), ("held-out", 0, 2, True)]


@pytest.mark.parametrize("wrong", [{"interval": -1}, {"interval_episodes": 0}])
def test_intervals_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"eval\.interval"):
        EvalConfig(**wrong)
