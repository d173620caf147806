"""The engine `vllm` with vLLM itself: `make test-vllm`, which gives it an environment of its own.

One server for all tests, started as a run starts it, then one engine in this process.
"""

import json
import multiprocessing
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from gtr_turbo.cli import main
from gtr_turbo.config import ModelConfig, RolloutConfig, SamplingConfig, VllmConfig
from gtr_turbo.policy.scoring import score
from gtr_turbo.policy.vllm import VllmEngine
from gtr_turbo.policy.vllm_http import picture, read_scores
from gtr_turbo.teaching_config import GuidanceConfig
from tiny import inputs_of, make_policy, observations, perturb, settings

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")

LORA = {"train": "lora", "lora_rank": 4, "lora_alpha": 8}
SAMPLING = SamplingConfig(max_new_tokens=12)


def merge_of(policy, *, seed):
    """A change of full rank, as TIES makes them."""
    generator = torch.Generator().manual_seed(seed)
    return {n: 0.05 * torch.randn(d.shape, generator=generator) for n, d in policy.deltas()}


@pytest.fixture(scope="module")
def policy(tiny25):
    made = make_policy(tiny25, teacher_rank=6, **LORA)
    perturb(made, scale=0.1)
    made.load_teacher(merge_of(made, seed=3))
    return made


@pytest.fixture(scope="module", params=["server", "inprocess"])
def engine(request, policy, tiny25, tmp_path_factory):
    """An engine with vLLM of its own, the policy's adapter loaded."""
    vllm = VllmConfig(
        mode=request.param, max_model_len=512, arguments=("--enforce-eager",), teacher_rank=6
    )
    config = settings(
        tiny25,
        model=ModelConfig(path=str(tiny25), attention="eager", **LORA),
        rollout=RolloutConfig(turns_per_env=2, engine="vllm", vllm=vllm),
        guidance=GuidanceConfig(kind="sft"),
    )
    made = VllmEngine(policy, config, tmp_path_factory.mktemp("engine"), print)
    try:
        made.refresh()
        yield made
    finally:
        made.close()


def write(engine, policy, count=6, sampling=SAMPLING, **options):
    generator = torch.Generator().manual_seed(0)
    return engine.generate(observations(policy, count), sampling, generator, **options)


def test_log_probs_of_vllm_are_the_trainers(engine, policy):
    engine.metrics()
    replies = write(engine, policy)
    assert engine.metrics()["engine/logprob_gap"] < 1e-3
    ids = [reply.response_ids for reply in replies]
    with torch.no_grad():
        scores = score(policy, inputs_of(policy, observations(policy, 6), ids))
    for i, reply in enumerate(replies):
        assert torch.allclose(reply.logprobs, scores.logprobs[i, : len(ids[i])], atol=1e-3)
    assert not any(policy.banned[row].any() for row in ids)


def test_the_picture_is_seen(engine, policy):
    """The log-probs of a reply to a black frame are the trainer's of a black frame, and others."""
    (seen,) = observations(policy, 1)
    reply = write(engine, policy, 1)[0].response_ids
    black = policy.observe([seen.frame * 0], [""])[0]
    changed = type(seen)(
        prompt_ids=seen.prompt_ids, positions=seen.positions, frame=seen.frame * 0,
        features=black.features, grid=seen.grid,
    )  # fmt: skip
    ours = [engine._own([o], [reply])[0] for o in (seen, changed)]
    body = engine._body(changed, {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0})
    assert body["content_parts"][0]["url"] == picture(policy.processor.shrink(seen.frame * 0))
    body["token_ids"] = body["token_ids"] + reply.tolist()
    name = engine._names["student"]
    theirs = torch.tensor(
        engine._link.generate(name, body, lambda a: read_scores(a, reply.tolist()))
    )
    assert (theirs - ours[1]).abs().max() < 1e-3
    assert (ours[0] - ours[1]).abs().max() > 1e-2


def test_the_sampler_draws_from_the_policy(engine, policy):
    """Frequencies of the first token over 300 draws, at the scored probabilities."""
    (seen,) = observations(policy, 1)
    generator = torch.Generator().manual_seed(0)
    sharp = policy.temperature
    try:
        policy.temperature = 0.05  # so that some token has a share worth counting
        drawn = engine.generate([seen] * 300, SamplingConfig(max_new_tokens=1), generator)
    finally:
        policy.temperature = sharp
    share = {int(r.response_ids[0]): float(r.logprobs[0].exp()) for r in drawn}
    token = max(share, key=share.get)
    p = share[token]
    assert p > 0.05
    found = sum(int(r.response_ids[0]) == token for r in drawn) / 300
    assert abs(found - p) < 4 * (p * (1 - p) / 300) ** 0.5  # four standard errors


def test_a_changed_adapter_changes_the_replies_and_the_probe_sees_it(engine, policy):
    before = [reply.response_ids.tolist() for reply in write(engine, policy, greedy=True)]
    assert before == [r.response_ids.tolist() for r in write(engine, policy, greedy=True)]
    engine.metrics()
    perturb(policy, scale=0.1, seed=7)
    engine.refresh()
    after = [reply.response_ids.tolist() for reply in write(engine, policy, greedy=True)]
    assert before != after
    row = engine.metrics()
    assert row["engine/logprob_gap"] < 1e-3
    assert len(list(engine._folder.glob("student-*"))) == 1  # the one before is gone
    assert row["engine/probe_change_wanted"] > 0.01
    assert row["engine/probe_change"] == pytest.approx(row["engine/probe_change_wanted"], rel=1e-2)


