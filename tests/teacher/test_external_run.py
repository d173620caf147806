"""External guidance in whole runs: it trains, resumes bit for bit, and stops cleanly."""

import json
import re
from dataclasses import replace
from pathlib import Path

import endpoints
import pytest
import torch
from endpoints import endpoint
from safetensors.torch import load_file

from gtr_turbo.checkpoint import folders, own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.cli import main
from gtr_turbo.config import PPOConfig, SamplingConfig, SaveConfig
from gtr_turbo.learning.update import TrainingError
from gtr_turbo.teacher.collection import Memory
from gtr_turbo.teacher.imitation import imitation_loss
from gtr_turbo.teaching_config import BudgetConfig, GuidanceConfig, ImitationConfig
from gtr_turbo.trainer import train
from tiny import Silent, make_policy, scripted, settings

PAGE = Path(__file__).parent.parent.parent / "docs" / "metrics.md"
SPENDING = ("external/known", "external/calls", "external/tokens", "external/latency")


@pytest.fixture(autouse=True)
def _valid_replies(monkeypatch):
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)


def config_of(server, tiny, *, updates=2, groups=None, weight=1.0, **external):
    guidance = GuidanceConfig(
        kind="external",
        imitation=ImitationConfig(samples=4, weight=weight, weight_final=weight),
        external=endpoints.settings(server, **{"tools": False, **external}),
    )
    sampling = SamplingConfig(max_new_tokens=96)
    return settings(
        tiny, env_steps=4 * updates, guidance=guidance, sampling=sampling, **(groups or {})
    )


def run(config, folder, view=None, *, resume=False):
    view = view or Silent()
    with own_folder(folder):
        train(config, folder, view, resume=resume)
    return view.rows


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    dropped = ("time/", "system/", *SPENDING)
    return [{k: v for k, v in row.items() if not k.startswith(dropped)} for row in rows]


def weights_of(folder):
    return load_file(folders(folder)[-1] / "trained.safetensors")


def test_training_lowers_the_cross_entropy_of_corrected_thoughts(tiny, tmp_path):
    ppo = PPOConfig(minibatch_turns=4, microbatch_turns=4, epochs=8, lr=6e-3)
    with endpoint() as server:
        for name, weight in (("guided", 1.0), ("control", 0.0)):
            config = config_of(
                server, tiny, updates=1, tools=True, groups={"ppo": ppo}, weight=weight
            )
            (row,) = run(config, tmp_path / name)
            assert row["imitation/collected"] == 4
            assert row["external/calls"] == 2 * (4 - row["external/known"])  # the tool, the answer
    memory = Memory(tmp_path / "guided" / "imitation", 0)
    memory.restore(1, 4)
    students = [folders(tmp_path / name)[-1] / "student" for name in ("guided", "control")]
    losses = []
    for path in (*students, tiny):
        draws = torch.Generator().manual_seed(0)
        with torch.no_grad():
            parts = imitation_loss(make_policy(path), memory, 4, draws, microbatch=4)
            losses.append(sum(number for _, number in parts))
    guided, control, start = losses
    assert guided < min(control, start) - 0.3  # nats per token


class Interrupting(Silent):
    """Ctrl-C in the middle of update `after + 1`, when checkpoint `after` exists."""

    after = 2

    def updated(self, row):
        super().updated(row)
        if row["update"] > self.after:
            raise KeyboardInterrupt


def test_two_updates_and_two_more_are_four_bit_for_bit_and_paid_once(tiny, tmp_path):
    with endpoint() as server:
        config = config_of(server, tiny, updates=4, share=0.75)
        run(config, tmp_path / "whole")
        calls = len(server.requests)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "parts", Interrupting())
        run(config, tmp_path / "parts", resume=True)
        assert len(server.requests) == 2 * calls  # the answers of the third update were kept
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")
    whole, parts = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    targets = [
        [(tmp_path / name / "imitation" / f"{n:06d}.jsonl").read_text() for n in (1, 2, 3, 4)]
        for name in ("whole", "parts")
    ]
    assert targets[0] == targets[1]


