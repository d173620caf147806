"""Two ranks that let vLLM write: each with its own, both with one, and one whose vLLM dies."""

import json

import pytest
import yaml
from test_ranks import HERE, end, rows_of, torchrun, two_ranks
from vllm_job import config_of

from gtr_turbo.checks import ConfigError
from gtr_turbo.config import ModelConfig, RolloutConfig, TrainConfig, VllmConfig
from gtr_turbo.distributed.ranks import Ranks
from gtr_turbo.policy.vllm_link import Link
from gtr_turbo.policy.vllm_server import own_environment
from gtr_turbo.settings import build_config, dump_config
from tiny import settings

NOT_OF_THE_RUN = ("time/", "system/", "engine/sync_seconds", "engine/restarts")


@pytest.fixture(scope="module")
def found(tiny25, tmp_path_factory):
    """What the two ranks of vllm_job.py found, and the rows of their runs."""
    out = tmp_path_factory.mktemp("vllm_ranks")
    told = two_ranks(out, HERE / "vllm_job.py", tiny25, out)
    runs = {name: rows_of(out / name) for name in ("own", "sharded", "shared")}
    return told | {"rows": runs, "out": out}


def of_the_run(row):
    return {name: x for name, x in row.items() if not name.startswith(NOT_OF_THE_RUN)}


@pytest.mark.parametrize("case", ["own", "sharded"])
def test_each_rank_has_an_engine_that_takes_no_place_among_the_ranks(found, case):
    first, second = found[case]
    assert (first["engines"], second["engines"]) == (2, 1)
    # agent and teacher in each of two updates, the first ones replaced and forgotten
    assert second["told"].count("add_lora") == 4
    assert second["told"].count("remove_lora") == 2
    assert first["told"].count("shutdown") == 2
    assert first["places"] == second["places"] == []
    assert not list((found["out"] / case / "vllm").glob("rank-*/student-*"))


def test_the_engine_group_is_of_all_ranks(found):
    for row in found["rows"]["own"]:
        assert row["engine/restarts"] == 1  # of the first rank alone
        assert row["engine/logprob_gap"] < 1e-4
        assert row["engine/teacher_gap"] < 1e-4
        assert row["imitation/written"] == 1
        assert row["imitation/asked"] == 4
    first, second = (row["engine/teacher_energy"] for row in found["rows"]["own"])
    assert 0.5 < second < first == 1


def test_ranks_share_a_server_and_the_adapters_in_it(found):
    """Each loads both of each of two updates, under the same names; none is missed by the other."""
    case = found["shared"]
    assert case["left"] == []
    assert case["unknown"] == 0
    names = sorted(set(case["loads"]))
    assert len(names) == 4
    assert sorted(case["loads"]) == sorted(names * 2)


@pytest.mark.parametrize("other", ["sharded", "shared"])
def test_the_run_is_the_same_whoever_serves_it(found, other):
    for ours, theirs in zip(found["rows"]["own"], found["rows"][other], strict=True):
        assert of_the_run(theirs) == pytest.approx(of_the_run(ours), rel=1e-3, abs=1e-5)


def test_a_rank_whose_vllm_is_gone_for_good_ends_the_job_and_says_why(tiny25, tmp_path):
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    model = ModelConfig(path=str(tiny25), attention="eager", train="lora", lora_rank=4)
    vllm = VllmConfig(restarts=0, backoff_s=0.01)
    rollout = RolloutConfig(turns_per_env=2, engine="vllm", vllm=vllm, max_logprob_gap=1e9)
    file.write_text(dump_config(settings(tiny25, model=model, rollout=rollout)))
    job = torchrun(
        "--standalone", "--nproc-per-node", 2, "--", HERE / "failing_vllm.py", tmp_path,
        "train", "--config", file, "--run", run,
    )  # fmt: skip
    told = end(job)
    assert job.returncode != 0
    assert told.count("gtr-turbo: ") == 1, told
    assert "gtr-turbo: vLLM died 1 times (rollout.vllm.restarts=0)" in told
    assert (run / "vllm" / "rank-1" / "server.log").exists()
    for rank in "01":
        seen = json.loads((tmp_path / f"{rank}.environment").read_text())
        assert not {"RANK", "LOCAL_RANK", "MASTER_PORT"} & set(seen)
        assert not any(name.startswith("TORCHELASTIC_") for name in seen)


def test_an_own_vllm_sees_the_gpu_of_its_rank(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert own_environment(1)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5f")
    assert own_environment(1)["CUDA_VISIBLE_DEVICES"] == "GPU-5f"
    assert own_environment(None)["CUDA_VISIBLE_DEVICES"] == "3,GPU-5f"
    assert not {"WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"} & set(own_environment(0))
    config = config_of("x", python="python")
    alone = ((Ranks(device="cuda"), None), (Ranks(device="cuda:1"), 1), (Ranks(), None))
    for ranks, gpu in ((Ranks(1, 2, "cuda:1"), 1), (Ranks(1, 2, "cpu"), None), *alone):
        assert Link(config, ranks, 4, tmp_path, print).server._gpu == gpu


def test_ranks_share_out_the_servers_in_their_order():
    assert [VllmConfig(base_url="http://h:1").address(rank, 2) for rank in range(2)] == [
        "http://h:1"
    ] * 2
    two = VllmConfig(base_url=("http://a:1", "http://b:1"))
    assert [two.address(rank, 4)[7] for rank in range(4)] == ["a", "a", "b", "b"]
    assert VllmConfig().address(1, 2) is None
    two.check_world(4)
    stored = yaml.safe_load(
        dump_config(settings("x", rollout=RolloutConfig(turns_per_env=2, vllm=two)))
    )
    assert stored["rollout"]["vllm"]["base_url"] == ["http://a:1", "http://b:1"]
    assert build_config(TrainConfig, stored).rollout.vllm == two
    with pytest.raises(ConfigError, match=r"2 addresses for 3 ranks: .* must divide"):
        two.check_world(3)
    with pytest.raises(ConfigError, match="2 addresses for 1 rank: "):
        two.check_world(1)
    with pytest.raises(ConfigError, match="names no server"):
        VllmConfig(base_url=())
    with pytest.raises(ConfigError, match=r"base_url must be .* list"):
        VllmConfig(base_url=("http://a:1", "b:1"))
