"""The teacher's adapter beside the agent's, on servers that misbehave by script."""

import json
import os
from dataclasses import replace

import pytest
import torch
from test_vllm import LORA, SAMPLING, config_of, write
from vllm_fake import installed, serving

from gtr_turbo.checkpoint import own_folder
from gtr_turbo.checks import ConfigError
from gtr_turbo.collect import Envs, collect
from gtr_turbo.config import EnvConfig, RolloutConfig, SamplingConfig, VllmConfig
from gtr_turbo.policy.vllm import VllmEngine
from gtr_turbo.policy.vllm_http import EngineError
from gtr_turbo.policy.vllm_probe import mistaken_for
from gtr_turbo.teacher.imitation import write_thoughts
from gtr_turbo.teaching_config import GuidanceConfig, ImitationConfig
from gtr_turbo.trainer import train
from tiny import Silent, make_policy, observations, perturb, scripted, settings

FIELDS = ("cards", "formula", "thoughts", "action")
ENGINE = {
    "engine/logprob_gap", "engine/restarts", "engine/sync_seconds", "engine/probe_change",
    "engine/probe_change_wanted", "engine/teacher_energy", "engine/teacher_gap",
}  # fmt: skip
SFT = GuidanceConfig(kind="sft", imitation=ImitationConfig(samples=4, retries=0))


def valid(seed):
    """A reply that can be read; the action depends on the seed."""
    fields = {"cards": [2, 6], "formula": "", "thoughts": "2*6=12", "action": str(seed % 10 + 1)}
    return json.dumps(fields)


def change_of(policy, *, scale=0.05, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(d.shape, generator=generator) for n, d in policy.deltas()}


@pytest.fixture(scope="module")
def behind(tiny25):
    return make_policy(tiny25, **LORA)


@pytest.fixture
def policy(tiny25):
    """An agent and a teacher away from the start and from each other."""
    made = make_policy(tiny25, teacher_rank=6, **LORA)
    perturb(made, scale=0.1)
    made.load_teacher(change_of(made))
    return made


def sft(folder, url, **vllm):
    """Settings with which vLLM writes the teacher's thoughts."""
    config = config_of(folder, url, teacher_rank=6, **vllm)
    return settings(folder, model=config.model, rollout=config.rollout, guidance=SFT)


def engine_for(policy, url, folder, **vllm):
    notes = []
    made = VllmEngine(policy, sft(policy.config.path, url, **vllm), folder / "vllm", notes.append)
    made.notes = notes
    return made


def ready(policy, url, folder, **vllm):
    """An engine that has written as the agent, so that there is something to probe with."""
    engine = engine_for(policy, url, folder, **vllm)
    engine.refresh()
    write(engine, policy)
    return engine


def thoughts(engine, policy, count=2, temperature=0.2):
    draws = torch.Generator().manual_seed(2)
    return engine.write_as_teacher(
        observations(policy, count), SAMPLING, draws, temperature=temperature
    )


def roles(server):
    return sorted(name.partition("-")[0] for name in server.loaded)


# -- side by side ----------------------------------------------------------------------------


def test_agent_and_teacher_lie_side_by_side_and_each_writes_with_its_own(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path)
        engine.refresh_teacher()
        assert roles(server) == ["student", "teacher"]
        assert sorted(os.listdir(tmp_path / "vllm")) == sorted(server.loaded)
        server.requests.clear()
        ids = thoughts(engine, policy, temperature=0.33)
        replies = write(engine, policy)
        bodies = [body for path, body in server.requests if "generate" in path]
        probe = engine._probe
        theirs = {role: engine._theirs(role, probe) for role in ("student", "teacher")}
        engine.close()
        assert not server.loaded
    assert [body["model"].partition("-")[0] for body in bodies] == ["teacher"] * 2 + ["student"] * 2
    assert [body["sampling_params"]["temperature"] for body in bodies] == [0.33] * 2 + [0.7] * 2
    assert (len(ids), len(replies)) == (2, 2)
    assert {row.dtype for row in ids} == {torch.int64}
    with policy.as_cut_teacher():
        teacher = engine._ours(probe)
    torch.testing.assert_close(theirs["teacher"], teacher, atol=1e-4, rtol=0)
    torch.testing.assert_close(theirs["student"], engine._ours(probe), atol=1e-4, rtol=0)
    assert (theirs["teacher"] - theirs["student"]).abs().mean() > 0.01
    row = engine.metrics()
    assert row["engine/teacher_gap"] < 1e-4
    assert row["engine/teacher_energy"] == policy.cut.energy
    assert os.listdir(tmp_path / "vllm") == []


def test_a_new_teacher_comes_under_a_new_name_and_only_the_old_one_goes(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path)
        engine.refresh_teacher()
        first = set(server.loaded)
        count = len(server.requests)
        engine.refresh_teacher()  # nothing changed, nothing is sent
        assert len(server.requests) == count
        policy.load_teacher(change_of(policy, seed=2))
        engine.refresh_teacher()
        second = set(server.loaded)
        assert [name.partition("-")[0] for name in first & second] == ["student"]
        assert set(os.listdir(tmp_path / "vllm")) == second
        perturb(policy, scale=0.05, seed=4)
        engine.refresh()
        assert [name.partition("-")[0] for name in second & set(server.loaded)] == ["teacher"]
        assert len(server.loaded) == 2
        thoughts(engine, policy)