def test_a_spent_budget_stops_with_a_checkpoint_and_a_higher_one_goes_on(tiny, tmp_path):
    with endpoint() as server:
        config = config_of(server, tiny, updates=3, budget={"calls": 2})
        with pytest.raises(TrainingError, match=r"after update 1: .*budget\.calls=2.*--resume"):
            run(config, tmp_path)
        assert len(server.requests) == 2
        assert folders(tmp_path)[-1].name == "000001"
        assert len(json.loads(line_of(tmp_path, 0))["answer"]["thought"]) == 3
        assert rows_of(tmp_path)[0]["imitation/collected"] >= 2  # what came is learned from
        # not raised, it trains nothing without corrections, however often it is tried
        for _ in range(2):
            with pytest.raises(TrainingError, match=r"before update 2: .*budget\.calls=2"):
                run(replace_budget(config, 2), tmp_path, resume=True)
        assert len(server.requests) == 2
        assert (folders(tmp_path)[-1].name, len(rows_of(tmp_path))) == ("000001", 1)
        rows = run(replace_budget(config, 1000), tmp_path, resume=True)
    assert [row["update"] for row in rows] == [2, 3]
    assert rows[0]["external/calls_so_far"] == 2 + rows[0]["external/calls"]
    assert rows[1]["external/calls_so_far"] == len(server.requests)


def test_a_budget_that_an_update_uses_up_stops_before_the_next(tiny, tmp_path):
    with endpoint() as server:
        config = config_of(server, tiny, updates=3, groups={"save": SaveConfig(interval=3)})
        (row,) = run(replace(config, env_steps=4), tmp_path / "one")
        just = replace_budget(config, int(row["external/calls"]))
        with pytest.raises(TrainingError, match=r"after update 1: .* is spent"):
            run(just, tmp_path / "three")
        # for the last update it is enough
        assert run(replace(just, env_steps=4), tmp_path / "last")[0]["external/skipped"] == 0
    assert folders(tmp_path / "three")[-1].name == "000001"  # though none was due


def test_answers_that_are_there_are_learned_again_though_the_budget_is_spent(tiny, tmp_path):
    with endpoint() as server:
        groups = {"save": SaveConfig(interval=4)}
        config = config_of(server, tiny, updates=4, groups=groups)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path, Interrupting())  # in the third update, and there is no checkpoint
        calls = len(server.requests)
        with pytest.raises(TrainingError, match="after update 3"):
            run(replace_budget(config, calls), tmp_path)
        assert len(server.requests) == calls
    assert [row["external/skipped"] for row in rows_of(tmp_path)] == [0, 0, 0]


def line_of(folder, number):
    return (folder / "external" / "ledger.jsonl").read_text().splitlines()[number]


def replace_budget(config, calls):
    external = replace(config.guidance.external, budget=BudgetConfig(calls=calls))
    return replace(config, guidance=replace(config.guidance, external=external))


def test_an_outage_is_waited_for_then_the_run_stops_resumable(tiny, tmp_path):
    with endpoint("ok", "ok", after=(503, {}, "")) as server:
        config = config_of(server, tiny, outage="wait", wait_s=0.5)
        view = Silent()
        with pytest.raises(TrainingError, match="has not answered for"):
            run(config, tmp_path, view)
        assert len(view.notes) == 1
        assert view.rows[0]["imitation/collected"] >= 2
        server.after = "ok"
        assert [row["update"] for row in run(config, tmp_path, resume=True)] == [2]


def test_without_an_endpoint_the_run_goes_on_and_counts(tiny, tmp_path):
    with endpoint(after=(503, {}, "")) as server:
        rows = run(config_of(server, tiny), tmp_path)
    for row in rows:
        assert row["external/skipped"] == row["external/asked"] == 4
        assert row["external/failed_server"] > 0
        assert "imitation/loss" not in row  # there is nothing to imitate
        assert "external/corrected" not in row


def test_a_key_that_is_revoked_stops_the_run_and_what_was_paid_is_kept(tiny, tmp_path):
    with endpoint("ok", "ok", (401, {}, "")) as server:
        config = config_of(server, tiny)
        with pytest.raises(ConfigError, match="answered 401"):
            run(config, tmp_path)
        assert len((tmp_path / "external" / "ledger.jsonl").read_text().splitlines()) == 3
        rows = run(config, tmp_path)
    assert rows[0]["external/known"] >= 2


def test_every_name_that_is_logged_is_documented(tiny, tmp_path):
    with endpoint() as server:
        (row,) = run(config_of(server, tiny, updates=1), tmp_path)
    documented = re.findall(r"^\| `(external/[^`]+)` \|", PAGE.read_text("utf-8"), re.MULTILINE)
    assert set(documented) == {name for name in row if name.startswith("external/")}


def test_a_missing_key_is_an_error_before_there_is_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert main(["train", "--guidance.kind", "external", "--run", str(tmp_path / "run")]) == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_endpoint_that_is_not_there_is_an_error_before_the_model_is_loaded(tiny, tmp_path):
    with endpoint() as server:
        config = config_of(server, tiny)
    config = replace(config, model=replace(config.model, path="no/such/model"))
    with pytest.raises(ConfigError, match="nothing answers"):
        run(config, tmp_path)