def test_agent_and_teacher_write_side_by_side_each_with_its_own_adapter(engine, policy):
    """Their log-probs of one reply differ, and each is the trainer's; in one batch too."""
    engine.refresh_teacher()
    probe, observed = engine._probe, observations(policy, 3)
    theirs = {role: engine._theirs(role, probe) for role in ("student", "teacher")}
    with policy.as_cut_teacher():
        teacher = engine._ours(probe)
    assert (theirs["teacher"] - teacher).abs().max() < 1e-3
    assert (theirs["student"] - engine._ours(probe)).abs().max() < 1e-3
    assert (theirs["teacher"] - theirs["student"]).abs().mean() > 0.01
    settings = {"temperature": 0.5, "top_k": 0, "repetition_penalty": 1.0, "max_tokens": 12}
    tasks = [
        engine._task(engine._names[role], seen, {**settings, "seed": i})
        for i, seen in enumerate(observed)
        for role in ("student", "teacher")
    ]
    written = engine._link.insist(tasks)  # all at once
    gaps = {}
    for role, rows in (("student", written[::2]), ("teacher", written[1::2])):
        with policy.as_cut_teacher() if role == "teacher" else nullcontext():
            ours = engine._own(observed, [torch.tensor(ids) for ids, _ in rows])
        gaps[role] = max(
            float((o - torch.tensor(logprobs)).abs().max())
            for o, (_, logprobs) in zip(ours, rows, strict=True)
        )
    assert max(gaps.values()) < 1e-3
    row = engine.metrics()
    assert row["engine/teacher_gap"] < 1e-3
    assert row["engine/teacher_energy"] == policy.cut.energy < 1


def test_a_new_teacher_takes_the_place_of_the_old_one(engine, policy):
    policy.load_teacher(merge_of(policy, seed=4 if engine._config.mode == "server" else 5))
    before = engine._names["teacher"]
    engine.refresh_teacher()
    assert [path.name for path in engine._folder.glob("teacher-*")] == [engine._names["teacher"]]
    assert engine._names["teacher"] != before
    assert engine.metrics()["engine/teacher_gap"] < 1e-3
    draws = torch.Generator().manual_seed(0)
    thoughts = engine.write_as_teacher(observations(policy, 2), SAMPLING, draws, temperature=0.3)
    assert all(0 < len(ids) <= SAMPLING.max_new_tokens for ids in thoughts)
    assert len(write(engine, policy, 2)) == 2  # the agent's is still there
    assert engine.metrics()["engine/logprob_gap"] < 1e-3


def test_vllm_that_lost_the_adapter_gets_it_again(engine, policy):
    name = engine._names["student"]
    engine._link._load(name)  # one that it has
    engine._link.client.unload_adapter(name)
    assert len(write(engine, policy, 2)) == 2
    assert engine.metrics()["engine/logprob_gap"] < 1e-3


def test_train_runs_two_updates_with_the_engine(engine, tiny25, tmp_path):
    """Two ranks with the server that there is, or one process with an engine of its own."""
    vllm = {"mode": "inprocess", "max_model_len": 512, "arguments": ["--enforce-eager"]}
    if engine._config.mode == "server":
        vllm = {"base_url": engine._link.client.url}
    vllm["teacher_rank"] = 6
    config = tmp_path / "small.yaml"
    config.write_text(
        json.dumps(
            {
                "env": {"id": "EZPoints", "options": {"prompt": "compact"}, "train_split": "train",
                        "eval_split": "held-out", "num_envs": 4},
                "env_steps": 16, "threads": 1, "trackers": [],
                "model": {"path": str(tiny25), "attention": "eager", **LORA},
                "sampling": {"max_new_tokens": 12, "top_k": 5, "repetition_penalty": 1.2},
                "rollout": {"engine": "vllm", "turns_per_env": 2, "vllm": vllm},
                "ppo": {"minibatch_turns": 8, "microbatch_turns": 4, "lr": 1e-2},
                "guidance": {"kind": "sft", "imitation": {"retries": 1}},
                "eval": {"episodes": 2},
            }
        )
    )  # fmt: skip
    run = tmp_path / "run"
    words = ["train", "--config", str(config), "--run", str(run)]
    if engine._config.mode == "server":
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        job = [sys.executable, *ranks, "-m", "--", "gtr_turbo", *words]
        done = subprocess.run(job, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert main(words) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2]
    assert all(row["engine/logprob_gap"] < 0.01 for row in rows)
    assert rows[1]["engine/probe_change"] > 0.01
    assert rows[1]["engine/restarts"] == 0
    assert all(row["engine/teacher_gap"] < 0.01 for row in rows)
    assert 0.3 < rows[1]["engine/teacher_energy"] < rows[0]["engine/teacher_energy"] == 1


def test_a_killed_engine_is_made_anew(engine, policy):
    if engine._config.mode == "server":
        pytest.skip("tests/policy/test_vllm.py kills servers")
    (child,) = multiprocessing.active_children()
    child.kill()
    child.join()
    assert len(write(engine, policy, 2)) == 2
    row = engine.metrics()
    assert row["engine/restarts"] == 1
    assert row["engine/logprob_gap"] < 1e-3
    assert multiprocessing.active_children() != [child]