CONFUSIONS = {
    "agent": lambda names: names["student"],
    "start": None,
    "teacher before": lambda names: names["before"],
}


@pytest.mark.parametrize("other", CONFUSIONS)
def test_a_server_that_writes_with_other_weights_than_the_teachers_is_found_out(
    other, policy, behind, tmp_path
):
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path)
        engine.refresh_teacher()
        names = {"student": engine._names["student"], "before": engine._names["teacher"]}
        kept = dict(server.loaded)
        policy.load_teacher(change_of(policy, seed=2))

        def serve(name):
            if name == names["student"]:
                return kept[name]
            if other == "start":
                return 0.0, kept[names["student"]][1]
            return kept[CONFUSIONS[other](names)]

        server.serve = serve
        with pytest.raises(EngineError, match=rf"does not write with it.*nearer .* the {other} "):
            engine.refresh_teacher()


def test_a_teacher_far_from_all_that_is_known_is_found_out(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path)
        engine._bound = 0.05
        plain = server.serve
        noise = torch.Generator().manual_seed(9)

        def serve(name):
            scale, tensors = plain(name)
            if name.startswith("teacher"):
                tensors = {
                    n: t + 0.5 * torch.randn(t.shape, generator=noise) for n, t in tensors.items()
                }
            return scale, tensors

        server.serve = serve
        with pytest.raises(EngineError, match=r"max_logprob_gap=0\.05.*teacher_rank=null"):
            engine.refresh_teacher()


def test_what_a_teacher_is_mistaken_for_by_hand():
    ours, near, far = (
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-1.1, -2.1]),
        torch.tensor([-3.0, 0]),
    )
    assert mistaken_for(ours + 0.01, ours, {"near": near, "far": far}, 0.01) is None
    assert mistaken_for(far, ours, {"near": near, "far": far}, 0.01) == "far"
    assert mistaken_for(far, ours, {"far": far}, 0.01) == "far"
    assert mistaken_for(near, ours, {"near": near}, 0.03) is None  # 0.1 is within 4 * 0.03


# -- outages ---------------------------------------------------------------------------------


def test_an_engine_that_died_gets_both_adapters_again(policy, behind, tmp_path, monkeypatch):
    with installed(monkeypatch, behind) as vllm:
        engine = ready(policy, None, tmp_path, mode="inprocess", restarts=1)
        engine.refresh_teacher()
        vllm.server.script[:] = ["dead"]
        assert len(thoughts(engine, policy)) == 2
        assert engine.metrics()["engine/restarts"] == 1
        assert vllm.calls.count("add_lora") == 4
        assert [len(made.adapters) for made in vllm.engines] == [2, 2]
        words = vllm.words[0]
        options = {word: words[place + 1] for place, word in enumerate(words[:-1])}
        assert options["--max-lora-rank"] == "8"  # 6 and 4, up to what vLLM takes
        assert (options["--max-loras"], options["--max-cpu-loras"]) == ("2", "4")
        engine.close()


def test_the_largest_rank_decides_what_the_server_takes(policy, behind, tmp_path, monkeypatch):
    config = sft(policy.config.path, None, mode="inprocess")
    vllm = VllmConfig(mode="inprocess", teacher_rank=100)
    config = settings(
        policy.config.path,
        model=config.model,
        rollout=RolloutConfig(turns_per_env=2, engine="vllm", vllm=vllm),
        guidance=SFT,
    )
    with installed(monkeypatch, behind):
        engine = VllmEngine(policy, config, tmp_path, print)
    words = engine._link.server._words
    assert words[words.index("--max-lora-rank") + 1] == "128"


def test_a_server_that_forgot_the_teacher_gets_it_again(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path)
        engine.refresh_teacher()
        server.loaded.clear()
        assert len(thoughts(engine, policy)) == 2
        assert roles(server) == ["student", "teacher"]


def test_a_server_that_never_answers_the_teacher_stops_the_run(policy, behind, tmp_path):
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path)
        engine.refresh_teacher()
        server.script[:] = [(500, b"")] * 3
        with pytest.raises(EngineError, match="after 3 tries: HTTP 500"):
            thoughts(engine, policy, 1)


# -- thoughts --------------------------------------------------------------------------------


@pytest.fixture
def turns(policy, monkeypatch):
    """Four valid turns of EZPoints, by script."""
    monkeypatch.setattr("gtr_turbo.collect.generate", scripted)
    envs = Envs(EnvConfig(options={"prompt": "compact"}, num_envs=2), "train", 0)
    envs.start()
    rollout = RolloutConfig(turns_per_env=2)
    return collect(envs, policy, SamplingConfig(), rollout, torch.Generator().manual_seed(0))


def test_unreadable_thoughts_are_asked_for_again_hotter(policy, behind, turns, tmp_path):
    """Of four turns the first try gives two that can be read, the second one more, and there is no fourth."""
    config = ImitationConfig(temperature=0.5, temperature_ramp=1.5, temperature_max=0.9, retries=2)
    said = []

    def says(seed):
        said.append(seed)
        return "{}" if len(said) in (2, 3, 6, 7) else valid(seed)

    sampling = SamplingConfig(max_new_tokens=80, top_k=5, repetition_penalty=1.2)
    with serving(behind) as server:
        engine = ready(policy, server.url, tmp_path, concurrency=1)
        server.says = says
        server.requests.clear()
        written = write_thoughts(
            policy, turns, FIELDS, config, sampling, torch.Generator(), batch_turns=1, engine=engine
        )
        asked = [
            body["sampling_params"]
            for path, body in server.requests
            if "generate" in path and "prompt_logprobs" not in body["sampling_params"]
        ]
    assert [a["temperature"] for a in asked] == [0.5] * 4 + [0.75] * 2 + [0.9]
    assert len({a["seed"] for a in asked}) == 7
    assert {(a["top_k"], a["repetition_penalty"], a["max_tokens"]) for a in asked} == {(0, 1.0, 80)}
    assert sum(text is None for text in written.texts) == 1
    assert written.metrics == {
        "imitation/asked": 4.0, "imitation/written": 0.75, "imitation/tries": 7 / 4,
    }  # fmt: skip
    assert json.loads(next(t for t in written.texts if t))["thoughts"] == "2*6=12"


def test_in_a_run_vllm_writes_agent_and_teacher_and_the_trainer_decodes_nothing(
    tiny25, behind, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("the trainer decodes")

    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", never)
    view = Silent()
    with serving(behind) as server, own_folder(tmp_path):
        server.says = valid
        config = sft(tiny25, server.url)
        config = settings(
            tiny25, env_steps=12, model=config.model, rollout=config.rollout, guidance=SFT,
            sampling=SamplingConfig(max_new_tokens=80),
        )  # fmt: skip
        train(config, tmp_path, view)
    assert not server.loaded
    loads = [body["lora_name"] for path, body in server.requests if "/load_lora" in path]
    assert [name.partition("-")[0] for name in loads] == ["student", "teacher"] * 3
    assert len(set(loads)) == 6
    for number, row in enumerate(view.rows):
        assert row["imitation/asked"] == row["imitation/collected"] / (number + 1) == 4
        assert row["imitation/written"] == 1
        assert row["engine/teacher_gap"] < 1e-4
    energy = [row["engine/teacher_energy"] for row in view.rows]
    assert energy[0] == 1  # the first teacher is the start
    assert all(0.5 < share < 1 for share in energy[1:])
    assert {name for name in view.rows[1] if name.startswith("engine/")} == ENGINE
    assert set(view.rows[1]) - set(view.rows[0]) == {
        "engine/probe_change",
        "engine/probe_change_wanted",
    }


def test_for_the_teachers_thoughts_vllm_wakes_up_again(tiny25, behind, tmp_path, monkeypatch):
    config = sft(tiny25, None, mode="inprocess", sleep=True)
    config = replace(config, sampling=SamplingConfig(max_new_tokens=80))
    with installed(monkeypatch, behind) as vllm, own_folder(tmp_path):
        vllm.server.says = valid
        train(config, tmp_path, Silent())
    told = [call for call in vllm.calls if call in ("sleep", "wake_up", "add_lora", "shutdown")]
    assert told == ["add_lora", "sleep", "wake_up", "add_lora", "sleep", "shutdown"]


def test_without_a_rank_the_trainer_writes_with_the_exact_merge(
    tiny25, behind, tmp_path, monkeypatch
):
    written = []

    def told(policy, *rest, **options):
        written.append(policy.cut)
        return scripted(policy, *rest, **options)

    monkeypatch.setattr("gtr_turbo.teacher.imitation.generate", told)
    with serving(behind) as server, own_folder(tmp_path):
        server.says = valid
        config = config_of(tiny25, server.url)
        config = settings(
            tiny25, model=config.model, rollout=config.rollout, guidance=SFT,
            sampling=SamplingConfig(max_new_tokens=80),
        )  # fmt: skip
        view = Silent()
        train(config, tmp_path, view)
        assert not any(
            "teacher" in body["lora_name"] for path, body in server.requests if "lora" in path
        )
    assert written == [None]
    assert "engine/teacher_energy" not in view.rows[0]


def test_a_teacher_is_cut_only_where_vllm_writes_its_thoughts(tiny25):
    config = sft(tiny25, None)
    assert config.teacher_rank == 6
    kl = settings(tiny25, model=config.model, rollout=config.rollout)
    assert kl.teacher_rank is None
    rollout = RolloutConfig(turns_per_env=2, vllm=config.rollout.vllm)
    assert settings(tiny25, rollout=rollout, guidance=SFT).teacher_rank is None
    with pytest.raises(ConfigError, match=r"rollout\.vllm\.teacher_rank=0"):
        VllmConfig(teacher_rank=0)
